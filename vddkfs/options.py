"""Every mount option, declared once: for ``-o``, for the help text and for the manual page.

Options of mount(8), and of fstab, that are not ours are dropped knowingly; any other unknown option
is an error that names the nearest known one.
"""

import difflib
import os
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from vddkfs import option_values as values
from vddkfs.errors import UsageError


class MountOptions(msgspec.Struct, kw_only=True):
    """The options of one mount, checked. Sizes in bytes, times in seconds."""

    uid: int = msgspec.field(default_factory=os.getuid)
    gid: int = msgspec.field(default_factory=os.getgid)
    umask: int = 0o077
    allow_other: bool = False
    follow_parents: str = "folder"
    raw_devices: str = "no"
    writable: bool = False
    restore: str = "no"
    assume: str = ""
    fence_timeout: float = 30.0
    overlay: str = ""
    overlay_force: str = "no"
    cache: str = "auto"
    cache_size: int = 0
    block_size: int = 64 * 1024
    readahead: int = 16 * values.MIB
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


OPTIONS: Final = (
    Option("uid", "N", "owner of the files (default: whoever mounts)", values.numeric_id),
    Option("gid", "N", "group of the files (default: that of whoever mounts)", values.numeric_id),
    Option("umask", "OCTAL", "permission bits to take away (default: 077)", values.umask),
    Option("allow_other", "", "let other users in, as far as umask= allows", values.flag),
    Option(
        "follow_parents",
        "folder|any",
        "where a VMDK may name files: its own folder only (default), or anywhere",
        values.one_of("folder", "any"),
    ),
    Option(
        "raw_devices",
        "yes|no",
        "read the devices of this machine that a VMDK names as its extents (default: no)",
        values.one_of("yes", "no"),
    ),
    Option(
        "writable",
        "",
        "let the base disk, chain/0.raw, be written, and nothing else; in `vddkfs mount -o` the "
        "word rw means the same",
        values.flag,
    ),
    Option(
        "restore",
        "yes|no",
        "with writable: also where other links lie above the base, as a restore over SAN has it; "
        "the snapshot made for it has to be reverted and removed afterwards (default: no)",
        values.one_of("yes", "no"),
    ),
    Option(
        "assume",
        "powered-off",
        "for vddk://, with writable or overlay=: you know that the virtual machine is powered "
        "off, and stays so",
        values.one_of("powered-off"),
    ),
    Option(
        "fence_timeout",
        "SECONDS",
        "how long a write of a lost worker waits for the proof that it cannot land late; then it "
        "fails, and the disk is written no more (default: 30)",
        values.seconds,
    ),
    Option(
        "overlay",
        "DIR|tmp",
        "let every disk be written, into DIR and not into the source; DIR is made if need be, and "
        "gone on with next time; tmp: a private folder that is removed at unmount",
        values.overlay,
    ),
    Option(
        "overlay_force",
        "yes|no",
        "take the overlay for a disk that somebody may write meanwhile, or whose files have "
        "changed since (default: no)",
        values.one_of("yes", "no"),
    ),
    Option(
        "cache",
        "auto|strict|none",
        "what is kept of a disk: as its links allow (auto, the default), nothing from one open to "
        "the next (strict), or nothing at all (none)",
        values.one_of("auto", "strict", "none"),
    ),
    Option(
        "cache_size",
        "SIZE",
        "memory for the sector cache (default: 256M, or an eighth of the memory, or half of what "
        "is available, the least of them)",
        values.cache_size,
    ),
    Option(
        "readahead",
        "SIZE",
        "how far to read ahead of a sequential reader, at most; 0: not at all (default: 16M)",
        values.readahead,
    ),
    Option(
        "block_size",
        "SIZE",
        "what a scattered read fetches, a power of two from 4K to 1M (default: 64K)",
        values.block_size,
    ),
    Option(
        "op_timeout",
        "SECONDS",
        "how long one read or write may take in a worker (default: 60)",
        values.seconds,
    ),
    Option(
        "retry_budget",
        "SECONDS|forever",
        "how long a request is tried again before it ends with EIO (default: 100)",
        values.seconds,
    ),
    Option(
        "idle_timeout", "SECONDS", "after which an idle worker ends (default: 900)", values.seconds
    ),
    Option(
        "stop_timeout",
        "SECONDS",
        "how long SIGTERM waits for open files (default: 10)",
        values.seconds,
    ),
    Option(
        "credentials",
        "FILE",
        "user= and password= (or cookie=) for vddk://, a file of mode 0600 (default: a prompt)",
        values.absolute_path,
    ),
    Option(
        "thumbprint", "AB:CD:...", "of the server's certificate, for vddk://", values.thumbprint
    ),
    Option(
        "transports",
        "LIST",
        "how VDDK may reach the disks, in order, such as san:nbdssl (default: nbdssl:nbd)",
        values.transports,
    ),
    Option(
        "san_check",
        "yes|no",
        "leave san out where this machine has no SCSI disks (default: yes)",
        values.one_of("yes", "no"),
    ),
    Option(
        "san_devices",
        "auto|LIST",
        "the block devices whose cached pages are dropped for SAN, such as "
        "/dev/mapper/mpatha:/dev/sdb (default: auto, those that VDDK has open)",
        values.devices,
    ),
    Option(
        "drop_caches",
        "yes|no",
        "drop all cached pages of this machine where those of a SAN device cannot be dropped "
        "(default: no)",
        values.one_of("yes", "no"),
    ),
    Option(
        "compression",
        "none|zlib|fastlz|skipz",
        "how VDDK compresses what goes over the network (default: none)",
        values.one_of("none", "zlib", "fastlz", "skipz"),
    ),
    Option(
        "libdir", "DIR", "where VDDK is installed (default: the usual places)", values.absolute_path
    ),
    Option("vddk_config", "FILE", "your own configuration file for VDDK", values.absolute_path),
    Option("nfc_port", "PORT", "where the hosts serve disks (default: 902)", values.port),
    Option(
        "keepalive",
        "SECONDS|never",
        "after which a sector is read of an idle VDDK disk (default: 60)",
        values.seconds_or_never,
    ),
    Option(
        "idle_close",
        "SECONDS|never",
        "after which an idle VDDK disk is closed until it is read again (default: 300)",
        values.seconds_or_never,
    ),
    Option(
        "max_sessions",
        "N",
        "VDDK sessions of one server, of all mounts of this machine; 0: any (default: 32)",
        values.count,
    ),
    Option(
        "log", "TARGET", "auto (default), stderr, syslog or an absolute path", values.log_target
    ),
    Option(
        "log_level",
        "LEVEL",
        "error, warning, info (default) or debug",
        values.one_of("error", "warning", "info", "debug"),
    ),
)

_BY_NAME: Final = {option.name: option for option in OPTIONS}

_MOUNT_WORDS: Final = frozenset(
    """
    defaults ro auto noauto user nouser users nousers owner group _netdev nofail exec noexec
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


def without_rw(words: Iterable[str]) -> list[str]:
    """Return the arguments of ``-o`` without rw, which mount(8) says wherever ro is not said."""
    return [",".join(item for item in word.split(",") if item.strip() != "rw") for word in words]


def parse_options(words: Iterable[str]) -> MountOptions:
    """Return the options of the ``-o`` *words* (each may hold several, with commas between).

    Raises UsageError for an unknown option or a bad value.
    """
    found: dict[str, Any] = {}
    read_only = False
    for word in words:
        for item in word.split(","):
            item = item.strip()
            if item == "rw":
                item = "writable"
            read_only = read_only or item == "ro"
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
    options = MountOptions(**found)
    if read_only and (options.writable or options.overlay):
        raise UsageError("ro does not go with rw, writable or overlay=", advice="leave one of them")
    if options.writable and options.overlay:
        raise UsageError(
            "writable and overlay= exclude each other",
            advice="an overlay takes all writes; the source is written without one",
        )
    return options


def _reason(error: ValueError) -> str:
    text = str(error)
    return "not a number" if "could not convert" in text or "invalid literal" in text else text


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return "known are " + ", ".join(_BY_NAME)
