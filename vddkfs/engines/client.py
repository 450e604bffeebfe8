"""The daemon's end of a worker: requests out, answers in, and a new process when one is lost.

``WorkerClient.run`` is the supervisor, one task a worker. It starts the process when something is
asked, opens the chain in it, lends it the chunks of its disk, and watches: for answers, for the
deadline of the oldest request, for the end of the process. A worker that dies or misses a deadline
is killed, reaped and replaced, and the reads that were under way are sent again. A request ends
with an error only when the worker says so or when ``retry_budget`` is spent.

While a lost worker is not yet reaped (it may hang in the kernel) it may still write to the slots of
its last requests: those slots stay out of use until it is gone, and the requests get new ones.

Everything here runs on the trio thread. The process is started on that same thread, and it has to
be the main one: PR_SET_PDEATHSIG ends a child with the *thread* that made it.
"""

import collections
import contextlib
import errno
import itertools
import logging
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

import trio

from vddkfs.engines import protocol
from vddkfs.engines.base import LinkIdentity, MapSlice
from vddkfs.engines.process import Process, WorkerProcess
from vddkfs.engines.protocol import EngineConfig, MapQuery, Op
from vddkfs.engines.requests import Call, Counters, Loan, Patience, ReadRequest, Request, TakeBack
from vddkfs.errors import EngineError, VddkfsError, WorkerFailed

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_IN_FLIGHT: Final = 32
"""Requests sent and not answered; further ones wait here, where they can still be moved."""
POLL_SECONDS: Final = 80e-6
"""How long an answer is looked for before the task sleeps, while answers come this quickly."""
MAX_BACKOFF: Final = 5.0
_LOST: Final = "ended unexpectedly"
_IDLE: Final = "idle"
_REFUSED: Final = "refused"
"""Why a process is of no more use; the last two are no losses."""
_TICK: Final = 0.25
"""Seconds between looks at the deadlines while requests are under way."""


class WorkerClient:
    """One worker and its supervisor.

    *opened* is called with the identities of the chain each time a process has opened it, before
    any request is sent to that process; what it raises fails the requests that wait.
    """

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        patience: Patience,
        opened: Callable[[tuple[LinkIdentity, ...]], None],
        start: Callable[[str], Process] = WorkerProcess,
    ) -> None:
        self.name = name
        self.config = config
        self.counters = Counters()
        self.last_errors: collections.deque[str] = collections.deque(maxlen=8)
        self._patience = patience
        self._opened = opened
        self._start = start
        self._ids = itertools.count(1)
        self._waiting: collections.deque[Request] = collections.deque()
        self._in_flight: dict[int, Request] = {}
        self._chunks: dict[int, tuple[int, int]] = {}
        """What is lent: the memfd and its bytes, by number."""
        self._process: Process | None = None
        self._sock: socket.socket | None = None
        self._wanted = trio.Event()
        self._backoff = 0.0
        self._last_activity = trio.current_time()
        self._quick = False
        self._serving: trio.CancelScope | None = None
        self._hanging = 0
        self._stopping = False
        self._refusing = False
        self._reaper: trio.Nursery | None = None

    @property
    def pid(self) -> int | None:
        """The process id, or None while no process runs."""
        return self._process.pid if self._process is not None else None

    @property
    def in_flight(self) -> int:
        """Requests that the process has and has not answered."""
        return len(self._in_flight)

    @property
    def queued(self) -> int:
        """Requests that wait to be sent."""
        return len(self._waiting)

    @property
    def state(self) -> str:
        """What the worker is doing: "serving", "starting" or "not running"."""
        if self._sock is not None:
            return "serving"
        return "starting" if self._process is not None else "not running"

    def stop(self) -> None:
        """Have ``run``, when it is cancelled, end the process in good order and not by force."""
        self._stopping = True

    def refuse(self) -> None:
        """Fail everything that is asked, now and from now on: the mount is going down."""
        self._refusing = True
        self._fail_all(_going_down())

    def oldest_age(self) -> float:
        """Seconds since the oldest unanswered request was first made; 0 without one."""
        born = [r.born for r in itertools.chain(self._in_flight.values(), self._waiting)]
        return trio.current_time() - min(born) if born else 0.0

    # What the cache asks.

    def submit_read(self, request: ReadRequest) -> None:
        """Have *request* done: now if a process serves, else as soon as one does."""
        request.timeout = self._patience.op_timeout
        self._submit(request)

    def _submit(self, request: Request) -> None:
        if self._refusing:
            request.finish(_going_down(), b"", -1)
            return
        now = trio.current_time()
        request.born = now
        if self._sock is None or len(self._in_flight) >= MAX_IN_FLIGHT or self._waiting:
            self._waiting.append(request)
            self._wanted.set()
        else:
            self._send(request, now)
            if len(self._in_flight) == 1:
                self._wanted.set()

    def poll(self) -> None:
        """Look for an answer for a moment, if nothing else is under way and the last came quickly.

        Waking this process costs more than the worker needs for a read that its kernel has in
        memory, so a short look saves a sleep; it never lasts when the disk is slow.
        """
        sock = self._sock
        if sock is None or len(self._in_flight) != 1 or not self._quick:
            return
        until = time.perf_counter() + POLL_SECONDS
        while self._in_flight and time.perf_counter() < until:
            if self._drain(sock, 1):
                return
            os.sched_yield()
        self._quick = False

    def lend(self, number: int, fd: int, size: int) -> None:
        """Let the worker, now and after every restart, use a chunk of *size* bytes."""
        self._chunks[number] = (fd, size)
        if self._sock is not None:
            self._submit(self._loan(number))

    async def take_back(self, number: int) -> bool:
        """End a loan. False: the worker did not answer in time, and the loan goes on."""
        if self._hanging:
            return False
        if self._sock is None:
            del self._chunks[number]
            return True
        call = TakeBack(self._patience.op_timeout, number)
        self._submit(call)
        with trio.move_on_after(1.0), contextlib.suppress(VddkfsError):
            await call.wait()
            del self._chunks[number]
            return not self._hanging
        if call in self._waiting:
            self._waiting.remove(call)
            return False
        # It may still come to take the message: lend the chunk again behind it.
        if self._sock is not None:
            self._submit(self._loan(number))
        return False

    def _loan(self, number: int) -> Loan:
        fd, size = self._chunks[number]
        return Loan(self._patience.op_timeout, number, fd, size)

    # What the disk asks.

    async def map(self, image: int, sector: int, query: MapQuery) -> MapSlice:
        """Return a part of the allocation map. Raises VddkfsError."""
        body = protocol.encode(query)
        call = Call(Op.MAP, self._patience.op_timeout, body, image=image, sector=sector)
        return await self._ask(call, protocol.decode_map)

    async def revalidate(self) -> tuple[LinkIdentity, ...]:
        """Drop the worker's tables of the live link; return the identities as they are now."""
        call = Call(Op.REVALIDATE, self._patience.op_timeout)
        return await self._ask(call, protocol.decode_identities)

    async def reopen(self) -> tuple[LinkIdentity, ...]:
        """Have the chain opened anew, and return what it is now.

        Raises the engine's error; the process, which has no chain then, is given up in good order.
        """
        call = Call(Op.OPEN, self._patience.open_timeout, protocol.encode(self.config))
        try:
            return await self._ask(call, protocol.decode_identities)
        except VddkfsError:
            self._sock = None
            if self._serving is not None:
                self._serving.cancel()
            raise

    async def _ask(self, call: Call, decode: Callable[[bytes], T]) -> T:
        self._submit(call)
        body = await call.wait()
        try:
            return decode(body)
        except protocol.GARBLED as error:
            raise WorkerFailed(
                f"{self.name}: an answer of the worker makes no sense", cause=str(error)
            ) from error

    # The supervisor.

    async def run(self) -> None:
        """Serve until cancelled; the process is stopped then, in good order if it answers."""
        async with trio.open_nursery() as nursery:
            self._reaper = nursery
            try:
                while True:
                    await self._until_wanted()
                    await trio.sleep(self._backoff)
                    await self._one_process()
            finally:
                self.refuse()

    async def _until_wanted(self) -> None:
        while not self._waiting:
            self._wanted = trio.Event()
            await self._wanted.wait()

    async def _one_process(self) -> None:
        """Start a process, serve with it, and clean up after it."""
        try:
            self._process = process = self._start(self.name)
        except OSError as error:
            self._lost(f"cannot be started: {error}")
            self._take_over(None)
            return
        self.counters.starts += 1
        reason = _LOST
        try:
            reason = await self._serve(process)
        except VddkfsError as error:
            reason = _REFUSED
            self._note(str(error))
            self._fail_all(error)
        finally:
            self._sock = None
            self._process = None
            with trio.CancelScope(shield=True):
                orderly = reason in (_IDLE, _REFUSED) or self._stopping
                reaped = await process.end(kill=not orderly)
        if reason not in (_IDLE, _REFUSED):
            self.counters.restarts += 1
            self._lost(reason)
        self._take_over(None if reaped else process)

    async def _serve(self, process: Process) -> str:
        """Return why the process is of no more use."""
        reason = _REFUSED
        opened = False
        refusal: VddkfsError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.forward_output)
            nursery.start_soon(self._mind_budget)
            with trio.move_on_after(self._patience.open_timeout):
                try:
                    opened = await self._open(process)
                except VddkfsError as error:
                    refusal = error
            if not opened:
                nursery.cancel_scope.cancel()
            else:
                self._sock = process.sock
                self._serving = nursery.cancel_scope
                self._waiting.extendleft(self._loan(number) for number in self._chunks)
                self._pump()

                async def until(wait: Callable[[], Awaitable[str]]) -> None:
                    nonlocal reason
                    reason = await wait()
                    # At once, so that nothing more is sent to a process that is given up.
                    self._sock = None
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until, lambda: self._receive(process.sock))
                nursery.start_soon(until, self._watch)
        self._serving = None
        if refusal is not None:
            raise refusal
        return reason if opened else "did not open the chain"

    async def _open(self, process: Process) -> bool:
        """Open the chain in a new process; raises the engine's error.

        Returns False where the process ended first.
        """
        sock = process.sock
        header = protocol.request_header(Op.OPEN, 0)
        try:
            protocol.send(sock, header, protocol.encode(self.config))
            await trio.lowlevel.wait_readable(sock)
            packet, fd = protocol.receive(sock)
        except (OSError, *protocol.GARBLED):
            return False
        if not packet:
            return False
        try:
            status = protocol.REPLY.unpack_from(packet)[3]
            body = protocol.body_of(packet, protocol.REPLY.size, fd)
            if status:
                raise protocol.decode_error(body, status)
            identities = protocol.decode_identities(body)
        except protocol.GARBLED as error:
            log.error("worker of %s: its first answer makes no sense: %s", self.name, error)
            return False
        self._opened(identities)
        return True

    async def _receive(self, sock: socket.socket) -> str:
        while True:
            await trio.lowlevel.wait_readable(sock)
            if self._drain(sock, MAX_IN_FLIGHT) < 0:
                return _LOST

    def _drain(self, sock: socket.socket, most: int) -> int:
        """Take up to *most* answers that are there; return how many, or -1 at its end."""
        taken = 0
        while taken < most:
            try:
                packet, fd = protocol.receive(sock)
            except BlockingIOError:
                break
            except OSError:
                return -1
            if not packet:
                return -1
            taken += 1
            try:
                self._answer(packet, fd)
            except protocol.GARBLED as error:
                log.error("worker of %s: an answer makes no sense: %s", self.name, error)
                return -1
        if self._waiting:
            self._pump()
        return taken

    def _answer(self, packet: bytes, fd: int) -> None:
        _, _, _, status, request_id = protocol.REPLY.unpack_from(packet)
        request = self._in_flight.pop(request_id, None)
        if request is None:
            return
        now = trio.current_time()
        self._last_activity = now
        if not isinstance(request, Loan):
            # The process is of use: the next loss is not the continuation of a series.
            self._backoff = 0.0
        self._quick = now - request.sent < 4 * POLL_SECONDS
        if not status:
            request.finish(None, packet, fd)
            return
        self.counters.errors += 1
        error: VddkfsError = EngineError(os.strerror(status), errno=status)
        try:
            body = protocol.body_of(packet, protocol.REPLY.size, fd)
            error = protocol.decode_error(body, status)
        finally:
            self._note(str(error))
            request.finish(error, b"", -1)

    def _pump(self) -> None:
        """Send what waits, as far as the process may have it."""
        now = trio.current_time()
        while self._waiting and len(self._in_flight) < MAX_IN_FLIGHT and self._sock is not None:
            if not self._send(self._waiting.popleft(), now):
                break

    def _send(self, request: Request, now: float) -> bool:
        """Send *request*; if the socket is full, or its end gone, put it back and return False."""
        assert self._sock is not None
        request.id = next(self._ids)
        header, body = request.packet()
        request.sent = now
        latest = request.born + self._patience.retry_budget
        request.deadline = min(now + request.timeout, max(latest, now + _TICK))
        try:
            if body or request.fd >= 0:
                protocol.send(self._sock, header, body, fd=request.fd)
            else:
                self._sock.send(header)
        except OSError:
            # Answers make room, and ``_watch`` tries again; the end of the process is noticed by
            # the receiver.
            self._waiting.appendleft(request)
            return False
        self._in_flight[request.id] = request
        self._last_activity = now
        self.counters.requests += 1
        return True

    async def _watch(self) -> str:
        """Return when a deadline is missed, or when the worker was idle for long."""
        while True:
            if self._in_flight or self._waiting:
                await trio.sleep(_TICK)
                now = trio.current_time()
                if any(request.deadline < now for request in self._in_flight.values()):
                    return f"did not answer within {self._patience.op_timeout:g} s"
                self._pump()
            elif await self._idle_too_long():
                return _IDLE

    async def _idle_too_long(self) -> bool:
        """Sleep until there is something to do; say whether that took longer than it may."""
        until = self._last_activity + self._patience.idle_timeout
        self._wanted = trio.Event()
        with trio.move_on_at(until):
            await self._wanted.wait()
        return not self._in_flight and not self._waiting and trio.current_time() >= until

    async def _mind_budget(self) -> None:
        """Give up what waits too long for a process that does not get ready."""
        while self._sock is None:
            await trio.sleep(_TICK)
            self._expire_waiting()

    def _expire_waiting(self) -> None:
        now = trio.current_time()
        waiting = list(self._waiting)
        self._waiting.clear()
        for request in waiting:
            if now - request.born > self._patience.retry_budget:
                self._give_up(request)
            else:
                self._waiting.append(request)

    def _lost(self, reason: str) -> None:
        """Tell the loss of a process, and wait longer before the next if it repeats."""
        if self._stopping:
            return
        log.warning("worker of %s: it %s; another takes over", self.name, reason)
        self._note("the worker " + reason)
        self._backoff = min(MAX_BACKOFF, 2 * self._backoff) if self._backoff else 0.02

    def _note(self, text: str) -> None:
        self.last_errors.append(f"{time.strftime('%H:%M:%S')} {text}")

    def _take_over(self, hanging: Process | None) -> None:
        """Queue the requests of a lost process again, the oldest first.

        *hanging* is that process where it could not be reaped, and may still write to its slots.
        """
        lost = list(self._in_flight.values())
        self._in_flight.clear()
        freed: list[Callable[[], None]] = []
        again: list[Request] = []
        for request in lost:
            movable = True
            if hanging is not None:
                movable, free = request.move()
                freed.append(free)
            if movable and request.again:
                self.counters.resent += 1
                again.append(request)
            else:
                self._give_up(request)
        # The next process is lent every chunk anew.
        waiting = [r for r in self._waiting if not isinstance(r, Loan)]
        self._waiting = collections.deque([*again, *waiting])
        self._expire_waiting()
        if hanging is not None and self._reaper is not None:
            self._hanging += 1
            log.error("worker of %s (pid %d) cannot be killed", self.name, hanging.pid)
            self._reaper.start_soon(self._reap_later, hanging, freed)

    def _give_up(self, request: Request) -> None:
        if not request.again:
            request.finish(WorkerFailed(f"{self.name}: the worker was lost"), b"", -1)
            return
        error = WorkerFailed(
            f"{self.name}: no answer within {self._patience.retry_budget:g} s",
            cause=self.last_errors[-1] if self.last_errors else "",
            errno=errno.EIO,
        )
        log.error("%s", error)
        request.finish(error, b"", -1)

    async def _reap_later(self, process: Process, freed: Iterable[Callable[[], None]]) -> None:
        await process.reap(math.inf)
        self._hanging -= 1
        for free in freed:
            free()

    def _fail_all(self, error: VddkfsError) -> None:
        requests = [*self._in_flight.values(), *self._waiting]
        self._in_flight.clear()
        self._waiting.clear()
        for request in requests:
            request.finish(error, b"", -1)


def _going_down() -> WorkerFailed:
    return WorkerFailed("the mount is going down", errno=errno.EIO)
