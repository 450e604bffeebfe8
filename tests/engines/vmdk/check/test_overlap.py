"""Overlaps against a model that keeps every slot in a list."""

import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vddkfs.engines.vmdk.check import overlap
from vddkfs.engines.vmdk.check.overlap import Claim, Comparison, Marks, Ranges, Window

SLOTS = 200


def compare(
    claims: list[Claim], slots: int = SLOTS, window: int = 1 << 20, count_from: int = 0
) -> Comparison:
    comparison = Comparison(lambda: iter([None, *claims]), slots, window, count_from)
    for _ in comparison.run():
        pass
    return comparison


@st.composite
def any_claim(draw: st.DrawFn) -> Claim:
    size = draw(st.sampled_from([1, 4, 7, 8, 16]))
    start = draw(st.integers(0, SLOTS - 1))
    count = draw(st.integers(1, min(SLOTS - start, 5 * size)))
    return Claim(start, count, draw(st.sampled_from("gt")), draw(st.integers(0, 9)), size)


def pieces(claim: Claim) -> list[tuple[int, int, str, int]]:
    return [
        (at, min(at + claim.size, claim.end), claim.kind, claim.number + number)
        for number, at in enumerate(range(claim.start, claim.end, claim.size))
    ]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(any_claim(), max_size=12),
    st.sampled_from([8, 16, 64, 1 << 20]),
    st.integers(0, SLOTS),
)
def test_against_a_model(claims: list[Claim], window: int, count_from: int) -> None:
    counted = Counter(slot for claim in claims for slot in range(claim.start, claim.end))
    found = compare(claims, window=window, count_from=count_from)
    assert found.taken == sum(slot >= count_from for slot in counted)
    assert found.beyond == 0
    twice = {slot for slot, times in counted.items() if times > 1}
    told = [slot for one in found.overlaps for slot in range(one.start, one.start + one.count)]
    assert set(told) == twice
    assert len(told) == len(twice)
    for one in found.overlaps:
        stop = one.start + one.count
        mine = [claim for claim in claims if claim.start < stop and claim.end > one.start]
        assert len(one.owners) + one.more == len(mine) >= 2
        for owner, claim in zip(one.owners, mine, strict=False):
            touched = [p for p in pieces(claim) if p[0] < stop and p[1] > one.start]
            assert pieces(owner) == touched


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 40)), max_size=20))
def test_a_window_tells_what_was_taken_before(wanted: list[tuple[int, int]]) -> None:
    window = Window(1000, 140)
    taken: set[int] = set()
    for start, count in wanted:
        told = window.take(1000 + start, 1000 + start + count)
        slots = {slot for begin, stop in told for slot in range(begin, stop)}
        assert slots == taken & set(range(1000 + start, 1000 + start + count))
        assert told == sorted(told)
        taken |= set(range(1000 + start, 1000 + start + count))


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 9)), max_size=60))
def test_ranges_are_joined(wanted: list[tuple[int, int]]) -> None:
    ranges = Ranges()
    for start, count in wanted:
        ranges.add(start, start + count)
    told = ranges.merged()
    slots = [slot for start, stop in told for slot in range(start, stop)]
    assert slots == sorted({s for start, count in wanted for s in range(start, start + count)})
    assert all(one[1] < two[0] for one, two in pairwise(told))


def test_ranges_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MAX_RANGES", 4)
    ranges = Ranges()
    for start in range(0, 1000, 10):
        ranges.add(start, start + 1)
    assert ranges.merged() == [(0, 1), (10, 11), (20, 21), (30, 991)]


def test_windows_without_claims_cost_no_pass() -> None:
    asked = 0

    def claims() -> list[Claim]:
        nonlocal asked
        asked += 1
        return [Claim(0, 8, "g"), Claim(8 * 40, 8, "g"), Claim(8 * 41 + 4, 8, "g")]

    comparison = Comparison(claims, 8 * 50, 8)
    list(comparison.run())
    assert comparison.passes == 50
    assert asked == 4
    assert comparison.taken == 24
    assert not comparison.overlaps


def test_places_beyond_all_windows_are_counted() -> None:
    """A hostile file may claim to have exabytes: the passes stay bounded."""
    far = Claim(1 << 60, 8, "g", 7)
    found = compare([Claim(0, 8, "g"), far, far], slots=1 << 61, window=8)
    assert found.beyond == 2
    assert found.passes == overlap.MAX_PASSES
    assert found.taken == 8


def test_memory_is_bounded_by_the_window() -> None:
    claims = [Claim(start, 128, "g", start, 128) for start in range(0, 1 << 23, 1 << 13)]
    tracemalloc.start()
    compare(claims, slots=1 << 23, window=1 << 17)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_an_empty_file() -> None:
    found = compare([], slots=0)
    assert (found.taken, found.overlaps) == (0, [])


@settings(deadline=None, max_examples=300)
@given(
    begin=st.integers(0, 20),
    tables=st.lists(st.lists(st.integers(0, SLOTS), max_size=6), max_size=4),
    smallest=st.sampled_from([1, 2]),
    regular=st.booleans(),
)
def test_marks_take_only_what_is_regular(
    begin: int, tables: list[list[int]], smallest: int, regular: bool
) -> None:
    """What they take they judge as the exact comparison does."""
    if regular:
        tables = [[begin + place * 8 if place else 0 for place in table] for table in tables]
    marks = Marks(begin, SLOTS, 8, smallest)
    taken: list[int] = []
    for table in tables:
        grains = [place for place in table if place >= smallest]
        fits = all(begin <= place <= SLOTS - 8 and (place - begin) % 8 == 0 for place in grains)
        assert marks.take(table) == fits
        taken += grains if fits else []
    exact = compare([Claim(place, 8, "g", 0, 8) for place in taken])
    assert marks.twice == bool(exact.overlaps)
    assert marks.count == len(taken)
    if not marks.twice:
        assert exact.taken == 8 * marks.count
