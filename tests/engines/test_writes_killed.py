"""Writes through real worker processes, which are killed, or hang with a write that comes late."""

import mmap
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.engines.vmdk.conftest import Maker
from vddkfs.engines import spawn
from vddkfs.engines.base import SECTOR
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.config import VmdkConfig
from vddkfs.engines.process import WorkerProcess
from vddkfs.engines.requests import Patience, WriteRequest
from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.errors import VddkfsError, WorkerFailed

SECONDS = 60.0
SIZE = 1 << 20


class Memory:
    """A chunk of memory that writes are made from, in slots of 4 KiB."""

    chunk_number = 3

    def __init__(self) -> None:
        self.fd = os.memfd_create("chunk")
        os.ftruncate(self.fd, SIZE)
        self.area = mmap.mmap(self.fd, SIZE)
        self.free = [n * 4096 for n in range(SIZE // 4096)]

    def close(self) -> None:
        self.area.close()
        os.close(self.fd)


class Place:
    chunk_number = Memory.chunk_number

    def __init__(self, offset: int) -> None:
        self.offset = offset


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


class Writer:
    def __init__(self, client: WorkerClient, memory: Memory) -> None:
        self.client = client
        self.memory = memory
        client.lend(memory.chunk_number, memory.fd, SIZE)

    async def write(self, sector: int, data: bytes) -> None:
        """Write, and raise what that ends with. The slot is used again afterwards."""
        offset = self.memory.free.pop()
        self.memory.area[offset : offset + len(data)] = data
        ended = trio.Event()
        errors: list[VddkfsError | None] = []
        held: list[int] = []

        def done(error: VddkfsError | None) -> None:
            errors.append(error)
            ended.set()

        def hold() -> Any:
            held.append(offset)
            return lambda: self.memory.free.append(offset)

        count = len(data) // SECTOR
        self.client.submit_write(WriteRequest(sector, count, Place(offset), data, done, hold))
        with trio.fail_after(SECONDS):
            await ended.wait()
        if not held:
            self.memory.free.append(offset)
        [error] = errors
        if error is not None:
            raise error


@asynccontextmanager
async def writing(
    path: str, memory: Memory, patience: Patience | None = None, start: Any = None
) -> AsyncIterator[Writer]:
    config = VmdkConfig(links=(os.fsencode(path),), writable=True)
    client = WorkerClient("disk", config, patience or Patience(), lambda found: None, start)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        yield Writer(client, memory)
        client.stop()
        nursery.cancel_scope.cancel()


def look(path: str, sectors: int) -> bytes:
    engine = VmdkEngine([path])
    content = bytearray(sectors * SECTOR)
    engine.read(0, 0, sectors, memoryview(content), False)
    engine.close()
    return bytes(content)


def content_id(path: str) -> bytes:
    return Path(path).read_bytes()[:4096].split(b"\nCID=")[1][:8]


def answered(client: WorkerClient, writes: int) -> bool:
    return client.counters.writes.count > writes


def restarted(client: WorkerClient, times: int) -> bool:
    return client.counters.restarts > times and client.pid is not None


async def until(condition: Callable[[], Any]) -> None:
    with trio.fail_after(SECONDS):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


@pytest.mark.parametrize("kind", ["flat", "sparse"])
async def test_killed_again_and_again_no_write_is_lost(
    kind: str, tmp_path: Path, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """Each takes the lock, and the content id changes once."""
    make, sectors, tasks = Maker(tmp_path), 16384, 8
    if kind == "flat":
        path = str(make.flat("x", bytes(sectors * SECTOR)))
    else:
        path = str(make.sparse("x.vmdk", sectors, {}))
    model = bytearray(sectors * SECTOR)
    before = VmdkEngine([path])
    (was,) = before.identities()
    before.close()
    ids = set()

    async def task(writer: Writer, number: int) -> None:
        chance = random.Random(number)
        share = sectors // tasks
        for _ in range(60):
            sector = number * share + chance.randrange(share - 8)
            data = chance.randbytes(8 * SECTOR)
            await writer.write(sector, data)
            model[sector * SECTOR : sector * SECTOR + len(data)] = data
            if not chance.randrange(20):
                await writer.client.flush()

    async with writing(path, memory) as writer:
        async with trio.open_nursery() as nursery:
            for number in range(tasks):
                nursery.start_soon(task, writer, number)
            for kill in range(4):
                await until(partial(answered, writer.client, 40 * kill))
                assert writer.client.pid is not None
                os.kill(writer.client.pid, signal.SIGKILL)
                ids.add(content_id(path))
                await until(partial(restarted, writer.client, kill))
        await writer.client.flush()
        assert writer.client.write_failure is None
        assert writer.client.counters.restarts == 4
    assert look(path, sectors) == model
    assert len(ids) == 1
    assert ids != {was.content_id.encode()}
    assert all("another takes over" in record.message for record in caplog.records)


async def test_a_worker_that_was_ended_gives_its_lock_to_the_next_mount(
    tmp_path: Path, memory: Memory
) -> None:
    path = str(Maker(tmp_path).flat("x", bytes(51200)))
    async with writing(path, memory) as first:
        await first.write(0, b"a" * 512)
        other = Memory()
        async with writing(path, other) as second:
            with pytest.raises(VddkfsError, match="another process has it open for writing"):
                await second.write(0, b"b" * 512)
        other.close()
    async with writing(path, memory) as third:
        await third.write(1, b"c" * 512)
    assert look(path, 2) == b"a" * 512 + b"c" * 512


# A write that comes late: a server, or a disk, that finishes what a process began.

TOY = """
import fcntl, mmap, os, socket, sys
sys.path.insert(0, {root!r})
from vddkfs.engines import protocol
from vddkfs.engines.base import LinkIdentity
from vddkfs.engines.protocol import Op
sock = socket.socket(fileno=int(sys.argv[1]))
disk = os.open({disk!r}, os.O_RDWR)
chunks = {{}}
while True:
    packet, fd = protocol.receive(sock)
    if not packet or packet[0] == Op.STOP:
        os._exit(0)
    op, _, _, count, number, sector, chunk, offset = protocol.REQUEST.unpack_from(packet)
    body = b""
    if op == Op.OPEN:
        body = protocol.encode((LinkIdentity("toy", "12345678", 100),))
    elif op == Op.LEND:
        chunks[chunk] = mmap.mmap(fd, count)
    elif op == Op.WRITE:
        data = chunks[chunk][offset : offset + count * 512]
        try:
            os.rmdir({late!r})
        except FileNotFoundError:
            os.pwrite(disk, data, sector * 512)
        else:
            with open({fifo!r}) as fifo:
                fifo.read()
            os.pwrite(disk, data, sector * 512)
            os._exit(0)
    protocol.send(sock, protocol.reply_header(op, 0, number), body)
"""


class Unkillable(WorkerProcess):
    """Hangs in the kernel: a signal does nothing, and it goes on when its disk answers."""

    async def end(self, kill: bool) -> bool:
        return await self.reap(0.05)


class Toy:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.disk = folder / "disk"
        self.disk.write_bytes(bytes(51200))
        self.late, self.fifo = folder / "late", folder / "fifo"
        self.late.mkdir()
        os.mkfifo(self.fifo)
        root = str(Path(__file__).parents[2])
        code = TOY.format(root=root, disk=str(self.disk), late=str(self.late), fifo=str(self.fifo))

        def command(theirs: Any) -> list[str]:
            return [sys.executable, "-I", "-c", code, str(theirs.fileno()), "0"]

        monkeypatch.setattr(spawn, "_command", command)
        self.processes: list[WorkerProcess] = []

    def start(self, name: str) -> WorkerProcess:
        kind = WorkerProcess if self.processes else Unkillable
        self.processes.append(kind(name))
        return self.processes[-1]

    async def lands(self) -> None:
        """Have the late write come, and its process end."""
        fd = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK)
        os.close(fd)
        await until(lambda: self.processes[0].ending())

    def close(self) -> None:
        first = self.processes[0]
        assert first.ending(), "the client has reaped it"
        first.sock.close()
        os.close(first._output)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    toy = Toy(tmp_path, monkeypatch)
    yield toy
    toy.close()


OLD, NEW = b"o" * 512, b"n" * 512
QUICK = Patience(op_timeout=0.5, fence_timeout=30)


async def test_a_late_write_does_not_land_on_a_newer_one(toy: Toy, memory: Memory) -> None:
    async with writing("/toy", memory, QUICK, toy.start) as writer:
        async with trio.open_nursery() as nursery:

            async def both() -> None:
                await writer.write(0, OLD)
                await writer.write(0, NEW)

            nursery.start_soon(both)
            await until(lambda: writer.client._hanging)
            await trio.sleep(1)
            assert len(toy.processes) == 1
            await toy.lands()
        assert len(toy.processes) == 2
        assert toy.disk.read_bytes()[:512] == NEW


async def test_the_trap(toy: Toy, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fence it does."""

    async def not_fenced(self: WorkerClient) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(WorkerClient, "_until_fenced", not_fenced)
    async with writing("/toy", memory, QUICK, toy.start) as writer:
        await writer.write(0, OLD)
        await writer.write(0, NEW)
        assert toy.disk.read_bytes()[:512] == NEW
        await toy.lands()
        assert toy.disk.read_bytes()[:512] == OLD


async def test_a_late_write_is_of_what_was_written_and_not_of_what_took_its_memory(
    toy: Toy, memory: Memory
) -> None:
    """The fence is not proved: the writer hears of it, and goes on to use its memory."""
    memory.free = memory.free[:1]
    patience = Patience(op_timeout=0.5, fence_timeout=0.5)
    async with writing("/toy", memory, patience, toy.start) as writer:
        with pytest.raises(WorkerFailed, match="no proof"):
            await writer.write(0, OLD)
        assert memory.free == [], "out of use"
        await toy.lands()
        await until(lambda: memory.free)
        assert toy.disk.read_bytes()[:512] == OLD
