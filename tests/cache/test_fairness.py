"""Readers beside a scan: of another disk, and of the same one.

Through ``Image.read`` with handles of their own, so that streams are told apart, frames that a
stream has left behind are used again, and reading ahead is paid for as in a mount.
"""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.cache.conftest import FakeSource
from tests.disks.test_image import make_link, unchanged
from vddkfs.cache.arena import BLOCK, FRAME, Arena
from vddkfs.cache.coherence import Policy
from vddkfs.cache.frames import SectorCache
from vddkfs.disks.image import Handle, Image
from vddkfs.engines.base import SECTOR

MIB = 1024 * 1024
SIZE = 16 * MIB
"""Of the cache."""
CAPACITY = 1024 * MIB


@asynccontextmanager
async def images(count: int) -> AsyncIterator[tuple[list[Image], Arena]]:
    """Frozen images of as many disks, in one arena; their sources answer at once."""
    arena = Arena(SIZE, count)
    sources = [FakeSource() for _ in range(count)]
    async with trio.open_nursery() as nursery:
        cache = SectorCache(arena, nursery)
        shown = []
        for number, source in enumerate(sources):
            source.eager = True
            shown.append(
                Image(
                    f"{number}/disk.raw",
                    [make_link(CAPACITY // SECTOR)],
                    index=0,
                    policy=Policy.IMMUTABLE,
                    client=source,  # type: ignore[arg-type]
                    cache=cache.disk(number, source),
                    revalidate=unchanged,
                    nursery=nursery,
                    read_ahead=8 * MIB,
                )
            )
        yield shown, arena
        nursery.cancel_scope.cancel()
    arena.close()
    for source in sources:
        for area in source.maps.values():
            area.close()


def handle(image: Image) -> Handle:
    return Handle(image, False, True, 8 * MIB)


async def visit(image: Image, reader: Handle, places: list[int]) -> float:
    """Read 4 KiB at each of *places*; return the share that was answered at once."""
    before = image.cache.counts.hits
    for place in places:
        await image.read(reader, place, 4096)
    return (image.cache.counts.hits - before) / len(places)


async def scan(image: Image, reader: Handle, start: int, size: int, step: int) -> None:
    for place in range(start, start + size, step):
        await image.read(reader, place, step)


def places(dice: random.Random, size: int) -> list[int]:
    """Return places in as many blocks as *size* bytes have, no two blocks in one frame."""
    frames = dice.sample(range(CAPACITY // 2 // FRAME, CAPACITY // FRAME), size // BLOCK)
    return [frame * FRAME + dice.randrange(FRAME // 4096) * 4096 for frame in frames]


@pytest.mark.parametrize("step", [MIB, 128 * 1024, BLOCK], ids=["1M", "128K", "64K"])
@pytest.mark.parametrize("scans", [1, 2])
async def test_what_is_read_again_stays_beside_a_scan_ten_times_the_cache(
    step: int, scans: int
) -> None:
    async with images(1) as ([image], _):
        dice = random.Random(1)
        wanted = places(dice, 4 * MIB)
        reader = handle(image)
        scanners = [handle(image) for _ in range(scans)]
        await visit(image, reader, wanted)
        await visit(image, reader, wanted)
        # The scans begin in the middle of a block, as those of a partition do.
        size = 10 * SIZE // scans // 16
        ratios = []
        for part in range(16):
            for number, scanner in enumerate(scanners):
                start = 512 + number * CAPACITY // 4 + part * size
                await scan(image, scanner, start, size, step)
            dice.shuffle(wanted)
            ratios.append(await visit(image, reader, wanted))
        assert sum(ratios) / len(ratios) >= 0.9, ratios


async def test_a_scan_of_one_disk_leaves_another_its_memory() -> None:
    async with images(2) as ((scanned, other), arena):
        dice = random.Random(2)
        greedy = handle(scanned)
        for _ in range(3):
            # At random, so that all that comes is kept.
            await visit(scanned, greedy, places(dice, 16 * MIB))
        await scan(scanned, greedy, 0, 10 * SIZE, MIB)
        reader = handle(other)
        wanted = places(dice, 2 * MIB)
        for _ in range(3):
            await visit(other, reader, wanted)
            await trio.testing.wait_all_tasks_blocked()
        for part in range(4):
            await scan(scanned, greedy, part * 2 * SIZE, 2 * SIZE, MIB)
            assert await visit(other, reader, wanted) >= 0.9
        assert arena.size <= SIZE


async def test_no_load_takes_more_than_the_limit() -> None:
    async with images(4) as (shown, arena):

        async def reader(image: Image, seed: int) -> None:
            dice = random.Random(seed)
            mine = handle(image)
            for _ in range(40):
                size = dice.choice([4096, BLOCK, MIB, 3 * MIB])
                await image.read(mine, dice.randrange(CAPACITY - size), size)
                assert arena.size <= SIZE

        async with trio.open_nursery() as nursery:
            for number in range(32):
                nursery.start_soon(reader, shown[number % 4], number)


async def test_a_full_cache_is_dropped_in_turns() -> None:
    """Forgetting is at once; the memory of many blocks comes back while others have their turns."""
    async with images(1) as ([image], _):
        reader = handle(image)
        dice = random.Random(3)
        for _ in range(4):
            await visit(image, reader, places(dice, 16 * MIB))
        freed = image.cache.disk.free
        before = len(freed)
        image.drop()
        assert image.cache.read_nowait(CAPACITY // 2, CAPACITY // 2 + 1) is None
        await trio.testing.wait_all_tasks_blocked()
        assert len(freed) >= before
        assert not any(chunk.pinned() for chunk in image.cache.disk.arena.chunks[0])
        assert await visit(image, reader, places(dice, 8 * MIB)) < 0.5
