"""What a check found, and how a check is kept from hanging or ending the command."""

import threading
from collections.abc import Callable, Iterable
from typing import Final, Literal, TypeVar

import msgspec

from vddkfs.errors import VddkfsError
from vddkfs.observe.redact import redact

Level = Literal["ok", "warning", "failure"]
"""Failure: something that was asked for cannot work. Warning: it works less well, or something else
does not work. A result that is not ok has a remedy."""

Found = TypeVar("Found")

_ORDER: Final[tuple[Level, ...]] = ("ok", "warning", "failure")
_NO_REMEDY: Final = "look at the log, and at the manual page (man vddkfs)"
_BUG: Final = "report this: it is a bug in vddkfs"


class Row(msgspec.Struct, frozen=True):
    """The result of one check: *what* was looked at, what was found, and what to do about it."""

    level: Level
    what: str
    finding: str
    remedy: str = ""


def worst(rows: Iterable[Row]) -> Level:
    """Return the worst level of *rows*."""
    return max((row.level for row in rows), key=_ORDER.index, default="ok")


def of_error(level: Level, what: str, error: VddkfsError) -> Row:
    """Return the row for an expected failure."""
    cause = f" ({error.cause})" if error.cause else ""
    return Row(level, what, plain(error.message + cause), plain(error.advice) or _NO_REMEDY)


def plain(text: str) -> str:
    """Return *text* on one line and without what looks like a secret."""
    return redact(" ".join(text.split()))


class TimedOut(Exception):
    """A look took too long. It still goes on, on its thread."""


def within(seconds: float, look: Callable[[], Found]) -> Found:
    """Return what *look* returns, or raise what it raises; TimedOut after *seconds*.

    It runs on a thread that is abandoned then: what hangs in the kernel cannot be ended.
    """
    results: list[Found] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(look())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimedOut
    return results[0]


def bounded(
    what: str,
    seconds: float,
    check: Callable[[], list[Row]],
    *,
    level: Level = "failure",
    remedy: str = "find out what hangs: dmesg(1) and the log may tell",
) -> list[Row]:
    """Return the rows of *check*, or one row that says why there are none.

    *level* is that of an expected failure and of a check that does not end; *remedy* is for that.
    """
    try:
        return within(seconds, lambda: sheltered(what, check, level=level))
    except TimedOut:
        return [Row(level, what, f"no answer within {seconds:g} s", remedy)]


def sheltered(what: str, check: Callable[[], list[Row]], *, level: Level = "failure") -> list[Row]:
    """Return the rows of *check*, or one row with what it raised. For what bounds itself."""
    try:
        return check()
    except VddkfsError as error:
        return [of_error(level, what, error)]
    except OSError as error:
        finding = plain(f"this could not be looked at: {error}")
        return [Row("warning", what, finding, "look at it as root")]
    except Exception as error:
        finding = plain(f"this could not be looked at: {type(error).__name__}: {error}")
        return [Row("warning", what, finding, _BUG)]
