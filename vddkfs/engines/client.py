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

import contextlib
import logging
import math
import shutil
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeVar

import trio

from vddkfs.engines import protocol
from vddkfs.engines.base import CallCount, LinkIdentity, MapSlice
from vddkfs.engines.config import EngineConfig, VddkConfig
from vddkfs.engines.pending import TICK, Pending
from vddkfs.engines.process import Process, WorkerProcess
from vddkfs.engines.protocol import MapQuery, Op
from vddkfs.engines.requests import Call, Counters, Loan, Patience, ReadRequest, TakeBack
from vddkfs.errors import EngineError, VddkfsError, WorkerFailed

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BACKOFF: Final = 5.0
LONG_BACKOFF: Final = 20.0
"""Seconds between tries while a host says that it is not to be had for a while."""
_LOST: Final = "ended unexpectedly"
_IDLE: Final = "idle"
_REFUSED: Final = "refused"
_BUSY: Final = "busy"
_NO_LOSS: Final = (_IDLE, _REFUSED, _BUSY)
"""Why a process is of no more use; all but the first are no losses."""


class WorkerClient:
    """One worker and its supervisor.

    *opened* is called with the identities of the chain each time a process has opened it, before
    any request is sent to that process; what it raises fails the requests that wait. *secret* is a
    descriptor with the credentials, which each process is given and this one never reads.
    """

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        patience: Patience,
        opened: Callable[[tuple[LinkIdentity, ...]], None],
        start: Callable[[str], Process] = WorkerProcess,
        *,
        secret: int = -1,
    ) -> None:
        self.name = name
        self.config = config
        self._secret = secret
        self._pending = Pending(name, patience, writes_late=isinstance(config, VddkConfig))
        self._patience = patience
        self._opened = opened
        self._start = start
        self._chunks: dict[int, tuple[int, int]] = {}
        """What is lent: the memfd and its bytes, by number."""
        self._process: Process | None = None
        self._backoff = 0.0
        self._serving: trio.CancelScope | None = None
        self._hanging = 0
        self._stopping = False
        self._patiently = False
        self._reaper: trio.Nursery | None = None

    @property
    def counters(self) -> Counters:
        """What happened since the mount began."""
        return self._pending.counters

    @property
    def last_errors(self) -> Sequence[str]:
        """The last errors, with the time of day."""
        return self._pending.last_errors

    @property
    def pid(self) -> int | None:
        """The process id, or None while no process runs."""
        return self._process.pid if self._process is not None else None

    @property
    def in_flight(self) -> int:
        """Requests that the process has and has not answered."""
        return len(self._pending.in_flight)

    @property
    def queued(self) -> int:
        """Requests that wait to be sent."""
        return len(self._pending.waiting)

    @property
    def state(self) -> str:
        """What the worker is doing: "serving", "starting" or "not running"."""
        if self._pending.sock is not None:
            return "serving"
        return "starting" if self._process is not None else "not running"

    @property
    def ends_gently(self) -> bool:
        """Whether even a process that is given up gets the chance to end in good order.

        Disks that it attached to this machine would stay attached.
        """
        return isinstance(self.config, VddkConfig) and self.config.hot_adds

    def stop(self) -> None:
        """Have ``run``, when it is cancelled, end the process in good order and not by force."""
        self._stopping = True

    def refuse(self) -> None:
        """Fail everything that is asked, now and from now on: the mount is going down."""
        self._pending.refuse()

    def oldest_age(self) -> float:
        """Seconds since the oldest unanswered request was first made; 0 without one."""
        return self._pending.oldest_age()

    # What the cache asks.

    def submit_read(self, request: ReadRequest) -> None:
        """Have *request* done: now if a process serves, else as soon as one does."""
        request.timeout = self._patience.op_timeout
        self._pending.submit(request)

    def poll(self) -> None:
        """Look for an answer for a moment, if answers come quickly."""
        self._pending.poll()

    def lend(self, number: int, fd: int, size: int) -> None:
        """Let the worker, now and after every restart, use a chunk of *size* bytes."""
        self._chunks[number] = (fd, size)
        if self._pending.sock is not None:
            self._pending.submit(self._loan(number))

    async def take_back(self, number: int) -> bool:
        """End a loan. False: the worker did not answer in time, and the loan goes on."""
        if self._hanging:
            return False
        if self._pending.sock is None:
            del self._chunks[number]
            return True
        call = TakeBack(self._patience.op_timeout, number)
        self._pending.submit(call)
        with trio.move_on_after(1.0), contextlib.suppress(VddkfsError):
            await call.wait()
            del self._chunks[number]
            return not self._hanging
        if call in self._pending.waiting:
            self._pending.waiting.remove(call)
            return False
        # It may still come to take the message: lend the chunk again behind it.
        if self._pending.sock is not None:
            self._pending.submit(self._loan(number))
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
        """Have the worker look at its images again; return their identities as they are now.

        What it keeps of a live link (tables, a handle) is dropped.
        """
        call = Call(Op.REVALIDATE, self._patience.op_timeout)
        return await self._ask(call, protocol.decode_identities)

    async def statistics(self) -> tuple[CallCount, ...]:
        """Return what the library's functions did in the process that serves, () if none does.

        Raises VddkfsError.
        """
        if self._pending.sock is None:
            return ()
        call = Call(Op.STATISTICS, self._patience.op_timeout)
        return await self._ask(call, protocol.decode_statistics)

    async def reopen(self) -> tuple[LinkIdentity, ...]:
        """Have the chain opened anew, and return what it is now.

        Raises the engine's error; the process, which has no chain then, is given up in good order.
        """
        call = Call(Op.OPEN, self._patience.open_timeout, protocol.encode(self.config))
        try:
            return await self._ask(call, protocol.decode_identities)
        except VddkfsError:
            self._pending.sock = None
            if self._serving is not None:
                self._serving.cancel()
            raise

    async def _ask(self, call: Call, decode: Callable[[bytes], T]) -> T:
        self._pending.submit(call)
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
                    if not self._pending.useful:
                        await self._back_off()
                    await self._one_process()
            finally:
                self.refuse()
                self._empty_folder()

    def _empty_folder(self) -> None:
        """Remove what processes that ended badly have left; a good end removes it by itself.

        Where disks may still be attached to this machine, it is needed to take them away.
        """
        if isinstance(self.config, VddkConfig) and not self.config.hot_adds:
            shutil.rmtree(self.config.tmp_directory, ignore_errors=True)

    async def _back_off(self) -> None:
        """Wait before the next process; what waits too long for it is given up meanwhile."""
        until = trio.current_time() + self._backoff
        while self._pending.waiting and (left := until - trio.current_time()) > 0:
            await trio.sleep(min(left, TICK))
            self._pending.expire()

    async def _until_wanted(self) -> None:
        pending = self._pending
        while not pending.waiting:
            pending.wanted = trio.Event()
            await pending.wanted.wait()

    async def _one_process(self) -> None:
        """Start a process, serve with it, and clean up after it."""
        try:
            self._process = process = self._start(self.name)
        except OSError as error:
            self._lost(f"cannot be started: {error}")
            self._pending.take_over(hanging=False)
            return
        self.counters.starts += 1
        reason = _LOST
        try:
            reason = await self._serve(process)
        except VddkfsError as error:
            self._pending.note(str(error))
            retry = error.retry if isinstance(error, EngineError) else ""
            if retry == "busy":
                reason = _BUSY
                self._pending.excused = True
                self._pending.useful, self._backoff = False, TICK
            elif retry:
                reason = f"cannot open the disk: {error}"
                self._patiently = retry == "later"
            else:
                reason = _REFUSED
                self._pending.fail_all(error)
        finally:
            self._pending.sock = None
            self._process = None
            with trio.CancelScope(shield=True):
                orderly = reason in _NO_LOSS or self._stopping or self.ends_gently
                reaped = await process.end(kill=not orderly)
        if reason not in _NO_LOSS:
            self.counters.restarts += 1
            self._lost(reason)
        freed = self._pending.take_over(hanging=not reaped)
        if not reaped and self._reaper is not None:
            self._hanging += 1
            log.error("worker of %s (pid %d) cannot be killed", self.name, process.pid)
            self._reaper.start_soon(self._reap_later, process, freed)

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
                self._pending.served_by(process.sock)
                self._serving = nursery.cancel_scope
                self._pending.prepend(self._loan(number) for number in self._chunks)
                self._pending.pump()

                async def until(wait: Callable[[], Awaitable[str]]) -> None:
                    nonlocal reason
                    reason = await wait()
                    # At once, so that nothing more is sent to a process that is given up.
                    self._pending.sock = None
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until, lambda: self._receive(process.sock))
                nursery.start_soon(until, self._watch)
                nursery.start_soon(until, self._until_trouble)
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
            protocol.send(sock, header, protocol.encode(self.config), fd=self._secret)
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
            if self._pending.drain(sock) < 0:
                return _LOST

    async def _until_trouble(self) -> str:
        """Return when the worker says that it has lost its connection."""
        await self._pending.troubled.wait()
        error = self._pending.trouble
        self._patiently = error is not None and error.retry == "later"
        return f"lost its connection: {error}"

    async def _watch(self) -> str:
        """Return when a deadline is missed, or when the worker was idle for long."""
        while True:
            if self._pending:
                await trio.sleep(TICK)
                if self._pending.overdue():
                    return f"did not answer within {self._patience.op_timeout:g} s"
                self._pending.pump()
            elif await self._idle_too_long():
                return _IDLE

    async def _idle_too_long(self) -> bool:
        """Sleep until there is something to do; say whether that took longer than it may."""
        pending = self._pending
        until = pending.last_activity + self._patience.idle_timeout
        pending.wanted = trio.Event()
        with trio.move_on_at(until):
            await pending.wanted.wait()
        return not pending and trio.current_time() >= until

    async def _mind_budget(self) -> None:
        """Give up what waits too long for a process that does not get ready."""
        while self._pending.sock is None:
            await trio.sleep(TICK)
            self._pending.expire()

    def _lost(self, reason: str) -> None:
        """Tell the loss of a process, and wait longer before the next if it repeats."""
        if self._stopping:
            return
        log.warning("worker of %s: it %s; another takes over", self.name, reason)
        self._pending.note("the worker " + reason)
        series = self._backoff if not self._pending.useful else 0.0
        self._pending.useful = False
        self._backoff = min(MAX_BACKOFF, 2 * series) if series else 0.02
        if self._patiently:
            self._backoff = LONG_BACKOFF
            self._patiently = False

    async def _reap_later(self, process: Process, freed: Iterable[Callable[[], None]]) -> None:
        await process.reap(math.inf)
        self._hanging -= 1
        for free in freed:
            free()
