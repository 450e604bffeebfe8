"""VMDK files written byte by byte, and qemu-img's view of any.

Nothing here comes from the code under test. `SparseExtent` writes the hosted sparse format as it
is published, with every field open to a lie.
"""

import json
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECTOR = 512
REDUNDANT = 1 << 1
ZEROED = 1 << 2
NO_PARENT = "ffffffff"


def tool(name: str) -> str:
    """Where *name* is; a test that needs it fails without it."""
    path = shutil.which(name)
    assert path is not None, f"{name} is missing"
    return path


def qemu_img(*arguments: str | Path) -> str:
    command = [tool("qemu-img"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(image: Path, *commands: str) -> None:
    words = [tool("qemu-io"), "-f", "vmdk"]
    for command in commands:
        words += ["-c", command]
    done = subprocess.run([*words, str(image)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


def qemu_raw(image: Path) -> bytes:
    """The whole content as qemu-img reads it."""
    raw = image.with_name(image.name + ".raw")
    qemu_img("convert", "-f", "vmdk", "-O", "raw", image, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content


def qemu_check(image: Path) -> None:
    qemu_img("check", "-q", "-f", "vmdk", image)


@dataclass(frozen=True)
class Piece:
    """A run of sectors: where it lies, or a hole (link is None)."""

    start: int
    count: int
    link: int | None
    offset: int | None
    file: str | None


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if last is not None and (last.link, last.file) == (piece.link, piece.file):
            follows = last.offset is None or last.offset + last.count * SECTOR == piece.offset
            if follows:
                both = last.count + piece.count
                result[-1] = Piece(last.start, both, last.link, last.offset, last.file)
                continue
        result.append(piece)
    return result


def qemu_map(image: Path, links: int) -> list[Piece]:
    """What qemu-img map says of the places of data, with links counted from the base."""
    runs: list[dict[str, Any]] = json.loads(qemu_img("map", "-f", "vmdk", "--output=json", image))
    pieces = []
    for run in runs:
        start, count = run["start"] // SECTOR, run["length"] // SECTOR
        if "offset" in run:
            name = Path(run["filename"]).name if "filename" in run else None
            pieces.append(Piece(start, count, links - 1 - run["depth"], run["offset"], name))
        else:
            assert not run["data"]
            pieces.append(Piece(start, count, None, None, None))
    return merged(pieces)


def descriptor(
    extents: Sequence[str],
    *,
    kind: str = "custom",
    cid: str = "12345678",
    parent: tuple[str, str] | None = None,
    version: str = "1",
    more: Sequence[str] = (),
) -> str:
    """A text descriptor; *parent* is (hint, CID)."""
    lines = ["# Disk DescriptorFile", f"version={version}", f"CID={cid}"]
    lines.append(f"parentCID={parent[1] if parent else NO_PARENT}")
    lines.append(f'createType="{kind}"')
    if parent:
        lines.append(f'parentFileNameHint="{parent[0]}"')
    lines += ["", "# Extent description", *extents, "", "# The Disk Data Base", "#DDB", *more]
    return "\n".join(lines) + "\n"


@dataclass
class SparseExtent:
    """A hosted sparse extent that is yet to be written, and the places of its parts."""

    capacity: int
    grain: int = 8
    entries: int = 512
    version: int = 1
    flags: int = 1 | REDUNDANT
    text: str = ""
    room: int = 20
    missing_tables: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.tables = -(-self.capacity // (self.grain * self.entries))
        self.table_sectors = -(-self.entries * 4 // SECTOR)
        directory_sectors = -(-self.tables * 4 // SECTOR)
        size = directory_sectors + self.tables * self.table_sectors
        self.descriptor_at = 1 if self.text else 0
        self.redundant = 1 + (self.room if self.text else 0)
        self.directory = self.redundant + size
        self.redundant_tables = self.redundant + directory_sectors
        self.first_table = self.directory + directory_sectors
        self.overhead = -(-(self.directory + size) // self.grain) * self.grain

    def header(self, **lies: int) -> bytes:
        """The header's sector; *lies* replace fields by name."""
        fields = {
            "version": self.version,
            "flags": self.flags,
            "capacity": self.capacity,
            "grain": self.grain,
            "descriptor_at": self.descriptor_at,
            "descriptor_size": self.room if self.text else 0,
            "entries": self.entries,
            "redundant": self.redundant,
            "directory": self.directory,
            "overhead": self.overhead,
        }
        assert set(lies) <= set(fields)
        packed = struct.pack("<4sIIQQQQIQQQ", b"KDMV", *(fields | lies).values())
        return (packed + b"\0\n \r\n").ljust(SECTOR, b"\0")

    def table_place(self, table: int, first: int) -> int:
        return 0 if table in self.missing_tables else first + table * self.table_sectors

    def directory_bytes(self, first: int) -> bytes:
        return b"".join(
            struct.pack("<I", self.table_place(table, first)) for table in range(self.tables)
        )

    def write(self, path: Path, grains: Mapping[int, bytes | int], **lies: int) -> None:
        """Writes the extent: *grains* have bytes, or the entry to put in the tables as it is."""
        with path.open("wb") as file:
            file.write(self.header(**lies))
            if self.text:
                file.write(self.text.encode().ljust(self.room * SECTOR, b"\0"))
            for place, tables in (
                (self.redundant, self.redundant_tables),
                (self.directory, self.first_table),
            ):
                file.seek(place * SECTOR)
                file.write(self.directory_bytes(tables))
            file.truncate(self.overhead * SECTOR)
            position = self.overhead
            for number, grain in grains.items():
                entry = grain if isinstance(grain, int) else position
                if isinstance(grain, bytes):
                    file.seek(position * SECTOR)
                    file.write(grain.ljust(self.grain * SECTOR, b"\0"))
                    position += self.grain
                for tables in (self.redundant_tables, self.first_table):
                    self.set_entry(file, tables, number, entry)

    def set_entry(self, file: Any, tables: int, number: int, entry: int) -> None:
        table, index = divmod(number, self.entries)
        file.seek((tables + table * self.table_sectors) * SECTOR + index * 4)
        file.write(struct.pack("<I", entry))


def monolithic(
    path: Path,
    capacity: int,
    grains: Mapping[int, bytes | int],
    *,
    cid: str = "12345678",
    parent: tuple[str, str] | None = None,
    **fields: Any,
) -> SparseExtent:
    """A monolithicSparse disk of small grains."""
    line = f'RW {capacity} SPARSE "{path.name}"'
    text = descriptor([line], kind="monolithicSparse", cid=cid, parent=parent)
    extent = SparseExtent(capacity, text=text, **fields)
    extent.write(path, grains)
    return extent
