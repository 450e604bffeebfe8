"""The table of functions, and the book-keeping over calls."""

import time

from vddkfs.engines.vddk.calls import BY_NAME, CALLS, PREFIX, SESSION_CALLS, Ledger


def test_names_are_unique_and_prefixed() -> None:
    assert len(BY_NAME) == len(CALLS)
    assert all(name.startswith(PREFIX) for name in BY_NAME)
    assert set(BY_NAME) >= SESSION_CALLS


def test_what_later_releases_brought_is_optional() -> None:
    assert not [call.name for call in CALLS if call.required and call.since > (6, 5)]
    assert not BY_NAME["VixDiskLib_QueryAllocatedBlocks"].required
    assert not BY_NAME["VixDiskLib_AllocateConnectParams"].required


def test_the_ledger_counts_and_traces() -> None:
    told: list[tuple[str, float, int, int]] = []
    ledger = Ledger(lambda *call: told.append(call))
    ledger.record("VixDiskLib_Read", time.perf_counter(), 1024, 0)
    ledger.record("VixDiskLib_Read", time.perf_counter(), 0, 14011)
    figures = ledger.snapshot()["VixDiskLib_Read"]
    assert (figures.count, figures.failures, figures.bytes) == (2, 1, 1024)
    assert 0 <= figures.seconds < 60
    assert sum(figures.times.buckets) == 2
    assert [(name, moved, result) for name, _, moved, result in told] == [
        ("VixDiskLib_Read", 1024, 0),
        ("VixDiskLib_Read", 0, 14011),
    ]
    ledger.record("VixDiskLib_Read", time.perf_counter() - 3.0, 0, 0)
    assert (figures.count, sum(figures.times.buckets)) == (2, 2), "a copy of the figures of then"
    assert ledger.snapshot()["VixDiskLib_Read"].times.quantile(1) > 2
