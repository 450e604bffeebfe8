"""Opening the files of a link: regular files, never outside the folder or a device unless allowed.

A file may be a member of an archive (an .ova), named as if that were a folder:
``/vms/web.ova/web-disk1.vmdk``. It is read where it is. Every failure becomes a VddkfsError that
names the file.
"""

import errno
import functools
import os
import re
import stat
from typing import Final

import msgspec

from vddkfs.engines.base import FileStamp
from vddkfs.engines.vmdk.archive import BLOCK_BYTES, Member, looks_like_archive, read_members
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


NO_LIMIT: Final = 1 << 62
"""As ``OpenFile.limit``: the file ends where it ends."""


class Trust(msgspec.Struct, frozen=True):
    """What a file may name: files *outside* its own folder, *devices* of this machine."""

    outside: bool = False
    devices: bool = False


NOTHING_OUTSIDE: Final = Trust()
"""Files may name files of their own folder."""


class OpenFile(msgspec.Struct, frozen=True):
    """A file opened for reading, with its stamp of that moment; sizes are in bytes.

    *base* is where it begins in what is open as *fd*, and *limit* where that is not this file any
    more: a member of the archive *holder* has others behind it.
    """

    path: str
    fd: int
    stamp: FileStamp
    allocated_bytes: int
    base: int = 0
    limit: int = NO_LIMIT
    holder: str = ""

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self.stamp.size

    def head(self, size: int) -> bytes:
        """Return the first *size* bytes, fewer if the file is shorter."""
        return self.at(0, size)

    def at(self, offset: int, size: int) -> bytes:
        """Return *size* bytes from *offset*, fewer at the file's end."""
        here = self.base + offset
        end = min(here + size, self.limit)
        parts = bytearray()
        try:
            while here < end:
                part = os.pread(self.fd, end - here, here)
                if not part:
                    break
                parts += part
                here += len(part)
        except OSError as error:
            raise failure(self.path, error) from error
        return bytes(parts)

    def was_written(self) -> bool:
        """Say whether the open file, or the archive that it is in, was written since.

        By its mtime alone: its ctime moves as well when it is renamed, or gets another name.
        """
        try:
            return os.fstat(self.fd).st_mtime_ns != self.stamp.mtime_ns
        except OSError:
            return True

    def stamp_now(self) -> FileStamp:
        """Return the stamp of the open file as it is now.

        Raises StaleImage if another file has taken its path, SourceMissing if none is there.
        """
        try:
            found = os.fstat(self.fd)
            named = os.stat(self.holder or self.path)
        except OSError as error:
            raise failure(self.path, error) from error
        if (named.st_dev, named.st_ino) != (found.st_dev, found.st_ino):
            raise StaleImage(f"{printable(self.path)} was replaced by another file")
        if self.holder or stat.S_ISBLK(found.st_mode):
            now = _stamp(self.path, found, self.size)
            return msgspec.structs.replace(now, offset=self.stamp.offset)
        return _stamp(self.path, found)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


def stamp_of(path: str) -> FileStamp:
    """Return the stamp of the regular file *path*, which is not opened. Raises as ``open_file``."""
    return stamp_and_space(path)[0]


def stamp_and_space(path: str) -> tuple[FileStamp, int]:
    """Return the stamp of the regular file *path*, and the bytes that it occupies."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise failure(path, error) from error
    _require_regular(path, found.st_mode)
    return _stamp(path, found), found.st_blocks * 512


def open_file(path: str) -> OpenFile:
    """Open the regular file *path*, or the member of an archive that it names, for reading.

    Raises SourceMissing, AccessDenied, NotAVmdk (not a regular file), DamagedSource (the file
    system failed, or the archive is damaged), StaleImage (replaced under our hands).
    """
    try:
        # Looked at first: opening some devices acts on them, and a fifo would wait for its writer.
        mode = os.stat(path).st_mode
    except NotADirectoryError as error:
        return _open_member(path, error)
    except OSError as error:
        raise failure(path, error) from error
    _require_regular(path, mode)
    fd, found = _open(path)
    return OpenFile(path, fd, _stamp(path, found), found.st_blocks * 512)


def open_device(path: str) -> OpenFile:
    """Open the block device *path* for reading. Raises as ``open_file``, NotAVmdk for other files.

    Its size is what the device has now; what it holds takes all of it.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISBLK(mode):
            raise NotAVmdk(
                f"{printable(path)}: is not a block device", advice="correct the descriptor"
            )
        fd, found = _open(path)
    except OSError as error:
        raise failure(path, error) from error
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        os.close(fd)
        raise failure(path, error) from error
    return OpenFile(path, fd, _stamp(path, found, size), size)


def is_archive(path: str) -> bool:
    """Say whether *path* is a regular file that begins as an archive does."""
    if not os.path.isfile(path):
        return False
    file = open_file(path)
    try:
        return looks_like_archive(file.head(BLOCK_BYTES))
    finally:
        file.close()


def list_folder(path: str) -> list[str]:
    """Return the names in the folder, or archive, *path*, sorted.

    Raises SourceMissing, AccessDenied, DamagedSource.
    """
    if os.path.isfile(path):
        return sorted({member.name for member in _members(stamp_of(path), path)})
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise failure(path, error) from error


def _open(path: str) -> tuple[int, os.stat_result]:
    """Open what was just looked at, and return the descriptor with what it is of."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise failure(path, error) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISBLK(found.st_mode):
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
    return fd, found


def _open_member(path: str, error: OSError) -> OpenFile:
    """Open the member of an archive that *path* names; *error* is that no such file exists."""
    holder = path
    while not os.path.lexists(holder) and holder != os.path.dirname(holder):
        holder = os.path.dirname(holder)
    if not os.path.isfile(holder) or holder == path:
        raise failure(path, error) from error
    name = path[len(holder) + 1 :]
    archive = open_file(holder)
    try:
        found = [member for member in _members(archive.stamp, holder) if member.name == name]
        if not found:
            raise SourceMissing(
                f"{printable(path)}: no file of that name is in the archive",
                advice="`tar -tf` lists what is",
            )
    except BaseException:
        archive.close()
        raise
    member = found[-1]
    stamp = msgspec.structs.replace(
        archive.stamp, path=printable(path), size=member.size, offset=member.offset
    )
    end = member.offset + member.size
    return OpenFile(path, archive.fd, stamp, member.size, member.offset, end, holder)


@functools.lru_cache(maxsize=2)
def _members(stamp: FileStamp, path: str) -> tuple[Member, ...]:
    """Return what is in the archive *path*, which was like *stamp* a moment ago.

    Remembered, because each file of it that is opened asks again.
    """
    archive = open_file(path)
    try:
        if archive.stamp != stamp:
            raise StaleImage(f"{printable(path)}: written while it was opened", advice="try again")
        if not looks_like_archive(archive.head(BLOCK_BYTES)):
            raise NotAVmdk(
                f"{printable(path)}: is neither a folder nor an archive",
                advice="name a .vmdk, a .vmx, an .ova or a folder of VMDKs",
            )
        return read_members(archive.at, archive.size, printable(path))
    finally:
        archive.close()


def _stamp(path: str, found: os.stat_result, size: int = -1) -> FileStamp:
    return FileStamp(
        path=printable(path),
        device=found.st_dev,
        inode=found.st_ino,
        size=found.st_size if size < 0 else size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


def resolve(name: str, named_by: str, trust: Trust) -> str:
    """Return the absolute path of *name*, which the file *named_by* mentions.

    It is relative to that file's folder. A name that leads elsewhere (absolute, or through ``..``)
    is followed only if *trust* has it; BrokenChain otherwise.
    """
    if "\0" in name:
        raise DamagedSource(
            f"{printable(named_by)}: names a file with a NUL in its name", advice="correct it there"
        )
    if leads_outside(name) and not trust.outside:
        raise BrokenChain(
            f"{printable(named_by)}: names {printable(name)}, which is outside its folder",
            advice="if you trust that, mount with `-o follow_parents=any`",
        )
    folder = os.path.dirname(named_by)
    if "/" not in name and name:
        return f"{folder}/{name}"
    path = os.path.join(folder, name)
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
