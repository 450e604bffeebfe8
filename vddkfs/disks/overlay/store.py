"""A fork: what was written to one image, instead of the source, in a folder of its own.

A block is never written where it is. Its new content goes to a free place, then the map in memory
leads there; a reader beside it gets the old content or the new. A *commit* makes that last: the
data, barrier, a record of what changed in the map, barrier. Only then places that are not used any
more become free, and only when nobody reads them: so the map on the disk always leads to what was
there when it was written, and after a crash each block is old or new as a whole.

Writing wants space for blocks that the fork does not have yet, and some spare places for those that
it has: these go through the spare places, which a commit frees again. The map has its space in
advance, see ``journal``. So when the disk is full, what is in the fork can be rewritten for ever.
"""

import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

from vddkfs.disks.overlay.files import FULL, Files, failure
from vddkfs.disks.overlay.journal import ADVICE, Journal
from vddkfs.disks.overlay.records import CLOSED, enter
from vddkfs.disks.overlay.space import FreePlaces, Limits, Places, Segments, unused
from vddkfs.disks.overlay.table import BELOW, BLOCK, ZERO, BlockMap, Run
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import OverlayError

Part = tuple[int, int, memoryview | None]
"""A block, a number of blocks from there on, and their content, None for zeros."""


class Store:
    """The blocks of a fork of an image of *capacity* bytes, kept in *folder* under the id *ident*.

    ``create`` makes an empty one, ``open`` goes on with one; ``close`` ends both. *map* is to be
    looked at with *lock* held. Methods raise OverlayError; any thread.
    """

    def __init__(
        self, files: Files, folder: str, ident: bytes, capacity: int, limits: Limits
    ) -> None:
        self.folder = folder
        self._limits = limits
        self.map = BlockMap()
        self._read_only = False
        self._segments = Segments(files, folder, limits)
        self._journal = Journal(files, folder, ident, capacity, limits.log_room)
        self._lost = ""
        # The lock is for what is in memory; whoever holds it never waits for a disk.
        self.lock = threading.Lock()
        self._moved = threading.Condition(self.lock)
        self._free = FreePlaces()
        self._under_way = 0
        self._retired: list[Places] = []
        self._retired_blocks = 0
        self._releasing = 0
        self._pending = array("Q")
        self._changes = 0
        self._readers = [0, 0]
        self._phase = 0
        # Taken before the lock; one commit, one step of growing at a time.
        self._commit_lock = threading.Lock()
        self._grow_lock = threading.Lock()
        self._committed = 0

    def create(self) -> None:
        """Make the files of an empty fork in the folder, which is there and empty."""
        try:
            self._journal.create()
        except BaseException:
            self._close_files()
            raise

    def open(self, *, read_only: bool = False) -> bool:
        """Go on with what is there. Returns False if the fork was not closed the last time.

        *read_only*: nothing in the folder is changed, and nothing may be written.
        """
        self._read_only = read_only
        try:
            self._segments.open(read_only=read_only)
            self._journal.open(self.map.set, read_only=read_only)
            runs = (run for leaf in self.map.changed() for run in leaf if run.place != ZERO)
            free, wrong = unused(self._segments.size, ((run.place, run.blocks) for run in runs))
            if wrong is not None:
                raise OverlayError(
                    f"{printable(self.folder)}: damaged: {wrong[1]} blocks should be at place "
                    f"{wrong[0]}, which is used twice or beyond the end of the segments",
                    advice=ADVICE,
                )
            if not read_only:
                self._free.add(free)
                self._reserve(0, patient=True)
        except BaseException:
            self._close_files()
            raise
        return self._journal.clean

    def close(self) -> None:
        """Flush, and close the files. They are closed also if that fails."""
        if self._read_only:
            self._close_files()
            return
        try:
            self.flush()
            with self._commit_lock:
                if not self._journal.fits(0):
                    self._journal.compact(self.leaves(), self._segments.sync)
                self._journal.append(array("Q"), CLOSED)
        except OSError:
            # The mark would only help to recognise damage.
            pass
        finally:
            self._close_files()

    def _close_files(self) -> None:
        self._segments.close()
        self._journal.close_files()

    def leaves(self) -> Iterator[list[Run]]:
        """Yield the runs of the map, a leaf at a time, each as it is when its turn comes."""
        leaves = self.map.changed()
        while True:
            with self.lock:
                leaf = next(leaves, None)
            if leaf is None:
                return
            yield leaf

    @contextmanager
    def reading(self, block: int, count: int) -> Iterator[list[Run]]:
        """Give what *count* blocks from *block* are; their places stay theirs until the end."""
        with self.lock:
            runs = self.map.runs(block, count)
            phase = self._phase
            self._readers[phase] += 1
        try:
            yield runs
        finally:
            with self._moved:
                self._readers[phase] -= 1
                if not self._readers[phase]:
                    self._moved.notify_all()

    def read(self, into: memoryview, place: int, skip: int) -> None:
        """Fill *into* from byte *skip* of *place* on, which ``reading`` gave."""
        self._segments.read(into, place, skip)

    def put(self, parts: list[Part]) -> None:
        """Let the blocks of *parts* be (block, count, content), None for zeros.

        The content is in its places before the map leads there.
        """
        self._check_lost()
        if len(self._pending) // 2 >= self._limits.pending or (
            self._retired_blocks >= self._limits.retired
        ):
            self.flush()
        stored = sum(count for _, count, content in parts if content is not None)
        places = self._take(parts, stored)
        try:
            entries = list(self._store(parts, places))
        except BaseException:
            with self._moved:
                self._free.add(places)
                self._under_way -= stored
                self._moved.notify_all()
            raise
        with self._moved:
            for block, count, place in entries:
                self._retire(self.map.set(block, count, place))
                enter(self._pending, block, count, place, ZERO)
            self._changes += 1
            self._under_way -= stored
            self._moved.notify_all()

    def _store(self, parts: list[Part], places: list[Places]) -> Iterator[Run]:
        """Write the content of *parts* to *places*, and yield what leads where."""
        left = places[::-1]
        for block, count, content in parts:
            if content is None:
                yield Run(block, count, ZERO)
                continue
            done = 0
            while done < count:
                place, there = left.pop()
                used = min(there, count - done)
                if there > used:
                    left.append((place + used, there - used))
                self._segments.write(content[done * BLOCK : (done + used) * BLOCK], place)
                yield Run(block + done, used, place)
                done += used

    def _retire(self, places: list[Places]) -> None:
        self._retired += places
        self._retired_blocks += sum(count for _, count in places)

    # Space

    def _take(self, parts: list[Part], stored: int) -> list[Places]:
        """Return *stored* places for *parts*, and see to it that the map has space for them."""
        while True:
            with self.lock:
                fresh = sum(self._fresh(block, count, content) for block, count, content in parts)
                kept = self._limits.spare if fresh else 0
                if not fresh and self._free.count >= stored:
                    return self._taken(stored)
                waiting = self._changes
            if not fresh:
                self._wait_for_places(stored, waiting)
                continue
            self._reserve(fresh)
            with self.lock:
                if self._free.count >= stored + kept:
                    return self._taken(stored)
            self._grow(stored + kept, 0)

    def _taken(self, count: int) -> list[Places]:
        self._under_way += count
        return self._free.take(count)

    def _fresh(self, block: int, count: int, content: memoryview | None) -> int:
        """Return for how many more runs the map must have space with these blocks in it."""
        if content is None:
            below = any(run.place == BELOW for run in self.map.runs(block, count))
            return 2 + count // BLOCK if below else 0
        runs = self.map.runs(block, count)
        fresh = sum(run.blocks for run in runs if run.place in (BELOW, ZERO))
        return fresh + 2 if fresh else 0

    def _wait_for_places(self, count: int, changes: int) -> None:
        """Return when a commit has freed places, another writer is through, or the fork grew."""
        with self._moved:
            if self._free.count >= count:
                return
            retired = self._retired_blocks or self._releasing
            if not retired and self._under_way:
                # Those who write now have the spare places, and retire as many.
                self._moved.wait_for(lambda: self._changes != changes or not self._under_way)
                return
        if retired:
            self.flush()
        else:
            self._grow(count, count)

    def _grow(self, count: int, spared: int) -> None:
        """Have *count* places or more free. Raises OverlayError, ENOSPC, if that cannot be.

        Returns also if *spared* are free or others have the spare places: then it was for those.
        """
        with self._grow_lock:
            while True:
                with self.lock:
                    missing = count - self._free.count
                if missing <= 0:
                    return
                try:
                    places = self._segments.grow(missing)
                except OverlayError:
                    with self.lock:
                        if spared and (self._free.count >= spared or self._under_way):
                            return
                        retired = self._retired_blocks or self._releasing
                    if not retired:
                        raise
                    self.flush()
                    continue
                with self._moved:
                    self._free.add([places])
                    self._moved.notify_all()

    def _reserve(self, fresh: int, patient: bool = False) -> None:
        """Have space for a map with *fresh* more runs. *patient*: or else without."""
        runs = self.map.bound + fresh
        if not self._journal.missing(runs):
            return
        with self._grow_lock:
            try:
                self._segments.check_free(self._journal.missing(runs))
                with self._commit_lock:
                    self._journal.reserve(runs)
            except OverlayError:
                if not patient:
                    raise
            except OSError as error:
                if not patient or error.errno not in FULL:
                    raise failure(self._journal.path, "growing", error) from error

    # Committing

    def flush(self) -> None:
        """Return when all that was written before is on the disk.

        After a flush has failed for what the disk did, every flush and every write fails: what it
        lost cannot be told. Reads go on.
        """
        with self.lock:
            wanted = self._changes
        with self._commit_lock:
            self._check_lost()
            if self._committed < wanted:
                self._commit()

    def _commit(self) -> None:
        """Make the changes until now last, then free the places that they retired."""
        with self._moved:
            changes, pending, retired = self._changes, self._pending, self._retired
            blocks = self._retired_blocks
            self._pending, self._retired, self._retired_blocks = array("Q"), [], 0
            self._releasing = blocks
            dirty = self._segments.take_dirty()
            before, self._phase = self._phase, 1 - self._phase
            # Whoever looked at the map until now may be reading what was retired.
            self._moved.wait_for(lambda: not self._readers[before])
        try:
            self._record(pending, dirty)
        except BaseException as error:
            with self.lock:
                self._pending = pending + self._pending
                self._retired = retired + self._retired
                self._retired_blocks += blocks
                self._releasing = 0
                self._segments.put_back(dirty)
            if isinstance(error, OSError):
                raise failure(self._journal.path, "writing", error) from error
            if isinstance(error, OverlayError):
                self._lost = str(error)
            raise
        self._committed = changes
        with self._moved:
            self._free.add(retired)
            self._releasing = 0
            self._moved.notify_all()

    def _record(self, pending: "array[int]", dirty: set[int]) -> None:
        if self._journal.fits(len(pending) // 2):
            self._segments.sync(dirty)
            self._journal.append(pending)
        else:
            # Has what is pending, and some of what is not yet: so all segments.
            self._journal.compact(self.leaves(), self._segments.sync)

    @property
    def lost(self) -> bool:
        """Whether a flush has failed, so that nothing is written any more."""
        return bool(self._lost)

    def _check_lost(self) -> None:
        if self._lost:
            raise OverlayError(
                f"{printable(self.folder)}: nothing is written any more, because a flush failed",
                cause=self._lost,
                advice="put its disk right, and mount again; what was written since the last good "
                "flush may be lost",
            )
