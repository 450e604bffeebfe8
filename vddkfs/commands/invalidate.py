"""``vddkfs invalidate``: drop what is kept of files whose source changed under the mount.

Nothing of a mount is touched, so that a file that hangs does not keep the command from helping:
which mount a path leads into is told by the kernel's table, and its daemon by the control socket.
"""

import argparse
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec

from vddkfs.cache.coherence import PLACES
from vddkfs.control import Question
from vddkfs.engines.base import Step
from vddkfs.errors import (
    ALL_ERRORS,
    EXIT_OK,
    NotMounted,
    OldAbove,
    OldContentLeft,
    UsageError,
    VddkfsError,
)
from vddkfs.loops import Range, Reader, flush, readers, steps
from vddkfs.mountinfo import Entry, Table, entries
from vddkfs.option_values import size
from vddkfs.report import duration, lines
from vddkfs.state import socket_path

SUMMARY = "drop old content after the source changed"
DESCRIPTION = """\
Drop everything that is kept of PATH and is older than this command. PATH is a file of a mount, a
folder in it, or the mount point. The places that the answer tells of:

""" + "".join(f"  {place:<9}{what}\n" for place, what in PLACES.items())
_FIRST_WORD: Final = 3.0
_NEXT_WORD: Final = 10.0
"""Seconds until it is told what is waited for, and until it is told again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="PATH", nargs="+", help="a file or folder of a mount")
    parser.add_argument(
        "--range",
        dest="range",
        metavar="START:LENGTH",
        default="",
        help="only these bytes of each file; K, M, G and T may follow the numbers",
    )
    parser.add_argument(
        "--loops",
        action="store_true",
        help="drop the pages of loop devices on the files too, and of what is stacked on them",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Invalidate, and print what was done. Returns 0, or raises what is worst."""
    start, length = parse_range(arguments.range)
    table = Table(entries())
    asked = by_mount(arguments.path, table, os.getcwd)
    answers = _ask_all({place: names for place, (_, names) in asked.items()}, start, length)
    results = [_result(place, answers[place], asked[place][0], arguments.loops) for place in asked]
    if arguments.json:
        print(json.dumps({"mounts": [msgspec.to_builtins(one) for one in results]}, indent=2))
    else:
        for text in lines(step for one in results for step in one.steps):
            print(text)
    sys.stdout.flush()
    worst = verdict(results)
    if worst is not None:
        raise worst
    return EXIT_OK


class Result(msgspec.Struct, frozen=True):
    """What came of one mount: *steps*, what reads its files, or an *error* with its *exit_code*."""

    mountpoint: str
    steps: tuple[Step, ...] = ()
    readers: tuple[Reader, ...] = ()
    error: str = ""
    exit_code: int = EXIT_OK


def parse_range(text: str) -> tuple[int, int | None]:
    """Return start and length of "START:LENGTH" in bytes; "" is everything. Raises UsageError."""
    if not text:
        return 0, None
    first, colon, second = text.partition(":")
    try:
        start, length = size(first), size(second)
    except ValueError:
        start = length = 0
    if not colon or not length:
        raise UsageError(
            f"--range {text}: not a range", advice="such as 0:512 or 10G:1M: where, and how long"
        )
    return start, length


def by_mount(
    paths: Iterable[str], table: Table, folder: Callable[[], str]
) -> dict[str, tuple[Entry, list[str]]]:
    """Return the mounts that *paths* lead into, by the mount point that their daemon knows.

    Each with the names of the files there. *folder* tells where relative paths begin. Raises
    NotMounted.
    """
    found: dict[str, tuple[Entry, list[str]]] = {}
    for path in paths:
        try:
            located = table.locate(path, "/" if path.startswith("/") else folder())
        except OSError as error:
            raise NotMounted(f"{path}: no such file", cause=str(error.strerror)) from None
        if located is None:
            raise NotMounted(
                f"{path}: not in a vddkfs mount",
                advice="name a file of a mount, or its mount point",
            )
        entry, name = located
        _, names = found.setdefault(_served_at(entry, table), (entry, []))
        names.append(name)
    return found


def _served_at(entry: Entry, table: Table) -> str:
    """Return the mount point of the daemon of *entry*, which may be a bind mount of that one."""
    places = [one.place for one in table.entries if one.device == entry.device and one.root == "/"]
    return next((place for place in places if socket_path(place).exists()), entry.place)


def _ask_all(
    names: dict[str, list[str]], start: int, length: int | None
) -> dict[str, dict[str, Any]]:
    """Ask the daemons of all mounts at once; what went wrong with one is its answer."""
    answers: dict[str, dict[str, Any]] = {}
    questions: list[Question] = []
    try:
        for place, each in names.items():
            arguments = {"names": each, "start": start, "length": length}
            try:
                questions.append(Question(place, "invalidate", **arguments))
            except VddkfsError as error:
                answers[place] = _failed(error)
        _gather(list(questions), answers)
    finally:
        for question in questions:
            question.close()
    return answers


def _gather(waiting: list[Question], answers: dict[str, dict[str, Any]]) -> None:
    """Collect the answers, however long they take: a daemon that lives says what it waits for."""
    began, patience = time.monotonic(), _FIRST_WORD
    while waiting:
        ready, _, _ = select.select(waiting, [], [], patience)
        if not ready:
            patience = _NEXT_WORD
        for question in ready or tuple(waiting):
            try:
                if not ready:
                    _tell(question.mountpoint, time.monotonic() - began)
                    continue
                answers[question.mountpoint] = question.answer()
            except NotMounted as error:
                answers[question.mountpoint] = _failed(error)
            waiting.remove(question)


def _tell(mountpoint: str, seconds: float) -> None:
    """Say on stderr what the daemon waits for. Raises NotMounted if it does not answer."""
    question = Question(mountpoint, "invalidating")
    try:
        told = question.answer().get("waiting", [])
    finally:
        question.close()
    for one in told or [{"what": "the answer", "seconds": seconds}]:
        text = f"{mountpoint}: waiting for {one['what']}, {duration(one['seconds'])}"
        print(f"vddkfs: {text}", file=sys.stderr, flush=True)


def _failed(error: VddkfsError) -> dict[str, Any]:
    return {"error": str(error), "exit_code": error.exit_code}


def _result(mountpoint: str, answer: dict[str, Any], entry: Entry, loops: bool) -> Result:
    """Return what came of a mount, and of what reads its files: flushed if *loops* says so."""
    if "error" in answer:
        code = answer.get("exit_code", NotMounted.exit_code)
        return Result(mountpoint, error=answer["error"], exit_code=code)
    ranges = msgspec.convert(answer["ranges"], tuple[Range, ...])
    taken = msgspec.convert(answer["steps"], tuple[Step, ...])
    # Looked for after the daemon is through: who came before that may have read old content.
    found = readers(entry.device, ranges, Table(entries()))
    flushed = None
    if loops:
        flushed = flush(device for one in found for device in one.devices)
    return Result(mountpoint, (*taken, *steps(found, flushed)), tuple(found))


def verdict(results: Sequence[Result]) -> VddkfsError | None:
    """Return the worst that came of the mounts, None if nothing old can be left."""
    for one in results:
        if one.error:
            kind = next(kind for kind in ALL_ERRORS if kind.exit_code == one.exit_code)
            return kind(_with_place(one))
    undone = [step for one in results for step in one.steps if not step.done]
    below = [step for step in undone if step.place != "loop"]
    if below:
        return OldContentLeft(
            f"{below[0].subject}: old content may be left",
            cause=below[0].told,
            advice=f"steps not done: {len(below)}; do it again when that is put right",
        )
    if undone:
        guests = [each for one in results for reader in one.readers for each in reader.guests]
        advice = (
            "unmount guests and mount them again" if guests else "--loops drops what devices keep"
        )
        names = ", ".join(dict.fromkeys(step.subject for step in undone))
        return OldAbove(f"{names}: may still show old content", advice=advice)
    return None


def _with_place(result: Result) -> str:
    """Return what a daemon refused, with the mount that it is about."""
    known = result.error.startswith(f"{result.mountpoint}:")
    return result.error if known else f"{result.mountpoint}: {result.error}"
