"""Writers of VMDKs in pure Python: here flat, zero and hosted sparse extents.

Written from the published layouts and without the code under test, so that each can catch the
other's mistakes. A layout is plain data: an extent says what it holds and in which order its grains
are put into the file, a link lists its extents, a chain is a list of links, base first. The same
data, painted into a raw file from the base up, is the model of what a reader must see.

``makers_esx`` has the extents of ESXi, ``makers_stream`` compressed ones and archives,
``makers_chain`` links and chains, ``makers_layouts`` random layouts for hypothesis.

Lengths and offsets are in sectors of 512 bytes unless a name ends in ``_bytes``.
"""

import enum
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

SECTOR = 512
DESCRIPTOR_SECTORS = 20
ENTRIES = 512
"""Grains of one table of a hosted sparse extent."""

JUNK = b"\xee"
"""Fills what no reader may show: gaps, and a last grain beyond the end of its extent."""

NEWLINES, REDUNDANT, ZERO_GRAINS, COMPRESSED, MARKERS = 1, 2, 4, 1 << 16, 1 << 17
"""Flags of a hosted sparse header."""

GD_AT_END = (1 << 64) - 1


class Mark(enum.Enum):
    """What a grain can be instead of data. Only seSparse has UNMAPPED, which is zeros too."""

    ABSENT = "absent"
    ZERO = "zero"
    UNMAPPED = "unmapped"


Grain = bytes | Mark


@dataclass(frozen=True)
class Grains:
    """The *capacity* of a sparse extent, in grains of *size*, and their *content* by number.

    A grain that is not named is absent. The content of a last grain that the capacity cuts ends
    there. *order* gives (number, gap before it) of grains with data as they follow in the file;
    those not named come after them, without gaps. *cut* ends such a last grain in the file where
    the capacity does, if it is the last in the file.
    """

    capacity: int
    size: int
    content: Mapping[int, Grain]
    order: tuple[tuple[int, int], ...] = ()
    cut: bool = False

    def __repr__(self) -> str:
        """Return what fits a test's report: runs of grains of a kind, without their data."""
        runs: list[tuple[str, list[int]]] = []
        for number in sorted(self.content):
            what = self.content[number]
            kind = "data" if isinstance(what, bytes) else what.value
            if runs and runs[-1][0] == kind and runs[-1][1][-1] == number - 1:
                runs[-1][1].append(number)
            else:
                runs.append((kind, [number]))
        told = ", ".join(f"{run[0]}-{run[-1]} {kind}" for kind, run in runs[:50])
        return f"Grains({self.capacity}/{self.size}: {told}; {self.order[:20]}, cut={self.cut})"

    @property
    def count(self) -> int:
        """Grains of the extent; the last may be partial."""
        return -(-self.capacity // self.size)

    @property
    def zeros(self) -> list[int]:
        """The numbers of the grains that are marked as zeros."""
        return [number for number, what in self.content.items() if what is Mark.ZERO]

    def sectors_of(self, number: int) -> int:
        """Return the sectors of grain *number* that are in the extent."""
        return min(self.size, self.capacity - number * self.size)

    def in_file_order(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield (number, gap before it, data of a whole grain) of the grains with data."""
        told = {number for number, _gap in self.order}
        rest = [(number, 0) for number in sorted(self.content) if number not in told]
        for number, gap in (*self.order, *rest):
            data = self.content[number]
            if isinstance(data, bytes):
                assert len(data) == self.sectors_of(number) * SECTOR
                yield number, gap, data.ljust(self.size * SECTOR, JUNK)

    def end_bytes(self, places: Mapping[int, int]) -> int:
        """Return where the file ends whose grains are at the sectors *places*, 0 without any."""
        if not places:
            return 0
        last = max(places, key=lambda number: places[number])
        sectors = self.sectors_of(last) if self.cut else self.size
        return (places[last] + sectors) * SECTOR

    def paint(self, raw: BinaryIO, start: int) -> None:
        """Put what the extent has, and nothing else, into *raw*, where it begins at *start*."""
        for number, what in self.content.items():
            if what is Mark.ABSENT:
                continue
            data = what if isinstance(what, bytes) else bytes(self.sectors_of(number) * SECTOR)
            raw.seek((start + number * self.size) * SECTOR)
            raw.write(data)


class Extent(Protocol):
    """One extent of a link: how to write it, to list it, and to paint it over what is below."""

    @property
    def sectors(self) -> int: ...

    def line(self, name: str) -> str:
        """Return the line of a descriptor that lists the extent in the file *name*."""

    def write(self, path: Path, descriptor: bytes) -> None:
        """Write the file; *descriptor* is embedded if there is any."""

    def paint(self, raw: BinaryIO, start: int) -> None:
        """Put what the extent has into *raw*, where it begins at sector *start*."""


@dataclass(frozen=True)
class Flat:
    """A flat extent: *content* from sector *offset* of its file, with junk around it."""

    content: bytes = field(repr=False)
    offset: int = 0
    keyword: str = "FLAT"
    junk_after: int = 0
    access: str = "RW"

    @property
    def sectors(self) -> int:
        return len(self.content) // SECTOR

    def line(self, name: str) -> str:
        where = f" {self.offset}" if self.keyword == "FLAT" or self.offset else ""
        return f'{self.access} {self.sectors} {self.keyword} "{name}"{where}'

    def write(self, path: Path, descriptor: bytes) -> None:
        assert not descriptor
        before, after = JUNK * (self.offset * SECTOR), JUNK * (self.junk_after * SECTOR)
        path.write_bytes(before + self.content + after)

    def paint(self, raw: BinaryIO, start: int) -> None:
        raw.seek(start * SECTOR)
        raw.write(self.content)


@dataclass(frozen=True)
class Zero:
    """An extent without a file: all zeros, whatever is below."""

    sectors: int

    def line(self, name: str) -> str:
        return f"RW {self.sectors} ZERO"

    def write(self, path: Path, descriptor: bytes) -> None:
        assert not descriptor

    def paint(self, raw: BinaryIO, start: int) -> None:
        raw.seek(start * SECTOR)
        raw.write(bytes(self.sectors * SECTOR))


@dataclass(frozen=True)
class Hosted:
    """A hosted sparse extent (magic KDMV, not compressed).

    With *redundant* there are two directories, each with its own set of tables, as VMware's
    products write them; with *all_tables* even those that no grain is in. *rounded* makes the
    header's capacity whole grains, where only the descriptor is exact.
    """

    grains: Grains
    version: int = 1
    redundant: bool = False
    all_tables: bool = False
    rounded: bool = False

    @property
    def sectors(self) -> int:
        return self.grains.capacity

    def line(self, name: str) -> str:
        return f'RW {self.sectors} SPARSE "{name}"'

    def write(self, path: Path, descriptor: bytes) -> None:
        grains = self.grains
        used = {number // ENTRIES for number, what in grains.content.items() if what != Mark.ABSENT}
        tables = list(range(table_count(grains))) if self.all_tables else sorted(used)
        here = 1 + (DESCRIPTOR_SECTORS if descriptor else 0)
        metadata: list[tuple[int, dict[int, int]]] = []
        for _ in range(2 if self.redundant else 1):
            directory = here
            here += directory_sectors(grains)
            metadata.append((directory, {table: here + 4 * i for i, table in enumerate(tables)}))
            here += 4 * len(tables)
        overhead = here = -(-here // grains.size) * grains.size
        entries = {number: 1 for number in grains.zeros}
        places: dict[int, int] = {}
        with open(path, "wb") as file:
            for number, gap, data in grains.in_file_order():
                put_grain(file, here, gap, data)
                entries[number] = places[number] = here + gap
                here += gap + grains.size
            for directory, table_at in metadata:
                put_tables(file, directory, table_at, entries)
            put(file, 1, descriptor)
            put(file, 0, self._header(metadata, overhead, bool(descriptor)))
            file.truncate(max(overhead * SECTOR, grains.end_bytes(places)))

    def paint(self, raw: BinaryIO, start: int) -> None:
        self.grains.paint(raw, start)

    def _header(
        self, metadata: list[tuple[int, dict[int, int]]], overhead: int, embedded: bool
    ) -> bytes:
        flags = NEWLINES
        flags |= REDUNDANT if self.redundant else 0
        flags |= ZERO_GRAINS if self.grains.zeros else 0
        return hosted_header(
            version=self.version,
            flags=flags,
            capacity=self.grains.count * self.grains.size if self.rounded else self.sectors,
            grain=self.grains.size,
            embedded=embedded,
            # The redundant directory comes first in VMware's files.
            redundant=metadata[0][0] if self.redundant else 0,
            directory=metadata[-1][0],
            overhead=overhead,
        )


def table_count(grains: Grains) -> int:
    """Return the number of tables of a hosted sparse extent with *grains*."""
    return -(-grains.count // ENTRIES)


def directory_sectors(grains: Grains) -> int:
    """Return the length of one grain directory of a hosted sparse extent with *grains*."""
    return -(-table_count(grains) * 4 // SECTOR)


def put(file: BinaryIO, sector: int, data: bytes) -> None:
    """Write *data* at *sector*."""
    file.seek(sector * SECTOR)
    file.write(data)


def put_grain(file: BinaryIO, here: int, gap: int, data: bytes) -> None:
    """Write a grain *gap* sectors after *here*, with junk in front of it.

    A gap of terabytes is a hole but for its end.
    """
    junk = min(gap, 16)
    put(file, here + gap - junk, JUNK * (junk * SECTOR) + data)


def put_tables(
    file: BinaryIO, directory: int, table_at: Mapping[int, int], entries: Mapping[int, int]
) -> None:
    """Write a grain directory and its tables, which are at the sectors *table_at* by number."""
    for table, place in table_at.items():
        file.seek(directory * SECTOR + table * 4)
        file.write(struct.pack("<I", place))
        row = (entries.get(number, 0) for number in range(table * ENTRIES, (table + 1) * ENTRIES))
        put(file, place, struct.pack(f"<{ENTRIES}I", *row))


def hosted_header(
    *,
    version: int,
    flags: int,
    capacity: int,
    grain: int,
    embedded: bool,
    directory: int,
    overhead: int,
    redundant: int = 0,
    compression: int = 0,
) -> bytes:
    """Return the sector that a hosted sparse extent begins with."""
    descriptor = (1, DESCRIPTOR_SECTORS) if embedded else (0, 0)
    header = b"KDMV" + struct.pack("<II4Q", version, flags, capacity, grain, *descriptor)
    header += struct.pack("<I3Q", ENTRIES, redundant, directory, overhead)
    header += b"\0" + b"\n \r\n" + struct.pack("<H", compression)
    return header.ljust(SECTOR, b"\0")
