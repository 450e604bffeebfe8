"""The allocation map of one image: which sectors hold data, and which are known to read as zeros.

Units: sectors of 512 bytes, as in ``vddkfs.engines.base``, except in ``qemu_map``.

A map may say data where there are zeros, never the other way round. What is not yet known is data.
"""

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, compress
from operator import sub
from typing import Protocol

from vddkfs.engines.base import SECTOR, MapExtent

DEFAULT_MAX_RUNS = 262_144
"""Data runs kept in full detail: at 16 bytes each, 4 MiB for a map."""


class ExtentMap:
    """The map of an image of *capacity* sectors, built in order with ``append``.

    At most *max_runs* (at least 1) data runs are kept. When one more comes, the shortest holes
    become data: all that are shorter than a threshold, which at least doubles each time and holds
    for what is appended later too. ``allocated`` stays exact all the while.

    Queries take O(log runs); appending takes O(1), apart from coarsening, which takes O(runs) and
    happens at most once for each bit of the capacity.
    """

    def __init__(self, capacity: int, max_runs: int = DEFAULT_MAX_RUNS) -> None:
        if capacity < 0 or max_runs < 1:
            raise ValueError(f"a map of {capacity} sectors in {max_runs} runs")
        self._capacity = capacity
        self._max_runs = max_runs
        self._known = 0
        self._allocated = 0
        self._zeros = 0
        self._shortest_hole = 1
        # Where data starts (even index) and ends (odd index), strictly ascending. What is not yet
        # known is a data run like any other, so that no query has to treat it specially.
        self._edges = array("Q", [0, capacity] if capacity else [])

    @property
    def capacity(self) -> int:
        """The size of the image in sectors."""
        return self._capacity

    @property
    def known(self) -> int:
        """How many sectors from the start have been appended."""
        return self._known

    @property
    def complete(self) -> bool:
        """Whether the map covers the whole image."""
        return self._known == self._capacity

    @property
    def allocated(self) -> int:
        """How many sectors were appended as data: exact, whatever has been coarsened."""
        return self._allocated

    @property
    def data_sectors(self) -> int:
        """How many known sectors the map shows as data: at least ``allocated``."""
        return self._known - self._zeros

    def append(self, sector: int, count: int, data: bool) -> None:
        """Add the next *count* sectors from *sector*, which must be ``known``; 0 adds nothing."""
        end = sector + count
        if sector != self._known or count < 0 or end > self._capacity:
            raise ValueError(
                f"{count} sectors from {sector} do not continue a map of {self._capacity} "
                f"that is known up to {self._known}"
            )
        if not count:
            return
        if data:
            self._append_data(count)
        else:
            self._append_hole(end)
        self._known = end

    def extend(self, extents: Iterable[MapExtent]) -> None:
        """Append the extents of a slice, in their order."""
        for extent in extents:
            self.append(extent.sector, extent.count, extent.data)

    def _append_data(self, count: int) -> None:
        """Turn the head of the unknown run, which is data already, into known data."""
        self._allocated += count
        edges = self._edges
        begins_run = edges[-2] == self._known
        if not begins_run:
            return
        if len(edges) > 2 and edges[-2] - edges[-3] < self._shortest_hole:
            self._zeros -= edges[-2] - edges[-3]
            del edges[-3:-1]
        elif len(edges) > 2 * self._max_runs:
            self._coarsen()

    def _append_hole(self, end: int) -> None:
        """Cut the hole from ``known`` to *end* off the head of the unknown run."""
        self._zeros += end - self._known
        edges = self._edges
        if edges[-2] == self._known:
            edges[-2] = end
        else:
            edges[-1] = self._known
            edges.extend((end, self._capacity))
        if end == self._capacity:
            del edges[-2:]

    def _coarsen(self) -> None:
        """Fill the holes between runs that are shorter than the least threshold that helps."""
        starts, ends = self._edges[0::2], self._edges[1::2]
        holes = array("Q", map(sub, starts[1:], ends))
        # Thresholds are powers of two: bit lengths decide, and one count serves all of them.
        widths = Counter(map(int.bit_length, holes))
        threshold = 2 * self._shortest_hole
        while sum(n for w, n in widths.items() if w >= threshold.bit_length()) >= self._max_runs:
            threshold *= 2
        self._shortest_hole = threshold
        kept = [hole >= threshold for hole in holes]
        self._zeros -= sum(hole for hole in holes if hole < threshold)
        coarse = array("Q", bytes(2 * self._edges.itemsize * (sum(kept) + 1)))
        coarse[0::2] = array("Q", chain(starts[:1], compress(starts[1:], kept)))
        coarse[1::2] = array("Q", chain(compress(ends, kept), ends[-1:]))
        self._edges = coarse

    def is_hole(self, start: int, end: int) -> bool:
        """Say whether all of [*start*, *end*), inside the image, is known to read as zeros.

        An empty range is.
        """
        edges = self._edges
        index = bisect_right(edges, start)
        if index % 2:
            return start >= end
        return end <= (edges[index] if index < len(edges) else self._capacity)

    def seek_data(self, sector: int) -> int | None:
        """Return the first sector of data at or after *sector*, or None past the last data."""
        edges = self._edges
        index = bisect_right(edges, sector)
        if index % 2:
            return sector
        return edges[index] if index < len(edges) else None

    def seek_hole(self, sector: int) -> int:
        """Return the first sector of a hole at or after *sector*, which lies inside the image.

        The end of the image is the start of a hole, as in lseek(2).
        """
        index = bisect_right(self._edges, sector)
        return self._edges[index] if index % 2 else sector

    def runs(self, start: int, end: int) -> Iterator[MapExtent]:
        """Yield [*start*, *end*), cut to the image, as data and holes in turn.

        The map must not be appended to meanwhile.
        """
        edges = self._edges
        end = min(end, self._capacity)
        index = bisect_right(edges, start)
        while start < end:
            stop = min(end, edges[index]) if index < len(edges) else end
            yield MapExtent(start, stop - start, index % 2 == 1)
            start = stop
            index += 1


class Changed(Protocol):
    """*size* bytes from *offset*, whole sectors but for the image's end; *zero*: only zeros."""

    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def zero(self) -> bool: ...


def overlaid(source: ExtentMap, changed: Iterable[Changed]) -> ExtentMap:
    """Return the map of *source* with *changed*, in their order, over it."""
    union = ExtentMap(source.capacity)

    def below(until: int) -> None:
        union.extend(list(source.runs(union.known, until)))

    for extent in changed:
        first = extent.offset // SECTOR
        if first > union.known:
            below(first)
        end = -(-(extent.offset + extent.size) // SECTOR)
        union.append(union.known, end - union.known, not extent.zero)
    below(source.capacity)
    return union


def qemu_map(allocation: ExtentMap, *, depth: int = 0) -> list[dict[str, int | bool]]:
    """Return the map in bytes, as ``qemu-img map --output=json`` (7.2) has it for a raw file.

    *depth* is 0 for the image itself, as in qemu. An image without any sector has one entry too,
    with "present" false and no "offset": qemu-img prints that.
    """
    if not allocation.capacity:
        empty = {"present": False, "zero": False, "data": False}
        return [{"start": 0, "length": 0, "depth": depth, **empty}]
    return [
        {
            "start": run.sector * SECTOR,
            "length": run.count * SECTOR,
            "depth": depth,
            "present": True,
            "zero": not run.data,
            "data": run.data,
            "offset": run.sector * SECTOR,
        }
        for run in allocation.runs(0, allocation.capacity)
    ]
