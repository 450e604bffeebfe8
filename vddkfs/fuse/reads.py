"""The reads of a file that are under way: those of before a moment can be waited for.

Writes are counted as well: the kernel keeps the pages of both locked until they are answered.
"""

import trio


class Batch:
    """Reads that began between one wait for them and the next."""

    __slots__ = ("_idle", "count")

    def __init__(self) -> None:
        self.count = 0
        self._idle: trio.Event | None = None

    def end(self) -> None:
        """Note that one of the reads has been answered."""
        self.count -= 1
        if not self.count and self._idle is not None:
            self._idle.set()

    async def idle(self) -> None:
        """Return when none of them is left; no other may join meanwhile."""
        if self.count:
            if self._idle is None:
                self._idle = trio.Event()
            await self._idle.wait()


class Reads:
    """Counts the reads of one file."""

    __slots__ = ("_before", "_now")

    def __init__(self) -> None:
        self._now = Batch()
        self._before: list[Batch] = []

    def begin(self) -> Batch:
        """Note that a read begins. The batch returned is to be told of its end."""
        self._now.count += 1
        return self._now

    async def drained(self) -> None:
        """Return when every read that began before this call has been answered."""
        self._before = [batch for batch in (*self._before, self._now) if batch.count]
        if self._now.count:
            self._now = Batch()
        for batch in self._before:
            await batch.idle()
