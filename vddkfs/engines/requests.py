"""What is asked of a worker, as the daemon keeps it until the answer is there."""

import math
from collections.abc import Callable
from typing import Protocol

import trio

from vddkfs.engines import protocol
from vddkfs.engines.histogram import Histogram
from vddkfs.engines.protocol import Op
from vddkfs.errors import VddkfsError, WorkerFailed


class Target(Protocol):
    """Where the bytes of a read go, or those of a write are: *offset* bytes into a chunk that is
    lent to the worker."""

    chunk_number: int
    offset: int


Bytes = bytes | bytearray | memoryview
Moved = tuple[Target | None, Callable[[], None]]
"""A new target, or None where there is no memory for one; and what to call when nobody can write to
the old one any more."""
Done = Callable[[VddkfsError | None], None]
Held = Callable[[], Callable[[], None]]
"""Keeps a target's memory out of any other use, until what it returns is called."""


class Request:
    """One message to the worker that has an answer. *timeout* is in seconds from sending it.

    ``losses`` counts the processes that were lost while they had it.
    """

    __slots__ = ("born", "deadline", "id", "losses", "sent", "timeout")

    again = True
    """Whether it is sent to another process when the one that has it is lost."""
    most_losses = math.inf
    """How many processes may be lost with it before it is given up."""
    long = False
    """Whether one process may take all of the timeout for it, also where that is longer than the
    budget: to open a disk may take minutes."""
    writes = False
    """Whether it is of no use to a process that does not write: a write, or a flush."""

    def __init__(self, timeout: float) -> None:
        self.id = 0
        self.losses = 0
        self.timeout = timeout
        self.born = math.inf
        self.sent = math.inf
        self.deadline = math.inf

    @property
    def fd(self) -> int:
        """A file descriptor that goes along with the packet, or -1."""
        return -1

    def packet(self) -> tuple[bytes, bytes]:
        """Return header and body."""
        raise AssertionError("a request has a packet")

    def finish(self, error: VddkfsError | None, reply: bytes, fd: int) -> None:
        """Take the answer (or the error), once."""
        raise AssertionError("a request takes its answer")

    def move(self) -> tuple[bool, Callable[[], None]]:
        """Prepare to be sent again while the old worker may still write.

        Returns whether it can be, and what to call when that worker is gone.
        """
        return True, nothing


class ReadRequest(Request):
    """Read *count* sectors of *image* from *sector* into *target*; *done* is called with the
    result.
    """

    __slots__ = ("count", "direct", "done", "image", "moved", "sector", "target")

    def __init__(
        self,
        image: int,
        sector: int,
        count: int,
        target: Target,
        done: Done,
        moved: Callable[[], Moved],
        direct: bool = False,
    ) -> None:
        super().__init__(0.0)
        self.image = image
        self.sector = sector
        self.count = count
        self.target = target
        self.done = done
        self.moved = moved
        self.direct = direct

    def packet(self) -> tuple[bytes, bytes]:
        """Return the header; a read has no body."""
        target = self.target
        return protocol.REQUEST.pack(
            Op.READ,
            self.direct,
            self.image,
            self.count,
            self.id,
            self.sector,
            target.chunk_number,
            target.offset,
        ), b""

    def finish(self, error: VddkfsError | None, reply: bytes, fd: int) -> None:
        """Tell whoever wanted the data."""
        self.done(error)

    def move(self) -> tuple[bool, Callable[[], None]]:
        """Take a new target; without memory for one the request cannot be sent again."""
        target, freed = self.moved()
        if target is not None:
            self.target = target
        return target is not None, freed


class WriteRequest(Request):
    """Write *count* sectors to the base from *sector* on; *done* is called with the result, once.

    *target* holds the bytes, and belongs to the request until *done* is called. Where a process may
    still read it then (one that hangs, or a call that failed) *held* is called before: what that
    process writes late must not be something else. *data* are the same bytes, which may be kept
    longer, and must not change.
    """

    __slots__ = ("count", "data", "done", "held", "sector", "target", "written")

    writes = True

    def __init__(
        self, sector: int, count: int, target: Target, data: Bytes, done: Done, held: Held
    ) -> None:
        super().__init__(0.0)
        self.sector = sector
        self.count = count
        self.target = target
        self.data = data
        self.done = done
        self.held = held
        self.written: Callable[[WriteRequest], None] | None = None

    def packet(self) -> tuple[bytes, bytes]:
        """Return the header; the bytes are in the chunk."""
        target = self.target
        return protocol.REQUEST.pack(
            Op.WRITE,
            0,
            0,
            self.count,
            self.id,
            self.sector,
            target.chunk_number,
            target.offset,
        ), b""

    def finish(self, error: VddkfsError | None, reply: bytes, fd: int) -> None:
        """Tell whoever wrote; who wants to know of what was written hears of it first."""
        if error is None and self.written is not None:
            self.written(self)
        self.done(error)

    def move(self) -> tuple[bool, Callable[[], None]]:
        """Keep the slot as it is: it may be read late, but it is never written to."""
        return True, self.held()


class Loan(Request):
    """Lend the chunk *number*, a memfd of *size* bytes, to the worker. Each process is told."""

    __slots__ = ("_fd", "number", "size")

    again = False

    def __init__(self, timeout: float, number: int, fd: int, size: int) -> None:
        super().__init__(timeout)
        self.number = number
        self.size = size
        self._fd = fd

    @property
    def fd(self) -> int:
        """The memfd."""
        return self._fd

    def packet(self) -> tuple[bytes, bytes]:
        """Return the header."""
        header = protocol.request_header(Op.LEND, self.id, chunk=self.number, count=self.size)
        return header, b""

    def finish(self, error: VddkfsError | None, reply: bytes, fd: int) -> None:
        """Nobody waits for it: reads that are sent later find the chunk there."""


class Call(Request):
    """A message whose answer has a body; ``wait`` returns it."""

    __slots__ = ("_body", "_error", "_event", "_fields", "_op", "_reply")

    long = True

    def __init__(self, op: Op, timeout: float, body: bytes = b"", **fields: int) -> None:
        super().__init__(timeout)
        self._op = op
        self._fields = fields
        self._body = body
        self._event = trio.Event()
        self._error: VddkfsError | None = None
        self._reply = b""

    def packet(self) -> tuple[bytes, bytes]:
        """Return header and body."""
        return protocol.request_header(self._op, self.id, **self._fields), self._body

    def finish(self, error: VddkfsError | None, reply: bytes, fd: int) -> None:
        """Keep the answer for ``wait``."""
        self._error = error
        if error is None:
            try:
                self._reply = protocol.body_of(reply, protocol.REPLY.size, fd)
            except protocol.GARBLED as problem:
                self._error = WorkerFailed(f"an answer of the worker makes no sense: {problem}")
        self._event.set()

    async def wait(self) -> bytes:
        """Return the answer's body. Raises the worker's error. Cancellation abandons the answer."""
        await self._event.wait()
        if self._error is not None:
            raise self._error
        return self._reply


class FlushCall(Call):
    """Have all writes that were answered on the disk; *flushed* is told when they are, or why not.

    It does not say whether those are lost: see ``Pending.fail_writes``.
    """

    __slots__ = ("_flushed",)

    writes = True

    def __init__(self, timeout: float, flushed: Done) -> None:
        super().__init__(Op.FLUSH, timeout)
        self._flushed = flushed

    def finish(self, error: VddkfsError | None, reply: bytes, fd: int) -> None:
        """Tell whoever keeps what is not flushed, then whoever waits."""
        self._flushed(error)
        super().finish(error, reply, fd)


class ReportCall(Call):
    """A question to the process that serves about itself: no other can answer it."""

    __slots__ = ()

    again = False


class MapCall(Call):
    """A question for a part of an allocation map, which a disk can be read without."""

    __slots__ = ()

    long = False

    most_losses = 3


class TakeBack(Call):
    """End the loan of chunk *number*. A process that is lost has ended it by itself."""

    __slots__ = ()

    again = False

    def __init__(self, timeout: float, number: int) -> None:
        super().__init__(Op.TAKE_BACK, timeout, chunk=number)


class Patience:
    """How long to wait for a worker, in seconds.

    *fence_timeout*: for the proof that a lost process writes nothing any more, while it is open
    whether what it had is written.
    """

    __slots__ = ("fence_timeout", "idle_timeout", "op_timeout", "open_timeout", "retry_budget")

    def __init__(
        self,
        op_timeout: float = 60.0,
        open_timeout: float = 300.0,
        retry_budget: float = 100.0,
        idle_timeout: float = 900.0,
        fence_timeout: float = 30.0,
    ) -> None:
        self.op_timeout = op_timeout
        self.open_timeout = open_timeout
        self.retry_budget = retry_budget
        self.idle_timeout = idle_timeout
        self.fence_timeout = fence_timeout


class Counters:
    """What happened to a worker since the mount began, for status and metrics.

    ``reads`` has the times from sending each read to its answer, whatever that was; ``writes``
    those of writes. ``rewritten`` counts the writes that were answered, and sent once more.
    """

    __slots__ = (
        "errors",
        "reads",
        "requests",
        "resent",
        "restarts",
        "rewritten",
        "starts",
        "writes",
    )

    def __init__(self) -> None:
        self.starts = 0
        self.restarts = 0
        self.requests = 0
        self.resent = 0
        self.errors = 0
        self.rewritten = 0
        self.reads = Histogram()
        self.writes = Histogram()


def nothing() -> None:
    """Nothing has to be freed for a request without a target."""
