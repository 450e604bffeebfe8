"""What the cache and the disk ask of a worker, whichever process serves at the time.

``client.WorkerClient`` adds the processes to this. Everything here runs on the trio thread.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio

from vddkfs.engines import protocol
from vddkfs.engines.base import EngineReport, LinkIdentity, MapSlice, Renewal
from vddkfs.engines.config import EngineConfig, read_only, settled
from vddkfs.engines.pending import Pending
from vddkfs.engines.protocol import MapQuery, Op
from vddkfs.engines.requests import (
    Call,
    Counters,
    FlushCall,
    Loan,
    MapCall,
    Patience,
    ReadRequest,
    ReportCall,
    TakeBack,
    WriteRequest,
)
from vddkfs.errors import VddkfsError, WorkerFailed

T = TypeVar("T")


class WorkerPort:
    """Requests of one worker, and the chunks that are lent to it."""

    def __init__(self, name: str, config: EngineConfig, patience: Patience) -> None:
        self.name = name
        self.config = settled(config)
        self._patience = patience
        self._pending = Pending(name, patience, writes_late=config.uses_library)
        self._chunks: dict[int, tuple[int, int]] = {}
        """What is lent: the memfd and its bytes, by number."""
        self._report: Call | None = None
        self._serving: trio.CancelScope | None = None
        """Cancelled to end the process that serves in good order."""
        self._hanging = 0
        """Processes that were killed and are not gone: they may still write to what was lent."""
        self._base: LinkIdentity | None = None
        """What the last process that could write has opened at the bottom."""
        self._flushing = False

    @property
    def write_failure(self) -> VddkfsError | None:
        """Why nothing is written any more, None while all is well. It stays.

        What was written since the last good flush may be lost then. Reads go on, by processes that
        open the disk for reading alone.
        """
        return self._pending.fence.failure

    @property
    def _config_now(self) -> EngineConfig:
        """What the next process opens."""
        return read_only(self.config) if self.write_failure is not None else self.config

    # What status tells.

    @property
    def counters(self) -> Counters:
        """What happened since the mount began."""
        return self._pending.counters

    @property
    def last_errors(self) -> Sequence[str]:
        """The last errors, with the time of day."""
        return self._pending.last_errors

    @property
    def in_flight(self) -> int:
        """Requests that the process has and has not answered."""
        return len(self._pending.in_flight)

    @property
    def queued(self) -> int:
        """Requests that wait to be sent."""
        return len(self._pending.waiting)

    def oldest_age(self) -> float:
        """Seconds since the oldest unanswered request was first made; 0 without one."""
        return self._pending.oldest_age()

    # What the cache asks.

    def submit_read(self, request: ReadRequest) -> None:
        """Have *request* done: now if a process serves, else as soon as one does."""
        request.timeout = self._patience.op_timeout
        self._pending.submit(request)

    def submit_write(self, request: WriteRequest) -> None:
        """Have *request* done, as ``submit_read`` does; the config must say that this writes.

        It must not overlap a write that is not answered. It ends with an error if the worker says
        so, when ``write_failure`` is set, and where it is the first whose loss is told by that: its
        range has old or new content then, sector by sector.
        """
        request.timeout = self._patience.op_timeout
        request.written = self._written
        self._pending.submit(request)

    def _written(self, request: WriteRequest) -> None:
        if self.write_failure is not None:
            return
        unflushed = self._pending.unflushed
        unflushed.add(request.sector, request.data)
        if unflushed.much:
            self._flush_behind()

    async def flush(self) -> None:
        """Return when all writes that were answered before are on the disk.

        Raises what stopped it. If ``write_failure`` is set by then, writes may be lost, and every
        flush raises that; otherwise (the mount goes down, no process within the budget) what is not
        flushed is still kept, and another flush may succeed. Cancellation abandons the answer.
        """
        if self.write_failure is not None:
            raise self.write_failure
        if self._pending.unflushed.dirty:
            call = self._flush_call()
            self._pending.submit(call)
            await call.wait()

    def _flush_call(self) -> FlushCall:
        # A disk may have minutes of writes to do, and for as long a process cannot be ended: the
        # kernel is not to be hurried. Whether it hangs is seen by the reads and writes beside.
        seconds = self._patience.open_timeout if self.config.uses_library else math.inf
        mark = self._pending.unflushed.mark()
        return FlushCall(seconds, lambda error: self._flushed(mark, error))

    def _flushed(self, mark: int, error: VddkfsError | None) -> None:
        self._flushing = False
        if error is None:
            self._pending.unflushed.flushed(mark)
        self._pending.let_in()

    def _flush_behind(self) -> None:
        """Flush though nobody asked, unless a flush is under way."""
        if not self._flushing:
            self._flushing = True
            self._pending.submit(self._flush_call())

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
            if self._hanging:
                self._pending.submit(self._loan(number))
                return False
            del self._chunks[number]
            return True
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
        call = MapCall(Op.MAP, self._patience.op_timeout, body, image=image, sector=sector)
        return await self._ask(call, protocol.decode_map)

    async def revalidate(self) -> tuple[LinkIdentity, ...]:
        """Have the worker look at its images again; return their identities as they are now.

        What it keeps of a live link (tables, a handle) is dropped.
        """
        call = Call(Op.REVALIDATE, self._opening_seconds)
        return await self._ask(call, protocol.decode_identities)

    async def renew(self) -> Renewal:
        """Have the worker know nothing of before; return what its images are now, and the steps.

        No read that is asked for later brings anything older than this call, but for what the steps
        say is not done. Raises VddkfsError.
        """
        return await self._ask(Call(Op.RENEW, self._opening_seconds), protocol.decode_renewal)

    @property
    def _opening_seconds(self) -> float:
        """How long a call may take for which a remote disk may have to be opened anew."""
        patience = self._patience
        return patience.open_timeout if self.config.uses_library else patience.op_timeout

    async def report(self) -> EngineReport:
        """Return what the engine tells of itself, nothing if no process serves.

        A process that does not answer is asked once, however many want to know. Raises VddkfsError.
        """
        call = self._report
        if call is None:
            if self._pending.sock is None:
                return EngineReport()
            call = self._report = ReportCall(Op.REPORT, self._patience.op_timeout)
            self._pending.submit(call)
        try:
            report = await self._answer(call, protocol.decode_report)
        except VddkfsError:
            self._report = None
            raise
        self._report = None
        return report

    async def reopen(self) -> tuple[LinkIdentity, ...]:
        """Have the chain opened anew, and return what it is now.

        Raises the engine's error; the process, which has no chain then, is given up in good order.
        VMware's library begins only once in a process: there a look opens anew what has changed.
        """
        if self.config.uses_library:
            found = await self.revalidate()
            self._base = found[0] if found else None
            return found
        if self._pending.unflushed.dirty:
            # The kernel tells of a loss once: at the close, where none who wrote would hear of it.
            with contextlib.suppress(VddkfsError):
                await self.flush()
        call = Call(Op.OPEN, self._patience.open_timeout, protocol.encode(self._config_now))
        try:
            found = await self._ask(call, protocol.decode_identities)
            self._base = found[0]
            return found
        except VddkfsError:
            self._pending.sock = None
            if self._serving is not None:
                self._serving.cancel()
            raise

    async def _ask(self, call: Call, decode: Callable[[bytes], T]) -> T:
        self._pending.submit(call)
        return await self._answer(call, decode)

    async def _answer(self, call: Call, decode: Callable[[bytes], T]) -> T:
        body = await call.wait()
        try:
            return decode(body)
        except protocol.GARBLED as error:
            raise WorkerFailed(
                f"{self.name}: an answer of the worker makes no sense", cause=str(error)
            ) from error
