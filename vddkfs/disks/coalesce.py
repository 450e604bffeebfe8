"""Running something once for many who ask, each served by a run that began after it asked."""

import logging
from collections.abc import Awaitable, Callable

import trio

from vddkfs.errors import VddkfsError

log = logging.getLogger(__name__)


class _Run:
    def __init__(self) -> None:
        self.finished = trio.Event()
        self.error: VddkfsError | None = None


class Coalesced:
    """Calls of ``work`` that wait for one another; those who come meanwhile share the next one.

    Cancellation of a caller leaves the run to the others. A VddkfsError of a run reaches all of its
    callers.
    """

    def __init__(self, nursery: trio.Nursery, work: Callable[[], Awaitable[None]]) -> None:
        self._nursery = nursery
        self._work = work
        self._next: _Run | None = None
        self._running = False

    async def __call__(self) -> None:
        """Return when a run that began after this call has ended. Raises what it raised."""
        run = self._next
        if run is None:
            run = self._next = _Run()
            if not self._running:
                self._running = True
                self._nursery.start_soon(self._loop)
        await run.finished.wait()
        if run.error is not None:
            raise run.error

    async def _loop(self) -> None:
        try:
            while (run := self._next) is not None:
                self._next = None
                try:
                    await self._work()
                except VddkfsError as error:
                    run.error = error
                except Exception as error:
                    log.exception("a bug in vddkfs")
                    run.error = VddkfsError("a bug in vddkfs", cause=repr(error))
                finally:
                    run.finished.set()
        finally:
            self._running = False
