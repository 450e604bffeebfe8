"""The cache against a model, in steps that hypothesis chooses and makes fewer of when one fails.

Two disks share an arena that is too small for them; one has two images. Readers of every kind come
and are cancelled, workers answer in any order, fail, die and hang, owners write, images become
other disks. After each step the books must add up, and every byte that a reader gets must be one
that the source had since that reader's bound: the latest invalidation before it began.
"""

import errno
from collections.abc import Callable
from functools import partial

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.cache.books import check_arena, check_disk, check_pins, check_quiet, indexed
from tests.cache.owned import Content, Worker
from tests.cache.readers import Opened, Reader, Readers, Shown
from tests.cache.stepped import Gate, SteppedRun
from vddkfs.cache import frames
from vddkfs.cache.arena import Arena
from vddkfs.cache.coherence import Policy
from vddkfs.cache.frames import DiskCache, SectorCache
from vddkfs.cache.sector_cache import ImageCache
from vddkfs.disks.image import Image
from vddkfs.engines.base import SECTOR, LinkIdentity, LinkInfo
from vddkfs.errors import EngineError, WorkerFailed

KIB = 1024
MIB = 1024 * 1024
EXAMPLES = 300
STEPS = 100

# Most of them in few places, where they meet; the others want more memory than there is.
IMAGES = st.sampled_from([0, 0, 0, 2, 2, 1])
FRAMES = st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6])
OFFSETS = st.sampled_from(
    [0, 64 * KIB, 64 * KIB - 1, 1, 511, 512 * KIB, 200 * KIB + 100, MIB - 4096, MIB - 1]
)
SIZES = st.sampled_from(
    [512, 4096, 64 * KIB, 64 * KIB + 1, 1, 100_000, 300 * KIB, MIB, MIB + 4096, 5 * MIB // 2]
)
PICK = st.integers(0, 63)
ALL = 99
PACES = st.sampled_from([1, 0, 3, ALL])
PLACE = st.tuples(IMAGES, FRAMES, OFFSETS, SIZES)


class CacheMachine(RuleBasedStateMachine):
    """Does steps to the cache, and knows what each may return."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.run = SteppedRun()
        self.gate = Gate()
        self.readers = Readers(self.run)
        self.opened: list[Opened] = []
        self.rounds: int | None = None
        self.pace = 0
        self.slow = False
        self.arena: Arena
        self.workers: list[Worker] = []
        self.disks: list[DiskCache] = []
        self.shown: list[Shown] = []
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(trio.to_thread, "run_sync", self._elsewhere)
        # So that dropping takes turns here too, and something else comes between them.
        self.patch.setattr(frames, "_AT_ONCE", 3)

    async def _elsewhere(self, function: Callable[[], object]) -> None:
        """Stands for a thread: what makes memory."""
        if not await self.gate.passed():
            raise OSError(errno.ENOMEM, "no memory")
        function()

    @initialize(
        block=st.sampled_from([64 * KIB, 16 * KIB, 256 * KIB, MIB]),
        size=st.sampled_from([8 * MIB, 11 * MIB, 16 * MIB]),
        live=st.booleans(),
        slow=st.booleans(),
        pace=PACES,
    )
    def mount(self, block: int, size: int, live: bool, slow: bool, pace: int) -> None:
        """*slow*: memory comes, and goes to another disk, only when a step says so."""
        self.slow = slow
        self.pace = pace
        self.arena = Arena(size, 2, block)
        caches = SectorCache(self.arena, self.run.nursery)
        contents = [Content(0, 7 * MIB + 5 * SECTOR), Content(1, 5 * MIB), Content(2, 6 * MIB)]
        for key, mine in (("two images", contents[:2]), ("one image", contents[2:])):
            worker = Worker(dict(enumerate(mine)), self.gate)
            disk = caches.disk(key, worker)
            self.workers.append(worker)
            self.disks.append(disk)
            for index, content in enumerate(mine):
                policy = Policy.CLOSE_TO_OPEN if live else Policy.IMMUTABLE
                image = self._image(disk, worker, index, content, policy)
                self.shown.append(Shown(image, content, worker))

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
            nursery=self.run.nursery,
            read_ahead=2 * MIB,
        )
        forget = image.cache.invalidate

        def invalidate(start: int = 0, end: int | None = None) -> None:
            content.forget(start, content.capacity if end is None else end)
            forget(start, end)

        image.cache.invalidate = invalidate  # type: ignore[method-assign]
        return image

    def teardown(self) -> None:
        try:
            if self.shown and not self.run.over:
                self.rest()
        finally:
            self.run.close()
            self.patch.undo()
            for worker in self.workers:
                worker.close()
            if self.shown:
                self.arena.close()

    # Steps. Each takes what there is of what it is about: numbers are taken modulo.

    @rule(pace=PACES)
    def turn(self, pace: int) -> None:
        """From now on workers do so much after each step: with 0 only what a step says."""
        self.pace = pace
        self._do(lambda: None)

    @rule(rounds=st.integers(0, 2))
    def hurry(self, rounds: int) -> None:
        """Have the next step but one come before all tasks wait again."""
        self.rounds = rounds

    @rule(n=IMAGES, frame=FRAMES, offset=OFFSETS, size=SIZES, spend=st.booleans())
    def read_at_once(self, n: int, frame: int, offset: int, size: int, spend: bool) -> None:
        shown, start, end = self._place(n, frame, offset, size)

        def look() -> None:
            reader = Reader(shown, start, end, fresh=False)
            view = shown.image.cache.read_nowait(start, end, spend)
            if view is not None:
                reader.got(view)

        self._do(look)

    @rule(places=st.lists(PLACE, min_size=1, max_size=4), large=st.booleans())
    def read(self, places: list[tuple[int, int, int, int]], large: bool) -> None:
        """Several readers at once."""
        commands = []
        for place in places:
            shown, start, end = self._place(*place)
            read = partial(shown.image.cache.read, start, end, large)
            commands.append(partial(self.readers.begin, shown, start, end, read))
        self._do(*commands)

    @rule(places=st.lists(PLACE, min_size=1, max_size=4))
    def read_direct(self, places: list[tuple[int, int, int, int]]) -> None:
        commands = []
        for place in places:
            shown, start, end = self._place(*place)
            read = partial(shown.image.cache.read_direct, start, end)
            commands.append(partial(self.readers.begin, shown, start, end, read, fresh=True))
        self._do(*commands)

    @rule(n=IMAGES, frame=FRAMES, frames=st.integers(1, 6))
    def prefetch(self, n: int, frame: int, frames: int) -> None:
        shown, start, end = self._place(n, frame, 0, frames * MIB)
        self._do(lambda: shown.image.cache.prefetch(start, end))

    @rule(n=IMAGES, direct=st.booleans())
    def open(self, n: int, direct: bool) -> None:
        shown = self._one(n)

        async def opening() -> None:
            since = shown.content.oldest(0, shown.content.capacity, not shown.image.policy.lasts)
            handle = await shown.image.open(direct)
            self.opened = [*self.opened, Opened(shown, handle, since)][-6:]

        self._do(lambda: self.run.nursery.start_soon(opening))

    @precondition(lambda self: self.opened)
    @rule(n=PICK, frame=FRAMES, offset=OFFSETS, size=SIZES, pieces=st.integers(1, 40))
    def read_file(self, n: int, frame: int, offset: int, size: int, pieces: int) -> None:
        """Go forward through a file: what proves as a stream is read ahead of."""
        opened = self.opened[n % len(self.opened)]
        size = max(size, 512)
        start, end = opened.shown.place(frame * MIB + offset, min(size * pieces, 3 * MIB))
        self._do(lambda: self.readers.begin_file(opened, start, end, size))

    @precondition(lambda self: self.readers.reading)
    @rule(n=PICK)
    def cancel(self, n: int) -> None:
        reading = self.readers.reading
        self._do(reading[n % len(reading)].scope.cancel)

    @precondition(lambda self: any(worker.waiting for worker in self.workers))
    @rule(picks=st.lists(PICK, min_size=1, max_size=6))
    def perform(self, picks: list[int]) -> None:
        """Have workers read; they have not told yet."""
        for n in picks:
            waiting = [(w, request) for w in self.workers for request in w.waiting]
            if waiting:
                worker, request = waiting[n % len(waiting)]
                worker.perform(request)

    @precondition(lambda self: any(worker.performed for worker in self.workers))
    @rule(picks=st.lists(PICK, min_size=1, max_size=6))
    def answer(self, picks: list[int]) -> None:
        def tell() -> None:
            for n in picks:
                performed = [(w, request) for w in self.workers for request in w.performed]
                if performed:
                    worker, request = performed[n % len(performed)]
                    worker.answer(request)

        self._do(tell)

    @rule(n=PICK, most=st.integers(1, 20))
    def work(self, n: int, most: int) -> None:
        """Have a worker read and tell, the oldest first."""
        self._do(lambda: self.workers[n % 2].work(most))

    @precondition(lambda self: any(worker.under_way for worker in self.workers))
    @rule(n=PICK, engine=st.booleans(), late=st.booleans())
    def fail(self, n: int, engine: bool, late: bool) -> None:
        """*late*: the process may still write to what it has answered with an error."""
        under_way = [(w, request) for w in self.workers for request in w.under_way]
        worker, request = under_way[n % len(under_way)]
        error = EngineError("bad sector") if engine else WorkerFailed("no answer")
        self._do(lambda: worker.fail(request, error, late))

    @rule(n=PICK, reaped=st.booleans())
    def lose(self, n: int, reaped: bool) -> None:
        """Lose the process of a worker: it is gone, or hangs and may still write."""
        worker = self.workers[n % 2]
        self._do(worker.die if reaped else worker.hang)

    @rule()
    def scribble(self) -> None:
        for worker in self.workers:
            worker.scribble()

    @precondition(lambda self: any(worker.lost for worker in self.workers))
    @rule(n=PICK)
    def gone(self, n: int) -> None:
        """A process that hung has ended."""
        hanging = [worker for worker in self.workers if worker.lost]
        self._do(lambda: hanging[n % len(hanging)].gone(n))

    @precondition(lambda self: len(self.gate))
    @rule(n=PICK, good=st.integers(0, 5))
    def elsewhere(self, n: int, good: int) -> None:
        """A thread has made memory, or there is none; or a worker has given a chunk back."""
        for worker in self.workers:
            worker.failures += not good
        self._do(lambda: self.gate.open(n, good > 0))

    @rule(n=IMAGES, frame=FRAMES, offset=OFFSETS, size=SIZES)
    def write(self, n: int, frame: int, offset: int, size: int) -> None:
        shown, start, end = self._place(n, frame, offset, size)
        shown.content.write(start, end)

    @rule(n=IMAGES, frame=FRAMES, offset=OFFSETS, size=SIZES, written=st.booleans())
    def invalidate(self, n: int, frame: int, offset: int, size: int, written: bool) -> None:
        shown, start, end = self._place(n, frame, offset, size)
        if written:
            shown.content.write(start, end)
        self._do(lambda: shown.image.drop(start, end))

    @rule(n=IMAGES, other=st.booleans())
    def invalidate_all(self, n: int, other: bool) -> None:
        """Have all of an image forgotten, because it has become another disk or because somebody
        wants it.
        """
        shown = self._one(n)
        if other:
            shown.content.write(0, shown.content.capacity)
        self._do(shown.image.supersede if other else shown.image.drop)

    @rule(seconds=st.sampled_from([1, 6]))
    def sleep(self, seconds: int) -> None:
        """After five seconds memory is asked for again where there was none."""
        self.run.clock.jump(seconds)

    @rule()
    def rest(self) -> None:
        """Have everything done that is under way, and see that nothing is left over."""
        for worker in self.workers:
            while worker.lost:
                self.run.do(lambda w=worker: w.gone(0))
            if worker.late.places:
                self.run.do(worker.die)
        self.run.do(lambda: None)
        self._finish()
        assert not self.readers.reading, "readers are forgotten"
        for disk in self.disks:
            check_quiet(disk, self._caches(disk))
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

    # What must hold.

    @invariant()
    def the_books_add_up(self) -> None:
        if not self.shown:
            return
        type(self).steps += 1
        check_arena(self.arena, len(self.arena._growing))
        for disk, worker in zip(self.disks, self.workers, strict=True):
            check_disk(disk, self._caches(disk), worker.moving)
            if self.run.idle:
                check_pins(
                    disk,
                    [request.target for request in worker.under_way],
                    [place for lost in (*worker.lost, worker.late) for place, _ in lost.places],
                )
                self._check_waiting(worker)

    def _check_waiting(self, worker: Worker) -> None:
        """See that whoever waits has something to wait for."""
        if not (worker.under_way or worker.lost or worker.late.places or len(self.gate)):
            assert not [r for r in self.readers.reading if r.shown.worker is worker], (
                "forgotten readers"
            )

    def _caches(self, disk: DiskCache) -> list[ImageCache]:
        return [s.image.cache for s in self.shown if s.image.cache.disk is disk]

    def _do(self, *commands: Callable[[], object]) -> None:
        rounds, self.rounds = self.rounds, None
        for command in commands:
            self.run.do(command, 0)
        self.run.do(lambda: None, rounds)
        if len(self.gate) and (self.pace == ALL or not self.slow):
            self.run.do(lambda: self.gate.open(0, True), rounds)
        if self.pace == ALL and rounds is None:
            self._finish()
        elif self.pace:
            for worker in self.workers:
                self.run.do(partial(worker.work, self.pace), rounds)

    def _finish(self) -> None:
        """Have everything done that is asked for, and all that follows from it."""
        while len(self.gate) or any(worker.under_way for worker in self.workers):
            if len(self.gate):
                self.run.do(lambda: self.gate.open(0, True))
            for worker in self.workers:
                self.run.do(worker.work)

    def _one(self, n: int) -> Shown:
        return self.shown[n]

    def _place(self, n: int, frame: int, offset: int, size: int) -> tuple[Shown, int, int]:
        shown = self._one(n)
        return shown, *shown.place(frame * MIB + offset, size)


def test_every_byte_is_one_that_its_reader_may_see_and_the_books_add_up() -> None:
    # The same steps each time; --hypothesis-seed=N for others.
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert CacheMachine.steps >= 10_000
