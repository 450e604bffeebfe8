"""The system calls of the overlay, all of them: the tests put others in their place.

Offsets and sizes are in bytes. Methods raise OSError, and may be called by several threads at once.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import OverlayError

FULL = (errno.ENOSPC, errno.EDQUOT)


class Files:
    """The machine's own files."""

    def open(self, path: str, *, create: bool = False, read_only: bool = False) -> int:
        """Return a descriptor of *path*; with *create* it is made, and must not be there."""
        flags = os.O_RDONLY if read_only else os.O_RDWR
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        """Close *fd*."""
        os.close(fd)

    def read_into(self, fd: int, into: memoryview, offset: int) -> int:
        """Read up to ``len(into)`` bytes from *offset*; return how many, 0 at the end."""
        return os.preadv(fd, (into,), offset)

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write *data* at *offset*; return how much of it."""
        return os.pwrite(fd, data, offset)

    def sync(self, fd: int) -> None:
        """Return when what was written to *fd* is on the disk."""
        os.fdatasync(fd)

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """Have space for *size* bytes from *offset*, so that writing them cannot want any."""
        os.posix_fallocate(fd, offset, size)

    def size(self, fd: int) -> int:
        """Return how long the file is."""
        return os.fstat(fd).st_size

    def free(self, path: str) -> int:
        """Return how many bytes this user can still allocate on the file system of *path*."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def lock(self, fd: int) -> None:
        """Lock *fd* for this process; BlockingIOError if another has it."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def make_folder(self, path: str) -> None:
        """Make the folder *path*, readable by its owner only."""
        os.mkdir(path, 0o700)

    def sync_folder(self, path: str) -> None:
        """Return when the names in the folder *path* are on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: str, new: str) -> None:
        """Let *old* be called *new*, instead of what is called that."""
        os.rename(old, new)

    def link(self, old: str, new: str) -> None:
        """Let *old* be called *new* as well."""
        os.link(old, new)

    def remove(self, path: str) -> None:
        """Remove the file *path*."""
        os.unlink(path)

    def remove_folder(self, path: str) -> None:
        """Remove the empty folder *path*."""
        os.rmdir(path)

    def names(self, path: str) -> list[str]:
        """Return the names in the folder *path*, in order."""
        return sorted(os.listdir(path))


def write_all(files: Files, fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of *data* at *offset*."""
    view, done = memoryview(data), 0
    while done < len(view):
        wrote = files.write(fd, view[done:], offset + done)
        if not wrote:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += wrote


def read_all(files: Files, fd: int, into: memoryview, offset: int) -> None:
    """Fill *into* from *offset*. Raises OSError if the file ends before that."""
    done = 0
    while done < len(into):
        got = files.read_into(fd, into[done:], offset + done)
        if not got:
            raise OSError(errno.EIO, f"the file ends at byte {offset + done}")
        done += got


@contextlib.contextmanager
def told(path: str, what: str) -> Iterator[None]:
    """Turn an OSError into an OverlayError that says that *what* of *path* failed."""
    try:
        yield
    except OSError as error:
        raise failure(path, what, error) from error


def failure(path: str, what: str, error: OSError) -> OverlayError:
    """Return the error that says that *what* of *path* failed."""
    advice = "check the file system it is on"
    if error.errno in FULL:
        advice = "free space there; what is in the overlay stays usable"
    return OverlayError(
        f"{printable(path)}: {what} failed",
        cause=error.strerror or str(error),
        advice=advice,
        errno=error.errno,
    )
