"""The map of a fork against a dict, in leaves so small that runs cross them, and its memory."""

import random
import sys
from array import array
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vddkfs.disks.overlay import table
from vddkfs.disks.overlay.extents import Extent, changed_bytes, kinds, merged
from vddkfs.disks.overlay.table import BELOW, BLOCK, ZERO, BlockMap, Run

BLOCKS = 100
STEPS = st.lists(
    st.tuples(
        st.integers(0, BLOCKS - 1),
        st.sampled_from((1, 1, 2, 5, 16, 40)),
        st.sampled_from(("next", "gap", "zero")),
    ),
    max_size=60,
)


@pytest.fixture
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_BITS", 4)
    monkeypatch.setattr(table, "_LEAF", 16)
    monkeypatch.setattr(table, "_MASK", 15)


def flat(runs: list[Run]) -> dict[int, int]:
    found = {}
    for run in runs:
        for step in range(run.blocks):
            assert run.block + step not in found, "in order, and once"
            place = run.place if run.place in (BELOW, ZERO) else run.place + step
            found[run.block + step] = place
    assert list(found) == sorted(found)
    return found


def all_runs(found: BlockMap) -> list[Run]:
    return [run for leaf in found.changed() for run in leaf]


@pytest.mark.usefixtures("small_leaves")
@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(STEPS, st.integers(0, BLOCKS), st.integers(1, BLOCKS))
def test_against_a_dict(steps: list[tuple[int, int, str]], first: int, count: int) -> None:
    found, model, free = BlockMap(), dict[int, int](), 0
    for block, blocks, kind in steps:
        free += kind == "gap"
        place = ZERO if kind == "zero" else free
        before = [model[each] for each in range(block, block + blocks) if each in model]
        left = found.set(block, blocks, place)
        given_up = [each for start, many in left for each in range(start, start + many)]
        assert sorted(given_up) == sorted(each for each in before if each != ZERO)
        for step in range(blocks):
            model[block + step] = ZERO if kind == "zero" else free + step
        free += 0 if kind == "zero" else blocks
    asked = range(first, first + count)
    assert flat(found.runs(first, count)) == {each: model.get(each, BELOW) for each in asked}
    assert found.touched(first, count) == any(each in model for each in asked)
    runs = all_runs(found)
    assert flat(runs) == model
    zeros = sum(place == ZERO for place in model.values())
    assert (found.data_blocks, found.zero_blocks) == (len(model) - zeros, zeros)
    assert found.entries == len(runs)
    assert found.bound == len(model) - zeros + sum(run.place == ZERO for run in runs)
    assert found.entries <= found.bound
    extents = list(merged(found.changed(), BLOCKS * 2 * BLOCK))
    assert all(one.offset + one.size <= two.offset for one, two in pairwise(extents))
    assert sum(extent.size for extent in extents) == changed_bytes(found, BLOCKS * 2 * BLOCK)


def test_a_stream_is_one_run() -> None:
    found = BlockMap()
    for number in range(0, 1000, 10):
        found.set(number, 10, 5000 + number)
    assert all_runs(found) == [Run(0, 1000, 5000)]


def test_what_is_beyond_the_image_does_not_count() -> None:
    found = BlockMap()
    found.set(0, 2, 0)
    assert changed_bytes(found, BLOCK + 512) == BLOCK + 512
    assert list(merged(found.changed(), BLOCK + 512)) == [Extent(0, BLOCK + 512, False)]


def test_scattered_blocks_take_little_memory() -> None:
    """A hundred thousand blocks at the density of ten million over 2 TiB."""
    found, draw = BlockMap(), random.Random(1)
    for place in range(100_000):
        found.set(draw.randrange((1 << 29) // 100), 1, place)
    arrays = sum(sys.getsizeof(each) for leaf in found._leaves.values() for each in leaf)
    leaves = sys.getsizeof(found._leaves) + len(found._leaves) * 2 * sys.getsizeof(array("H"))
    assert (arrays + leaves) / found.entries < 14, "bytes a block; the goal allows 20"
    some = [run for leaf in found.changed() for run in leaf[:5]]
    assert all(found.runs(run.block, run.blocks) == [run] for run in some)


@given(
    st.lists(st.sampled_from((b"\0" * BLOCK, b"d" * BLOCK, bytes(BLOCK - 1) + b"\1")), min_size=1)
)
@settings(derandomize=True, database=None, deadline=None)
def test_zeros_are_found(blocks: list[bytes]) -> None:
    data = b"".join(blocks)
    found = bytearray(b"\xa5" * len(data))
    last = None
    for block, count, content in kinds(memoryview(data)):
        part = bytes(count * BLOCK) if content is None else content
        found[block * BLOCK : (block + count) * BLOCK] = part
        assert content is None or blocks[block] != bytes(BLOCK)
        assert last is None or last != (content is None), "neighbours of a kind are one"
        last = content is None
    assert found == data
