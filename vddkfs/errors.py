"""Every error that vddkfs tells an operator about: one class a kind, with errno and exit code.

A ``VddkfsError`` is an expected failure. A command prints it as one line and ends with the class's
``exit_code``; a file system request that meets one ends with its ``errno``. Any other exception is
a bug: a command then shows the traceback and ends with 1, and a request ends with EIO and a
traceback in the log.

This module imports nothing of vddkfs, so that both ends of the worker protocol may use it.
"""

import errno as _errno
from typing import ClassVar, Literal

Retry = Literal["", "reconnect", "later", "busy"]
"""Whether a failed request is worth another try: not at all, with a new connection, with one after
a longer while (a host in maintenance), or as soon as this machine's other mounts let it (and then
however long that takes)."""

EXIT_OK = 0
EXIT_BUG = 1


class VddkfsError(Exception):
    """An expected failure.

    *message* names the file or thing concerned and says what is wrong with it; *cause* is what a
    lower layer said; *advice* says what the operator can do next. None ends with a full stop.
    """

    exit_code: ClassVar[int] = 9
    default_errno: ClassVar[int] = _errno.EIO

    def __init__(
        self, message: str, *, cause: str = "", advice: str = "", errno: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.advice = advice
        self.errno = self.default_errno if errno is None else errno

    def __str__(self) -> str:
        text = self.message
        if self.cause:
            text += f" ({self.cause})"
        if self.advice:
            text += f"; {self.advice}"
        return " ".join(text.split())


class UsageError(VddkfsError):
    """a bad argument, option or value on the command line"""

    exit_code = 2
    default_errno = _errno.EINVAL


class OldAbove(VddkfsError):
    """a loop device or a guest that is mounted on the files may still show old content"""

    exit_code = 3


class SourceMissing(VddkfsError):
    """the SOURCE, or a file that it names, does not exist"""

    exit_code = 10
    default_errno = _errno.ENOENT


class NotAVmdk(VddkfsError):
    """the file is not a VMDK, a .vmx, or a folder of them"""

    exit_code = 11
    default_errno = _errno.EINVAL


class UnsupportedFormat(VddkfsError):
    """a VMDK of a subformat, or with a feature, that this release does not read"""

    exit_code = 12
    default_errno = _errno.ENOTSUP


class DamagedSource(VddkfsError):
    """a VMDK whose structures are truncated, inconsistent or absurd"""

    exit_code = 13
    default_errno = _errno.EIO


class BrokenChain(VddkfsError):
    """a snapshot chain with a missing parent, a CID mismatch, a loop, or a forbidden parent path"""

    exit_code = 14
    default_errno = _errno.EIO


class AccessDenied(VddkfsError):
    """the operator may not read the source or do what was asked"""

    exit_code = 15
    default_errno = _errno.EACCES


class BadMountpoint(VddkfsError):
    """the mount point is missing, not a folder, not empty, or already mounted"""

    exit_code = 20
    default_errno = _errno.EINVAL


class FuseUnavailable(VddkfsError):
    """/dev/fuse or fusermount3 is missing, or the kernel refused the mount"""

    exit_code = 21
    default_errno = _errno.ENODEV


class NotMounted(VddkfsError):
    """no vddkfs mount is at that place, or its daemon does not answer"""

    exit_code = 30
    default_errno = _errno.ENOENT


class MountBusy(VddkfsError):
    """the mount is in use and cannot be taken down now"""

    exit_code = 31
    default_errno = _errno.EBUSY


class DaemonDied(VddkfsError):
    """the daemon ended before the mount answered"""

    exit_code = 32


class WorkerFailed(VddkfsError):
    """a worker process could not be started, died or did not answer, beyond the retry budget"""

    exit_code = 33


class StaleImage(VddkfsError):
    """the source changed under an open file: what it showed is no longer there"""

    exit_code = 34
    default_errno = _errno.ESTALE


class EngineError(VddkfsError):
    """a part of the source could not be read"""

    exit_code = 35

    def __init__(
        self,
        message: str,
        *,
        cause: str = "",
        advice: str = "",
        errno: int | None = None,
        link: str = "",
        sector: int = -1,
        retry: Retry = "",
    ) -> None:
        """*link* is the VMDK concerned, *sector* the place in the image, -1 where there is none.

        *retry* says whether asking again can help.
        """
        super().__init__(message, cause=cause, advice=advice, errno=errno)
        self.link = link
        self.sector = sector
        self.retry: Retry = retry


class ChecksFailed(VddkfsError):
    """doctor found something that must be put right before this can work"""

    exit_code = 40


class LeftBehind(VddkfsError):
    """cleanup could not take away all that dead mounts left"""

    exit_code = 41


class OldContentLeft(VddkfsError):
    """the mount itself may still show old content: not all of it could be dropped"""

    exit_code = 42


class DamageFound(VddkfsError):
    """check found damage"""

    exit_code = 43


class OverlayError(VddkfsError):
    """an overlay's folder is not one, is damaged, in use, full, or belongs to another source"""

    exit_code = 44


ALL_ERRORS: tuple[type[VddkfsError], ...] = (
    UsageError,
    OldAbove,
    SourceMissing,
    NotAVmdk,
    UnsupportedFormat,
    DamagedSource,
    BrokenChain,
    AccessDenied,
    BadMountpoint,
    FuseUnavailable,
    NotMounted,
    MountBusy,
    DaemonDied,
    WorkerFailed,
    StaleImage,
    EngineError,
    ChecksFailed,
    LeftBehind,
    OldContentLeft,
    DamageFound,
    OverlayError,
)
