"""Reads of an engine that waits for its disk: at once where nothing has to be waited for, else on a
small pool of threads, so that several are under way and none stops the others. Writes and flushes
wait always.
"""

import math
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from vddkfs.engines.base import (
    Answer,
    BlockingEngine,
    Done,
    EngineReport,
    LinkIdentity,
    MapSlice,
    Receiver,
    Renewal,
)
from vddkfs.errors import VddkfsError

_Job = tuple[Callable[..., None], tuple[Any, ...], Done]


class PooledEngine:
    """Makes an ``AsyncEngine`` of a ``BlockingEngine``. Threads are started as they are needed."""

    def __init__(self, engine: BlockingEngine) -> None:
        self._engine = engine
        self._most = engine.threads
        self._queue: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Condition()
        self._threads = 0
        self._busy = 0
        self._flushes = 0

    def start_read(
        self, image: int, sector: int, count: int, into: memoryview, direct: bool, done: Done
    ) -> None:
        """Read at once if that needs no waiting, else have a thread do it."""
        try:
            at_once = self._engine.read_nowait(image, sector, count, into, direct)
        except (VddkfsError, ValueError) as error:
            done(error)
            return
        if at_once:
            done(None)
            return
        self._start(self._engine.read, (image, sector, count, into, direct), done)

    def start_write(self, sector: int, data: memoryview, done: Done) -> None:
        """Have a thread write."""
        self._start(self._engine.write, (sector, data), done)

    def start_flush(self, done: Done) -> None:
        """Have a thread flush what was written until now."""
        with self._lock:
            self._flushes += 1
        self._start(self._flush, (), done)

    def _flush(self) -> None:
        try:
            self._engine.flush()
        finally:
            with self._lock:
                self._flushes -= 1

    def _start(self, call: Callable[..., None], arguments: tuple[Any, ...], done: Done) -> None:
        with self._lock:
            self._busy += 1
            if self._busy > self._threads and self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._run, daemon=True).start()
        self._queue.put((call, arguments, done))

    def drain(self) -> None:
        """Wait until no read and no write is under way.

        Not for a flush: it may take minutes, and all that is asked meanwhile would wait behind it.
        It needs no memory of the daemon's, and minds no look at the files.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._busy == self._flushes)

    def _run(self) -> None:
        while True:
            call, arguments, done = self._queue.get()
            try:
                call(*arguments)
            except Exception as error:
                # Whatever it is, who asked is told, and the thread goes on to the next.
                if not isinstance(error, VddkfsError | OSError):
                    traceback.print_exc()
                done(error)
            else:
                done(None)
            finally:
                # A chunk is unmapped only when nothing refers to it any more.
                del arguments
                with self._lock:
                    self._busy -= 1
                    self._lock.notify_all()

    def report(self) -> EngineReport:
        """Return nothing: there is no library."""
        return EngineReport(("file",))

    def complain(self, text: str) -> None:
        """Print *text* to stderr, which the daemon reads."""
        print(text, file=sys.stderr, flush=True)

    def receiver(self, sock: socket.socket, answer: Answer) -> Receiver | None:
        """Return None: the worker receives."""
        return None

    def fileno(self) -> int:
        """Return -1: there is nothing to wait for."""
        return -1

    def tick(self) -> float:
        """Have nothing to do, ever."""
        return math.inf

    def identities(self) -> Sequence[LinkIdentity]:
        """Return what the engine has opened."""
        return self._engine.identities()

    def map(self, image: int, sector: int, count: int, limit: int, seconds: float) -> MapSlice:
        """Ask the engine for a part of an allocation map."""
        return self._engine.map(image, sector, count, limit, seconds)

    def revalidate(self) -> Sequence[LinkIdentity]:
        """Have the engine look at its links again."""
        return self._engine.revalidate()

    def renew(self) -> Renewal:
        """Have the engine drop all that it keeps."""
        return self._engine.renew()

    def close(self) -> None:
        """Close the engine, when nothing is under way any more."""
        with self._lock:
            self._lock.wait_for(lambda: self._busy == 0)
        self._engine.close()
