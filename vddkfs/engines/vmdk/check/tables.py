"""The grain directories and tables of one extent, walked for `vddkfs check`.

``TableWalk`` yields what they refer to as claims (see ``overlap``) and notes on its first way
what cannot be right. It reads by the same ``Layout`` as ``grains``, but on its own.
"""

from array import array
from collections.abc import Iterator, Sequence

from vddkfs.engines.vmdk.check.notes import Notes
from vddkfs.engines.vmdk.check.overlap import MAX_MARKS, Claim, Marks
from vddkfs.engines.vmdk.files import OpenFile
from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.sesparse import (
    ALLOCATED,
    TABLE_SECTORS,
    TABLE_TAG,
    UNALLOCATED,
    UNMAPPED,
    ZEROED,
)
from vddkfs.engines.vmdk.sparse import ZERO_ENTRY
from vddkfs.engines.vmdk.tables import to_entries

GRAIN, TABLE, SPARE_TABLE = "grain", "grain table", "redundant grain table"
"""The kinds of claims."""

_PAGE_ENTRIES = 4096
_TICK = 64
_NONE, _BAD = 0, -1
_LOW_32 = (1 << 32) - 1


class TableWalk:
    """The tables of *file*, laid out as *layout* says, an extent that begins at sector *start* of
    the link and covers *sectors* of it."""

    width = 4

    def __init__(
        self, file: OpenFile, layout: Layout, start: int, sectors: int, notes: Notes
    ) -> None:
        self.file = file
        self.layout = layout
        self.start = start
        self.sectors = sectors
        self.notes = notes
        self.file_sectors = -(-file.size // 512)
        self.tables_seen = 0
        self.noting = True
        self.marks: Marks | None = None
        self._table_sectors = layout.entries * self.width // 512

    def claims(self, *, tables: bool = True, grains: bool = True) -> Iterator[Claim | None]:
        """Yield what the directories and tables refer to, and None now and then.

        What ``marks`` has taken is left out on the first way.
        """
        for first in range(0, self.layout.tables, _PAGE_ENTRIES):
            count = min(_PAGE_ENTRIES, self.layout.tables - first)
            page = self._page(self.layout.directory, first, count, "")
            spare = None
            if self.layout.spare_directory:
                spare = self._page(self.layout.spare_directory, first, count, "redundant ")
            if any(page) or (spare is not None and any(spare)):
                for index in range(count):
                    mine = page[index] if page else 0
                    other = spare[index] if spare else None
                    if mine or other:
                        yield from self._table(first + index, mine, other, tables, grains)
                    self.tables_seen += 1
                    if index % _TICK == 0:
                        yield None
            else:
                self.tables_seen += count
            yield None
        self.noting = False

    def make_marks(self, begin: int) -> Marks | None:
        """Return marks, for the first way, of the grains from sector *begin* of the file on.

        None if they would take too much.
        """
        layout = self.layout
        if (self.file_sectors - begin) // layout.grain <= MAX_MARKS:
            smallest = ZERO_ENTRY + 1 if layout.zero_grains else 1
            self.marks = Marks(begin, self.file.size // 512, layout.grain, smallest)
        return self.marks

    def image_sectors(self, grain: int, count: int = 1) -> tuple[int, int]:
        """Return the first sector of the image, and their number, of *count* grains."""
        first = min(grain * self.layout.grain, self.sectors)
        stop = min((grain + count) * self.layout.grain, self.sectors)
        return self.start + first, stop - first

    def damage(self, code: str, what: str, grain: int, count: int = 1) -> None:
        """Note that *count* grains from *grain* on are damaged, the first time only."""
        if self.noting:
            self.notes.damage(code, what, *self.image_sectors(grain, count))

    def grain_claims(self, places: Sequence[int], first: int) -> Iterator[Claim | None]:
        """Yield what the grains from number *first* on take, which are at *places*.

        Neighbours in the image that are neighbours in the file are one claim.
        """
        step = self.layout.grain
        begin = number = count = 0
        expected = -1
        for index, place in enumerate(places, first):
            if place == expected:
                expected += step
                count += 1
                continue
            if count:
                yield from self._run(begin, number, count)
                count = 0
            if place == _NONE or not self.is_possible(place, index):
                expected = -1
                continue
            begin, number, count = place, index, 1
            expected = place + step
        if count:
            yield from self._run(begin, number, count)

    def claim(self, place: int, sectors: int, kind: str, number: int, size: int) -> Claim:
        """Return a claim of *sectors* sectors from *place* on, cut to the file."""
        return Claim(place, min(sectors, self.file_sectors - place), kind, number, size)

    def sector_of(self, kind: str, slot: int) -> int:
        """Return the sector of the file that a claim's *slot* is."""
        return slot

    def table_place(self, entry: int) -> int:
        """Return the sector of the table that a directory's *entry* names; 0 none, -1 nonsense."""
        return entry if entry == 0 or entry >= self.layout.lowest else _BAD

    def places(self, table: "array[int]", first: int) -> Sequence[int]:
        """Return the sectors that the entries of *table* name, 0 for none, -1 for nonsense."""
        return table

    def _run(self, place: int, number: int, count: int) -> Iterator[Claim]:
        """Yield the claim of *count* grains one behind the other, those that the file has."""
        step = self.layout.grain
        last = number + count - 1
        sectors = (count - 1) * step + max(self.image_sectors(last)[1], 1)
        if (place + sectors) * 512 > self.file.size:
            there = max(0, min(self.file.size // 512 - place, sectors) // step)
            there = min(there, count - 1)
            self.damage(
                "grain-outside",
                f"the grain at sector {place + there * step} is not inside the file "
                f"of {self.file.size} bytes",
                number + there,
                count - there,
            )
            count = there
        if count:
            yield self.claim(place, count * step, GRAIN, number, step)

    def is_possible(self, place: int, number: int) -> bool:
        """Say whether grain *number* can be at sector *place*; note if it cannot."""
        if place == ZERO_ENTRY and self.layout.zero_grains:
            return False
        if place < self.layout.lowest:
            self.damage(
                "grain-place",
                f"the grain is said to be at sector {place}, where the file's header is",
                number,
            )
            return False
        return True

    def _page(self, directory: int, first: int, count: int, which: str) -> "array[int]":
        raw = self.file.at(directory * 512 + first * self.width, count * self.width)
        if len(raw) < count * self.width:
            if self.noting:
                self._tables_damage(
                    "directory",
                    f"the {which}grain directory cannot be read to its end",
                    first,
                    count,
                )
            raw = raw.ljust(count * self.width, b"\0")
        return to_entries(raw, self.width)

    def _table(
        self, number: int, entry: int, spare_entry: int | None, tables: bool, grains: bool
    ) -> Iterator[Claim | None]:
        raw, place = self._read_table(number, entry, "")
        if raw is not None and place and tables:
            yield self.claim(place, self._table_sectors, TABLE, number, self._table_sectors)
        if spare_entry is not None:
            spare, spare_place = self._read_table(number, spare_entry, "redundant ")
            if spare is not None and spare_place not in (0, place) and tables:
                yield self.claim(
                    spare_place, self._table_sectors, SPARE_TABLE, number, self._table_sectors
                )
            if raw is not None and spare is not None and raw != spare:
                self._differ(number, raw, spare)
            raw = spare if raw is None else raw
        if grains and raw is not None and raw.count(0) != len(raw):
            first = number * self.layout.entries
            places = self.places(to_entries(raw, self.width), first)
            if self.marks is None or not self.noting or not self.marks.take(places):
                yield from self.grain_claims(places, first)

    def _read_table(self, number: int, entry: int, which: str) -> tuple[bytes | None, int]:
        """Return those bytes of a table that matter, None if they cannot be read, and its place."""
        length = min(self.layout.entries, self.layout.grains - number * self.layout.entries)
        size = length * self.width
        place = self.table_place(entry)
        if place == _NONE:
            return bytes(size), 0
        if place == _BAD:
            self._tables_damage(
                f"{which.replace(' ', '-')}table-place",
                f"the {which}grain table {number} is said to be where no table can be ({entry:#x})",
                number,
            )
            return None, 0
        raw = self.file.at(place * 512, size)
        if len(raw) < size:
            self._tables_damage(
                f"{which.replace(' ', '-')}table-outside",
                f"the {which}grain table {number} at sector {place} is not inside the file "
                f"of {self.file.size} bytes",
                number,
            )
            return None, 0
        return raw, place

    def _differ(self, number: int, raw: bytes, spare: bytes) -> None:
        if not self.noting:
            return
        one, two = to_entries(raw, self.width), to_entries(spare, self.width)
        wrong = [index for index, entry in enumerate(one) if entry != two[index]]
        first = number * self.layout.entries
        self.damage(
            "tables-differ",
            f"grain table {number} and its redundant copy differ in {len(wrong)} entries",
            first + wrong[0],
            wrong[-1] - wrong[0] + 1,
        )

    def _tables_damage(self, code: str, what: str, number: int, count: int = 1) -> None:
        entries = self.layout.entries
        self.damage(code, what, number * entries, count * entries)


class WideTableWalk(TableWalk):
    """The tables of an seSparse extent, which lie in an area of their own, as do the grains.

    Claims of tables are in numbers of tables, those of grains in grains of that area.
    """

    width = 8

    @property
    def grain_slots(self) -> int:
        """How many grains the file has room for behind its tables."""
        return max(0, -(-(self.file_sectors - self.layout.lowest) // self.layout.grain))

    @property
    def table_slots(self) -> int:
        """How many tables the file has room for."""
        end = min(self.layout.tables_end, self.file_sectors)
        return max(0, -(-(end - self.layout.tables_at) // TABLE_SECTORS))

    def claim(self, place: int, sectors: int, kind: str, number: int, size: int) -> Claim:
        """See ``TableWalk``."""
        origin = self.layout.lowest if kind == GRAIN else self.layout.tables_at
        return Claim((place - origin) // size, -(-sectors // size), kind, number, 1)

    def sector_of(self, kind: str, slot: int) -> int:
        """See ``TableWalk``."""
        if kind == GRAIN:
            return self.layout.lowest + slot * self.layout.grain
        return self.layout.tables_at + slot * TABLE_SECTORS if kind == TABLE else slot

    def table_place(self, entry: int) -> int:
        """See ``TableWalk``."""
        if entry == 0:
            return _NONE
        place = self.layout.tables_at + (entry & _LOW_32) * TABLE_SECTORS
        inside = place + TABLE_SECTORS <= self.layout.tables_end
        return place if inside and entry >> 32 == TABLE_TAG << 28 else _BAD

    def places(self, table: "array[int]", first: int) -> Sequence[int]:
        """See ``TableWalk``."""
        lowest, step = self.layout.lowest, self.layout.grain
        found = []
        for number, entry in enumerate(table, first):
            kind = entry >> 60
            if kind == ALLOCATED:
                grain = (entry >> 48 & 0xFFF) | (entry & 0xFFFF_FFFF_FFFF) << 12
                found.append(lowest + grain * step)
                continue
            found.append(_NONE)
            if kind not in (UNMAPPED, ZEROED) and (kind != UNALLOCATED or entry):
                self.damage("entry", f"its table entry {entry:#x} is of no known kind", number)
        return found
