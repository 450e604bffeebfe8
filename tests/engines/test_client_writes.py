"""Writes and the supervisor: a write is never on its way twice, and none is lost unheard."""

import errno
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
import trio.testing

from tests.engines import test_client
from tests.engines.test_client import IDENTITY, FakeProcess, Outcome, Script, Slot, read
from vddkfs.engines import protocol, unflushed
from vddkfs.engines.base import LinkIdentity
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.config import VddkConfig, VddkImage, VmdkConfig
from vddkfs.engines.protocol import Op
from vddkfs.engines.requests import Patience, WriteRequest
from vddkfs.errors import EngineError, StaleImage, VddkfsError, WorkerFailed

VMDK = VmdkConfig(links=(b"/vm/a.vmdk",), writable=True)
VDDK = VddkConfig(images=(VddkImage("[ds] a.vmdk", writable=True),), tmp_directory="/nonexistent")
LIVE = IDENTITY

Serving = AbstractAsyncContextManager[tuple[WorkerClient, list["FakeProcess"]]]


class Disk:
    """What processes of one disk have in common: its sectors, and who has it open to write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[tuple[int, bytes]] = []
        self.memory: list[tuple[int, bytes]] = []
        """What a library has taken and not flushed."""
        self.flushes = 0
        self.owner: FakeProcess | None = None
        self.refusal: VddkfsError | None = None
        self.later_refusal: VddkfsError | None = None
        self.identity = IDENTITY
        self.writable: list[bool] = []

    async def opened_by(self, process: FakeProcess) -> bool:
        """Answer OPEN; say whether it was granted."""
        packet, _ = await packet_of(process)
        request = protocol.REQUEST.unpack_from(packet)
        assert request[0] == Op.OPEN
        assert self.owner is None or self.owner.gone.is_set(), "two have it open"
        config = decode(packet)
        self.writable.append(config.writable)
        if self.refusal is not None and config.writable:
            fail(process, request, self.refusal)
            return False
        self.owner = process
        process.reply(request, 0, protocol.encode((self.identity,)))
        return True

    async def serve(self, process: FakeProcess, *, after: int = -1, hang: bool = False) -> None:
        """Serve *after* requests; then take one, and die of it (or hang with it)."""
        if not await self.opened_by(process):
            await trio.sleep_forever()
        while after:
            after -= 1
            packet, fd = await packet_of(process)
            self.answer(process, packet, fd)
        await packet_of(process)
        if hang:
            await trio.sleep_forever()
        self.memory.clear()
        self.refusal = self.later_refusal
        process.die()

    def answer(self, process: FakeProcess, packet: bytes, fd: int) -> None:
        request = protocol.REQUEST.unpack_from(packet)
        if request[0] == Op.WRITE:
            self.memory.append((request[5], b""))
        elif request[0] == Op.WRITE_AGAIN:
            self.memory.append((request[5], protocol.body_of(packet, protocol.REQUEST.size, fd)))
        elif request[0] == Op.FLUSH:
            self.written += self.memory
            self.memory.clear()
            self.flushes += 1
        process.reply(request)

    def serving(self, **how: Any) -> Script:
        async def script(process: FakeProcess) -> None:
            process.killable = not how.get("hang", False)
            await self.serve(process, **how)

        return script

    @property
    def sectors(self) -> list[int]:
        return [sector for sector, _ in self.written]


async def packet_of(process: FakeProcess) -> tuple[bytes, int]:
    """Return the next packet that the process gets; it is noted as by ``FakeProcess.next``."""
    try:
        await trio.lowlevel.wait_readable(process.theirs)
        packet, fd = protocol.receive(process.theirs)
    except (trio.ClosedResourceError, ConnectionResetError):
        packet, fd = b"", -1
    if not packet:
        await trio.sleep_forever()
    process.got.append(protocol.REQUEST.unpack_from(packet))
    return packet, fd


def decode(packet: bytes) -> Any:
    import msgspec

    from vddkfs.engines.config import EngineConfig

    body = packet[protocol.REQUEST.size :]
    return msgspec.msgpack.decode(body, type=EngineConfig)


def fail(process: FakeProcess, request: tuple[Any, ...], error: VddkfsError) -> None:
    process.reply(request, error.errno, protocol.encode_error(error))


class Write(Outcome):
    """What became of one write, and of the memory that it is written from."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = 0

    def held(self) -> Any:
        assert not self.event.is_set(), "before the caller may use it for something else"
        self.holds += 1
        return self.free


def write(client: WorkerClient, sector: int, data: bytes = b"x" * 512) -> Write:
    outcome = Write()
    count = len(data) // 512
    client.submit_write(WriteRequest(sector, count, Slot(), data, outcome.done, outcome.held))
    return outcome


async def ended(outcome: Outcome, seconds: float = 1000) -> VddkfsError | None:
    with trio.fail_after(seconds):
        await outcome.event.wait()
    [error] = outcome.errors
    return error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def vmdk(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(test_client, "CONFIG", VMDK)
    return test_client.serving


@pytest.fixture
def vddk(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(test_client, "CONFIG", VDDK)
    return test_client.serving


@pytest.fixture(params=["vmdk", "vddk"])
def either(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def writes_of(process: FakeProcess) -> list[tuple[int, int]]:
    """Return operation and sector of the writes that a process got."""
    return [(got[0], got[5]) for got in process.got if got[0] in (Op.WRITE, Op.WRITE_AGAIN)]


# The fast path.


async def test_a_write_costs_one_packet_each_way(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    async with either(disk.serving()) as (client, processes):
        for sector in range(3):
            assert await ended(write(client, sector)) is None
        assert [got[0] for got in processes[0].got] == [Op.OPEN, Op.WRITE, Op.WRITE, Op.WRITE]
        assert client.counters.writes.count == 3
        await client.flush()
        assert disk.sectors == [0, 1, 2]
        await client.flush()
        assert disk.flushes == 1, "there is nothing to flush"


async def test_an_error_of_a_write_is_told_and_the_next_may_succeed(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    async def fails(process: FakeProcess) -> None:
        await disk.opened_by(process)
        fail(process, await process.next(), EngineError("full", errno=errno.ENOSPC))
        process.reply(await process.next())
        await trio.sleep_forever()

    async with either(fails) as (client, _):
        bad = write(client, 0)
        error = await ended(bad)
        assert error is not None
        assert error.errno == errno.ENOSPC
        assert await ended(write(client, 1)) is None
        assert client.write_failure is None
        assert bad.holds == (client.config == VDDK), "a library may still read its memory"
        assert bad.freed == 0


# The fence.


async def test_a_write_is_sent_again_when_its_process_is_gone(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    async with either(disk.serving(after=0), disk.serving()) as (client, processes):
        outcome = write(client, 5)
        assert await ended(outcome) is None
        await client.flush()
        assert writes_of(processes[1]) == [(Op.WRITE, 5)]
        assert client.counters.resent == 1
        assert (outcome.moves, outcome.holds) == (0, 0)


async def test_no_process_is_started_before_a_hanging_one_is_gone(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    scripts = disk.serving(after=0, hang=True), disk.serving()
    async with either(*scripts, patience=Patience(op_timeout=5)) as (client, processes):
        first = write(client, 5)
        await trio.sleep(20)
        later, reader = write(client, 6), read(client)
        await trio.sleep(5)
        assert len(processes) == 1
        assert processes[0].ended is True
        assert not any(outcome.event.is_set() for outcome in (first, later, reader))
        assert first.holds == 1
        processes[0].die()
        for outcome in (first, later, reader):
            assert await ended(outcome) is None
        assert writes_of(processes[1]) == [(Op.WRITE, 5), (Op.WRITE, 6)]
        assert first.freed == 1
        assert client.write_failure is None


async def test_the_fence_that_is_not_proved_in_time(
    disk: Disk, either: Any, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scripts = disk.serving(after=1, hang=True), test_client.answer_all
    patience = Patience(op_timeout=5, fence_timeout=12)
    async with either(*scripts, patience=patience) as (client, processes):
        assert await ended(write(client, 1)) is None
        began = trio.current_time()
        first, reader = write(client, 5), read(client)
        error = await ended(first)
        assert 17 <= trio.current_time() - began < 20
        assert isinstance(error, WorkerFailed)
        assert error.errno == errno.EIO
        assert "no proof within 12 s that nothing is written late" in str(error)
        assert client.write_failure is error
        assert first.holds == 1
        assert first.freed == 0, "its memory may still be read"
        assert await ended(reader) is None, "reads go on"
        assert decode_opens(processes[1]) == 1
        assert await ended(write(client, 6)) is error
        with pytest.raises(WorkerFailed, match="no proof"):
            await client.flush()
        processes[0].die()
        await trio.sleep(1)
        assert first.freed == 1
        assert writes_of(processes[1]) == []
    assert "nothing is written any more" in caplog.text


def decode_opens(process: FakeProcess) -> int:
    return sum(got[0] == Op.OPEN for got in process.got)


async def test_a_new_write_waits_for_a_hanging_process_no_longer(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    """It had no write, but it has the disk's lock."""
    scripts = disk.serving(after=0, hang=True), test_client.answer_all
    patience = Patience(op_timeout=5, fence_timeout=12)
    async with either(*scripts, patience=patience) as (client, processes):
        reader = read(client)
        await trio.sleep(30)
        assert not reader.event.is_set()
        began = trio.current_time()
        assert isinstance(await ended(write(client, 1)), WorkerFailed)
        assert 12 <= trio.current_time() - began < 14
        assert await ended(reader) is None
        processes[0].die()


async def test_a_disk_that_nobody_can_open_again_ends_the_writes(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    scripts = disk.serving(after=0), disk.serving()
    async with either(*scripts, patience=Patience(fence_timeout=12)) as (client, _):
        disk.later_refusal = EngineError("it is locked", retry="reconnect")
        error = await ended(write(client, 1))
        assert isinstance(error, WorkerFailed)
        assert "no other has opened the disk to be written since" in str(error)
        assert await ended(read(client)) is None
        assert disk.writable[-1] is False


async def test_a_lock_that_others_took_meanwhile_ends_the_writes_and_not_the_reads(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    async with either(disk.serving(after=0), disk.serving()) as (client, _):
        disk.later_refusal = VddkfsError("another writes it", errno=errno.EROFS)
        first, reader = write(client, 1), read(client)
        error = await ended(first)
        assert str(error) == "another writes it"
        assert str(client.write_failure) == "another writes it"
        assert await ended(reader) is None
        assert disk.writable == [True, True, False]


async def test_nothing_is_written_to_another_disk(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    async with either(disk.serving(after=0), disk.serving()) as (client, processes):
        first = write(client, 1)
        await trio.testing.wait_all_tasks_blocked()
        disk.identity = LinkIdentity("/vm/a.vmdk", "12345678", 200)
        assert isinstance(await ended(first), StaleImage)
        assert client.write_failure is not None
        assert await ended(read(client)) is None
        assert writes_of(processes[1]) == []


async def test_what_waits_for_a_process_is_not_written_to_another_disk(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    """Though nothing was lost with the process before."""
    async with either(disk.serving(after=0), disk.serving()) as (client, processes):
        reader = read(client)
        await trio.testing.wait_all_tasks_blocked()
        assert processes[0].gone.is_set()
        disk.identity = LinkIdentity("/vm/a.vmdk", "12345678", 200)
        first = write(client, 1)
        assert isinstance(await ended(first), StaleImage)
        assert await ended(reader) is None
        assert writes_of(processes[1]) == []


async def test_memory_that_is_still_written_from_is_kept_when_the_mount_goes_down(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    """Writers that wait for memory would put their bytes there: they would go to its place."""

    async def slow(process: FakeProcess) -> None:
        await disk.opened_by(process)
        await packet_of(process)
        await trio.sleep_forever()

    async with either(slow) as (client, _):
        first = write(client, 1)
        await trio.testing.wait_all_tasks_blocked()
        client.refuse()
        assert isinstance(await ended(first), WorkerFailed)
        assert first.holds == 1


# What was answered and not flushed.


async def test_what_a_library_may_lose_is_written_again_first_and_in_order(
    disk: Disk, vddk: Any, autojump_clock: Any
) -> None:
    async with vddk(disk.serving(after=3), disk.serving()) as (client, processes):
        for sector, letter in ((7, b"a"), (9, b"b"), (7, b"c")):
            assert await ended(write(client, sector, letter * 512)) is None
        last = write(client, 9, b"d" * 512)
        assert await ended(last) is None
        await client.flush()
        assert writes_of(processes[1]) == [
            (Op.WRITE_AGAIN, 7),
            (Op.WRITE_AGAIN, 9),
            (Op.WRITE_AGAIN, 7),
            (Op.WRITE, 9),
        ]
        assert [data[:1] for _, data in disk.written] == [b"a", b"b", b"c", b""]
        assert client.counters.rewritten == 3


async def test_it_is_written_again_though_nobody_asks(
    disk: Disk, vddk: Any, autojump_clock: Any
) -> None:
    async with vddk(disk.serving(), disk.serving()) as (client, processes):
        assert await ended(write(client, 7)) is None
        processes[0].die()
        await trio.sleep(10)
        assert writes_of(processes[1]) == [(Op.WRITE_AGAIN, 7)]


async def test_what_was_flushed_is_not_written_again(
    disk: Disk, vddk: Any, autojump_clock: Any
) -> None:
    async with vddk(disk.serving(after=3), disk.serving()) as (client, processes):
        assert await ended(write(client, 1)) is None
        await client.flush()
        assert await ended(write(client, 2)) is None
        assert await ended(write(client, 3)) is None
        assert writes_of(processes[1]) == [(Op.WRITE_AGAIN, 2), (Op.WRITE, 3)]


async def test_a_write_that_ends_during_a_flush_is_not_flushed_by_it(
    disk: Disk, vddk: Any, autojump_clock: Any
) -> None:
    async def late(process: FakeProcess) -> None:
        await disk.opened_by(process)
        process.reply(await process.next())
        flush, second = await process.next(), await process.next()
        assert (flush[0], second[0]) == (Op.FLUSH, Op.WRITE)
        process.reply(second)
        await trio.sleep(1)
        process.reply(flush)
        await process.next()
        process.die()

    async with vddk(late, disk.serving()) as (client, processes):
        assert await ended(write(client, 1)) is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.flush)
            await trio.testing.wait_all_tasks_blocked()
            assert await ended(write(client, 2)) is None
        assert await ended(write(client, 3)) is None
        assert writes_of(processes[1]) == [(Op.WRITE_AGAIN, 2), (Op.WRITE, 3)]


async def test_the_kernel_has_what_the_built_in_engine_wrote(
    disk: Disk, vmdk: Any, autojump_clock: Any
) -> None:
    async with vmdk(disk.serving(after=1), disk.serving()) as (client, processes):
        assert await ended(write(client, 1)) is None
        await client.flush()
        assert [got[0] for got in processes[1].got] == [Op.OPEN, Op.FLUSH], "the next flushes it"


async def test_what_cannot_be_written_again_fails_every_flush(
    disk: Disk, vddk: Any, autojump_clock: Any
) -> None:
    async def full(process: FakeProcess) -> None:
        await disk.opened_by(process)
        while True:
            request = await process.next()
            if request[0] == Op.WRITE_AGAIN:
                fail(process, request, EngineError("full", errno=errno.ENOSPC))
            else:
                process.reply(request)

    async with vddk(disk.serving(after=1), full) as (client, processes):
        assert await ended(write(client, 1)) is None
        second = write(client, 2)
        assert isinstance(await ended(second), EngineError)
        for _ in range(2):
            with pytest.raises(EngineError, match=r"cannot be written again \(full\)"):
                await client.flush()
        assert await ended(read(client)) is None
        assert len(processes) == 2


async def test_a_flush_that_fails_ends_the_writes(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    async def lost(process: FakeProcess) -> None:
        await disk.opened_by(process)
        process.reply(await process.next())
        request = await process.next()
        assert request[0] == Op.FLUSH
        fail(process, request, EngineError("the disk failed"))
        while True:
            process.reply(await process.next())

    async with either(lost) as (client, _):
        assert await ended(write(client, 1)) is None
        for _ in range(2):
            with pytest.raises(EngineError, match="the disk failed"):
                await client.flush()
        assert await ended(write(client, 2)) is client.write_failure
        assert await ended(read(client)) is None


async def test_a_flush_that_lost_its_process_is_asked_of_the_next(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    async with either(disk.serving(after=1), disk.serving()) as (client, processes):
        assert await ended(write(client, 1)) is None
        await client.flush()
        again = [(Op.WRITE_AGAIN, 1)] if client.config == VDDK else []
        assert writes_of(processes[1]) == again
        assert processes[1].got[-1][0] == Op.FLUSH


async def test_much_is_flushed_unasked_and_more_waits(
    disk: Disk, vddk: Any, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unflushed, "MUCH", 1024)
    flushes: list[Any] = []

    async def slow(process: FakeProcess) -> None:
        await disk.opened_by(process)
        while True:
            request = await process.next()
            if request[0] == Op.FLUSH:
                flushes.append(request)
            else:
                process.reply(request)

    async with vddk(slow) as (client, processes):
        for sector in range(5):
            assert len(flushes) == (sector >= 3)
            assert await ended(write(client, sector)) is None
            await trio.testing.wait_all_tasks_blocked()
        late = [write(client, sector) for sector in range(10, 13)]
        reader = read(client)
        assert await ended(reader) is None
        await trio.sleep(20)
        assert not any(outcome.event.is_set() for outcome in late)
        processes[0].reply(flushes[0])
        for outcome in late:
            assert await ended(outcome) is None
        await trio.testing.wait_all_tasks_blocked()
        assert len(flushes) == 2


async def test_what_cannot_be_flushed_before_a_reopening_is_told_after_it(
    disk: Disk, vmdk: Any, autojump_clock: Any
) -> None:
    """The engine that is closed may be the only one that is told of a failure by the kernel."""

    async def lost(process: FakeProcess) -> None:
        await disk.opened_by(process)
        process.reply(await process.next())
        request = await process.next()
        while request[0] == Op.FLUSH:
            fail(process, request, EngineError("the disk failed"))
            request = await process.next()
        assert request[0] == Op.OPEN
        process.reply(request, 0, protocol.encode((IDENTITY,)))
        while True:
            process.reply(await process.next())

    async with vmdk(lost) as (client, _):
        assert await ended(write(client, 1)) is None
        assert await client.reopen() == (IDENTITY,)
        with pytest.raises(EngineError, match="the disk failed"):
            await client.flush()


# Ends.


async def test_an_idle_process_is_flushed_and_goes_on(
    disk: Disk, either: Any, autojump_clock: Any
) -> None:
    async with either(disk.serving(), patience=Patience(idle_timeout=50)) as (client, processes):
        assert await ended(write(client, 1)) is None
        await trio.sleep(60)
        assert disk.flushes == 1
        await trio.sleep(100)
        assert disk.flushes == 1
        assert client.state == "serving", "it has the lock"
        assert len(processes) == 1


async def test_going_down_fails_what_is_under_way(disk: Disk, either: Any) -> None:
    async with either(test_client.open_and_ignore) as (client, processes):
        outcome = write(client, 1)
        await trio.testing.wait_all_tasks_blocked()
        client.stop()
        client.refuse()
        assert isinstance(await ended(outcome), WorkerFailed)
        assert isinstance(await ended(write(client, 2)), WorkerFailed)
    assert processes[0].ended is False


async def test_processes_of_one_mount_are_given_one_content_id(
    disk: Disk, vmdk: Any, autojump_clock: Any
) -> None:
    ids: list[str] = []

    async def dies(process: FakeProcess) -> None:
        packet, _ = await packet_of(process)
        ids.append(decode(packet).content_id)
        process.reply(protocol.REQUEST.unpack_from(packet), 0, protocol.encode((IDENTITY,)))
        await process.next()
        if len(ids) < 3:
            process.die()
        else:
            process.reply(process.got[-1])
            await trio.sleep_forever()

    async with vmdk(dies) as (client, _):
        assert await ended(write(client, 1)) is None
    assert len(ids) == 3
    assert len(set(ids)) == 1
    assert len(bytes.fromhex(ids[0])) == 4
