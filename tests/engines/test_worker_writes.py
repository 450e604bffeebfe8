"""The worker's loop and writes, on an engine that the test scripts."""

import errno
import mmap
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.test_worker import Daemon, FakeEngine
from vddkfs.engines import protocol
from vddkfs.engines.base import SECTOR
from vddkfs.engines.config import EngineConfig, VmdkConfig
from vddkfs.engines.pool import PooledEngine
from vddkfs.engines.protocol import Op
from vddkfs.errors import EngineError, VddkfsError

WRITABLE = VmdkConfig(links=(b"/vm/a.vmdk",), writable=True)
SECONDS = 10.0


class WritingEngine(FakeEngine):
    """Writes from sector 100 on, and flushes, wait for *release*."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.written: list[tuple[int, bytes]] = []
        self.flushes = 0

    def write(self, sector: int, data: memoryview) -> None:
        self.reading += 1
        if sector >= 100:
            assert self.release.wait(SECONDS)
        self.reading -= 1
        if sector in self.errors:
            raise self.errors[sector]
        assert threading.current_thread() is not self.main
        self.written.append((sector, bytes(data)))

    def flush(self) -> None:
        assert self.release.wait(SECONDS)
        assert not self.closed.is_set()
        if -1 in self.errors:
            raise self.errors[-1]
        self.flushes += 1


class WritingDaemon(Daemon):
    config = WRITABLE

    def _make(self, config: EngineConfig, secret: int) -> Any:
        engine = WritingEngine(config)
        engine.main = self.thread
        self.engines.append(engine)
        return PooledEngine(engine)

    def open(self) -> WritingEngine:
        self.call(Op.OPEN, protocol.encode(self.config))
        engine = self.engines[-1]
        assert isinstance(engine, WritingEngine)
        return engine


@pytest.fixture
def daemon() -> Iterator[WritingDaemon]:
    end = WritingDaemon()
    yield end
    for engine in end.engines:
        engine.release.set()
    end.sock.close()
    end.join()


@pytest.fixture
def started(daemon: WritingDaemon) -> tuple[WritingDaemon, WritingEngine, mmap.mmap]:
    return daemon, daemon.open(), daemon.lend()


Started = tuple[WritingDaemon, WritingEngine, mmap.mmap]


def test_a_write_takes_its_bytes_from_the_chunk(started: Started) -> None:
    daemon, engine, area = started
    area[4096:5120] = b"x" * 1024
    assert daemon.call(Op.WRITE, sector=7, count=2, offset=4096) == b""
    assert engine.written == [(7, b"x" * 1024)]


def test_writes_and_flushes_leave_the_main_thread_free(started: Started) -> None:
    daemon, engine, _ = started
    waiting = [daemon.ask(Op.WRITE, sector=100 + n, count=1, offset=n * 512) for n in range(3)]
    waiting.append(daemon.ask(Op.FLUSH))
    quick = daemon.ask(Op.READ, sector=50, count=1, offset=30000)
    assert daemon.answer()[:2] == (quick, 0), "it overtakes those that wait"
    engine.release.set()
    assert sorted(daemon.answer() for _ in waiting) == [(number, 0, b"") for number in waiting]
    assert engine.flushes == 1


@pytest.mark.parametrize("size", [SECTOR, 2 << 20])
def test_what_may_be_lost_is_written_again(size: int, started: Started) -> None:
    daemon, engine, _ = started
    daemon.call(Op.WRITE_AGAIN, b"y" * size, sector=9)
    assert engine.written == [(9, b"y" * size)]


@pytest.mark.parametrize("op", [Op.WRITE, Op.FLUSH, Op.WRITE_AGAIN])
def test_an_error_is_told(op: Op, started: Started) -> None:
    daemon, engine, _ = started
    engine.release.set()
    error = EngineError("full", errno=errno.ENOSPC, link="/vm/a.vmdk", sector=3)
    engine.errors = {3: error, -1: error}
    with pytest.raises(EngineError, match="full") as caught:
        daemon.call(op, b"z" * 512 if op == Op.WRITE_AGAIN else b"", sector=3, count=1)
    assert (caught.value.errno, caught.value.link) == (errno.ENOSPC, "/vm/a.vmdk")
    daemon.call(Op.WRITE, sector=4, count=1)


@pytest.mark.parametrize(("chunk", "offset", "count"), [(9, 0, 1), (0, 65536, 1), (0, 0, 0)])
def test_bytes_that_are_not_lent_are_not_written(
    chunk: int, offset: int, count: int, started: Started
) -> None:
    daemon, engine, _ = started
    with pytest.raises(EngineError, match="no part of chunk"):
        daemon.call(Op.WRITE, chunk=chunk, offset=offset, count=count)
    assert engine.written == []


@pytest.mark.parametrize("op", [Op.WRITE, Op.FLUSH, Op.WRITE_AGAIN])
def test_nothing_is_written_that_was_opened_for_reading(op: Op, daemon: WritingDaemon) -> None:
    with pytest.raises(EngineError, match="no chain is open"):
        daemon.call(op, count=1)
    daemon.config = VmdkConfig(links=(b"/vm/a.vmdk",))
    engine = daemon.open()
    daemon.lend()
    with pytest.raises(VddkfsError, match="for reading alone") as caught:
        daemon.call(op, count=1)
    assert caught.value.errno == errno.EROFS
    assert engine.written == []
    assert not engine.flushes


@pytest.mark.parametrize(
    ("what", "op"),
    [
        (Op.WRITE, Op.REVALIDATE),
        (Op.WRITE, Op.RENEW),
        (Op.WRITE, Op.TAKE_BACK),
        (Op.WRITE, Op.OPEN),
        (Op.FLUSH, Op.OPEN),
    ],
)
def test_what_opens_or_closes_waits_for_what_is_under_way(
    what: Op, op: Op, started: Started
) -> None:
    daemon, engine, area = started
    area[:512] = b"x" * 512
    first = daemon.ask(what, sector=100, count=1)
    look = daemon.ask(op, protocol.encode(WRITABLE) if op == Op.OPEN else b"")
    assert daemon.silent()
    assert not engine.closed.is_set()
    engine.release.set()
    assert [daemon.answer()[:2] for _ in range(2)] == [(first, 0), (look, 0)]
    assert engine.written == ([(100, b"x" * 512)] if what == Op.WRITE else [])


@pytest.mark.parametrize("op", [Op.REVALIDATE, Op.RENEW, Op.TAKE_BACK])
def test_a_long_flush_stops_nobody(op: Op, started: Started) -> None:
    daemon, engine, _ = started
    flush = daemon.ask(Op.FLUSH)
    daemon.call(op)
    daemon.lend()
    daemon.call(Op.READ, sector=50, count=1)
    daemon.ask(Op.STOP)
    assert daemon.silent()
    assert not engine.closed.is_set()
    engine.release.set()
    assert daemon.answer()[:2] == (flush, 0)
    daemon.join()
    assert engine.closed.is_set()


def test_what_is_lost_at_the_end_is_told(
    started: Started, capfd: pytest.CaptureFixture[str]
) -> None:
    daemon, engine, _ = started

    def lost() -> None:
        raise EngineError("the last flush failed")

    engine.close = lost  # type: ignore[method-assign]
    daemon.ask(Op.STOP)
    daemon.join()
    assert daemon.raised is None
    assert "at the end: the last flush failed" in capfd.readouterr().err
