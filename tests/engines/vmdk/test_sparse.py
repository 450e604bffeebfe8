"""The hosted sparse header: every field that is used is checked first."""

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vddkfs.engines.vmdk.descriptor import MAX_CAPACITY
from vddkfs.engines.vmdk.sparse import layout_of, parse_header, with_footer
from vddkfs.errors import DamagedSource, UnsupportedFormat, VddkfsError

MIB = 1 << 20


def test_plain(sparse_header: Callable[..., bytes]) -> None:
    header = parse_header(sparse_header(capacity=20481), "x.vmdk", MIB)
    assert (header.version, header.capacity, header.grain) == (1, 20481, 128)
    assert (header.packed, header.marked, header.at_end) == (False, False, False)
    assert header.clean
    layout = layout_of(header, "x.vmdk", MIB)
    assert (layout.grains, layout.tables, layout.directory) == (161, 1, 21)
    assert (layout.spare_directory, layout.notes) == (0, ())
    assert (header.directory, header.lowest, header.zero_grains) == (21, 21, False)
    assert (header.descriptor_offset, header.descriptor_sectors) == (1, 20)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_versions(sparse_header: Callable[..., bytes], version: int) -> None:
    assert parse_header(sparse_header(version=version), "x", MIB).version == version


@pytest.mark.parametrize("grain", [8, 16, 128, 4096])
def test_grain_sizes(sparse_header: Callable[..., bytes], grain: int) -> None:
    assert parse_header(sparse_header(grain=grain), "x", MIB).grain == grain


def test_zero_grain_flag(sparse_header: Callable[..., bytes]) -> None:
    assert parse_header(sparse_header(flags=7), "x", MIB).zero_grains


def test_redundant_directory_when_there_is_no_other(sparse_header: Callable[..., bytes]) -> None:
    assert parse_header(sparse_header(directory=0, redundant=30), "x", MIB).directory == 30


def test_descriptor_behind_the_directory(sparse_header: Callable[..., bytes]) -> None:
    header = parse_header(sparse_header(descriptor_offset=100, directory=5), "x", MIB)
    assert header.lowest == 1


def test_newlines_matter_only_when_flagged(sparse_header: Callable[..., bytes]) -> None:
    assert parse_header(sparse_header(flags=2, newlines=b"\0\0\0\0"), "x", MIB)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"capacity": 0}, "capacity of 0 sectors"),
        ({"capacity": MAX_CAPACITY + 1}, "62 TiB"),
        ({"capacity": (1 << 64) - 1}, "62 TiB"),
        ({"grain": 0}, "grain size of 0"),
        ({"grain": 4}, "grain size of 4"),
        ({"grain": 129}, "grain size of 129"),
        ({"grain": 8192}, "grain size of 8192"),
        ({"grain": 1 << 63}, "grain size"),
        ({"entries": 0}, "grain tables of 0 entries"),
        ({"entries": 1 << 31}, "grain tables"),
        ({"directory": 0}, "grain directory"),
        ({"directory": 5}, "grain directory"),
        ({"directory": 2048}, "grain directory"),
        ({"directory": (1 << 64) - 2}, "grain directory"),
        ({"capacity": MAX_CAPACITY}, "grain directory"),
        ({"descriptor_offset": 5000}, "embedded descriptor"),
        ({"descriptor_sectors": 1 << 60}, "embedded descriptor"),
        ({"newlines": b"\n \n\n"}, "text mode"),
    ],
)
def test_damaged(sparse_header: Callable[..., bytes], fields: dict[str, int], words: str) -> None:
    with pytest.raises(DamagedSource, match=r"^x\.vmdk: ") as caught:
        layout_of(parse_header(sparse_header(**fields), "x.vmdk", MIB), "x.vmdk", MIB)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 0x30001, "version": 3},
        {"flags": 0x30001, "compression": 2},
        {"compression": 1},
        {"flags": 3 | 1 << 17},
    ],
)
def test_unknown_compression(sparse_header: Callable[..., bytes], fields: dict[str, int]) -> None:
    with pytest.raises(UnsupportedFormat, match=r"grains.*qemu-img convert"):
        parse_header(sparse_header(**fields), "x.vmdk", MIB)


def test_redundant_directory_for_one_outside_the_file(
    sparse_header: Callable[..., bytes],
) -> None:
    header = parse_header(sparse_header(directory=1 << 40, redundant=30), "x.vmdk", MIB)
    layout = layout_of(header, "x.vmdk", MIB)
    assert (layout.directory, layout.spare_directory) == (30, 0)
    assert "the redundant one is used" in layout.notes[0]


def test_redundant_directory_outside_the_file(sparse_header: Callable[..., bytes]) -> None:
    header = parse_header(sparse_header(directory=30, redundant=1 << 40), "x.vmdk", MIB)
    layout = layout_of(header, "x.vmdk", MIB)
    assert (layout.directory, layout.spare_directory) == (30, 0)
    assert "redundant" in layout.notes[0]


def packed(sparse_header: Callable[..., bytes], **fields: int) -> bytes:
    return sparse_header(**{"flags": 0x30001, "compression": 1, "version": 3, **fields})


AT_END = (1 << 64) - 1


def footer(header: bytes, first: bytes = b"", last: bytes = b"") -> bytes:
    first = first or struct.pack("<QII", 1, 0, 3)
    return first.ljust(512, b"\0") + header + last.ljust(512, b"\0")


def test_footer_names_the_directory(sparse_header: Callable[..., bytes]) -> None:
    header = parse_header(packed(sparse_header, directory=AT_END), "x.vmdk", MIB)
    assert header.at_end
    end = footer(packed(sparse_header, directory=99))
    found = with_footer(header, end, "x.vmdk", MIB)
    assert (found.directory, found.at_end, found.packed, found.marked) == (99, False, True, True)
    assert layout_of(found, "x.vmdk", MIB).packed


@pytest.mark.parametrize(
    ("first", "fields", "last", "cut", "words"),
    [
        (b"", {}, b"", 1, "are too few"),
        (struct.pack("<QII", 1, 0, 2), {}, b"", 0, "no footer's marker"),
        (struct.pack("<QII", 1, 5, 3), {}, b"", 0, "no footer's marker"),
        (b"", {"magic": b"KDMW"}, b"", 0, "no header"),
        (b"", {}, b"\1", 0, "last marker"),
        (b"", {"capacity": 20479}, b"", 0, "differ"),
        (b"", {"grain": 64}, b"", 0, "differ"),
        (b"", {"directory": AT_END}, b"", 0, "does not say"),
    ],
)
def test_wrong_footer(
    sparse_header: Callable[..., bytes],
    first: bytes,
    fields: dict[str, Any],
    last: bytes,
    cut: int,
    words: str,
) -> None:
    header = parse_header(packed(sparse_header, directory=AT_END), "x.vmdk", MIB)
    end = footer(packed(sparse_header, **{"directory": 99, **fields}), first, last)
    with pytest.raises(DamagedSource, match=r"^x\.vmdk: ") as caught:
        with_footer(header, end[cut:], "x.vmdk", MIB)
    assert words in str(caught.value)


def test_unknown_version(sparse_header: Callable[..., bytes]) -> None:
    with pytest.raises(UnsupportedFormat, match="version 4"):
        parse_header(sparse_header(version=4), "x.vmdk", MIB)


@given(st.integers(0, 79), st.binary(min_size=1, max_size=16))
def test_any_header_is_understood_or_refused(at: int, junk: bytes) -> None:
    good = struct.pack(
        "<4sIIQQQQIQQQB4sH", b"KDMV", 1, 3, 20480, 128, 1, 20, 512, 0, 21, 128, 0, b"\n \r\n", 0
    ).ljust(512, b"\0")
    raw = bytearray(good)
    raw[at : at + len(junk)] = junk
    try:
        layout = layout_of(parse_header(bytes(raw), "x", MIB), "x", MIB)
    except VddkfsError:
        return
    assert layout.directory * 512 + layout.tables * 4 <= MIB
    assert 0 < layout.capacity <= MAX_CAPACITY
