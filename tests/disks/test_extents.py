"""The allocation map, against a list of booleans and against qemu-img."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vddkfs.disks.extents import DEFAULT_MAX_RUNS, ExtentMap, qemu_map
from vddkfs.engines.base import SECTOR, MapExtent

QEMU_IMG = shutil.which("qemu-img")
deterministic = settings(derandomize=True, deadline=None)

chunks = st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=40)
PLENTY = 1000


def build(
    parts: Sequence[tuple[int, bool]], unknown: int = 0, max_runs: int = DEFAULT_MAX_RUNS
) -> tuple[ExtentMap, list[bool]]:
    """A map of *parts* (count, data) and an unknown tail, and its model: True where data may be."""
    known = sum(count for count, _ in parts)
    allocation = ExtentMap(known + unknown, max_runs)
    for count, data in parts:
        allocation.append(allocation.known, count, data)
    model = [data for count, data in parts for _ in range(count)]
    return allocation, model + [True] * unknown


def shown(allocation: ExtentMap) -> list[bool]:
    """The model that the runs of a map amount to."""
    return [run.data for run in allocation.runs(0, allocation.capacity) for _ in range(run.count)]


def expected_runs(model: list[bool], start: int, end: int) -> list[MapExtent]:
    runs = []
    for data, group in groupby(model[start:end]):
        count = len(list(group))
        runs.append(MapExtent(start, count, data))
        start += count
    return runs


def first(model: list[bool], sector: int, wanted: bool) -> int | None:
    return next((i for i in range(sector, len(model)) if model[i] is wanted), None)


def check_queries(allocation: ExtentMap, model: list[bool]) -> None:
    size = len(model)
    assert allocation.capacity == size
    for sector in range(size):
        hole = first(model, sector, False)
        assert allocation.seek_data(sector) == first(model, sector, True)
        assert allocation.seek_hole(sector) == (size if hole is None else hole)
    for start in range(0, size + 1, 3):
        for end in range(start, size + 1, 5):
            assert allocation.is_hole(start, end) == (not any(model[start:end]))
            assert list(allocation.runs(start, end)) == expected_runs(model, start, end)
    assert list(allocation.runs(0, size + 7)) == expected_runs(model, 0, size)
    assert allocation.seek_data(size) is None
    assert allocation.seek_hole(size) == size
    assert not allocation.is_hole(0, size + 1)


@settings(deterministic, max_examples=150)
@given(parts=chunks, unknown=st.integers(0, 9))
def test_queries_answer_as_a_list_would(parts: list[tuple[int, bool]], unknown: int) -> None:
    allocation, model = build(parts, unknown)
    check_queries(allocation, model)
    known = model[: allocation.known]
    assert allocation.known == len(model) - unknown
    assert allocation.complete == (unknown == 0)
    assert allocation.allocated == allocation.data_sectors == sum(known)


@settings(deterministic, max_examples=50)
@given(parts=chunks)
def test_every_state_on_the_way_is_right(parts: list[tuple[int, bool]]) -> None:
    capacity = sum(count for count, _ in parts)
    allocation, model = ExtentMap(capacity), [True] * capacity
    for count, data in parts:
        here = allocation.known
        allocation.append(here, count, data)
        model[here : here + count] = [data] * count
        assert shown(allocation) == model


@settings(deterministic, max_examples=200)
@given(parts=chunks, unknown=st.integers(0, 9), max_runs=st.integers(1, 8))
def test_coarsening_shows_more_data_and_counts_exactly(
    parts: list[tuple[int, bool]], unknown: int, max_runs: int
) -> None:
    allocation, model = build(parts, unknown, max_runs)
    coarse = shown(allocation)
    known = allocation.known
    assert len(coarse) == len(model)
    assert all(may or not does for may, does in zip(coarse, model, strict=True))
    assert allocation.allocated == sum(model[:known])
    assert allocation.data_sectors == sum(coarse[:known])
    assert sum(run.data for run in allocation.runs(0, known)) <= max_runs
    check_queries(allocation, coarse)
    if sum(run.data for run in expected_runs(model, 0, known)) <= max_runs:
        assert coarse == model


@settings(deterministic, max_examples=100)
@given(parts=chunks, max_runs=st.integers(1, 8))
def test_coarsening_fills_short_holes_and_keeps_long_ones(
    parts: list[tuple[int, bool]], max_runs: int
) -> None:
    allocation, model = build([(1, True), *parts, (1, True)], 0, max_runs)
    kept = [run.count for run in allocation.runs(0, len(model)) if not run.data]
    filled = [
        run.count
        for run in expected_runs(model, 0, len(model))
        if not run.data and not allocation.is_hole(run.sector, run.sector + run.count)
    ]
    assert not kept or not filled or max(filled) < min(kept)


@pytest.mark.parametrize("max_runs", [1, 2, 3, 50])
def test_as_many_runs_as_allowed_are_kept_in_detail(max_runs: int) -> None:
    parts = [(1, False), (1, True)] * max_runs
    allocation, model = build(parts, 0, max_runs)
    assert shown(allocation) == model
    allocation, _ = build([*parts, (9, False), (1, True)], 0, max_runs)
    assert shown(allocation) != model + [False] * 9 + [True]


def test_thresholds_double() -> None:
    allocation = ExtentMap(10_000, max_runs=4)
    for hole in (1, 2, 3, 4):
        allocation.extend([MapExtent(allocation.known, 1, True)])
        allocation.extend([MapExtent(allocation.known, hole, False)])
    # The fifth run fills the hole of 1, the sixth those of 2 and 3.
    for hole in (100, 3):
        allocation.extend([MapExtent(allocation.known, 1, True)])
        allocation.extend([MapExtent(allocation.known, hole, False)])
    allocation.append(allocation.known, 1, True)
    holes = [run.count for run in allocation.runs(0, allocation.known) if not run.data]
    assert holes == [4, 100]
    assert allocation.allocated == 7


def test_a_fragmented_image_stays_small() -> None:
    allocation = ExtentMap(600_000, max_runs=PLENTY)
    while not allocation.complete:
        here = allocation.known
        # A long hole now and then survives, the many short ones do not.
        hole = 512 if here % 60_000 < 3 else 2
        allocation.append(here, 1, True)
        allocation.append(here + 1, min(hole, allocation.capacity - here - 1), False)
    runs = list(allocation.runs(0, allocation.capacity))
    assert sum(run.data for run in runs) <= PLENTY
    assert any(run.count == 512 and not run.data for run in runs)
    assert allocation.allocated < 201_000 < allocation.data_sectors


def test_neighbours_are_merged() -> None:
    allocation, _ = build([(3, True), (2, True), (0, False), (4, False), (5, False), (1, True)])
    assert list(allocation.runs(0, 15)) == [
        MapExtent(0, 5, True),
        MapExtent(5, 9, False),
        MapExtent(14, 1, True),
    ]


def test_an_unknown_map_is_all_data() -> None:
    allocation = ExtentMap(100)
    assert allocation.seek_data(7) == 7
    assert allocation.seek_hole(7) == 100
    assert not allocation.is_hole(0, 1)
    assert allocation.allocated == allocation.data_sectors == 0
    assert not allocation.complete


def test_a_map_of_nothing() -> None:
    allocation = ExtentMap(0)
    assert allocation.complete
    assert allocation.seek_data(0) is None
    assert allocation.is_hole(0, 0)
    assert list(allocation.runs(0, 10)) == []


@pytest.mark.parametrize(("sector", "count"), [(0, 1), (11, 1), (10, -1), (10, 91)])
def test_append_refuses_what_does_not_continue_the_map(sector: int, count: int) -> None:
    allocation = ExtentMap(100)
    allocation.append(0, 10, True)
    with pytest.raises(ValueError, match="do not continue"):
        allocation.append(sector, count, False)
    assert allocation.known == 10


@pytest.mark.parametrize(("capacity", "max_runs"), [(-1, 1), (1, 0)])
def test_absurd_maps_are_refused(capacity: int, max_runs: int) -> None:
    with pytest.raises(ValueError, match="a map of"):
        ExtentMap(capacity, max_runs)


# qemu-img

UNIT = 65536 // SECTOR
PATTERNS: list[list[tuple[int, bool]]] = [
    [(3, False), (2, True), (15, False), (1, True), (40, False)],
    [(5, True)],
    [(5, False)],
    [(1, True), (1, False), (1, True), (1, False), (1, True)],
    [],
]


@pytest.mark.skipif(QEMU_IMG is None, reason="qemu-img is not installed")
@pytest.mark.parametrize("pattern", PATTERNS, ids=["mixed", "data", "hole", "striped", "empty"])
def test_qemu_map_is_what_qemu_img_prints(tmp_path: Path, pattern: list[tuple[int, bool]]) -> None:
    allocation, _ = build([(count * UNIT, data) for count, data in pattern])
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        for count, data in pattern:
            if data:
                file.write(b"\x5a" * (count * UNIT * SECTOR))
            else:
                file.seek(count * UNIT * SECTOR, os.SEEK_CUR)
        file.truncate(allocation.capacity * SECTOR)
    command = [str(QEMU_IMG), "map", "--output=json", "-f", "raw", str(disk)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    mine = qemu_map(allocation)
    assert mine == json.loads(printed)
    assert [list(entry) for entry in mine] == [list(entry) for entry in json.loads(printed)]


def test_qemu_map_of_an_unfinished_map() -> None:
    allocation, _ = build([(8, False)], 8)
    assert [entry["data"] for entry in qemu_map(allocation, depth=1)] == [False, True]
    assert all(entry["depth"] == 1 for entry in qemu_map(allocation, depth=1))
