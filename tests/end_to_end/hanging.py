"""A mount of one file whose second half hangs; it has the kernel forget the file when told to.

``hanging.py MOUNTPOINT guarded|bare``: bare leaves out the wait for reads that are under way. Says
"ready", "telling" and how the notification ended, each on a line; a line on stdin sets it off.
"""

import errno
import os
import stat
import sys
from types import SimpleNamespace
from typing import Any

import trio

from vddkfs.fuse import session
from vddkfs.fuse.notify import KernelPages
from vddkfs.fuse.tree import Window

import pyfuse3  # isort: skip

SIZE = 1024 * 1024
ROOT, FILE = 1, 2


class Operations(pyfuse3.Operations):
    def __init__(self, window: Any) -> None:
        super().__init__()
        self._window = window

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = 300
        entry.st_mode = stat.S_IFDIR | 0o700 if inode == ROOT else stat.S_IFREG | 0o400
        entry.st_size = 0 if inode == ROOT else SIZE
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        if name != b"file":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE, ctx)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=1)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        under_way = self._window.reads.begin()
        if off >= SIZE // 2:
            await trio.sleep_forever()
        under_way.end()
        return bytes(size)


async def _notify(pages: KernelPages) -> None:
    await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
    print("telling", flush=True)
    with trio.move_on_after(1):
        print(await pages.drop(FILE), flush=True)
        return
    print("given up", flush=True)


async def main(place: str, how: str) -> None:
    image: Any = SimpleNamespace(mtime_ns=0)
    window = Window(FILE, image, 0, SIZE)
    tree: Any = SimpleNamespace(nodes={FILE: window} if how == "guarded" else {})
    session.mount(Operations(window), place, "hanging", allow_other=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        nursery.start_soon(_notify, KernelPages(tree))
        await trio.to_thread.run_sync(os.stat, place)
        print("ready", flush=True)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
