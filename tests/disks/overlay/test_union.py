"""What an export reads: the fork on top of its source, and which grains it touches."""

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vddkfs.disks.overlay import BLOCK, Extent, Limits, Overlay, SourceDisk
from vddkfs.disks.overlay import union as module
from vddkfs.disks.overlay.union import Union, joined, touched

SECTOR = 512
CAPACITY = 61 * BLOCK + 3 * SECTOR
LIMITS = Limits(reserve=0, grow=64, spare=8, log_room=4 * BLOCK)


class Below:
    """A source with *content*, and data in ranges of sectors only; the rest of it is zeros."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self.ranges = ranges
        self.content = bytearray(CAPACITY)
        for begin, end in ranges:
            self.content[begin:end] = bytes([1 + begin // SECTOR % 255]) * (end - begin)

    def read_into(self, offset: int, into: memoryview) -> None:
        assert offset % SECTOR == len(into) % SECTOR == 0
        assert len(into) > 0
        into[:] = self.content[offset : offset + len(into)]

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.content[offset : offset + size])

    def data(self) -> Iterator[tuple[int, int]]:
        return iter(self.ranges)


ranges = st.lists(
    st.tuples(st.integers(0, CAPACITY // SECTOR), st.integers(0, CAPACITY // SECTOR)).map(
        lambda pair: (min(pair) * SECTOR, max(pair) * SECTOR)
    ),
    max_size=4,
)
writes = st.lists(
    st.tuples(st.integers(0, CAPACITY - 1), st.integers(1, 5 * BLOCK), st.booleans()), max_size=6
)


def apart(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return *found* as an engine's map has it: in order, without overlap."""
    return [pair for pair in joined(sorted(found)) if pair[0] < pair[1]]


@settings(deadline=None, max_examples=60)
@given(ranges, writes, st.sampled_from([BLOCK, 4 * BLOCK]), st.sampled_from([4, 8]))
def test_pieces_and_grains_make_the_merged_image(
    data: list[tuple[int, int]], changes: list[tuple[int, int, bool]], grain: int, piece: int
) -> None:
    below = Below(apart(data))
    expected = bytearray(below.content)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece * BLOCK)
        source = SourceDisk("a", CAPACITY, ())
        overlay = Overlay.open(str(Path(folder, "o")), [source], limits=LIMITS)
        fork = overlay.fork("a", CAPACITY)
        for offset, size, zero in changes:
            size = min(size, CAPACITY - offset)
            expected[offset : offset + size] = bytes(size) if zero else b"\xee" * size
            if zero:
                fork.zero(offset, size, below.read)
            else:
                fork.write(offset, b"\xee" * size, below.read)
        union = Union(fork, below)
        check_pieces(union, expected)
        check_grains(union, fork.extents(), expected, grain)
        overlay.close()


def check_pieces(union: Union, expected: bytearray) -> None:
    found, end = bytearray(CAPACITY), 0
    for piece in union.pieces():
        assert piece.content is not None
        assert piece.offset >= end, "in order, each once"
        end = piece.offset + len(piece.content)
        found[piece.offset : end] = piece.content
    assert len(found) == CAPACITY
    assert found == expected


def check_grains(union: Union, extents: Iterator[Extent], expected: bytearray, size: int) -> None:
    padded = bytes(expected).ljust(-(-CAPACITY // size) * size, b"\0")
    wanted = {
        number
        for each in extents
        for number in range(each.offset // size, -(-(each.offset + each.size) // size))
    }
    seen = []
    for piece in union.grains(size):
        seen.append(piece.offset // size)
        content = bytes(size) if piece.content is None else bytes(piece.content)
        assert content == padded[piece.offset :][:size]
        assert piece.done == len(seen) * size
    assert seen == sorted(wanted)
    assert union.touched_grains(size) == len(wanted)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9))))
def test_joined(pairs: list[tuple[int, int]]) -> None:
    pairs = sorted((begin, begin + size) for begin, size in pairs if size)
    found = list(joined(pairs))
    assert {at for begin, end in found for at in range(begin, end)} == {
        at for begin, end in pairs for at in range(begin, end)
    }
    assert all(one[1] < other[0] for one, other in pairwise(found))


def test_touched() -> None:
    extents = [Extent(0, 1, False), Extent(15, 2, True), Extent(90, 30, False)]
    assert list(touched(extents, 10)) == [(0, 2), (9, 12)]
