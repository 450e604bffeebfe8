"""Opening the files of a link: regular files only, never outside the folder unless allowed.

Every failure becomes a VddkfsError that names the file.
"""

import errno
import os
import re
import stat

import msgspec

from vddkfs.engines.base import FileStamp
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import (
    AccessDenied,
    BrokenChain,
    DamagedSource,
    NotAVmdk,
    SourceMissing,
    StaleImage,
    VddkfsError,
)

_WINDOWS_ABSOLUTE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class OpenFile(msgspec.Struct, frozen=True):
    """A regular file opened for reading, with its stamp of that moment; sizes are in bytes."""

    path: str
    fd: int
    stamp: FileStamp
    allocated_bytes: int

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self.stamp.size

    def head(self, size: int) -> bytes:
        """Return the first *size* bytes, fewer if the file is shorter."""
        return self.at(0, size)

    def at(self, offset: int, size: int) -> bytes:
        """Return *size* bytes from *offset*, fewer at the file's end."""
        parts = bytearray()
        try:
            while len(parts) < size:
                part = os.pread(self.fd, size - len(parts), offset + len(parts))
                if not part:
                    break
                parts += part
        except OSError as error:
            raise failure(self.path, error) from error
        return bytes(parts)

    def stamp_now(self) -> FileStamp:
        """Return the stamp of the open file as it is now.

        Raises StaleImage if another file has taken its path, SourceMissing if none is there.
        """
        try:
            found = os.fstat(self.fd)
            named = os.stat(self.path)
        except OSError as error:
            raise failure(self.path, error) from error
        if (named.st_dev, named.st_ino) != (found.st_dev, found.st_ino):
            raise StaleImage(f"{printable(self.path)} was replaced by another file")
        return _stamp(self.path, found)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


def open_file(path: str) -> OpenFile:
    """Open the regular file *path* for reading.

    Raises SourceMissing, AccessDenied, NotAVmdk (not a regular file), DamagedSource (the file
    system failed), StaleImage (replaced under our hands).
    """
    try:
        # Looked at first: opening some devices acts on them, and a fifo would wait for its writer.
        _require_regular(path, os.stat(path).st_mode)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise failure(path, error) from error
    try:
        found = os.fstat(fd)
        _require_regular(path, found.st_mode)
        os.set_blocking(fd, True)
        named = os.stat(path)
        if (named.st_dev, named.st_ino) != (found.st_dev, found.st_ino):
            raise StaleImage(
                f"{printable(path)}: replaced while it was being opened", advice="try again"
            )
    except OSError as error:
        os.close(fd)
        raise failure(path, error) from error
    except VddkfsError:
        os.close(fd)
        raise
    stamp = _stamp(path, found)
    return OpenFile(path, fd, stamp, found.st_blocks * 512)


def _stamp(path: str, found: os.stat_result) -> FileStamp:
    return FileStamp(
        path=printable(path),
        device=found.st_dev,
        inode=found.st_ino,
        size=found.st_size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


def resolve(name: str, named_by: str, *, follow_any: bool) -> str:
    """Return the absolute path of *name*, which the file *named_by* mentions.

    It is relative to that file's folder. A name that leads elsewhere (absolute, or through ``..``)
    is followed only with *follow_any*; BrokenChain otherwise.
    """
    if "\0" in name:
        raise DamagedSource(
            f"{printable(named_by)}: names a file with a NUL in its name", advice="correct it there"
        )
    if leads_outside(name) and not follow_any:
        raise BrokenChain(
            f"{printable(named_by)}: names {printable(name)}, which is outside its folder",
            advice="if you trust that, mount with `-o follow_parents=any`",
        )
    path = os.path.join(os.path.dirname(named_by), name)
    # Behind a symbolic link ".." is the kernel's to resolve.
    return path if ".." in path.split("/") else os.path.normpath(path)


def leads_outside(name: str) -> bool:
    """Say whether *name* is absolute, on Linux or Windows, or climbs with ``..``."""
    return (
        name.startswith("/")
        or _WINDOWS_ABSOLUTE.match(name) is not None
        or ".." in re.split(r"[\\/]", name)
    )


def failure(path: str, error: OSError) -> VddkfsError:
    """Return the VddkfsError for *error*, met at *path*."""
    path = printable(path)
    reason = error.strerror or str(error)
    if error.errno in _MISSING:
        return SourceMissing(f"{path}: {reason[:1].lower()}{reason[1:]}", advice="check the path")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(
            f"{path}: cannot be read", cause=reason, advice="check its owner and mode"
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return AccessDenied(
            f"{path}: cannot be opened",
            cause=reason,
            advice="raise the limit of open files (`ulimit -n`)",
        )
    return DamagedSource(
        f"{path}: cannot be read", cause=reason, advice="check the file system it is on"
    )


def _require_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise NotAVmdk(f"{printable(path)}: is {what}, not a VMDK", advice="name a regular file")
