"""A hosted sparse extent: sectors found through grain directory and grain tables.

Source: VMware "Virtual Disk Format 5.0", section "Hosted Sparse Extents". Nothing is read at open:
pages of the directory and tables come when they are asked for, so a disk of 62 TiB costs no more
than a small one.

A grain of which only a part lies on the disk (the last, of an odd capacity) may be cut short in the
file after that part. Any other sector that the file does not have is an error, for its reader only.
"""

import os
import re
from array import array
from collections.abc import Iterator
from itertools import repeat

from vddkfs.engines.vmdk.extents import (
    ABSENT,
    AT_ABSENT,
    AT_ZERO,
    DATA,
    UNSURE,
    FileRegions,
    Piece,
    WouldWait,
    read_exactly,
)
from vddkfs.engines.vmdk.files import OpenFile
from vddkfs.engines.vmdk.sparse import ENTRIES_PER_TABLE, ZERO_ENTRY, SparseHeader
from vddkfs.engines.vmdk.tables import EMPTY_TABLE, TableCache, to_entries
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import EngineError

_INDEX_MASK = ENTRIES_PER_TABLE - 1
_TABLE_BYTES = ENTRIES_PER_TABLE * 4
_PAGE_ENTRIES = 4096
_PAGE_KEYS = 1 << 32
_KIND_OF_BOOL = bytes((ABSENT, DATA)) + bytes(254)
_RUNS = re.compile(rb"\x00+|\x01+|\x02+")


class SparseExtent:
    """See ``Extent``. *start* and *sectors* are what the descriptor says it covers of the link."""

    __slots__ = (
        "_cache",
        "_directory_bytes",
        "_grain",
        "_grain_mask",
        "_grain_shift",
        "_grains",
        "_keys",
        "_link",
        "_lowest",
        "_smallest",
        "_table_sectors",
        "_table_shift",
        "_tables",
        "_zero_grains",
        "end",
        "fd",
        "path",
        "start",
    )

    def __init__(
        self,
        file: OpenFile,
        header: SparseHeader,
        start: int,
        sectors: int,
        link: str,
        cache: TableCache,
    ) -> None:
        self.start = start
        self.end = start + sectors
        self.fd = file.fd
        self.path = file.path
        self._link = link
        self._cache = cache
        self._keys = cache.new_keys()
        self._grain = header.grain
        self._grain_mask = header.grain - 1
        self._grain_shift = header.grain.bit_length() - 1
        self._table_shift = self._grain_shift + 9
        self._table_sectors = header.grain * ENTRIES_PER_TABLE
        self._grains = header.grains
        self._tables = header.tables
        self._directory_bytes = header.directory * 512
        self._zero_grains = header.zero_grains
        self._lowest = header.lowest
        # The smallest entry that is a place: one comparison then serves the hot path.
        self._smallest = max(header.lowest, ZERO_ENTRY + 1 if header.zero_grains else 1)

    def locate(self, sector: int, count: int, fresh: bool, flags: int) -> int:
        """See ``Extent``."""
        relative = sector - self.start
        within = relative & self._grain_mask
        if within + count > self._grain or sector + count > self.end:
            return UNSURE
        index = (relative >> self._grain_shift) & _INDEX_MASK
        if fresh:
            entry = self._fresh_entry(relative >> self._table_shift, index, flags)
        else:
            table = self._cache.get(self._keys + (relative >> self._table_shift))
            if table is None:
                return UNSURE
            entry = table[index]
        if entry >= self._smallest:
            return (entry + within) << 9
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
            first = (relative >> self._grain_shift) & _INDEX_MASK
            last = first + ((relative & self._grain_mask) + stop - sector - 1 >> self._grain_shift)
            entries = self._entries(number, first, last + 1, fresh, flags)
            self._append(found, sector, stop, entries)
            sector = stop
        return found

    def forget(self) -> None:
        """See ``Extent``."""
        self._keys = self._cache.new_keys()

    def areas(self, sector: int, count: int) -> Iterator[tuple[int, int]]:
        """See ``Extent``. Reads past the cache, which a long scan would only flush."""
        regions = FileRegions(self.fd)
        end = sector + count
        while sector < end:
            number = (sector - self.start) >> self._table_shift
            last = (end - 1 - self.start) >> self._table_shift
            page = self._page(number, min(last + 1, number + _PAGE_ENTRIES))
            stop = min(end, self.start + (number + max(len(page), 1)) * self._table_sectors)
            if not len(page):
                yield DATA, stop - sector
            elif self._without_grains(page, regions):
                yield ABSENT, stop - sector
            else:
                yield from self._page_areas(page, number, sector, stop, regions)
            sector = stop

    def _append(self, found: list[Piece], sector: int, stop: int, entries: "array[int]") -> None:
        """Add to *found* the pieces of [*sector*, *stop*), whose grains *entries* describe."""
        for entry, kind in zip(entries, self._kinds(entries), strict=True):
            within = (sector - self.start) & self._grain_mask
            until = min(stop, sector - within + self._grain)
            offset = -1
            if kind == DATA:
                if entry < self._lowest:
                    raise self._damage(sector, f"its grain is said to be at sector {entry}")
                offset = (entry + within) << 9
            if found:
                last = found[-1]
                follows = kind != DATA or last.offset + (last.count << 9) == offset
                if last.kind == kind and follows:
                    sector = last.sector
                    offset = last.offset
                    found.pop()
            found.append(Piece(kind, sector, until - sector, self.fd, offset))
            sector = until

    def _kinds(self, entries: "array[int]") -> bytes:
        """Say of each grain table entry, a byte each, whether it is ABSENT, ZERO or DATA."""
        if self._zero_grains:
            return bytes(map(min, entries, repeat(DATA)))
        return bytes(map(bool, entries)).translate(_KIND_OF_BOOL)

    def _fresh_entry(self, number: int, index: int, flags: int) -> int:
        """Return one entry of table *number* as it is in the file now, -1 for damage."""
        raw = bytearray(4)
        if os.preadv(self.fd, (raw,), self._directory_bytes + number * 4, flags) != 4:
            return -1
        table = int.from_bytes(raw, "little")
        if table < self._lowest:
            return -1 if table else 0
        if os.preadv(self.fd, (raw,), table * 512 + index * 4, flags) != 4:
            return -1
        return int.from_bytes(raw, "little")

    def _entries(self, number: int, first: int, stop: int, fresh: bool, flags: int) -> "array[int]":
        """Return the entries *first* to *stop* (exclusive) of grain table *number*."""
        if not fresh:
            table = self._cache.get(self._keys + number)
            if table is None:
                if flags:
                    raise WouldWait
                table = self._load(number)
            return table[first:stop]
        place = self._read_entries(self._directory_bytes + number * 4, 1, number, flags)[0]
        if place == 0:
            return EMPTY_TABLE[first:stop]
        self._check_place(place, number)
        return self._read_entries(place * 512 + first * 4, stop - first, number, flags)

    def _load(self, number: int) -> "array[int]":
        """Read grain table *number*, and the directory page that names it, into the cache."""
        first = number - number % _PAGE_ENTRIES
        page = self._cache.get(self._keys + _PAGE_KEYS + first)
        if page is None:
            size = min(_PAGE_ENTRIES, self._tables - first)
            page = self._read_entries(self._directory_bytes + first * 4, size, number)
            self._cache.put(self._keys + _PAGE_KEYS + first, page)
        table = EMPTY_TABLE
        place = page[number - first]
        if place:
            self._check_place(place, number)
            table = self._read_entries(place * 512, self._table_length(number), number)
            if not any(table):
                table = EMPTY_TABLE
        self._cache.put(self._keys + number, table)
        return table

    def _table_length(self, number: int) -> int:
        """Entries of table *number* that describe grains of the disk: the last has fewer."""
        return min(ENTRIES_PER_TABLE, self._grains - number * ENTRIES_PER_TABLE)

    def _read_entries(self, offset: int, entries: int, number: int, flags: int = 0) -> "array[int]":
        raw = bytearray(entries * 4)
        try:
            read_exactly(
                self.fd,
                memoryview(raw),
                offset,
                path=self.path,
                link=self._link,
                sector=0,
                flags=flags,
            )
        except EngineError as error:
            sector = self.start + number * self._table_sectors
            reason = error.__cause__
            why = f": {reason.strerror}" if isinstance(reason, OSError) else ""
            raise self._damage(
                sector, f"its grain table cannot be read from byte {offset}{why}"
            ) from error
        return to_entries(raw)

    def _check_place(self, place: int, number: int) -> None:
        if place < self._lowest:
            sector = self.start + number * self._table_sectors
            raise self._damage(sector, f"its grain table is said to be at sector {place}")

    def _damage(self, sector: int, what: str) -> EngineError:
        size = os.fstat(self.fd).st_size
        return EngineError(
            f"{printable(self.path)}: sector {sector} of the image is lost: {what} "
            f"(the file has {size} bytes, and data from sector {self._lowest} on)",
            link=self._link,
            sector=sector,
        )

    def _page(self, number: int, stop: int) -> "array[int]":
        """Return the directory's entries from *number* to *stop*; none if they cannot be read."""
        try:
            return self._read_entries(self._directory_bytes + number * 4, stop - number, number)
        except EngineError:
            return to_entries(b"")

    def _without_grains(self, page: "array[int]", regions: FileRegions) -> bool:
        """Say whether all tables of *page* are missing, or all are in one hole of the file.

        Tables that were allocated at once and never used are such a hole, and reading two million
        of them would take seconds.
        """
        highest = max(page)
        if highest == 0:
            return True
        lowest = min(page)
        if lowest < self._lowest:
            return False
        data, until = regions.at(lowest * 512)
        return not data and highest * 512 + _TABLE_BYTES <= until

    def _page_areas(
        self, page: "array[int]", number: int, sector: int, stop: int, regions: FileRegions
    ) -> Iterator[tuple[int, int]]:
        for place in page:
            until = min(stop, self.start + (number + 1) * self._table_sectors)
            if place == 0:
                yield ABSENT, until - sector
            elif place < self._lowest:
                yield DATA, until - sector
            else:
                yield from self._table_areas(place * 512, number, sector, until, regions)
            sector = until
            number += 1

    def _table_areas(
        self, table_bytes: int, number: int, sector: int, stop: int, regions: FileRegions
    ) -> Iterator[tuple[int, int]]:
        data, until = regions.at(table_bytes)
        if not data and until >= table_bytes + _TABLE_BYTES:
            yield ABSENT, stop - sector
            return
        origin = self.start + number * self._table_sectors
        first = (sector - origin) >> self._grain_shift
        last = (stop - 1 - origin) >> self._grain_shift
        try:
            entries = self._read_entries(table_bytes + first * 4, last + 1 - first, number)
        except EngineError:
            yield DATA, stop - sector
            return
        kinds = self._kinds(entries)
        for run in _RUNS.finditer(kinds):
            until = min(stop, origin + (first + run.end()) * self._grain)
            yield kinds[run.start()], until - sector
            sector = until
