"""A small mount for the model: two disks that share too little memory, the one with two images."""

import errno
from collections.abc import Callable
from functools import partial

import pytest
import trio

from tests.cache import books
from tests.cache.books import indexed
from tests.cache.owned import Content, Worker
from tests.cache.readers import Opened, Readers, Shown
from tests.cache.stepped import Gate, SteppedRun
from vddkfs.cache import frames
from vddkfs.cache.arena import Arena
from vddkfs.cache.coherence import Policy
from vddkfs.cache.frames import DiskCache, SectorCache
from vddkfs.cache.sector_cache import ImageCache
from vddkfs.disks.image import Image
from vddkfs.engines.base import SECTOR, LinkIdentity, LinkInfo

MIB = 1024 * 1024
ALL = 99
"""More than workers ever have to do."""


Place = tuple[int, int, int] | int
"""The number of an image, and where in it, and how much; or which one of those lately."""


class Tempo:
    """How much happens with each step of the test.

    Workers do *pace* requests, ALL: until none is left; and they read all at once if *early*,
    whenever they tell. Memory comes when a step says so, if *slow*. Each step takes so many rounds
    of the scheduler as the next of *rhythm* says, None: until all tasks wait.
    """

    def __init__(self, pace: int, rhythm: list[int | None], early: bool, slow: bool) -> None:
        self.pace = pace
        self.rhythm = rhythm
        self.early = early
        self.slow = slow

    def beat(self) -> int | None:
        """Return how long the next step takes."""
        rounds = self.rhythm[0]
        self.rhythm = [*self.rhythm[1:], rounds]
        return rounds


class Modelled:
    """The mount, and what its steps have in common."""

    def __init__(self, block: int, size: int, live: bool, tempo: Tempo) -> None:
        self.tempo = tempo
        self.run = SteppedRun()
        self.gate = Gate()
        self.readers = Readers(self.run)
        self.opened: list[Opened] = []
        self.workers: list[Worker] = []
        self.shown: list[Shown] = []
        self._recent: list[tuple[int, int, int]] = [(0, 0, 1)]
        self._disks: list[DiskCache] = []
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(trio.to_thread, "run_sync", self._elsewhere)
        # So that dropping takes turns here too, and something else comes between them.
        self._patch.setattr(frames, "_AT_ONCE", 1)
        self._arena = Arena(size, 2, block)
        caches = SectorCache(self._arena, self.run)  # type: ignore[arg-type]
        contents = [Content(0, 7 * MIB + 5 * SECTOR), Content(1, 5 * MIB), Content(2, 6 * MIB)]
        policy = Policy.CLOSE_TO_OPEN if live else Policy.IMMUTABLE
        for key, mine in (("two images", contents[:2]), ("one image", contents[2:])):
            worker = Worker(dict(enumerate(mine)), self.gate)
            disk = caches.disk(key, worker)
            self.workers.append(worker)
            self._disks.append(disk)
            for index, content in enumerate(mine):
                image = self._image(disk, worker, index, content, policy)
                self.shown.append(Shown(image, content, worker))

    async def _elsewhere(self, function: Callable[[], object]) -> None:
        """Stands for a thread: what makes memory."""
        if not await self.gate.passed():
            raise OSError(errno.ENOMEM, "no memory")
        function()

    def _image(
        self, disk: DiskCache, worker: Worker, index: int, content: Content, policy: Policy
    ) -> Image:
        sectors = content.capacity // SECTOR
        path = f"{disk.key}/{index}"
        link = LinkInfo(path, "", sectors, "1", "", "", (), 1, LinkIdentity(path, "1", sectors))
        image = Image(
            path,
            [link],
            index=index,
            policy=policy,
            client=worker,  # type: ignore[arg-type]
            cache=disk,
            revalidate=trio.lowlevel.checkpoint,
            nursery=self.run,  # type: ignore[arg-type]
            read_ahead=2 * MIB,
        )
        forget = image.cache.invalidate

        def invalidate(start: int = 0, end: int | None = None) -> None:
            last = content.capacity if end is None else end
            content.forget(start, last)
            forget(start, end)
            for run in indexed(image.cache).values():
                assert run.end <= start or run.start >= last, "it is found all the same"

        image.cache.invalidate = invalidate  # type: ignore[method-assign]
        return image

    def place(self, place: Place) -> tuple[Shown, int, int]:
        """Return an image and a range in it; a number stands for a place of a while ago."""
        if isinstance(place, int):
            place = self._recent[place % len(self._recent)]
        self._recent = [*self._recent, place][-8:]
        number, start, size = place
        return self.shown[number], *self.shown[number].place(start, size)

    def do(self, *commands: Callable[[], object]) -> None:
        """Do a step of these *commands*, and what happens with it."""
        rounds = self.tempo.beat()
        for worker in self.workers:
            # Whoever may write at any time does it all the time.
            worker.scribble()
        if len(self.gate) and (self.tempo.pace == ALL or not self.tempo.slow):
            commands = (*commands, partial(self.gate.open, 0, True))
        self.run.do(*commands, rounds=rounds)
        if self.tempo.early:
            for worker in self.workers:
                worker.perform_all()
        if self.tempo.pace == ALL and rounds is None:
            self._finish()
        elif self.tempo.pace:
            self.run.do(*[partial(w.work, self.tempo.pace) for w in self.workers], rounds=rounds)

    def _finish(self) -> None:
        """Have everything done that is asked for, and all that follows from it."""
        while len(self.gate) or any(worker.under_way for worker in self.workers):
            if len(self.gate):
                self.run.do(partial(self.gate.open, 0, True))
            for worker in self.workers:
                self.run.do(worker.work)

    def rest(self) -> None:
        """Have everything done that is under way, and see that nothing is left over."""
        for worker in self.workers:
            while worker.lost:
                self.run.do(partial(worker.gone, 0))
            if worker.late.places:
                self.run.do(worker.die)
        self.run.do()
        self._finish()
        assert not self.readers.reading, "readers are forgotten"
        for disk in self._disks:
            books.check_quiet(disk, self._caches(disk))
        self.run.do(self._look_at_all)

    def _look_at_all(self) -> None:
        for shown in self.shown:
            cache, content = shown.image.cache, shown.content
            seen = set()
            for block in sorted(indexed(cache)):
                run = indexed(cache)[block]
                if run not in seen:
                    # All that a reader may get of it: nobody finds what is before this block.
                    seen.add(run)
                    start = block * cache.block
                    view = cache.read_nowait(start, run.end)
                    assert view is not None
                    content.check(view, start, run.end, content.oldest(start, run.end, False))

    def check(self) -> None:
        """See that the books add up."""
        books.check_arena(self._arena, len(self._arena._growing))
        for disk, worker in zip(self._disks, self.workers, strict=True):
            books.check_disk(disk, self._caches(disk), worker.moving)
            if self.run.idle:
                books.check_pins(
                    disk,
                    [request.target for request in worker.under_way],
                    [place for lost in (*worker.lost, worker.late) for place, _ in lost.places],
                )
                self._check_waiting(disk, worker)

    def _check_waiting(self, disk: DiskCache, worker: Worker) -> None:
        """See that whoever waits has something to wait for."""
        assert not (books.waits_for_memory(disk) and len(disk.free)), (
            "somebody waits for what is free"
        )
        if not (worker.under_way or worker.lost or worker.late.places or len(self.gate)):
            waiting = [one for one in self.readers.reading if one.shown.worker is worker]
            assert not waiting, "readers are forgotten"

    def _caches(self, disk: DiskCache) -> list[ImageCache]:
        return [shown.image.cache for shown in self.shown if shown.image.cache.disk is disk]

    def close(self) -> None:
        """End it, resting if it is not broken."""
        try:
            if not self.run.failed:
                self.rest()
        finally:
            while len(self.gate):
                self.run.do(partial(self.gate.open, 0, False))
            self.run.close()
            self._patch.undo()
            for worker in self.workers:
                worker.close()
            self._arena.close()
