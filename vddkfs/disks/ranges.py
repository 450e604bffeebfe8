"""Locks of byte ranges: who writes a range, or reads it to write it back, has it for himself."""

import trio


class RangeLocks:
    """The ranges of one file that somebody has, or waits for. For one trio thread.

    Ranges are given in the order in which they were asked for: of two that overlap the first one
    asked comes first, so that nobody waits for ever. *grain* is the least that is told apart, in
    bytes: ranges are rounded out to it.
    """

    def __init__(self, grain: int) -> None:
        self._grain = grain
        self._held: list[Held] = []

    def hold(self, start: int, end: int) -> "Held":
        """Return what has [*start*, *end*), in bytes, in its block. A wait can be cancelled."""
        return Held(self._held, start - start % self._grain, end + -end % self._grain)


class Held:
    """A range: *held* is those of its file. It is on the way of every write, hence no generator."""

    __slots__ = ("_gone", "_held", "end", "start")

    def __init__(self, held: "list[Held]", start: int, end: int) -> None:
        self.start = start
        self.end = end
        self._held = held
        self._gone: trio.Event | None = None

    async def __aenter__(self) -> None:
        """Wait for all that overlap and were asked for before."""
        start, end = self.start, self.end
        before = [one for one in self._held if one.start < end and start < one.end]
        self._held.append(self)
        if not before:
            return
        try:
            # All events before the first wait: one of them may go while another is waited for.
            for event in [one._event() for one in before]:
                await event.wait()
        except BaseException:
            self._let_go()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._let_go()

    def _event(self) -> trio.Event:
        """Return what is set when the range is let go, or given up."""
        if self._gone is None:
            self._gone = trio.Event()
        return self._gone

    def _let_go(self) -> None:
        self._held.remove(self)
        if self._gone is not None:
            self._gone.set()
