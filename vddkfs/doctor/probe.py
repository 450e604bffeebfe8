"""Asking a library what it answers: ``vddkfs doctor --probe``.

Each question is asked in a process of its own (``questions``): a crash or a hang is an answer, too.
What would attach a disk to this machine is not asked, and nothing is written.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from vddkfs.doctor.questions import QUESTIONS, Job, Question
from vddkfs.doctor.rows import Row, plain
from vddkfs.engines.config import VddkConfig
from vddkfs.engines.output import parse_line
from vddkfs.options import MountOptions
from vddkfs.remote import Remote, readable

SECONDS: Final = 60.0
_SAID: Final = 5
"""Lines that are kept of what the library said last."""
_REPORT: Final = "tell vddkfs's authors, with VDDK's release: it relies on another answer"
_OPENING: Final = "open"


class Answer(msgspec.Struct):
    """What came of one question: *answers* in order, how its process *ended*, what was *said*.

    *ended* is "exit 0", "signal 11" or "time-out".
    """

    question: str
    asks: str
    answers: dict[str, Any]
    ended: str
    seconds: float
    said: list[str]


def ask_all(
    options: MountOptions, remote: Remote | None, folder: Path, secret: int
) -> tuple[list[Row], list[Answer]]:
    """Ask all questions that can be asked; *secret* is a descriptor of credentials, or -1."""
    config = configure(options, remote)
    rows: list[Row] = []
    answers: list[Answer] = []
    named = remote is not None and bool(remote.links)
    able = named and (secret >= 0 or not config.server)
    if named and not able:
        finding = "the server was not asked, because there are no credentials"
        rows.append(Row("warning", "probe", finding, "give -o credentials=FILE"))
    for name, question in QUESTIONS.items():
        if question.needs_disk and not able:
            continue
        answer = ask(name, question, config, folder, secret if question.needs_disk else -1)
        answers.append(answer)
        rows.append(judge(answer))
        # One login that fails is enough: servers lock accounts.
        able = able and not (name == _OPENING and rows[-1].level == "failure")
    return rows, answers


def configure(options: MountOptions, remote: Remote | None) -> VddkConfig:
    """Return what is asked about: the first link that can be opened, without hotadd."""
    config = VddkConfig(
        images=(),
        tmp_directory="",
        libdir=options.libdir,
        vddk_config=options.vddk_config,
        nfc_port=options.nfc_port,
        thumbprint=options.thumbprint,
    )
    if remote is None or not remote.links:
        return config
    transports = tuple(name for name in options.transports if name != "hotadd")
    return msgspec.structs.replace(
        config,
        images=(remote.links[readable(remote.links)[0]],),
        server=remote.server,
        port=remote.port,
        vmx_spec=f"moref={remote.moref}" if remote.server else "",
        transports=(transports or ("nbdssl", "nbd")) if remote.server else (),
    )


def ask(
    name: str,
    question: Question,
    config: VddkConfig,
    folder: Path,
    secret: int,
    seconds: float = SECONDS,
) -> Answer:
    """Ask one question, for at most *seconds*. Raises OSError if no process can be started."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own:
        job = Job(name, msgspec.structs.replace(config, tmp_directory=own))
        process = subprocess.Popen(
            [*_COMMAND, str(os.getpid()), str(secret)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[secret] if secret >= 0 else [],
            start_new_session=True,
            env={"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            cwd="/",
        )
        try:
            out, err = process.communicate(msgspec.json.encode(job), seconds)
            ended = f"signal {-process.returncode}" if process.returncode < 0 else ""
            ended = ended or f"exit {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = "time-out"
            out, err = _kill(process)
    took = time.monotonic() - began
    return Answer(name, question.asks, _answers(out), ended, round(took, 3), _said(err))


_COMMAND: Final = (sys.executable, "-I", "-X", "utf8", "-m", "vddkfs.doctor.questions")


def _kill(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """End the process and all that it started; return what it said until then."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        # It hangs in the kernel: nobody can end it, or hear it.
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        return b"", b""


def _answers(out: bytes) -> dict[str, Any]:
    """Return what was answered; the last line of a process that died may be broken."""
    found: dict[str, Any] = {}
    for line in out.splitlines():
        with contextlib.suppress(ValueError):
            part = json.loads(line)
            if isinstance(part, dict):
                found.update(part)
    return found


def _said(err: bytes) -> list[str]:
    texts = [plain(parse_line(line)[1]) for line in err.splitlines()]
    return [text for text in texts if text][-_SAID:]


# Judging.


def judge(answer: Answer) -> Row:
    """Return what is to be said of an answer: only an open that fails is a failure."""
    what = f"probe: {answer.asks}"
    answers = dict(answer.answers)
    advice = str(answers.pop("advice", ""))
    finding = ", ".join(f"{key}={_shown(value)}" for key, value in answers.items()) or "no answer"
    if answer.ended != "exit 0":
        last = f"; it said last: {answer.said[-1]}" if answer.said else ""
        finding = f"the library ended with {answer.ended}; before that {finding}{last}"
        level = "failure" if answer.question == _OPENING else "warning"
        return Row("failure" if level == "failure" else "warning", what, finding, _REPORT)
    if "error" not in answers:
        return Row("ok", what, finding)
    if answer.question == _OPENING:
        return Row("failure", what, finding, advice or "look up the code in VDDK's guide")
    return Row("warning", what, finding, advice or _REPORT)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)
