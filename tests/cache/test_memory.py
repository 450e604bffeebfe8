"""What the cache takes of the machine: memory within its limit, and short turns of the one thread.

Chunks are made here without memory, so that a full cache of 4 GiB costs nothing but its books: what
is measured is work, not seconds.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Final

import pytest
import trio

from vddkfs.cache import frames
from vddkfs.cache.arena import BLOCK, CHUNK, FRAME, Arena, Chunk
from vddkfs.cache.frames import DiskCache, SectorCache
from vddkfs.cache.runs import Run
from vddkfs.cache.sector_cache import ImageCache
from vddkfs.engines.requests import ReadRequest

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB
_NOTHING: Final = memoryview(bytes(CHUNK))
"""What is read of all chunks: nobody writes here, so it takes no memory."""


class Memory:
    """Counts what chunks take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        self.most = 0
        self.made = 0
        close = Chunk.close

        def allocate(chunk: Chunk) -> None:
            self.made += 1
            self.bytes += chunk.size
            self.most = max(self.most, self.bytes)
            chunk.view = _NOTHING[: chunk.size]

        def give_back(chunk: Chunk) -> None:
            self.bytes -= chunk.size
            close(chunk)

        monkeypatch.setattr(Chunk, "allocate", allocate)
        monkeypatch.setattr(Chunk, "close", give_back)


class Quick:
    """A worker that reads nothing: it answers at once, or in any order when it is told to."""

    def __init__(self, held: bool = False) -> None:
        self.held = held
        self.waiting: list[ReadRequest] = []
        self.most_waiting = 0

    def submit_read(self, request: ReadRequest) -> None:
        if self.held:
            self.waiting.append(request)
            self.most_waiting = max(self.most_waiting, len(self.waiting))
        else:
            request.done(None)

    def poll(self) -> None:
        """It is as quick as it can be."""

    def lend(self, number: int, fd: int, size: int) -> None:
        """Nothing is written to chunks."""

    async def take_back(self, number: int) -> bool:
        await trio.lowlevel.checkpoint()
        return True


@asynccontextmanager
async def arena_of(size: int, disks: int) -> AsyncIterator[tuple[Arena, SectorCache]]:
    arena = Arena(size, disks)
    async with trio.open_nursery() as nursery:
        yield arena, SectorCache(arena, nursery)
        nursery.cancel_scope.cancel()
    arena.close()


@pytest.mark.parametrize(("size", "disks"), [(4 * MIB, 1), (48 * MIB, 12), (256 * MIB, 3)])
async def test_no_load_makes_more_memory_than_the_limit(
    monkeypatch: pytest.MonkeyPatch, size: int, disks: int
) -> None:
    memory = Memory(monkeypatch)
    dice = Random(size)
    async with arena_of(size, disks) as (arena, cache):
        workers = [Quick(held=True) for _ in range(disks)]
        images = [
            ImageCache(cache.disk(number, worker), 0, TIB) for number, worker in enumerate(workers)
        ]
        async with trio.open_nursery() as nursery:
            for number in range(3 * disks):
                nursery.start_soon(_reads, images[number % disks], Random(number))
            while nursery.child_tasks:
                await trio.lowlevel.checkpoint()
                for worker in workers:
                    for _ in range(min(len(worker.waiting), dice.randrange(6))):
                        worker.waiting.pop(dice.randrange(len(worker.waiting))).done(None)
        assert max(worker.most_waiting for worker in workers) > 3, "there was no load"
        assert memory.made == arena.count
        assert memory.most == memory.bytes == arena.size <= size
        held = sum(image.disk.bytes_held for image in images)
        assert held <= size
    assert not memory.bytes


async def _reads(image: ImageCache, dice: Random) -> None:
    for _ in range(25):
        size = dice.choice([512, BLOCK, MIB, 3 * MIB, 20 * MIB])
        start = dice.randrange(TIB - size)
        match dice.randrange(4):
            case 0:
                await image.read_direct(start, start + min(size, 3 * MIB))
            case 1:
                image.prefetch(start - start % FRAME, start + size)
            case 2:
                await image.read(start, start + size, False)
            case _:
                await image.read(start, start + size, True)


async def test_whoever_leaves_before_memory_is_made_takes_none_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[int] = []
    close = Chunk.close

    def noted(chunk: Chunk) -> None:
        closed.append(chunk.number)
        close(chunk)

    monkeypatch.setattr(Chunk, "close", noted)
    async with arena_of(4 * MIB, 1) as (arena, cache):
        disk = cache.disk("disk", Quick())
        for _ in range(2 * arena.limit):
            with trio.CancelScope() as scope:
                scope.cancel()
                await disk.slot(FRAME)
        assert arena.count == 0
        assert closed == list(range(2 * arena.limit))


@asynccontextmanager
async def full_cache(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> AsyncIterator[tuple[ImageCache, int]]:
    """A cache of *size* bytes full of blocks of an image of 64 TiB, and how many those are."""
    Memory(monkeypatch)
    async with arena_of(size, 1) as (arena, cache):
        disk = cache.disk("disk", Quick())
        while arena.may_grow("disk"):
            await disk._grow()
        image = ImageCache(disk, 0, 64 * TIB)
        count = size // BLOCK
        # Far from each other: a frame of which two blocks are wanted is fetched whole.
        for start in range(0, 64 * TIB, 64 * TIB // count):
            await image.read(start, start + 512, False)
        assert disk._kept.currsize == count
        yield image, count


class Work:
    """Counts the runs that leave the cache, and how many of them between the turns of others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        self.turns: list[int] = []
        let_go: Callable[[DiskCache, Run], None] = DiskCache._let_go

        def counted(disk: DiskCache, run: Run) -> None:
            self.runs += 1
            let_go(disk, run)

        monkeypatch.setattr(DiskCache, "_let_go", counted)

    async def others(self, until: int) -> None:
        """Be one of those who want a turn meanwhile."""
        before = self.runs
        while self.runs < until:
            await trio.lowlevel.checkpoint()
            self.turns.append(self.runs - before)
            before = self.runs


async def test_dropping_a_full_cache_of_a_large_image_takes_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with full_cache(monkeypatch, 4 * GIB) as (image, count):
        work = Work(monkeypatch)
        free = len(image.disk.free)
        image.invalidate()
        assert work.runs <= frames._AT_ONCE
        assert all(
            image.read_nowait(start, start + 512) is None
            for start in range(0, 64 * TIB, 64 * TIB // 64)
        )
        with trio.fail_after(60):
            await work.others(count)
        assert work.runs == count
        assert max(work.turns) <= 2 * frames._AT_ONCE
        assert len(work.turns) >= count // frames._AT_ONCE // 2
        assert image.disk._kept.currsize == 0
        # One frame may stay cut into blocks.
        assert len(image.disk.free) >= free + count * BLOCK // FRAME - 1


async def test_what_is_read_while_a_cache_is_dropped_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if it is what is dropped only later: the new one stays."""
    async with full_cache(monkeypatch, 256 * MIB) as (image, count):
        last = 64 * TIB - 64 * TIB // count
        image.invalidate()
        await image.read(last, last + 512, False)
        for _ in range(2 * count // frames._AT_ONCE):
            await trio.lowlevel.checkpoint()
        assert image.disk._kept.currsize == 1
        assert image.read_nowait(last, last + 512) is not None
        assert image.disk.evictions == 0


@pytest.mark.parametrize(("start", "end", "touched"), [(0, 1, 1), (TIB, 2 * TIB, 64)])
async def test_dropping_a_range_leaves_the_rest_alone(
    monkeypatch: pytest.MonkeyPatch, start: int, end: int, touched: int
) -> None:
    """Neither the size of the range nor that of the image is what it takes."""
    async with full_cache(monkeypatch, 256 * MIB) as (image, count):
        work = Work(monkeypatch)
        image.invalidate(start, end)
        assert work.runs == touched
        assert image.disk._kept.currsize == count - touched
