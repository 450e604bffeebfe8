"""Reads of a chain whose base is written: they have what was written before, of any image."""

import itertools
import random
from typing import Any

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.disks.based import CAPACITY, MIB, SECTORS, Writer, chain
from tests.disks.layered import Stop, write
from tests.disks.test_image import noise, read
from vddkfs.disks.image import Handle, Image
from vddkfs.engines.base import SECTOR

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
    """As soon as the map is fetched anew: what is written moves on under it."""
    for image in images:
        await image.map_now()
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
        await worker.has_asked(1)
        while worker.asked or worker.written:
            worker.step_write(random.Random(0))
        await stop.done.wait()
        assert found == []
        worker.let_go()
        await trio.testing.wait_all_tasks_blocked()
        assert found == [noise(SECTORS)[:SECTOR]], "it began before"
        assert await read(base, handle, 0, SECTOR) == b"n" * SECTOR
