"""Read-ahead: which part of a file to fetch before it is asked for. Pure arithmetic, one per
stream.

A stream is one open file. It counts as sequential while each read begins near the end of what was
read before (the kernel sends the requests of one reader several at a time and not always in order,
hence "near"). The window opens as the stream goes on: 1, 2, 4 ... MiB up to the limit.
"""

from typing import Final

BLOCK: Final = 1024 * 1024
"""Bytes fetched by one read-ahead request; requests are aligned to it."""
_PROOF: Final = 256 * 1024
"""Bytes that must have been read in sequence before anything is fetched ahead."""


class ReadAhead:
    """The state of one stream. Offsets, windows and limits in bytes."""

    __slots__ = ("_capacity", "_issued", "_limit", "_next", "_proved", "window")

    def __init__(self, capacity: int, limit: int) -> None:
        self._capacity = capacity
        self._limit = limit
        self._next = 0
        self._proved = 0
        self._issued = 0
        self.window = 0

    @property
    def sequential(self) -> bool:
        """Say whether the stream has proved sequential, so that whole blocks are worth fetching."""
        return self._proved >= _PROOF

    def access(self, start: int, end: int) -> tuple[int, int]:
        """Note a read of [*start*, *end*); return the range to fetch ahead (empty: start == end).

        The range is block-aligned, inside the capacity, and never names a block twice while the
        stream goes on.
        """
        slack = max(self.window, BLOCK)
        if not self._next - slack <= start <= self._next + slack:
            self._next, self._proved, self._issued, self.window = end, end - start, 0, 0
            return 0, 0
        if end > self._next:
            self._proved += end - max(start, self._next)
            self._next = end
        if self._proved < _PROOF:
            return 0, 0
        wanted = min(self._capacity, _align_up(self._next + self.window))
        if self.window < self._limit:
            self.window = min(self._limit, max(BLOCK, 2 * self.window))
        first = max(self._issued, _align_up(self._next))
        if first >= wanted:
            return 0, 0
        self._issued = wanted
        return first, wanted

    def took(self, end: int) -> None:
        """Say that fetching stopped at *end* for want of memory: the rest is named again later."""
        self._issued = min(self._issued, end)


def _align_up(offset: int) -> int:
    return -(-offset // BLOCK) * BLOCK
