"""Writers of the sparse extents of ESXi: vmfsSparse (COWD) and seSparse. See ``makers``."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.engines.vmdk.makers import SECTOR, Grains, Mark, put, put_grain

ENTRIES = 4096
"""Grains of one table, in both formats."""


@dataclass(frozen=True)
class Cowd:
    """A vmfsSparse extent. A table is put where its first grain in the file needs it.

    With *all_tables* the tables come first, even those that no grain is in. *child* writes the
    parent's name into the header, as the format's union has it, instead of a geometry.
    """

    grains: Grains
    all_tables: bool = False
    child: bool = False

    @property
    def sectors(self) -> int:
        return self.grains.capacity

    def line(self, name: str) -> str:
        return f'RW {self.sectors} VMFSSPARSE "{name}"'

    def write(self, path: Path, descriptor: bytes) -> None:
        assert not descriptor
        grains = self.grains
        tables = -(-grains.count // ENTRIES)
        here = 4 + -(-tables * 4 // SECTOR)
        table_at: dict[int, int] = {}
        places: dict[int, int] = {}
        if self.all_tables:
            table_at = {table: here + 32 * table for table in range(tables)}
            here += 32 * tables
        with open(path, "wb") as file:
            for number, gap, data in grains.in_file_order():
                if number // ENTRIES not in table_at:
                    table_at[number // ENTRIES] = here
                    here += 32
                put_grain(file, here, gap, data)
                places[number] = here + gap
                here += gap + grains.size
            for table, place in table_at.items():
                file.seek(4 * SECTOR + table * 4)
                file.write(struct.pack("<I", place))
                first = table * ENTRIES
                row = [places.get(number, 0) for number in range(first, first + ENTRIES)]
                put(file, place, struct.pack(f"<{ENTRIES}I", *row))
            put(file, 0, self._header(tables, here))
            overhead = 4 + -(-tables * 4 // SECTOR)
            ends = [place + 32 for place in table_at.values()]
            file.truncate(max(max([overhead, *ends]) * SECTOR, grains.end_bytes(places)))

    def paint(self, raw: BinaryIO, start: int) -> None:
        self.grains.paint(raw, start)

    def _header(self, tables: int, free: int) -> bytes:
        header = b"COWD" + struct.pack("<II", 1, 3)
        header += struct.pack("<IIIII", self.sectors, self.grains.size, 4, tables, free)
        union = b"parent.vmdk" if self.child else struct.pack("<III", 1, 16, 63)
        header += union.ljust(1024, b"\0") + struct.pack("<I", 0)
        header += struct.pack("<I60s512sI8sI", 7, b"name", b"description", 0, b"", 0)
        return header.ljust(4 * SECTOR, b"\0")


@dataclass(frozen=True)
class SeSparse:
    """A seSparse extent: grains of 8 sectors, 64-bit entries.

    *spread* puts the regions at multiples of 1 MiB, as ESXi does; else each follows the last.
    *backwards* puts the tables in their region in the reverse order of the disk. Gaps between
    grains are counted in grains.
    """

    grains: Grains
    spread: bool = False
    backwards: bool = False

    @property
    def sectors(self) -> int:
        return self.grains.capacity

    def line(self, name: str) -> str:
        return f'RW {self.sectors} SESPARSE "{name}"'

    def write(self, path: Path, descriptor: bytes) -> None:
        assert not descriptor
        assert self.grains.size == 8
        grains = self.grains
        entries = {number: _entry(what, 0) for number, what in grains.content.items()}
        clusters: dict[int, int] = {}
        here = 0
        for number, gap, data in grains.in_file_order():
            clusters[number] = here + gap
            entries[number] = _entry(data, here + gap)
            here += gap + 1
        tables = sorted({number // ENTRIES for number, entry in entries.items() if entry})
        if self.backwards:
            tables.reverse()
        regions = self._regions(tables, here)
        grains_at = regions["grains"][0]
        with open(path, "wb") as file:
            put(file, 0, self._constant_header(regions))
            put(file, regions["volatile header"][0], _volatile_header(len(tables)))
            put(file, regions["journal header"][0], struct.pack("<QQ", 0xDEAFC0DE, 0))
            for place, table in enumerate(tables):
                file.seek(regions["directory"][0] * SECTOR + table * 8)
                file.write(struct.pack("<Q", 1 << 60 | place))
                first = table * ENTRIES
                row = [entries.get(number, 0) for number in range(first, first + ENTRIES)]
                put(file, regions["tables"][0] + place * 64, struct.pack(f"<{ENTRIES}Q", *row))
            self._put_bookkeeping(file, regions, clusters)
            for number, gap, data in grains.in_file_order():
                put_grain(file, grains_at + (clusters[number] - gap) * 8, gap * 8, data)
            places = {number: grains_at + index * 8 for number, index in clusters.items()}
            file.truncate(max(grains_at * SECTOR, grains.end_bytes(places)))

    def paint(self, raw: BinaryIO, start: int) -> None:
        self.grains.paint(raw, start)

    def _regions(self, tables: list[int], clusters: int) -> dict[str, tuple[int, int]]:
        """Return (sector, sectors) of the parts of the file, in the order of the header."""
        all_tables = -(-self.grains.count // ENTRIES)
        most = max(self.grains.count, clusters)
        lengths = {
            "volatile header": 1,
            "journal header": 2,
            "journal": 8,
            "directory": -(-all_tables * 8 // SECTOR),
            "tables": max(all_tables, len(tables)) * 64,
            "free bitmap": -(-most // (8 * SECTOR)),
            "back map": -(-most * 8 // SECTOR),
            "grains": most * 8,
        }
        regions = {}
        here = 1
        for name, length in lengths.items():
            if self.spread and not name.endswith("header"):
                here = -(-here // 2048) * 2048
            regions[name] = (here, length)
            here += length
        return regions

    def _constant_header(self, regions: dict[str, tuple[int, int]]) -> bytes:
        header = struct.pack("<6Q", 0xCAFEBABE, 0x200000001, self.sectors, 8, 64, 0)
        header += bytes(4 * 8)
        for place, length in regions.values():
            header += struct.pack("<QQ", place, length)
        return header.ljust(SECTOR, b"\0")

    def _put_bookkeeping(
        self, file: BinaryIO, regions: dict[str, tuple[int, int]], clusters: dict[int, int]
    ) -> None:
        """Write what a reader has no use for: which clusters are taken, and by which grains."""
        bitmap: dict[int, int] = {}
        for number, cluster in clusters.items():
            bitmap[cluster // 8] = bitmap.get(cluster // 8, 0) | 1 << cluster % 8
            file.seek(regions["back map"][0] * SECTOR + cluster * 8)
            file.write(struct.pack("<Q", 1 << 60 | _index(number)))
        for place, bits in bitmap.items():
            file.seek(regions["free bitmap"][0] * SECTOR + place)
            file.write(bytes([bits]))


def _index(number: int) -> int:
    """Return *number* as seSparse has it in 60 bits: the lowest twelve on top of the others."""
    return (number & 0xFFF) << 48 | number >> 12


def _entry(what: bytes | Mark, cluster: int) -> int:
    """Return the table entry of a grain; *cluster* is the place of its data."""
    if isinstance(what, bytes):
        return 3 << 60 | _index(cluster)
    return {Mark.ABSENT: 0, Mark.UNMAPPED: 1 << 60, Mark.ZERO: 2 << 60}[what]


def _volatile_header(tables: int) -> bytes:
    return struct.pack("<4Q", 0xCAFECAFE, tables, 1, 0).ljust(SECTOR, b"\0")
