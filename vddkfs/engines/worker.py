"""The worker process: one engine on one chain, behind a socket, ending with its parent.

Started as ``python -I -m vddkfs.engines.worker SOCKET_FD PARENT_PID``. The main thread receives,
and makes every call of the engine. A read, a write or a flush ends when the engine says so: at
once, or from another thread, the built-in engine's pool or the library's own (see ``pool`` and
``vddk.engine``). What opens, closes or looks again waits for them (see ``AsyncEngine.drain``). An
engine may have a quicker way to receive and serve reads (see ``vddk.fast``); the worker sees the
other packets then.

While requests come close together the main thread looks for the next one a few times before it
sleeps: waking a sleeping core costs more than answering a 4 KiB read.
"""

import contextlib
import ctypes
import errno
import math
import mmap
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

import msgspec

from vddkfs.engines import protocol
from vddkfs.engines.base import SECTOR, AsyncEngine, Done, Receiver
from vddkfs.engines.config import EngineConfig, VddkConfig, new_content_id
from vddkfs.engines.pool import PooledEngine
from vddkfs.engines.protocol import Op
from vddkfs.errors import EngineError, VddkfsError

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


Factory = Callable[[EngineConfig, int], AsyncEngine]


def make_engine(config: EngineConfig, secret: int) -> AsyncEngine:
    """Return the opened engine that *config* asks for. Raises VddkfsError.

    *secret* is a descriptor with credentials, or -1; it stays the caller's.
    """
    # Imported here, so that a worker loads the one engine that it runs.
    if isinstance(config, VddkConfig):
        from vddkfs.engines.vddk.engine import VddkEngine

        return VddkEngine(config, secret)
    from vddkfs.engines.vmdk.engine import VmdkEngine

    # A disk in pieces of 2 GiB has a file for each, and nothing here waits with select().
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return PooledEngine(
        VmdkEngine(
            [os.fsdecode(path) for path in config.links],
            follow_any=config.follow_any,
            raw_devices=config.raw_devices,
            table_cache_bytes=config.table_cache_bytes,
            writable=config.writable,
            content_id="" if config.keep_content_id else config.content_id or new_content_id(),
        )
    )


class Worker:
    """The receiving end: packets in, engine calls, packets out."""

    def __init__(self, sock: socket.socket, factory: Factory = make_engine) -> None:
        self._sock = sock
        self._factory = factory
        self._secret = -1
        self._engine: AsyncEngine | None = None
        self._writable = False
        self._receiver: Receiver | None = None
        self._chunks: dict[int, tuple[mmap.mmap, memoryview]] = {}
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
            elif packet[0] == Op.WRITE:
                self._write(packet)
            elif packet[0] in (Op.FLUSH, Op.WRITE_AGAIN):
                self._flush_or_again(packet, fd)
            else:
                self._call(packet, fd)
        if self._engine is not None:
            self._engine.drain()
            try:
                self._engine.close()
            except VddkfsError as error:
                self.complain(f"at the end: {error}")

    def complain(self, text: str) -> None:
        """Have the daemon log *text*, before this process ends."""
        if self._engine is not None:
            self._engine.complain(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _next(self) -> tuple[bytes, int]:
        if self._receiver is not None:
            return self._receiver.next()
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
                self._sleep()
                self._spin = time.perf_counter() - start < 2 * SPIN_SECONDS
                patience = 0.0
                continue
            return message

    def _sleep(self) -> None:
        """Wait for a message, doing meanwhile what the engine has to do."""
        while True:
            away = self._engine.tick() if self._engine is not None else math.inf
            timeout = None if away == math.inf else math.ceil(away * 1000)
            if any(fd == self._sock.fileno() for fd, _ in self._poll.poll(timeout)):
                return

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
        _, area = self._chunks.get(chunk, (None, memoryview(b"")))
        into = area[offset : offset + count * SECTOR]
        if not count or len(into) != count * SECTOR:
            self._fail(Op.READ, request_id, _no_place(count, chunk, offset))
            return
        direct = bool(flags & protocol.DIRECT)
        engine.start_read(image, sector, count, into, direct, partial(self._answer, request_id))

    def _answer(self, request_id: int, error: Exception | None) -> None:
        """Tell how a read ended, from any thread."""
        self._ended(Op.READ, request_id, error)

    def _write(self, packet: bytes) -> None:
        _, _, _, count, request_id, sector, chunk, offset = protocol.REQUEST.unpack(packet)
        done = partial(self._ended, Op.WRITE, request_id)
        engine = self._writer(done)
        if engine is None:
            return
        _, area = self._chunks.get(chunk, (None, memoryview(b"")))
        data = area[offset : offset + count * SECTOR]
        if not count or len(data) != count * SECTOR:
            done(_no_place(count, chunk, offset))
            return
        engine.start_write(sector, data, done)

    def _flush_or_again(self, packet: bytes, fd: int) -> None:
        op, _, _, _, request_id, sector, _, _ = protocol.REQUEST.unpack_from(packet)
        done = partial(self._ended, op, request_id)
        engine = self._writer(done)
        if op == Op.FLUSH:
            if engine is not None:
                engine.start_flush(done)
            return
        try:
            body = protocol.body_of(packet, protocol.REQUEST.size, fd)
            if engine is not None:
                engine.start_write(sector, memoryview(body), done)
        except (OSError, *protocol.GARBLED) as error:
            done(EngineError(f"what is to be written again does not come: {error}"))

    def _writer(self, done: Done) -> AsyncEngine | None:
        """Return the engine if it was opened to be written; if not, tell *done*."""
        if self._engine is None:
            done(EngineError("no chain is open"))
        elif not self._writable:
            done(EngineError("the disk was opened for reading alone", errno=errno.EROFS))
        else:
            return self._engine
        return None

    def _ended(self, op: int, request_id: int, error: Exception | None) -> None:
        """Tell how a request ended, from any thread."""
        if error is None:
            self._reply(op, 0, request_id)
        else:
            self._fail(op, request_id, error)

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
            error = EngineError(str(error), errno=error.errno or errno.EIO)
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
                        if self._receiver is not None:
                            self._receiver.lend(chunk, self._chunks[chunk][1])
                return b""
            case Op.TAKE_BACK:
                if self._engine is not None:
                    self._engine.drain()
                if self._receiver is not None:
                    self._receiver.take_back(chunk)
                lent = self._chunks.pop(chunk, None)
                if lent is not None:
                    lent[1].release()
                    # A thread that has just told the end of a read may still refer to it, and an
                    # error to its frames: it is unmapped with the last of them then.
                    with contextlib.suppress(BufferError):
                        lent[0].close()
                return b""
            case Op.OPEN:
                return self._open(packet, fd)
            case Op.DESCRIBE:
                return self._describe(packet, fd)
        if self._engine is None:
            raise EngineError("no chain is open")
        if op == Op.MAP:
            body = protocol.body_of(packet, protocol.REQUEST.size, fd)
            query = msgspec.msgpack.decode(body, type=protocol.MapQuery)
            return protocol.encode(
                self._engine.map(image, sector, query.count, query.limit, query.seconds)
            )
        if op == Op.REPORT:
            return protocol.encode(self._engine.report())
        if op == Op.REVALIDATE:
            self._engine.drain()
            return protocol.encode(tuple(self._engine.revalidate()))
        if op == Op.RENEW:
            self._engine.drain()
            return protocol.encode(self._engine.renew())
        raise EngineError(f"unknown operation {op}")

    def _config(self, packet: bytes, fd: int) -> EngineConfig:
        if fd >= 0 and not packet[1] & protocol.BODY_IN_FD:
            # The credentials: kept for when the daemon asks to open again.
            self._secret, fd = fd, -1
        body = protocol.body_of(packet, protocol.REQUEST.size, fd)
        config: EngineConfig = msgspec.msgpack.decode(body, type=EngineConfig)
        return config

    def _describe(self, packet: bytes, fd: int) -> bytes:
        config = self._config(packet, fd)
        if not isinstance(config, VddkConfig):
            raise EngineError("only what VDDK opens is described by a worker")
        from vddkfs.engines.vddk.engine import describe

        return protocol.encode(describe(config, self._secret))

    def _open(self, packet: bytes, fd: int) -> bytes:
        config = self._config(packet, fd)
        if self._engine is not None:
            self._engine.drain()
            self._watch(False)
            self._receiver = None
            engine, self._engine = self._engine, None
            engine.close()
        self._engine = self._factory(config, self._secret)
        self._writable = config.writable
        self._watch(True)
        self._receiver = self._engine.receiver(self._sock, self._answer)
        if self._receiver is not None:
            for number, (_, area) in self._chunks.items():
                self._receiver.lend(number, area)
        return protocol.encode(tuple(self._engine.identities()))

    def _watch(self, begin: bool) -> None:
        """Begin, or end, to wait for what wakes the engine."""
        fd = self._engine.fileno() if self._engine is not None else -1
        if fd < 0:
            return
        if begin:
            self._poll.register(fd, select.POLLIN)
        else:
            self._poll.unregister(fd)


def _no_place(count: int, chunk: int, offset: int) -> EngineError:
    return EngineError(f"{count} sectors from byte {offset} on are no part of chunk {chunk}")


def main(arguments: list[str]) -> int:
    """Run a worker on the socket whose descriptor is the first argument."""
    die_with_parent(int(arguments[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # This process only waits, copies and answers; a long switch interval would let a thread that
    # just came back from the disk wait for the main thread while that looks for requests.
    sys.setswitchinterval(0.0005)
    with socket.socket(fileno=int(arguments[0])) as sock:
        worker = Worker(sock)
        try:
            worker.run()
        except BaseException:
            worker.complain(traceback.format_exc())
            os._exit(70)
    # Threads still in a read must not hold up the end: the daemon has no use for them any more.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
