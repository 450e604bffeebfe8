"""The sector cache: what is known of an image's sectors, and getting what is not.

``ImageCache`` is what an image's readers use: ``read_nowait`` (a hit: no await, no copy), ``read``,
``read_direct`` and ``prefetch``. The unit of its index is a block (``Arena.block``); a *run* is
what one request fetched: one block for a scattered read, up to a frame (1 MiB) for a stream. A
block that is being fetched is in the index too, so that it is fetched once, however many ask.

Invalidation is by epoch: what it covers leaves the index, and a fetch that was under way then is
handed to the readers who waited for it (they began before) but not kept.

Cancellation: a reader that is cancelled leaves its fetch running, for the others who may wait for
it. All of this runs on the trio thread.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Final

from cachetools import TTLCache

from vddkfs.cache import direct
from vddkfs.cache.arena import FRAME, Slot
from vddkfs.cache.counts import Counts
from vddkfs.cache.frames import DiskCache
from vddkfs.cache.runs import Run
from vddkfs.cache.worth import Clusters, Worth
from vddkfs.engines.base import SECTOR
from vddkfs.engines.requests import ReadRequest
from vddkfs.errors import EngineError, VddkfsError

FETCHES_AHEAD: Final = 24
"""Frames that read-ahead may have under way for one disk."""
_MOST_FAILED: Final = 4096
_OVER: Final = -1
"""The epoch of a run that is not to be kept."""
_FAILED_SECONDS: Final = 60.0
"""For how long a fetch that failed is not tried again: each costs a reader its time, and VDDK's
memory of a failed read is kept out of use."""


class ImageCache:
    """What is cached of one image. Offsets in bytes, inside [0, *capacity*]."""

    def __init__(self, disk: DiskCache, image: int, capacity: int) -> None:
        self.disk = disk
        self.image = image
        self.capacity = capacity
        self.block = disk.block
        self.epoch = 0
        self.counts = Counts()
        self.worth = Worth()
        """What it was worth to read ahead of streams."""
        self.is_hole: Callable[[int, int], bool] = _no_hole
        """Says of a range whether it is known to be zeros: nothing is fetched ahead there."""
        self._clusters_worth = Worth()
        self._clusters = Clusters(capacity, self._clusters_worth)
        self._index: dict[int, Run] = {}
        self._failed: TTLCache[int, None] = TTLCache(_MOST_FAILED, _FAILED_SECONDS)
        """Blocks whose fetch has failed of late: what is asked of them is asked for itself."""

    def read_nowait(self, start: int, end: int, spend: bool = False) -> memoryview | None:
        """Return [*start*, *end*) if one run, or two neighbours, hold all of it, else None.

        The view is valid until the next await. *spend* says that the reader goes forward and will
        not come back to a run that it has read to its end.
        """
        run = self._index.get(start // self.block)
        if run is None or not run.ready:
            return None
        if end > run.end:
            joined = self._joined(run, start, end, spend)
            self.counts.hits += joined is not None
            return joined
        self.counts.hits += 1
        run.used(start, end)
        if spend and end == run.end and run.large:
            self.disk.spent(run)
        return run.slot.bytes(start - run.start, end - run.start)

    def _joined(self, run: Run, start: int, end: int, spend: bool) -> memoryview | None:
        """Return what *run* and its neighbour hold, joined in memory that is used again each time.

        A reader whose requests are out of step with the frames (it read a header first) needs two
        runs for each: joining them in fresh memory costs more than all the rest.
        """
        after = self._index.get(run.end // self.block)
        if after is None or not after.ready or end > after.end:
            return None
        room = self.disk.joining
        cut = run.end - start
        room[:cut] = run.slot.bytes(start - run.start, run.end - run.start)
        room[cut : end - start] = after.slot.bytes(run.end - after.start, end - after.start)
        for one in (run, after):
            one.used(max(start, one.start), min(end, one.end))
            if spend and end >= one.end and one.large:
                self.disk.spent(one)
        return room[: end - start]

    async def read(self, start: int, end: int, large: bool) -> memoryview | bytes:
        """Return [*start*, *end*), fetching what is missing.

        *large* is for a reader that goes forward: whole frames are fetched, and one that it has
        read to its end will not be wanted again.

        Raises VddkfsError if a fetch fails: of this range, not of what would have been fetched
        along with it. Cancellation leaves the fetches running.
        """
        began = time.perf_counter()
        if self._is_there(start, end):
            self.counts.coalesced += 1
        else:
            self.counts.misses += 1
        try:
            return await self._read(start, end, large)
        finally:
            self.disk.waits.observe(time.perf_counter() - began)

    async def _read(self, start: int, end: int, large: bool) -> memoryview | bytes:
        if not self._has_failed(start, end):
            # Some part of a run is damaged; it may not be the part that was asked for.
            with contextlib.suppress(EngineError):
                return await self._read_runs(start, end, large or end - start > self.block, large)
        return await self.read_direct(start, end)

    def _has_failed(self, start: int, end: int) -> bool:
        failed = self._failed
        return bool(failed) and any(
            block in failed for block in range(start // self.block, -(-end // self.block))
        )

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
            if spend and end == run.end and run.large:
                self.disk.spent(run)
            return part
        # Have the rest fetched meanwhile, as far as there is memory; nothing is held for it, so
        # that readers who need several frames each cannot wait for one another. A run that is
        # there comes first, because what is fetched may take its place; one that is on its way is
        # held by its own request.
        parts = []
        if run.ready:
            parts.append(bytes(await self._part(run, start, run.end)))
        self._begin(run.end, end)
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
            self._begin(run.end, end)
            await self._part(run, start, run.end)
        after = await self._run_at(run.end, True)
        if end > after.end:
            return None
        await self._part(after, after.start, after.end)
        first = self._index.get(start // self.block)
        if first is None or not first.ready or end <= first.end:
            return None
        return self._joined(first, start, end, spend)

    async def _run_at(self, position: int, large: bool) -> Run:
        run = self._index.get(position // self.block)
        if run is None:
            self.worth.missed()
            self._clusters_worth.missed()
            return await self._fetch(position, large)
        return run

    async def _part(self, run: Run, start: int, end: int) -> memoryview:
        if run.error is not None:
            raise run.error
        run.pins += 1
        run.slot.pin()
        try:
            if not run.ready:
                self.disk.source.poll()
                try:
                    await run.wait()
                except EngineError:
                    for block in range(run.start // self.block, -(-run.end // self.block)):
                        self._failed[block] = None
                    raise
            run.used(start, end)
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
        self.counts.direct_bytes += last - first
        self.counts.fetched_bytes += last - first
        if last - first <= FRAME:
            slot = await direct.fetch(self.disk, self.image, first, last)
            return slot.bytes(start - first, end - first)
        parts = []
        for piece in range(first, last, FRAME):
            until = min(piece + FRAME, last)
            slot = await direct.fetch(self.disk, self.image, piece, until)
            parts.append(bytes(slot.bytes(0, until - piece)))
        return memoryview(b"".join(parts))[start - first : end - first]

    def prefetch(self, start: int, end: int) -> int:
        """Begin to fetch the frames of [*start*, *end*) that are not there and not known holes.

        Returns the offset where it stopped: *end*, or less where memory or the disk is busy.
        """
        return self._begin(start, end, self.worth)

    def _begin(self, start: int, end: int, worth: Worth | None = None) -> int:
        """Begin to fetch frames: as a guess on the account *worth*, or for one who waits for them.

        Returns the offset where it stopped.
        """
        disk = self.disk
        for position in range(start - start % FRAME, end, FRAME):
            if disk.wanted or disk.fetches_ahead >= FETCHES_AHEAD:
                return position
            last = min(position + FRAME, self.capacity)
            if self._is_there(position, last):
                continue
            if worth is not None and self.is_hole(position, last):
                continue
            slot = disk.slot_nowait(FRAME)
            if slot is None:
                return position
            disk.fetches_ahead += 1
            self._start(self._run(position, last, slot), self._ahead_done, worth)
        return end

    def _is_there(self, start: int, end: int) -> bool:
        """Say whether all blocks of [*start*, *end*) are in the index."""
        index = self._index
        return all(block in index for block in range(start // self.block, -(-end // self.block)))

    # Freshness.

    def invalidate(self, start: int = 0, end: int | None = None) -> None:
        """Forget [*start*, *end*), or everything; what is being fetched now will not be kept."""
        self.epoch += 1
        self.counts.invalidations += 1
        self._failed.clear()
        index = self._index
        if start <= 0 and (end is None or end >= self.capacity):
            self._index = {}
            self.disk.drop(_distinct(index))
            return
        self.disk.drop(self._forgotten(start, self.capacity if end is None else end))

    def wrote(self, start: int, end: int) -> None:
        """Forget [*start*, *end*), which was written through this mount.

        What is being fetched of it is handed to those who wait for it (they began before), and not
        kept; all else that is being fetched is.
        """
        if not self._index:
            return
        runs = self._forgotten(start, end)
        for run in runs:
            run.epoch = _OVER
        self.disk.drop(runs)

    def _forgotten(self, start: int, end: int) -> list[Run]:
        """Take all runs of the frames that the range touches out of the index, and return them."""
        index = self._index
        # Whole frames: a run may hold bytes of a block for which another one is in the index.
        first, last = max(start, 0) // FRAME * FRAME, -(-min(end, self.capacity) // FRAME) * FRAME
        blocks = range(first // self.block, last // self.block)
        # The range may be far larger than what is cached of the image, or far smaller.
        numbers = blocks if len(blocks) < len(index) else [n for n in index if n in blocks]
        runs = _distinct({number: index[number] for number in numbers if number in index})
        for run in runs:
            self.forget(run)
        return runs

    def forget(self, run: Run) -> None:
        """Take *run* out of the index."""
        index = self._index
        for block in range(run.start // self.block, -(-run.end // self.block)):
            if index.get(block) is run:
                del index[block]

    # Fetching.

    async def _fetch(self, position: int, large: bool) -> Run:
        size = FRAME if large else self.block
        slot = await self.disk.slot(size)
        found = self._index.get(position // self.block)
        if found is not None:
            # Somebody else began it while this task waited for memory.
            self.disk.release(slot)
            return found
        start = position - position % size
        run = self._run(start, min(start + size, self.capacity), slot)
        self._start(run, _done)
        if not large:
            self._begin(*self._clusters.miss(start, size), self._clusters_worth)
        return run

    def _run(self, start: int, end: int, slot: Slot) -> Run:
        return Run(self, self.disk, self.image, start, end, slot, self.block)

    def _start(
        self,
        run: Run,
        done: Callable[[Run], Callable[[VddkfsError | None], None]],
        worth: Worth | None = None,
    ) -> None:
        """Have *run* fetched: as a guess on the account *worth*, if there is one."""
        index = self._index
        first = run.start // self.block
        mine = 0
        for block in range(first, -(-run.end // self.block)):
            if index.setdefault(block, run) is run:
                mine |= 1 << (block - first)
        size = run.end - run.start
        self.counts.fetched_bytes += size
        if worth is not None:
            run.worth, run.unread = worth, mine
            unread = self._bytes(mine)
            self.counts.ahead_bytes += unread
            worth.issued(unread)
        self.disk.source.submit_read(
            ReadRequest(
                self.image,
                run.start // SECTOR,
                size // SECTOR,
                run.slot,
                done(run),
                run.moved,
            )
        )

    def _ahead_done(self, run: Run) -> Callable[[VddkfsError | None], None]:
        def done(error: VddkfsError | None) -> None:
            self.disk.fetches_ahead -= 1
            run.done(error)

        return done

    # What it was worth to fetch ahead.

    def ahead_used(self, run: Run, start: int, end: int) -> None:
        """Note that [*start*, *end*) of *run* is read."""
        first = (start - run.start) // self.block
        last = -(-(end - run.start) // self.block)
        read = run.unread & ((1 << last) - (1 << first))
        if read and run.worth is not None:
            run.unread ^= read
            size = self._bytes(read)
            self.counts.ahead_used_bytes += size
            run.worth.used(size)

    def ahead_over(self, run: Run) -> None:
        """Note that what is unread of *run* will not be read."""
        size = self._bytes(run.unread)
        run.unread = 0
        self.counts.ahead_wasted_bytes += size
        if run.worth is not None:
            run.worth.wasted(size)

    def _bytes(self, blocks: int) -> int:
        return blocks.bit_count() * self.block


def _done(run: Run) -> Callable[[VddkfsError | None], None]:
    return run.done


def _no_hole(_start: int, _end: int) -> bool:
    return False


def _distinct(index: dict[int, Run]) -> list[Run]:
    """Return each run of *index* once."""
    return list(dict.fromkeys(index.values()))
