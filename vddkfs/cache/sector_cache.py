"""The sector cache: what was read from a disk, kept in the arena, and found again without a wait.

``ImageCache`` is what an image's readers use: ``read_nowait`` (a hit: no await, no copy), ``read``,
``read_direct`` and ``prefetch``. Blocks of 64 KiB are the unit of its index; a *run* is what one
request fetched: one block for a scattered read, up to a frame (1 MiB) for a stream. A block that is
being fetched is in the index too, so that it is fetched once, however many ask.

Invalidation is by epoch: it empties the index, and a fetch that was under way then is handed to the
readers who waited for it (they began before) but not kept.

Cancellation: a reader that is cancelled leaves its fetch running, for the others who may wait for
it. All of this runs on the trio thread.
"""

from collections.abc import Callable
from typing import Final

import trio

from vddkfs.cache.arena import FRAME, SMALL, Slot
from vddkfs.cache.frames import DiskCache
from vddkfs.engines.base import SECTOR
from vddkfs.engines.requests import Moved, ReadRequest
from vddkfs.errors import EngineError, VddkfsError

FETCHES_AHEAD: Final = 24
"""Frames that read-ahead may have under way for one disk."""


class Run:
    """What one request fetched, or is fetching: [*start*, *end*) of an image, in bytes."""

    __slots__ = ("end", "epoch", "error", "image", "pins", "ready", "slot", "start", "waiters")

    def __init__(self, image: "ImageCache", start: int, end: int, slot: Slot) -> None:
        self.image = image
        self.start = start
        self.end = end
        self.slot = slot
        self.pins = 0
        self.epoch = image.epoch
        self.ready = False
        self.error: VddkfsError | None = None
        self.waiters: trio.lowlevel.ParkingLot | None = None
        slot.tenant = self

    async def wait(self) -> None:
        """Wait until the run is there. Raises what the fetch failed with."""
        while not self.ready:
            if self.error is not None:
                raise self.error
            if self.waiters is None:
                self.waiters = trio.lowlevel.ParkingLot()
            await self.waiters.park()

    def done(self, error: VddkfsError | None) -> None:
        """Take the answer to the request."""
        image, disk = self.image, self.image.disk
        if error is not None:
            self.error = error
        else:
            self.ready = True
        if error is not None or self.epoch != image.epoch:
            image.forget(self)
        else:
            disk.keep(self.slot.frame)
        if self.waiters is not None:
            self.waiters.unpark_all()
        disk.release(self.slot)

    def evicted(self) -> None:
        """Leave the index: the frame will hold something else."""
        self.image.forget(self)

    def moved(self) -> Moved:
        """Leave the slot, which a lost worker may still write to, for a new one if there is one."""
        disk, old = self.image.disk, self.slot
        frame = disk.frame_at_once()
        if frame is None:
            # The request will fail, and undo its own pin; the memory stays out of use all the same.
            old.pin()
            return None, lambda: disk.release(old)
        old.tenant = None
        self.slot = frame.take_large()
        self.slot.tenant = self
        for _ in range(self.pins):
            # Those who wait for this run hold a pin each, and will undo it on the new slot.
            self.slot.pin()
            old.unpin()
        return self.slot, lambda: disk.release(old)


class ImageCache:
    """What is cached of one image. Offsets in bytes, inside [0, *capacity*]."""

    def __init__(self, disk: DiskCache, image: int, capacity: int) -> None:
        self.disk = disk
        self.image = image
        self.capacity = capacity
        self.epoch = 0
        self.hits = 0
        self.misses = 0
        self.coalesced = 0
        self.prefetched = 0
        self._index: dict[int, Run] = {}

    def read_nowait(self, start: int, end: int, spend: bool = False) -> memoryview | None:
        """Return [*start*, *end*) if one run, or two neighbours, hold all of it, else None.

        The view is valid until the next await. *spend* says that the reader goes forward and will
        not come back to a run that it has read to its end.
        """
        run = self._index.get(start // SMALL)
        if run is None or not run.ready:
            return None
        if end > run.end:
            return self._joined(run, start, end, spend)
        self.hits += 1
        frame = run.slot.frame
        self.disk.touch(frame)
        if spend and end == run.end and run.slot.size == FRAME:
            self.disk.spent(frame)
        return run.slot.bytes(start - run.start, end - run.start)

    def _joined(self, run: Run, start: int, end: int, spend: bool) -> memoryview | None:
        """Return what *run* and its neighbour hold, joined in memory that is used again each time.

        A reader whose requests are out of step with the frames (it read a header first) needs two
        runs for each: joining them in fresh memory costs more than all the rest.
        """
        after = self._index.get(run.end // SMALL)
        if after is None or not after.ready or end > after.end:
            return None
        self.hits += 1
        room = self.disk.joining
        cut = run.end - start
        room[:cut] = run.slot.bytes(start - run.start, run.end - run.start)
        room[cut : end - start] = after.slot.bytes(run.end - after.start, end - after.start)
        for one in (run, after):
            self.disk.touch(one.slot.frame)
            if spend and end >= one.end and one.slot.size == FRAME:
                self.disk.spent(one.slot.frame)
        return room[: end - start]

    async def read(self, start: int, end: int, large: bool) -> memoryview | bytes:
        """Return [*start*, *end*), fetching what is missing.

        *large* is for a reader that goes forward: whole frames are fetched, and one that it has
        read to its end will not be wanted again.

        Raises VddkfsError if a fetch fails: of this range, not of what would have been fetched
        along with it. Cancellation leaves the fetches running.
        """
        try:
            return await self._read_runs(start, end, large or end - start > SMALL, large)
        except EngineError:
            # Some part of a run is damaged; it may not be the part that was asked for.
            return await self.read_direct(start, end)

    async def _read_runs(
        self, start: int, end: int, large: bool, spend: bool
    ) -> memoryview | bytes:
        run = await self._run_at(start, large)
        if large and 0 < end - run.end <= FRAME:
            joined = await self._wait_for_two(run, start, end, spend)
            if joined is not None:
                return joined
            run = await self._run_at(start, large)  # which may reach further than the one before
        if end <= run.end:
            part = await self._part(run, start, end)
            if spend and end == run.end and run.slot.size == FRAME:
                self.disk.spent(run.slot.frame)
            return part
        # Have the rest fetched meanwhile, as far as there is memory; nothing is held for it, so
        # that readers who need several frames each cannot wait for one another. A run that is
        # there comes first, because what is fetched may take its place; one that is on its way is
        # held by its own request.
        parts = []
        if run.ready:
            parts.append(bytes(await self._part(run, start, run.end)))
        self.prefetch(run.end, end, _no_hole)
        if not parts:
            parts.append(bytes(await self._part(run, start, run.end)))
        while run.end < end:
            position = run.end
            run = await self._run_at(position, large)
            parts.append(bytes(await self._part(run, position, min(end, run.end))))
        return b"".join(parts)

    async def _wait_for_two(self, run: Run, start: int, end: int, spend: bool) -> memoryview | None:
        """Have *run* and its neighbour fetched, and join them; None if one of them went away."""
        if not run.ready:
            self.prefetch(run.end, end, _no_hole)
            await self._part(run, start, run.end)
        after = await self._run_at(run.end, True)
        if end > after.end:
            return None
        await self._part(after, after.start, after.end)
        return self.read_nowait(start, end, spend)

    async def _run_at(self, position: int, large: bool) -> Run:
        run = self._index.get(position // SMALL)
        if run is None:
            self.misses += 1
            return await self._fetch(position, large)
        self.hits += run.ready
        self.coalesced += not run.ready
        return run

    async def _part(self, run: Run, start: int, end: int) -> memoryview:
        run.pins += 1
        run.slot.pin()
        try:
            if not run.ready:
                self.disk.source.poll()
                await run.wait()
            return run.slot.bytes(start - run.start, end - run.start)
        finally:
            run.pins -= 1
            self.disk.release(run.slot)

    async def read_direct(self, start: int, end: int) -> memoryview | bytes:
        """Return [*start*, *end*) as it is now, past the cache, in requests of that exact size.

        Sectors are the least a disk can be asked for: unaligned ends are rounded, and cut off.
        """
        first = start - start % SECTOR
        last = min(end + -end % SECTOR, self.capacity)
        if last - first <= FRAME:
            slot = await self._fetch_direct(first, last)
            self.disk.give_back(slot)
            return slot.bytes(start - first, end - first)
        parts = []
        for piece in range(first, last, FRAME):
            slot = await self._fetch_direct(piece, min(piece + FRAME, last))
            self.disk.give_back(slot)
            parts.append(bytes(slot.bytes(0, min(FRAME, last - piece))))
        return memoryview(b"".join(parts))[start - first : end - first]

    def prefetch(self, start: int, end: int, is_hole: Callable[[int, int], bool]) -> int:
        """Begin to fetch the frames of [*start*, *end*) that are not there and not known holes.

        Returns the offset where it stopped: *end*, or less where memory or the disk is busy.
        """
        disk = self.disk
        for position in range(start - start % FRAME, end, FRAME):
            if disk.wanted or disk.fetches_ahead >= FETCHES_AHEAD:
                return position
            last = min(position + FRAME, self.capacity)
            if position // SMALL in self._index or is_hole(position, last):
                continue
            frame = disk.frame_nowait()
            if frame is None:
                return position
            disk.fetches_ahead += 1
            self.prefetched += 1
            self._start(Run(self, position, last, frame.take_large()), ahead=True)
        return end

    def invalidate(self) -> None:
        """Forget everything; what is being fetched now will not be kept."""
        self.epoch += 1
        frames = {run.slot.frame for run in self._index.values()}
        self._index.clear()
        self.disk.drop(frames)

    def forget(self, run: Run) -> None:
        """Take *run* out of the index."""
        index = self._index
        for block in range(run.start // SMALL, -(-run.end // SMALL)):
            if index.get(block) is run:
                del index[block]

    async def _fetch(self, position: int, large: bool) -> Run:
        size = FRAME if large else SMALL
        slot = await self.disk.slot(size)
        found = self._index.get(position // SMALL)
        if found is not None:
            # Somebody else began it while this task waited for memory.
            self.disk.release(slot)
            return found
        start = position - position % size
        run = Run(self, start, min(start + size, self.capacity), slot)
        self._start(run)
        return run

    def _start(self, run: Run, ahead: bool = False) -> None:
        index = self._index
        for block in range(run.start // SMALL, -(-run.end // SMALL)):
            index.setdefault(block, run)
        self.disk.source.submit_read(
            ReadRequest(
                self.image,
                run.start // SECTOR,
                (run.end - run.start) // SECTOR,
                run.slot,
                self._ahead_done(run) if ahead else run.done,
                run.moved,
            )
        )

    def _ahead_done(self, run: Run) -> Callable[[VddkfsError | None], None]:
        def done(error: VddkfsError | None) -> None:
            self.disk.fetches_ahead -= 1
            run.done(error)

        return done

    async def _fetch_direct(self, start: int, end: int) -> Slot:
        """Return the slot into which [*start*, *end*) was read; the caller gives it back."""
        slot = await self.disk.direct_slot(end - start)
        answer = _Answer(slot, self.disk)
        self.disk.source.submit_read(
            ReadRequest(
                self.image,
                start // SECTOR,
                (end - start) // SECTOR,
                slot,
                answer.done,
                answer.moved,
                direct=True,
            )
        )
        self.disk.source.poll()
        return await answer.wait()


def _no_hole(_start: int, _end: int) -> bool:
    return False


class _Answer:
    """The answer to one direct read; once nobody waits for it, the slot goes back by itself."""

    __slots__ = ("disk", "error", "finished", "left", "lost", "slot", "task")

    def __init__(self, slot: Slot, disk: DiskCache) -> None:
        self.slot = slot
        self.disk = disk
        self.error: VddkfsError | None = None
        self.finished = False
        self.left = False
        self.lost = False
        self.task: trio.lowlevel.Task | None = None

    def done(self, error: VddkfsError | None) -> None:
        self.error = error
        self.finished = True
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None
        elif self.left and not self.lost:
            self.disk.give_back(self.slot)

    def moved(self) -> Moved:
        disk, old = self.disk, self.slot
        frame = disk.frame_at_once()
        if frame is None:
            self.lost = True
            return None, lambda: disk.give_back(old)
        self.slot = frame.take_large()
        return self.slot, lambda: disk.give_back(old)

    async def wait(self) -> Slot:
        if not self.finished:
            self.task = trio.lowlevel.current_task()

            def abort(_: object) -> trio.lowlevel.Abort:
                self.task = None
                self.left = True
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        if self.error is not None:
            if not self.lost:
                self.disk.give_back(self.slot)
            raise self.error
        return self.slot
