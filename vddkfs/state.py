"""The state folder: how commands find the daemon of a mount.

Root's is /run/vddkfs; another user's is in $XDG_RUNTIME_DIR, or in /tmp under the user's id. A
mount has a control socket there and, where there is no syslog, a log; both go away with it.
"""

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vddkfs.errors import AccessDenied


def state_folder(create: bool = False) -> Path:
    """Return the folder. Raises AccessDenied if it is not ours alone."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.geteuid() == 0:
        folder = Path("/run/vddkfs")
    elif runtime.startswith("/"):
        folder = Path(runtime) / "vddkfs"
    else:
        folder = Path(f"/tmp/vddkfs-{os.geteuid()}")
    if create:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.path.lexists(folder):
        status = folder.lstat()
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if not ours or status.st_mode & 0o077:
            raise AccessDenied(
                f"{folder} is not a folder of yours alone",
                advice=f"remove it, or `chmod 0700 {folder}`",
            )
    return folder


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """Keep *folder*, made if need be, as one that a living process uses; remove it at the end.

    That is a shared lock on the folder itself: where an exclusive one can be had nobody lives any
    more who needs what is in it.
    """
    fd = _locked(folder)
    try:
        yield folder
    finally:
        # What a worker left there on purpose, because it could not clean up, stays.
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(fd)


def _locked(folder: Path) -> int:
    """Return a descriptor of *folder* with a shared lock on it.

    Somebody may have removed it as a dead one's before the lock was there.
    """
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH)
            try:
                if os.path.samestat(os.fstat(fd), os.stat(folder)):
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)


def canonical(mountpoint: str) -> str:
    """Return *mountpoint* as the kernel lists it: absolute, without symbolic links."""
    return os.path.realpath(mountpoint)


def socket_path(mountpoint: str) -> Path:
    """Return the control socket of the mount at *mountpoint* (canonical)."""
    return state_folder() / (_name(mountpoint) + ".sock")


def log_path(mountpoint: str) -> Path:
    """Return the log of a mount in the background where there is no syslog."""
    return state_folder() / (_name(mountpoint) + ".log")


def _name(mountpoint: str) -> str:
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]
