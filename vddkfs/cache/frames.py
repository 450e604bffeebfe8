"""Whose memory goes when more is needed: the slots of each disk, and the balance between disks.

Two sizes of slots share a disk's frames: whole frames for those who go forward, and blocks for
scattered reads, which are cut from a frame as they are wanted. What is evicted is decided by the
policy of ``eviction`` for both alike; a frame is wanted whole when its last block has gone.

All of this runs on the trio thread.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import trio

from vddkfs.cache.arena import FRAME, Arena, Chunk, Frame, FreeFrames, Slot
from vddkfs.cache.eviction import EvictionCache
from vddkfs.cache.runs import Run
from vddkfs.engines.histogram import Histogram
from vddkfs.engines.requests import ReadRequest

log = logging.getLogger(__name__)

SPENT_KEPT: Final = 16
"""Runs kept behind sequential readers: their kernel has the data, so the rest is used again."""
_TRIES: Final = 64
"""Blocks that are evicted, at most, for a frame that is wanted whole."""
_AT_ONCE: Final = 1024
"""Runs that are dropped without a pause."""


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
    """The slots of one disk."""

    def __init__(self, key: object, arena: Arena, nursery: trio.Nursery, source: Source) -> None:
        self.key = key
        self.arena = arena
        self.block = arena.block
        self.source = source
        self.nursery = nursery
        self.free = FreeFrames()
        self.fetches_ahead = 0
        self.evictions = 0
        self.waits = Histogram()
        """How long readers waited for what was not there."""
        self.poor: Callable[[DiskCache], None] | None = None
        """Called when the disk has to evict while others have more than their share."""
        self._kept: EvictionCache[tuple[int, int, int], Run] = EvictionCache()
        self._spent: dict[Run, int] = {}
        self._cut: dict[Frame, list[Slot]] = {}
        """Frames that are cut into blocks, those with blocks to be had, and which."""
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

    # What is kept.

    def keep(self, run: Run) -> None:
        """Keep *run*, which is there now, until it is evicted."""
        before = self._kept.pop(run.key, None)
        if before is not None and before is not run:
            # Of before an invalidation, and not yet taken away.
            self._let_go(before)
        run.kept = True
        self._kept[run.key] = run

    def spent(self, run: Run) -> None:
        """Note that a sequential reader is through with *run*: it may be the next to go."""
        self._kept.demote(run.key)
        self._spent.pop(run, None)
        self._spent[run] = run.uses

    def drop(self, runs: Iterable[Run]) -> None:
        """Free the memory of *runs*, which nobody finds any more: many of them in turns."""
        if not self._drop_some(iterator := iter(runs)):
            self.nursery.start_soon(self._drop_all, iterator)

    async def _drop_all(self, runs: Iterable[Run]) -> None:
        iterator = iter(runs)
        while not self._drop_some(iterator):
            await trio.lowlevel.checkpoint()

    def _drop_some(self, runs: Iterable[Run]) -> bool:
        """Drop the next of *runs*; say whether that was all."""
        for number, run in enumerate(runs, 1):
            if run.kept:
                self._kept.pop(run.key, None)
                self._let_go(run)
            if number == _AT_ONCE:
                return False
        self._want.unpark_all()
        return True

    def _let_go(self, run: Run) -> None:
        """Free the memory of *run*, which is not kept any more, as soon as nobody uses it."""
        run.left()
        self._spent.pop(run, None)
        if not run.slot.pins:
            self._free(run.slot)

    # Slots.

    async def slot(self, size: int) -> Slot:
        """Return a pinned slot for *size* bytes (at most a frame), waiting for one if need be.

        Whoever waits here must hold no pin: the slots that the waiters need would never come free.
        """
        while True:
            slot = self.slot_nowait(size)
            if slot is not None:
                return slot
            await self._more()

    def slot_nowait(self, size: int) -> Slot | None:
        """Return a pinned slot, evicting if the disk may have no more; None: not just now."""
        large = size > self.block
        if not large and self._cut:
            return self._block()
        frame = self._free_frame(large)
        if frame is not None:
            return self._taken(frame, large)
        if self.arena.may_grow(self.key):
            self._grow_soon()
            return None
        if self.poor is not None:
            self.poor(self)
        return self._evicted(large)

    def slot_at_once(self, size: int) -> Slot | None:
        """Return a slot, evicting also where the disk might have more; None: all are in use."""
        return self.slot_nowait(size) or self._evicted(size > self.block)

    async def _more(self) -> None:
        """Wait until there may be more to take than just now."""
        if self.arena.may_grow(self.key) or not self.arena.chunks.get(self.key):
            await self._grow()
        else:
            await self._want.park()

    @property
    def wanted(self) -> bool:
        """Say whether somebody waits for memory: read-ahead then stands back."""
        return bool(self._want)

    def wake(self) -> None:
        """Have those who wait for memory look again."""
        self._want.unpark_all()

    def release(self, slot: Slot) -> None:
        """Undo one pin of *slot*; a slot that holds nothing to be kept is free then."""
        slot.unpin()
        if not slot.pins:
            if slot.tenant is None or not slot.tenant.kept:
                self._free(slot)
            self._want.unpark()

    def _block(self) -> Slot:
        """Return a block, pinned, of the frame that was cut first of those that have some."""
        frame, slots = next(iter(self._cut.items()))
        slot = slots.pop()
        if not slots:
            del self._cut[frame]
        slot.pin()
        return slot

    def _free_frame(self, large: bool) -> Frame | None:
        self._recycle_spent()
        frame = self.free.pop()
        if frame is None:
            return self._uncut() if large else None
        if len(self.free) < 4 and len(self._spent) < SPENT_KEPT:
            self._grow_soon()
        return frame

    def _uncut(self) -> Frame | None:
        """Return a frame all of whose blocks are free."""
        for frame, slots in self._cut.items():
            if len(slots) == len(frame.slots):
                del self._cut[frame]
                return frame
        return None

    def _taken(self, frame: Frame, large: bool) -> Slot:
        """Return a pinned slot of *frame*, which is free."""
        slots = frame.cut(FRAME if large else self.block)
        if len(slots) > 1:
            self._cut[frame] = slots[::-1]
            return self._block()
        slots[0].pin()
        return slots[0]

    def _free(self, slot: Slot) -> None:
        """Take back *slot*, which nobody uses and which holds nothing."""
        slot.tenant = None
        frame = slot.frame
        if slot.size == FRAME:
            self.free.add(frame)
            return
        slots = self._cut.setdefault(frame, [])
        slots.append(slot)
        # One frame stays cut, for those who come and go.
        if len(slots) == len(frame.slots) and len(self._cut) > 1:
            del self._cut[frame]
            self.free.add(frame)

    # Eviction.

    def _recycle_spent(self) -> None:
        """Free one run that sequential readers have left behind, unless it was read again."""
        while len(self._spent) > SPENT_KEPT:
            run, uses = next(iter(self._spent.items()))
            del self._spent[run]
            if run.kept and run.uses == uses and not run.slot.pins:
                del self._kept[run.key]
                self._evict(run)
                return

    def _evicted(self, large: bool) -> Slot | None:
        """Return a pinned slot that others had to leave, or None if they are all in use."""
        for _ in range(_TRIES):
            run = self._kept.evict(_unused)
            if run is None:
                break
            frame = run.slot.frame
            self._evict(run)
            if large and not frame.pins:
                self._empty(frame)
            found = self.free.pop()
            if found is not None:
                return self._taken(found, large)
            if not large and self._cut:
                return self._block()
        whole = self._uncut() if large else None
        return self._taken(whole, True) if whole is not None else None

    def _evict(self, run: Run) -> None:
        self.evictions += 1
        self._let_go(run)

    def _empty(self, frame: Frame) -> None:
        """Evict whatever is left in *frame*, which nobody uses, and free it."""
        for slot in frame.slots:
            run = slot.tenant
            if isinstance(run, Run):
                self._kept.pop(run.key, None)
                self._evict(run)
        if self._cut.pop(frame, None) is not None:
            self.free.add(frame)

    # Memory.

    def _grow_soon(self) -> None:
        if not self._growing and self.arena.may_grow(self.key):
            self._growing = True
            self.nursery.start_soon(self._grow_once)

    async def _grow_once(self) -> None:
        try:
            await self._grow()
        except Exception as error:
            # Whoever needs the memory meets the same error, and can be told; the mount goes on.
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
            if chunk.pinned():
                continue
            for frame in chunk.frames:
                self._empty(frame)
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


def _unused(run: Run) -> bool:
    return not run.slot.pins


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
        except Exception:
            # The disks keep what they have; the mount goes on.
            log.exception("a bug in vddkfs: memory cannot be moved between disks")
        finally:
            self._balancing = False
