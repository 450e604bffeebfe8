"""Locks of ranges: those that overlap come one after the other, in the order of asking."""

import random

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from vddkfs.disks.ranges import RangeLocks

GRAIN = 8


class Holders:
    """Tasks that hold ranges until the test lets them go; *order* is that of their getting them."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.locks = RangeLocks(GRAIN)
        self.nursery = nursery
        self.order: list[str] = []
        self.holding: dict[str, trio.Event] = {}
        self.scopes: dict[str, trio.CancelScope] = {}

    async def _hold(self, name: str, start: int, end: int) -> None:
        with trio.CancelScope() as self.scopes[name]:
            async with self.locks.hold(start, end):
                self.order.append(name)
                self.holding[name] = trio.Event()
                try:
                    await self.holding[name].wait()
                finally:
                    del self.holding[name]

    async def ask(self, name: str, start: int, end: int) -> None:
        self.nursery.start_soon(self._hold, name, start, end)
        await trio.testing.wait_all_tasks_blocked()

    async def let_go(self, name: str) -> None:
        self.holding[name].set()
        await trio.testing.wait_all_tasks_blocked()

    async def cancel(self, name: str) -> None:
        self.scopes[name].cancel()
        await trio.testing.wait_all_tasks_blocked()


async def test_ranges_that_overlap_come_one_after_the_other(nursery: trio.Nursery) -> None:
    holders = Holders(nursery)
    await holders.ask("a", 0, 16)
    await holders.ask("b", 15, 20)
    await holders.ask("c", 24, 32)
    assert holders.order == ["a", "c"]
    await holders.let_go("a")
    assert holders.order == ["a", "c", "b"]


async def test_neighbours_do_not_wait_and_ranges_are_rounded_to_the_grain(
    nursery: trio.Nursery,
) -> None:
    holders = Holders(nursery)
    await holders.ask("a", 0, 8)
    await holders.ask("b", 8, 9)
    await holders.ask("same grain", 15, 16)
    await holders.ask("empty", 8, 8)
    assert holders.order == ["a", "b", "empty"]
    await holders.let_go("b")
    assert holders.order[-1] == "same grain"


async def test_whoever_asked_first_comes_first_and_nobody_waits_for_ever(
    nursery: trio.Nursery,
) -> None:
    """A long range waits for two short ones, and no later short one overtakes it."""
    holders = Holders(nursery)
    await holders.ask("left", 0, 8)
    await holders.ask("right", 24, 32)
    await holders.ask("long", 0, 32)
    await holders.ask("later", 8, 16)
    await holders.ask("last", 24, 32)
    assert holders.order == ["left", "right"]
    await holders.let_go("right")
    assert holders.order == ["left", "right"]
    await holders.let_go("left")
    assert holders.order == ["left", "right", "long"]
    await holders.let_go("long")
    assert holders.order[:3] == ["left", "right", "long"]
    assert set(holders.order[3:]) == {"later", "last"}


async def test_one_that_goes_while_another_is_waited_for_is_not_waited_for_later(
    nursery: trio.Nursery,
) -> None:
    holders = Holders(nursery)
    await holders.ask("left", 0, 8)
    await holders.ask("right", 8, 16)
    await holders.ask("both", 0, 16)
    await holders.let_go("right")
    await holders.let_go("left")
    assert holders.order[-1] == "both"


async def test_a_wait_that_is_cancelled_is_in_nobodys_way(nursery: trio.Nursery) -> None:
    holders = Holders(nursery)
    await holders.ask("a", 0, 8)
    await holders.ask("b", 0, 16)
    await holders.ask("c", 8, 16)
    assert holders.order == ["a"]
    await holders.cancel("b")
    assert holders.order == ["a", "c"]
    await holders.cancel("c")
    await holders.ask("d", 8, 16)
    assert holders.order == ["a", "c", "d"]
    await holders.let_go("a")
    await holders.let_go("d")
    assert holders.locks._held == []


ASKS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 24)), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(asks=ASKS, seed=st.integers(0, 2**32))
async def test_no_two_that_overlap_are_ever_held_at_once(
    asks: list[tuple[int, int]], seed: int
) -> None:
    """Whatever is let go or cancelled when; all that is held is held by those who asked first."""
    chooser = random.Random(seed)
    ranges = {str(number): (start, start + size) for number, (start, size) in enumerate(asks)}
    asked: list[str] = []
    over: set[str] = set()

    def grains(name: str) -> set[int]:
        start, end = ranges[name]
        return set(range(start // GRAIN, -(-end // GRAIN)))

    def expected() -> set[str]:
        left = [name for name in asked if name not in over]
        return {
            name
            for place, name in enumerate(left)
            if not any(grains(name) & grains(before) for before in left[:place])
        }

    async with trio.open_nursery() as nursery:
        holders = Holders(nursery)
        while len(over) < len(ranges):
            todo = [name for name in ranges if name not in asked]
            step = chooser.random()
            if todo and step < 0.5:
                asked.append(todo[0])
                await holders.ask(todo[0], *ranges[todo[0]])
            elif step < 0.8 and holders.holding:
                name = chooser.choice(sorted(holders.holding))
                over.add(name)
                await holders.let_go(name)
            elif asked and len(over) < len(asked):
                name = chooser.choice([one for one in asked if one not in over])
                over.add(name)
                await holders.cancel(name)
            assert set(holders.holding) == expected()
        assert holders.locks._held == []
