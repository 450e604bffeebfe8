"""How pyfuse3 waits for the kernel's next request: a look first, and sleep only if there is none.

pyfuse3 goes through trio's event loop for every request: two task switches and three system calls,
more than the answer to a cached read costs. While requests keep coming this module's stand-in for
the ``trio`` module inside pyfuse3 (the place where pyfuse3's own asyncio mode hooks in, too) finds
the next one by poll(2), and looks for some microseconds more before it sleeps, because waking a
sleeping core costs more than the look. After BURST requests in a row the event loop has its turn,
so that no other task of the daemon starves.
"""

import os
import select
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Final

import trio

BURST: Final = 16
"""Requests taken in a row before other tasks of the daemon have their turn."""
LOOK_SECONDS: Final = 30e-6
"""How long the next request is looked for before sleeping, while requests come this close."""


class _Lock:
    """A lock that costs no task switch when it is free. Fair: waiters get it in their order."""

    def __init__(self) -> None:
        self._held = False
        self._waiters = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        if not self._held:
            self._held = True
        else:
            await self._waiters.park()

    async def __aexit__(self, *_: object) -> None:
        if self._waiters:
            self._waiters.unpark()
        else:
            self._held = False


class QuickWait:
    """The wait on one FUSE session.

    *busy* says whether workers owe answers: the event loop, which also waits for those, is then
    asked without a longer look.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy
        self._poll = select.poll()
        self._fd = -1
        self._burst = 0
        self._close_by = False

    async def wait_readable(self, fd: int) -> None:
        """Return when *fd* is readable. Raises trio.ClosedResourceError when it is closed."""
        if fd != self._fd:
            self._fd = fd
            self._poll.register(fd, select.POLLIN)
        if self._burst < BURST and (self._poll.poll(0) or self._look()):
            self._burst += 1
            return
        self._burst = 0
        start = time.perf_counter()
        await trio.lowlevel.wait_readable(fd)
        self._close_by = time.perf_counter() - start < 2 * LOOK_SECONDS

    def _look(self) -> bool:
        if not self._close_by or self._busy():
            return False
        until = time.perf_counter() + LOOK_SECONDS
        while time.perf_counter() < until:
            if self._poll.poll(0):
                return True
            os.sched_yield()
        self._close_by = False
        return False

    def stand_in(self) -> SimpleNamespace:
        """Return what pyfuse3 uses of the ``trio`` module, with the wait and the lock replaced."""
        lowlevel = SimpleNamespace(
            wait_readable=self.wait_readable,
            notify_closing=trio.lowlevel.notify_closing,
            current_task=trio.lowlevel.current_task,
            current_trio_token=trio.lowlevel.current_trio_token,
        )
        return SimpleNamespace(
            Lock=_Lock,
            lowlevel=lowlevel,
            ClosedResourceError=trio.ClosedResourceError,
            open_nursery=trio.open_nursery,
        )
