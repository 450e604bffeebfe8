"""One worker process: how it is started, what it says on stdout and stderr, and how it ends."""

import contextlib
import logging
import os
import socket
from typing import Final, Protocol

import trio

from vddkfs.engines import protocol
from vddkfs.engines.output import parse_line
from vddkfs.engines.protocol import Op
from vddkfs.engines.spawn import ending, spawn

log = logging.getLogger(__name__)

STOP_SECONDS: Final = 2.0
"""How long a worker may take to end by itself when it is asked to, unless it is said otherwise."""
REAP_SECONDS: Final = 2.0
"""How long the end of a killed worker is waited for before it counts as hanging in the kernel."""
_LONGEST_LINE: Final = 4096
_LAST_WORDS: Final = 16
"""How many times 64 KiB of a dead worker's output are logged."""


class Process(Protocol):
    """What the supervisor needs of a worker process."""

    sock: socket.socket
    pid: int

    async def forward_output(self) -> None:
        """Log what the process prints, until it ends."""

    async def end(self, kill: bool) -> bool:
        """End the process and say whether it is known to be gone."""

    async def reap(self, seconds: float) -> bool:
        """Wait for the process's end, and say whether it came."""

    def ending(self) -> str:
        """Say how the process ended, in words; "" while that is not known."""


class WorkerProcess:
    """A running worker. Made on the main thread: the worker ends with the thread that made it.

    *stop_seconds* is how long it may take to end by itself. Raises OSError if the process cannot be
    started. Making it blocks for some milliseconds.
    """

    def __init__(self, name: str, stop_seconds: float = STOP_SECONDS) -> None:
        self.name = name
        self._stop_seconds = stop_seconds
        self._pending = b""
        self._output, output = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(output, True)
        try:
            self.sock, self._popen = spawn(output)
        except OSError:
            os.close(self._output)
            raise
        finally:
            os.close(output)
        self.pid = self._popen.pid
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._popen.kill()
            self._popen.wait()
            self.sock.close()
            os.close(self._output)
            raise

    async def forward_output(self) -> None:
        """Log every line that the process prints, until it ends."""
        while True:
            await trio.lowlevel.wait_readable(self._output)
            if not self._take_output():
                return

    def _take_output(self) -> bool:
        """Log the lines that are there; return False at the end of the output."""
        try:
            data = os.read(self._output, 65536)
        except BlockingIOError:
            return True
        lines = (self._pending + data).split(b"\n")
        self._pending = lines.pop()[-_LONGEST_LINE:]
        if not data:
            lines.append(self._pending)
            self._pending = b""
        for line in lines:
            level, text = parse_line(line)
            if text:
                log.log(level, "worker of %s says: %s", self.name, text)
        return bool(data)

    async def end(self, kill: bool) -> bool:
        """End the process, at once if *kill*, and say whether it is known to be gone.

        Takes at most *stop_seconds* + REAP_SECONDS; not to be cancelled.
        """
        async with trio.open_nursery() as nursery:
            # One that says more than the pipe holds would wait for somebody to listen.
            nursery.start_soon(self.forward_output)
            gone = await self._end(kill)
            nursery.cancel_scope.cancel()
        if gone:
            for _ in range(_LAST_WORDS):
                if not self._take_output():
                    break
        self.sock.close()
        os.close(self._output)
        return gone

    async def _end(self, kill: bool) -> bool:
        gone = False
        if not kill:
            with contextlib.suppress(OSError):
                self.sock.send(protocol.request_header(Op.STOP, 0), socket.MSG_DONTWAIT)
            gone = await self.reap(self._stop_seconds)
        if not gone:
            with contextlib.suppress(ProcessLookupError):
                self._popen.kill()
            gone = await self.reap(REAP_SECONDS)
        return gone

    def ending(self) -> str:
        """Say how the process ended; "" while that is not known."""
        return ending(self._popen.returncode)

    async def reap(self, seconds: float) -> bool:
        """Wait up to *seconds* for the process's end, and say whether it came."""
        if self._pidfd >= 0:
            with trio.move_on_after(seconds):
                await trio.lowlevel.wait_readable(self._pidfd)
        if self._popen.poll() is None:
            return False
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        return True
