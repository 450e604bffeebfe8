"""The credentials, read where they are needed: in the worker, from a descriptor that it was given.

The file has lines of KEY=VALUE: ``user=`` (or ``username=``, as mount.cifs has it) with
``password=``, or ``cookie=``, the session cookie of a login that somebody made already, with or
without a user. A value is everything after the first ``=`` up to the end of the line, as it is:
a password may hold blanks, quotes, ``=`` and ``#``. Blank lines, and lines that begin with ``#``,
are left out. The text is UTF-8.

No error tells a value, and none shows a line, which may be a password that was broken in two.
"""

import ctypes
import os
import re
import resource
from dataclasses import dataclass
from typing import Final

from vddkfs.errors import AccessDenied, UsageError

LARGEST: Final = 65536
"""Bytes of the largest file that is read."""

_KEYS: Final = {"user": "user", "username": "user", "password": "password", "cookie": "cookie"}
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_FORM: Final = "write user=NAME and password=SECRET, or cookie=SECRET, a line each"


_PR_SET_DUMPABLE: Final = 4


def leave_no_core() -> None:
    """Have this process leave no core, before it holds a secret, which would be in there too.

    The limit does not bind a program that the kernel pipes cores into; "not dumpable" stops that as
    well.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


@dataclass(frozen=True, repr=False, slots=True)
class Credentials:
    """Who logs in: *user* and *password*, or *cookie*; empty is what was not given."""

    user: str = ""
    password: str = ""
    cookie: str = ""

    def __repr__(self) -> str:
        given = (name for name in ("user", "password", "cookie") if getattr(self, name))
        return f"Credentials({', '.join(f'{name}=xxx' for name in given)})"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no log may show."""
        return tuple(value for value in (self.password, self.cookie) if value)


def read_credentials(fd: int) -> Credentials:
    """Return the credentials that are in the file of *fd*, from its beginning.

    Leaves the descriptor open and its position alone: several workers share them. Raises UsageError
    if the text is not of the form above, and AccessDenied if it cannot be read.
    """
    data = b""
    try:
        while len(data) <= LARGEST:
            piece = os.pread(fd, LARGEST + 1 - len(data), len(data))
            if not piece:
                break
            data += piece
    except OSError as error:
        raise AccessDenied(
            "the credentials cannot be read",
            cause=error.strerror or "",
            advice="name a regular file, credentials=FILE",
        ) from None
    if len(data) > LARGEST:
        raise UsageError(f"the credentials have more than {LARGEST} bytes", advice=_FORM)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The exception holds the data: its text must go no further, and it is not chained.
        number = data.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"line {number} of the credentials is not UTF-8", advice="convert the file with iconv"
        ) from None
    return _complete(_parse(text))


def _parse(text: str) -> dict[str, str]:
    """Return the values by their keys. Raises UsageError."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"line {number} of the credentials"
        name, equals, value = line.partition("=")
        if not equals or not _NAME.fullmatch(name.strip()):
            raise UsageError(f"{where} does not have the form KEY=VALUE", advice=_FORM)
        key = _KEYS.get(name)
        if key is None and name.strip() in _KEYS:
            # The blanks after the = would belong to the value, which nobody means who writes so.
            raise UsageError(f"{where} has blanks around {name.strip()}", advice=_FORM)
        if key is None:
            raise UsageError(f"{where} has the unknown key {name.strip()}", advice=_FORM)
        if key in found:
            raise UsageError(f"{where} gives the {key} a second time", advice="remove one")
        if not value:
            raise UsageError(f"{where} gives an empty {key}", advice=_FORM)
        if "\0" in value:
            raise UsageError(f"{where} has a NUL byte in the {key}", advice=_FORM)
        found[key] = value
    return found


def _complete(found: dict[str, str]) -> Credentials:
    """Return the credentials of the keys and values *found*. Raises UsageError."""
    if "cookie" in found and "password" in found:
        raise UsageError("the credentials have a password and a cookie", advice="remove one")
    if "cookie" not in found:
        missing = [key for key in ("user", "password") if key not in found]
        if missing:
            raise UsageError(f"the credentials have no {' and no '.join(missing)}", advice=_FORM)
    return Credentials(**found)
