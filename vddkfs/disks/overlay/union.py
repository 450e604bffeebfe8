"""An image as its fork and its source show it together, for exports. Offsets and sizes in bytes."""

import heapq
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, Protocol

from vddkfs.disks.overlay.extents import Extent, kinds
from vddkfs.disks.overlay.fork import Fork
from vddkfs.disks.overlay.table import BLOCK

PIECE: Final = 4 * 1024 * 1024
"""Bytes that are read at once, at most; whole blocks."""


class Below(Protocol):
    """What the source has of the image. Methods raise VddkfsError."""

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill *into*, whole sectors, from *offset*."""

    def data(self) -> Iterable[tuple[int, int]]:
        """Return where there may be anything but zeros: (begin, end), in order."""


class Piece(NamedTuple):
    """*content* of the image from *offset* on, None where it is zeros. *done* is how far it is."""

    offset: int
    content: memoryview | None
    done: int


class Union:
    """What *fork* has, and where it has nothing what is *below*. For one thread."""

    def __init__(self, fork: Fork, below: Below) -> None:
        self.capacity = fork.capacity
        self._fork = fork
        self._below = below

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill *into*, whole sectors, from *offset*; what is beyond the image is zeros."""
        inside = max(0, min(len(into), self.capacity - offset))
        into[inside:] = bytes(len(into) - inside)
        for gap in self._fork.read_into(offset, into[:inside]):
            self._below.read_into(gap.offset, into[gap.offset - offset :][: gap.size])

    def data(self) -> Iterator[tuple[int, int]]:
        """Yield where there may be anything but zeros: (begin, end), in order, none touches one.

        They begin and end with blocks, or with the image.
        """
        below = (
            (begin // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, self.capacity))
            for begin, end in self._below.data()
        )
        extents = self._fork.extents()
        forked = ((each.offset, each.offset + each.size) for each in extents if not each.zero)
        return joined(heapq.merge(below, forked))

    def pieces(self) -> Iterator[Piece]:
        """Yield the image without its zeros; what is in no piece is zeros. Each is valid once."""
        buffer = memoryview(bytearray(PIECE))
        for begin, end in self.data():
            while begin < end:
                size = min(PIECE, end - begin)
                part = buffer[: -(-size // BLOCK) * BLOCK]
                self.read_into(begin, part)
                for block, count, content in kinds(part):
                    if content is not None:
                        at = block * BLOCK
                        inside = content[: min(count * BLOCK, size - at)]
                        yield Piece(begin + at, inside, begin + at)
                begin += size

    def grains(self, size: int) -> Iterator[Piece]:
        """Yield every grain of *size* bytes, which divides ``PIECE``, that the fork has a part of.

        Several at once where they follow one another; *done* counts them in bytes.
        """
        buffer = memoryview(bytearray(PIECE))
        done = 0
        for first, end in touched(self._fork.extents(), size):
            for at in range(first * size, end * size, PIECE):
                part = buffer[: min(PIECE, end * size - at)]
                self.read_into(at, part)
                for begin in range(0, len(part), size):
                    content = part[begin : begin + size]
                    done += size
                    zero = all(kind is None for _, _, kind in kinds(content))
                    yield Piece(at + begin, None if zero else content, done)

    def touched_grains(self, size: int) -> int:
        """Return how many grains of *size* bytes the fork has a part of."""
        return sum(end - first for first, end in touched(self._fork.extents(), size))


def joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield *ranges*, which are in order of their beginnings, as ranges that do not touch."""
    begin = end = 0
    for first, last in ranges:
        if first > end:
            if end > begin:
                yield begin, end
            begin = first
        end = max(end, last)
    if end > begin:
        yield begin, end


def touched(extents: Iterable[Extent], size: int) -> Iterator[tuple[int, int]]:
    """Yield which grains of *size* bytes *extents* have a part of: (first, end), none touches."""
    return joined((each.offset // size, -(-(each.offset + each.size) // size)) for each in extents)
