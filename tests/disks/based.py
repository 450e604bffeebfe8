"""A chain whose base is written, over a worker that is not one."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from tests.disks.test_image import FakeWorker, make_link, unchanged
from vddkfs.cache.arena import FRAME, Arena
from vddkfs.cache.coherence import policy
from vddkfs.cache.frames import SectorCache
from vddkfs.disks.base_writes import BaseWrites
from vddkfs.disks.image import Image
from vddkfs.engines.base import SECTOR
from vddkfs.engines.requests import WriteRequest
from vddkfs.errors import VddkfsError

MIB = 1024 * 1024
SECTORS: Final = 6001
CAPACITY: Final = SECTORS * SECTOR


def no_error(_request: WriteRequest) -> VddkfsError | None:
    return None


class Writer(FakeWorker):
    """Takes writes too: done at once, or by ``step`` if *held*. *fails* says how a write ends."""

    def __init__(self, content: bytes, held: bool = False) -> None:
        super().__init__(content, held)
        self.asked: list[WriteRequest] = []
        self.written: list[WriteRequest] = []
        self.sizes: list[tuple[int, int]] = []
        self.fails: Callable[[WriteRequest], VddkfsError | None] = no_error
        self.flush_error: VddkfsError | None = None
        self.flushes = 0
        self._news = trio.Event()

    async def has_asked(self, count: int) -> None:
        """Wait until so many writes are asked for, and not begun."""
        while len(self.asked) < count:
            await self._news.wait()

    def submit_write(self, request: WriteRequest) -> None:
        for other in [*self.asked, *self.written]:
            apart = (
                request.sector + request.count <= other.sector
                or other.sector + other.count <= request.sector
            )
            assert apart, "writes that overlap are never under way at once"
        assert len(request.data) == request.count * SECTOR
        self.sizes.append((request.sector, request.count))
        self.asked.append(request)
        self._news.set()
        self._news = trio.Event()
        while not self.held and (self.asked or self.written):
            self.step_write(random.Random(0))

    async def flush(self) -> None:
        self.flushes += 1
        await trio.lowlevel.checkpoint()
        if self.flush_error is not None:
            raise self.flush_error

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.performed or self.asked or self.written)

    def step(self, chooser: random.Random) -> None:
        """Do a part of a read or of a write, whichever."""
        reads, writes = len(self.waiting + self.performed), len(self.asked + self.written)
        if chooser.randrange(reads + writes) < reads:
            super().step(chooser)
        else:
            self.step_write(chooser)

    def step_write(self, chooser: random.Random) -> None:
        index = chooser.randrange(len(self.asked) + len(self.written))
        if index >= len(self.asked):
            request = self.written.pop(index - len(self.asked))
            request.done(self.fails(request))
            return
        request = self.asked.pop(index)
        start, size = request.sector * SECTOR, request.count * SECTOR
        place = request.target.offset
        data = self.areas[request.target.chunk_number][place : place + size]
        assert data == bytes(request.data), "the slot has what is to be written"
        if self.fails(request) is None:
            self.content[start : start + size] = data
            self.data[request.sector : request.sector + request.count] = [True] * request.count
        self.written.append(request)

    def let_go(self) -> None:
        """Do all that was asked, and whatever is asked later."""
        self.held = False
        while self.busy:
            self.step(random.Random(0))


@asynccontextmanager
async def chain(worker: Writer, images: int = 2) -> AsyncIterator[list[Image]]:
    """Images of one chain, all of what *worker* holds; the first one is its base."""
    arena = Arena(4 * MIB)
    async with trio.open_nursery() as nursery:
        disk = SectorCache(arena, nursery).disk("disk", worker)
        disk.release(await disk.slot(FRAME))
        found = [
            Image(
                f"d/chain/{number}.raw",
                [make_link(SECTORS)],
                index=number,
                policy=policy(False, "auto"),
                client=worker,  # type: ignore[arg-type]
                cache=disk,
                revalidate=unchanged,
                nursery=nursery,
                read_ahead=2 * MIB,
            )
            for number in range(images)
        ]

        def wrote(start: int, end: int) -> None:
            for image in found:
                image.wrote(start, end)

        client: Any = worker
        found[0].writes = BaseWrites(found[0].name, client, found[0].cache, wrote)
        yield found
        nursery.cancel_scope.cancel()
    arena.close()
    for area in worker.areas.values():
        area.close()
