"""Where the grains of a hosted sparse extent are in its file, read anew for every request to write.

For writers only: what a reader meets as an error costs it a range, a writer would destroy something
with it. So places are checked against all that is known to lie elsewhere, and before anything is
appended, that the file still has everything its tables refer to.
"""

import errno
import os
from array import array
from collections.abc import Iterator
from itertools import groupby

import msgspec

from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.sparse import ENTRIES_PER_TABLE, ZERO_ENTRY
from vddkfs.engines.vmdk.tables import to_entries
from vddkfs.engines.vmdk.text import printable
from vddkfs.engines.vmdk.write.writable import WritableFile
from vddkfs.errors import EngineError

TABLE_SECTORS = ENTRIES_PER_TABLE * 4 // 512
_PAGE_ENTRIES = 4096
_SCAN_TABLES = 512
_CHECK_ADVICE = "`vddkfs check` tells what is damaged; restore the disk from a good copy"


class Part(msgspec.Struct):
    """What a request has for one *grain*: bytes *begin* to *end* of its data, for the grain's
    sectors from *within* on. *entry* is what the grain table says, *place* the grain's sector in
    the file, 0 if it has none."""

    grain: int
    within: int
    begin: int
    end: int
    entry: int = 0
    place: int = 0


class Tables(msgspec.Struct):
    """The sectors of grain table *number* and of its redundant copy, 0 for a missing one, and the
    *parts* of a request that they describe."""

    number: int
    primary: int
    spare: int
    parts: list[Part]


class Places:
    """The places of one extent of *sectors* sectors, which begins at sector *start* of the image.

    *reserved* are the ranges of sectors of *file*, (first, end), where no grain can be. Methods
    raise EngineError, which names the sector of the image, for what cannot be read or is damaged.
    """

    def __init__(
        self,
        file: WritableFile,
        layout: Layout,
        start: int,
        sectors: int,
        reserved: tuple[tuple[int, int], ...],
    ) -> None:
        self._file = file
        self._layout = layout
        self._grain = layout.grain
        self._start = start
        self._sectors = sectors
        self._reserved = reserved
        self._empty = ZERO_ENTRY if layout.zero_grains else 0

    def sector(self, grain: int) -> int:
        """Return the first sector of *grain* in the image."""
        return self._start + grain * self._grain

    def split(self, relative: int, size: int) -> Iterator[Part]:
        """Yield the parts of a request of *size* bytes from sector *relative* of the extent."""
        begin = 0
        while begin < size:
            grain, within = divmod(relative + begin // 512, self._grain)
            end = min(size, begin + (self._grain - within) * 512)
            yield Part(grain, within, begin, end)
            begin = end

    def find(self, parts: list[Part]) -> list[Tables]:
        """Set entry and place of each of *parts* as the file has them now; return their tables.

        Readers turn to the redundant tables where the primary ones cannot be right, so what both
        say of a grain has to be the same. But the redundant entry of a grain that is there may be
        missing: a power loss leaves that.
        """
        size = self._file.size()
        found = []
        for number, group in groupby(parts, lambda part: part.grain // ENTRIES_PER_TABLE):
            tables = Tables(number, self._table(self._layout.directory, number, size), 0, [*group])
            first = tables.parts[0].grain
            count = tables.parts[-1].grain - first + 1
            entries = copies = self._entries(tables.primary, first, count)
            if self._layout.spare_directory:
                tables.spare = self._table(self._layout.spare_directory, number, size)
                copies = self._entries(tables.spare, first, count)
            for part in tables.parts:
                part.entry, copy = entries[part.grain - first], copies[part.grain - first]
                part.place = self._place(part, size)
                if copy != part.entry:
                    self._check_copy(part, copy, tables, size)
            found.append(tables)
        return found

    def _place(self, part: Part, size: int) -> int:
        if part.entry <= self._empty:
            return 0
        # Only what lies on the disk of its last grain has to be in the file.
        count = min(self._grain, self._sectors - part.grain * self._grain)
        if not self._is_inside(part.entry, count, size):
            raise self.damage(part.grain, f"it is said to be at sector {part.entry}")
        return part.entry

    def _check_copy(self, part: Part, copy: int, tables: Tables, size: int) -> None:
        """Check that *copy*, the redundant entry, only lags behind, and that nobody reads it."""
        if part.place and copy <= self._empty:
            first = tables.number * ENTRIES_PER_TABLE
            count = min(ENTRIES_PER_TABLE, self._layout.grains - first)
            entries = self._entries(tables.primary, first, count)
            if max(entries) * 512 < size and not any(
                self._empty < entry < self._layout.lowest for entry in entries
            ):
                return
        raise self.damage(part.grain, "its table and the redundant one differ")

    def _table(self, directory: int, number: int, size: int) -> int:
        """Return the sector of table *number* in *directory*, 0 if there is none."""
        first = number * ENTRIES_PER_TABLE
        raw = self._file.read(4, directory * 512 + number * 4, self.sector(first))
        table = int.from_bytes(raw, "little")
        length = min(ENTRIES_PER_TABLE, self._layout.grains - first)
        if table and not self._is_inside(table, -(-length * 4 // 512), size):
            raise self.damage(first, f"its table is said to be at sector {table}")
        return table

    def _entries(self, table: int, first: int, count: int) -> "array[int]":
        """Return the entries of *count* grains from *first* on, of the table at sector *table*."""
        if not table:
            return to_entries(bytes(count * 4))
        offset = table * 512 + first % ENTRIES_PER_TABLE * 4
        return to_entries(self._file.read(count * 4, offset, self.sector(first)))

    def _is_inside(self, place: int, count: int, size: int) -> bool:
        return (
            place >= self._layout.lowest
            and (place + count) * 512 <= size
            and all(place + count <= first or place >= end for first, end in self._reserved)
        )

    def check_references(self, size: int) -> None:
        """Check that the file has all that its tables refer to.

        What was cut off could otherwise come back with the content of new grains, or as zeros.
        """
        directory = self._layout.directory
        for first in range(0, self._layout.tables, _PAGE_ENTRIES):
            count = min(_PAGE_ENTRIES, self._layout.tables - first)
            raw = self._file.read(count * 4, directory * 512 + first * 4, self._start)
            for number, table, tables in _table_runs(to_entries(raw), first):
                self._check_tables(number, table, tables, size)

    def _check_tables(self, number: int, table: int, tables: int, size: int) -> None:
        """Check *tables* tables, which lie one behind the other from sector *table* on."""
        grains = min(tables * ENTRIES_PER_TABLE, self._layout.grains - number * ENTRIES_PER_TABLE)
        if not self._is_inside(table, -(-grains * 4 // 512), size):
            raise self.damage(
                number * ENTRIES_PER_TABLE, f"its table is said to be at sector {table}"
            )
        if self._is_hole(table * 512, table * 512 + grains * 4):
            return
        entries = to_entries(self._file.read(grains * 4, table * 512, self._start))
        first = number * ENTRIES_PER_TABLE
        if first + grains == self._layout.grains:
            last = entries.pop()
            on_disk = max(0, self._sectors - (self._layout.grains - 1) * self._grain)
            if last > self._empty and (last + min(on_disk, self._grain)) * 512 > size:
                raise self._cut_off(self._layout.grains - 1, last)
        highest = max(entries, default=0)
        if highest > self._empty and (highest + self._grain) * 512 > size:
            raise self._cut_off(first + entries.index(highest), highest)

    def _is_hole(self, begin: int, end: int) -> bool:
        """Say whether the file has no data there, as far as its file system tells."""
        try:
            return os.lseek(self._file.fd, begin, os.SEEK_DATA) >= end
        except OSError as error:
            return error.errno == errno.ENXIO

    def _cut_off(self, grain: int, place: int) -> EngineError:
        return self.damage(grain, f"it is said to be at sector {place}, so nothing can be appended")

    def damage(self, grain: int, what: str) -> EngineError:
        """Return the error that nothing was written because *grain* is damaged: *what* tells."""
        sector = self.sector(grain)
        return EngineError(
            f"{printable(self._file.path)}: nothing was written, because the grain of sector "
            f"{sector} is damaged: {what} (the file has {self._file.size()} bytes, and data from "
            f"sector {self._layout.lowest} on)",
            advice=_CHECK_ADVICE,
            link=self._file.link,
            sector=sector,
        )


def _table_runs(page: "array[int]", first: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, sector, tables) of the tables of a directory *page* that adjoin in the file.

    The page begins with table *first*. At most ``_SCAN_TABLES`` are merged.
    """
    number = at = length = 0
    for index, table in enumerate(page, first):
        if length and table == at + length * TABLE_SECTORS and length < _SCAN_TABLES:
            length += 1
            continue
        if length:
            yield number, at, length
        number, at, length = index, table, 1 if table else 0
    if length:
        yield number, at, length
