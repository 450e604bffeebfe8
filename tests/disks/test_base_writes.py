"""Writes to the base of a chain: the source has them, and nothing older is shown of any image."""

import errno
import random

import pytest
import trio
import trio.testing

from tests.disks.based import CAPACITY, SECTORS, Writer, chain, no_error
from tests.disks.layered import Stop, write
from tests.disks.test_image import noise, read
from vddkfs.cache.arena import FRAME
from vddkfs.disks.image import Handle
from vddkfs.engines.base import SECTOR
from vddkfs.engines.requests import WriteRequest
from vddkfs.errors import EngineError, StaleImage, VddkfsError

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
        await worker.has_asked(2)
        worker.let_go()
        await stop.done.wait()
        assert sorted(worker.sizes) == [
            *((1 + at, 512) for at in range(0, 2 * FRAME // SECTOR, 512)),
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
        await worker.has_asked(2)
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
            await worker.has_asked(1)
            stop.scope.cancel()
            await stop.done.wait()
            assert stop.scope.cancelled_caught
            while worker.busy:
                worker.step(random.Random(0))
        waiting = Stop()
        first = Stop()
        nursery.start_soon(write, images[0], handle, 0, b"y" * SECTOR, first)
        await worker.has_asked(1)
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
