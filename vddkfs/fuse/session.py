"""The FUSE session: the C module below pyfuse3, SEEK_DATA and SEEK_HOLE, and the kernel's queue.

The C module has to be in the process before pyfuse3: whoever needs that has it from here.
"""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import trio

from vddkfs.errors import FuseUnavailable
from vddkfs.fuse.quick_wait import QuickWait
from vddkfs.mounts import mounted_at

log = logging.getLogger(__name__)

MAX_TASKS: Final = 1024
"""Requests that are handled at once, so that those of a disk that hangs leave room for others."""
MAX_BACKGROUND: Final = 512
"""Read-ahead and asynchronous direct requests that the kernel sends at once, for all files."""
READ_AHEAD_KIB: Final = 1024
"""The kernel's read-ahead on the mount: enough for requests of 1 MiB.

The daemon reads further ahead by itself, and knows where a stream ends and where holes are; the
kernel does not, and would fetch megabytes of holes behind each piece of a thin disk.
"""


def _load_hooks() -> Any:
    """Return the C module, loaded so that pyfuse3 finds its symbols; None where it is missing."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        return importlib.import_module("vddkfs.fuse._session")
    except ImportError:
        return None
    finally:
        sys.setdlopenflags(flags)


_hooks = _load_hooks()

import pyfuse3 as pyfuse3  # noqa: E402  (the C module has to be loaded first)

Seek = Callable[[int, int, int], Awaitable[int]]
"""(inode, offset, whence) to the offset found; raises pyfuse3.FUSEError."""


def libfuse_version() -> str:
    """Return libfuse's version, or "unknown" without the C module."""
    if _hooks is None:
        return "unknown"
    return str(_hooks.ffi.string(_hooks.lib.library_version()).decode())


def has_hooks() -> bool:
    """Say whether the C module is there, and with it SEEK_HOLE and the tuned queue."""
    return _hooks is not None


def agreed() -> dict[str, int]:
    """Return what was agreed with the kernel when the session began."""
    if _hooks is None:
        return {}
    names = ("max_background", "max_readahead", "max_write")
    return {name: int(_hooks.lib.agreed_value(index)) for index, name in enumerate(names)}


def mount(
    operations: pyfuse3.Operations,
    mountpoint: str,
    source: str,
    allow_other: bool,
    writable: bool = False,
) -> None:
    """Mount; the kernel's requests wait until ``serve`` runs. Raises FuseUnavailable."""
    if _hooks is not None:
        _hooks.lib.set_wanted(MAX_BACKGROUND, 0)
    options = {"default_permissions", "subtype=vddkfs", f"fsname={_option_text(source)}"}
    options.add("rw" if writable else "ro")
    if allow_other:
        options.add("allow_other")
    try:
        pyfuse3.init(operations, mountpoint, options)
    except RuntimeError as error:
        raise FuseUnavailable(
            f"{mountpoint}: the kernel or fusermount3 refused the mount",
            cause=str(error),
            advice=_refusal_advice(allow_other),
        ) from error


def _refusal_advice(allow_other: bool) -> str:
    if allow_other and os.geteuid() != 0:
        return "allow_other needs user_allow_other in /etc/fuse.conf"
    return "see the line that libfuse printed above"


def _option_text(text: str) -> str:
    """Return *text* as one ASCII word of a list of mount options."""
    plain = text.encode("ascii", "backslashreplace").decode().replace("\n", "\\n")
    return plain.replace("\\", "\\\\").replace(",", "\\,")


async def serve(seek: Seek, busy: Callable[[], bool], nursery: trio.Nursery) -> None:
    """Handle the kernel's requests until the mount is gone.

    *busy* says whether workers owe answers; *nursery* runs the seeks.
    """
    if _hooks is not None:
        _serve_seeks(seek, nursery)
    vars(pyfuse3)["trio"] = QuickWait(busy).stand_in()
    await pyfuse3.main(min_tasks=16, max_tasks=MAX_TASKS)


def _serve_seeks(seek: Seek, nursery: trio.Nursery) -> None:
    lib = _hooks.lib

    async def answer(req: int, inode: int, offset: int, whence: int) -> None:
        try:
            found = await seek(inode, offset, whence)
        except pyfuse3.FUSEError as error:
            lib.reply_error(req, error.errno)
        except BaseException:
            lib.reply_error(req, errno.EIO)
            raise
        else:
            lib.reply_lseek(req, found)

    @_hooks.ffi.def_extern(name="vddkfs_on_lseek")  # type: ignore[untyped-decorator]
    def on_lseek(req: int, inode: int, _fh: int, offset: int, whence: int) -> None:
        nursery.start_soon(answer, req, inode, offset, whence)


def raise_read_ahead(mountpoint: str) -> str:
    """Have the kernel read the mount's files further ahead; return "" or why it does not."""
    mounted = mounted_at(mountpoint)
    if mounted is None:
        return "the mount is not in /proc/self/mountinfo"
    try:
        Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb").write_text(f"{READ_AHEAD_KIB}\n")
    except OSError as error:
        return str(error)
    return ""


def forget_pages(inode: int, start: int, size: int) -> None:
    """Have the kernel drop its pages of *size* bytes from *start* of a file, 0: all that follow.

    Waits for reads of them that the kernel has sent. Without the C module all pages go. Raises
    OSError: FileNotFoundError where the kernel does not know the inode, and so has nothing of it.
    """
    if _hooks is None:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(inode))
        return
    code = -int(_hooks.lib.notify_inode(inode, start, size))
    if code:
        raise OSError(code, os.strerror(code))


def close() -> None:
    """End the session and the mount, also where files are open (they then see ENOTCONN)."""
    pyfuse3.close(unmount=True)
