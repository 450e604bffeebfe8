"""Reads without Python: the worker's loop in C (reads.c), and what it may begin by itself.

A read is *ordinary*, and never seen by Python, if its image is open and read asynchronously, if it
is one piece, fits into the window with nothing queued or refused before it, goes to a known place
in a known chunk, and needs no flush before it. Everything else comes back, packet for packet, and
is handled as without the module; so is an ordinary read that has failed.

One thread begins all reads, and while it is in Python none begins in C. So what C may do is looked
up anew before each stay there, and nothing has to be called off when an image is closed, opened
again or throttled. Whoever waits for the end of all reads asks the ``Flow``, which counts those of
C as well.
"""

import contextlib
import importlib
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from vddkfs.engines import protocol
from vddkfs.engines.base import SECTOR, Answer
from vddkfs.engines.histogram import Histogram
from vddkfs.engines.vddk.calls import PREFIX, CallStatistics
from vddkfs.engines.vddk.layouts import OpenFlag
from vddkfs.engines.vddk.reader import ImageReader
from vddkfs.engines.vddk.runtime import Runtime

SPIN_SECONDS: Final = 20e-6
"""How long the next request is looked for before sleeping, while they come this close together.

Less than the worker does itself: C is awake sooner than Python, and looking costs CPU.
"""

_READ_ASYNC: Final = PREFIX + "ReadAsync"
_FIGURES: Final = 3 + 64
_NEVER: Final = (1 << 63) - 1

Tick = Callable[[], float]


def receiver(
    runtime: Runtime, images: Sequence[ImageReader], sock: socket.socket, tick: Tick, answer: Answer
) -> "FastReads | None":
    """Return the loop for reads of *images*, None where only Python can serve them.

    *tick* does what is due and says in how many seconds to come again; *answer* is told of reads
    that C has not answered itself.
    """
    if not runtime.asynchronous or runtime.library.ledger.trace is not None:
        return None
    try:
        module: Any = importlib.import_module("vddkfs.engines.vddk._reads")
    except ImportError:
        return None
    return FastReads(module, runtime, images, sock, tick, answer)


class FastReads:
    """Implements ``Receiver``. For the worker's main thread."""

    def __init__(
        self,
        module: Any,
        runtime: Runtime,
        images: Sequence[ImageReader],
        sock: socket.socket,
        tick: Tick,
        answer: Answer,
    ) -> None:
        self._ffi: Any = module.ffi
        self._lib: Any = module.lib
        self._runtime = runtime
        self._tick = tick
        self._answer = answer
        self._reads: Any = self._lib.reads_new(
            sock.fileno(),
            runtime.woken,
            runtime.library.native.address_of("ReadAsync"),
            int(SPIN_SECONDS * 1e9),
            len(images),
        )
        if not self._reads:
            raise MemoryError
        self._packet: Any = self._ffi.new("uint8_t[]", protocol.MAX_PACKET)
        self._received: Any = self._ffi.new("struct received *")
        self._ended: Any = self._ffi.new("struct ended *")
        self._figures: Any = self._ffi.new("uint64_t[]", _FIGURES)
        self._chunks: dict[int, memoryview] = {}
        self._images = [
            FastImage(self._ffi, self._lib, self._reads, number, reader)
            for number, reader in enumerate(images)
        ]
        runtime.also_deferred = self._take_ended
        runtime.library.ledger.elsewhere = self._calls

    def close(self) -> None:
        """Answer nothing any more; nothing is under way."""
        self._lib.reads_close(self._reads)

    def lend(self, number: int, area: memoryview) -> None:
        """Let reads go to the chunk *number*, until ``take_back``, which no read is under way at.

        A chunk that C has no room for is read into by Python.
        """
        self._chunks[number] = area
        with self._ffi.from_buffer("uint8_t[]", area, require_writable=True) as start:
            address = int(self._ffi.cast("uintptr_t", start))
        self._lib.reads_lend(self._reads, number, address, len(area))

    def take_back(self, number: int) -> None:
        """End the loan of a chunk."""
        self._lib.reads_take_back(self._reads, number)
        self._chunks.pop(number, None)

    def next(self) -> tuple[bytes, int]:
        """Return the next packet that the worker has to see, and the descriptor with it (or -1).

        Serves reads and does what is due meanwhile. An empty packet: the daemon is gone. Raises
        GarbledMessage, OSError.
        """
        until = -1
        while True:
            for image in self._images:
                image.offer()
            what = self._lib.reads_next(
                self._reads, until, self._packet, protocol.MAX_PACKET, self._received
            )
            if what == self._lib.NEXT_PACKET:
                return self._take_packet()
            if what < 0:
                return _failed(-what)
            until = _nanoseconds(self._tick())

    def _take_packet(self) -> tuple[bytes, int]:
        received = self._received
        fd = int(received.fd)
        if received.cut:
            if fd >= 0:
                os.close(fd)
            raise protocol.GarbledMessage("it was cut short")
        return bytes(self._ffi.buffer(self._packet, received.length)), fd

    def _take_ended(self) -> None:
        """Take what C could not answer: reads that failed, and a socket that did not take it."""
        ended = self._ended
        while self._lib.reads_take_ended(self._reads, ended):
            self._end(ended)
        strays = self._lib.reads_strays(self._reads)
        if strays:
            self._runtime.library.messages.complain(
                f"VDDK completed {strays} reads that are not under way (any more)"
            )

    def _end(self, ended: Any) -> None:
        number = int(ended.id)
        if not ended.code:
            self._answer(number, None)
            return
        size = ended.count * SECTOR
        into = self._chunks[ended.chunk][ended.offset : ended.offset + size]
        image = self._images[ended.image]
        image.reader.take_failed(
            ended.sector, into, lambda error: self._answer(number, error), ended.code
        )

    # Figures.

    @property
    def count(self) -> int:
        """How many reads were begun in C and have ended."""
        return self._statistics().count

    def _calls(self) -> dict[str, CallStatistics]:
        found = self._statistics()
        return {_READ_ASYNC: found} if found.count else {}

    def _statistics(self) -> CallStatistics:
        self._lib.reads_figures(self._reads, self._figures)
        failures, moved, nanoseconds, *buckets = self._ffi.unpack(self._figures, _FIGURES)
        return CallStatistics(failures, moved, Histogram(buckets, nanoseconds / 1e9))


class FastImage:
    """One image's part of it. Implements ``Elsewhere`` for the image's reader."""

    def __init__(self, ffi: Any, lib: Any, reads: Any, number: int, reader: ImageReader) -> None:
        self.reader = reader
        self._lib = lib
        self._reads = reads
        self._number = number
        self._requests: Any = ffi.new("uint64_t *")
        self._bytes: Any = ffi.new("uint64_t *")
        reader.read_elsewhere(self)

    def offer(self) -> None:
        """Tell C how the image may be read as it is now."""
        reader, disk = self.reader, self.reader.disk
        room, piece, watch = reader.flow.offer()
        self._lib.reads_offer(
            self._reads,
            self._number,
            disk.handle.lent() if disk is not None else 0,
            room,
            piece,
            reader.buffered,
            disk is not None and OpenFlag.UNBUFFERED in disk.handle.flags,
            watch,
        )

    def under_way(self, watch: bool) -> tuple[int, int]:
        """Return how many requests are under way, and how many bytes; see ``Elsewhere``."""
        self._lib.reads_under_way(self._reads, self._number, watch, self._requests, self._bytes)
        return self._requests[0], self._bytes[0]

    def news(self) -> tuple[float, int]:
        """Return when one was under way last, and the bytes that came back since the last call."""
        moved = self._lib.reads_news(self._reads, self._number, self._bytes)
        return moved / 1e9, self._bytes[0]


def _failed(number: int) -> tuple[bytes, int]:
    """Return what a socket that failed is worth to the worker. Raises OSError."""
    with contextlib.suppress(ConnectionResetError):
        raise OSError(number, os.strerror(number))
    return b"", -1


def _nanoseconds(away: float) -> int:
    """Return the moment *away* seconds from now as C has it."""
    if away == math.inf:
        return _NEVER
    return time.monotonic_ns() + math.ceil(away * 1e9)
