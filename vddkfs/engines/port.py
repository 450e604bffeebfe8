"""What the cache and the disk ask of a worker, whichever process serves at the time.

``client.WorkerClient`` adds the processes to this. Everything here runs on the trio thread.
"""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import trio

from vddkfs.engines import protocol
from vddkfs.engines.base import EngineReport, LinkIdentity, MapSlice, Renewal
from vddkfs.engines.config import EngineConfig
from vddkfs.engines.pending import Pending
from vddkfs.engines.protocol import MapQuery, Op
from vddkfs.engines.requests import (
    Call,
    Loan,
    MapCall,
    Patience,
    ReadRequest,
    ReportCall,
    TakeBack,
)
from vddkfs.errors import VddkfsError, WorkerFailed

T = TypeVar("T")


class WorkerPort:
    """Requests of one worker, and the chunks that are lent to it."""

    def __init__(self, name: str, config: EngineConfig, patience: Patience) -> None:
        self.name = name
        self.config = config
        self._patience = patience
        self._pending = Pending(name, patience, writes_late=config.uses_library)
        self._chunks: dict[int, tuple[int, int]] = {}
        """What is lent: the memfd and its bytes, by number."""
        self._report: Call | None = None
        self._serving: trio.CancelScope | None = None
        """Cancelled to end the process that serves in good order."""
        self._hanging = 0
        """Processes that were killed and are not gone: they may still write to what was lent."""

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
            return await self.revalidate()
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
        return await self._answer(call, decode)

    async def _answer(self, call: Call, decode: Callable[[bytes], T]) -> T:
        body = await call.wait()
        try:
            return decode(body)
        except protocol.GARBLED as error:
            raise WorkerFailed(
                f"{self.name}: an answer of the worker makes no sense", cause=str(error)
            ) from error
