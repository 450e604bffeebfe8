"""The worker's loop, in a thread of this process, on an engine that the test scripts."""

import errno
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from vddkfs.engines import protocol
from vddkfs.engines.base import SECTOR, LinkIdentity, MapExtent, MapSlice, Renewal, Step
from vddkfs.engines.config import EngineConfig, VmdkConfig
from vddkfs.engines.pool import PooledEngine
from vddkfs.engines.protocol import MapQuery, Op
from vddkfs.engines.worker import Worker
from vddkfs.errors import EngineError, SourceMissing, VddkfsError

IDENTITY = LinkIdentity("/vm/a.vmdk", "12345678", 1000)
CONFIG = VmdkConfig(links=(b"/vm/a.vmdk",))
STEPS = (
    Step("device", "/dev/sdb", "no", 0.5, done=False),
    Step("tables", "/vm/a.vmdk", "yes", 0.1),
)
RENEWAL = Renewal((IDENTITY,), STEPS)
SECONDS = 10.0


class FakeEngine:
    """Sector n is full of byte n. Reads of image 1 wait in the pool until *release* is set."""

    threads = 5

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.release = threading.Event()
        self.errors: dict[int, Exception] = {}
        self.reading = 0
        self.calls: list[Any] = []
        self.closed = threading.Event()

    def identities(self) -> Sequence[LinkIdentity]:
        return (IDENTITY,)

    def read_nowait(self, image: int, sector: int, count: int, into: Any, direct: bool) -> bool:
        if image == 1:
            return False
        self.read(image, sector, count, into, direct)
        return True

    def read(self, image: int, sector: int, count: int, into: Any, direct: bool) -> None:
        self.calls.append((image, sector, count, direct, threading.current_thread()))
        self.reading += 1
        if image == 1:
            assert self.release.wait(SECONDS)
        self.reading -= 1
        if sector in self.errors:
            raise self.errors[sector]
        for number in range(count):
            start = number * SECTOR
            into[start : start + SECTOR] = bytes([sector + number]) * SECTOR

    def map(self, image: int, sector: int, count: int, limit: int, seconds: float) -> MapSlice:
        self.calls.append((image, sector, count, limit, seconds))
        return MapSlice((MapExtent(sector, count, True),), sector + count)

    def revalidate(self) -> Sequence[LinkIdentity]:
        assert not self.reading, "no read is under way"
        return (IDENTITY,)

    def renew(self) -> Renewal:
        assert not self.reading, "no read is under way"
        return RENEWAL

    def close(self) -> None:
        assert not self.reading
        self.closed.set()


class Daemon:
    """The other end of a worker that runs in a thread."""

    def __init__(self) -> None:
        self.sock, theirs = protocol.pair()
        self.sock.setblocking(True)
        self.sock.settimeout(SECONDS)
        self.engines: list[FakeEngine] = []
        self.refusal: Exception | None = None
        self.raised: BaseException | None = None
        self._ids = iter(range(1, 10_000))
        self._theirs = theirs
        self.thread = threading.Thread(target=self._run, args=(theirs,))
        self.thread.start()

    def _run(self, theirs: Any) -> None:
        with theirs:
            try:
                Worker(theirs, self._make).run()
            except BaseException as error:
                self.raised = error

    def _make(self, config: EngineConfig, secret: int) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.engines.append(FakeEngine(config))
        return PooledEngine(self.engines[-1])

    def ask(self, op: int, body: bytes = b"", fd: int = -1, **fields: int) -> int:
        """Send a request and return its id."""
        number = next(self._ids)
        header = protocol.request_header(op, number, **fields)  # type: ignore[arg-type]
        protocol.send(self.sock, header, body, fd=fd)
        return number

    def answer(self) -> tuple[int, int, bytes]:
        """Return the id, the status and the body of the next reply."""
        packet, fd = protocol.receive(self.sock)
        assert packet, f"the worker is gone: {self.raised!r}"
        _, _, _, status, number = protocol.REPLY.unpack_from(packet)
        return number, status, protocol.body_of(packet, protocol.REPLY.size, fd)

    def call(self, op: int, body: bytes = b"", fd: int = -1, **fields: int) -> bytes:
        """Ask, and return the body of the answer. Raises what the worker told."""
        asked = self.ask(op, body, fd, **fields)
        number, status, reply = self.answer()
        assert number == asked
        if status:
            raise protocol.decode_error(reply, status)
        return reply

    def open(self) -> FakeEngine:
        self.call(Op.OPEN, protocol.encode(CONFIG))
        return self.engines[-1]

    def lend(self, number: int = 0, size: int = 65536) -> mmap.mmap:
        fd = os.memfd_create("chunk")
        os.ftruncate(fd, size)
        self.call(Op.LEND, fd=fd, chunk=number, count=size)
        area = mmap.mmap(fd, size)
        os.close(fd)
        return area

    def silent(self) -> bool:
        return not select.select([self.sock], [], [], 0.05)[0]

    def join(self) -> None:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    end = Daemon()
    yield end
    for engine in end.engines:
        engine.release.set()
    end.sock.close()
    end.join()


@pytest.fixture
def started(daemon: Daemon) -> tuple[Daemon, FakeEngine, mmap.mmap]:
    return daemon, daemon.open(), daemon.lend()


Started = tuple[Daemon, FakeEngine, mmap.mmap]


def test_a_read_without_a_wait_is_answered_by_the_main_thread(started: Started) -> None:
    daemon, engine, area = started
    daemon.call(Op.READ, sector=7, count=3, offset=4096)
    assert area[4096 : 4096 + 3 * SECTOR] == b"".join(bytes([n]) * SECTOR for n in (7, 8, 9))
    assert area[: 4096] == bytes(4096)  # fmt: skip
    assert area[4096 + 3 * SECTOR :] == bytes(65536 - 4096 - 3 * SECTOR)
    assert engine.calls == [(0, 7, 3, False, daemon.thread)]


def test_reads_that_wait_leave_the_main_thread_free(started: Started) -> None:
    daemon, engine, area = started
    waiting = [daemon.ask(Op.READ, image=1, sector=n, count=1, offset=n * 512) for n in range(20)]
    quick = daemon.ask(Op.READ, sector=50, count=1, offset=30000)
    assert daemon.answer()[:2] == (quick, 0), "it overtakes those that wait"
    while engine.reading < engine.threads:
        assert daemon.silent()
    engine.release.set()
    answers = [daemon.answer() for _ in waiting]
    assert sorted(answers) == [(number, 0, b"") for number in waiting]
    assert area[: 20 * SECTOR] == b"".join(bytes([n]) * SECTOR for n in range(20))
    threads = {call[4] for call in engine.calls if call[0] == 1}
    assert len(threads) == engine.threads
    assert daemon.thread not in threads


@pytest.mark.parametrize("image", [0, 1])
def test_direct_is_told_to_the_engine(image: int, started: Started) -> None:
    daemon, engine, _ = started
    engine.release.set()
    daemon.call(Op.READ, image=image, sector=1, count=1, flags=protocol.DIRECT)
    assert engine.calls[-1][:4] == (image, 1, 1, True)


TORN = EngineError("torn grain", link="/vm/a.vmdk", sector=3, errno=errno.EILSEQ)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (0, TORN),
        (1, TORN),
        (0, SourceMissing("gone")),
        (1, SourceMissing("gone")),
        (1, OSError(errno.ENOSPC, "odd")),
        (0, ValueError("a sector that is not there")),
        (1, ValueError("a sector that is not there")),
        (1, KeyError("a bug")),
    ],
)
def test_a_failed_read_is_told_and_the_worker_goes_on(
    image: int, error: Exception, started: Started
) -> None:
    daemon, engine, _ = started
    engine.release.set()
    engine.errors[3] = error
    with pytest.raises(VddkfsError) as caught:
        daemon.call(Op.READ, image=image, sector=3, count=1)
    assert caught.value.errno == getattr(error, "errno", errno.EIO)
    if isinstance(error, VddkfsError):
        assert type(caught.value) is type(error)
        assert str(caught.value) == str(error)
    daemon.call(Op.READ, image=image, sector=4, count=1)


@pytest.mark.parametrize("op", [Op.READ, Op.MAP, Op.REVALIDATE, Op.RENEW])
def test_nothing_is_answered_without_a_chain(op: Op, daemon: Daemon) -> None:
    with pytest.raises(EngineError, match="no chain is open"):
        daemon.call(op, protocol.encode(MapQuery(count=1)) if op == Op.MAP else b"")


def test_an_unknown_operation_is_refused(started: Started) -> None:
    with pytest.raises(EngineError, match="unknown operation 99"):
        started[0].call(99)


def test_map_and_revalidate_are_answered_with_what_the_engine_says(started: Started) -> None:
    daemon, engine, _ = started
    query = MapQuery(count=600, limit=17, seconds=0.5)
    found = protocol.decode_map(daemon.call(Op.MAP, protocol.encode(query), image=2, sector=40))
    assert found == MapSlice((MapExtent(40, 600, True),), 640)
    assert engine.calls == [(2, 40, 600, 17, 0.5)]
    assert protocol.decode_identities(daemon.call(Op.REVALIDATE)) == (IDENTITY,)
    assert protocol.decode_renewal(daemon.call(Op.RENEW)) == RENEWAL


@pytest.mark.parametrize("op", [Op.REVALIDATE, Op.RENEW])
def test_a_look_waits_for_the_reads_under_way(op: Op, started: Started) -> None:
    daemon, engine, _ = started
    reads = [daemon.ask(Op.READ, image=1, sector=n, count=1) for n in range(3)]
    look = daemon.ask(op)
    assert daemon.silent()
    engine.release.set()
    answers = [daemon.answer()[:2] for _ in range(4)]
    assert answers[3] == (look, 0)
    assert sorted(answers[:3]) == [(number, 0) for number in reads]


def test_a_chunk_that_is_lent_twice_stays_what_it_was(started: Started) -> None:
    daemon, _, area = started
    before = len(os.listdir("/proc/self/fd"))
    other = daemon.lend(0)
    daemon.call(Op.READ, sector=9, count=1)
    assert area[:SECTOR] == bytes([9]) * SECTOR
    assert other[:SECTOR] == bytes(SECTOR)
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_chunk_is_taken_back_after_the_reads_into_it(started: Started) -> None:
    daemon, engine, area = started
    read = daemon.ask(Op.READ, image=1, sector=5, count=1)
    back = daemon.ask(Op.TAKE_BACK, chunk=0)
    assert daemon.silent()
    engine.release.set()
    assert [daemon.answer()[:2] for _ in range(2)] == [(read, 0), (back, 0)]
    assert area[:SECTOR] == bytes([5]) * SECTOR
    daemon.call(Op.TAKE_BACK, chunk=0)
    daemon.call(Op.TAKE_BACK, chunk=77)
    again = daemon.lend(0)
    daemon.call(Op.READ, sector=6, count=1)
    assert again[:SECTOR] == bytes([6]) * SECTOR
    assert area[:SECTOR] == bytes([5]) * SECTOR


def test_a_chunk_is_taken_back_though_somebody_still_refers_to_it(started: Started) -> None:
    """A thread may just have told the end of a read; an error keeps its frames, and their views."""
    daemon, engine, _ = started
    kept: list[Any] = []
    read = engine.read

    def keep(image: int, sector: int, count: int, into: Any, direct: bool) -> None:
        kept.append(into)
        read(image, sector, count, into, direct)

    engine.read = keep  # type: ignore[method-assign]
    daemon.call(Op.READ, sector=5, count=1)
    daemon.call(Op.TAKE_BACK, chunk=0)
    again = daemon.lend(0)
    daemon.call(Op.READ, sector=6, count=1)
    assert again[:SECTOR] == bytes([6]) * SECTOR


def test_a_second_open_replaces_the_engine_after_its_reads(started: Started) -> None:
    daemon, first, _ = started
    read = daemon.ask(Op.READ, image=1, sector=5, count=1)
    config = VmdkConfig(links=(b"/vm/b.vmdk",), follow_any=True)
    reopened = daemon.ask(Op.OPEN, protocol.encode(config))
    assert daemon.silent()
    assert not first.closed.is_set()
    first.release.set()
    assert daemon.answer()[:2] == (read, 0)
    number, status, body = daemon.answer()
    assert (number, status) == (reopened, 0)
    assert protocol.decode_identities(body) == (IDENTITY,)
    assert first.closed.is_set()
    assert daemon.engines[1].config == config
    daemon.call(Op.READ, sector=5, count=1)
    assert len(daemon.engines[1].calls) == 1


@pytest.mark.parametrize("error", [SourceMissing("gone"), OSError(errno.EIO, "odd")])
def test_a_refused_open_is_told_and_may_be_tried_again(error: Exception, started: Started) -> None:
    daemon, first, _ = started
    daemon.refusal = error
    with pytest.raises(VddkfsError) as caught:
        daemon.open()
    assert caught.value.errno == error.errno  # type: ignore[attr-defined]
    assert first.closed.is_set()
    daemon.refusal = None
    daemon.open()
    daemon.call(Op.READ, sector=5, count=1)


@pytest.mark.parametrize("how", ["stop", "end"])
def test_stop_and_the_end_of_the_socket_end_it_in_good_order(how: str, started: Started) -> None:
    daemon, engine, _ = started
    read = daemon.ask(Op.READ, image=1, sector=5, count=1)
    if how == "stop":
        daemon.ask(Op.STOP)
    else:
        daemon.sock.shutdown(1)
    assert daemon.silent()
    assert not engine.closed.is_set()
    engine.release.set()
    assert daemon.answer()[:2] == (read, 0)
    daemon.join()
    assert engine.closed.is_set()
    assert daemon.raised is None


@pytest.mark.parametrize("unread", [False, True])
def test_a_daemon_that_is_gone_ends_it_without_an_error(unread: bool, started: Started) -> None:
    daemon, engine, _ = started
    if unread:
        daemon.ask(Op.READ, sector=2, count=1)
        while daemon.silent():
            pass
    else:
        # The main thread waits for the first, and so meets the others after the end.
        daemon.ask(Op.READ, image=1, sector=1, count=1)
        daemon.ask(Op.REVALIDATE)
        daemon.ask(Op.READ, sector=2, count=1)
    daemon.sock.close()
    engine.release.set()
    daemon.join()
    assert daemon.raised is None
    assert engine.closed.is_set()


def test_it_does_not_start_for_a_parent_that_is_not_its_own() -> None:
    command = [sys.executable, "-I", "-m", "vddkfs.engines.worker", "0", "1"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 1


def test_ctrl_c_in_the_daemons_terminal_does_not_end_it() -> None:
    ours, theirs = protocol.pair()
    code = "import sys; from vddkfs.engines.worker import main; main(sys.argv[1:])"
    command = [sys.executable, "-I", "-c", code, str(theirs.fileno()), str(os.getpid())]
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        ours.setblocking(True)
        for signal_number in (0, signal.SIGINT):
            process.send_signal(signal_number)
            protocol.send(ours, protocol.request_header(Op.REVALIDATE, 1))
            assert protocol.receive(ours)[0], "it answers"
        protocol.send(ours, protocol.request_header(Op.STOP, 2))
        assert process.wait(SECONDS) == 0
