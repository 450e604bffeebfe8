"""Reads under way: those of before a moment are waited for, later ones are not."""

import pytest
import trio
import trio.testing

from vddkfs.fuse.reads import Reads


async def test_without_reads_there_is_nothing_to_wait_for() -> None:
    reads = Reads()
    await reads.drained()
    reads.begin().end()
    await reads.drained()


async def test_only_reads_of_before_are_waited_for() -> None:
    reads = Reads()
    first, second = reads.begin(), reads.begin()
    ended: list[str] = []

    async def drain(name: str) -> None:
        await reads.drained()
        ended.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain, "early")
        await trio.testing.wait_all_tasks_blocked()
        third = reads.begin()
        nursery.start_soon(drain, "late")
        await trio.testing.wait_all_tasks_blocked()
        reads.begin()
        first.end()
        await trio.testing.wait_all_tasks_blocked()
        assert ended == []
        second.end()
        await trio.testing.wait_all_tasks_blocked()
        assert ended == ["early"], "what began later keeps nobody"
        third.end()
    assert ended == ["early", "late"]


async def test_later_reads_may_end_before_earlier_ones() -> None:
    reads = Reads()
    old = reads.begin()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reads.drained)
        await trio.testing.wait_all_tasks_blocked()
        new = reads.begin()
        nursery.start_soon(reads.drained)
        await trio.testing.wait_all_tasks_blocked()
        new.end()
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks, "the old one is still there"
        old.end()


async def test_who_gives_up_waiting_leaves_it_to_the_next() -> None:
    reads = Reads()
    old = reads.begin()
    for _ in range(3):
        with pytest.raises(trio.TooSlowError), trio.fail_after(0):
            await reads.drained()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reads.drained)
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        old.end()
