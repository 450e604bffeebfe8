"""Writers of compressed hosted sparse extents (streamOptimized), and of archives (OVA).

See ``makers``. A grain is a zlib stream (RFC 1950) behind a marker of its first sector on the disk
and the length of the stream, padded to whole sectors.
"""

import io
import struct
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.engines.vmdk.makers import (
    COMPRESSED,
    DESCRIPTOR_SECTORS,
    ENTRIES,
    GD_AT_END,
    MARKERS,
    NEWLINES,
    REDUNDANT,
    SECTOR,
    ZERO_GRAINS,
    Grains,
    Mark,
    directory_sectors,
    hosted_header,
    put,
    put_tables,
    table_count,
)

END_OF_STREAM, GRAIN_TABLE, GRAIN_DIRECTORY, FOOTER = range(4)
"""The types of the markers that are not a grain's."""


@dataclass(frozen=True)
class Stream:
    """A compressed extent.

    With *footer* the directory is at the end, where the footer tells, and each table follows the
    last of its grains; gaps are left out then. Without, they are before the grains, as qemu-img
    writes them, *redundant* twice. *short* compresses of a last grain only what the disk has.
    *prefix* is what comes before a grain's data: its "marker", "nothing", or its "length" alone.
    """

    grains: Grains
    version: int = 3
    footer: bool = True
    redundant: bool = False
    short: bool = False
    prefix: str = "marker"

    @property
    def sectors(self) -> int:
        return self.grains.capacity

    def line(self, name: str) -> str:
        return f'RW {self.sectors} SPARSE "{name}"'

    def write(self, path: Path, descriptor: bytes) -> None:
        with open(path, "wb+") as file:
            put(file, 1, descriptor)
            if self.footer:
                self._write_stream(file, bool(descriptor))
            else:
                self._write_tables_first(file, bool(descriptor))

    def paint(self, raw: BinaryIO, start: int) -> None:
        self.grains.paint(raw, start)

    def _write_stream(self, file: BinaryIO, embedded: bool) -> None:
        grains = self.grains
        overhead = here = 128
        put(file, 0, self._header(GD_AT_END, overhead, embedded))
        entries = dict.fromkeys(grains.zeros, 1)
        left: dict[int, int] = {}
        for number, what in grains.content.items():
            if what is not Mark.ABSENT:
                left[number // ENTRIES] = left.get(number // ENTRIES, 0) + isinstance(what, bytes)
        table_at: dict[int, int] = {}
        for number, _gap, data in grains.in_file_order():
            entries[number] = here
            here = self._put_grain(file, here, number, data)
            left[number // ENTRIES] -= 1
            if not left[number // ENTRIES]:
                table_at[number // ENTRIES] = here + 1
                here = _put_marker(file, here, GRAIN_TABLE, 4) + 4
        for table in left.keys() - table_at.keys():
            table_at[table] = here + 1
            here = _put_marker(file, here, GRAIN_TABLE, 4) + 4
        length = directory_sectors(grains)
        directory = _put_marker(file, here, GRAIN_DIRECTORY, length)
        put(file, directory, bytes(length * SECTOR))
        put_tables(file, directory, table_at, entries)
        here = _put_marker(file, directory + length, FOOTER, 1)
        put(file, here, self._header(directory, overhead, embedded))
        _put_marker(file, here + 1, END_OF_STREAM, 0)

    def _write_tables_first(self, file: BinaryIO, embedded: bool) -> None:
        grains = self.grains
        here = 1 + (DESCRIPTOR_SECTORS if embedded else 0)
        metadata: list[tuple[int, dict[int, int]]] = []
        for _ in range(2 if self.redundant else 1):
            directory = here
            here += directory_sectors(grains)
            metadata.append((directory, {n: here + 4 * n for n in range(table_count(grains))}))
            here += 4 * table_count(grains)
        overhead = here = -(-here // grains.size) * grains.size
        entries = dict.fromkeys(grains.zeros, 1)
        for number, gap, data in grains.in_file_order():
            entries[number] = here + gap
            here = self._put_grain(file, here + gap, number, data)
        for directory, table_at in metadata:
            put_tables(file, directory, table_at, entries)
        redundant = metadata[0][0] if self.redundant else 0
        put(file, 0, self._header(metadata[-1][0], overhead, embedded, redundant))
        file.truncate(here * SECTOR)

    def longest(self) -> int:
        """Return the bytes of the longest compressed grain."""
        grains = self.grains.in_file_order()
        return max((len(self._pack(number, data)) for number, _gap, data in grains), default=0)

    def _pack(self, number: int, data: bytes) -> bytes:
        if self.short:
            data = data[: self.grains.sectors_of(number) * SECTOR]
        # Streams of all levels, from stored to best: a reader must take each.
        return zlib.compress(data, number % 10)

    def _put_grain(self, file: BinaryIO, here: int, number: int, data: bytes) -> int:
        """Write a grain at sector *here*; return the next free sector."""
        packed = self._pack(number, data)
        if self.prefix == "marker":
            packed = struct.pack("<QI", number * self.grains.size, len(packed)) + packed
        elif self.prefix == "length":
            packed = struct.pack("<I", len(packed)) + packed
        sectors = -(-len(packed) // SECTOR)
        put(file, here, packed.ljust(sectors * SECTOR, b"\0"))
        return here + sectors

    def _header(self, directory: int, overhead: int, embedded: bool, redundant: int = 0) -> bytes:
        flags = NEWLINES | COMPRESSED
        flags |= MARKERS if self.prefix == "marker" else 0
        flags |= REDUNDANT if redundant else 0
        flags |= ZERO_GRAINS if self.grains.zeros else 0
        return hosted_header(
            version=self.version,
            flags=flags,
            capacity=self.sectors,
            grain=self.grains.size,
            embedded=embedded,
            directory=directory,
            overhead=overhead,
            redundant=redundant,
            compression=1,
        )


def _put_marker(file: BinaryIO, here: int, kind: int, sectors: int) -> int:
    """Write the marker of *sectors* of metadata that follow; return their first sector."""
    put(file, here, struct.pack("<QII", sectors, 0, kind).ljust(SECTOR, b"\0"))
    return here + 1


def write_ova(
    path: Path, files: Mapping[str, bytes | Path], *, form: int = tarfile.USTAR_FORMAT
) -> None:
    """Write an archive of *files*, the .ovf first, in one of tarfile's formats."""
    names = sorted(files, key=lambda name: not name.endswith(".ovf"))
    with tarfile.open(path, "w", format=form) as archive:
        for name in names:
            what = files[name]
            content = what if isinstance(what, bytes) else what.read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mtime = 1_700_000_000
            member.mode = 0o644
            archive.addfile(member, io.BytesIO(content))
