"""`vddkfs check`, the walk: damage to COWD, seSparse and streamOptimized extents."""

import os
import struct
import zlib
from pathlib import Path

import pytest

from tests.engines.vmdk.check.checking import (
    HEALTHY,
    SECTOR,
    Shape,
    events,
    number_at,
    patch,
    write,
)
from tests.engines.vmdk.check.checking import shapes as all_shapes
from tests.engines.vmdk.makers import Grains
from tests.engines.vmdk.makers_esx import Cowd, SeSparse
from tests.engines.vmdk.makers_stream import Stream

FILE = "0-s001.vmdk"


def shapes(folder: Path) -> list[tuple[str, int, int]]:
    """Return (code, sector, sectors) of all damage, which must be all there is."""
    found: list[Shape] = all_shapes(folder)
    assert {one[0] for one in found} <= {"damage"}
    assert {one[2] for one in found} <= {FILE}
    return [(code, sector, sectors) for _, code, _, sector, sectors in found]


def content(count: int, size: int) -> dict[int, bytes]:
    return {number: bytes([number + 1]) * (size * SECTOR) for number in range(count)}


@pytest.fixture
def cowd(tmp_path: Path) -> tuple[Path, int]:
    """A COWD extent of one table with four grains of a sector, and where its table is in bytes."""
    path = write(tmp_path, "cowd", Cowd(Grains(8192, 1, content(4, 1)))).parent / FILE
    assert shapes(tmp_path) == []
    return path, number_at(path, 4 * SECTOR) * SECTOR


def test_cowd_grains(cowd: tuple[Path, int], tmp_path: Path) -> None:
    path, table = cowd
    good = path.read_bytes()
    first = number_at(path, table)
    patch(path, table, struct.pack("<I", 3))
    found = all_shapes(tmp_path)
    assert ("damage", "grain-place", FILE, 0, 1) in found
    path.write_bytes(good)
    patch(path, table + 4, struct.pack("<I", 1 << 31))
    assert ("grain-outside", 1, 1) in shapes(tmp_path)
    path.write_bytes(good)
    patch(path, table + 8, struct.pack("<I", first))
    assert shapes(tmp_path) == [("overlap", 0, 1), ("overlap", 2, 1)]
    path.write_bytes(good)
    patch(path, table + 400, struct.pack("<I", 4))
    assert shapes(tmp_path) == [("overlap", -1, 0), ("overlap", 100, 1)]
    path.write_bytes(good)
    patch(path, table + 400, struct.pack("<I", table // SECTOR + 31))
    assert shapes(tmp_path) == [("overlap", 0, 4096), ("overlap", 100, 1)]


def test_cowd_tables(cowd: tuple[Path, int], tmp_path: Path) -> None:
    path, table = cowd
    patch(path, 4 * SECTOR + 4, struct.pack("<I", 2))
    assert shapes(tmp_path) == [("table-place", 4096, 4096)]
    patch(path, 4 * SECTOR + 4, struct.pack("<I", 1 << 30))
    assert shapes(tmp_path) == [("table-outside", 4096, 4096)]
    patch(path, 4 * SECTOR + 4, struct.pack("<I", table // SECTOR))
    assert ("overlap", 0, 4096) in shapes(tmp_path)
    assert ("overlap", 4096, 4096) in shapes(tmp_path)


def test_cowd_that_belongs_to_nothing(tmp_path: Path) -> None:
    """Only up to the mark of what is free: the rest was taken in advance."""
    path = write(tmp_path, "cowd", Cowd(Grains(8192, 8, content(40, 8)))).parent / FILE
    table = number_at(path, 4 * SECTOR) * SECTOR
    os.truncate(path, 16 << 20)
    assert shapes(tmp_path) == []
    patch(path, table + 40, bytes(80))
    (one,) = events(tmp_path)[0]
    assert (one.level, one.code) == ("warning", "unreferenced")
    assert "81920 bytes" in one.what


@pytest.mark.parametrize("damage", [b"COWX", b"COWD\2", b""])
def test_cowd_headers(damage: bytes, cowd: tuple[Path, int], tmp_path: Path) -> None:
    path, _ = cowd
    if damage:
        patch(path, 0, damage)
    else:
        os.truncate(path, 2000)
    ((level, code, _, sector, sectors),) = all_shapes(tmp_path)
    if damage == b"COWD\2":
        assert (level, code, sector) == ("unchecked", "unsupported", -1)
    else:
        assert (level, code, sector, sectors) == ("damage", "header", 0, 8192)


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, int, int]:
    """An seSparse extent of two tables, and where directory and tables are in bytes."""
    grains = content(4, 8) | {4096: b"x" * 4096, 4097: b"y" * 4096}
    path = write(tmp_path, "sesparse", SeSparse(Grains(8 * 9000, 8, grains))).parent / FILE
    assert shapes(tmp_path) == []
    return path, number_at(path, 128, 8) * SECTOR, number_at(path, 144, 8) * SECTOR


def wide_entry(kind: int, grain: int) -> bytes:
    return struct.pack("<Q", kind << 60 | (grain & 0xFFF) << 48 | grain >> 12)


@pytest.mark.parametrize(
    ("number", "raw", "expected"),
    [
        (2, wide_entry(4, 2), [("entry", 16, 8)]),
        (2, wide_entry(15, 0), [("entry", 16, 8)]),
        (7, struct.pack("<Q", 5), [("entry", 56, 8)]),
        (2, wide_entry(3, 1), [("overlap", 8, 8), ("overlap", 16, 8)]),
        (9, wide_entry(3, 5), [("overlap", 72, 8), ("overlap", 4097 * 8, 8)]),
        (2, wide_entry(3, 99999), [("grain-outside", 16, 8)]),
        (2, wide_entry(3, (1 << 60) - 1), [("grain-outside", 16, 8)]),
        (2, wide_entry(0, 0), []),
        (2, wide_entry(1, 77), []),
        (2, wide_entry(2, 77), []),
    ],
)
def test_sesparse_grains(
    number: int,
    raw: bytes,
    expected: list[tuple[str, int, int]],
    wide: tuple[Path, int, int],
    tmp_path: Path,
) -> None:
    path, _, tables = wide
    patch(path, tables + number * 8, raw)
    assert shapes(tmp_path) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (1 << 60 | 3, [("table-place", 32768, 32768)]),
        (1 << 60 | 1 << 32 | 1, [("table-place", 32768, 32768)]),
        (2 << 60 | 1, [("table-place", 32768, 32768)]),
        (1, [("table-place", 32768, 32768)]),
        (0, []),
    ],
)
def test_sesparse_directory(
    raw: int, expected: list[tuple[str, int, int]], wide: tuple[Path, int, int], tmp_path: Path
) -> None:
    path, directory, _ = wide
    patch(path, directory + 8, struct.pack("<Q", raw))
    assert shapes(tmp_path) == expected


def test_a_sesparse_table_that_is_used_twice(wide: tuple[Path, int, int], tmp_path: Path) -> None:
    path, directory, tables = wide
    patch(path, directory + 8, struct.pack("<Q", 1 << 60))
    assert shapes(tmp_path) == [
        ("overlap", 0, 32),
        ("overlap", 32768, 32),
        ("overlap", 0, 32768),
        ("overlap", 32768, 32768),
    ]
    last = events(tmp_path)[0][-1]
    assert f"sectors {tables // SECTOR} to {tables // SECTOR + 63} of the file" in last.what


def test_a_sesparse_journal_that_was_not_replayed(
    wide: tuple[Path, int, int], tmp_path: Path
) -> None:
    """That the file cannot be read does not keep its tables from being looked at."""
    path, _, tables = wide
    patch(path, number_at(path, 80, 8) * SECTOR + 24, b"\1")
    assert shapes(tmp_path) == [("journal", 0, 72000)]
    patch(path, tables + 16, wide_entry(7, 2))
    assert shapes(tmp_path) == [("journal", 0, 72000), ("entry", 16, 8)]


def test_sesparse_areas_that_overlap(wide: tuple[Path, int, int], tmp_path: Path) -> None:
    path, _, tables = wide
    patch(path, 192, struct.pack("<Q", tables // SECTOR + 100))
    whats = [one.what for one in events(tmp_path)[0] if one.code == "overlap"]
    assert any("area of grain tables" in what and "area of grains" in what for what in whats)


@pytest.mark.parametrize("size", [100, 512, 1024, 20000])
def test_sesparse_that_is_cut(size: int, wide: tuple[Path, int, int], tmp_path: Path) -> None:
    path, _, _ = wide
    os.truncate(path, size)
    found = shapes(tmp_path)
    assert found
    assert found[0][0] in ("header", "table-outside")


@pytest.fixture(params=[True, False], ids=["footer", "tables-first"])
def stream(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A streamOptimized extent with four grains of 8 sectors."""
    extent = Stream(Grains(8 * 600, 8, content(4, 8)), footer=request.param)
    path = write(tmp_path, "stream", extent).parent / FILE
    assert shapes(tmp_path) == []
    return path


def grain_at(path: Path, number: int) -> int:
    """Return the byte where the marker of a grain is."""
    raw = path.read_bytes()
    for here in range(SECTOR, len(raw), SECTOR):
        says, size = struct.unpack_from("<QI", raw, here)
        if says == number * 8 and size and raw[here + 12] & 15 == 8:
            return here
    raise AssertionError(number)


def test_a_marker_of_another_grain(stream: Path, tmp_path: Path) -> None:
    """The grain that is there belongs to nothing then."""
    patch(stream, grain_at(stream, 2), struct.pack("<Q", 8 * 77))
    assert [one[:2] for one in all_shapes(tmp_path)] == [
        ("damage", "marker"),
        ("warning", "unreferenced"),
    ]


def test_a_marker_of_no_grain(stream: Path, tmp_path: Path) -> None:
    patch(stream, grain_at(stream, 2), struct.pack("<Q", 17))
    assert all_shapes(tmp_path) == [
        ("damage", "marker", FILE, 16, 8),
        (broken_chain(stream), "markers", FILE, -1, 0),
    ]


def broken_chain(path: Path) -> str:
    """Return how bad it is that the markers of a file do not lead to its end."""
    return "damage" if number_at(path, 56, 8) == (1 << 64) - 1 else "warning"


@pytest.mark.parametrize("size", [0, 1 << 31, 3 * 4096])
def test_a_marker_of_an_absurd_size(size: int, stream: Path, tmp_path: Path) -> None:
    patch(stream, grain_at(stream, 2) + 8, struct.pack("<I", size))
    found = all_shapes(tmp_path)
    assert found[0] == ("damage", "marker", FILE, 16, 8)
    assert (broken_chain(stream), "markers", FILE, -1, 0) in found


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"\x78\xff" + b"\xff" * 30, "damaged"),
        (zlib.compress(b"x" * 4095), "expands to 4095 bytes"),
        (zlib.compress(b"x" * 4097), "expands to more than 4096 bytes"),
        (zlib.compress(b"x" * 4096)[:-5], "expands to"),
    ],
    ids=["noise", "short", "long", "cut"],
)
def test_a_grain_that_does_not_expand(raw: bytes, word: str, stream: Path, tmp_path: Path) -> None:
    here = grain_at(stream, 2)
    room = 12 + number_at(stream, here + 8)
    patch(stream, here + 8, struct.pack("<I", len(raw)) + raw)
    assert len(raw) <= -(-room // SECTOR) * SECTOR - 12
    (one,) = events(tmp_path)[0]
    assert (one.level, one.code, one.sector, one.sectors) == ("damage", "compressed", 16, 8)
    assert word in one.what


def test_a_wrong_checksum_of_a_grain(stream: Path, tmp_path: Path) -> None:
    here = grain_at(stream, 2)
    last = here + 12 + number_at(stream, here + 8) - 1
    patch(stream, last, bytes([stream.read_bytes()[last] ^ 1]))
    assert shapes(tmp_path) == [("compressed", 16, 8)]


def table_at(path: Path) -> int:
    """Return the byte of the first table, wherever the directory is named."""
    at = 56 if number_at(path, 56, 8) != (1 << 64) - 1 else path.stat().st_size - 1024 + 56
    return number_at(path, number_at(path, at, 8) * SECTOR) * SECTOR


def test_a_compressed_grain_that_no_table_knows(stream: Path, tmp_path: Path) -> None:
    patch(stream, table_at(stream) + 8, bytes(4))
    assert all_shapes(tmp_path) == [("warning", "unreferenced", FILE, -1, 0)]


def test_two_entries_for_one_compressed_grain(stream: Path, tmp_path: Path) -> None:
    table = table_at(stream)
    patch(stream, table + 8, struct.pack("<I", number_at(stream, table + 4)))
    found = all_shapes(tmp_path)
    assert ("damage", "marker", FILE, 16, 8) in found


def test_a_missing_footer(tmp_path: Path) -> None:
    path = write(tmp_path, "stream", Stream(Grains(8 * 600, 8, content(4, 8)))).parent / FILE
    size = path.stat().st_size
    footer = path.read_bytes()[size - 1024 : size - 512]
    patch(path, size - 1024, b"KDMX")
    assert shapes(tmp_path) == [("footer", 0, 4800)]
    patch(path, size - 1024, footer[:12] + struct.pack("<Q", 5000) + footer[20:])
    (one,) = events(tmp_path)[0]
    assert one.code == "footer"
    assert "differ" in one.what
    patch(path, grain_at(path, 2) + 8, struct.pack("<I", 1 << 31))
    assert [one[0] for one in shapes(tmp_path)] == ["footer", "markers"]
    os.truncate(path, size - 2048)
    assert shapes(tmp_path)[0] == ("footer", 0, 4800)


def test_what_follows_the_last_marker(tmp_path: Path) -> None:
    """Zeros fill a block; anything else is told. A footer must be the last."""
    extent = Stream(Grains(8 * 600, 8, content(4, 8)), footer=False)
    path = write(tmp_path, "stream", extent).parent / FILE
    size = path.stat().st_size
    os.truncate(path, size + 10 * SECTOR)
    assert shapes(tmp_path) == []
    patch(path, size + 5 * SECTOR, b"junk")
    assert all_shapes(tmp_path) == [("warning", "unreferenced", FILE, -1, 0)]
    os.truncate(path, size)
    patch(path, size, b"junk" * 200)
    assert all_shapes(tmp_path) == [("warning", "markers", FILE, -1, 0)]


def test_a_bare_compressed_grain_is_expanded_as_well(tmp_path: Path) -> None:
    path = write(tmp_path, "stream", HEALTHY["stream-bare"]).parent / FILE
    place = number_at(path, table_at(path) + 8) * SECTOR
    patch(path, place + 4, b"\xff" * 10)
    assert shapes(tmp_path) == [("compressed", 16, 8)]


@pytest.mark.parametrize("first", [0, 3, 1 << 20, (1 << 64) - 1])
def test_markers_that_do_not_begin_where_they_should(
    first: int, stream: Path, tmp_path: Path
) -> None:
    patch(stream, 64, struct.pack("<Q", first))
    found = all_shapes(tmp_path)
    assert (broken_chain(stream), "markers", FILE, -1, 0) in found
    assert {one[1] for one in found} <= {"markers", "unreferenced"}
