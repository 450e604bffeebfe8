"""Locks of byte ranges: who writes a range, or reads it to write it back, has it for himself."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class _Held:
    __slots__ = ("end", "gone", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.gone: trio.Event | None = None

    def event(self) -> trio.Event:
        """Return what is set when the range is let go, or given up."""
        if self.gone is None:
            self.gone = trio.Event()
        return self.gone


class RangeLocks:
    """The ranges of one file that somebody has, or waits for. For one trio thread.

    Ranges are given in the order in which they were asked for: of two that overlap the first one
    asked comes first, so that nobody waits for ever. *grain* is the least that is told apart, in
    bytes: ranges are rounded out to it.
    """

    def __init__(self, grain: int) -> None:
        self._grain = grain
        self._held: list[_Held] = []

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Have [*start*, *end*), in bytes, until the end of the block. A cancelled wait is given
        up."""
        mine = _Held(start - start % self._grain, end + -end % self._grain)
        before = [one for one in self._held if one.start < mine.end and mine.start < one.end]
        self._held.append(mine)
        try:
            # All events before the first wait: one of them may go while another is waited for.
            for event in [one.event() for one in before]:
                await event.wait()
            yield
        finally:
            self._held.remove(mine)
            if mine.gone is not None:
                mine.gone.set()
