"""What ``test_fairness`` guards against: the same readers, with a cache that keeps what came last.

If they fared well with that, ``test_fairness`` would prove nothing of the policy.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
from cachetools import LRUCache

from tests.cache import test_fairness
from tests.cache.test_fairness import CAPACITY, SIZE, handle, images, places, scan, visit
from vddkfs.cache.arena import BLOCK, FRAME
from vddkfs.cache.frames import SPENT_KEPT, DiskCache
from vddkfs.cache.runs import Run
from vddkfs.cache.sector_cache import ImageCache
from vddkfs.disks.image import Image

MIB = 1024 * 1024


class Latest(LRUCache[Any, Run]):
    """Stands for the policy: who was used longest ago goes first."""

    def __init__(self) -> None:
        super().__init__(float("inf"), getsizeof=lambda run: run.weight)

    def demote(self, key: Any) -> None:
        """That a stream is through with it makes no difference."""

    def evict(self, may: Callable[[Run], bool]) -> Run | None:
        busy = []
        found = None
        while self and found is None:
            key, run = self.popitem()
            if may(run):
                found = run
            else:
                busy.append((key, run))
        self.update(busy)
        return found


def keep_latest(monkeypatch: pytest.MonkeyPatch, disk: DiskCache) -> None:
    """Have *disk* keep what was used last."""
    latest = disk._kept = Latest()  # type: ignore[assignment]
    used = Run.used

    def noted(run: Run, start: int, end: int) -> None:
        used(run, start, end)
        latest.get(run.key)

    monkeypatch.setattr(Run, "used", noted)


async def ratio_beside_scans(image: Image, cache_size: int, scanned: int, step: int) -> float:
    """Return the share of hits of a reader of a quarter of the cache, beside two scans."""
    dice = random.Random(1)
    wanted = places(dice, cache_size // 4)
    reader = handle(image)
    scanners = [handle(image), handle(image)]
    await visit(image, reader, wanted)
    await visit(image, reader, wanted)
    ratios = []
    part = scanned // 2 // 8
    for turn in range(8):
        for number, scanner in enumerate(scanners):
            # Out of step with the frames, as the scan of a partition is.
            await scan(image, scanner, 512 + number * CAPACITY // 4 + turn * part, part, step)
        dice.shuffle(wanted)
        ratios.append(await visit(image, reader, wanted))
    return sum(ratios) / len(ratios)


async def ratio_beside_strangers(image: Image, cache_size: int) -> float:
    """Return the same beside scattered reads that never come back: no stream says so of them."""
    dice = random.Random(1)
    wanted = places(dice, cache_size // 4)
    reader, stranger = handle(image), handle(image)
    await visit(image, reader, wanted)
    await visit(image, reader, wanted)
    ratios = []
    for _ in range(4):
        await visit(
            image,
            stranger,
            [dice.randrange(CAPACITY // 2 // BLOCK) * BLOCK for _ in range(cache_size // BLOCK)],
        )
        dice.shuffle(wanted)
        ratios.append(await visit(image, reader, wanted))
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("step", [MIB, BLOCK], ids=["1M", "64K"])
async def test_scans_flush_a_small_cache_that_keeps_what_came_last(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    async with images(1) as ([image], _):
        keep_latest(monkeypatch, image.cache.disk)
        assert await ratio_beside_scans(image, SIZE, 10 * SIZE, step) < 0.2


async def test_streams_that_use_their_frames_again_spare_a_larger_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not the policy's merit: SPENT_KEPT frames are all that a scan takes for itself."""
    monkeypatch.setattr(test_fairness, "SIZE", 4 * SPENT_KEPT * FRAME)
    async with images(1) as ([image], arena):
        keep_latest(monkeypatch, image.cache.disk)
        size = arena.limit * arena.chunk_size
        assert await ratio_beside_scans(image, size, 4 * size, MIB) >= 0.9


@pytest.mark.parametrize("size", [SIZE, 4 * SIZE], ids=["16M", "64M"])
async def test_scattered_reads_that_never_come_back_push_nothing_out(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(test_fairness, "SIZE", size)
    async with images(1) as ([image], _):
        assert await ratio_beside_strangers(image, size) >= 0.9


async def test_scattered_reads_flush_a_cache_that_keeps_what_came_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(test_fairness, "SIZE", 4 * SIZE)
    async with images(1) as ([image], _):
        keep_latest(monkeypatch, image.cache.disk)
        assert await ratio_beside_strangers(image, 4 * SIZE) < 0.2


async def test_two_images_of_a_disk_keep_the_same_places_apart() -> None:
    """What is kept is told apart by image and by size, too."""
    async with images(1) as ([image], _):
        other = ImageCache(image.cache.disk, 1, CAPACITY)
        for cache in (image.cache, other):
            for start in range(0, 2 * FRAME, BLOCK):
                await cache.read(start, start + 512, False)
        for cache in (image.cache, other):
            assert all(
                cache.read_nowait(start, start + 512) for start in range(0, 2 * FRAME, BLOCK)
            )
