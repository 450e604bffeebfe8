"""How much of a disk is asked for at once: reads in pieces, and a window of bytes in flight.

The host keeps memory for each request of each client, a few dozen MiB in all, and refuses a request
that does not fit any more. A refusal halves the window and the pieces; what was refused is asked
for again, and each window that came back whole lets it grow a little. So several disks of one host
find their shares without knowing of one another.

Some requests are begun and ended elsewhere (see ``fast``), within the same window.

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


class Read:
    """A read that the daemon asked for; *left* counts its pieces that are not done."""

    __slots__ = ("done", "error", "left")

    def __init__(self, done: Done) -> None:
        self.done = done
        self.left = 0
        self.error: Exception | None = None


class Piece:
    """A part of a read that is one request to the library."""

    __slots__ = ("into", "pause", "read", "sector", "tries")

    def __init__(self, read: Read, sector: int, into: memoryview) -> None:
        self.read = read
        self.sector = sector
        self.into = into
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

    *wake* is called, from any thread, when ``pump`` has something to do, and when the last read
    that was waited for is done.
    """

    def __init__(self, issue: Callable[[Piece], None], wake: Wake) -> None:
        self._issue = issue
        self._wake = wake
        self._lock = threading.Lock()
        self._queue: deque[Piece] = deque()
        self._refused: list[tuple[float, Piece]] = []
        self._in_flight = 0
        self._requests = 0
        self._came_back = 0
        self.window = LARGEST_WINDOW
        self.piece = LARGEST_PIECE
        self.elsewhere: Elsewhere | None = None
        self.draining = False
        """Whether somebody waits for the end of all reads, and is to be woken by it."""

    @property
    def busy(self) -> bool:
        """Whether anything was asked for and is not done."""
        with self._lock:
            if self._requests or self._queue or self._refused:
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
            waiting = bool(self._queue)
            room = 0 if waiting or self._refused else max(0, self.window - self._in_flight)
            return room, self.piece, waiting or self.draining

    def adopt(self, sector: int, into: memoryview, done: Done) -> Piece:
        """Take over a request that has ended elsewhere, as if it had been begun here."""
        read = Read(done)
        read.left = 1
        with self._lock:
            self._in_flight += len(into)
            self._requests += 1
        return Piece(read, sector, into)

    def came_back(self, size: int) -> None:
        """Take the end of requests elsewhere."""
        with self._lock:
            self._grow(size)

    def start(self, sector: int, into: memoryview, done: Done) -> None:
        """Read from *sector* into *into* (whole sectors), and tell *done*."""
        read = Read(done)
        with self._lock:
            size = self.piece
            offsets = range(0, len(into), size)
            read.left = len(offsets)
            self._queue.extend(
                Piece(read, sector + offset // SECTOR, into[offset : offset + size])
                for offset in offsets
            )
        self.pump()

    def pump(self) -> None:
        """Issue what the window has room for."""
        while (piece := self._next()) is not None:
            try:
                self._issue(piece)
            except Exception as error:
                self.ended(piece, error)

    def _next(self) -> Piece | None:
        now = time.monotonic()
        with self._lock:
            if self._refused and self._refused[0][0] <= now:
                self._queue.appendleft(self._refused.pop(0)[1])
            if not self._queue:
                return None
            size = len(self._queue[0].into)
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
            self._grow(len(piece.into))
            read = piece.read
            read.left -= 1
            read.error = read.error or error
            last = read.left == 0
            wanted = bool(self._queue) or (self.draining and not self._requests)
        if last:
            read.done(read.error)
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
        offsets = range(0, len(piece.into), self.piece)
        piece.read.left += len(offsets) - 1
        return [
            Piece(piece.read, piece.sector + o // SECTOR, piece.into[o : o + self.piece])
            for o in offsets
        ]

    def _back(self, piece: Piece) -> None:
        self._in_flight -= len(piece.into)
        self._requests -= 1

    def _grow(self, size: int) -> None:
        if self.window >= LARGEST_WINDOW and self.piece >= LARGEST_PIECE:
            return
        self._came_back += size
        if self._came_back >= 8 * self.window:
            self._came_back = 0
            self.window = min(LARGEST_WINDOW, self.window + self.window // 2)
            self.piece = min(LARGEST_PIECE, self.piece * 2, self.window)
