"""The image of a disk that is written: the base of a chain, open for writing.

Writes take the way of reads: in pieces of at most 2 MiB, many at once, within the window that the
host's memory leaves (see ``flow``). They are begun with WriteAsync. Over SAN, HotAdd and for local
files the library does them one after another, some inside the call; where it has no WriteAsync they
are made with Write on the main thread, as reads are with Read.

A flush waits until nothing at all is under way on the handle, because only asynchronous requests
may run beside one another there; nothing begins before it is done. A library without
VixDiskLib_Flush (it came with 6.0) is made to flush by closing the disk, and opening it again.

The handle stays open as long as the worker lives, however idle it is and whoever waits for a
session: it holds the disk's lock, and whoever else got that, or a VM that was powered on, would
write below what readers were shown. So nobody else can have written when the daemon asks what the
disk is now; only ``renew`` opens it again, after a flush, taking the lock anew and proving that it
can be written (see ``session``). A lock that another holds then, or at the first open, is an error
that is worth another try. On a file of this machine, where the library's own lock is nothing that
others look at, there is the built-in engine's as well, and who has that is met with a refusal.

Writes that ended and may be lost are never forgotten: where a disk had to be closed without a
flush, every flush of this worker fails, and another worker has to write them again.
"""

import logging
import mmap
from functools import partial
from typing import TYPE_CHECKING

from vddkfs.engines.base import SECTOR, Done, LinkIdentity
from vddkfs.engines.config import VddkImage
from vddkfs.engines.vddk.devices import Flush
from vddkfs.engines.vddk.flow import Piece
from vddkfs.engines.vddk.layouts import OpenFlag
from vddkfs.engines.vddk.reader import ImageReader
from vddkfs.engines.vddk.runtime import Runtime
from vddkfs.engines.vddk.session import OpenDisk
from vddkfs.errors import EngineError, VddkfsError

if TYPE_CHECKING:
    from vddkfs.engines.vmdk.write.locks import Locks


def make_image(runtime: Runtime, image: VddkImage) -> ImageReader:
    """Return who reads *image*, and writes it if it is to be written."""
    return ImageWriter(runtime, image) if image.writable else ImageReader(runtime, image)


class ImageWriter(ImageReader):
    """One image that is read and written. For the worker's main thread."""

    def __init__(self, runtime: Runtime, image: VddkImage) -> None:
        super().__init__(runtime, image)
        # Its content id is ours to change.
        self.may_change = True
        self._unflushed = False
        """Whether anything was written since the last flush."""
        self._lost = ""
        """Why writes that had ended may be lost."""
        self._locks: Locks | None = None
        """On a file of this machine, until this process ends."""

    def _opened(self, flush: Flush) -> OpenDisk:
        if not self.config.server and self._locks is None:
            # Imported here, so that a worker of a remote disk does not load the other engine.
            from vddkfs.engines.vmdk.chain import describe_chain
            from vddkfs.engines.vmdk.write.locks import lock_as_vmware

            # The library puts another file in the place of a descriptor: the extents count.
            link = describe_chain(self.image.path)[-1]
            self._locks = lock_as_vmware(link, partial(self.runtime.say, logging.WARNING))
        return super()._opened(flush)

    def start_write(self, sector: int, data: memoryview, done: Done) -> None:
        """Begin a write; see ``AsyncEngine``."""
        try:
            if not data or len(data) % SECTOR or sector < 0:
                raise ValueError(f"{len(data)} bytes from sector {sector} are no whole sectors")
            disk = self.open()
            if OpenFlag.UNBUFFERED in disk.handle.flags:
                data = _aligned(disk, data)
        except (VddkfsError, OSError, ValueError) as error:
            done(error)
            return
        self.flow.start(sector, data, done, writes=True)

    def start_flush(self, done: Done) -> None:
        """Begin a flush of what has ended; see ``AsyncEngine``."""
        self.flow.when_still(partial(self._flush_and_tell, done))

    def _flush_and_tell(self, done: Done) -> None:
        try:
            self.sync()
        except (VddkfsError, OSError, ValueError) as error:
            done(error)
        else:
            done(None)

    def sync(self) -> None:
        """Return when what was written is on the disk; nothing may be under way.

        Raises EngineError where it may be lost.
        """
        if self._lost:
            raise EngineError(
                f"{self.image.path}: writes may be lost", cause=self._lost, retry="reconnect"
            )
        if self.disk is None:
            return
        if self.runtime.library.has("Flush"):
            self.disk.handle.flush()
        elif self._unflushed:
            self._close_to_flush(self.disk)
        self._unflushed = False

    def _close_to_flush(self, disk: OpenDisk) -> None:
        try:
            disk.handle.close()
        except EngineError as error:
            self._lose(error)
            super().close()
            raise
        try:
            disk.renew()
        except EngineError as error:
            # All is written; whoever wants the disk next opens it, or hears why that fails.
            self.runtime.say(logging.WARNING, f"{self.image.path}: not opened again: {error}")
            super().close()

    def _lose(self, error: Exception) -> None:
        self._lost = self._lost or str(error)
        self._unflushed = False
        text = f"{self.image.path}: closed, and writes may be lost: {error}"
        self.runtime.say(logging.ERROR, text)

    def close(self) -> None:
        """Close the disk, after a flush. Where that fails the operator is told."""
        if self.disk is not None and self._unflushed:
            try:
                if self.runtime.library.has("Flush"):
                    self.sync()
                else:
                    self.disk.handle.close()
            except (VddkfsError, OSError, ValueError) as error:
                self._lose(error)
        super().close()

    def _look(self, anew: bool, flush: Flush, strict: bool = False) -> LinkIdentity:
        if self.disk is not None:
            self.sync()
        return super()._look(anew, flush, strict)

    def revalidate(self) -> LinkIdentity:
        """Return what the image is now: what it was, for as long as its lock is held."""
        return self._look(False, self._new_flush(), strict=True)

    def _issue(self, piece: Piece) -> None:
        if piece.writes:
            self._unflushed = True
        super()._issue(piece)

    def _may_rest(self, idle: float) -> bool:
        return False


def _aligned(disk: OpenDisk, data: memoryview) -> memoryview:
    """Return *data*, or a copy of it that begins where unbuffered transfers may."""
    native = disk.connection.library.native
    start = native.buffer(data, False)
    try:
        if native.address(start) % SECTOR == 0:
            return data
    finally:
        native.release(start)
    copy = memoryview(mmap.mmap(-1, len(data)))
    copy[:] = data
    return copy
