"""The histogram of times: each counts once, in the right bucket, and quickly."""

import itertools
import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vddkfs.engines.histogram import BOUNDS, BUCKETS, Histogram, merged

TIMES = st.floats(0, 1e9, allow_nan=False)


def of(*times: float) -> Histogram:
    found = Histogram()
    for seconds in times:
        found.observe(seconds)
    return found


def test_the_bounds_are_powers_of_two_from_8_us_to_67_s() -> None:
    assert BOUNDS[0] == 8e-6
    assert BOUNDS[-1] == pytest.approx(67.1, abs=0.01)
    assert all(b == pytest.approx(2 * a) for a, b in itertools.pairwise(BOUNDS))


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [
        (0.0, 0),
        (1e-9, 0),
        (7.9e-6, 0),
        (8.1e-6, 1),
        (15.9e-6, 1),
        (16.1e-6, 2),
        (1e-3, 7),
        (67.0, 23),
        (67.2, 24),
        (1e6, 24),
    ],
)
def test_each_time_is_in_its_bucket(seconds: float, bucket: int) -> None:
    assert of(seconds).buckets == [int(n == bucket) for n in range(BUCKETS + 1)]


@given(st.lists(TIMES))
def test_nothing_is_lost(times: list[float]) -> None:
    found = of(*times)
    assert found.count == sum(found.buckets) == len(times)
    assert found.seconds == pytest.approx(sum(times))
    cumulative = found.cumulative()
    assert len(cumulative) == BUCKETS + 1
    assert cumulative == sorted(cumulative)
    assert cumulative[-1] == len(times)
    for bound, below in zip(BOUNDS, cumulative, strict=False):
        assert below == sum(seconds < bound for seconds in times)


@given(st.lists(TIMES), st.lists(TIMES))
def test_histograms_are_joined_and_go_over_the_wire(some: list[float], more: list[float]) -> None:
    joined = merged([of(*some), of(*more)])
    assert joined.buckets == of(*some, *more).buckets
    assert joined.seconds == pytest.approx(sum(some) + sum(more))
    again = Histogram(joined.buckets, joined.seconds)
    assert (again.buckets, again.seconds) == (joined.buckets, joined.seconds)


def test_what_is_joined_is_a_copy() -> None:
    live = of(1e-3)
    copy = merged([live])
    live.observe(1e-3)
    assert (copy.count, live.count) == (1, 2)


@given(st.lists(st.floats(0, 60), min_size=1), st.floats(0, 1))
def test_a_quantile_is_no_more_than_a_bucket_wrong(times: list[float], share: float) -> None:
    found = of(*times).quantile(share)
    assert found is not None
    assert found <= max(2 * max(times), BOUNDS[0])
    below = sum(seconds <= max(2 * found, BOUNDS[0]) for seconds in times)
    assert below >= share * len(times) - 1e-9


def test_quantiles() -> None:
    assert Histogram().quantile(0.5) is None
    times = of(*[100e-6] * 98, 0.1, 0.1)
    median, p99 = times.quantile(0.5), times.quantile(0.99)
    assert median == pytest.approx(96e-6, rel=0.05), "half way between 64 and 128 us"
    assert p99 is not None
    assert 0.065 <= p99 <= 0.132
    assert of(500.0).quantile(0.5) == BOUNDS[-1], "that much at least"


def test_an_observation_costs_next_to_nothing() -> None:
    found = Histogram()
    best = min(timeit.repeat(lambda: found.observe(123e-6), number=20_000, repeat=7)) / 20_000
    assert best < 2e-6, "about 0.15 us on an idle machine"
