"""The log: no secret gets into it, whatever the way, and the last warnings are kept."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vddkfs.errors import UsageError
from vddkfs.observe import logs
from vddkfs.observe.logs import Log, Recent, Redaction, redact

SECRETS = [
    "vddk://root:s3cret@vc.example.com/DC0",
    "see https://user:s3cret@host/x and more",
    "vddk://administrator@vsphere.local:s3cret@vc.example.com/DC0",
    "vddk://root:s3/cret@vc.example.com/DC0",
    "password=s3cret",
    "PASSWORD = s3cret",
    "passwd: s3cret",
    "pass=s3cret",
    "token=s3cret, user=x",
    "Cookie: s3cret",
    "ticket=s3cret;next",
    "secret: s3cret",
    '{"password": "s3cret"}',
    '{"password":"two s3cret words", "x": 1}',
    '{"password": "a\\"s3cret"}',
    "{'password': 's3cret', 'user': 'x'}",
    "vc_password=s3cret",
    "session_token=s3cret",
]


FALLBACK = [Path("/nowhere")]
"""The file of the state folder, for the test that runs."""


@pytest.fixture
def log(tmp_path: Path) -> Iterator[logging.Logger]:
    """A logger below the root, with the root's handlers put back afterwards."""
    FALLBACK[0] = tmp_path / "fallback"
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield logging.getLogger("vddkfs.test")
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("pyfuse3").setLevel(logging.NOTSET)


@pytest.mark.parametrize("text", SECRETS)
def test_what_looks_like_a_secret_is_taken_out(text: str) -> None:
    found = redact(text)
    assert "cret" not in found.replace("secret:", "")
    assert "xxx" in found


@pytest.mark.parametrize(
    "text",
    [
        "vddk://vc.example.com:443/DC0/vm/web",
        "vddk://root@vc.example.com/DC0",
        "credentials=/etc/vddkfs/vc.cred",
        "compass=north",
        "passing 3 of 4 tests",
        "/vm/password.vmdk was replaced by another file",
        "12:30:00 worker of web: it ended",
        "",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_the_rest_of_a_line_stays_readable() -> None:
    line = "login of vddk://root:s3cret@vc/DC0 failed: password=s3cret, user=x"
    assert redact(line) == "login of vddk://root:xxx@vc/DC0 failed: password=xxx, user=x"


@contextlib.contextmanager
def logging_to(target: str | Path, level: str = "info", front: bool = True) -> Iterator[Log]:
    """Log to *target*; all of it is written at the end."""
    logging.getLogger().handlers.clear()  # pytest's: it would be the first to format a traceback
    found = logs.set_up(str(target), level, front, FALLBACK[0])
    yield found
    found.close()
    assert logging.getLogger().handlers == []


def test_a_secret_in_arguments_and_in_a_traceback_gets_into_no_handler(
    log: logging.Logger, tmp_path: Path
) -> None:
    with logging_to(tmp_path / "log") as found:
        log.warning("worker of %s says: %s", "web", "password=s3cret")
        log.warning("%(password)s in a dict", {"password": "password=s3cret"})
        try:
            raise RuntimeError("cannot log in: token=s3cret")
        except RuntimeError:
            log.exception("a bug with cookie=s3cret")
    written = (tmp_path / "log").read_text()
    kept = "\n".join(found.recent.lines)
    for text in (written, kept):
        assert "s3cret" not in text
        assert "worker of web says: password=xxx" in text
        assert "RuntimeError: cannot log in: token=xxx" in text
        assert "Traceback" in text
        assert "a bug with cookie=xxx" in text


def test_a_line_with_a_percent_sign_is_logged_as_it_is(log: logging.Logger, tmp_path: Path) -> None:
    with logging_to(tmp_path / "log"):
        log.warning("%s", "100% of %s %d")
        log.warning("50% done")
    written = (tmp_path / "log").read_text()
    assert "WARNING 100% of %s %d\n" in written
    assert "WARNING 50% done\n" in written


def test_the_last_warnings_and_errors_are_kept_and_nothing_less(log: logging.Logger) -> None:
    recent = Recent(most=3)
    recent.addFilter(Redaction())
    log.addHandler(recent)
    log.setLevel(logging.DEBUG)
    for number in range(5):
        log.warning("warning %d", number)
        log.info("info %d", number)
    log.error("error")
    log.removeHandler(recent)
    log.setLevel(logging.NOTSET)
    assert [line.split(" ", 2)[2] for line in recent.lines] == [
        "WARNING warning 3",
        "WARNING warning 4",
        "ERROR error",
    ]


@pytest.mark.parametrize(("level", "expected"), [("error", 1), ("warning", 2), ("info", 3)])
def test_the_level_says_what_is_logged(
    level: str, expected: int, log: logging.Logger, tmp_path: Path
) -> None:
    with logging_to(tmp_path / "log", level):
        for number in (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG):
            log.log(number, "line")
    assert len((tmp_path / "log").read_text().splitlines()) == expected


def test_the_library_below_does_not_flood_the_debug_log(
    log: logging.Logger, tmp_path: Path
) -> None:
    with logging_to(tmp_path / "log", "debug"):
        log.debug("ours")
        logging.getLogger("pyfuse3").debug("a request")
    assert (tmp_path / "log").read_text().endswith("DEBUG ours\n")


def test_names_that_are_not_utf_8_are_logged_too(
    log: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(tmp_path / "log") as found:
        log.warning("%s is mounted", os.fsdecode(b"/vm/caf\xe9"))
    assert "is mounted" in (tmp_path / "log").read_text(errors="replace")
    assert "is mounted" in found.recent.lines[-1]
    assert "Logging error" not in capsys.readouterr().err


def test_a_daemon_in_front_logs_to_stderr_and_marks_its_lines(
    log: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to("auto") as found:
        log.error("password=s3cret")
    assert found.target == "stderr"
    assert capsys.readouterr().err == "vddkfs: ERROR password=xxx\n"
    assert not FALLBACK[0].exists()


def test_a_daemon_behind_without_syslog_logs_to_the_file_of_the_mount(
    log: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_SYSLOG", tmp_path / "none")
    with logging_to("auto", front=False) as found:
        log.info("here")
    assert found.target == str(FALLBACK[0])
    assert FALLBACK[0].read_text().endswith("INFO here\n")
    found.ended_well()
    assert not FALLBACK[0].exists(), "it goes away with the mount"
    found.ended_well()


def test_a_file_that_the_operator_named_stays(log: logging.Logger, tmp_path: Path) -> None:
    with logging_to(tmp_path / "log") as found:
        log.info("here")
    found.ended_well()
    assert (tmp_path / "log").exists()


def test_a_writer_that_hangs_keeps_nobody_waiting(
    log: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    real = logging.FileHandler.emit

    def emit(self: logging.FileHandler, record: logging.LogRecord) -> None:
        assert release.wait(10)
        real(self, record)

    monkeypatch.setattr(logging.FileHandler, "emit", emit)
    with logging_to(tmp_path / "log") as found:
        for number in range(1000):
            log.warning("line %d", number)
        assert found.recent.lines[-1].endswith("line 999")
        assert (tmp_path / "log").read_text() == ""
        release.set()
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == [str(n) for n in range(1000)]


@pytest.mark.parametrize("target", ["auto", "syslog"])
@pytest.mark.parametrize("name", [b"/vm/web", b"/vm/caf\xe9"])
def test_a_daemon_behind_logs_to_syslog(
    target: str,
    name: bytes,
    log: logging.Logger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(logs, "_SYSLOG", tmp_path / "dev-log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "dev-log"))
        with logging_to(target, front=False) as found:
            log.error("%s: password=s3cret", os.fsdecode(name))
        assert found.target == "syslog"
        assert "Logging error" not in capsys.readouterr().err
        line = syslog.recv(1000, socket.MSG_DONTWAIT)
    assert line.startswith(b"<27>vddkfs["), "facility daemon, severity error"
    assert b"password=xxx" in line
    assert b"s3cret" not in line


@pytest.mark.parametrize("target", ["none/log", "syslog"])
def test_a_log_that_cannot_be_opened_is_told_to_the_caller(
    target: str, log: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_SYSLOG", tmp_path / "none")
    where = target if target == "syslog" else str(tmp_path / target)
    before = list(logging.getLogger().handlers)
    with pytest.raises(UsageError) as caught:
        logs.set_up(where, "info", False, FALLBACK[0])
    assert caught.value.message == f"log={where} cannot be opened"
    assert caught.value.cause
    assert logging.getLogger().handlers == before
