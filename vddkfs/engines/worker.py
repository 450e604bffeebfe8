"""The worker process: one engine on one chain, behind a socket, ending with its parent.

Started as ``python -I -m vddkfs.engines.worker SOCKET_FD PARENT_PID``. The main thread receives,
and makes every call of the engine except ``read``. A read that needs no waiting (its data is in the
kernel's page cache) is answered at once by the main thread; one that would wait goes to a small
pool of threads, so that several are under way at the disk and none stops the others.

While requests come close together the main thread looks for the next one a few times before it
sleeps: waking a sleeping core costs more than answering a 4 KiB read.
"""

import ctypes
import mmap
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

import msgspec

from vddkfs.engines import protocol
from vddkfs.engines.base import SECTOR, Engine
from vddkfs.engines.protocol import EngineConfig, Op
from vddkfs.errors import EngineError, VddkfsError

READ_THREADS = 8
SPIN_SECONDS = 100e-6
"""How long the next request is looked for before sleeping, while they come this close together."""

_PR_SET_PDEATHSIG = 1
_DONT_WAIT = int(socket.MSG_DONTWAIT)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when the thread that started it ends.

    The parent may have died before this call took effect, hence the second look.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0 or os.getppid() != parent:
        os._exit(1)


def make_engine(config: EngineConfig) -> Engine:
    """Return the opened engine that *config* asks for. Raises VddkfsError."""
    # Imported here, so that a worker loads the one engine that it runs.
    from vddkfs.engines.vmdk.engine import VmdkEngine

    return VmdkEngine(
        [os.fsdecode(path) for path in config.links],
        follow_any=config.follow_any,
        table_cache_bytes=config.table_cache_bytes,
    )


class ReadPool:
    """Threads for reads that wait; started one by one, as reads are found waiting."""

    def __init__(self, work: Callable[[bytes], None]) -> None:
        self._work = work
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._lock = threading.Condition()
        self._threads = 0
        self._busy = 0

    def submit(self, packet: bytes) -> None:
        """Hand a READ packet to a thread."""
        with self._lock:
            self._busy += 1
            if self._busy > self._threads and self._threads < READ_THREADS:
                self._threads += 1
                threading.Thread(target=self._run, daemon=True).start()
        self._queue.put(packet)

    def drain(self) -> None:
        """Wait until no read is under way."""
        with self._lock:
            self._lock.wait_for(lambda: self._busy == 0)

    def _run(self) -> None:
        while True:
            packet = self._queue.get()
            try:
                self._work(packet)
            finally:
                with self._lock:
                    self._busy -= 1
                    self._lock.notify_all()


class Worker:
    """The receiving end: packets in, engine calls, packets out."""

    def __init__(
        self, sock: socket.socket, factory: Callable[[EngineConfig], Engine] = make_engine
    ) -> None:
        self._sock = sock
        self._factory = factory
        self._engine: Engine | None = None
        self._chunks: dict[int, tuple[mmap.mmap, memoryview]] = {}
        self._pool = ReadPool(self._read_waiting)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._spin = False

    def run(self) -> None:
        """Serve until STOP, or until the daemon's end of the socket is gone."""
        while True:
            packet, fd = self._next()
            if not packet or packet[0] == Op.STOP:
                break
            if packet[0] == Op.READ:
                self._read(packet)
            else:
                self._call(packet, fd)
        if self._engine is not None:
            self._pool.drain()
            self._engine.close()

    def _next(self) -> tuple[bytes, int]:
        sock = self._sock
        start = time.perf_counter()
        patience = SPIN_SECONDS if self._spin else 0.0
        while True:
            try:
                message = protocol.receive(sock, _DONT_WAIT)
            except ConnectionResetError:
                return b"", -1
            except BlockingIOError:
                waited = time.perf_counter() - start
                if waited < patience:
                    os.sched_yield()
                    continue
                self._poll.poll()
                self._spin = time.perf_counter() - start < 2 * SPIN_SECONDS
                patience = 0.0
                continue
            return message

    def _reply(self, op: int, status: int, request_id: int, body: bytes = b"") -> None:
        # A daemon that is gone needs no answer; the next receive ends the worker.
        try:
            if body:
                protocol.send(self._sock, protocol.reply_header(op, status, request_id), body)
            else:
                self._sock.send(protocol.reply_header(op, status, request_id))
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _read(self, packet: bytes) -> None:
        _, flags, image, count, request_id, sector, chunk, offset = protocol.REQUEST.unpack(packet)
        engine = self._engine
        if engine is None:
            self._fail(Op.READ, request_id, EngineError("no chain is open"))
            return
        into = self._chunks[chunk][1][offset : offset + count * SECTOR]
        try:
            done = engine.read_nowait(image, sector, count, into, bool(flags & protocol.DIRECT))
        except (VddkfsError, ValueError) as error:
            self._fail(Op.READ, request_id, error)
            return
        if done:
            self._reply(Op.READ, 0, request_id)
        else:
            self._pool.submit(packet)

    def _read_waiting(self, packet: bytes) -> None:
        _, flags, image, count, request_id, sector, chunk, offset = protocol.REQUEST.unpack(packet)
        assert self._engine is not None
        into = self._chunks[chunk][1][offset : offset + count * SECTOR]
        try:
            self._engine.read(image, sector, count, into, bool(flags & protocol.DIRECT))
        except Exception as error:
            # Whatever it is, the reader is told, and the thread goes on to the next read.
            if not isinstance(error, VddkfsError | OSError):
                traceback.print_exc()
            self._fail(Op.READ, request_id, error)
        else:
            self._reply(Op.READ, 0, request_id)

    def _call(self, packet: bytes, fd: int) -> None:
        request_id = protocol.REQUEST.unpack_from(packet)[4]
        try:
            body = self._perform(packet, fd)
        except (VddkfsError, OSError, ValueError) as error:
            self._fail(packet[0], request_id, error)
        else:
            self._reply(packet[0], 0, request_id, body)

    def _fail(self, op: int, request_id: int, error: Exception) -> None:
        """Tell *error*. A ValueError is a request that does not fit the chain as it is now."""
        if isinstance(error, OSError):
            error = EngineError(str(error), errno=error.errno)
        elif not isinstance(error, VddkfsError):
            error = EngineError(str(error))
        self._reply(op, error.errno, request_id, protocol.encode_error(error))

    def _perform(self, packet: bytes, fd: int) -> bytes:
        op, _, image, count, _, sector, chunk, _ = protocol.REQUEST.unpack_from(packet)
        match op:
            case Op.LEND:
                with open(fd, "r+b", buffering=0) as file:
                    if chunk not in self._chunks:
                        area = mmap.mmap(file.fileno(), count)
                        area.madvise(mmap.MADV_DONTDUMP)
                        self._chunks[chunk] = (area, memoryview(area))
                return b""
            case Op.TAKE_BACK:
                self._pool.drain()
                lent = self._chunks.pop(chunk, None)
                if lent is not None:
                    lent[1].release()
                    lent[0].close()
                return b""
            case Op.OPEN:
                body = protocol.body_of(packet, protocol.REQUEST.size, fd)
                return self._open(msgspec.msgpack.decode(body, type=EngineConfig))
        if self._engine is None:
            raise EngineError("no chain is open")
        if op == Op.MAP:
            body = protocol.body_of(packet, protocol.REQUEST.size, fd)
            query = msgspec.msgpack.decode(body, type=protocol.MapQuery)
            return protocol.encode(
                self._engine.map(image, sector, query.count, query.limit, query.seconds)
            )
        if op == Op.REVALIDATE:
            self._pool.drain()
            return protocol.encode(tuple(self._engine.revalidate()))
        raise EngineError(f"unknown operation {op}")

    def _open(self, config: EngineConfig) -> bytes:
        self._pool.drain()
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._engine = self._factory(config)
        return protocol.encode(tuple(self._engine.identities()))


def main(arguments: list[str]) -> int:
    """Run a worker on the socket whose descriptor is the first argument."""
    die_with_parent(int(arguments[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # This process only waits, copies and answers; a long switch interval would let a thread that
    # just came back from the disk wait for the main thread while that looks for requests.
    sys.setswitchinterval(0.0005)
    with socket.socket(fileno=int(arguments[0])) as sock:
        try:
            Worker(sock).run()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(70)
    # Threads still in a read must not hold up the end: the daemon has no use for them any more.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
