"""VixError: one table of what the library's result codes mean, and what to do about each.

A code is the low 16 bits of a VixError; the upper bits may be set and mean nothing here. 0 is
success, and so is 25000 (VIX_ASYNC) from a call that only begins something. A code that is not in
the table keeps its number, and is described by the group that it belongs to.

Two codes say too little: 1 (also wrong thumbprint, independent disk, a running VM without a
snapshot) and those not in the table. Where a session is being set up they are taken as final; in
the middle of reading they are taken as a lost connection. Code 13 is retried: before VDDK 7.0.3.3
and 8.0.2, Open gave it for every network error.

A refusal of memory by the host ("Failed to allocate the requested N bytes") has no code of its own.
Who saw it in the library's log or text says so with *refused*.
"""

import errno
import re
from enum import Enum
from typing import Final, NamedTuple

from vddkfs.engines.vddk.calls import PREFIX, SESSION_CALLS
from vddkfs.engines.vddk.layouts import VIX_ASYNC
from vddkfs.errors import EngineError, Retry


class RetryClass(Enum):
    """What another try needs in order to have a chance."""

    NEVER = "never"
    AGAIN = "again"
    """The same call on the same handle, after a pause."""
    RECONNECT = "reconnect"
    """A new worker, a new session and new handles."""
    LATER = "later"
    """As RECONNECT, after a longer while: maintenance, too many sessions."""
    SMALLER = "smaller"
    """Smaller requests and fewer at once: the host has no memory for this one."""


_ACROSS: Final[dict[RetryClass, Retry]] = {
    RetryClass.NEVER: "",
    RetryClass.AGAIN: "reconnect",
    RetryClass.RECONNECT: "reconnect",
    RetryClass.LATER: "later",
    RetryClass.SMALLER: "later",
}
"""What remains to be done by the daemon, when the worker has done its own part in vain."""

NEVER, AGAIN, RECONNECT, LATER, SMALLER = RetryClass


class Code(NamedTuple):
    """One result code. *meaning* completes "this failed: ..."; *advice* may be empty."""

    number: int
    name: str
    errno: int
    retry: RetryClass
    meaning: str
    advice: str = ""


_ACCESS = "check the rights of the VDDK user on the VM, its datastore and its host"
_LICENCE = "advanced transports need a paid licence on the host; nbdssl and nbd work without"
_PORT = "check that port 902 of every host that may serve the datastore can be reached"
_SPACE = "free space on the datastore"
_NAME = "check the name as the snapshot's hardware list has it"
_CHAIN = "check the VM's snapshots, and consolidate its disks"
_KEY = "encrypted disks are not read"
_SNAP = "check that the snapshot exists and belongs to this VM"
_WRITING = "another transport may be able to write it: check transports="
_LOCKED = "end what holds it: a VM that runs, another mount, another backup program"
_VAGUE = "a wrong thumbprint, an independent disk, or a running VM without a snapshot end like this"

_ROWS: Final[tuple[Code, ...]] = (
    Code(1, "FAIL", errno.EIO, RECONNECT, "it failed for an unnamed reason", _VAGUE),
    Code(2, "OUT_OF_MEMORY", errno.ENOMEM, SMALLER, "there was not enough memory"),
    Code(3, "INVALID_ARG", errno.EINVAL, NEVER, "an argument is not valid"),
    Code(4, "FILE_NOT_FOUND", errno.ENOENT, NEVER, "the file does not exist", _NAME),
    Code(5, "OBJECT_IS_BUSY", errno.EBUSY, AGAIN, "the object is busy"),
    Code(6, "NOT_SUPPORTED", errno.ENOTSUP, NEVER, "this is not supported here"),
    Code(7, "FILE_ERROR", errno.EIO, RECONNECT, "the file could not be read or written"),
    Code(8, "DISK_FULL", errno.ENOSPC, NEVER, "the datastore is full", _SPACE),
    Code(9, "INCORRECT_FILE_TYPE", errno.EINVAL, NEVER, "the file is of another type"),
    Code(10, "CANCELLED", errno.EIO, AGAIN, "the operation was cancelled"),
    Code(11, "FILE_READ_ONLY", errno.EROFS, NEVER, "the file can only be read", _WRITING),
    Code(12, "FILE_ALREADY_EXISTS", errno.EEXIST, NEVER, "the file exists already"),
    Code(
        13,
        "FILE_ACCESS_ERROR",
        errno.EACCES,
        RECONNECT,
        "the file cannot be accessed, or (older releases) the host cannot be reached",
        f"{_ACCESS}; {_PORT}; give the snapshot",
    ),
    Code(14, "REQUIRES_LARGE_FILES", errno.EFBIG, NEVER, "the file system lacks large files"),
    Code(
        15,
        "FILE_ALREADY_LOCKED",
        errno.EBUSY,
        AGAIN,
        "another program holds the file's lock",
        _LOCKED,
    ),
    Code(16, "VMDB", errno.EIO, RECONNECT, "the host's own data base failed"),
    Code(
        20, "NOT_SUPPORTED_ON_REMOTE_OBJECT", errno.ENOTSUP, NEVER, "only local files can do this"
    ),
    Code(21, "FILE_TOO_BIG", errno.EFBIG, NEVER, "the file is too big for its file system"),
    Code(22, "FILE_NAME_INVALID", errno.EINVAL, NEVER, "the file name is not valid", _NAME),
    Code(23, "ALREADY_EXISTS", errno.EEXIST, NEVER, "it exists already"),
    Code(24, "BUFFER_TOOSMALL", errno.EINVAL, NEVER, "the buffer is too small"),
    Code(25, "OBJECT_NOT_FOUND", errno.ENOENT, NEVER, "the VM or snapshot does not exist", _SNAP),
    Code(26, "HOST_NOT_CONNECTED", errno.EIO, RECONNECT, "the host is not connected"),
    Code(27, "INVALID_UTF8_STRING", errno.EINVAL, NEVER, "a name is not valid UTF-8"),
    Code(29, "UNFINISHED_JOB", errno.EBUSY, AGAIN, "an earlier job is not finished"),
    Code(30, "NEED_KEY", errno.EACCES, NEVER, "the disk is encrypted", _KEY),
    Code(31, "OPERATION_ALREADY_IN_PROGRESS", errno.EBUSY, AGAIN, "the same is under way already"),
    Code(32, "LICENSE", errno.EACCES, NEVER, "the host's licence does not allow this", _LICENCE),
    Code(34, "VM_HOST_DISCONNECTED", errno.EIO, LATER, "the VM's host is cut off from vCenter"),
    Code(
        35,
        "AUTHENTICATION_FAIL",
        errno.EACCES,
        NEVER,
        "the server refused the login",
        "check user name and password, or the session cookie",
    ),
    Code(36, "HOST_CONNECTION_LOST", errno.EIO, RECONNECT, "the connection to the host was lost"),
    Code(41, "DUPLICATE_NAME", errno.EEXIST, NEVER, "the name is in use"),
    Code(44, "ARGUMENT_TOO_BIG", errno.EINVAL, NEVER, "an argument is too big"),
    Code(1000, "INVALID_HANDLE", errno.EIO, RECONNECT, "the library lost the handle"),
    Code(1002, "TOO_MANY_HANDLES", errno.EMFILE, RECONNECT, "too many handles are open"),
    Code(3014, "HOST_USER_PERMISSIONS", errno.EACCES, NEVER, "the user lacks a right", _ACCESS),
    Code(
        3046,
        "TOO_MANY_LOGONS",
        errno.EBUSY,
        LATER,
        "too many sessions are open on the server",
        "lower max_sessions, or end other backup jobs",
    ),
    Code(3047, "INVALID_AUTHENTICATION_SESSION", errno.EIO, RECONNECT, "the session has expired"),
    Code(4000, "VM_NOT_FOUND", errno.ENOENT, NEVER, "the VM does not exist"),
    Code(4003, "TEMPLATE_VM", errno.ENOTSUP, NEVER, "the VM is a template"),
    Code(13003, "SNAPSHOT_NOTFOUND", errno.ENOENT, NEVER, "the snapshot does not exist", _SNAP),
    Code(13010, "SNAPSHOT_LOCKED", errno.EBUSY, AGAIN, "the snapshot is locked"),
    Code(13014, "SNAPSHOT_DISKLOCKED", errno.EBUSY, AGAIN, "a disk of the snapshot is locked"),
    Code(
        13016,
        "SNAPSHOT_INDEPENDENTDISK",
        errno.ENOTSUP,
        NEVER,
        "the disk is independent and has no snapshots",
    ),
    Code(14003, "HOST_DISK_INVALID_VALUE", errno.EINVAL, NEVER, "the host refused a value"),
    Code(14004, "HOST_DISK_SECTORSIZE", errno.EINVAL, NEVER, "the sector size does not fit"),
    Code(14005, "HOST_FILE_ERROR_EOF", errno.EIO, NEVER, "the request goes past the disk's end"),
    Code(
        14006, "HOST_NETBLKDEV_HANDSHAKE", errno.EIO, RECONNECT, "the NBD handshake failed", _PORT
    ),
    Code(14007, "HOST_SOCKET_CREATION_ERROR", errno.EIO, RECONNECT, "no socket could be made"),
    Code(
        14008,
        "HOST_SERVER_NOT_FOUND",
        errno.EIO,
        RECONNECT,
        "the host's name does not resolve",
        "check the DNS of this machine for vCenter and for the ESXi hosts",
    ),
    Code(14009, "HOST_NETWORK_CONN_REFUSED", errno.EIO, RECONNECT, "the host refused us", _PORT),
    Code(14010, "HOST_TCP_SOCKET_ERROR", errno.EIO, RECONNECT, "the connection failed", _PORT),
    Code(14011, "HOST_TCP_CONN_LOST", errno.EIO, RECONNECT, "the connection was lost"),
    Code(14012, "HOST_NBD_HASHFILE_VOLUME", errno.EIO, NEVER, "the NBD hash file is unusable"),
    Code(14013, "HOST_NBD_HASHFILE_INIT", errno.EIO, NEVER, "the NBD hash file is unusable"),
    Code(14014, "HOST_SERVER_SHUTDOWN", errno.EIO, LATER, "the host enters maintenance mode"),
    Code(14015, "HOST_SERVER_NOT_AVAILABLE", errno.EIO, LATER, "the host is in maintenance mode"),
    Code(16000, "DISK_INVAL", errno.EINVAL, NEVER, "an argument does not fit the disk"),
    Code(16001, "DISK_NOINIT", errno.EIO, RECONNECT, "the library is not initialised"),
    Code(16002, "DISK_NOIO", errno.EIO, RECONNECT, "reading or writing the disk failed"),
    Code(16003, "DISK_PARTIALCHAIN", errno.EIO, NEVER, "a link of the chain is missing", _CHAIN),
    Code(16006, "DISK_NEEDSREPAIR", errno.EIO, NEVER, "the disk needs repair", _CHAIN),
    Code(16007, "DISK_OUTOFRANGE", errno.EINVAL, NEVER, "the request goes past the disk's end"),
    Code(16008, "DISK_CID_MISMATCH", errno.EIO, NEVER, "parent and child do not fit", _CHAIN),
    Code(16009, "DISK_CANTSHRINK", errno.ENOTSUP, NEVER, "the disk cannot be shrunk"),
    Code(16010, "DISK_PARTMISMATCH", errno.EIO, NEVER, "the partition table does not fit"),
    Code(
        16011, "DISK_UNSUPPORTEDDISKVERSION", errno.ENOTSUP, NEVER, "the disk is of a newer version"
    ),
    Code(16012, "DISK_OPENPARENT", errno.EIO, NEVER, "the parent cannot be opened", _CHAIN),
    Code(16013, "DISK_NOTSUPPORTED", errno.ENOTSUP, NEVER, "the disk does not support this"),
    Code(16014, "DISK_NEEDKEY", errno.EACCES, NEVER, "the disk is encrypted", _KEY),
    Code(16015, "DISK_NOKEYOVERRIDE", errno.EACCES, NEVER, "the disk's key is fixed", _KEY),
    Code(16016, "DISK_NOTENCRYPTED", errno.EINVAL, NEVER, "the disk is not encrypted"),
    Code(16017, "DISK_NOKEY", errno.EACCES, NEVER, "there is no key for the disk", _KEY),
    Code(16018, "DISK_INVALIDPARTITIONTABLE", errno.EIO, NEVER, "the partition table is bad"),
    Code(16019, "DISK_NOTNORMAL", errno.ENOTSUP, NEVER, "the disk is of an unusual kind"),
    Code(16020, "DISK_NOTENCDESC", errno.EINVAL, NEVER, "the descriptor is not encrypted"),
    Code(16022, "DISK_NEEDVMFS", errno.ENOTSUP, NEVER, "the disk must be on VMFS"),
    Code(16024, "DISK_RAWTOOBIG", errno.EFBIG, NEVER, "the raw disk is too big"),
    Code(16027, "DISK_TOOMANYOPENFILES", errno.EMFILE, RECONNECT, "too many files are open"),
    Code(16028, "DISK_TOOMANYREDO", errno.EIO, NEVER, "the chain has too many links", _CHAIN),
    Code(16029, "DISK_RAWTOOSMALL", errno.EIO, NEVER, "the raw disk is too small"),
    Code(16030, "DISK_INVALIDCHAIN", errno.EIO, NEVER, "the chain is not valid", _CHAIN),
    Code(16052, "DISK_KEY_NOTFOUND", errno.ENOENT, NEVER, "the metadata key does not exist"),
    Code(16053, "DISK_SUBSYSTEM_INIT_FAIL", errno.EIO, NEVER, "a part of the library won't start"),
    Code(16054, "DISK_INVALID_CONNECTION", errno.EIO, RECONNECT, "the connection is not valid"),
    Code(16061, "DISK_ENCODING", errno.EINVAL, NEVER, "the descriptor's encoding is unknown"),
    Code(16062, "DISK_CANTREPAIR", errno.EIO, NEVER, "the disk cannot be repaired", _CHAIN),
    Code(16063, "DISK_INVALIDDISK", errno.EIO, NEVER, "the disk is not valid", _CHAIN),
    Code(16064, "DISK_NOLICENSE", errno.EACCES, NEVER, "the licence forbids this", _LICENCE),
    Code(16065, "DISK_NODEVICE", errno.ENODEV, NEVER, "the disk's device is not there"),
    Code(16066, "DISK_UNSUPPORTEDDEVICE", errno.ENOTSUP, NEVER, "the device is not supported"),
    Code(16067, "DISK_CAPACITY_MISMATCH", errno.EIO, NEVER, "the capacities differ", _CHAIN),
    Code(16068, "DISK_PARENT_NOTALLOWED", errno.EIO, NEVER, "the disk must not have a parent"),
    Code(16069, "DISK_ATTACH_ROOTLINK", errno.EIO, NEVER, "the base cannot be attached"),
    Code(
        18000,
        "CANNOT_CONNECT_TO_HOST",
        errno.EIO,
        RECONNECT,
        "the server cannot be reached",
        "check the server's name, port 443, and what is in between",
    ),
    Code(
        26000,
        "ASYNC_MIXEDMODE_UNSUPPORTED",
        errno.EIO,
        NEVER,
        "synchronous and asynchronous requests were mixed on one handle",
    ),
)

CODES: Final[dict[int, Code]] = {
    row.number: row._replace(name=f"VIX_E_{row.name}") for row in _ROWS
}

_GROUPS: Final[tuple[tuple[range, str, RetryClass | None], ...]] = (
    (range(2000, 2003), "the library could not parse XML", NEVER),
    (range(3000, 4000), "an operation in the guest failed", NEVER),
    (range(13000, 13025), "something is wrong with the snapshot", NEVER),
    (range(17000, 17013), "encryption failed", NEVER),
    (range(24000, 24400), "VDDK's mount interface failed", NEVER),
    (range(30001, 30203), "an HTTP request to the server failed", RECONNECT),
)

_REFUSED = re.compile(r"failed to allocate", re.IGNORECASE)
_PROTECTED = re.compile(r"write[- ]protected", re.IGNORECASE)
_MASK: Final = 0xFFFF


def code_of(result: int) -> int:
    """Return the code in a VixError: its low 16 bits."""
    return result & _MASK


def succeeded(result: int) -> bool:
    """Whether *result* is success, or an asynchronous request that was taken."""
    return code_of(result) in (0, VIX_ASYNC)


def tells_refusal(text: str) -> bool:
    """Whether *text* of the library says that the host had no memory for a request."""
    return _REFUSED.search(text) is not None


def describe(code: int, call: str) -> Code:
    """Return what *code* means as the result of *call* (the function's full name)."""
    code = code_of(code)
    known = CODES.get(code)
    in_doubt = NEVER if call in SESSION_CALLS else RECONNECT
    if known is not None:
        return known._replace(retry=in_doubt) if code == 1 else known
    for numbers, meaning, retry in _GROUPS:
        if code in numbers:
            return Code(code, "", errno.EIO, retry or in_doubt, meaning)
    return Code(code, "", errno.EIO, in_doubt, "it failed with a code that is not known")


def _says_too_little(meaning: Code) -> bool:
    """Say whether a code may stand for a refusal of memory.

    Others are what they say: after a lost connection the library may still write to the request's
    memory, which must not be asked for again in this process then.
    """
    return meaning.number in (1, 2) or (not meaning.name and meaning.retry is not NEVER)


class VixFailure(EngineError):
    """A call of the library failed.

    *code* is the VixError without upper bits, *call* the function's full name, *retry_class* what
    another try needs. It crosses to the daemon as an EngineError, where ``retry`` is what is left
    for the daemon to do.
    """

    def __init__(
        self, message: str, meaning: Code, call: str, *, cause: str, retry_class: RetryClass
    ) -> None:
        super().__init__(
            message,
            cause=cause,
            advice=meaning.advice,
            errno=meaning.errno,
            retry=_ACROSS[retry_class],
        )
        self.code = meaning.number
        self.call = call
        self.retry_class = retry_class


def error_from(
    code: int, call: str, text: str = "", *, about: str = "", refused: bool = False
) -> VixFailure:
    """Return the error for *code*, the result of *call*.

    *text* is what GetErrorText says, *about* names the disk or server concerned. *refused* is for
    who saw the host refuse memory lately; it counts where the code itself says too little.
    """
    meaning = describe(code, call)
    if _PROTECTED.search(text):
        meaning = meaning._replace(
            errno=errno.EROFS, retry=NEVER, meaning="the medium is write-protected", advice=_WRITING
        )
    retry = meaning.retry
    if tells_refusal(text) or (refused and _says_too_little(meaning)):
        retry = SMALLER
    number = f"{meaning.name} ({meaning.number})" if meaning.name else f"code {meaning.number}"
    subject = about or call.removeprefix(PREFIX)
    said = " ".join(text.split())
    return VixFailure(
        f"{subject}: {meaning.meaning}",
        meaning,
        call,
        cause=f"{call}: {number}{': ' + said if said else ''}",
        retry_class=retry,
    )
