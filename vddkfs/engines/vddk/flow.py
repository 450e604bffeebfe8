"""How much of a disk is asked for at once: requests in pieces, and a window of bytes in flight.

The host keeps memory for each request of each client, a few dozen MiB in all, and refuses a request
that does not fit any more. A refusal halves the window and the pieces; what was refused is asked
for again, and each window that came back whole lets it grow a little. So several disks of one host
find their shares without knowing of one another.

Writes take the same way as reads, in the order in which they come: the host's memory is one. What
must find nothing under way (a flush) has its turn before anything else is begun.

Some reads are begun and ended elsewhere (see ``fast``), within the same window.

Threads: ``start``, ``pump`` and ``due`` belong to the worker's main thread, which alone may begin a
request, here or elsewhere; ``ended`` may come on any. Units: bytes, sectors where a name says so,
seconds.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from vddkfs.engines.base import SECTOR, Done

LARGEST_PIECE: Final = 2 * 1024 * 1024
"""What the vendor advises as the most for requests that others run beside."""
SMALLEST_PIECE: Final = 64 * 1024
LARGEST_WINDOW: Final = 32 * 1024 * 1024
PAUSE: Final = 0.05
"""Seconds before a refused piece is asked for again; each further refusal doubles that."""
LONGEST_PAUSE: Final = 2.0

Wake = Callable[[], None]


class Request:
    """What the daemon asked for; *left* counts its pieces that are not done."""

    __slots__ = ("done", "error", "left")

    def __init__(self, done: Done) -> None:
        self.done = done
        self.left = 0
        self.error: Exception | None = None


class Piece:
    """A part of a request, which is one of the library's: *memory* is read into, or written from.

    It is the library's until the end of the piece, and of no use to anybody after a failure.
    """

    __slots__ = ("memory", "pause", "request", "sector", "tries", "writes")

    def __init__(self, request: Request, sector: int, memory: memoryview, writes: bool) -> None:
        self.request = request
        self.sector = sector
        self.memory = memory
        self.writes = writes
        self.pause = 0.0
        self.tries = 0


class Elsewhere(Protocol):
    """Who begins requests of the same handle by itself, as far as ``Flow.offer`` allows."""

    def under_way(self, watch: bool) -> tuple[int, int]:
        """Return how many requests are under way, and how many bytes they are.

        *watch*: each that ends after this wakes the main thread, until the next offer.
        """

    def news(self) -> tuple[float, int]:
        """Return when one was under way last (time.monotonic), and the bytes since the last call.

        The bytes are those that came back without an error.
        """


class Flow:
    """The window of one handle. *issue* begins a piece; it may call ``ended`` before it returns.

    *wake* is called, from any thread, when ``pump`` has something to do, and when the last request
    that was waited for is done.
    """

    def __init__(self, issue: Callable[[Piece], None], wake: Wake) -> None:
        self._issue = issue
        self._wake = wake
        self._lock = threading.Lock()
        self._queue: deque[Piece] = deque()
        self._still: list[Callable[[], None]] = []
        self._refused: list[tuple[float, Piece]] = []
        self._in_flight = 0
        self._requests = 0
        self._came_back = 0
        self.window = LARGEST_WINDOW
        self.piece = LARGEST_PIECE
        self.elsewhere: Elsewhere | None = None
        self.draining = False
        """Whether somebody waits for the end of all requests, and is to be woken by it."""

    @property
    def busy(self) -> bool:
        """Whether anything was asked for and is not done."""
        with self._lock:
            if self._requests or self._queue or self._refused or self._still:
                return True
            return self._elsewhere(self.draining)[0] > 0

    def _elsewhere(self, watch: bool) -> tuple[int, int]:
        return self.elsewhere.under_way(watch) if self.elsewhere is not None else (0, 0)

    def offer(self) -> tuple[int, int, bool]:
        """Return how many bytes may be under way elsewhere, in requests of how many at most.

        None while pieces wait: none overtakes them. And whether requests that end elsewhere are
        waited for. It holds until the main thread begins something here.
        """
        with self._lock:
            waiting = bool(self._queue or self._still)
            room = 0 if waiting or self._refused else max(0, self.window - self._in_flight)
            return room, self.piece, waiting or self.draining

    def adopt(self, sector: int, into: memoryview, done: Done) -> Piece:
        """Take over a read that has ended elsewhere, as if it had been begun here."""
        request = Request(done)
        request.left = 1
        with self._lock:
            self._in_flight += len(into)
            self._requests += 1
        return Piece(request, sector, into, False)

    def came_back(self, size: int) -> None:
        """Take the end of requests elsewhere."""
        with self._lock:
            self._grow(size)

    def start(self, sector: int, memory: memoryview, done: Done, *, writes: bool = False) -> None:
        """Read from *sector* into *memory* (whole sectors), or write it there, and tell *done*."""
        request = Request(done)
        with self._lock:
            size = self.piece
            offsets = range(0, len(memory), size)
            request.left = len(offsets)
            self._queue.extend(
                Piece(request, sector + offset // SECTOR, memory[offset : offset + size], writes)
                for offset in offsets
            )
        self.pump()

    def when_still(self, work: Callable[[], None]) -> None:
        """Do *work*, on the main thread, as soon as nothing is under way; nothing begins before."""
        with self._lock:
            self._still.append(work)
        self.pump()

    def pump(self) -> None:
        """Issue what the window has room for."""
        for work in self._take_still():
            work()
        while (piece := self._next()) is not None:
            try:
                self._issue(piece)
            except Exception as error:
                self.ended(piece, error)

    def _take_still(self) -> list[Callable[[], None]]:
        with self._lock:
            if not self._still or self._requests or self._elsewhere(watch=True)[0]:
                return []
            taken, self._still = self._still, []
            return taken

    def _next(self) -> Piece | None:
        now = time.monotonic()
        with self._lock:
            if self._still:
                return None
            if self._refused and self._refused[0][0] <= now:
                self._queue.appendleft(self._refused.pop(0)[1])
            if not self._queue:
                return None
            size = len(self._queue[0].memory)
            requests, others = self._elsewhere(watch=True)
            # One request always goes out, however small the window has become.
            if self._requests + requests and self._in_flight + others + size > self.window:
                return None
            self._in_flight += size
            self._requests += 1
            return self._queue.popleft()

    def due(self) -> float:
        """Return in how many seconds ``pump`` is to be called, inf for not at all."""
        with self._lock:
            if not self._refused:
                return float("inf")
            return max(0.0, self._refused[0][0] - time.monotonic())

    def ended(self, piece: Piece, error: Exception | None) -> None:
        """Take the end of a piece's request."""
        with self._lock:
            self._back(piece)
            self._grow(len(piece.memory))
            request = piece.request
            request.left -= 1
            request.error = request.error or error
            last = request.left == 0
            waited_for = self.draining or bool(self._still)
            wanted = bool(self._queue) or (waited_for and not self._requests)
        if last:
            request.done(request.error)
        if wanted:
            self._wake()

    def refused(self, piece: Piece) -> None:
        """Have a piece that the host had no memory for asked for again after a pause."""
        with self._lock:
            self._back(piece)
            self.window = max(SMALLEST_PIECE, self.window // 2)
            self.piece = max(SMALLEST_PIECE, self.piece // 2)
            self._came_back = 0
            pause = min(LONGEST_PAUSE, piece.pause * 2 or PAUSE)
            at = time.monotonic() + pause
            for part in self._parts(piece):
                part.pause = pause
                part.tries = piece.tries + 1
                self._refused.append((at, part))
            self._refused.sort(key=lambda entry: entry[0])
        self._wake()

    def _parts(self, piece: Piece) -> list[Piece]:
        """Cut *piece* to what pieces are now."""
        memory, size = piece.memory, self.piece
        offsets = range(0, len(memory), size)
        piece.request.left += len(offsets) - 1
        return [
            Piece(piece.request, piece.sector + o // SECTOR, memory[o : o + size], piece.writes)
            for o in offsets
        ]

    def _back(self, piece: Piece) -> None:
        self._in_flight -= len(piece.memory)
        self._requests -= 1

    def _grow(self, size: int) -> None:
        if self.window >= LARGEST_WINDOW and self.piece >= LARGEST_PIECE:
            return
        self._came_back += size
        if self._came_back >= 8 * self.window:
            self._came_back = 0
            self.window = min(LARGEST_WINDOW, self.window + self.window // 2)
            self.piece = min(LARGEST_PIECE, self.piece * 2, self.window)
