"""The kinds of damage that others test their readers with, each in every format that can have it.

A disk that cannot be opened gives one clear line with advice. One whose damage is found when it is
read gives an EngineError that names the sector, and the rest stays readable. Nothing else, ever.
"""

import os
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.vmdk.makers import ENTRIES, SECTOR, Flat, Grain, Grains, Hosted
from tests.engines.vmdk.makers_chain import Link, describe, write_chain
from tests.engines.vmdk.makers_esx import Cowd, SeSparse
from tests.engines.vmdk.makers_stream import Stream
from vddkfs.engines.vmdk import VmdkEngine, discover
from vddkfs.errors import (
    DamagedSource,
    EngineError,
    NotAVmdk,
    SourceMissing,
    UnsupportedFormat,
    VddkfsError,
)

Read = Callable[..., bytes]
CAPACITY = 3000
GRAIN = 16
"""Sectors of a grain of the hosted disks here."""


def grains(size: int, capacity: int = CAPACITY) -> Grains:
    """Return grains that all have data, but for one of four."""
    draw = random.Random(size)
    content: dict[int, Grain] = {}
    for number in range(-(-capacity // size)):
        if number % 4 != 2:
            content[number] = draw.randbytes(min(size, capacity - number * size) * SECTOR)
    return Grains(capacity, size, content)


def content(extent: Hosted | Stream | Cowd | SeSparse) -> bytes:
    """Return what a disk of one extent shows."""
    made = bytearray(extent.sectors * SECTOR)
    size = extent.grains.size * SECTOR
    for number, what in extent.grains.content.items():
        assert isinstance(what, bytes)
        made[number * size : number * size + len(what)] = what
    return bytes(made)


MONO = Link("monolithicSparse", (Hosted(grains(GRAIN)),), embedded=True)
STREAM = Link("streamOptimized", (Stream(grains(GRAIN)),), embedded=True)
TABLES_FIRST = Link("streamOptimized", (Stream(grains(GRAIN), footer=False),), embedded=True)
PIECES = Link("twoGbMaxExtentSparse", (Hosted(grains(GRAIN)),))
COWD = Link("vmfsSparse", (Cowd(grains(1)),))
SESPARSE = Link("seSparse", (SeSparse(grains(8)),))
LINKS = {
    "monolithicSparse": MONO,
    "streamOptimized": STREAM,
    "without footer": TABLES_FIRST,
    "twoGbMaxExtentSparse": PIECES,
    "vmfsSparse": COWD,
    "seSparse": SESPARSE,
}
HOSTED = ("monolithicSparse", "streamOptimized", "without footer", "twoGbMaxExtentSparse")


def written(folder: Path, link: Link) -> tuple[Path, Path]:
    """Write a disk; return the VMDK to open, and the file that has the grains."""
    (path,) = write_chain(folder, [link])
    return path, path if link.embedded else folder / "0-s001.vmdk"


def patch(path: Path, offset: int, form: str, *values: int | bytes) -> None:
    """Write fields at a byte of a file; a negative one counts from the end."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(struct.pack(form, *values))


def field(path: Path, offset: int, form: str) -> int:
    with open(path, "rb") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        (value,) = struct.unpack(form, file.read(struct.calcsize(form)))
    return int(value)


def refused(path: Path, kind: type[VddkfsError], *words: str) -> str:
    """Check that a disk is refused in one line with advice; return the line."""
    with pytest.raises(VddkfsError) as caught:
        discover(str(path))
    line = str(caught.value)
    assert type(caught.value) is kind, line
    assert line.isprintable()
    assert caught.value.advice
    assert str(path.parent) in line
    for word in words:
        assert word in line
    return line


class Damaged:
    """A disk that can be opened: what of it can be read, and what the errors say.

    *ahead* is by how many sectors an error named another sector than one that was asked for, or one
    before it (that of its grain, or of its table).
    """

    def __init__(self, path: Path, read: Read) -> None:
        (chain,) = discover(str(path)).chains
        self.ahead = 0
        engine = VmdkEngine(chain.paths)
        try:
            self.sectors: list[bytes | None] = []
            self.lines: set[str] = set()
            for sector in range(engine.identities()[-1].capacity):
                self.sectors.append(self._sector(engine, read, sector))
            # The map and the reader past all caches meet the same damage, and nothing else.
            engine.map(0, 0, len(self.sectors), 10_000, 60)
            self.direct = {
                sector: self._sector(engine, read, sector, True)
                for sector in range(0, len(self.sectors), 7)
            }
        finally:
            engine.close()

    def _sector(
        self, engine: VmdkEngine, read: Read, sector: int, direct: bool = False
    ) -> bytes | None:
        try:
            return read(engine, sector, 1, direct=direct)
        except EngineError as error:
            failed = error
        line = str(failed)
        assert line.isprintable()
        assert re.search(rf"\bsector {failed.sector}\b", line), line
        assert failed.link
        assert failed.sector >= 0
        self.ahead = max(self.ahead, failed.sector - sector)
        self.lines.add(re.sub(r"\d+", "N", line))
        return None

    def compare(self, wanted: bytes) -> list[int]:
        """Check that what can be read is right; return the numbers of the sectors that cannot."""
        for sector, found in (*enumerate(self.sectors), *self.direct.items()):
            assert found in (None, wanted[sector * SECTOR :][:SECTOR]), sector
        return [sector for sector, found in enumerate(self.sectors) if found is None]


# The granularity.

GRAIN_FIELD = {"vmfsSparse": (16, "<I"), "seSparse": (24, "<Q")}


@pytest.mark.parametrize(
    "value", [0, 1, 3, 100, 129, 1 << 13, (1 << 31) - 1, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]
)
@pytest.mark.parametrize("name", LINKS)
def test_granularity(tmp_path: Path, name: str, value: int) -> None:
    path, file = written(tmp_path, LINKS[name])
    offset, form = GRAIN_FIELD.get(name, (20, "<Q"))
    if form == "<I" and value >= 1 << 32:
        value &= 0xFFFFFFFE
    if name == "vmfsSparse" and value == 1:
        value = 0
    patch(file, offset, form, value)
    refused(path, DamagedSource, file.name, "grain size", str(value))


# Grain tables that are too large.

TABLE_FIELD = {"vmfsSparse": (24, "<I"), "seSparse": (32, "<Q")}


@pytest.mark.parametrize("value", [0, 1, 511, 513, 1 << 16, (1 << 31) - 1, (1 << 32) - 1])
@pytest.mark.parametrize("name", [*HOSTED, "seSparse"])
def test_oversized_tables(tmp_path: Path, name: str, value: int) -> None:
    path, file = written(tmp_path, LINKS[name])
    offset, form = TABLE_FIELD.get(name, (44, "<I"))
    patch(file, offset, form, value)
    refused(path, DamagedSource, file.name, f"grain tables of {value}")


def test_too_few_tables_of_cowd(tmp_path: Path) -> None:
    path, file = written(tmp_path, COWD)
    patch(file, 24, "<I", 0)
    refused(path, DamagedSource, file.name, "grain directory has 0 entries")


@pytest.mark.parametrize("value", [2, (1 << 64) - 1, 1 << 53, 1 << 40])
@pytest.mark.parametrize("region", range(8))
def test_regions_of_sesparse_outside_the_file(
    tmp_path: Path, read: Read, region: int, value: int
) -> None:
    """Those that a reader has no use for (journal, bitmap, back map) may be anywhere."""
    path, file = written(tmp_path, SESPARSE)
    patch(file, 80 + 16 * region, "<Q", value)
    if region in (1, 2, 5, 6):
        assert not Damaged(path, read).compare(content(SeSparse(grains(8))))
        return
    try:
        line = refused(path, DamagedSource, file.name)
    except pytest.fail.Exception:
        # A place in the file, or beyond it for grains: found when it is read.
        assert region in (3, 4, 7)
        judge_any(path, read)
    else:
        assert "sector" in line


def judge_any(path: Path, read: Read) -> None:
    """Read all; whatever is read, errors are those of the engine and name their sector."""
    found = Damaged(path, read)
    assert len(found.sectors) == CAPACITY


def test_sesparse_with_a_journal_to_be_replayed(tmp_path: Path) -> None:
    path, file = written(tmp_path, SESPARSE)
    volatile = field(file, 80, "<Q") * SECTOR
    patch(file, volatile + 24, "<Q", 1)
    refused(path, UnsupportedFormat, file.name, "its journal was not replayed")
    patch(file, volatile, "<Q", 0xCAFEBABE)
    refused(path, DamagedSource, file.name, "no volatile header")


# The capacity.


@pytest.mark.parametrize("value", [(62 << 31) + 1, 1 << 40, 1 << 55, (1 << 63) - 1, (1 << 64) - 1])
@pytest.mark.parametrize("name", [*HOSTED, "seSparse"])
def test_capacity_too_big(tmp_path: Path, name: str, value: int) -> None:
    path, file = written(tmp_path, LINKS[name])
    patch(file, 16 if name == "seSparse" else 12, "<Q", value)
    refused(path, DamagedSource, file.name, str(value), "62 TiB")


@pytest.mark.parametrize("name", LINKS)
def test_capacity_that_the_tables_do_not_reach(tmp_path: Path, name: str) -> None:
    """The directory would have to be longer than the file."""
    path, file = written(tmp_path, LINKS[name])
    if name == "vmfsSparse":
        patch(file, 12, "<I", 0xFFFFFFF0)
    else:
        patch(file, 16 if name == "seSparse" else 12, "<Q", 62 << 31)
    if name == "streamOptimized":
        refused(path, DamagedSource, file.name, "its header and its footer differ")
    else:
        refused(path, DamagedSource, file.name, "grain directory")


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("value", [0, CAPACITY - 1])
def test_capacity_too_small(tmp_path: Path, name: str, value: int) -> None:
    path, file = written(tmp_path, LINKS[name])
    if name == "vmfsSparse":
        patch(file, 12, "<I", value)
    else:
        patch(file, 16 if name == "seSparse" else 12, "<Q", value)
    refused(path, DamagedSource, file.name)


# Truncation.


@pytest.mark.parametrize("size", [0, 1, 3, 4, 79, 511, 512, 515])
@pytest.mark.parametrize("name", LINKS)
def test_truncated_header(tmp_path: Path, name: str, size: int) -> None:
    """Also where the header is all there, and the directory behind it is not."""
    path, file = written(tmp_path, LINKS[name])
    os.truncate(file, size)
    kind = NotAVmdk if size == 0 and file == path else DamagedSource
    refused(path, kind, file.name)


@pytest.mark.parametrize("name", LINKS)
def test_truncated_extent(tmp_path: Path, read: Read, name: str) -> None:
    """At any length: refused, or errors for what is missing and right bytes for the rest."""
    path, file = written(tmp_path, LINKS[name])
    (extent,) = LINKS[name].extents
    assert isinstance(extent, (Hosted, Stream, Cowd, SeSparse))
    whole = file.stat().st_size
    opened = 0
    for cut in (whole - 1, whole - SECTOR, whole - SECTOR - 1, whole * 3 // 4, whole // 3, 5000):
        os.truncate(file, cut)
        try:
            discover(str(path))
        except VddkfsError:
            refused(path, DamagedSource, file.name)
            continue
        opened += 1
        found = Damaged(path, read)
        assert found.compare(content(extent)) or cut >= whole - SECTOR - 1
        assert found.ahead == 0 or isinstance(extent, Stream)
    assert opened == 0 if name == "streamOptimized" else opened


def test_truncated_compressed_grain_names_its_sector(tmp_path: Path, read: Read) -> None:
    path, file = written(tmp_path, TABLES_FIRST)
    os.truncate(file, file.stat().st_size - SECTOR - 1)
    assert Damaged(path, read).ahead == 0


@pytest.mark.parametrize("kind", ["FLAT", "VMFS"])
@pytest.mark.parametrize("missing", [1, SECTOR, CAPACITY * SECTOR])
def test_truncated_flat(tmp_path: Path, kind: str, missing: int) -> None:
    flat = Flat(random.Random(1).randbytes(CAPACITY * SECTOR), keyword=kind)
    path, file = written(tmp_path, Link("vmfs" if kind == "VMFS" else "monolithicFlat", (flat,)))
    os.truncate(file, CAPACITY * SECTOR - missing)
    words = ("truncated extent", str(CAPACITY * SECTOR - missing), str(CAPACITY * SECTOR))
    refused(path, DamagedSource, file.name, *words)


@pytest.mark.parametrize("offset", [1, 1 << 30, 62 << 31])
def test_flat_that_begins_behind_its_end(tmp_path: Path, offset: int) -> None:
    (tmp_path / "x-flat.vmdk").write_bytes(bytes(8 * SECTOR))
    text = descriptor(f'RW 8 FLAT "x-flat.vmdk" {offset}')
    (tmp_path / "x.vmdk").write_text(text)
    refused(tmp_path / "x.vmdk", DamagedSource, "truncated extent", str((offset + 8) * SECTOR))


# Extent lines.


def descriptor(line: str, kind: str = "monolithicFlat") -> str:
    text = describe(Link(kind, (Flat(bytes(SECTOR)),)), ["name"], 1, 0xFFFFFFFF, "")
    return text.replace('RW 1 FLAT "name" 0', line)


@pytest.fixture
def flat(tmp_path: Path) -> bytes:
    data = random.Random("flat").randbytes(8 * SECTOR)
    (tmp_path / "x-flat.vmdk").write_bytes(data)
    return data


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("RW 8 FLAT x-flat.vmdk 0", "no file name"),
        ('RW 8 FLAT "x-flat.vmdk 0', "no file name"),
        ('RW 8 FLAT x-flat.vmdk" 0', "no file name"),
        ("RW 8 FLAT 'x-flat.vmdk' 0", "no file name"),
        ('RW 8 FLAT "" 0', "no file name"),
        ('RW 8 FLAT "x-flat.vmdk"0', "no file name"),
        ("RW 8 FLAT", "names no file"),
        ("RW 8 VMFS", "names no file"),
        ("RW 8 SPARSE  ", "names no file"),
        ('RW -8 FLAT "x-flat.vmdk" 0', "no valid length"),
        ('RW +8 FLAT "x-flat.vmdk" 0', "no valid length"),
        ('RW 0x8 FLAT "x-flat.vmdk" 0', "no valid length"),
        ('RW 8.0 FLAT "x-flat.vmdk" 0', "no valid length"),
        ('RW \u0668 FLAT "x-flat.vmdk" 0', "no valid length"),
        ('RW 0 FLAT "x-flat.vmdk" 0', "0 sectors"),
        (f'RW {62 << 31 | 1} FLAT "x-flat.vmdk" 0', "62 TiB"),
        (f'RW {1 << 63} FLAT "x-flat.vmdk" 0', "length"),
        (f'RW {10**30} FLAT "x-flat.vmdk" 0', "length"),
        (f'RW {"9" * 5000} FLAT "x-flat.vmdk" 0', "length"),
        (f'RW 8 FLAT "x-flat.vmdk" {(62 << 31) + 1}', "beyond any disk"),
        (f'RW 8 FLAT "x-flat.vmdk" {10**17}', "beyond any disk"),
        ("FLAT 8", "lists no extent"),
        ('FLAT 8 "x-flat.vmdk" 0', "lists no extent"),
        ("", "lists no extent"),
    ],
)
def test_malformed_extent_line(tmp_path: Path, flat: bytes, line: str, words: str) -> None:
    (tmp_path / "x.vmdk").write_text(descriptor(line), encoding="utf-8")
    told = refused(tmp_path / "x.vmdk", DamagedSource, "x.vmdk: its descriptor is damaged", words)
    assert len(told) < 1000


@pytest.mark.parametrize(
    "line",
    [
        'RW FLAT "x-flat.vmdk" 0',
        'RW 8 "x-flat.vmdk" 0',
        'RW 8"FLAT" "x-flat.vmdk" 0',
        "RW 8",
        "RW",
        'RO 8 FLAT "x-flat.vmdk" 0',
        'RW8 FLAT "x-flat.vmdk" 0',
    ],
)
def test_malformed_line_among_others(tmp_path: Path, flat: bytes, line: str) -> None:
    """The disk must not be shown without the extent: what follows would be at the wrong place."""
    text = descriptor(f'RW 8 ZERO\n{line}\nRW 8 FLAT "x-flat.vmdk" 0')
    (tmp_path / "x.vmdk").write_text(text)
    refused(tmp_path / "x.vmdk", DamagedSource, "x.vmdk: its descriptor is damaged")


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ('RW 8 FLATT "x-flat.vmdk" 0', UnsupportedFormat, "FLATT"),
        (f'RW 8 {"X" * 4000} "x-flat.vmdk" 0', UnsupportedFormat, "XXXX"),
        ('NOACCESS 8 FLAT "x-flat.vmdk" 0', UnsupportedFormat, "NOACCESS"),
        (f'RW 8 FLAT "{"n" * 300}.vmdk" 0', SourceMissing, "nnnn"),
        ('RW 8 FLAT "\u001b[31m.vmdk" 0', SourceMissing, "is missing"),
        ('RW 8 FLAT "x.vmdk" 0', DamagedSource, "truncated extent"),
        ('RW 8 SPARSE "x-flat.vmdk"', DamagedSource, "no header of that kind"),
        ('RW 8 VMFSSPARSE "x-flat.vmdk"', DamagedSource, "no header of that kind"),
        ('RW 8 SESPARSE "x-flat.vmdk"', DamagedSource, "no header of that kind"),
    ],
)
def test_extent_line_that_leads_nowhere(
    tmp_path: Path, flat: bytes, line: str, kind: type[VddkfsError], words: str
) -> None:
    (tmp_path / "x.vmdk").write_text(descriptor(line), encoding="utf-8")
    assert len(refused(tmp_path / "x.vmdk", kind, words)) < 1000


@pytest.mark.parametrize(
    "line",
    [
        'RW 8 FLAT "x-flat.vmdk" 0',
        'RW 8 FLAT "x-flat.vmdk"',
        'RW 8 VMFS "x-flat.vmdk"',
        'RW 8 VMFS "x-flat.vmdk" 0',
        '\t rw\t8  flat "x-flat.vmdk"\t0  ',
        'RDONLY 8 FLAT "x-flat.vmdk" 0',
        'RW 8 FLAT "x-flat.vmdk" 0 a77c90a5-4b1f 12',
        'RW 8 FLAT "x-flat.vmdk" 0\r',
        'RW 00008 FLAT "x-flat.vmdk" 000',
    ],
)
def test_extent_lines_that_are_legal(tmp_path: Path, flat: bytes, read: Read, line: str) -> None:
    path = tmp_path / "x.vmdk"
    path.write_bytes(descriptor(line).encode())
    assert not Damaged(path, read).compare(flat)


# The footer of a streamOptimized disk: marker, header, last marker.


@pytest.mark.parametrize(
    ("offset", "form", "value", "words"),
    [
        (-1536, "<Q", 0, "no footer's marker"),
        (-1536, "<Q", 2, "no footer's marker"),
        (-1528, "<I", 1, "no footer's marker"),
        (-1524, "<I", 0, "no footer's marker"),
        (-1524, "<I", 99, "no footer's marker"),
        (-1024, "<4s", b"KDMW", "no header"),
        (-1024, "<4s", b"COWD", "no header"),
        (-1024, "<4s", bytes(4), "no header"),
        (-1012, "<Q", CAPACITY + 1, "differ"),
        (-1004, "<Q", 2 * GRAIN, "differ"),
        (-1004, "<Q", 7, "grain size of 7"),
        (-968, "<Q", (1 << 64) - 1, "does not say"),
        (-968, "<Q", 0, "grain directory"),
        (-968, "<Q", 1 << 60, "grain directory"),
        (-1016, "<I", 1, "differ"),
        (-980, "<I", 0, "grain tables of 0"),
        (-512, "<Q", 1, "last marker"),
        (-504, "<I", 5, "last marker"),
        (-500, "<I", 3, "last marker"),
    ],
)
def test_wrong_footer(
    tmp_path: Path, offset: int, form: str, value: int | bytes, words: str
) -> None:
    path, file = written(tmp_path, STREAM)
    patch(file, offset, form, value)
    with pytest.raises(VddkfsError) as caught:
        discover(str(path))
    kind = UnsupportedFormat if type(caught.value) is UnsupportedFormat else DamagedSource
    line = refused(path, kind, file.name)
    assert words in line or kind is UnsupportedFormat


@pytest.mark.parametrize("version", [0, 4, 0xFFFFFFFF])
def test_footer_of_an_unknown_version(tmp_path: Path, version: int) -> None:
    path, file = written(tmp_path, STREAM)
    patch(file, -1020, "<I", version)
    refused(path, UnsupportedFormat, f"version {version}")


def test_no_footer_at_all(tmp_path: Path) -> None:
    path, file = written(tmp_path, STREAM)
    os.truncate(file, file.stat().st_size - 1536)
    refused(path, DamagedSource, "no footer's marker", "not complete")


def test_bytes_behind_the_footer(tmp_path: Path) -> None:
    path, file = written(tmp_path, STREAM)
    with open(file, "ab") as stream:
        stream.write(bytes(SECTOR))
    refused(path, DamagedSource, "footer")


# Compressed grains.


def grain_at(file: Path, number: int) -> int:
    """Return the byte of the marker of a grain of the tables-first disk."""
    directory = field(file, 56, "<Q")
    table = field(file, directory * SECTOR + number // ENTRIES * 4, "<I")
    return field(file, table * SECTOR + number % ENTRIES * 4, "<I") * SECTOR


def lost(number: int) -> list[int]:
    return list(range(number * GRAIN, (number + 1) * GRAIN))


@pytest.mark.parametrize("number", [0, 5, CAPACITY // GRAIN])
@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (0, "<Q", 1),
        (0, "<Q", 3 * GRAIN),
        (0, "<Q", (1 << 64) - 1),
        (8, "<I", 0),
        (8, "<I", 1),
        (8, "<I", (1 << 31) - 1),
        (8, "<I", (1 << 32) - 1),
        (12, "<2s", b"\0\0"),
        (12, "<2s", b"\x78\x9d"),
        (14, "<B", 0xFF),
        (40, "<8s", b"\xff" * 8),
    ],
)
def test_broken_grain(
    tmp_path: Path, read: Read, number: int, offset: int, form: str, value: int | bytes
) -> None:
    """The grain is lost, and only that one."""
    path, file = written(tmp_path, TABLES_FIRST)
    patch(file, grain_at(file, number) + offset, form, value)
    found = Damaged(path, read)
    wanted = content(Stream(grains(GRAIN)))
    end = min((number + 1) * GRAIN, CAPACITY)
    assert found.compare(wanted) == list(range(number * GRAIN, end))
    assert all(re.search(r"marker|compressed grain", line) for line in found.lines)


@pytest.mark.parametrize("size", [0, 1, SECTOR, GRAIN * SECTOR - 1, GRAIN * SECTOR + 1, 1 << 22])
def test_grain_that_expands_to_another_length(tmp_path: Path, read: Read, size: int) -> None:
    """Also to very much more: that is not waited for, and takes no memory."""
    path, file = written(tmp_path, TABLES_FIRST)
    packed = zlib.compress(b"\x41" * size, 9)
    marker = struct.pack("<QI", 5 * GRAIN, len(packed))
    patch(file, grain_at(file, 5), f"<{12 + len(packed)}s", marker + packed)
    found = Damaged(path, read)
    assert found.compare(content(Stream(grains(GRAIN)))) == lost(5)


@pytest.mark.parametrize("entry", [2, 20, 1 << 24, (1 << 32) - 1])
@pytest.mark.parametrize("name", ["monolithicSparse", "without footer", "twoGbMaxExtentSparse"])
def test_table_entry_that_leads_elsewhere(
    tmp_path: Path, read: Read, name: str, entry: int
) -> None:
    """Into the metadata, or out of the file."""
    path, file = written(tmp_path, LINKS[name])
    directory = field(file, 56, "<Q")
    table = field(file, directory * SECTOR, "<I")
    patch(file, table * SECTOR + 5 * 4, "<I", entry)
    (extent,) = LINKS[name].extents
    assert isinstance(extent, (Hosted, Stream))
    if name == "twoGbMaxExtentSparse" and entry < 1 << 24:
        # Without an embedded descriptor the metadata may be as short as that: a place like others.
        judge_any(path, read)
        return
    assert Damaged(path, read).compare(content(extent)) == lost(5)


@pytest.mark.parametrize("entry", [1 << 24, (1 << 32) - 1])
@pytest.mark.parametrize("name", ["monolithicSparse", "without footer", "twoGbMaxExtentSparse"])
def test_directory_entry_that_leads_elsewhere(
    tmp_path: Path, read: Read, name: str, entry: int
) -> None:
    path, file = written(tmp_path, LINKS[name])
    directory = field(file, 56, "<Q")
    patch(file, directory * SECTOR, "<I", entry)
    (extent,) = LINKS[name].extents
    assert isinstance(extent, (Hosted, Stream))
    assert Damaged(path, read).compare(content(extent)) == list(range(CAPACITY))
