"""Readers of the model: each knows what it may see, and looks at every byte that it gets."""

from array import array
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio

from tests.cache.owned import Content, Worker
from tests.cache.stepped import SteppedRun
from vddkfs.disks.image import Handle, Image
from vddkfs.engines.base import SECTOR
from vddkfs.errors import StaleImage, VddkfsError

Read = Callable[[], Awaitable[memoryview | bytes]]


class Shown(NamedTuple):
    """An image of the mount, and what its source has."""

    image: Image
    content: Content
    worker: Worker

    def place(self, start: int, size: int) -> tuple[int, int]:
        """Return a range inside the image that depends on *start* and *size* only."""
        start %= self.content.capacity
        return start, min(start + size, self.content.capacity)


class Opened(NamedTuple):
    """A file that is open. *since* has the least versions that it may show."""

    shown: Shown
    handle: Handle
    since: "array[int]"


class Reader:
    """One that has begun to read [*start*, *end*). *fresh*: nothing that is older than that."""

    def __init__(
        self, shown: Shown, start: int, end: int, fresh: bool, opened: Opened | None = None
    ) -> None:
        self.shown = shown
        self.start = start
        self.end = end
        self.handle = opened.handle if opened is not None else None
        self.scope = trio.CancelScope()
        self._failures = shown.worker.failures
        self._oldest = shown.content.oldest(start, end, fresh)
        if opened is not None:
            since = opened.since[start // SECTOR : -(-end // SECTOR)]
            self._oldest = array("I", map(max, self._oldest, since))

    @property
    def stale(self) -> bool:
        """Whether its file shows another disk than the one that it was opened on."""
        return self.handle is not None and self.handle.generation != self.shown.image.generation

    def got(self, data: memoryview | bytes) -> None:
        """Look at what it has got, before anything else can happen."""
        assert not self.stale, "a file shows another disk than the one that it was opened on"
        self.shown.content.check(data, self.start, self.end, self._oldest)

    def failed(self, error: VddkfsError) -> None:
        """See that there was a reason to fail."""
        if isinstance(error, StaleImage):
            assert self.stale
        else:
            assert self.shown.worker.failures > self._failures, f"nothing failed, but: {error}"


class Readers:
    """Those who read now."""

    def __init__(self, run: SteppedRun) -> None:
        self._run = run
        self.reading: list[Reader] = []

    def begin(
        self,
        shown: Shown,
        start: int,
        end: int,
        read: Read,
        *,
        fresh: bool = False,
        left: bool = False,
    ) -> None:
        """Have *read* called by a new task, which is cancelled before it runs if it has *left*."""
        reader = Reader(shown, start, end, fresh)
        if left:
            reader.scope.cancel()
        self.reading.append(reader)
        self._run.start_soon(self._reads, reader, read)

    def begin_file(self, opened: Opened, start: int, end: int, piece: int) -> None:
        """Have a new task go forward through an open file, *piece* by piece."""
        self._run.start_soon(self._go_forward, opened, start, end, piece)

    async def _go_forward(self, opened: Opened, start: int, end: int, piece: int) -> None:
        shown, handle, _ = opened
        for position in range(start, end, piece):
            until = min(position + piece, end)
            reader = Reader(shown, position, until, handle.direct, opened)

            async def read(at: int = position, size: int = until - position) -> memoryview | bytes:
                return await shown.image.read(handle, at, size)

            self.reading.append(reader)
            await self._reads(reader, read)
            if reader.scope.cancelled_caught:
                break

    async def _reads(self, reader: Reader, read: Read) -> None:
        try:
            with reader.scope:
                data = await read()
                reader.got(data)
        except VddkfsError as error:
            reader.failed(error)
        finally:
            self.reading.remove(reader)
