"""The supervisor against scripted worker processes: however one is lost, no request is."""

import errno
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from vddkfs.engines import protocol
from vddkfs.engines.base import LinkIdentity, MapExtent, MapSlice, Renewal, Step
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.config import VmdkConfig
from vddkfs.engines.pending import MAX_IN_FLIGHT
from vddkfs.engines.protocol import MapQuery, Op
from vddkfs.engines.requests import Moved, Patience, ReadRequest
from vddkfs.errors import EngineError, StaleImage, VddkfsError, WorkerFailed

IDENTITY = LinkIdentity("/vm/a.vmdk", "12345678", 100)
CONFIG = VmdkConfig(links=(b"/vm/a.vmdk",))
Script = Callable[["FakeProcess"], Awaitable[None]]


class Slot:
    chunk_number = 0
    offset = 0


class FakeProcess:
    """A worker process that follows a script, in a task of the test."""

    pids = iter(range(1000, 100000))

    def __init__(self, name: str, nursery: trio.Nursery, script: Script) -> None:
        self.sock, self.theirs = protocol.pair()
        self.theirs.setblocking(False)
        self.pid = next(self.pids)
        self.got: list[tuple[Any, ...]] = []
        self.ended: bool | None = None
        self.killable = True
        self.gone = trio.Event()
        nursery.start_soon(script, self)

    async def forward_output(self) -> None:
        await trio.sleep_forever()

    async def end(self, kill: bool) -> bool:
        self.ended = kill
        self.sock.close()
        if self.killable:
            self.die()
        return self.killable

    def ending(self) -> str:
        return ""

    async def reap(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            await self.gone.wait()
        return self.gone.is_set()

    def die(self) -> None:
        trio.lowlevel.notify_closing(self.theirs)
        self.theirs.close()
        self.gone.set()

    async def next(self) -> tuple[Any, ...]:
        """Return the next request: op, flags, image, count, id, sector, chunk, offset."""
        try:
            await trio.lowlevel.wait_readable(self.theirs)
            packet, fd = protocol.receive(self.theirs)
        except (trio.ClosedResourceError, ConnectionResetError):
            packet = b""
        if not packet:
            await trio.sleep_forever()
        if fd >= 0:
            os.close(fd)
        request = protocol.REQUEST.unpack_from(packet)
        self.got.append(request)
        return request

    def reply(self, request: tuple[Any, ...], status: int = 0, body: bytes = b"") -> None:
        protocol.send(self.theirs, protocol.reply_header(request[0], status, request[4]), body)

    async def open(self) -> None:
        request = await self.next()
        assert request[0] == Op.OPEN
        self.reply(request, 0, protocol.encode((IDENTITY,)))


class Outcome:
    """What became of one read."""

    def __init__(self) -> None:
        self.errors: list[VddkfsError | None] = []
        self.event = trio.Event()
        self.moves = 0
        self.freed = 0

    def done(self, error: VddkfsError | None) -> None:
        self.errors.append(error)
        self.event.set()

    def moved(self) -> Moved | None:
        self.moves += 1
        return Slot(), self.free

    def free(self) -> None:
        self.freed += 1

    def request(self, sector: int = 0) -> ReadRequest:
        return ReadRequest(0, sector, 8, Slot(), self.done, self.moved)


@asynccontextmanager
async def serving(
    *scripts: Script, patience: Patience | None = None, **more: Any
) -> AsyncIterator[tuple[WorkerClient, list[FakeProcess]]]:
    processes: list[FakeProcess] = []
    remaining = list(scripts)
    async with trio.open_nursery() as nursery:

        def start(name: str) -> FakeProcess:
            script = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            processes.append(FakeProcess(name, nursery, script))
            return processes[-1]

        opened = more.get("opened", lambda identities: None)
        client = WorkerClient("disk", CONFIG, patience or Patience(), opened, start)
        nursery.start_soon(client.run)
        yield client, processes
        nursery.cancel_scope.cancel()


async def answer_all(process: FakeProcess) -> None:
    await process.open()
    while True:
        request = await process.next()
        if request[0] in (Op.READ, Op.LEND, Op.TAKE_BACK):
            process.reply(request)


async def open_and_ignore(process: FakeProcess) -> None:
    await process.open()
    while True:
        await process.next()


def read(client: WorkerClient, sector: int = 0) -> Outcome:
    outcome = Outcome()
    client.submit_read(outcome.request(sector))
    return outcome


async def test_starts_on_demand_and_answers() -> None:
    async with serving(answer_all) as (client, processes):
        await trio.testing.wait_all_tasks_blocked()
        assert processes == []
        assert client.state == "not running"
        outcome = read(client)
        await outcome.event.wait()
        assert outcome.errors == [None]
        assert client.state == "serving"
        assert client.counters.restarts == 0


async def test_reads_are_timed_from_being_sent_to_each_answer(autojump_clock: Any) -> None:
    async def takes_its_time(process: FakeProcess) -> None:
        await process.open()
        for status, seconds in ((0, 2.0), (errno.EIO, 0.5)):
            request = await process.next()
            await trio.sleep(seconds)
            process.reply(request, status)
        process.reply(await process.next(), 0, protocol.encode(MapSlice((), 8)))
        await trio.sleep_forever()

    async with serving(takes_its_time) as (client, _):
        for _ in range(2):
            await read(client).event.wait()
        await client.map(0, 0, MapQuery(count=8))
        assert client.counters.reads.count == 2, "and nothing else"
        assert client.counters.reads.seconds == pytest.approx(2.5, abs=0.1)


async def test_reads_of_a_dead_process_are_sent_again(autojump_clock: Any) -> None:
    async def dies_on_read(process: FakeProcess) -> None:
        await process.open()
        await process.next()
        process.die()

    async with serving(dies_on_read, dies_on_read, answer_all) as (client, processes):
        outcome = read(client)
        await outcome.event.wait()
        assert outcome.errors == [None]
        assert len(processes) == 3
        assert client.counters.restarts == 2
        assert client.counters.resent == 2
        assert outcome.moves == 0, "the process was reaped, so the slot is safe"


async def test_a_missed_deadline_kills_and_sends_again(autojump_clock: Any) -> None:
    async with serving(open_and_ignore, answer_all) as (client, processes):
        start = trio.current_time()
        outcome = read(client)
        await outcome.event.wait()
        assert outcome.errors == [None]
        assert processes[0].ended is True
        assert 60 <= trio.current_time() - start < 62


async def test_a_process_that_cannot_be_reaped_keeps_its_slots(autojump_clock: Any) -> None:
    async def unkillable(process: FakeProcess) -> None:
        process.killable = False
        await open_and_ignore(process)

    async with serving(unkillable, answer_all) as (client, processes):
        outcome = read(client)
        await outcome.event.wait()
        assert outcome.errors == [None]
        assert outcome.moves == 1
        assert outcome.freed == 0, "the old slot may still be written to"
        processes[0].die()
        await trio.testing.wait_all_tasks_blocked()
        assert outcome.freed == 1


async def test_an_error_of_the_engine_is_told_and_not_retried(autojump_clock: Any) -> None:
    async def fails(process: FakeProcess) -> None:
        await process.open()
        request = await process.next()
        error = EngineError("torn grain", link="/vm/a.vmdk", sector=7)
        process.reply(request, error.errno, protocol.encode_error(error))
        await trio.sleep_forever()

    async with serving(fails) as (client, processes):
        outcome = read(client)
        await outcome.event.wait()
        [error] = outcome.errors
        assert isinstance(error, EngineError)
        assert (error.link, error.sector, error.errno) == ("/vm/a.vmdk", 7, errno.EIO)
        assert len(processes) == 1
        assert client.counters.errors == 1


async def test_a_refused_open_fails_what_waits_and_is_no_restart(autojump_clock: Any) -> None:
    async def refuses(process: FakeProcess) -> None:
        request = await process.next()
        error = VddkfsError("gone", errno=errno.ENOENT)
        process.reply(request, error.errno, protocol.encode_error(error))
        await trio.sleep_forever()

    async with serving(refuses, answer_all) as (client, _):
        outcome = read(client)
        await outcome.event.wait()
        [error] = outcome.errors
        assert error is not None
        assert error.errno == errno.ENOENT
        assert client.counters.restarts == 0
        again = read(client)
        await again.event.wait()
        assert again.errors == [None]


async def test_a_changed_source_fails_what_waits(autojump_clock: Any) -> None:
    answers = [StaleImage("changed"), None]

    def opened(identities: tuple[LinkIdentity, ...]) -> None:
        assert identities == (IDENTITY,)
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    async with serving(answer_all, opened=opened) as (client, _):
        first = read(client)
        await first.event.wait()
        assert isinstance(first.errors[0], StaleImage)
        second = read(client)
        await second.event.wait()
        assert second.errors == [None]


async def test_gives_up_when_the_budget_is_spent(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def dies_at_once(process: FakeProcess) -> None:
        process.die()

    async with serving(dies_at_once, patience=Patience(retry_budget=20)) as (client, processes):
        start = trio.current_time()
        outcome = read(client)
        await outcome.event.wait()
        [error] = outcome.errors
        assert isinstance(error, WorkerFailed)
        assert error.errno == errno.EIO
        assert 20 <= trio.current_time() - start < 30
        assert 5 < len(processes) < 30, "it tries again, and less and less often"
    assert "no answer within 20 s" in caplog.text


async def test_a_hung_open_ends_at_its_deadline(autojump_clock: Any) -> None:
    async def hangs(process: FakeProcess) -> None:
        await process.next()

    async with serving(hangs, answer_all, patience=Patience(open_timeout=30)) as (client, _):
        outcome = read(client)
        await outcome.event.wait()
        assert outcome.errors == [None]
        assert 30 <= trio.current_time() < 40


async def test_an_idle_process_ends_in_good_order_and_comes_back(autojump_clock: Any) -> None:
    async with serving(answer_all, patience=Patience(idle_timeout=50)) as (client, processes):
        await read(client).event.wait()
        await trio.sleep(49)
        assert client.state == "serving"
        await trio.sleep(3)
        assert client.state == "not running"
        assert processes[0].ended is False
        await read(client).event.wait()
        assert len(processes) == 2
        assert client.counters.restarts == 0


async def test_no_more_than_the_limit_is_sent_and_the_rest_follows(autojump_clock: Any) -> None:
    release = trio.Event()

    async def waits(process: FakeProcess) -> None:
        await process.open()
        first = [await process.next() for _ in range(MAX_IN_FLIGHT)]
        with trio.move_on_after(1):
            await process.next()
            raise AssertionError("more was sent than the limit")
        await release.wait()
        for request in first:
            process.reply(request)
        while True:
            process.reply(await process.next())

    async with serving(waits) as (client, processes):
        outcomes = [read(client, sector) for sector in range(300)]
        await trio.sleep(5)
        assert client.in_flight == MAX_IN_FLIGHT
        assert client.queued == 300 - MAX_IN_FLIGHT
        release.set()
        for outcome in outcomes:
            await outcome.event.wait()
        assert all(outcome.errors == [None] for outcome in outcomes)
        sectors = [request[5] for request in processes[0].got if request[0] == Op.READ]
        assert sectors == list(range(300)), "in the order in which they were asked"


async def test_chunks_are_lent_again_after_a_restart(autojump_clock: Any) -> None:
    lent: list[list[int]] = []

    async def dies_later(process: FakeProcess) -> None:
        await process.open()
        lent.append([])
        while True:
            request = await process.next()
            if request[0] == Op.LEND:
                lent[-1].append(request[6])
            elif len(lent) == 1:
                process.die()
                return
            else:
                process.reply(request)

    fd = protocol.memfd_with(b"x" * 4096)
    async with serving(dies_later) as (client, _):
        for number in (3, 5):
            client.lend(number, fd, 4096)
        await read(client).event.wait()
    assert [sorted(numbers) for numbers in lent] == [[3, 5], [3, 5]]
    os.close(fd)


async def test_calls_return_bodies_of_any_length(autojump_clock: Any) -> None:
    extents = tuple(MapExtent(n * 1000, 500, n % 2 == 0) for n in range(20000))
    answer = MapSlice(extents, 20_000_000)

    async def maps(process: FakeProcess) -> None:
        await process.open()
        request = await process.next()
        assert request[0] == Op.MAP
        process.reply(request, 0, protocol.encode(answer))
        await trio.sleep_forever()

    async with serving(maps) as (client, _):
        assert await client.map(0, 0, MapQuery(count=20_000_000)) == answer


async def test_a_renewal_that_was_lost_is_asked_of_the_next_process(autojump_clock: Any) -> None:
    renewal = Renewal((IDENTITY,), (Step("tables", "/vm/a.vmdk", "dropped", 0.25),))

    async def dies_of_it(process: FakeProcess) -> None:
        await process.open()
        assert (await process.next())[0] == Op.RENEW
        process.die()

    async def renews(process: FakeProcess) -> None:
        await process.open()
        process.reply(await process.next(), 0, protocol.encode(renewal))
        await trio.sleep_forever()

    async with serving(dies_of_it, renews) as (client, processes):
        assert await client.renew() == renewal
        assert len(processes) == 2
        assert processes[1].got[-1][0] == Op.RENEW


async def test_an_abandoned_call_does_no_harm(autojump_clock: Any) -> None:
    async with serving(open_and_ignore) as (client, _):
        with trio.move_on_after(1):
            await client.revalidate()
        assert client.in_flight == 1


async def test_taking_a_chunk_back_from_a_hung_worker_gives_up(autojump_clock: Any) -> None:
    fd = protocol.memfd_with(b"x" * 4096)
    async with serving(open_and_ignore) as (client, processes):
        client.lend(1, fd, 4096)
        read(client)
        await trio.testing.wait_all_tasks_blocked()
        assert not await client.take_back(1)
        await trio.testing.wait_all_tasks_blocked()
        ops = [request[0] for request in processes[0].got]
        assert ops[-2:] == [Op.TAKE_BACK, Op.LEND], "the loan goes on"
    os.close(fd)


async def test_everything_is_answered_when_the_mount_goes_down() -> None:
    outcomes = []
    async with serving(open_and_ignore) as (client, processes):
        outcomes = [read(client) for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        client.stop()
    assert all(isinstance(outcome.errors[0], WorkerFailed) for outcome in outcomes)
    assert processes[0].ended is False, "a healthy worker is asked to end"
    assert math.isfinite(client.oldest_age())
