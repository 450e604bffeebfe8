"""The kernel's list of mounts, unmounting, and who keeps a mount busy."""

import contextlib
import ctypes
import errno
import os
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from vddkfs.errors import AccessDenied, BadMountpoint, FuseUnavailable, MountBusy, NotMounted
from vddkfs.mountinfo import FILE_SYSTEM, entries

FUSE_DEVICE: Final = Path("/dev/fuse")
_MNT_DETACH: Final = 2
_MAX_HOLDERS: Final = 10


class Mounted(NamedTuple):
    """A line of /proc/self/mountinfo: ``major:minor``, where, and which type of file system."""

    device: str
    place: str
    kind: str


def mounted_at(place: str) -> Mounted | None:
    """Return the topmost mount at *place* (canonical), without a request to that mount."""
    found = None
    for entry in entries():
        if entry.place == place:
            found = Mounted(entry.device, place, entry.kind)
    return found


def check_mountpoint(place: str) -> None:
    """Raise BadMountpoint unless *place* is an empty folder with nothing mounted on it."""
    mounted = mounted_at(place)
    if mounted is not None and mounted.kind == FILE_SYSTEM:
        raise BadMountpoint(
            f"{place}: a vddkfs mount is there already",
            advice=f"`vddkfs status {place}` shows it, `vddkfs umount {place}` ends it",
        )
    if mounted is not None:
        raise BadMountpoint(
            f"{place}: {mounted.kind} is mounted there already", advice="name another folder"
        )
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        raise BadMountpoint(
            f"{place}: no such folder", advice=f"make it with `mkdir -p {place}`"
        ) from None
    except NotADirectoryError:
        raise BadMountpoint(f"{place}: not a folder", advice="name an empty folder") from None
    except PermissionError:
        raise AccessDenied(
            f"{place}: you may not look into that folder", advice="name a folder of your own"
        ) from None
    except OSError as error:
        raise BadMountpoint(
            f"{place}: cannot be looked into",
            cause=str(error.strerror),
            advice="name another folder",
        ) from None
    if os.geteuid() != 0 and not os.access(place, os.W_OK):
        raise AccessDenied(
            f"{place}: you may not mount on a folder that you may not write",
            advice="name a folder of your own",
        )
    if names:
        raise BadMountpoint(
            f"{place}: the folder is not empty", advice="name an empty folder, or a new one"
        )


def check_fuse() -> None:
    """Raise FuseUnavailable if the kernel offers no FUSE here."""
    if not FUSE_DEVICE.exists():
        raise FuseUnavailable(
            f"{FUSE_DEVICE} is missing",
            advice="load the module with `modprobe fuse`; a container has to be given the device",
        )
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise FuseUnavailable(
            f"{FUSE_DEVICE} cannot be opened",
            cause=os.strerror(errno.EACCES),
            advice="mount as root, or have the device's permissions changed",
        )


def unmount(place: str, lazy: bool = False) -> None:
    """Unmount *place*. Blocks. Raises MountBusy, NotMounted or AccessDenied.

    *lazy* takes the mount out of sight at once, and away when the last file is closed.
    """
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(place), _MNT_DETACH if lazy else 0) == 0:
            return
        code = ctypes.get_errno()
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", place]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False
            )
        except OSError as error:
            raise FuseUnavailable(
                "fusermount3 cannot be run", cause=str(error), advice="install the package fuse3"
            ) from None
        if done.returncode == 0:
            return
        code = errno.EBUSY if "busy" in done.stderr else errno.EPERM
    if code == errno.EBUSY:
        raise MountBusy(f"{place}: the mount is in use", advice="close its files, and try again")
    if code == errno.EINVAL:
        raise NotMounted(f"{place}: nothing is mounted there")
    raise AccessDenied(f"{place}: cannot be unmounted", cause=os.strerror(code))


def holders(place: str) -> list[str]:
    """Return who has files of the mount at *place* open, as words for a person; at most ten."""
    loops = [f"{device} is a loop device on {name}" for device, name in _loops(place)]
    found = loops[:_MAX_HOLDERS]
    for process in Path("/proc").iterdir():
        if len(found) >= _MAX_HOLDERS:
            break
        if process.name.isdigit():
            held = _held_by(process, place)
            if held:
                with contextlib.suppress(OSError):
                    name = (process / "comm").read_text("utf-8", "backslashreplace").strip()
                    found.append(f"{name} (pid {process.name}) has {held}")
    return found


def _loops(place: str) -> list[tuple[str, str]]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            name = backing.read_text("utf-8", "surrogateescape").rstrip("\n")
            if name.startswith(place + "/"):
                found.append((f"/dev/{backing.parent.parent.name}", name))
    return found


def _held_by(process: Path, place: str) -> str:
    """Return one path below *place* that *process* has open, or "" (also where that is secret)."""
    links = [process / "cwd", process / "root"]
    with contextlib.suppress(OSError):
        links += (process / "fd").iterdir()
    for link in links:
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target == place or target.startswith(place + "/"):
                return target
    return ""
