"""Opening the files of a link: regular files, and devices of this machine where that is allowed.

What a descriptor names is not followed out of its folder unless that is allowed. That is a matter
of names: a symbolic link that lies in the folder is followed wherever it leads, if a regular file
is there, because nobody can make one who may not write to the folder.

A file may be a member of an archive (an .ova), named as if that were a folder:
``/vms/web.ova/web-disk1.vmdk``. It is read where it is. Every failure becomes a VddkfsError that
names the file.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Mapping
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


_BLKFLSBUF: Final = 0x1261
_MAX_ARCHIVES = 16

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
    more: a member of the archive *holder* has others behind it. *direct_fd* is the same device
    opened with O_DIRECT, -1 for what is no device.
    """

    path: str
    fd: int
    stamp: FileStamp
    allocated_bytes: int
    base: int = 0
    limit: int = NO_LIMIT
    holder: str = ""
    direct_fd: int = -1

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
        """Close the descriptors."""
        os.close(self.fd)
        if self.direct_fd >= 0:
            os.close(self.direct_fd)


class Archives:
    """What is in the archives whose members are opened one after another, each walked through once.

    For as long as one look at a SOURCE, or one engine. The first archives that come are remembered,
    and no more: one after another in turn must not push each other out.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[FileStamp, dict[str, Member]]] = {}

    def members(self, archive: OpenFile) -> Mapping[str, Member]:
        """Return the members of *archive*, a regular file, by their names.

        Raises NotAVmdk if it is no archive, DamagedSource, StaleImage.
        """
        stamp, members = self._known.get(archive.path, (None, {}))
        if stamp == archive.stamp:
            return members
        if not looks_like_archive(archive.head(BLOCK_BYTES)):
            raise NotAVmdk(
                f"{printable(archive.path)}: is neither a folder nor an archive",
                advice="name a .vmdk, a .vmx, an .ova or a folder of VMDKs",
            )
        found = read_members(archive.at, archive.size, archive.path)
        if archive.was_written():
            raise StaleImage(
                f"{printable(archive.path)}: written while it was opened", advice="try again"
            )
        members = {member.name: member for member in found}
        if len(self._known) < _MAX_ARCHIVES or archive.path in self._known:
            self._known[archive.path] = archive.stamp, members
        return members


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


def open_file(path: str, archives: Archives | None = None) -> OpenFile:
    """Open the regular file *path*, or the member of an archive that it names, for reading.

    *archives* remembers what is in an archive; without it, the archive is walked through each time.
    Raises SourceMissing, AccessDenied, NotAVmdk (not a regular file), DamagedSource (the file
    system failed, or the archive is damaged), StaleImage (replaced under our hands).
    """
    try:
        # Looked at first: opening some devices acts on them, and a fifo would wait for its writer.
        mode = os.stat(path).st_mode
    except NotADirectoryError as error:
        return _open_member(path, error, archives or Archives())
    except OSError as error:
        raise failure(path, error) from error
    _require_regular(path, mode)
    fd, found = _open(path)
    return OpenFile(path, fd, _stamp(path, found), found.st_blocks * 512)


def open_device(path: str) -> OpenFile:
    """Open the block device *path* for reading. Raises as ``open_file``, NotAVmdk for other files.

    Its size is what the device has now; what it holds takes all of it. It is opened twice: with
    O_DIRECT as well. Linux forgets the pages that it keeps of the device, because it is not told
    when another machine writes to it. Neither does the mtime of the device's node follow what is
    written: an identity that has not changed proves nothing about the content.
    """
    opened: list[int] = []
    try:
        if not stat.S_ISBLK(os.stat(path).st_mode):
            raise NotAVmdk(
                f"{printable(path)}: is not a block device", advice="correct the descriptor"
            )
        fd, found = _open(path)
        opened.append(fd)
        direct, same = _open(path, os.O_DIRECT)
        opened.append(direct)
        if not os.path.samestat(found, same):
            raise _replaced(path)
        _forget_pages(fd)
        size = os.lseek(fd, 0, os.SEEK_END)
    except (OSError, VddkfsError) as error:
        for fd in opened:
            os.close(fd)
        if isinstance(error, OSError):
            raise failure(path, error) from error
        raise
    return OpenFile(path, fd, _stamp(path, found, size), size, direct_fd=direct)


def _forget_pages(fd: int) -> None:
    """Have Linux forget the clean pages of the device *fd*, and read nothing ahead through it.

    A page that is just being read ahead would be passed by, and stay. Raises OSError.
    """
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    # Buffers above the pages keep some; that needs CAP_SYS_ADMIN.
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _BLKFLSBUF, 0)


def is_archive(path: str) -> bool:
    """Say whether *path* is a regular file that begins as an archive does."""
    if not os.path.isfile(path):
        return False
    file = open_file(path)
    try:
        return looks_like_archive(file.head(BLOCK_BYTES))
    finally:
        file.close()


def list_folder(path: str, archives: Archives | None = None) -> list[str]:
    """Return the names in the folder, or archive, *path*, sorted; *archives* as in ``open_file``.

    Raises SourceMissing, AccessDenied, DamagedSource.
    """
    if os.path.isfile(path):
        archive = open_file(path)
        try:
            return sorted((archives or Archives()).members(archive))
        finally:
            archive.close()
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise failure(path, error) from error


def _open(path: str, flags: int = 0) -> tuple[int, os.stat_result]:
    """Open what was just looked at, and return the descriptor with what it is of."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | flags)
    except OSError as error:
        raise failure(path, error) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISBLK(found.st_mode):
            _require_regular(path, found.st_mode)
        os.set_blocking(fd, True)
        named = os.stat(path)
        if (named.st_dev, named.st_ino) != (found.st_dev, found.st_ino):
            raise _replaced(path)
    except OSError as error:
        os.close(fd)
        raise failure(path, error) from error
    except VddkfsError:
        os.close(fd)
        raise
    return fd, found


def _replaced(path: str) -> StaleImage:
    return StaleImage(f"{printable(path)}: replaced while it was being opened", advice="try again")


def _open_member(path: str, error: OSError, archives: Archives) -> OpenFile:
    """Open the member of an archive that *path* names; *error* is that no such file exists."""
    holder = path
    while not os.path.lexists(holder) and holder != os.path.dirname(holder):
        holder = os.path.dirname(holder)
    if not os.path.isfile(holder) or holder == path:
        raise failure(path, error) from error
    name = path[len(holder) + 1 :]
    archive = open_file(holder)
    try:
        member = archives.members(archive).get(name)
        if member is None:
            raise SourceMissing(
                f"{printable(path)}: no file of that name is in the archive",
                advice="`tar -tf` lists what is",
            )
    except BaseException:
        archive.close()
        raise
    stamp = msgspec.structs.replace(
        archive.stamp, path=printable(path), size=member.size, offset=member.offset
    )
    end = member.offset + member.size
    return OpenFile(path, archive.fd, stamp, member.size, member.offset, end, holder)


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
