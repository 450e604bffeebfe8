"""Coalesced runs: whoever asks is served by a run that began after it asked."""

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from vddkfs.disks.coalesce import Coalesced
from vddkfs.errors import VddkfsError


class Work:
    """A job of one second that notes when it ran. *fail* says which runs (from 0) fail."""

    def __init__(self, fail: Callable[[int], bool] = lambda run: False) -> None:
        self.runs: list[tuple[float, float]] = []
        self._fail = fail
        self._busy = False

    async def __call__(self) -> None:
        assert not self._busy, "runs wait for one another"
        self._busy = True
        start = trio.current_time()
        await trio.sleep(1)
        self._busy = False
        self.runs.append((start, trio.current_time()))
        if self._fail(len(self.runs) - 1):
            raise VddkfsError(f"run {len(self.runs) - 1} failed")


@settings(max_examples=50, deadline=None)
@given(delays=st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.7, 2.0, 6.0]), max_size=12))
async def test_each_caller_is_served_by_a_run_begun_after_its_call(delays: list[float]) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)

    async def main() -> None:
        work = Work()
        async with trio.open_nursery() as nursery:
            coalesced = Coalesced(nursery, work)

            async def caller(delay: float) -> None:
                await trio.sleep(delay)
                asked = trio.current_time()
                await coalesced()
                served = trio.current_time()
                assert any(start >= asked and end <= served for start, end in work.runs)
                assert served - asked <= 2.001, "it waits for the run under way and for its own"

            for delay in delays:
                nursery.start_soon(caller, delay)

    await trio.to_thread.run_sync(lambda: trio.run(main, clock=clock))


async def test_all_who_come_during_a_run_share_the_next(autojump_clock: Any) -> None:
    work = Work()
    async with trio.open_nursery() as service:
        coalesced = Coalesced(service, work)
        async with trio.open_nursery() as callers:
            callers.start_soon(coalesced)
            await trio.sleep(0.5)
            for _ in range(50):
                callers.start_soon(coalesced)
        assert len(work.runs) == 2
        await coalesced()
        assert len(work.runs) == 3, "a run that is over serves nobody who comes later"


async def test_an_error_reaches_all_callers_of_its_run_and_no_others(autojump_clock: Any) -> None:
    errors: list[str] = []

    async with trio.open_nursery() as nursery:
        coalesced = Coalesced(nursery, Work(lambda run: run == 1))

        async def caller(delay: float) -> None:
            await trio.sleep(delay)
            try:
                await coalesced()
                errors.append("")
            except VddkfsError as error:
                errors.append(str(error))

        for delay in (0, 0.1, 0.2, 0.3, 1.5):
            nursery.start_soon(caller, delay)
    assert errors == ["", "run 1 failed", "run 1 failed", "run 1 failed", ""]


async def test_a_bug_in_a_run_is_an_error_for_its_callers_and_ends_nothing(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        await trio.sleep(1)
        if runs == 1:
            raise KeyError("oops")

    async with trio.open_nursery() as nursery:
        coalesced = Coalesced(nursery, work)
        with pytest.raises(VddkfsError, match="a bug"):
            await coalesced()
        await coalesced()
    assert "KeyError: 'oops'" in caplog.text


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_a_cancelled_caller_leaves_the_run_to_the_others(
    leaver: int, autojump_clock: Any
) -> None:
    work = Work()
    served: list[int] = []
    async with trio.open_nursery() as nursery:
        coalesced = Coalesced(nursery, work)

        async def caller(number: int) -> None:
            await trio.sleep(0.1 * number)
            with trio.move_on_after(0.5 if number == leaver else 100):
                await coalesced()
                served.append(number)

        for number in range(3):
            nursery.start_soon(caller, number)
    assert sorted(served) == [n for n in range(3) if n != leaver]
    assert len(work.runs) == 2


async def test_all_callers_gone_does_not_stop_later_ones(autojump_clock: Any) -> None:
    work = Work()
    async with trio.open_nursery() as nursery:
        coalesced = Coalesced(nursery, work)
        with trio.move_on_after(0.5):
            await coalesced()
        await coalesced()
        assert len(work.runs) == 2
        await trio.testing.wait_all_tasks_blocked()
        await coalesced()
        assert len(work.runs) == 3
