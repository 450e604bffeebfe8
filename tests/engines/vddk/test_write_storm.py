"""Random writes while the worker is killed again and again, and the host lands its writes late."""

import mmap
import os
import random
import signal

import pytest
import trio

from tests.engines.vddk.workers import SCSI, configured, credentials, patched
from tests.engines.vddk.writers import WRITTEN
from tests.simulator.disks import noise, raw
from tests.simulator.kit import Kit
from vddkfs.engines.base import SECTOR
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.requests import Patience, ReadRequest, WriteRequest
from vddkfs.errors import VddkfsError

BLOCK = 8 * SECTOR
WRITERS = 12
BLOCKS_EACH = 20
KILLS = 4


class Place:
    """One block of the chunk."""

    chunk_number = 1

    def __init__(self, number: int) -> None:
        self.offset = number * BLOCK


class Storm:
    """Writers that each have blocks of the disk to themselves, and know what is there."""

    def __init__(self, client: WorkerClient, before: bytes) -> None:
        self.client = client
        self.fd = os.memfd_create("chunk")
        os.ftruncate(self.fd, WRITERS * BLOCK)
        self.area = mmap.mmap(self.fd, WRITERS * BLOCK)
        client.lend(1, self.fd, len(self.area))
        self.expected = bytearray(before)
        self.written = 0
        self.mark = 0
        self.marked = trio.Event()
        self.over = False

    async def more(self, writes: int) -> None:
        """Return when so many more writes were answered."""
        self.mark, self.marked = self.written + writes, trio.Event()
        await self.marked.wait()

    def _count(self) -> None:
        self.written += 1
        if self.written == self.mark:
            self.marked.set()

    async def _answered(self, request: ReadRequest | WriteRequest, event: trio.Event) -> None:
        if isinstance(request, WriteRequest):
            self.client.submit_write(request)
        else:
            self.client.submit_read(request)
        await event.wait()

    async def writer(self, number: int) -> None:
        """Write one of its blocks, read another, now and then flush."""
        chance = random.Random(number)
        place, at = Place(number), slice(number * BLOCK, (number + 1) * BLOCK)
        while not self.over:
            block = number * BLOCKS_EACH + chance.randrange(BLOCKS_EACH)
            there = slice(block * BLOCK, (block + 1) * BLOCK)
            errors: list[VddkfsError | None] = []
            event = trio.Event()

            def done(
                error: VddkfsError | None,
                errors: list[VddkfsError | None] = errors,
                event: trio.Event = event,
            ) -> None:
                errors.append(error)
                event.set()

            sector = block * BLOCK // SECTOR
            if chance.random() < 0.7:
                data = noise((number, self.written), BLOCK)
                self.area[at] = data
                count = BLOCK // SECTOR
                request: ReadRequest | WriteRequest = WriteRequest(
                    sector, count, place, data, done, lambda: lambda: None
                )
                await self._answered(request, event)
                self.expected[there] = data
                self._count()
            else:
                request = ReadRequest(
                    0, sector, BLOCK // SECTOR, place, done, lambda: (place, lambda: None)
                )
                await self._answered(request, event)
                assert self.area[at] == self.expected[there]
            assert errors == [None]
            if chance.random() < 0.05:
                await self.client.flush()


@pytest.mark.parametrize("transport", ["nbdssl", "san"])
async def test_what_was_answered_is_there_after_any_number_of_kills(
    transport: str, kit: Kit
) -> None:
    lines = ("late_write_ms = 400", "net.latency_us = 25000", "net.jitter = 0.9")
    kit.configure("san.device = file", *lines)
    before = raw(kit.disk(WRITTEN.path))
    secret = credentials()
    config = configured(kit, WRITTEN, transports=(transport,))
    with patched(SCSI):
        async with trio.open_nursery() as nursery:
            client = WorkerClient("base", config, Patience(), lambda _: None, secret=secret)
            nursery.start_soon(client.run)
            storm = Storm(client, before)
            async with trio.open_nursery() as writers:
                for number in range(WRITERS):
                    writers.start_soon(storm.writer, number)
                for _ in range(KILLS):
                    await storm.more(150)
                    assert client.pid is not None
                    os.kill(client.pid, signal.SIGKILL)
                storm.over = True
            await client.flush()
            client.stop()
            nursery.cancel_scope.cancel()
    os.close(secret)
    os.close(storm.fd)
    assert client.write_failure is None
    assert client.counters.starts == KILLS + 1
    if transport == "nbdssl":
        assert kit.events("late-write-landed") or kit.events("late-write-dropped")
    assert raw(kit.disk(WRITTEN.path)) == storm.expected
