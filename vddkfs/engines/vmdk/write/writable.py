"""Files opened for writing: whole writes, barriers, and a flush whose failure is not forgotten.

The kernel tells a failed flush once, and takes what it could not write for written from then on: a
second fdatasync says that all is well. So the first failure is remembered here, for all files of
the link, and nothing is written or flushed after it.
"""

import errno
import os
import stat
import threading

from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import AccessDenied, EngineError, VddkfsError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class Loss:
    """Whether written data was lost, which the files of one link share."""

    def __init__(self) -> None:
        self.what = ""

    def check(self) -> None:
        """Raise EngineError if a flush has failed."""
        if self.what:
            raise EngineError(
                f"{self.what}: what was written before may be lost, and nothing is written any "
                "more",
                advice="put its disk right, mount again, and write everything since the last "
                "good flush once more",
            )


class WritableFile:
    """A file of the VMDK *link*, open for writing as *fd*. Offsets are in bytes.

    Methods may be called by several threads at once. They raise EngineError with the errno of what
    failed; *sector* is the place in the image that it names.
    """

    def __init__(self, fd: int, path: str, link: str, loss: Loss) -> None:
        self.fd = fd
        self.path = path
        self.link = link
        self._loss = loss
        self._dirty = False
        self._sync_lock = threading.Lock()

    def write(self, data: bytes | memoryview, offset: int, sector: int) -> None:
        """Write all of *data* at *offset*. A part of it may be in the file if that fails."""
        self._loss.check()
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                wrote = os.pwrite(self.fd, view[done:], offset + done)
                if wrote == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                done += wrote
        except OSError as error:
            raise EngineError(
                f"{printable(self.path)}: writing byte {offset + done} failed",
                cause=_reason(error),
                advice=_advice(error),
                errno=error.errno,
                link=self.link,
                sector=sector,
            ) from error
        finally:
            self._dirty = True

    def read(self, size: int, offset: int, sector: int) -> bytes:
        """Return *size* bytes from *offset*."""
        parts = bytearray()
        try:
            while len(parts) < size:
                part = os.pread(self.fd, size - len(parts), offset + len(parts))
                if not part:
                    raise OSError(errno.EIO, "the file ends there")
                parts += part
        except OSError as error:
            raise EngineError(
                f"{printable(self.path)}: reading byte {offset + len(parts)} failed",
                cause=_reason(error),
                advice="check the file system it is on",
                errno=error.errno,
                link=self.link,
                sector=sector,
            ) from error
        return bytes(parts)

    def suspect(self) -> None:
        """Have the next ``sync`` look: a process before this one may have written."""
        self._dirty = True

    def size(self) -> int:
        """Return how many bytes the file has now."""
        return os.fstat(self.fd).st_size

    def sync(self) -> None:
        """Return when all that was written before is on the disk. Does nothing if nothing was.

        One caller at a time: of two fdatasync at once only one would be told of a failure.
        """
        with self._sync_lock:
            self._loss.check()
            if not self._dirty:
                return
            self._dirty = False
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                self._loss.what = f"{printable(self.path)}: a flush failed: {_reason(error)}"
                raise EngineError(
                    f"{printable(self.path)}: flushing failed, so what was written since the last "
                    "flush may be lost; nothing is written any more",
                    cause=_reason(error),
                    advice=_advice(error),
                    errno=error.errno,
                    link=self.link,
                ) from error

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


def open_writable(fd: int, path: str) -> int:
    """Return a descriptor for writing of the regular file *path*, which *fd* is open on.

    Raises a VddkfsError with errno EROFS: it is a member of an archive or a device, was replaced
    since *fd* was opened, or may not be written.
    """
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise refusal(path, "it is a raw device, which is only read")
        if _identity(os.stat(path)) != _identity(found):
            raise refusal(path, "another file has taken its name", "mount again")
        opened = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except NotADirectoryError as error:
        raise refusal(
            path, "it is in an archive, which is only read", "unpack it with tar, and name that"
        ) from error
    except OSError as error:
        advice = "mount again"
        if error.errno in _NOT_ALLOWED:
            advice = "check its owner and mode, and how its file system is mounted"
        raise refusal(path, "it cannot be opened for writing", advice, error) from error
    if _identity(os.fstat(opened)) != _identity(found):
        os.close(opened)
        raise refusal(path, "opening it for writing led to another file", "check /proc")
    return opened


def refusal(path: str, why: str, advice: str = "", error: OSError | None = None) -> VddkfsError:
    """Return the error, with errno EROFS, that says why *path* cannot be written."""
    return AccessDenied(
        f"{printable(path)}: cannot be written: {why}",
        cause="" if error is None else _reason(error),
        advice=advice or "mount it without rw",
        errno=errno.EROFS,
    )


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _advice(error: OSError) -> str:
    if error.errno in _FULL:
        return "free space on the file system it is on"
    if error.errno == errno.EFBIG:
        return "raise the limit of file sizes (`ulimit -f`), or use another file system"
    return "check the file system it is on"
