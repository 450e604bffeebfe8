"""Extents made of grains: each sector is found through a grain directory and a grain table.

``SparseExtent`` reads hosted sparse (KDMV) and vmfsSparse (COWD) extents, whose entries are 32-bit
sectors; ``SeSparseExtent`` and ``packed.PackedExtent`` are the same but for what an entry means.

A grain of which only a part lies on the disk (the last, of an odd capacity) may be cut short in the
file after that part. Any other sector that the file does not have is an error, for its reader only.
"""

import re
from array import array
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from operator import ne, rshift, sub

from vddkfs.engines.vmdk.directory import PAGE_ENTRIES, Directory
from vddkfs.engines.vmdk.extents import (
    ABSENT,
    AT_ABSENT,
    AT_ZERO,
    DATA,
    UNSURE,
    ZERO,
    FileRegions,
    Piece,
    PlainExtent,
)
from vddkfs.engines.vmdk.files import NO_LIMIT, OpenFile
from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.sesparse import ALLOCATED, MAX_PLACE, UNALLOCATED, UNMAPPED, ZEROED
from vddkfs.engines.vmdk.sparse import ZERO_ENTRY
from vddkfs.engines.vmdk.tables import TableCache
from vddkfs.errors import EngineError

_KIND_OF_BOOL = bytes((ABSENT, DATA)) + bytes(254)
_WIDE_KINDS = (ABSENT, ZERO, ZERO, *[DATA] * 13)
_RUNS = re.compile(rb"\x00+|\x01+|\x02+")


class SparseExtent(PlainExtent):
    """See ``Extent``. *start* and *sectors* are what the descriptor says it covers of the link."""

    __slots__ = (
        "_base",
        "_bounded",
        "_directory",
        "_grain_mask",
        "_grain_shift",
        "_index_mask",
        "_lowest",
        "_smallest",
        "_table_sectors",
        "_table_shift",
        "_zero_grains",
        "end",
        "fd",
        "grain",
        "limit",
        "path",
        "start",
    )

    def __init__(
        self,
        file: OpenFile,
        layout: Layout,
        start: int,
        sectors: int,
        link: str,
        cache: TableCache,
        tell: Callable[[str], None],
    ) -> None:
        self.start = start
        self.end = start + sectors
        self.fd = file.fd
        self.limit = file.limit
        self.path = file.path
        self._base = file.base // 512
        self._bounded = file.limit != NO_LIMIT
        self._directory = Directory(file, layout, start, link, cache, tell)
        self.grain = layout.grain
        self._grain_mask = layout.grain - 1
        self._grain_shift = layout.grain.bit_length() - 1
        self._index_mask = layout.entries - 1
        self._table_sectors = layout.grain * layout.entries
        self._table_shift = self._table_sectors.bit_length() - 1
        self._zero_grains = layout.zero_grains
        self._lowest = layout.lowest
        # The smallest entry that is a place: one comparison then serves the hot path.
        self._smallest = max(layout.lowest, ZERO_ENTRY + 1 if layout.zero_grains else 1)

    def locate(self, sector: int, count: int, fresh: bool, flags: int) -> int:
        """See ``Extent``."""
        relative = sector - self.start
        within = relative & self._grain_mask
        if within + count > self.grain or sector + count > self.end:
            return UNSURE
        index = (relative >> self._grain_shift) & self._index_mask
        if fresh:
            if self._bounded:
                return UNSURE
            entry = self._directory.entry_now(relative >> self._table_shift, index, flags)
        else:
            table = self._directory.cached(relative >> self._table_shift)
            if table is None:
                return UNSURE
            entry = table[index]
        if entry >= self._smallest:
            return UNSURE if self._bounded else (entry + within) << 9
        if entry == 0:
            return AT_ABSENT
        return AT_ZERO if entry == ZERO_ENTRY and self._zero_grains else UNSURE

    def pieces(self, sector: int, count: int, fresh: bool, flags: int) -> list[Piece]:
        """See ``Extent``."""
        found: list[Piece] = []
        end = sector + count
        while sector < end:
            relative = sector - self.start
            number = relative >> self._table_shift
            stop = min(end, self.start + (number + 1) * self._table_sectors)
            first = (relative >> self._grain_shift) & self._index_mask
            last = first + ((relative & self._grain_mask) + stop - sector - 1 >> self._grain_shift)
            entries = self._directory.entries(number, first, last + 1, fresh, flags)
            self._append_all(found, sector, stop, entries)
            sector = stop
        return found

    def forget(self) -> None:
        """See ``Extent``."""
        self._directory.forget()

    def forget_table(self, number: int) -> None:
        """Forget what was read of grain table *number*, which has been changed."""
        self._directory.forget_table(number)

    def areas(self, sector: int, count: int) -> Iterator[tuple[int, int]]:
        """See ``Extent``. Reads past the cache, which a long scan would only flush."""
        regions = FileRegions(self.fd)
        end = sector + count
        while sector < end:
            number = (sector - self.start) >> self._table_shift
            last = (end - 1 - self.start) >> self._table_shift
            places = self._directory.places(number, min(last + 1, number + PAGE_ENTRIES))
            stop = min(end, self.start + (number + max(len(places), 1)) * self._table_sectors)
            if not len(places):
                yield DATA, stop - sector
            elif self._without_grains(places, regions):
                yield ABSENT, stop - sector
            else:
                yield from self._page_areas(places, number, sector, stop, regions)
            sector = stop

    def _append_all(
        self, found: list[Piece], sector: int, stop: int, entries: "array[int]"
    ) -> None:
        """Add to *found* the pieces of [*sector*, *stop*), whose grains *entries* describe."""
        origin = sector - ((sector - self.start) & self._grain_mask)
        kinds = self._kinds(entries)
        for run in _RUNS.finditer(kinds):
            first, end = run.span()
            begin = max(sector, origin + first * self.grain)
            until = min(stop, origin + end * self.grain)
            kind = kinds[first]
            if kind == DATA:
                within = begin - origin - first * self.grain
                self._append_data(found, begin, until, within, entries[first:end])
            else:
                _append(found, Piece(kind, begin, until - begin, self.fd))

    def _append_data(
        self, found: list[Piece], sector: int, stop: int, within: int, entries: "array[int]"
    ) -> None:
        """Add the pieces of [*sector*, *stop*), all DATA, *within* sectors into the first grain."""
        places = self._places(sector, entries)
        # Where the next grain in the image is not the next one in the file.
        follows = map(sub, islice(places, 1, None), places)
        breaks = bytes(map(ne, follows, repeat(self.grain)))
        first = 0
        while True:
            end = breaks.find(1, first) + 1 or len(places)
            until = min(stop, sector - within + (end - first) * self.grain)
            offset = (places[first] + within + self._base) << 9
            _append(found, Piece(DATA, sector, until - sector, self.fd, offset))
            if end == len(places):
                return
            sector, within, first = until, 0, end

    def _kinds(self, entries: "array[int]") -> bytes:
        """Say of each grain table entry, a byte each, whether it is ABSENT, ZERO or DATA."""
        if self._zero_grains:
            return bytes(map(min, entries, repeat(DATA)))
        return bytes(map(bool, entries)).translate(_KIND_OF_BOOL)

    def _places(self, sector: int, entries: "array[int]") -> "array[int]":
        """Return the sectors of the file that DATA *entries* name, for grains from *sector* on."""
        if min(entries) < self._lowest:
            entry = next(entry for entry in entries if entry < self._lowest)
            raise self._bad_entry(sector, entries, entry, entry)
        return entries

    def _bad_entry(self, sector: int, entries: "array[int]", entry: int, place: int) -> EngineError:
        """Return the error for *entry* of *entries*, the first of which is of *sector*'s grain."""
        grain = (sector - self.start >> self._grain_shift) + entries.index(entry)
        begin = max(sector, self.start + (grain << self._grain_shift))
        return self._directory.damage(begin, f"its grain is said to be at sector {place}")

    def _without_grains(self, places: "array[int]", regions: FileRegions) -> bool:
        """Say whether all of the tables at *places* are missing, or all in one hole of the file.

        Tables that were allocated at once and never used are such a hole, and reading two million
        of them would take seconds.
        """
        lowest, highest = min(places), max(places)
        if lowest <= 0:
            return lowest == highest == 0
        if self.limit != NO_LIMIT:
            # The holes of an archive may be those of another file in it.
            return False
        data, until = regions.at(lowest)
        return not data and highest + self._directory.table_bytes() <= until

    def _page_areas(
        self,
        places: "array[int]",
        number: int,
        sector: int,
        stop: int,
        regions: FileRegions,
    ) -> Iterator[tuple[int, int]]:
        for place in places:
            until = min(stop, self.start + (number + 1) * self._table_sectors)
            if place <= 0:
                yield DATA if place else ABSENT, until - sector
            else:
                yield from self._table_areas(place, number, sector, until, regions)
            sector = until
            number += 1

    def _table_areas(
        self, place: int, number: int, sector: int, stop: int, regions: FileRegions
    ) -> Iterator[tuple[int, int]]:
        if self.limit == NO_LIMIT:
            data, until = regions.at(place)
            if not data and until >= place + self._directory.table_bytes():
                yield ABSENT, stop - sector
                return
        origin = self.start + number * self._table_sectors
        first = (sector - origin) >> self._grain_shift
        last = (stop - 1 - origin) >> self._grain_shift
        try:
            entries = self._directory.table_at(place, number, first, last + 1)
        except EngineError:
            yield DATA, stop - sector
            return
        kinds = self._kinds(entries)
        for run in _RUNS.finditer(kinds):
            until = min(stop, origin + (first + run.end()) * self.grain)
            yield kinds[run.start()], until - sector
            sector = until


class SeSparseExtent(SparseExtent):
    """An seSparse extent: 64-bit entries, which say what kind they are."""

    __slots__ = ()

    def locate(self, sector: int, count: int, fresh: bool, flags: int) -> int:
        """See ``Extent``."""
        relative = sector - self.start
        within = relative & self._grain_mask
        if fresh or within + count > self.grain or sector + count > self.end:
            return UNSURE
        table = self._directory.cached(relative >> self._table_shift)
        if table is None:
            return UNSURE
        entry = table[(relative >> self._grain_shift) & self._index_mask]
        kind = entry >> 60
        if kind == ALLOCATED:
            place = self._place(entry)
            return UNSURE if self._bounded or place > MAX_PLACE else (place + within) << 9
        if kind in (UNMAPPED, ZEROED):
            return AT_ZERO
        return UNSURE if entry else AT_ABSENT

    def _place(self, entry: int) -> int:
        """Return the sector of the file that an allocated *entry* names."""
        grain = (entry >> 48 & 0xFFF) | (entry & 0xFFFF_FFFF_FFFF) << 12
        return self._lowest + (grain << self._grain_shift)

    def _kinds(self, entries: "array[int]") -> bytes:
        """See ``SparseExtent``. What no entry may be counts as DATA: its reader meets the error."""
        found = bytes(map(_WIDE_KINDS.__getitem__, map(rshift, entries, repeat(60))))
        if found.count(ABSENT) != entries.count(0):
            # Only 0 is absent; the rest of that kind is nothing that may be.
            return bytes(map(_kind_of_wide, entries))
        return found

    def _places(self, sector: int, entries: "array[int]") -> "array[int]":
        """See ``SparseExtent``."""
        found = array("Q")
        for entry in entries:
            place = self._place(entry)
            if entry >> 60 != ALLOCATED or place > MAX_PLACE:
                raise self._bad_entry(sector, entries, entry, place)
            found.append(place)
        return found


def _kind_of_wide(entry: int) -> int:
    kind = entry >> 60
    if kind == UNALLOCATED:
        return DATA if entry else ABSENT
    return ZERO if kind in (UNMAPPED, ZEROED) else DATA


def _append(found: list[Piece], piece: Piece) -> None:
    """Add *piece* to *found*, as one with the last if it goes on there."""
    if found:
        last = found[-1]
        follows = piece.kind != DATA or last.offset + (last.count << 9) == piece.offset
        if last.kind == piece.kind and follows:
            found[-1] = Piece(
                last.kind, last.sector, last.count + piece.count, last.fd, last.offset
            )
            return
    found.append(piece)
