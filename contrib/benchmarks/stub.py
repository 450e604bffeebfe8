"""The least that can serve a file, until unmounted.

    stub.py MOUNTPOINT SIZE session|plain [FILE]

One file, disk.raw, whose every read is a slice of one hot buffer. With FILE it can be written: each
write is a pwrite to FILE in a thread, several at once; closing it is fdatasync, as with an overlay.

The mount and its queue are those of vddkfs, so what a read costs here is what FUSE, libfuse,
pyfuse3 and trio cost together; with "plain" requests are waited for as pyfuse3 does it, and not as
vddkfs has it.
"""

import errno
import os
import stat
import sys
from typing import Final

import trio

from vddkfs.fuse import session

import pyfuse3  # isort: skip  (after vddkfs.fuse.session, which loads the C module below it)

_INODE: Final = 2
_NAME: Final = b"disk.raw"
_THREADS: Final = 16
"""As many as an overlay of vddkfs has for its writers."""
_BUFFER: Final = memoryview(bytearray(os.urandom(65536)) * 32)


class Stub(pyfuse3.Operations):
    """A folder with one file."""

    def __init__(self, size: int, target: int = -1) -> None:
        super().__init__()
        self._size = size
        self._target = target
        self._threads = trio.CapacityLimiter(_THREADS)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.entry_timeout = entry.attr_timeout = 300.0
        if inode == _INODE:
            entry.st_mode = stat.S_IFREG | (0o444 if self._target < 0 else 0o644)
            entry.st_size = self._size
            entry.st_blocks = self._size // 512
        else:
            entry.st_mode = stat.S_IFDIR | 0o555
        return entry

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find the file."""
        if name != _NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(_INODE)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return what the file is."""
        return self._attributes(inode)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open the file; who writes past the kernel's pages writes in parallel."""
        past = flags & os.O_ACCMODE != os.O_RDONLY and bool(flags & os.O_DIRECT)
        return pyfuse3.FileInfo(fh=inode, direct_io=past)

    async def read(  # type: ignore[override]  # any buffer will do, whatever the stub says
        self, fh: int, off: int, size: int
    ) -> memoryview:
        """Return *size* bytes of the buffer."""
        return _BUFFER[: min(size, self._size - off)]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write *buf* to the file behind."""
        write = trio.to_thread.run_sync
        return await write(os.pwrite, self._target, buf, off, limiter=self._threads)

    async def flush(self, fh: int) -> None:
        """Have on the disk what was written, when the file is closed."""
        await self.fsync(fh, True)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Have on the disk what was written."""
        if self._target >= 0:
            await trio.to_thread.run_sync(os.fdatasync, self._target, limiter=self._threads)


async def _seek(inode: int, offset: int, whence: int) -> int:
    raise pyfuse3.FUSEError(errno.ENOSYS)


async def serve(mountpoint: str, size: int, plain: bool, target: int) -> None:
    """Serve until the mount is gone."""
    writable = target >= 0
    session.mount(Stub(size, target), mountpoint, "stub", allow_other=False, writable=writable)
    try:
        session.raise_read_ahead(mountpoint)
        if plain:
            await pyfuse3.main(min_tasks=16, max_tasks=session.MAX_TASKS)
            return
        async with trio.open_nursery() as nursery:
            await session.serve(_seek, lambda: False, nursery)
    finally:
        session.close()


if __name__ == "__main__":
    written = os.open(sys.argv[4], os.O_RDWR) if len(sys.argv) > 4 else -1
    where = os.path.realpath(sys.argv[1])
    trio.run(serve, where, int(sys.argv[2]), sys.argv[3] == "plain", written)
