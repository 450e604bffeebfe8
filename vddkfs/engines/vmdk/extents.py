"""Extents that need no look-up, and the words that all extents share.

An *extent* covers the sectors from ``start`` to ``end`` of its link. All its methods take sectors
of the link, which are also those of every image that contains it, and ranges that lie inside it.

Three views of the same truth, from the fastest to the widest:

- ``locate``: one request in one place, without allocating anything. The hot path.
- ``pieces``: any request, as runs to read. May read tables.
- ``areas``: any range for the map, lazily and with no regard to where in a file the data is.

*fresh* asks that no cached table is used, *flags* are those of preadv2: with RWF_NOWAIT nothing may
wait for a disk, and ``WouldWait`` or BlockingIOError is raised instead.
"""

import errno
import os
from collections.abc import Iterator
from typing import Final, Protocol

import msgspec

from vddkfs.engines.vmdk.files import NO_LIMIT, OpenFile
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import EngineError

ABSENT: Final = 0
"""Kind: not in this link; its parent has it, and below the base it is zeros."""

ZERO: Final = 1
"""Kind: zeros, whatever the parent has."""

DATA: Final = 2
"""Kind: in a file of this link."""

PACKED: Final = 3
"""Kind: in a file of this link, compressed: ``unpack`` brings it."""

AT_ABSENT: Final = -1
"""``locate``: the whole request is ABSENT."""

AT_ZERO: Final = -2
"""``locate``: the whole request is ZERO."""

UNSURE: Final = -3
"""``locate``: several places, a table that is not cached, or damage: ask ``pieces``."""


class WouldWait(Exception):
    """A request that must not wait would have to read a table from a disk."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A run of *count* sectors from *sector* of one *kind*.

    DATA is at byte *offset* of *fd*. PACKED is one grain, or a part of it, whose compressed form is
    at *offset*.
    """

    kind: int
    sector: int
    count: int
    fd: int = -1
    offset: int = -1


class Extent(Protocol):
    """What a link is made of."""

    start: int
    end: int
    fd: int
    limit: int
    """Byte of ``fd`` from which on nothing belongs to the extent's file."""
    path: str
    grain: int
    """Sectors of a grain, 0 where there are none, or they are not known."""

    def locate(self, sector: int, count: int, fresh: bool, flags: int) -> int:
        """Return the byte of ``fd`` where the request is in one run, or one of the codes above.

        Extents with a ``limit`` that matters return no place.
        """

    def pieces(self, sector: int, count: int, fresh: bool, flags: int) -> list[Piece]:
        """Return the runs that make up the request, in order, merged where they can be.

        Raises EngineError where the extent's tables are damaged.
        """

    def areas(self, sector: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield (kind, sectors) in order; neighbours may be of the same kind.

        Damage shows as DATA, so that a reader comes and meets the error.
        """

    def unpack(self, piece: Piece, view: memoryview, fresh: bool, flags: int) -> None:
        """Fill *view* with a PACKED *piece*, one of those that ``pieces`` returned.

        Raises EngineError if the grain is damaged.
        """

    def forget(self) -> None:
        """Forget what was read of the extent's tables."""


class PlainExtent:
    """What extents without compressed grains have in common."""

    __slots__ = ()
    grain = 0

    def unpack(self, piece: Piece, view: memoryview, fresh: bool, flags: int) -> None:
        """See ``Extent``: no piece is PACKED."""
        raise AssertionError(f"{piece} is not compressed")


class ZeroExtent(PlainExtent):
    """An extent without a file: zeros."""

    __slots__ = ("end", "fd", "limit", "path", "start")

    def __init__(self, start: int, sectors: int) -> None:
        self.start = start
        self.end = start + sectors
        self.fd = -1
        self.limit = NO_LIMIT
        self.path = ""

    def forget(self) -> None:
        """See ``Extent``: there are no tables."""

    def locate(self, sector: int, count: int, fresh: bool, flags: int) -> int:
        """See ``Extent``."""
        return UNSURE if sector + count > self.end else AT_ZERO

    def pieces(self, sector: int, count: int, fresh: bool, flags: int) -> list[Piece]:
        """See ``Extent``."""
        return [Piece(ZERO, sector, count)]

    def areas(self, sector: int, count: int) -> Iterator[tuple[int, int]]:
        """See ``Extent``."""
        yield ZERO, count


class FlatExtent(PlainExtent):
    """An extent whose sectors are all in a raw file (FLAT and VMFS), from sector *offset* on."""

    __slots__ = ("_bounded", "_shift", "end", "fd", "limit", "path", "start")

    def __init__(self, file: OpenFile, start: int, sectors: int, offset: int) -> None:
        self.start = start
        self.end = start + sectors
        self.fd = file.fd
        self.limit = file.limit
        self.path = file.path
        self._bounded = file.limit != NO_LIMIT
        # Members of an archive begin at a whole sector of it.
        self._shift = file.base // 512 + offset - start

    def forget(self) -> None:
        """See ``Extent``: there are no tables."""

    def locate(self, sector: int, count: int, fresh: bool, flags: int) -> int:
        """See ``Extent``."""
        if sector + count > self.end or self._bounded:
            return UNSURE
        return (sector + self._shift) << 9

    def pieces(self, sector: int, count: int, fresh: bool, flags: int) -> list[Piece]:
        """See ``Extent``."""
        return [Piece(DATA, sector, count, self.fd, (sector + self._shift) << 9)]

    def areas(self, sector: int, count: int) -> Iterator[tuple[int, int]]:
        """See ``Extent``. The holes of the file itself are ZERO: they hide the parent as well."""
        regions = FileRegions(self.fd)
        here, end = (sector + self._shift) << 9, (sector + count + self._shift) << 9
        while here < end:
            data, until = regions.at(here)
            # A sector that is only partly a hole is data.
            until = min(end, (until + 511 if data else until) & ~511)
            if until <= here:
                data, until = True, here + 512
            yield DATA if data else ZERO, (until - here) >> 9
            here = until


class FileRegions:
    """Where a file has data, as its file system says. Offsets in bytes.

    Remembers the region that was last asked for, so that neighbours cost nothing.
    """

    __slots__ = ("_fd", "data", "end", "start")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.start = self.end = 0
        self.data = True

    def at(self, offset: int) -> tuple[bool, int]:
        """Return whether there is data at *offset*, and where that changes.

        Past the end of the file, and where the file system does not tell, all is data.
        """
        if not self.start <= offset < self.end:
            self._look(offset)
        return self.data, self.end

    def _look(self, offset: int) -> None:
        self.start, self.end, self.data = offset, 1 << 62, True
        try:
            if offset >= os.fstat(self._fd).st_size:
                return
            hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
            if hole > offset:
                self.end = hole
                return
            self.data = False
            self.end = self._next_data(offset)
        except OSError:
            self.data = True

    def _next_data(self, offset: int) -> int:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return os.fstat(self._fd).st_size


def read_exactly(
    fd: int,
    view: memoryview,
    offset: int,
    *,
    path: str,
    link: str,
    sector: int,
    limit: int = NO_LIMIT,
    flags: int = 0,
) -> None:
    """Fill *view* from byte *offset* of *fd*: the file *path* of *link*, which ends at *limit*.

    Raises EngineError if the file ends before, or the disk fails; *sector* is where *view* begins
    in the image, so that the error can name the place. With RWF_NOWAIT in *flags* a short read is
    ``WouldWait``.
    """
    done, size = 0, len(view)
    allowed = min(size, max(0, limit - offset))
    while done < size:
        got = 0
        if done < allowed:
            try:
                got = os.preadv(fd, (view[done:allowed],), offset + done, flags)
            except BlockingIOError:
                raise
            except OSError as error:
                if flags:
                    raise
                raise EngineError(
                    f"{printable(path)}: reading byte {offset + done} failed: {error.strerror}",
                    link=link,
                    sector=sector + done // 512,
                ) from error
        done += got
        if done == size:
            return
        if flags:
            raise WouldWait
        if got == 0:
            end = min(limit, os.fstat(fd).st_size)
            raise EngineError(
                f"{printable(path)}: sector {sector + done // 512} of the image should be at byte "
                f"{offset + done // 512 * 512}, but the file ends at byte {end}",
                link=link,
                sector=sector + done // 512,
            )
