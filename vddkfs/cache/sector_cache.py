"""The sector cache: what was read from a disk, kept in the arena, and found again without a wait.

``ImageCache`` is what an image's readers use: ``read_nowait`` (a hit: no await, no copy), ``read``,
``read_direct`` and ``prefetch``. ``DiskCache`` has the frames of one disk and decides which goes.
Blocks of 64 KiB are the unit of the index; a *run* is what one request fetched: one block for a
scattered read, up to a frame (1 MiB) for a stream. A block that is being fetched is in the index
too, so that it is fetched once, however many ask.

Invalidation is by epoch: it empties the index, and a fetch that was under way then is handed to the
readers who waited for it (they began before) but not kept.

Cancellation: a reader that is cancelled leaves its fetch running, for the others who may wait for
it. All of this runs on the trio thread.
"""

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import trio
from cachetools import LRUCache

from vddkfs.cache.arena import FRAME, SMALL, SMALLS_IN_FRAME, Arena, Chunk, Frame, FreeFrames, Slot
from vddkfs.engines.base import SECTOR
from vddkfs.engines.client import Moved, ReadRequest
from vddkfs.errors import VddkfsError

SPENT_KEPT: Final = 16
"""Frames kept behind a sequential reader: its kernel has the data, so the rest is used again first.
"""
FETCHES_AHEAD: Final = 24
"""Frames that read-ahead may have under way for one disk."""
_UNBOUNDED: Final = float("inf")


class Source(Protocol):
    """The daemon's end of the worker that fills slots."""

    def submit_read(self, request: ReadRequest) -> None:
        """Have *request* done; its ``done`` is called once, from the trio thread."""

    def poll(self) -> None:
        """Look for answers now, and for a moment more while they come quickly."""

    def lend(self, number: int, fd: int, size: int) -> None:
        """Let the worker use a chunk."""

    async def take_back(self, number: int) -> bool:
        """End that; say whether the worker is known not to use the chunk any more."""


class Run:
    """What one request fetched, or is fetching: [*start*, *end*) of an image, in bytes."""

    __slots__ = ("end", "epoch", "error", "image", "ready", "slot", "start", "waiters")

    def __init__(self, image: "ImageCache", start: int, end: int, slot: Slot) -> None:
        self.image = image
        self.start = start
        self.end = end
        self.slot = slot
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

    def moved(self) -> Moved | None:
        """Return a new slot for the request, whose old one a lost worker may still write to."""
        disk, old = self.image.disk, self.slot
        frame = disk.frame_nowait()
        if frame is None:
            return None
        old.tenant = None
        self.slot = frame.take_large()
        self.slot.tenant = self
        return self.slot, lambda: disk.release(old)


class DiskCache:
    """The frames of one disk."""

    def __init__(self, key: object, arena: Arena, nursery: trio.Nursery, source: Source) -> None:
        self.key = key
        self.arena = arena
        self.source = source
        self.nursery = nursery
        self.free = FreeFrames()
        self.fetches_ahead = 0
        self.evictions = 0
        self.poor: Callable[[], None] | None = None
        """Called when the disk has to evict while others have more than their share."""
        self._kept: LRUCache[Frame, None] = LRUCache(maxsize=_UNBOUNDED)
        self._spent: deque[Frame] = deque()
        self._small: Frame | None = None
        self._direct: list[Slot] = []
        self._growing = False
        self._want = trio.lowlevel.ParkingLot()

    @property
    def bytes_held(self) -> int:
        """Bytes of arena that belong to this disk."""
        return len(self.arena.chunks.get(self.key, ())) * self.arena.chunk_size

    def keep(self, frame: Frame) -> None:
        """Note that *frame* holds something worth keeping, used just now."""
        self._kept[frame] = None

    def touch(self, frame: Frame) -> None:
        """Note a use of *frame*."""
        self._kept.get(frame)

    def spent(self, frame: Frame) -> None:
        """Note that a sequential reader is through with *frame*: it may be the next to go."""
        self._spent.append(frame)

    def release(self, slot: Slot) -> None:
        """Undo one pin of *slot*; a frame that holds nothing then is free."""
        frame = slot.frame
        frame.pins -= 1
        if frame.pins == 0:
            if frame not in self._kept and frame is not self._small:
                self.free.add(frame)
            if self._want:
                self._want.unpark()

    def frame_nowait(self) -> Frame | None:
        """Return a frame to fill, evicting if the disk may have no more; None: not just now."""
        while len(self._spent) > SPENT_KEPT:
            frame = self._spent.popleft()
            if frame in self._kept and not frame.pins:
                self._evict(frame)
                break
        frame_or_none = self.free.pop()
        if frame_or_none is not None:
            if len(self.free) < 4:
                self._grow_soon()
            return frame_or_none
        if self.arena.may_grow(self.key):
            self._grow_soon()
            return None
        if self.poor is not None and len(self.arena.chunks[self.key]) < self.arena.fair_share:
            self.poor()
        for _ in range(len(self._kept)):
            frame, _none = self._kept.popitem()
            if not frame.pins and frame is not self._small:
                self._kept[frame] = None
                self._evict(frame)
                return self.free.pop()
            self._kept[frame] = None
        return None

    async def frame(self) -> Frame:
        """Return a frame to fill, waiting for memory or for another request if need be."""
        while True:
            frame = self.frame_nowait()
            if frame is not None:
                return frame
            if self.arena.may_grow(self.key) or not self.arena.chunks.get(self.key):
                await self._grow()
            else:
                await self._want.park()

    async def slot(self, size: int, keep: bool) -> Slot:
        """Return a pinned slot of at least *size* bytes (at most a frame).

        *keep* says that the cache will keep what comes into it; otherwise it is for one answer, and
        goes back by ``give_back``.
        """
        if size > SMALL:
            return (await self.frame()).take_large()
        if not keep:
            if not self._direct:
                frame = await self.frame()
                self._direct.extend(frame.take_small() for _ in range(SMALLS_IN_FRAME))
            return self._direct.pop()
        while self._small is None or self._small.small_used == SMALLS_IN_FRAME:
            frame = await self.frame()
            if self._small is None or self._small.small_used == SMALLS_IN_FRAME:
                self._small = frame
            else:
                self.free.add(frame)
        return self._small.take_small()

    def give_back(self, slot: Slot) -> None:
        """Take back a slot that was used for one answer."""
        if slot.size == SMALL:
            self._direct.append(slot)
        else:
            self.release(slot)

    def drop(self, runs: list[Run]) -> None:
        """Free the frames of *runs* that were taken out of the index."""
        for frame in {run.slot.frame for run in runs}:
            if not frame.pins and frame in self._kept and frame is not self._small:
                self._evict(frame)

    def _evict(self, frame: Frame) -> None:
        self._kept.pop(frame, None)
        for slot in frame.slots:
            if isinstance(slot.tenant, Run):
                slot.tenant.image.forget(slot.tenant)
                slot.tenant = None
        self.evictions += 1
        self.free.add(frame)

    def _grow_soon(self) -> None:
        if not self._growing and self.arena.may_grow(self.key):
            self._growing = True
            self.nursery.start_soon(self._grow_once)

    async def _grow_once(self) -> None:
        try:
            await self._grow()
        except VddkfsError:
            # Whoever needs the frame meets the same error, and can be told.
            pass
        finally:
            self._growing = False

    async def _grow(self) -> None:
        chunk = await self.arena.grow(self.key)
        if chunk is not None:
            self._adopt(chunk)

    async def surrender(self) -> bool:
        """Give one chunk that nobody is reading back to the arena; say whether one could go."""
        for chunk in self.arena.chunks.get(self.key, ()):
            if chunk.pinned() or any(frame is self._small for frame in chunk.frames):
                continue
            for frame in chunk.frames:
                if frame in self._kept:
                    self._evict(frame)
            self.free.remove_chunk(chunk)
            if await self.source.take_back(chunk.number):
                self.arena.release(chunk)
                return True
            self.free.add_chunk(chunk)
            return False
        return False

    def _adopt(self, chunk: Chunk) -> None:
        self.source.lend(chunk.number, chunk.fd, chunk.size)
        self.free.add_chunk(chunk)
        self._want.unpark_all()


class SectorCache:
    """The caches of all disks of a mount, in one arena."""

    def __init__(self, arena: Arena, nursery: trio.Nursery) -> None:
        self.arena = arena
        self._nursery = nursery
        self._disks: dict[object, DiskCache] = {}
        self._balancing = False

    def disk(self, key: object, source: Source) -> DiskCache:
        """Return a new cache for the disk *key*, which *source* fills."""
        disk = DiskCache(key, self.arena, self._nursery, source)
        disk.poor = self._balance_soon
        self._disks[key] = disk
        return disk

    def _balance_soon(self) -> None:
        if not self._balancing and self.arena.richest() is not None:
            self._balancing = True
            self._nursery.start_soon(self._balance)

    async def _balance(self) -> None:
        """Move one chunk from the richest disk to the spares, where the poor one finds it."""
        try:
            richest = self.arena.richest()
            if richest is not None:
                await self._disks[richest].surrender()
        finally:
            self._balancing = False


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
        """Return [*start*, *end*) if one run holds all of it, else None.

        The view is valid until the next await. *spend* says that the reader goes forward and will
        not come back to a run that it has read to its end.
        """
        run = self._index.get(start // SMALL)
        if run is None or not run.ready or end > run.end:
            return None
        self.hits += 1
        frame = run.slot.frame
        self.disk.touch(frame)
        if spend and end == run.end and run.slot.size == FRAME:
            self.disk.spent(frame)
        return run.slot.bytes(start - run.start, end - run.start)

    async def read(self, start: int, end: int, large: bool) -> memoryview | bytes:
        """Return [*start*, *end*), fetching what is missing; whole frames of it if *large*.

        Raises VddkfsError if a fetch fails. Cancellation leaves the fetches running.
        """
        pinned: list[tuple[Run, int, int]] = []
        try:
            position = start
            while position < end:
                run = self._index.get(position // SMALL)
                if run is None:
                    run = await self._fetch(position, large or end - position > SMALL)
                    self.misses += 1
                elif not run.ready:
                    self.coalesced += 1
                run.slot.pin()
                pinned.append((run, position, min(end, run.end)))
                position = run.end
            if not pinned[-1][0].ready:
                self.disk.source.poll()
            for run, _, _ in pinned:
                await run.wait()
            pieces = [
                run.slot.bytes(first - run.start, last - run.start) for run, first, last in pinned
            ]
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            for run, _, _ in pinned:
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
            parts.append(bytes(slot.bytes(0, min(FRAME, last - piece))))
            self.disk.give_back(slot)
        return memoryview(b"".join(parts))[start - first : end - first]

    def prefetch(self, start: int, end: int, is_hole: Callable[[int, int], bool]) -> int:
        """Begin to fetch the frames of [*start*, *end*) that are not there and not known holes.

        Returns the offset where it stopped: *end*, or less where memory or the disk is busy.
        """
        disk = self.disk
        for position in range(start, end, FRAME):
            if disk.fetches_ahead >= FETCHES_AHEAD:
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
        runs = list(set(self._index.values()))
        self._index.clear()
        self.disk.drop(runs)

    def forget(self, run: Run) -> None:
        """Take *run* out of the index."""
        index = self._index
        for block in range(run.start // SMALL, -(-run.end // SMALL)):
            if index.get(block) is run:
                del index[block]

    async def _fetch(self, position: int, large: bool) -> Run:
        size = FRAME if large else SMALL
        slot = await self.disk.slot(size, keep=True)
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
        slot = await self.disk.slot(end - start, keep=False)
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


class _Answer:
    """The answer to one direct read; if nobody waits for it any more, the slot goes back by itself."""

    __slots__ = ("disk", "error", "finished", "left", "slot", "task")

    def __init__(self, slot: Slot, disk: DiskCache) -> None:
        self.slot = slot
        self.disk = disk
        self.error: VddkfsError | None = None
        self.finished = False
        self.left = False
        self.task: trio.lowlevel.Task | None = None

    def done(self, error: VddkfsError | None) -> None:
        self.error = error
        self.finished = True
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None
        elif self.left:
            self.disk.give_back(self.slot)

    def moved(self) -> Moved | None:
        disk, old = self.disk, self.slot
        frame = disk.frame_nowait()
        if frame is None:
            return None
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
            self.disk.give_back(self.slot)
            raise self.error
        return self.slot
