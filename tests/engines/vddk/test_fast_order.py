"""Reads without Python, and what else happens to a worker: closing, taking back, signals, ends."""

import contextlib
import signal
import time

import pytest

from tests.engines.vddk.chunked import WITHOUT, Contents, Reader, in_c, opened, read_calls
from tests.engines.vddk.workers import PLAIN, SECONDS, Died, Workers
from tests.simulator.disks import SECTORS
from tests.simulator.kit import Kit, until
from vddkfs.engines.base import SECTOR
from vddkfs.engines.protocol import Op
from vddkfs.errors import EngineError

pytest.importorskip("vddkfs.engines.vddk._reads", reason="the C module is not built")

SLOW = ("net.latency_us = 300000", "net.jitter = 0")


@pytest.mark.parametrize("ask", [Op.REVALIDATE, Op.RENEW, Op.TAKE_BACK, Op.STOP])
def test_reads_under_way_are_answered_first(
    ask: Op, kit: Kit, workers: Workers, contents: Contents
) -> None:
    kit.configure(*SLOW)
    worker = workers()
    reader = opened(worker, kit)
    reads = [reader.ask(place, 1, place) for place in range(8)]
    worker.ask(ask)
    assert {worker.answered() for _ in reads} == set(reads)
    if ask is Op.STOP:
        assert worker.process.wait(SECONDS) == 0
    else:
        assert worker.answered() == worker.last_id
        assert in_c(worker) == 8
    for place in range(8):
        start = place * reader.region
        expected = contents(PLAIN.path)[place * SECTOR : (place + 1) * SECTOR]
        assert reader.area[start : start + SECTOR] == expected


def test_a_chunk_that_was_taken_back_is_not_written(
    kit: Kit, workers: Workers, contents: Contents
) -> None:
    worker = workers()
    reader = opened(worker, kit)
    maps = f"/proc/{worker.process.pid}/maps"
    reader.read(0, 8)
    worker.call(Op.TAKE_BACK, chunk=0)
    with open(maps) as file:
        assert "chunk-0" not in file.read()
    with pytest.raises(EngineError, match="no part of chunk 0"):
        reader.read(8, 8)
    again = Reader(worker)
    assert again.read(16, 8) == contents(PLAIN.path)[16 * SECTOR : 24 * SECTOR]
    assert reader.area[: 8 * SECTOR] == contents(PLAIN.path)[: 8 * SECTOR]
    # Their numbers would have one place in C's table.
    other = Reader(worker, 1024)
    assert other.read(24, 8) == contents(PLAIN.path)[24 * SECTOR : 32 * SECTOR]
    assert again.area[: 8 * SECTOR] == contents(PLAIN.path)[16 * SECTOR : 24 * SECTOR]
    worker.call(Op.TAKE_BACK, chunk=1024)
    assert again.read(32, 8) == contents(PLAIN.path)[32 * SECTOR : 40 * SECTOR]
    assert in_c(worker) == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"chunk": 7},
        {"chunk": 1024},
        {"offset": 32 * 512 * SECTOR},
        {"offset": 32 * 512 * SECTOR - 7 * SECTOR},
        {"offset": 2**32 - SECTOR},
        {"count": 32 * 512 + 1},
        {"count": 2**32 - 1},
        {"count": 0},
        {"image": 1},
        {"image": 65535},
        {"sector": SECTORS - 7},
        {"sector": 2**63},
    ],
    ids=str,
)
@pytest.mark.parametrize("patch", ["", WITHOUT])
def test_what_is_not_there_is_refused(
    patch: str, fields: dict[str, int], kit: Kit, workers: Workers, contents: Contents
) -> None:
    worker = workers(patch)
    reader = opened(worker, kit)
    reader.read(0, 8)
    before = bytes(reader.area)
    worker.ask(Op.READ, **({"count": 8} | fields))
    with pytest.raises(EngineError):
        worker.answer()
    assert reader.area[:] == before
    assert reader.read(9, 8) == contents(PLAIN.path)[9 * SECTOR : 17 * SECTOR]


@pytest.mark.parametrize("patch", ["", WITHOUT])
def test_idle_disks_are_closed_and_opened_again(
    patch: str, kit: Kit, workers: Workers, contents: Contents
) -> None:
    worker = workers(patch)
    reader = opened(worker, kit, idle_close=0.4, keepalive=0.0)
    for times in range(1, 4):
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            assert reader.read(40, 8) == contents(PLAIN.path)[40 * SECTOR : 48 * SECTOR]
            time.sleep(0.05)
        assert len(kit.events("client-close")) == times - 1, "reads keep it open"
        until(lambda n=times: len(kit.events("client-close")) == n, what="the idle disk's close")
    assert bool(in_c(worker)) == (patch == "")


def test_it_is_kept_alive_when_nobody_reads(kit: Kit, workers: Workers) -> None:
    worker = workers()
    reader = opened(worker, kit, keepalive=0.2)
    for _ in range(20):
        reader.read(0, 8)
        time.sleep(0.03)
    assert read_calls(worker).count == in_c(worker) == 20, "reads are enough"
    until(lambda: read_calls(worker).count > 22, what="a sign of life")
    assert in_c(worker) == 20


def test_calls_that_are_traced_are_pythons(kit: Kit, workers: Workers) -> None:
    worker = workers()
    opened(worker, kit, debug=True).read(0, 8)
    assert in_c(worker) == 0
    assert worker.says("VixDiskLib_ReadAsync: 0", "4096 bytes")


def test_signals_are_handled_while_it_waits_and_while_it_reads(kit: Kit, workers: Workers) -> None:
    handler = (
        "import os, signal\nsignal.signal(signal.SIGUSR1, lambda *_: os.write(2, b'heard\\n'))"
    )
    worker = workers(handler)
    reader = opened(worker, kit)
    for times in range(1, 4):
        reader.read(0, 8)
        worker.process.send_signal(signal.SIGUSR1)
        until(lambda n=times: worker.text.count("heard") == n, what="the handler")
    worker.process.send_signal(signal.SIGUSR1)
    while worker.text.count("heard") < 4:
        reader.read(0, 8)
    assert in_c(worker) >= 3


@pytest.mark.parametrize("how", ["kill", "crash"])
def test_it_dies_in_the_middle(how: str, kit: Kit, workers: Workers) -> None:
    fault = ["fault = ReadAsync after=4 segv"] if how == "crash" else []
    kit.configure(*SLOW, *fault)
    worker = workers()
    reader = opened(worker, kit)
    # It may die before it was asked for all of them.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for place in range(8):
            reader.ask(place, 1, place)
    if how == "kill":
        worker.process.kill()
    with pytest.raises(Died):
        list(iter(worker.answer, None))
    assert worker.process.wait(SECONDS) < 0
    after = workers()
    opened(after, kit)
