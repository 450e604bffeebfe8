"""The overlay of one image, as its readers and writers on the trio thread use it.

What was written lies in a fork (see ``vddkfs.disks.overlay``); all else is the source's. Files are
never touched on the trio thread: what may wait for a disk runs in threads, those who write apart
from those who read, because a writer may wait for the source and its worker.

Offsets and sizes in bytes. Methods raise OverlayError, and what the source raises.
"""

from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import trio

from vddkfs.disks.overlay import BELOW, BLOCK, ZERO, Extent, Fork, Overlay
from vddkfs.disks.ranges import RangeLocks
from vddkfs.errors import VddkfsError

_THREADS: Final = 16
_WINDOW: Final = 64 * 1024 * 1024
"""How much of the map is looked at without a pause."""

Below = Callable[[int, int], Awaitable[bytes | memoryview]]
"""Return what the source has from an offset on: so many bytes."""


class Threads:
    """The threads of all layers of a disk."""

    def __init__(self) -> None:
        self.reading = trio.CapacityLimiter(_THREADS)
        self.writing = trio.CapacityLimiter(_THREADS)


class Layer:
    """What was written to the image *name*, of *capacity* bytes, and is kept in *overlay*.

    *fork* is what was written before, if anything was. ``changes`` counts the writes, and
    ``failures`` the flushes that found a loss: each writer is told of those.
    """

    def __init__(
        self, overlay: Overlay, name: str, capacity: int, fork: Fork | None, threads: Threads
    ) -> None:
        self.name = name
        self.changes = 0
        self.failures = 0
        self._overlay = overlay
        self._capacity = capacity
        self._fork = fork
        self._threads = threads
        self._making = trio.Lock()
        self._ranges = RangeLocks(BLOCK)

    @property
    def changed_bytes(self) -> int:
        """How much of the image is in the overlay."""
        return self._fork.changed_bytes if self._fork is not None else 0

    def touched(self, start: int, end: int) -> bool:
        """Say whether any of [*start*, *end*) was written."""
        return self._fork is not None and self._fork.touched(start, end - start)

    async def read(self, start: int, end: int, below: Below) -> memoryview:
        """Return [*start*, *end*); what was not written is asked of *below*."""
        assert self._fork is not None
        data = memoryview(bytearray(end - start))
        gaps = await trio.to_thread.run_sync(
            self._fork.read_into, start, data, limiter=self._threads.reading
        )
        for gap in gaps:
            first = gap.offset - start
            data[first : first + gap.size] = await below(gap.offset, gap.offset + gap.size)
        return data

    async def write(self, start: int, data: bytes | memoryview, below: Below) -> None:
        """Write *data* from *start* on; it lasts when a ``flush`` that begins later has returned.

        When it is cancelled the write goes on to its end first.
        """
        fork = self._fork or await self._made()

        def read_below(offset: int, size: int) -> bytes:
            return trio.from_thread.run(_whole, below, offset, offset + size)

        async with self._ranges.hold(start, start + len(data)):
            try:
                await trio.to_thread.run_sync(
                    fork.write, start, data, read_below, limiter=self._threads.writing
                )
            finally:
                # A part of it may be there also if it failed.
                self.changes += 1

    async def flush(self) -> None:
        """Return when all that was written before is on the disk."""
        if self._fork is None:
            return
        try:
            await trio.to_thread.run_sync(self._fork.flush, limiter=self._threads.writing)
        except VddkfsError:
            # Where it only wanted space, what was written is still there for the next one.
            self.failures += self._fork.lost
            raise

    async def _made(self) -> Fork:
        async with self._making:
            if self._fork is None:
                self._fork = await trio.to_thread.run_sync(
                    self._overlay.fork, self.name, self._capacity, limiter=self._threads.writing
                )
            return self._fork

    def kinds(self, start: int) -> Iterator[tuple[int, int, bool | None]]:
        """Yield (start, end, data) from *start* to the end of the image, in order.

        *data* is False for what was written as zeros, and None for what the source has. What is
        written meanwhile may be there or not.
        """
        while start < self._capacity:
            size = min(_WINDOW, self._capacity - start)
            if self._fork is None:
                yield start, start + size, None
                start += size
                continue
            for run in self._fork.locate(start, size):
                end = min((run.block + run.blocks) * BLOCK, start + size, self._capacity)
                first = max(start, run.block * BLOCK)
                yield first, end, None if run.place == BELOW else run.place != ZERO
            start += size

    def extents(self) -> Iterator[Extent]:
        """Return what was written, in order, neighbours merged. For a thread: it may be long."""
        return self._fork.extents() if self._fork is not None else iter(())


async def _whole(below: Below, start: int, end: int) -> bytes:
    """Return what *below* has, in memory of its own."""
    return bytes(await below(start, end))
