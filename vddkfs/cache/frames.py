"""Whose memory goes when more is needed: the frames of each disk, and the balance between disks.

All of this runs on the trio thread.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import trio
from cachetools import LRUCache

from vddkfs.cache.arena import FRAME, SMALL, SMALLS_IN_FRAME, Arena, Chunk, Frame, FreeFrames, Slot
from vddkfs.engines.requests import ReadRequest

log = logging.getLogger(__name__)

SPENT_KEPT: Final = 16
"""Frames kept behind sequential readers: their kernel has the data, so the rest is used again."""
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
        self.poor: Callable[[DiskCache], None] | None = None
        """Called when the disk has to evict while others have more than their share."""
        self._kept: LRUCache[Frame, None] = LRUCache(maxsize=_UNBOUNDED)
        self._spent: dict[Frame, None] = {}
        self._small: Frame | None = None
        self._direct: dict[Frame, list[Slot]] = {}
        self._joining: memoryview | None = None
        self._growing = False
        self._want = trio.lowlevel.ParkingLot()

    @property
    def joining(self) -> memoryview:
        """Memory of two frames to join slots in. What is there is valid until the next await."""
        if self._joining is None:
            self._joining = memoryview(bytearray(2 * FRAME))
        return self._joining

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
        self._spent.pop(frame, None)
        self._spent[frame] = None

    def wake(self) -> None:
        """Have those who wait for a frame look again."""
        self._want.unpark_all()

    @property
    def wanted(self) -> bool:
        """Say whether somebody waits for a frame: read-ahead then stands back."""
        return bool(self._want)

    def release(self, slot: Slot) -> None:
        """Undo one pin of *slot*; a frame that holds nothing then is free."""
        frame = slot.frame
        frame.pins -= 1
        if frame.pins == 0:
            if frame not in self._kept and frame is not self._small:
                self.free.add(frame)
            self._want.unpark()

    def frame_nowait(self) -> Frame | None:
        """Return a frame to fill, evicting if the disk may have no more; None: not just now."""
        self._recycle_spent()
        frame = self.free.pop()
        if frame is not None:
            if len(self.free) < 4 and len(self._spent) < SPENT_KEPT:
                self._grow_soon()
            return frame
        if self.arena.may_grow(self.key):
            self._grow_soon()
            return None
        if self.poor is not None:
            self.poor(self)
        return self._idle_direct_frame() or self._evict_oldest()

    def frame_at_once(self) -> Frame | None:
        """Return a frame, evicting also where the disk might have more; None: all are in use."""
        return self.frame_nowait() or self._idle_direct_frame() or self._evict_oldest()

    def _evictable(self, frame: Frame) -> bool:
        """Say whether *frame* holds something and may hold something else."""
        return frame in self._kept and not frame.pins and frame is not self._small

    def _recycle_spent(self) -> None:
        for frame in list(self._spent)[: max(0, len(self._spent) - SPENT_KEPT)]:
            del self._spent[frame]
            if self._evictable(frame):
                self._evict(frame)
                break

    def _evict_oldest(self) -> Frame | None:
        for _ in range(len(self._kept)):
            frame, _none = self._kept.popitem()
            self._kept[frame] = None
            if self._evictable(frame):
                self._evict(frame)
                return self.free.pop()
        return self._give_up_small()

    def _give_up_small(self) -> Frame | None:
        """Return the frame that small slots are cut from, where a disk has nothing else."""
        frame = self._small
        if frame is None or frame.pins:
            return None
        self._small = None
        if frame in self._kept:
            self._evict(frame)
        else:
            self.free.add(frame)
        return self.free.pop()

    async def frame(self) -> Frame:
        """Return a frame to fill, waiting for memory or for another request if need be.

        Whoever waits here must hold no pin: the frames that the waiters need would never come free.
        """
        while True:
            frame = self.frame_nowait()
            if frame is not None:
                return frame
            await self._more()

    async def _more(self) -> None:
        """Wait until there may be more to take than just now."""
        if self.arena.may_grow(self.key) or not self.arena.chunks.get(self.key):
            await self._grow()
        else:
            await self._want.park()

    async def slot(self, size: int) -> Slot:
        """Return a pinned slot of at least *size* bytes (at most a frame) to keep something in."""
        if size > SMALL:
            return (await self.frame()).take_large()
        while self._small is None or self._small.small_used == SMALLS_IN_FRAME:
            frame = await self.frame()
            if self._small is None or self._small.small_used == SMALLS_IN_FRAME:
                self._replace_small(frame)
            else:
                self.free.add(frame)
        return self._small.take_small()

    def _replace_small(self, frame: Frame) -> None:
        """Cut small slots from *frame* from now on; the one before is like any other then."""
        old, self._small = self._small, frame
        if old is not None and not old.pins:
            if old not in self._kept:
                self.free.add(old)
            self._want.unpark()

    async def direct_slot(self, size: int) -> Slot:
        """Return a pinned slot of at least *size* bytes for one answer; see ``give_back``."""
        if size > SMALL:
            return (await self.frame()).take_large()
        while True:
            for slots in self._direct.values():
                if slots:
                    slot = slots.pop()
                    slot.pin()
                    return slot
            frame = self.frame_nowait()
            if frame is not None:
                self._direct[frame] = [frame.take_small() for _ in range(SMALLS_IN_FRAME)]
                frame.pins = 0
            else:
                await self._more()

    def give_back(self, slot: Slot) -> None:
        """Take back a slot that was used for one answer."""
        slots = self._direct.get(slot.frame)
        if slots is None:
            self.release(slot)
            return
        slots.append(slot)
        slot.unpin()
        self._want.unpark()

    def _idle_direct_frame(self) -> Frame | None:
        """Return a frame whose slots for direct answers are all back."""
        for frame in self._direct:
            if not frame.pins:
                del self._direct[frame]
                self.free.add(frame)
                return self.free.pop()
        return None

    def drop(self, frames: Iterable[Frame]) -> None:
        """Free *frames*, whose content nobody wants any more, as far as nobody is using them."""
        for frame in frames:
            if self._evictable(frame):
                self._evict(frame)
                self._want.unpark()

    def _evict(self, frame: Frame) -> None:
        self._kept.pop(frame, None)
        self._spent.pop(frame, None)
        for slot in frame.slots:
            if slot.tenant is not None:
                slot.tenant.evicted()
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
        except Exception as error:
            # Whoever needs the frame meets the same error, and can be told; the mount goes on.
            log.warning("%s: the cache cannot grow: %s", self.key, error)
        finally:
            self._growing = False

    async def _grow(self) -> None:
        chunk = await self.arena.grow(self.key)
        if chunk is not None:
            self._adopt(chunk)

    async def surrender(self) -> bool:
        """Give one chunk that nobody is reading back to the arena; say whether one could go.

        Raises nothing: a worker that does not answer keeps its chunk.
        """
        for chunk in self.arena.chunks.get(self.key, ()):
            if chunk.pinned() or any(frame is self._small for frame in chunk.frames):
                continue
            for frame in chunk.frames:
                self._direct.pop(frame, None)
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

    def _balance_soon(self, poor: DiskCache) -> None:
        have = len(self.arena.chunks.get(poor.key, ()))
        enough = have >= self.arena.fair_share
        if not enough and not self._balancing and self.arena.richest() is not None:
            self._balancing = True
            self._nursery.start_soon(self._balance)

    async def _balance(self) -> None:
        """Move one chunk from the richest disk to the spares, where the poor one finds it."""
        try:
            richest = self.arena.richest()
            if richest is not None and await self._disks[richest].surrender():
                for disk in self._disks.values():
                    disk.wake()
        finally:
            self._balancing = False
