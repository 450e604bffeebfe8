"""Writes to the base of a chain: the source has them, and nothing older is shown of any image."""

import errno
import itertools
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.disks.layered import Stop, write
from tests.disks.test_image import FakeWorker, make_link, noise, read, unchanged
from vddkfs.cache.arena import FRAME, Arena
from vddkfs.cache.coherence import policy
from vddkfs.cache.frames import SectorCache
from vddkfs.disks.base_writes import BaseWrites
from vddkfs.disks.image import Handle, Image
from vddkfs.engines.base import SECTOR
from vddkfs.engines.requests import WriteRequest
from vddkfs.errors import EngineError, StaleImage, VddkfsError

MIB = 1024 * 1024
SECTORS: Final = 6001
CAPACITY: Final = SECTORS * SECTOR


def no_error(_request: WriteRequest) -> VddkfsError | None:
    return None


class Writer(FakeWorker):
    """Takes writes too: done at once, or by ``step`` if *held*. *fails* says how a write ends."""

    def __init__(self, content: bytes, held: bool = False) -> None:
        super().__init__(content, held)
        self.asked: list[WriteRequest] = []
        self.written: list[WriteRequest] = []
        self.sizes: list[tuple[int, int]] = []
        self.fails: Callable[[WriteRequest], VddkfsError | None] = no_error
        self.flush_error: VddkfsError | None = None
        self.flushes = 0

    def submit_write(self, request: WriteRequest) -> None:
        for other in [*self.asked, *self.written]:
            apart = (
                request.sector + request.count <= other.sector
                or other.sector + other.count <= request.sector
            )
            assert apart, "writes that overlap are never under way at once"
        assert len(request.data) == request.count * SECTOR
        self.sizes.append((request.sector, request.count))
        self.asked.append(request)
        while not self.held and (self.asked or self.written):
            self.step_write(random.Random(0))

    async def flush(self) -> None:
        self.flushes += 1
        await trio.lowlevel.checkpoint()
        if self.flush_error is not None:
            raise self.flush_error

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.performed or self.asked or self.written)

    def step(self, chooser: random.Random) -> None:
        """Do a part of a read or of a write, whichever."""
        reads, writes = len(self.waiting + self.performed), len(self.asked + self.written)
        if chooser.randrange(reads + writes) < reads:
            super().step(chooser)
        else:
            self.step_write(chooser)

    def step_write(self, chooser: random.Random) -> None:
        index = chooser.randrange(len(self.asked) + len(self.written))
        if index >= len(self.asked):
            request = self.written.pop(index - len(self.asked))
            request.done(self.fails(request))
            return
        request = self.asked.pop(index)
        start, size = request.sector * SECTOR, request.count * SECTOR
        place = request.target.offset
        data = self.areas[request.target.chunk_number][place : place + size]
        assert data == bytes(request.data), "the slot has what is to be written"
        if self.fails(request) is None:
            self.content[start : start + size] = data
            self.data[request.sector : request.sector + request.count] = [True] * request.count
        self.written.append(request)

    def let_go(self) -> None:
        """Do all that was asked, and whatever is asked later."""
        self.held = False
        while self.busy:
            self.step(random.Random(0))


@asynccontextmanager
async def chain(worker: Writer, images: int = 2) -> AsyncIterator[list[Image]]:
    """Images of one chain, all of what *worker* holds; the first one is its base."""
    arena = Arena(4 * MIB)
    async with trio.open_nursery() as nursery:
        disk = SectorCache(arena, nursery).disk("disk", worker)
        disk.release(await disk.slot(FRAME))
        found = [
            Image(
                f"d/chain/{number}.raw",
                [make_link(SECTORS)],
                index=number,
                policy=policy(False, "auto"),
                client=worker,  # type: ignore[arg-type]
                cache=disk,
                revalidate=unchanged,
                nursery=nursery,
                read_ahead=2 * MIB,
            )
            for number in range(images)
        ]

        def wrote(start: int, end: int) -> None:
            for image in found:
                image.wrote(start, end)

        client: Any = worker
        found[0].writes = BaseWrites(found[0].name, client, found[0].cache, wrote)
        yield found
        nursery.cancel_scope.cancel()
    arena.close()
    for area in worker.areas.values():
        area.close()


# The model

OFFSETS = st.integers(0, CAPACITY - 1) | st.integers(0, SECTORS - 1).map(lambda n: n * SECTOR)
SIZES = st.sampled_from([1, 511, 512, 513, 4096, 65536, MIB, MIB + 1, 2 * MIB + 700])
STEPS = st.one_of(
    st.tuples(st.just("write"), OFFSETS, SIZES, st.integers(0, 99)),
    st.tuples(st.just("read"), st.integers(0, 3), OFFSETS, SIZES),
    st.tuples(st.just("seek"), OFFSETS, st.booleans()),
    st.tuples(st.sampled_from(["map", "flush", "drop", "open", "blocks"])),
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEPS, max_size=25))
async def test_every_read_has_what_was_written_before_in_the_base_and_above(
    steps: list[tuple[Any, ...]],
) -> None:
    worker = Writer(noise(SECTORS))
    worker.dig(100, 3000)
    expected = bytearray(worker.content)
    async with chain(worker) as images:
        base = images[0]
        handle = await base.open(direct=False, write=True)
        handles = [await image.open(direct) for image in images for direct in (False, True)]
        for step in steps:
            match step:
                case "write", start, size, seed:
                    data = random.Random(seed).randbytes(size)
                    done = await base.write(handle, start, data)
                    assert done == min(size, CAPACITY - start)
                    expected[start : start + done] = data[:done]
                case "read", number, start, size:
                    found = await read(handles[number].image, handles[number], start, size)
                    assert found == expected[start : start + size]
                case "seek", start, data:
                    await check_seek(images, worker, start, data)
                case ("map",):
                    for image in images:
                        found_map = await image.map_now()
                        runs = found_map.runs(0, SECTORS)
                        assert [r.data for r in runs for _ in range(r.count)] == worker.data
                case ("flush",):
                    await base.flush(handle)
                case ("drop",):
                    base.drop()
                case ("open",):
                    handles = [await i.open(direct) for i in images for direct in (False, True)]
                case ("blocks",):
                    await check_blocks(images, worker)
        assert worker.content == expected
        for one in handles:
            assert await read(one.image, one, 0, CAPACITY) == expected


async def check_seek(images: list[Image], worker: Writer, start: int, data: bool) -> None:
    sector = start // SECTOR
    there = worker.data.index(data, sector) if data in worker.data[sector:] else None
    for image in images:
        if there is not None:
            seek = image.seek_data if data else image.seek_hole
            assert await seek(start) == max(start, there * SECTOR)
        elif not data:
            assert await image.seek_hole(start) == CAPACITY


async def check_blocks(images: list[Image], worker: Writer) -> None:
    for image in images:
        image.want_map()
        await trio.testing.wait_all_tasks_blocked()
        if image.map is not None:
            assert image.allocated_bytes() == sum(worker.data) * SECTOR


# Many at once: each byte of a read is that of a write that may have been the last one then.


class Histories:
    """When each write began and ended, and which of them a read may show."""

    def __init__(self) -> None:
        self.clock = itertools.count()
        self.writes: list[list[int]] = [[-2, -1, 0, CAPACITY, 0]]
        """Begin, end, first and last byte, and value."""

    def begin(self, start: int, size: int) -> list[int]:
        entry = [next(self.clock), 1 << 60, start, start + size, len(self.writes)]
        self.writes.append(entry)
        return entry

    def end(self, entry: list[int]) -> None:
        entry[1] = next(self.clock)

    def check(self, began: int, start: int, data: bytes) -> None:
        edges = {start, start + len(data) - 1}
        for _, _, first, last, _ in self.writes:
            edges |= {first - 1, first, last - 1, last}
        for at in edges:
            if start <= at < start + len(data):
                on = [one for one in self.writes if one[2] <= at < one[3]]
                over = [w for w in on if any(w[1] < o[0] and o[1] < began for o in on)]
                may = {one[4] for one in on if one not in over}
                assert data[at - start] in may, f"byte {at}"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
async def test_readers_and_writers_at_once(seed: int) -> None:
    chooser = random.Random(seed)
    worker = Writer(bytes(CAPACITY), held=False)
    told = Histories()

    def place(own: random.Random) -> tuple[int, int]:
        start = own.choice([0, 100, 5000, MIB - 700]) + own.randrange(2000)
        return start, own.choice([1, 300, SECTOR, 4096, 100_000, MIB + 5])

    async def writer(handle: Handle, own: random.Random) -> None:
        for _ in range(4):
            start, size = place(own)
            entry = told.begin(start, size)
            await handle.image.write(handle, start, bytes([entry[4]]) * size)
            told.end(entry)

    async def reader(handle: Handle, own: random.Random) -> None:
        for _ in range(8):
            start, size = place(own)
            began = next(told.clock)
            told.check(began, start, await read(handle.image, handle, start, size))

    async with chain(worker) as images, trio.open_nursery() as nursery:
        handle = await images[0].open(direct=False, write=True)
        worker.held = True
        for image in images:
            for direct in (False, False, True):
                reading = await image.open(direct)
                nursery.start_soon(reader, reading, random.Random(chooser.random()))
        for _ in range(5):
            nursery.start_soon(writer, handle, random.Random(chooser.random()))
        idle = 0
        while nursery.child_tasks:
            await trio.lowlevel.checkpoint()
            if worker.busy:
                idle = 0
                worker.step(chooser)
            else:
                # A chunk may be in the making in a thread; anything longer is a lost wake-up.
                idle += 1
                await trio.sleep(0.0005)
                assert idle < 10_000, "somebody waits for ever"
        for image in images:
            reading = await image.open(direct=False)
            worker.held = False
            assert await read(image, reading, 0, CAPACITY) == worker.content


async def test_what_was_read_before_a_write_is_not_kept_after_it(nursery: trio.Nursery) -> None:
    """The read has its bytes, and is answered when the write is done."""
    worker = Writer(noise(SECTORS), held=True)
    async with chain(worker) as images:
        base = images[0]
        handle = await base.open(direct=False, write=True)
        found: list[bytes] = []

        async def look() -> None:
            found.append(await read(base, handle, 0, SECTOR))

        nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        while worker.waiting:
            super(Writer, worker).step(random.Random(0))
        stop = Stop()
        nursery.start_soon(write, base, handle, 0, b"n" * SECTOR, stop)
        await trio.testing.wait_all_tasks_blocked()
        while worker.asked or worker.written:
            worker.step_write(random.Random(0))
        await stop.done.wait()
        assert found == []
        worker.let_go()
        await trio.testing.wait_all_tasks_blocked()
        assert found == [noise(SECTORS)[:SECTOR]], "it began before"
        assert await read(base, handle, 0, SECTOR) == b"n" * SECTOR


# What the source is asked


@pytest.mark.parametrize(
    ("start", "size", "reads", "sectors"),
    [
        (0, SECTOR, 0, [(0, 1)]),
        (SECTOR, 9 * SECTOR, 0, [(1, 9)]),
        (5, 10, 1, [(0, 1)]),
        (5, SECTOR, 2, [(0, 2)]),
        (5, SECTOR - 5, 1, [(0, 1)]),
        (SECTOR, 3 * SECTOR + 1, 1, [(1, 4)]),
        (SECTOR - 1, 2, 2, [(0, 2)]),
        (CAPACITY - 1, 1, 1, [(SECTORS - 1, 1)]),
    ],
)
async def test_only_parts_of_sectors_are_read_to_be_written(
    start: int, size: int, reads: int, sectors: list[tuple[int, int]]
) -> None:
    worker = Writer(noise(SECTORS))
    async with chain(worker) as images:
        handle = await images[0].open(direct=False, write=True)
        asked = len(worker.reads)
        await images[0].write(handle, start, b"x" * size)
        assert len(worker.reads) - asked == reads
        assert worker.sizes == sectors
        expected = bytearray(noise(SECTORS))
        expected[start : start + size] = b"x" * size
        assert worker.content == expected


async def test_long_writes_go_out_in_pieces_several_at_once(nursery: trio.Nursery) -> None:
    worker = Writer(noise(SECTORS), held=True)
    async with chain(worker) as images:
        handle = await images[0].open(direct=False, write=True)
        stop = Stop()
        nursery.start_soon(write, images[0], handle, SECTOR, b"x" * (2 * FRAME + SECTOR), stop)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(worker.asked) > 1
        worker.let_go()
        await stop.done.wait()
        assert sorted(worker.sizes) == [
            (1, FRAME // SECTOR),
            (1 + FRAME // SECTOR, FRAME // SECTOR),
            (1 + 2 * FRAME // SECTOR, 1),
        ]


async def test_the_end_of_the_image_is_the_end_of_the_space() -> None:
    worker = Writer(noise(SECTORS))
    async with chain(worker) as images:
        handle = await images[0].open(direct=False, write=True)
        with pytest.raises(EngineError, match="past its end") as caught:
            await images[0].write(handle, CAPACITY, b"x")
        assert caught.value.errno == errno.ENOSPC
        assert await images[0].write(handle, CAPACITY - 1, b"xyz") == 1
        assert images[0].broken == ""


# What goes wrong


async def test_a_write_that_failed_for_good_is_the_last(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = Writer(noise(SECTORS))
    async with chain(worker) as images:
        base = images[0]
        handle = await base.open(direct=False, write=True)
        await read(base, handle, 0, SECTOR)
        worker.fails = lambda _: EngineError("the host is gone")
        with pytest.raises(EngineError, match="the host is gone"):
            await base.write(handle, 0, b"x" * SECTOR)
        assert "the host is gone" in base.broken
        assert "nothing more is written" in caplog.text
        worker.fails = no_error
        asked = len(worker.sizes)
        with pytest.raises(EngineError, match="nothing is written any more") as caught:
            await base.write(handle, 9 * SECTOR, b"x")
        assert caught.value.errno == errno.EIO
        assert len(worker.sizes) == asked
        worker.content[:SECTOR] = b"h" * SECTOR  # a half of it was written after all
        for image in images:
            assert await read(image, await image.open(False), 0, SECTOR) == b"h" * SECTOR


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL])
async def test_a_write_that_was_refused_is_not_the_last(code: int) -> None:
    worker = Writer(noise(SECTORS))
    async with chain(worker) as images:
        handle = await images[0].open(direct=False, write=True)
        worker.fails = lambda _: EngineError("no space for grains", errno=code)
        with pytest.raises(EngineError, match="no space for grains") as caught:
            await images[0].write(handle, 0, b"x" * SECTOR)
        assert caught.value.errno == code
        worker.fails = no_error
        await images[0].write(handle, 0, b"y" * SECTOR)
        assert worker.content[:SECTOR] == b"y" * SECTOR


@pytest.mark.parametrize("refused", [0, 1])
async def test_a_piece_that_is_lost_breaks_writing_whatever_became_of_the_others(
    refused: int, nursery: trio.Nursery
) -> None:
    """One piece finds no space, and another one is lost, in any order."""
    worker = Writer(noise(SECTORS), held=True)

    def fails(request: WriteRequest) -> VddkfsError:
        if request.sector == refused * FRAME // SECTOR:
            return EngineError("no space", errno=errno.ENOSPC)
        return EngineError("the host is gone")

    worker.fails = fails
    async with chain(worker) as images:
        handle = await images[0].open(direct=False, write=True)
        stop = Stop()
        nursery.start_soon(write, images[0], handle, 0, b"x" * 2 * FRAME, stop)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(worker.asked) == 2
        worker.asked.sort(key=lambda request: request.sector)
        worker.let_go()
        await stop.done.wait()
        assert isinstance(stop.error, EngineError)
        assert "the host is gone" in images[0].broken
        assert stop.error.errno == errno.EIO


async def test_a_sector_that_cannot_be_read_breaks_nothing() -> None:
    worker = Writer(noise(SECTORS))
    async with chain(worker) as images:
        handle = await images[0].open(direct=False, write=True)
        worker.error = EngineError("bad sector")
        with pytest.raises(EngineError, match="bad sector"):
            await images[0].write(handle, 5, b"x")
        assert worker.sizes == []
        worker.error = None
        await images[0].write(handle, 5, b"x")
        assert worker.content[5:6] == b"x"


async def test_a_failed_flush_is_told_once_to_each_writer_and_ends_writing() -> None:
    worker = Writer(noise(SECTORS))
    async with chain(worker) as images:
        base = images[0]
        first, second = [await base.open(direct=False, write=True) for _ in range(2)]
        await base.write(first, 0, b"x" * SECTOR)
        worker.flush_error = EngineError("the array is gone")
        with pytest.raises(EngineError, match="the array is gone"):
            await base.flush(first)
        worker.flush_error = None
        await base.flush(first)
        with pytest.raises(EngineError, match="may be lost") as caught:
            await base.flush(second)
        assert caught.value.errno == errno.EIO
        await base.flush(second)
        await base.flush(await base.open(direct=False, write=True))
        with pytest.raises(EngineError, match="nothing is written any more"):
            await base.write(first, 0, b"y" * SECTOR)
        assert await read(base, first, 0, SECTOR) == b"x" * SECTOR


async def test_two_flushes_that_fail_together_are_told_once_each(nursery: trio.Nursery) -> None:
    worker = Writer(noise(SECTORS))
    async with chain(worker) as images:
        base = images[0]
        handles = [await base.open(direct=False, write=True) for _ in range(2)]
        await base.write(handles[0], 0, b"x" * SECTOR)
        worker.flush_error = EngineError("the array is gone")
        told: list[VddkfsError] = []

        async def flush(handle: Handle) -> None:
            try:
                await base.flush(handle)
            except VddkfsError as error:
                told.append(error)

        async with trio.open_nursery() as flushing:
            for handle in handles:
                flushing.start_soon(flush, handle)
        assert len(told) == 2
        for handle in handles:
            await base.flush(handle)


async def test_nothing_is_written_to_a_disk_that_took_the_place(nursery: trio.Nursery) -> None:
    worker = Writer(noise(SECTORS), held=True)
    async with chain(worker) as images:
        base = images[0]
        handle = await base.open(direct=False, write=True)
        part, behind = Stop(), Stop()
        nursery.start_soon(write, base, handle, 5, b"part of a sector", part)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(write, base, handle, 0, b"x" * SECTOR, behind)
        await trio.testing.wait_all_tasks_blocked()
        assert len(worker.waiting) == 1
        base.supersede()
        worker.let_go()
        for stop in (part, behind):
            await stop.done.wait()
            assert isinstance(stop.error, StaleImage)
        assert worker.sizes == []
        assert not base.broken, "nothing was lost"
        again = await base.open(direct=False, write=True)
        await base.write(again, 0, b"y" * SECTOR)


async def test_flushes_of_what_is_not_written_here_are_nobodys() -> None:
    worker = Writer(noise(SECTORS))
    async with chain(worker) as images:
        above = await images[1].open(direct=False)
        await images[1].flush(above)
        assert worker.flushes == 0
        with pytest.raises(EngineError) as caught:
            await images[1].open(direct=False, write=True)
        assert caught.value.errno == errno.EROFS


async def test_a_write_that_is_cancelled_gives_everything_back(nursery: trio.Nursery) -> None:
    worker = Writer(noise(SECTORS), held=True)
    async with chain(worker) as images:
        handle = await images[0].open(direct=False, write=True)
        for _ in range(8):  # more than there is memory for, were any of it kept
            stop = Stop()
            nursery.start_soon(write, images[0], handle, 0, b"x" * FRAME, stop)
            await trio.testing.wait_all_tasks_blocked(0.01)
            stop.scope.cancel()
            await stop.done.wait()
            assert stop.scope.cancelled_caught
            while worker.busy:
                worker.step(random.Random(0))
        waiting = Stop()
        first = Stop()
        nursery.start_soon(write, images[0], handle, 0, b"y" * SECTOR, first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(write, images[0], handle, 0, b"z" * SECTOR, waiting)
        await trio.testing.wait_all_tasks_blocked()
        waiting.scope.cancel()
        await waiting.done.wait()
        worker.let_go()
        await first.done.wait()
        assert first.error is None
        assert await read(images[0], handle, 0, SECTOR) == b"y" * SECTOR
        await images[0].write(handle, 0, b"w" * SECTOR)
        assert worker.content[:SECTOR] == b"w" * SECTOR
