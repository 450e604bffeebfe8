"""The supervisor's patience: what is waited for without end, and what is asked for rarely."""

from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio

from tests.engines import test_client
from tests.engines.test_client import FakeProcess, Outcome, Script, answer_all, read
from vddkfs.engines import protocol
from vddkfs.engines.base import Renewal
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.config import VddkConfig
from vddkfs.engines.protocol import MapQuery, Op
from vddkfs.engines.requests import Patience
from vddkfs.errors import EngineError, Retry, WorkerFailed

CONFIG = VddkConfig(images=(), tmp_directory="/nonexistent")

Serving = AbstractAsyncContextManager[tuple[WorkerClient, list[FakeProcess]]]


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what serves with scripted processes of the VDDK engine."""
    monkeypatch.setattr(test_client, "CONFIG", CONFIG)
    return test_client.serving


def failing(retry: Retry) -> Script:
    """Return the script of a process that cannot open the disk."""

    async def script(process: FakeProcess) -> None:
        request = await process.next()
        fail(process, request, retry)
        await trio.sleep_forever()

    return script


def fail(process: FakeProcess, request: tuple[Any, ...], retry: Retry) -> None:
    error = EngineError("it failed", retry=retry)
    process.reply(request, error.errno, protocol.encode_error(error))


async def ended(outcome: Outcome, seconds: float = 1000) -> list[Any]:
    with trio.fail_after(seconds):
        await outcome.event.wait()
    return outcome.errors


async def test_a_session_is_waited_for_without_end(serving: Any, autojump_clock: Any) -> None:
    scripts = [failing("busy")] * 20 + [answer_all]
    async with serving(*scripts, patience=Patience(retry_budget=1)) as (client, processes):
        outcome = read(client)
        assert await ended(outcome) == [None]
        assert len(processes) == 21
        assert client.counters.restarts == 0


async def test_but_not_for_the_server_behind_it(serving: Any, autojump_clock: Any) -> None:
    patience = Patience(retry_budget=20)
    async with serving(failing("busy"), failing("reconnect"), patience=patience) as (client, _):
        start = trio.current_time()
        [error] = await ended(read(client))
        assert isinstance(error, WorkerFailed)
        assert 20 <= trio.current_time() - start < 40


async def test_a_read_that_finds_no_session_waits_as_well(
    serving: Any, autojump_clock: Any
) -> None:
    """The disk was closed for idleness, and others have all sessions now."""

    async def reopens(process: FakeProcess) -> None:
        await process.open()
        fail(process, await process.next(), "busy")
        await trio.sleep_forever()

    scripts = [reopens, *[failing("busy")] * 20, answer_all]
    async with serving(*scripts, patience=Patience(retry_budget=1)) as (client, processes):
        assert await ended(read(client)) == [None]
        assert client.counters.restarts == 0
        assert processes[0].ended is False, "in good order"


async def test_logins_that_are_refused_become_rare(serving: Any, autojump_clock: Any) -> None:
    async with serving(failing("")) as (client, processes):
        start = trio.current_time()
        while trio.current_time() - start < 60:
            assert len(await ended(read(client))) == 1
            await trio.sleep(0.1)
        assert len(processes) < 20
        assert client.counters.restarts == 0


@pytest.mark.parametrize("how", ["error", "crash"])
async def test_one_bad_place_does_not_have_workers_replaced_at_full_speed(
    how: str, serving: Any, autojump_clock: Any
) -> None:
    async def bad_at_7(process: FakeProcess) -> None:
        await process.open()
        deadline = float("inf")
        while True:
            with trio.move_on_at(deadline) as lived:
                request = await process.next()
            if lived.cancelled_caught:
                process.die()
                return
            if request[0] != Op.READ or request[5] != 7:
                process.reply(request)
            elif how == "error":
                fail(process, request, "reconnect")
            else:
                deadline = trio.current_time() + 0.3

    async with serving(bad_at_7, patience=Patience(retry_budget=100)) as (client, processes):
        bad = read(client, 7)
        while not bad.event.is_set():
            assert await ended(read(client, 0)) == [None]
            await trio.sleep(0.1)
        assert isinstance(bad.errors[0], EngineError | WorkerFailed)
        assert 5 < len(processes) < 50


@pytest.mark.parametrize("how", ["error", "crash"])
async def test_a_map_that_cannot_be_had_costs_few_workers(
    how: str, serving: Any, autojump_clock: Any
) -> None:
    """All is data then; a map is not worth what it costs the readers."""

    async def without_maps(process: FakeProcess) -> None:
        await process.open()
        while True:
            request = await process.next()
            if request[0] != Op.MAP:
                process.reply(request)
            elif how == "error":
                fail(process, request, "reconnect")
            else:
                process.die()
                return

    async with serving(without_maps) as (client, processes):
        with pytest.raises(EngineError if how == "error" else WorkerFailed), trio.fail_after(50):
            await client.map(0, 0, MapQuery(count=8))
        assert 1 < len(processes) <= 4
        assert await ended(read(client)) == [None]


async def test_no_process_is_started_to_tell_of_one_that_is_lost(
    serving: Any, autojump_clock: Any
) -> None:
    async def dies_when_asked(process: FakeProcess) -> None:
        await process.open()
        process.reply(await process.next())
        assert (await process.next())[0] == Op.REPORT
        process.die()

    async with serving(dies_when_asked, answer_all) as (client, processes):
        assert await ended(read(client)) == [None]
        with pytest.raises(WorkerFailed), trio.fail_after(50):
            await client.report()
        await trio.sleep(10)
        assert len(processes) == 1


async def test_a_map_that_hangs_costs_one_worker(serving: Any, autojump_clock: Any) -> None:
    """The reads behind it have to wait until the deadline: not a second time for the same."""

    async def hangs(process: FakeProcess) -> None:
        await process.open()
        await process.next()
        await trio.sleep_forever()

    async with serving(hangs, answer_all) as (client, processes):
        with pytest.raises(WorkerFailed), trio.fail_after(70):
            await client.map(0, 0, MapQuery(count=8))
        assert len(processes) == 1
        assert await ended(read(client)) == [None]


@pytest.mark.parametrize("ask", ["revalidate", "renew"])
async def test_a_disk_that_is_opened_anew_for_an_answer_has_the_time_of_an_open(
    ask: str, serving: Any, autojump_clock: Any
) -> None:
    async def slow(process: FakeProcess) -> None:
        await process.open()
        request = await process.next()
        await trio.sleep(80)
        process.reply(request, 0, protocol.encode(Renewal((), ())) if ask == "renew" else b"\x90")
        await trio.sleep_forever()

    patience = Patience(op_timeout=10, open_timeout=90, retry_budget=20)
    async with serving(slow, patience=patience) as (client, processes):
        await getattr(client, ask)()
        assert len(processes) == 1
