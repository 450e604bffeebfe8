"""Images with an overlay: they show what was written, and the source where nothing was."""

import errno
import random
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.disks.layered import (
    CAPACITY,
    SECTORS,
    SOURCE,
    Forked,
    Stop,
    add_layer,
    dug,
    layered,
    open_overlay,
    write,
)
from tests.disks.overlay.memory import MemoryDisk
from tests.disks.test_image import FakeWorker, noise, read
from vddkfs.disks.image import Image
from vddkfs.disks.overlay import BLOCK, Overlay
from vddkfs.engines.base import SECTOR
from vddkfs.errors import EngineError, OverlayError, StaleImage, VddkfsError

# The model

OFFSETS = (
    st.integers(0, CAPACITY - 1)
    | st.integers(0, SECTORS - 1).map(lambda n: n * SECTOR)
    | st.integers(0, CAPACITY // BLOCK).map(lambda n: n * BLOCK)
)
SIZES = st.sampled_from([1, 100, SECTOR, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 50 * BLOCK])
WHICH = st.integers(0, 1)
STEPS = st.one_of(
    st.tuples(st.just("write"), WHICH, OFFSETS, SIZES, st.integers(0, 99)),
    st.tuples(st.just("zero"), WHICH, OFFSETS, SIZES),
    st.tuples(st.just("read"), WHICH, OFFSETS, SIZES, st.booleans()),
    st.tuples(st.just("seek"), WHICH, OFFSETS, st.booleans()),
    st.tuples(st.sampled_from(["map", "blocks", "flush", "drop", "open"]), WHICH),
    st.tuples(st.just("drop"), WHICH, OFFSETS, SIZES),
)


class Fork:
    """One image, its handles, and what it must show."""

    def __init__(self, image: Image, worker: FakeWorker) -> None:
        self.image = image
        self.model = Forked(worker)

    async def open(self) -> None:
        self.handle = await self.image.open(direct=False, write=True)
        self.direct = await self.image.open(direct=True)

    async def check(self) -> None:
        for handle in (self.handle, self.direct):
            assert await read(self.image, handle, 0, CAPACITY) == self.model.content
        await self.look()

    async def look(self) -> None:
        found = await self.image.map_now()
        runs = found.runs(0, SECTORS)
        assert [run.data for run in runs for _ in range(run.count)] == self.model.data
        await self.image.settle()
        if self.image.map is not None:
            assert self.image.allocated_bytes() == sum(self.model.data) * SECTOR

    async def do(self, step: tuple[Any, ...]) -> None:
        image, model = self.image, self.model
        match step:
            case "write", _, start, size, seed:
                data = random.Random(seed).randbytes(size)
                assert await image.write(self.handle, start, data) == model.write(start, data)
            case "zero", _, start, size:
                data = bytes(size)
                assert await image.write(self.handle, start, data) == model.write(start, data)
            case "read", _, start, size, direct:
                handle = self.direct if direct else self.handle
                wanted = model.content[start : start + size]
                assert await read(image, handle, start, size) == wanted
            case "seek", _, start, data:
                await self.seek(start, data)
            case "map", _:
                await self.look()
            case "blocks", _:
                image.want_map()
                assert 0 < image.allocated_bytes() <= CAPACITY
            case "flush", _:
                await image.flush(self.handle)
            case "drop", _:
                image.drop()
            case "drop", _, start, size:
                image.drop(start, start + size)
            case "open", _:
                await self.open()
        assert image.layer is not None
        assert image.layer.changed_bytes == model.changed_bytes

    async def seek(self, start: int, data: bool) -> None:
        found = self.model.seek(start, data)
        if not data:
            assert await self.image.seek_hole(start) == (CAPACITY if found is None else found)
        elif found is not None:
            assert await self.image.seek_data(start) == found
        else:
            with pytest.raises(VddkfsError) as caught:
                await self.image.seek_data(start)
            assert caught.value.errno == errno.ENXIO


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEPS, max_size=30), frozen=st.booleans())
async def test_each_image_of_a_chain_is_a_fork_of_its_own(
    steps: list[tuple[Any, ...]], frozen: bool
) -> None:
    overlay = open_overlay()
    workers = dug(1), dug(2)
    before = [bytes(worker.content) for worker in workers]
    async with (
        layered(workers[0], overlay, frozen, "d/chain/0.raw") as base,
        layered(workers[1], overlay, frozen, "d/chain/1.raw") as top,
    ):
        forks = Fork(base, workers[0]), Fork(top, workers[1])
        for fork in forks:
            await fork.open()
        for step in steps:
            await forks[step[1]].do(step)
        for fork in forks:
            await fork.check()
    assert [bytes(worker.content) for worker in workers] == before, "nothing reaches the source"


async def test_what_was_flushed_is_there_in_the_next_mount(tmp_path: Path) -> None:
    """On the machine's own files, with offsets and sizes of any kind."""
    draw = random.Random(7)
    model = Forked(dug())
    for _ in range(3):
        overlay = Overlay.open(str(tmp_path / "over"), SOURCE)
        async with layered(dug(), overlay) as image:
            fork = Fork(image, dug())
            fork.model = model
            await fork.open()
            await fork.check()
            for _ in range(20):
                start, size = draw.randrange(CAPACITY), draw.choice([1, 700, BLOCK, 20 * BLOCK])
                await fork.do(("write", 0, start, size, draw.randrange(1000)))
                await fork.do(("zero", 0, draw.randrange(CAPACITY), size))
            await fork.check()
            await image.flush(fork.handle)
        overlay.close()


# Ends of the image and of the space


async def test_the_end_of_the_image_is_the_end_of_the_space() -> None:
    async with layered(dug(), open_overlay()) as image:
        handle = await image.open(direct=False, write=True)
        for start in (CAPACITY, CAPACITY + 1):
            with pytest.raises(EngineError, match="past its end") as caught:
                await image.write(handle, start, b"x")
            assert caught.value.errno == errno.ENOSPC
        assert await image.write(handle, CAPACITY - 3, b"abcdef") == 3
        assert await read(image, handle, CAPACITY - 3, 100) == b"abc"


async def test_what_was_written_before_the_space_was_used_up_is_shown_everywhere() -> None:
    """A write that fails half way has changed the map, and the partitions may be others."""
    disk = MemoryDisk()
    async with layered(dug(), open_overlay(disk)) as image:
        fork = Fork(image, dug())
        await fork.open()
        await fork.do(("write", 0, 0, BLOCK, 1))
        await image.flush(fork.handle)
        await fork.look()
        mtime = image.mtime_ns
        disk.fill()
        with pytest.raises(OverlayError) as caught:
            await image.write(fork.handle, 26 * BLOCK, b"n" * 60 * BLOCK)
        assert caught.value.errno == errno.ENOSPC
        assert image.layer is not None
        written = image.layer.changed_bytes // BLOCK - 1
        assert 0 < written < 60
        fork.model.write(26 * BLOCK, b"n" * written * BLOCK)
        await fork.check()
        assert image.mtime_ns > mtime


# The partitions of an image that is written


async def test_partitions_are_those_that_were_written() -> None:
    worker = dug()
    async with layered(worker, open_overlay()) as image:
        handle = await image.open(direct=False, write=True)
        assert await image.partitions() is None
        table = bytearray(512)
        table[446:462] = bytes([0, 0, 0, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0, 0])
        table[510:] = b"\x55\xaa"
        await image.write(handle, 0, bytes(table))
        found = await image.partitions()
        assert found is not None
        assert [(part.start, part.size) for part in found.partitions] == [(8 * 512, 16 * 512)]
        await image.write(handle, 8 * 512, b"in the partition")
        assert await image.partitions() is found, "the same table"
        await image.write(handle, 510, b"\0\0")
        assert await image.partitions() is None


# The source


async def test_the_source_is_read_as_without_an_overlay_where_nothing_was_written() -> None:
    worker = dug()
    async with layered(worker, open_overlay()) as image:
        handle = await image.open(direct=False, write=True)
        await image.map_when_known()
        await image.write(handle, 100 * SECTOR, b"x" * SECTOR)
        asked = len(worker.reads)
        assert await read(image, handle, 210 * SECTOR, 50 * SECTOR) == bytes(50 * SECTOR)
        assert len(worker.reads) == asked, "a hole of the source costs no read"
        await read(image, handle, 0, 3 * SECTOR)
        asked = len(worker.reads)
        await read(image, handle, 0, 3 * SECTOR)
        assert len(worker.reads) == asked, "it is cached"


async def test_a_block_is_never_made_of_two_disks(nursery: trio.Nursery) -> None:
    """The source turns out to be another one while the rest of a block is read of it."""
    worker = dug()
    async with layered(worker, open_overlay()) as image:
        handle = await image.open(direct=False, write=True)
        worker.held = True
        stop = Stop()
        nursery.start_soon(write, image, handle, 100, b"part of a block", stop)
        await worker.asked.wait()
        image.supersede()
        worker.content[:] = noise(SECTORS, 9)
        worker.let_go()
        await stop.done.wait()
        assert isinstance(stop.error, StaleImage)
        assert image.layer is not None
        assert image.layer.changed_bytes == 0
        with pytest.raises(StaleImage, match="another disk"):
            await image.open(direct=False)


async def test_a_write_whose_block_cannot_be_read_fails_and_changes_nothing() -> None:
    worker = dug()
    async with layered(worker, open_overlay()) as image:
        handle = await image.open(direct=False, write=True)
        worker.error = EngineError("bad sector")
        with pytest.raises(EngineError, match="bad sector"):
            await image.write(handle, 100, b"part of a block")
        await image.write(handle, 0, b"whole" * BLOCK)
        worker.error = None
        model = Forked(worker)
        model.write(0, b"whole" * BLOCK)
        assert await read(image, handle, 0, CAPACITY) == model.content


async def test_a_long_search_lets_others_run(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with layered(FakeWorker(noise(SECTORS)), open_overlay()) as image:
        handle = await image.open(direct=False, write=True)
        await image.write(handle, 0, b"x" * BLOCK)
        many = ((0, BLOCK, True) for _ in range(100_000))
        monkeypatch.setattr(image.layer, "kinds", lambda start: many)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        nursery.start_soon(other)
        await trio.lowlevel.checkpoint()
        before = turns
        assert await image.seek_hole(0) == CAPACITY
        assert turns - before > 50


# Several at once


async def test_writers_of_one_block_do_not_lose_each_others_parts(nursery: trio.Nursery) -> None:
    worker = dug()
    async with layered(worker, open_overlay()) as image:
        handle = await image.open(direct=False, write=True)
        worker.held = True
        stops = [Stop() for _ in range(8)]
        for number, stop in enumerate(stops):
            data = bytes([number]) * 100
            nursery.start_soon(write, image, handle, BLOCK + 100 * number, data, stop)
        await worker.asked.wait()
        worker.let_go()
        for stop in stops:
            await stop.done.wait()
            assert stop.error is None
        wanted = b"".join(bytes([number]) * 100 for number in range(8))
        assert await read(image, handle, BLOCK, 800) == wanted


async def test_a_write_that_is_cancelled_is_in_nobodys_way(nursery: trio.Nursery) -> None:
    """It waits for the source, and so do others that come later."""
    worker = dug()
    async with layered(worker, open_overlay()) as image:
        handle = await image.open(direct=False, write=True)
        worker.held = True
        first, second = Stop(), Stop()
        nursery.start_soon(write, image, handle, 10, b"first", first)
        await worker.asked.wait()
        nursery.start_soon(write, image, handle, 20, b"second", second)
        first.scope.cancel()
        await first.done.wait()
        assert first.scope.cancelled_caught
        worker.let_go()
        await second.done.wait()
        assert second.error is None
        model = Forked(worker)
        model.write(20, b"second")
        assert await read(image, handle, 0, CAPACITY) == model.content


async def test_the_kernel_keeps_nothing_of_before_where_its_pages_were_passed_by() -> None:
    """Those before 6.6 leave their pages as they were when somebody writes with O_DIRECT."""
    async with layered(dug(), open_overlay()) as image:
        buffered = await image.open(direct=False, write=True)
        direct = await image.open(direct=True, write=True)
        await image.write(buffered, 0, b"x" * BLOCK)
        assert (await image.open(direct=False)).keep_cache, "the kernel has what it has written"
        await image.write(direct, 0, b"y" * BLOCK)
        assert not (await image.open(direct=False)).keep_cache
        assert not (await image.open(direct=False)).keep_cache


# Flushes


async def test_a_flush_that_failed_is_told_once_to_each_writer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = MemoryDisk()
    async with layered(dug(), open_overlay(disk)) as image:
        first, second = [await image.open(direct=False, write=True) for _ in range(2)]
        await image.write(first, 0, b"x" * BLOCK)
        assert image.layer is not None
        layer = image.layer
        disk.fail["sync"] = errno.EIO
        with pytest.raises(OverlayError):
            await image.flush(first)
        assert image.failures == 1
        # Let the store be well again: what is told is told all the same.
        monkeypatch.setattr(layer, "flush", trio.lowlevel.checkpoint)
        await image.flush(first)
        with pytest.raises(EngineError, match="may be lost"):
            await image.flush(second)
        await image.flush(second)
        later = await image.open(direct=False, write=True)
        await image.flush(later)


async def test_a_flush_that_wanted_space_and_has_it_later_is_no_loss_to_others() -> None:
    disk = MemoryDisk()
    async with layered(dug(), open_overlay(disk)) as image:
        first, second = [await image.open(direct=False, write=True) for _ in range(2)]
        await image.write(first, 0, b"x" * BLOCK)
        await image.write(second, BLOCK, b"y" * BLOCK)
        disk.fail["write"] = errno.ENOSPC
        with pytest.raises(OverlayError) as caught:
            await image.flush(first)
        assert caught.value.errno == errno.ENOSPC
        del disk.fail["write"]
        await image.flush(second)
        await image.flush(first)


async def test_a_store_that_has_lost_something_takes_no_writes() -> None:
    disk = MemoryDisk()
    async with layered(dug(), open_overlay(disk)) as image:
        handle = await image.open(direct=False, write=True)
        await image.write(handle, 0, b"x" * BLOCK)
        disk.fail["sync"] = errno.EIO
        with pytest.raises(OverlayError):
            await image.flush(handle)
        disk.fail.clear()
        with pytest.raises(OverlayError):
            await image.write(handle, 0, b"y" * BLOCK)
        assert await read(image, handle, 0, BLOCK) == b"x" * BLOCK, "reads go on"


async def test_nothing_is_made_for_an_image_that_is_only_read() -> None:
    disk = MemoryDisk()
    overlay = open_overlay(disk)
    async with layered(dug(), overlay) as image:
        calls = disk.calls
        handle = await image.open(direct=False, write=True)
        assert await read(image, handle, 0, CAPACITY) == dug().content
        await image.flush(handle)
        await image.seek_data(0)
        assert disk.calls == calls
        assert overlay.find("d/chain/0.raw", CAPACITY) is None


async def test_an_image_that_is_not_to_be_written_says_why() -> None:
    async with layered(dug(), open_overlay()) as image:
        image.layer = None
        image.read_only = "it is somebody else's"
        with pytest.raises(EngineError, match="somebody else's") as caught:
            await image.open(direct=False, write=True)
        assert caught.value.errno == errno.EROFS
        await image.open(direct=False)
        add_layer(image, open_overlay())
        assert image.writable


async def test_a_long_search_lets_others_have_their_turn(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that were written all over a disk are runs of their own, millions of them."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with layered(dug(), open_overlay()) as image:
        handle = await image.open(direct=False, write=True)
        await image.write(handle, 0, b"x")
        runs = [(0, SECTOR, True)] * 50_000
        monkeypatch.setattr(image.layer, "kinds", lambda start: iter(runs))
        nursery.start_soon(other)
        await trio.lowlevel.checkpoint()
        before = turns
        assert await image.seek_hole(0) == CAPACITY
        assert turns - before >= 40
        nursery.cancel_scope.cancel()
