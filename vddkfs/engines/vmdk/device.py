"""Flat extents on a block device of this machine, and reading them past its page cache.

Linux keeps pages of a block device for as long as anything has it open, and is not told when
another machine writes to the LUN behind it. So the two ways to read what is there now are these:
all pages are dropped whenever the device is opened (``open_device``), and what is asked for fresh
is read with O_DIRECT, which leaves the pages as they are and alone.

What was written here through the pages is seen by O_DIRECT: the kernel writes it out first.
"""

import fcntl
import mmap
import os
import struct
from typing import Final

from vddkfs.engines.vmdk.extents import PACKED, UNSURE, FlatExtent, Piece, WouldWait
from vddkfs.engines.vmdk.files import OpenFile
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import EngineError

_BLKSSZGET: Final = 0x1268
_ALIGNMENT: Final = 4096
_BOUNCE_BYTES: Final = 1 << 20


class DeviceExtent(FlatExtent):
    """A flat extent on a block device, which *file* is, opened by ``open_device``.

    What is fresh is in PACKED pieces: ``unpack`` reads them with O_DIRECT. *link* is the VMDK that
    names the device, for errors.
    """

    __slots__ = ("_alignment", "_direct_fd", "_link", "_size")

    def __init__(
        self, file: OpenFile, start: int, sectors: int, offset: int, link: str = ""
    ) -> None:
        super().__init__(file, start, sectors, offset)
        self._direct_fd = file.direct_fd
        self._size = file.size
        self._link = link
        self._alignment = max(_ALIGNMENT, _block_bytes(file.direct_fd))

    def locate(self, sector: int, count: int, fresh: bool, flags: int) -> int:
        """See ``Extent``: what is fresh has no place that could be read as it is."""
        return UNSURE if fresh else super().locate(sector, count, fresh, flags)

    def pieces(self, sector: int, count: int, fresh: bool, flags: int) -> list[Piece]:
        """See ``Extent``."""
        (piece,) = super().pieces(sector, count, fresh, flags)
        if fresh:
            return [Piece(PACKED, sector, count, self._direct_fd, piece.offset)]
        return [piece]

    def unpack(self, piece: Piece, view: memoryview, fresh: bool, flags: int) -> None:
        """See ``Extent``: read a *piece* with O_DIRECT, which always waits for the device.

        Raises EngineError if the device fails, or has become smaller.
        """
        if flags:
            raise WouldWait
        bounce = mmap.mmap(-1, min(_BOUNCE_BYTES, len(view)) + 2 * self._alignment)
        try:
            for done in range(0, len(view), _BOUNCE_BYTES):
                part = view[done : done + _BOUNCE_BYTES]
                self._read(piece.offset + done, part, bounce, piece.sector + (done >> 9))
        finally:
            bounce.close()

    def _read(self, offset: int, view: memoryview, bounce: mmap.mmap, sector: int) -> None:
        """Fill *view* from byte *offset* on, by way of *bounce*, which is aligned as memory."""
        begin = offset - offset % self._alignment
        end = offset + len(view)
        end = min(end + -end % self._alignment, self._size)
        with memoryview(bounce) as whole:
            here = begin
            while here < offset + len(view):
                got = self._read_some(here, whole[here - begin : end - begin], offset, sector)
                here += got
            view[:] = whole[offset - begin :][: len(view)]

    def _read_some(self, here: int, view: memoryview, offset: int, sector: int) -> int:
        """Read into *view* from byte *here*, and return how much; byte *offset* is in *sector*."""
        why = "the device ends there"
        try:
            if got := os.preadv(self._direct_fd, (view,), here):
                return got
        except OSError as error:
            why = error.strerror or str(error)
        finally:
            view.release()
        # The sectors before that one, which are read with it, may be none of this extent.
        raise EngineError(
            f"{printable(self.path)}: reading byte {here} with O_DIRECT failed: {why}",
            link=self._link,
            sector=sector + max(0, here - offset) // 512,
        )


def _block_bytes(fd: int) -> int:
    """Return the size of a logical block of the device *fd*, the least that O_DIRECT reads."""
    (size,) = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))
    return int(size)
