"""Who else has the files of a base open: locks, and the signs that VMware leaves.

The locks are those of qemu, so that each sees the other: read locks on bytes of the file that say
what its holder does (100 and up: reading, writing, changing its size) and what it does not let
others do (200 and up). They belong to an open file, and end with the process at the latest. Where a
file system has none, that is told, once, and the disk is used without.

Source: qemu, block/file-posix.c (RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE), include/block/
block-common.h (BLK_PERM_*). VMware Workstation and Fusion have folders ``FILE.lck`` with a file in
them; ESXi on NFS files named ``.lck-`` and the file's number there, its bytes in reverse.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from vddkfs.engines.base import LinkInfo
from vddkfs.engines.vmdk.text import printable
from vddkfs.engines.vmdk.write.writable import refusal
from vddkfs.errors import VddkfsError

_DOES: Final = 100
_FORBIDS: Final = 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_WRITERS: Final = (_DOES + _WRITE, _DOES + _RESIZE)
_TAKEN_TO_WRITE: Final = (_DOES + _READ, *_WRITERS, _FORBIDS + _WRITE, _FORBIDS + _RESIZE)
_FLOCK: Final = struct.Struct("hhqqi4x")
_WRONG_FILE_SYSTEM: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Tell = Callable[[str], None]


class Locks:
    """Locks on the files of one base, held until ``close``."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def close(self) -> None:
        """Give them back."""
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()

    def open(self, path: str) -> int:
        """Return a descriptor of *path* for locks, -1 where it is no regular file (any more)."""
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                return -1
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError:
            return -1
        self._fds.append(fd)
        return fd


def lock_to_write(info: LinkInfo, tell: Tell) -> Locks:
    """Lock the files of the base *info* against others who write, and return the locks.

    Raises the refusal (EROFS) if somebody writes one, does not let others write it, or VMware has
    it open. *tell* gets a line where others read it, and where there are no locks.
    """
    _refuse_if_vmware_holds(_files(info))
    return lock_as_vmware(info, tell)


def lock_as_vmware(info: LinkInfo, tell: Tell) -> Locks:
    """Do as ``lock_to_write``, for VMware's own library: its signs are not looked for."""
    files = _files(info)
    locks = Locks()
    try:
        for path in files:
            fd = locks.open(path)
            if fd < 0:
                continue
            # Taken before it is looked: of two who come at once, both may be refused, none missed.
            if not _take(fd, _TAKEN_TO_WRITE):
                tell(
                    f"{printable(path)}: its file system has no locks: nobody else is kept from "
                    "writing it, or noticed"
                )
                break
            _refuse_if_held(fd, path)
            if _held(fd, _DOES + _READ):
                tell(
                    f"{printable(path)}: another process reads it, and will see what is written, "
                    "or a mix of old and new"
                )
    except BaseException:
        locks.close()
        raise
    return locks


def lock_to_read(info: LinkInfo, tell: Tell) -> Locks:
    """Lock the files of the base *info* so that a writer knows of a reader; return the locks.

    *tell* gets a line for a file that somebody writes. Without locks there is nothing to tell.
    """
    locks = Locks()
    for path in _files(info):
        fd = locks.open(path)
        if fd < 0:
            continue
        if not _take(fd, (_DOES + _READ,)):
            break
        if any(_held(fd, byte) for byte in _WRITERS):
            tell(
                f"{printable(path)}: another process has it open for writing: what is read may be "
                "a mix of old and new"
            )
            break
    return locks


def writer_of(info: LinkInfo) -> str:
    """Say who has a file of the link *info* open to write it, "" where that is not to be seen."""
    files = _files(info)
    locks = Locks()
    try:
        _refuse_if_vmware_holds(files)
        for path in files:
            fd = locks.open(path)
            if fd >= 0 and any(_held(fd, byte) for byte in _WRITERS):
                return f"{printable(path)}: another process has it open for writing"
    except VddkfsError as error:
        return error.message
    finally:
        locks.close()
    return ""


def _files(info: LinkInfo) -> Sequence[str]:
    return tuple(dict.fromkeys([info.path, *(e.path for e in info.extents if e.path)]))


def _refuse_if_held(fd: int, path: str) -> None:
    if any(_held(fd, byte) for byte in _WRITERS):
        raise refusal(
            path,
            "another process has it open for writing (a mount of vddkfs, or qemu)",
            "end that, or wait for its end",
        )
    if any(_held(fd, _FORBIDS + what) for what in (_READ, _WRITE, _RESIZE)):
        raise refusal(
            path,
            "another process (qemu) has it open, and does not let others write it",
            "end that, or wait for its end",
        )


def _take(fd: int, bytes_: Iterable[int]) -> bool:
    """Lock *bytes_* of the file, shared; say whether its file system can."""
    try:
        for byte in bytes_:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, byte))
    except OSError as error:
        if error.errno in _WRONG_FILE_SYSTEM:
            return False
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        # Somebody holds more than a shared lock there, which _held tells as well.
    return True


def _held(fd: int, byte: int) -> bool:
    """Say whether somebody else has a lock on *byte*."""
    try:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte))
    except OSError:
        return False
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _lock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _refuse_if_vmware_holds(files: Sequence[str]) -> None:
    for path in files:
        held = _lock_folder(f"{path}.lck") or _lock_on_nfs(path)
        if held:
            raise refusal(
                path,
                f"VMware has it open: {printable(held)} exists",
                "power the virtual machine off; if none runs on any host, the lock was left "
                "behind: remove it",
            )


def _lock_folder(folder: str) -> str:
    """Return the name of the lock in *folder*, or that itself if it does not show; "" for none."""
    try:
        return next((f"{folder}/{name}" for name in sorted(os.listdir(folder))), "")
    except OSError:
        return folder if os.path.lexists(folder) else ""


def _lock_on_nfs(path: str) -> str:
    """Return the name of the lock that ESXi has on *path*, "" for none."""
    try:
        number = os.stat(path).st_ino.to_bytes(8, "little").hex()
    except OSError:
        return ""
    lock = f"{os.path.dirname(path)}/.lck-{number}"
    return lock if os.path.lexists(lock) else ""
