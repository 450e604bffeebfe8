"""Every mount option, declared once: for ``-o``, for the help text and for the manual page.

Options of mount(8), and of fstab, that are not ours are dropped knowingly; any other unknown option
is an error that names the nearest known one.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from vddkfs.errors import UsageError

MIB: Final = 1024 * 1024
TRANSPORTS: Final = ("file", "san", "hotadd", "nbdssl", "nbd")
_UNITS: Final = {"": 1, "k": 1024, "m": MIB, "g": 1024 * MIB, "t": 1024 * 1024 * MIB}


class MountOptions(msgspec.Struct, kw_only=True):
    """The options of one mount, checked. Sizes in bytes, times in seconds."""

    uid: int = msgspec.field(default_factory=os.getuid)
    gid: int = msgspec.field(default_factory=os.getgid)
    umask: int = 0o077
    allow_other: bool = False
    follow_parents: str = "folder"
    raw_devices: str = "no"
    cache: str = "auto"
    cache_size: int = 0
    block_size: int = 64 * 1024
    readahead: int = 16 * MIB
    op_timeout: float = 60.0
    retry_budget: float = 100.0
    idle_timeout: float = 900.0
    stop_timeout: float = 10.0
    credentials: str = ""
    thumbprint: str = ""
    transports: tuple[str, ...] = ()
    san_check: str = "yes"
    san_devices: tuple[str, ...] = ()
    drop_caches: str = "no"
    compression: str = "none"
    libdir: str = ""
    vddk_config: str = ""
    nfc_port: int = 902
    keepalive: float = 60.0
    idle_close: float = 300.0
    max_sessions: int = 32
    log: str = "auto"
    log_level: str = "info"


class Option(msgspec.Struct, frozen=True):
    """One option: its *name*, how its value is written, what it does, and how it is read.

    *metavar* is empty for an option without a value.
    """

    name: str
    metavar: str
    meaning: str
    read: Callable[[str], Any]


def size(text: str) -> int:
    """Return the bytes of ``256M`` and the like. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,15})([kmgt]?)i?b?", text.strip().lower())
    if match is None:
        raise ValueError("a size such as 256M is wanted")
    return int(match[1]) * _UNITS[match[2]]


def _cache_size(text: str) -> int:
    value = size(text)
    if not 4 * MIB <= value <= 1024**4:
        raise ValueError("at least 4M and at most 1T is wanted")
    return value


def _block_size(text: str) -> int:
    value = size(text)
    if not 4096 <= value <= MIB or value & (value - 1):
        raise ValueError("a power of two from 4K to 1M is wanted")
    return value


def _readahead(text: str) -> int:
    value = size(text)
    if value > 1024 * MIB:
        raise ValueError("at most 1G is wanted")
    return value


def _seconds(text: str) -> float:
    if text == "forever":
        return float("inf")
    value = float(text)
    if not 0.1 <= value < 1e9:
        raise ValueError("a number of seconds, at least 0.1, is wanted")
    return value


def _seconds_or_never(text: str) -> float:
    return 0.0 if text in ("0", "never") else _seconds(text)


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 10_000:
        raise ValueError("a number from 0 to 10000 is wanted")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 < value < 65536:
        raise ValueError("a port number is wanted")
    return value


def _path(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("an absolute path is wanted")
    return text


def _thumbprint(text: str) -> str:
    value = text.upper()
    if not re.fullmatch(r"([0-9A-F]{2}:){19,31}[0-9A-F]{2}", value):
        raise ValueError("the SHA-1 or SHA-256 of a certificate, AB:CD:..., is wanted")
    return value


def _transports(text: str) -> tuple[str, ...]:
    names = tuple(text.split(":"))
    unknown = [name for name in names if name not in TRANSPORTS]
    if unknown or len(set(names)) != len(names):
        known = ", ".join(TRANSPORTS)
        raise ValueError(f"names out of {known}, in order of preference, with colons are wanted")
    return names


def _devices(text: str) -> tuple[str, ...]:
    if text == "auto":
        return ()
    # Colons stand in names as well, such as those of /dev/disk/by-path.
    names = tuple(re.split(r":(?=/)", text))
    if not all(re.fullmatch(r"/.*[^/:]", name) for name in names):
        raise ValueError("auto, or absolute paths of block devices with colons, is wanted")
    return names


def _id(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32 - 1:
        raise ValueError("a numeric id is wanted")
    return value


def _umask(text: str) -> int:
    value = int(text, 8)
    if not 0 <= value <= 0o777:
        raise ValueError("three octal digits are wanted")
    return value


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError("one of " + ", ".join(words) + " is wanted")
        return text

    return read


def _log_target(text: str) -> str:
    if text in ("auto", "stderr", "syslog") or text.startswith("/"):
        return text
    raise ValueError("stderr, syslog, auto or an absolute path is wanted")


def _flag(_text: str) -> bool:
    return True


OPTIONS: Final = (
    Option("uid", "N", "owner of the files (default: whoever mounts)", _id),
    Option("gid", "N", "group of the files (default: that of whoever mounts)", _id),
    Option("umask", "OCTAL", "permission bits to take away (default: 077)", _umask),
    Option("allow_other", "", "let other users in, as far as umask= allows", _flag),
    Option(
        "follow_parents",
        "folder|any",
        "where a VMDK may name files: its own folder only (default), or anywhere",
        _one_of("folder", "any"),
    ),
    Option(
        "raw_devices",
        "yes|no",
        "read the devices of this machine that a VMDK names as its extents (default: no)",
        _one_of("yes", "no"),
    ),
    Option(
        "cache",
        "auto|strict|none",
        "what is kept of a disk: as its links allow (auto, the default), nothing from one open to "
        "the next (strict), or nothing at all (none)",
        _one_of("auto", "strict", "none"),
    ),
    Option(
        "cache_size",
        "SIZE",
        "memory for the sector cache (default: 256M, or an eighth of the memory, or half of what "
        "is available, the least of them)",
        _cache_size,
    ),
    Option(
        "readahead",
        "SIZE",
        "how far to read ahead of a sequential reader, at most; 0: not at all (default: 16M)",
        _readahead,
    ),
    Option(
        "block_size",
        "SIZE",
        "what a scattered read fetches, a power of two from 4K to 1M (default: 64K)",
        _block_size,
    ),
    Option(
        "op_timeout", "SECONDS", "how long one read may take in a worker (default: 60)", _seconds
    ),
    Option(
        "retry_budget",
        "SECONDS|forever",
        "how long a request is tried again before it ends with EIO (default: 100)",
        _seconds,
    ),
    Option("idle_timeout", "SECONDS", "after which an idle worker ends (default: 900)", _seconds),
    Option(
        "stop_timeout",
        "SECONDS",
        "how long SIGTERM waits for open files (default: 10)",
        _seconds,
    ),
    Option(
        "credentials",
        "FILE",
        "user= and password= (or cookie=) for vddk://, a file of mode 0600 (default: a prompt)",
        _path,
    ),
    Option("thumbprint", "AB:CD:...", "of the server's certificate, for vddk://", _thumbprint),
    Option(
        "transports",
        "LIST",
        "how VDDK may reach the disks, in order, such as san:nbdssl (default: nbdssl:nbd)",
        _transports,
    ),
    Option(
        "san_check",
        "yes|no",
        "leave san out where this machine has no SCSI disks (default: yes)",
        _one_of("yes", "no"),
    ),
    Option(
        "san_devices",
        "auto|LIST",
        "the block devices whose cached pages are dropped for SAN, such as "
        "/dev/mapper/mpatha:/dev/sdb (default: auto, those that VDDK has open)",
        _devices,
    ),
    Option(
        "drop_caches",
        "yes|no",
        "drop all cached pages of this machine where those of a SAN device cannot be dropped "
        "(default: no)",
        _one_of("yes", "no"),
    ),
    Option(
        "compression",
        "none|zlib|fastlz|skipz",
        "how VDDK compresses what goes over the network (default: none)",
        _one_of("none", "zlib", "fastlz", "skipz"),
    ),
    Option("libdir", "DIR", "where VDDK is installed (default: the usual places)", _path),
    Option("vddk_config", "FILE", "your own configuration file for VDDK", _path),
    Option("nfc_port", "PORT", "where the hosts serve disks (default: 902)", _port),
    Option(
        "keepalive",
        "SECONDS|never",
        "after which a sector is read of an idle VDDK disk (default: 60)",
        _seconds_or_never,
    ),
    Option(
        "idle_close",
        "SECONDS|never",
        "after which an idle VDDK disk is closed until it is read again (default: 300)",
        _seconds_or_never,
    ),
    Option(
        "max_sessions",
        "N",
        "VDDK sessions of one server, of all mounts of this machine; 0: any (default: 32)",
        _count,
    ),
    Option("log", "TARGET", "auto (default), stderr, syslog or an absolute path", _log_target),
    Option(
        "log_level",
        "LEVEL",
        "error, warning, info (default) or debug",
        _one_of("error", "warning", "info", "debug"),
    ),
)

_BY_NAME: Final = {option.name: option for option in OPTIONS}

_MOUNT_WORDS: Final = frozenset(
    """
    defaults ro rw auto noauto user nouser users nousers owner group _netdev nofail exec noexec
    suid nosuid dev nodev atime noatime diratime nodiratime relatime norelatime strictatime
    nostrictatime lazytime nolazytime sync async dirsync mand nomand iversion noiversion silent
    loud default_permissions nosymfollow
    """.split()  # noqa: SIM905 (one word a line would hide what this is)
)
_MOUNT_PREFIXES: Final = (
    "x-",
    "X-",
    "comment=",
    "context=",
    "fscontext=",
    "defcontext=",
    "rootcontext=",
)


def parse_options(words: Iterable[str]) -> MountOptions:
    """Return the options of the ``-o`` *words* (each may hold several, with commas between).

    Raises UsageError for an unknown option or a bad value.
    """
    found: dict[str, Any] = {}
    for word in words:
        for item in word.split(","):
            item = item.strip()
            if not item or item in _MOUNT_WORDS or item.startswith(_MOUNT_PREFIXES):
                continue
            name, equals, value = item.partition("=")
            option = _BY_NAME.get(name)
            if option is None:
                raise UsageError(f"unknown option {name}", advice=_nearest(name))
            if bool(option.metavar) != bool(equals):
                form = f"{name}={option.metavar}" if option.metavar else f"{name}, without a value"
                raise UsageError(f"option {item}", advice=f"write {form}")
            try:
                found[name] = option.read(value)
            except ValueError as error:
                raise UsageError(
                    f"option {item}: {_reason(error)}", advice=f"write {name}={option.metavar}"
                ) from None
    return MountOptions(**found)


def _reason(error: ValueError) -> str:
    text = str(error)
    return "not a number" if "could not convert" in text or "invalid literal" in text else text


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return "known are " + ", ".join(_BY_NAME)
