"""The requests of one worker: those that wait to be sent, and those that its process has.

Requests are sent in the order in which they were asked, at most MAX_IN_FLIGHT at a time. Everything
here runs on the trio thread, and nothing in it waits.
"""

import collections
import errno
import itertools
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import Final

import trio

from vddkfs.engines import protocol
from vddkfs.engines.fence import Fence
from vddkfs.engines.requests import (
    Counters,
    FlushCall,
    Loan,
    Patience,
    ReadRequest,
    Request,
    WriteRequest,
)
from vddkfs.engines.unflushed import Unflushed
from vddkfs.errors import EngineError, VddkfsError, WorkerFailed

log = logging.getLogger(__name__)

MAX_IN_FLIGHT: Final = 32
"""Requests sent and not answered; further ones wait here, where they can still be moved."""
POLL_SECONDS: Final = 80e-6
"""How long an answer is looked for before the task sleeps, while answers come this quickly."""
MOST_DOUBTFUL: Final = 8
"""Failed reads of one process whose memory is kept out of use; then another process takes over."""
TICK: Final = 0.25
"""Seconds between looks at the deadlines while requests are under way."""


class Pending:
    """What was asked of a worker and is not answered.

    ``sock`` is the socket to the process that serves, or None while none does. ``useful`` is set
    when a process has answered something. *writes_late* says that the engine may still write to the
    memory of a read that it has answered with an error, or read that of a write, and loses what was
    not flushed: nothing else gets that memory before the process is gone.
    """

    def __init__(self, name: str, patience: Patience, *, writes_late: bool = False) -> None:
        self.name = name
        self.counters = Counters()
        self.last_errors: collections.deque[str] = collections.deque(maxlen=8)
        self.waiting: collections.deque[Request] = collections.deque()
        self.in_flight: dict[int, Request] = {}
        self.sock: socket.socket | None = None
        self.wanted = trio.Event()
        self.last_activity = trio.current_time()
        self.useful = False
        self._patience = patience
        self._writes_late = writes_late
        self._doubtful: list[Callable[[], None]] = []
        """To be called when the process is gone, which may write to what they free."""
        self._ids = itertools.count(1)
        self._quick = False
        self._refusal: VddkfsError | None = None
        self.trouble: EngineError | None = None
        """Why the process that serves has lost what it needs (its session, its server)."""
        self.troubled = trio.Event()
        self.excused = False
        """Set while a session of the server is waited for: nothing is given up for that."""
        self._excused_since = 0.0
        self.unflushed = Unflushed(keeps=writes_late)
        self.fence = Fence(name, patience)
        self._held_back: collections.deque[WriteRequest] = collections.deque()
        """Writes that wait until less is unflushed."""

    def __bool__(self) -> bool:
        return bool(self.in_flight or self.waiting)

    def oldest_age(self) -> float:
        """Seconds since the oldest request was first made; 0 without one."""
        born = [r.born for r in itertools.chain(self.in_flight.values(), self.waiting)]
        return trio.current_time() - min(born) if born else 0.0

    def note(self, text: str) -> None:
        """Remember *text* for status."""
        self.last_errors.append(f"{time.strftime('%H:%M:%S')} {text}")

    def submit(self, request: Request) -> None:
        """Send *request* now if the process may have it, else as soon as it may."""
        if self._refusal is not None:
            request.finish(self._refusal, b"", -1)
            return
        now = trio.current_time()
        request.born = now
        if request.writes and self._stopped(request):
            return
        if self.sock is None or len(self.in_flight) >= MAX_IN_FLIGHT or self.waiting:
            self.waiting.append(request)
            self.wanted.set()
        else:
            self._send(request, now)
            if len(self.in_flight) == 1:
                self.wanted.set()

    def _stopped(self, request: Request) -> bool:
        """Say whether *request* may not be sent (yet), and see to it then."""
        if self.fence.failure is not None:
            request.finish(self.fence.failure, b"", -1)
            return True
        if self.unflushed.full and isinstance(request, WriteRequest):
            self._held_back.append(request)
            return True
        return False

    def let_in(self) -> None:
        """Send what was held back: a flush has come to its end."""
        held, self._held_back = self._held_back, collections.deque()
        if held:
            self.waiting.extend(held)
            self.wanted.set()
            self.pump()

    def pump(self) -> None:
        """Send what waits, as far as the process may have it."""
        now = trio.current_time()
        while self.waiting and len(self.in_flight) < MAX_IN_FLIGHT and self.sock is not None:
            if not self._send(self.waiting.popleft(), now):
                break

    def _send(self, request: Request, now: float) -> bool:
        """Send *request*; if the socket is full, or its end gone, put it back and return False."""
        assert self.sock is not None
        request.id = next(self._ids)
        header, body = request.packet()
        request.sent = now
        budget = self._patience.retry_budget
        latest = request.born + (max(budget, request.timeout) if request.long else budget)
        request.deadline = min(now + request.timeout, max(latest, now + TICK))
        try:
            if body or request.fd >= 0:
                protocol.send(self.sock, header, body, fd=request.fd)
            else:
                self.sock.send(header)
        except OSError:
            # Answers make room, and the watch tries again; the end of the process is noticed by
            # the receiver.
            self.waiting.appendleft(request)
            return False
        self.in_flight[request.id] = request
        self.last_activity = now
        self.counters.requests += 1
        return True

    def poll(self) -> None:
        """Look for an answer for a moment, if nothing else is under way and the last came quickly.

        Waking this process costs more than the worker needs for a read that its kernel has in
        memory, so a short look saves a sleep; it never lasts when the disk is slow.
        """
        sock = self.sock
        if sock is None or len(self.in_flight) != 1 or not self._quick:
            return
        until = time.perf_counter() + POLL_SECONDS
        while self.in_flight and time.perf_counter() < until:
            if self.drain(sock, 1):
                return
            os.sched_yield()
        self._quick = False

    def drain(self, sock: socket.socket, most: int = MAX_IN_FLIGHT) -> int:
        """Take up to *most* answers that are there; return how many, or -1 at the socket's end."""
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
        if self.waiting:
            self.pump()
        return taken

    def _answer(self, packet: bytes, fd: int) -> None:
        _, _, _, status, request_id = protocol.REPLY.unpack_from(packet)
        request = self.in_flight.pop(request_id, None)
        if request is None:
            return
        now = trio.current_time()
        self.last_activity = now
        took = now - request.sent
        self._quick = took < 4 * POLL_SECONDS
        if isinstance(request, ReadRequest):
            self.counters.reads.observe(took)
        elif isinstance(request, WriteRequest):
            self.counters.writes.observe(took)
        if not status:
            self.useful = self.useful or not isinstance(request, Loan)
            request.finish(None, packet, fd)
            return
        self.counters.errors += 1
        error: VddkfsError = EngineError(os.strerror(status), errno=status)
        try:
            body = protocol.body_of(packet, protocol.REPLY.size, fd)
            error = protocol.decode_error(body, status)
        finally:
            self.note(str(error))
            if not self._asked_again(request, error, now):
                self.useful = True
                self._doubt(request, error)
                if isinstance(request, FlushCall):
                    self.fail_writes(error)
                request.finish(error, b"", -1)

    def _doubt(self, request: Request, error: VddkfsError) -> None:
        """Keep the memory of a failed request out of use, for as long as the process may use it.

        A process of which too much is kept is to be replaced.
        """
        if not self._writes_late or not isinstance(request, ReadRequest | WriteRequest):
            return
        _, free = request.move()
        self._doubtful.append(free)
        if len(self._doubtful) >= MOST_DOUBTFUL and isinstance(error, EngineError):
            self._give_up_process(error)

    def _give_up_process(self, error: EngineError) -> None:
        """Send nothing more to the process; whoever watches it ends it."""
        self.sock = None
        self.trouble = error
        self.troubled.set()

    def _asked_again(self, request: Request, error: VddkfsError, now: float) -> bool:
        """Keep *request* for another process, if *error* is one that a new connection may cure."""
        if not isinstance(error, EngineError) or not error.retry or not request.again:
            return False
        if request.losses >= request.most_losses:
            return False
        if error.retry != "busy" and now - request.born > self._patience.retry_budget:
            return False
        # As if it was not answered: it is sent again when the process is known to be gone.
        self.in_flight[request.id] = request
        self._give_up_process(error)
        return True

    def served_by(self, sock: socket.socket) -> None:
        """Send to the process behind *sock* from now on."""
        self.trouble = None
        self.troubled = trio.Event()
        self.charge()
        self.sock = sock

    def excuse(self, since: float) -> None:
        """Give nothing up until ``charge``: a session of the server is waited for *since* then."""
        if not self.excused:
            self.excused = True
            self._excused_since = since

    def charge(self) -> None:
        """Let the budget go on, without what was excused of it."""
        if self.excused:
            self.excused = False
            now = trio.current_time()
            for request in [*self.waiting, *self.in_flight.values()]:
                request.born += now - max(request.born, self._excused_since)

    @property
    def stuck(self) -> bool:
        """Whether the process has a request that two processes before it were lost with."""
        return any(request.losses >= 2 for request in self.in_flight.values())

    def overdue(self) -> bool:
        """Say whether the process has missed the deadline of a request."""
        now = trio.current_time()
        late = [request for request in self.in_flight.values() if request.deadline < now]
        for request in late:
            # What can be done without has others wait for a deadline once, and no more.
            if request.most_losses < math.inf:
                request.losses = int(request.most_losses)
        return bool(late)

    def fail_writes(self, error: VddkfsError) -> None:
        """Write nothing any more: what was written may be lost, as *error* says."""
        if self.fence.failure is not None:
            return
        self.fence.failure = error
        log.error("%s: nothing is written any more: %s", self.name, error)
        self.note(str(error))
        self.unflushed.clear()
        self.fence.settle()
        failed = [request for request in self.waiting if request.writes]
        failed += self._held_back
        self.waiting = collections.deque(r for r in self.waiting if not r.writes)
        self._held_back.clear()
        for request in failed:
            request.finish(error, b"", -1)

    def expire(self) -> None:
        """Give up what has waited longer than the retry budget, and writes earlier than that."""
        now = trio.current_time()
        late = self.fence.overdue(now, self.waiting, self.excused)
        if late is not None:
            late.cause = self.last_errors[-1] if self.last_errors else ""
            self.fail_writes(late)
        if self.excused:
            return
        waiting = list(self.waiting)
        self.waiting.clear()
        for request in waiting:
            if now - request.born > self._patience.retry_budget:
                self._give_up(request)
            else:
                self.waiting.append(request)

    def take_over(self, hanging: bool) -> list[Callable[[], None]]:
        """Queue what a lost process had again, the oldest first.

        *hanging* says that it could not be reaped, and may still write to its slots: requests get
        new ones, and what is returned is to be called when it is gone. Writes keep theirs.
        """
        now = trio.current_time()
        lost = list(self.in_flight.values())
        if hanging:
            self.fence.hang(now)
        if self.unflushed.at_risk or any(isinstance(request, WriteRequest) for request in lost):
            self.fence.doubt(now)
        self.in_flight.clear()
        freed, self._doubtful = self._doubtful, []
        if not hanging:
            for free in freed:
                free()
            freed = []
        again: list[Request] = []
        for request in lost:
            movable = True
            if hanging:
                movable, free = request.move()
                freed.append(free)
            if request.writes and self.fence.failure is not None:
                request.finish(self.fence.failure, b"", -1)
            elif movable and request.again and request.losses < request.most_losses:
                self.counters.resent += 1
                request.losses += 1
                again.append(request)
            else:
                self._give_up(request)
        # The next process is lent every chunk anew.
        waiting = [request for request in self.waiting if not isinstance(request, Loan)]
        self.waiting = collections.deque([*again, *waiting])
        self.expire()
        return freed

    def prepend(self, requests: Iterable[Request]) -> None:
        """Have *requests* sent before everything that waits."""
        self.waiting.extendleft(requests)

    def fail_all(self, error: VddkfsError) -> None:
        """End everything with *error*. The process may still write from the memory that it has."""
        for request in self.in_flight.values():
            if isinstance(request, WriteRequest):
                self._doubtful.append(request.move()[1])
        requests = [*self.in_flight.values(), *self.waiting, *self._held_back]
        self.in_flight.clear()
        self.waiting.clear()
        self._held_back.clear()
        for request in requests:
            request.finish(error, b"", -1)

    def refuse(self) -> None:
        """Fail everything that is asked, now and from now on: the mount is going down."""
        self._refusal = WorkerFailed("the mount is going down", errno=errno.EIO)
        self.fail_all(self._refusal)

    def _give_up(self, request: Request) -> None:
        if not request.again or request.losses >= request.most_losses:
            request.finish(WorkerFailed(f"{self.name}: the worker was lost"), b"", -1)
            return
        error = WorkerFailed(
            f"{self.name}: no answer within {self._patience.retry_budget:g} s",
            cause=self.last_errors[-1] if self.last_errors else "",
            errno=errno.EIO,
        )
        log.error("%s", error)
        request.finish(error, b"", -1)
        if isinstance(request, WriteRequest) and request.losses:
            # A process had it: half of it may be on the disk, or come late.
            self.fail_writes(error)
