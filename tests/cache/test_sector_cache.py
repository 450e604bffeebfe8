"""The sector cache against a source whose every sector says where and when it was read."""

import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vddkfs.cache.arena import BLOCK, FRAME, Arena
from vddkfs.cache.frames import DiskCache, SectorCache
from vddkfs.cache.sector_cache import ImageCache
from vddkfs.engines.base import SECTOR
from vddkfs.errors import EngineError

MIB = 1024 * 1024
Stamp = Callable[[int, int, int], bytes]


@asynccontextmanager
async def caches(
    source: Any, size: int = 16 * MIB, capacity: int = 64 * MIB, images: int = 1
) -> AsyncIterator[list[ImageCache]]:
    arena = Arena(size)
    async with trio.open_nursery() as nursery:
        disk = SectorCache(arena, nursery).disk("disk", source)
        # Its memory is made in a thread; a test that looks at what is under way begins after that.
        disk.release(await disk.slot(FRAME))
        yield [ImageCache(disk, number, capacity) for number in range(images)]
        nursery.cancel_scope.cancel()
    arena.close()


def expected(stamp: Stamp, image: int, start: int, end: int, version: int = 0) -> bytes:
    first = start // SECTOR
    data = b"".join(stamp(image, s, version) for s in range(first, -(-end // SECTOR)))
    return data[start - first * SECTOR : end - first * SECTOR]


def check_pins(disk: DiskCache) -> None:
    """Once nothing is under way, nothing is pinned."""
    for chunk in disk.arena.chunks.get(disk.key, ()):
        assert not chunk.pinned()


async def test_a_hit_is_a_view_of_the_arena_and_asks_nobody(source: Any, make_stamp: Stamp) -> None:
    source.eager = True
    async with caches(source) as [cache]:
        assert cache.read_nowait(0, 4096) is None
        first = await cache.read(0, 4096, False)
        asked = len(source.requests)
        view = cache.read_nowait(1000, 3000)
        assert isinstance(view, memoryview)
        assert view.readonly
        assert bytes(view) == expected(make_stamp, 0, 1000, 3000)
        assert bytes(first) == expected(make_stamp, 0, 0, 4096)
        assert len(source.requests) == asked == 1


async def test_a_scattered_read_fetches_a_block_and_a_stream_a_frame(source: Any) -> None:
    source.eager = True
    async with caches(source) as [cache]:
        await cache.read(10 * MIB + 5, 10 * MIB + 10, False)
        await cache.read(20 * MIB + 5, 20 * MIB + 10, True)
    assert source.requests == [
        (0, 10 * MIB // SECTOR, BLOCK // SECTOR, False),
        (0, 20 * MIB // SECTOR, FRAME // SECTOR, False),
    ]


async def test_a_block_is_fetched_once_however_many_ask(source: Any, make_stamp: Stamp) -> None:
    results = []

    async def reader(cache: ImageCache) -> None:
        results.append(bytes(await cache.read(0, 4096, False)))

    async with caches(source) as [cache], trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(reader, cache)
        await trio.testing.wait_all_tasks_blocked()
        assert len(source.requests) == 1
        source.answer_all()
    assert results == [expected(make_stamp, 0, 0, 4096)] * 10


async def test_a_failed_fetch_wakes_all_and_leaves_nothing(source: Any, make_stamp: Stamp) -> None:
    errors = []

    async def reader(cache: ImageCache) -> None:
        with pytest.raises(EngineError) as caught:
            await cache.read(0, 4096, False)
        errors.append(caught.value)

    async with caches(source) as [cache]:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader, cache)
            await trio.testing.wait_all_tasks_blocked()
            _fail_all(source)
            await trio.testing.wait_all_tasks_blocked()
            asked_for_itself = [request for request in source.requests if request[3]]
            assert asked_for_itself == [(0, 0, 8, True)] * 3
            _fail_all(source)
        assert len(errors) == 3
        source.eager = True
        assert bytes(await cache.read(0, 4096, False)) == expected(make_stamp, 0, 0, 4096)
        check_pins(cache.disk)


def _fail_all(source: Any) -> None:
    for request in list(source.waiting):
        source.perform(request)
        source.answer(request, EngineError("bad sector"))


async def test_damage_elsewhere_in_a_run_does_not_concern_a_read(
    source: Any, make_stamp: Stamp
) -> None:
    got = []

    async def reader(cache: ImageCache) -> None:
        got.append(bytes(await cache.read(8192, 12288, False)))

    async with caches(source) as [cache], trio.open_nursery() as nursery:
        nursery.start_soon(reader, cache)
        await trio.testing.wait_all_tasks_blocked()
        _fail_all(source)
        await trio.testing.wait_all_tasks_blocked()
        source.answer_all()
        await trio.testing.wait_all_tasks_blocked()
        assert got == [expected(make_stamp, 0, 8192, 12288)]
        assert cache.read_nowait(8192, 12288) is None


async def test_failed_small_fetches_lose_no_memory(source: Any) -> None:
    async def reader(cache: ImageCache, start: int) -> None:
        with pytest.raises(EngineError):
            await cache.read(start, start + 512, False)

    async with caches(source, size=4 * MIB) as [cache]:
        for start in range(0, 8 * MIB, BLOCK):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader, cache, start)
                # Memory is made in a thread meanwhile, so "blocked" would not mean "asked".
                while nursery.child_tasks:
                    _fail_all(source)
                    await trio.lowlevel.checkpoint()
        source.eager = True
        with trio.fail_after(5):
            await cache.read(0, 3 * MIB, True)
        check_pins(cache.disk)


async def test_a_disk_with_one_frame_serves_large_and_small_reads_in_turn(source: Any) -> None:
    source.eager = True
    arena = Arena(4 * MIB, disks=2)
    async with trio.open_nursery() as nursery:
        cache = SectorCache(arena, nursery)
        cache.disk("other", type(source)())
        image = ImageCache(cache.disk("disk", source), 0, 64 * MIB)
        while arena.may_grow("other"):
            await arena.grow("other")
        assert arena.limit - len(arena.chunks["other"]) == 1
        image.disk.poor = None  # nothing comes back from the other disk
        for number in range(8):
            with trio.fail_after(5):
                await image.read(20 * MIB + number * MIB, 20 * MIB + number * MIB + 512, False)
                await image.read(number * MIB, number * MIB + MIB, True)
                await image.read_direct(number * MIB, number * MIB + 512)
        nursery.cancel_scope.cancel()
    arena.close()


async def test_a_frame_has_one_owner_when_streams_and_scattered_reads_mix(
    source: Any, make_stamp: Stamp
) -> None:
    """A frame that a stream was through with can have become the one that blocks are cut from."""
    source.eager = True
    capacity = 128 * MIB

    async def stream(cache: ImageCache, position: int) -> None:
        await cache.read(position, position + MIB, True)
        cache.read_nowait(position + MIB - 4096, position + MIB, spend=True)

    async with caches(source, size=64 * MIB, capacity=capacity) as [cache]:
        for number in range(10):
            await stream(cache, number * MIB)
        cache.invalidate()
        await cache.read(100 * MIB, 100 * MIB + 512, False)
        for number in range(10, 40):
            await stream(cache, number * MIB)
            await cache.read(64 * MIB + number * BLOCK, 64 * MIB + number * BLOCK + 512, False)
            for start in range(0, capacity, BLOCK):
                found = cache.read_nowait(start, start + 512)
                if found is not None:
                    assert bytes(found) == expected(make_stamp, 0, start, start + 512)


async def test_what_was_being_fetched_when_it_was_invalidated_is_not_kept(
    source: Any, make_stamp: Stamp
) -> None:
    got = []

    async def reader(cache: ImageCache) -> None:
        got.append(bytes(await cache.read(0, 4096, False)))

    async with caches(source) as [cache], trio.open_nursery() as nursery:
        nursery.start_soon(reader, cache)
        await trio.testing.wait_all_tasks_blocked()
        source.perform(source.waiting[0])
        source.version = 1
        cache.invalidate()
        nursery.start_soon(reader, cache)
        await trio.testing.wait_all_tasks_blocked()
        assert len(source.requests) == 2, "a reader after the invalidation waits for its own fetch"
        source.answer_all()
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(got) == [
            expected(make_stamp, 0, 0, 4096, 0),
            expected(make_stamp, 0, 0, 4096, 1),
        ]
        assert bytes(cache.read_nowait(0, 4096) or b"") == expected(make_stamp, 0, 0, 4096, 1)


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 512), (1, 2), (511, 513), (MIB - 48, MIB), (100, 100 + MIB), (3, 3 * MIB + 77)],
)
async def test_a_direct_read_asks_for_its_exact_sectors(
    source: Any, make_stamp: Stamp, start: int, end: int
) -> None:
    source.eager = True
    async with caches(source) as [cache]:
        assert bytes(await cache.read_direct(start, end)) == expected(make_stamp, 0, start, end)
        sectors = sum(count for _, _, count, direct in source.requests if direct)
        assert sectors == -(-end // SECTOR) - start // SECTOR
        assert cache.read_nowait(start, min(end, start + 1)) is None, "nothing of it is kept"
        check_pins(cache.disk)


async def test_an_abandoned_direct_read_gives_its_slot_back(source: Any) -> None:
    async with caches(source) as [cache]:
        with trio.move_on_after(0.01):
            await cache.read_direct(0, 4096)
        with pytest.raises(AssertionError):
            check_pins(cache.disk)
        source.answer_all()
        check_pins(cache.disk)


async def test_the_end_of_the_image_is_not_passed(source: Any, make_stamp: Stamp) -> None:
    source.eager = True
    capacity = 3 * MIB + 7 * SECTOR
    async with caches(source, capacity=capacity) as [cache]:
        start = capacity - 1000
        assert bytes(await cache.read(start, capacity, True)) == expected(
            make_stamp, 0, start, capacity
        )
        assert bytes(await cache.read_direct(start + 3, capacity)) == expected(
            make_stamp, 0, start + 3, capacity
        )
    assert all(sector + count <= capacity // SECTOR for _, sector, count, _ in source.requests)


async def test_prefetch_skips_holes_and_what_is_there(source: Any) -> None:
    async with caches(source) as [cache]:
        source.eager = True
        await cache.read(2 * MIB, 2 * MIB + 1, True)
        source.requests.clear()
        cache.is_hole = lambda start, end: start == MIB
        stopped = cache.prefetch(0, 5 * MIB)
        assert stopped == 5 * MIB
        assert [sector * SECTOR for _, sector, _, _ in source.requests] == [0, 3 * MIB, 4 * MIB]


async def test_prefetch_stops_when_enough_is_under_way(source: Any) -> None:
    async with caches(source, size=64 * MIB) as [cache]:
        with trio.move_on_after(0.05):
            await cache.read(63 * MIB, 63 * MIB + 1, True)
        source.answer_all()
        stopped = cache.prefetch(0, 60 * MIB)
        assert 0 < stopped <= 24 * MIB
        source.answer_all()
        assert cache.disk.fetches_ahead == 0


async def test_disks_keep_a_floor_that_a_greedy_one_cannot_take(source: Any) -> None:
    arena = Arena(64 * MIB, disks=3)
    for _ in range(50):
        await arena.grow("greedy")
    assert not arena.may_grow("greedy")
    for key in ("second", "third"):
        assert await arena.grow(key) is not None
    arena.close()


async def test_a_poor_disk_gets_its_share_back_from_a_rich_one(source: Any) -> None:
    source.eager = True
    arena = Arena(64 * MIB, disks=2)
    async with trio.open_nursery() as nursery:
        cache = SectorCache(arena, nursery)
        other = type(source)()
        other.eager = True
        rich = ImageCache(cache.disk("rich", source), 0, 256 * MIB)
        poor = ImageCache(cache.disk("poor", other), 0, 256 * MIB)
        for start in range(0, 128 * MIB, MIB):
            await rich.read(start, start + 1, True)
        assert len(arena.chunks["rich"]) > arena.fair_share
        for start in range(0, 128 * MIB, MIB):
            await poor.read(start, start + 1, True)
            await trio.testing.wait_all_tasks_blocked()
        assert len(arena.chunks["poor"]) == len(arena.chunks["rich"]) == arena.fair_share
        nursery.cancel_scope.cancel()
    arena.close()
    for area in other.maps.values():
        area.close()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
async def test_every_read_returns_its_sectors_as_they_were_after_the_last_invalidation(
    seed: int, source: Any
) -> None:
    """Readers, direct readers, read-ahead, invalidation and eviction, in random order."""
    source = type(source)()
    await _random_readers(random.Random(seed), source)
    for area in source.maps.values():
        area.close()


async def _random_readers(chooser: random.Random, source: Any) -> None:
    capacity = chooser.choice([24, 40]) * MIB + chooser.randrange(64) * SECTOR
    readers = chooser.randrange(1, 30)
    async with caches(source, 4 * MIB, capacity, images=2) as images:
        async with trio.open_nursery() as nursery:
            for _ in range(readers):
                nursery.start_soon(_reader, random.Random(chooser.random()), source, images)
            await _drive(chooser, source, images, nursery)
        while source.waiting or source.performed:
            source.step(chooser)
        check_pins(images[0].disk)


async def _reader(chooser: random.Random, source: Any, images: list[ImageCache]) -> None:
    for _ in range(10):
        number = chooser.randrange(len(images))
        cache = images[number]
        size = chooser.choice([1, 512, 4096, 65536, 100_000, MIB, 2 * MIB])
        start = chooser.randrange(cache.capacity)
        end = min(start + size, cache.capacity)
        oldest = source.version
        kind = chooser.randrange(4)
        if kind == 0:
            data = bytes(await cache.read_direct(start, end))
        elif kind == 1:
            cache.prefetch(start - start % FRAME, end)
            continue
        else:
            view = cache.read_nowait(start, end, spend=chooser.random() < 0.5)
            found = view if view is not None else await cache.read(start, end, kind == 2)
            data = bytes(found)
        _check(data, number, start, end, oldest, source.version)


def _check(data: bytes, image: int, start: int, end: int, oldest: int, newest: int) -> None:
    assert len(data) == end - start
    for position in range(-start % SECTOR, len(data) - SECTOR + 1, SECTOR):
        found = struct.unpack_from("<QQQ", data, position)
        assert found[:2] == (image, (start + position) // SECTOR)
        assert oldest <= found[2] <= newest


async def _drive(
    chooser: random.Random, source: Any, images: list[ImageCache], nursery: trio.Nursery
) -> None:
    idle = 0
    while nursery.child_tasks:
        await trio.lowlevel.checkpoint()
        if source.waiting or source.performed:
            idle = 0
            source.step(chooser)
            if chooser.random() < 0.05:
                source.version += 1
                for image in images:
                    image.invalidate()
        else:
            # A chunk may be in the making in a thread; anything longer is a lost wake-up.
            idle += 1
            await trio.sleep(0.001)
            assert idle < 5000, "readers wait for ever"


async def test_a_range_is_invalidated_and_what_is_beside_it_is_kept(
    source: Any, make_stamp: Stamp
) -> None:
    source.eager = True
    async with caches(source) as [cache]:
        for number in range(8):
            await cache.read(number * MIB, number * MIB + 512, False)
        await cache.read(9 * MIB, 9 * MIB + 512, True)
        source.version = 1
        cache.invalidate(2 * MIB + 5, 3 * MIB + 5)
        cache.invalidate(9 * MIB + 100 * 1024, 9 * MIB + 100 * 1024 + 1)
        kept = [n for n in range(8) if cache.read_nowait(n * MIB, n * MIB + 1) is not None]
        assert kept == [0, 1, 4, 5, 6, 7]
        assert cache.read_nowait(9 * MIB, 9 * MIB + 1) is None, "a run goes as a whole"
        fresh = await cache.read(2 * MIB, 2 * MIB + 512, False)
        assert bytes(fresh) == expected(make_stamp, 0, 2 * MIB, 2 * MIB + 512, 1)
        check_pins(cache.disk)


async def test_what_is_fetched_ahead_is_used_or_wasted_in_the_end(source: Any) -> None:
    source.eager = True
    async with caches(source) as [cache]:
        before = cache.worth.allowance
        cache.prefetch(0, 4 * MIB)
        assert cache.counts.ahead_bytes == before - cache.worth.allowance == 4 * MIB
        assert cache.read_nowait(10, 20) is not None
        assert cache.read_nowait(30, 40) is not None
        assert cache.read_nowait(MIB - 5, MIB + 5) is not None
        assert cache.counts.ahead_used_bytes == 3 * BLOCK
        cache.invalidate()
        assert cache.counts.ahead_wasted_bytes == 4 * MIB - 3 * BLOCK


async def test_scattered_misses_close_together_have_their_frame_fetched(source: Any) -> None:
    source.eager = True
    async with caches(source) as [cache]:
        for number in range(0, 16, 3):
            await cache.read(8 * MIB + number * BLOCK, 8 * MIB + number * BLOCK + 4096, False)
        frames = [request for request in source.requests if request[2] == FRAME // SECTOR]
        assert frames == [(0, 8 * MIB // SECTOR, FRAME // SECTOR, False)]
        asked = len(source.requests)
        for number in range(16):
            assert cache.read_nowait(8 * MIB + number * BLOCK, 8 * MIB + number * BLOCK + 512)
        assert len(source.requests) == asked


@pytest.mark.parametrize("block", [4096, 16 * 1024, 256 * 1024, FRAME])
async def test_the_operator_chooses_the_block(source: Any, make_stamp: Stamp, block: int) -> None:
    source.eager = True
    arena = Arena(16 * MIB, block=block)
    async with trio.open_nursery() as nursery:
        cache = ImageCache(SectorCache(arena, nursery).disk("disk", source), 0, 64 * MIB)
        for start in (5 * MIB + 512, 9 * MIB - 700, 33 * MIB):
            data = await cache.read(start, start + 600, False)
            assert bytes(data) == expected(make_stamp, 0, start, start + 600)
        sizes = {count * SECTOR for _, _, count, _ in source.requests}
        assert sizes <= {block, FRAME}
        check_pins(cache.disk)
        nursery.cancel_scope.cancel()
    arena.close()


@pytest.mark.parametrize("under_way", [False, True])
async def test_a_range_takes_along_what_lies_hidden_under_it(
    source: Any, make_stamp: Stamp, under_way: bool
) -> None:
    """A frame that was fetched around a block holds that block too, and may show it one day."""
    async with caches(source) as [cache]:
        source.eager = True
        await cache.read(3 * BLOCK, 3 * BLOCK + 512, False)
        source.eager = False
        cache.prefetch(0, FRAME)
        for request in list(source.waiting):
            source.perform(request)
        if not under_way:
            source.answer_all()
        source.version = 1
        cache.invalidate(3 * BLOCK, 4 * BLOCK)
        source.eager = True
        data = await cache.read(2 * BLOCK, 5 * BLOCK, False)
        source.answer_all()
        assert bytes(data) == expected(make_stamp, 0, 2 * BLOCK, 5 * BLOCK, 1)


async def test_where_a_fetch_failed_the_next_reads_ask_for_themselves(source: Any) -> None:
    async def reader(cache: ImageCache) -> None:
        with pytest.raises(EngineError):
            await cache.read(0, 4096, True)

    async with caches(source) as [cache]:
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader, cache)
                while nursery.child_tasks:
                    _fail_all(source)
                    await trio.lowlevel.checkpoint()
        large = [request for request in source.requests if request[2] == FRAME // SECTOR]
        assert len(large) == 1
        cache.invalidate()
        source.eager = True
        await cache.read(0, 4096, True)
        assert source.requests[-1][2] == FRAME // SECTOR
        check_pins(cache.disk)


async def test_a_read_is_one_hit_or_one_miss_or_one_wait(source: Any) -> None:
    async with caches(source) as [cache], trio.open_nursery() as nursery:
        nursery.start_soon(cache.read, MIB - 4096, 2 * MIB - 4096, True)
        nursery.start_soon(cache.read, MIB - 4096, 2 * MIB - 4096, True)
        while nursery.child_tasks:
            source.answer_all()
            await trio.lowlevel.checkpoint()
        assert cache.read_nowait(MIB - 4096, 2 * MIB - 4096) is not None
        counts = cache.counts
        assert (counts.hits, counts.misses + counts.coalesced) == (1, 2)
