"""A file that is made as a whole or not at all: written under another name, then renamed."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from vddkfs.disks.overlay.files import Files, told, write_all
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import OverlayError, UsageError

PART: Final = ".part"


class Target:
    """A new file, open as *fd*; ``making`` opens and ends it. Methods raise OverlayError."""

    def __init__(self, files: Files, path: str, fd: int) -> None:
        self.path = path
        self._files = files
        self._fd = fd

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of *data* at *offset*, in bytes."""
        with told(self.path, f"writing at byte {offset}"):
            write_all(self._files, self._fd, data, offset)

    def cut(self, size: int) -> None:
        """Let the file be *size* bytes long; what was not written of it is a hole."""
        with told(self.path, "making it as long as it must be"):
            os.ftruncate(self._fd, size)


@contextmanager
def making(
    path: str, force: bool, kept: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[Target]:
    """Give a file to write to, which is called *path* when all of it is on the disk.

    If anything goes wrong meanwhile nothing of it is left. *force* lets a file be replaced, but
    none of those that *kept* has, (device, inode). Raises UsageError, OverlayError.
    """
    files, path = Files(), os.path.abspath(path)
    part = path + PART
    _check(path, force, kept)
    _check(part, force, kept)
    with told(part, "making it"):
        with suppress(FileNotFoundError):
            files.remove(part)
        fd = files.open(part, create=True)
        ours = os.fstat(fd)
    try:
        try:
            yield Target(files, part, fd)
            with told(part, "flushing"):
                os.fsync(fd)
        finally:
            files.close(fd)
        _check(path, force, kept)
        if not _is(part, ours):
            raise OverlayError(
                f"{printable(part)}: somebody else has put a file there meanwhile",
                advice="write to one file once at a time",
            )
        with told(part, "renaming"):
            files.rename(part, path)
    except BaseException:
        with suppress(OSError):
            if _is(part, ours):
                files.remove(part)
        raise
    with told(path, "flushing its folder"):
        files.sync_folder(os.path.dirname(path))


def _is(path: str, found: os.stat_result) -> bool:
    """Say whether *path* is still the file that *found* is of."""
    try:
        return os.path.samestat(os.lstat(path), found)
    except OSError:
        return False


def _check(path: str, force: bool, kept: frozenset[tuple[int, int]]) -> None:
    """Raise UsageError unless a file *path* may be made, instead of what is there."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(path)):
            raise UsageError(
                f"{printable(path)}: its folder does not exist", advice="make it first"
            ) from None
        return
    except OSError as error:
        raise UsageError(
            f"{printable(path)}: no file can be made there", cause=str(error.strerror)
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(
            f"{printable(path)}: is not a regular file", advice="name a file that is not there yet"
        )
    if (found.st_dev, found.st_ino) in kept:
        raise UsageError(
            f"{printable(path)}: is a file of the source, which is never changed",
            advice="name a file that is not there yet",
        )
    if not force:
        raise UsageError(
            f"{printable(path)}: is there already",
            advice="name another file, or replace it with --force",
        )
