"""What fetching before anybody asks is worth: the account that bounds the waste, and clustering.

Nobody knows beforehand whether a guess is right, but afterwards everybody does: the cache says what
was fetched as a guess, what of it was read, and what went unread. Guessing begins with a credit and
then lives on what it earns, so that a reader who cannot be guessed costs a bounded number of bytes,
once. Pure arithmetic; sizes and offsets in bytes.

An account should serve one kind of guess: if streams and clusters share one, the waste stays
bounded, but good streams pay for bad clusters.
"""

from collections import OrderedDict
from typing import Final

BLOCK: Final = 1024 * 1024
"""A frame: bytes fetched by one guess, and what guesses are aligned to."""

_CREDIT: Final = 32 * 1024 * 1024
"""What may be wasted before anything was of use: a few streams' first windows."""
_MOST: Final = 64 * 1024 * 1024
"""What a good past is worth at most: the longest burst of waste after it."""
_PAY: Final = 2
"""What one used byte earns. Two: guesses go on while at least half of them is right."""
_TRICKLE: Final = 64
"""Earned by each miss. A thousandth of the block that the miss fetches: 100,000 of them are 6 MiB,
so that those whom no guess can serve pay no more than that for another try now and then."""
_MEMORY: Final = 32 * 1024 * 1024
"""Bytes of guesses after which the past counts half."""
_EVIDENCE: Final = 4 * 1024 * 1024
"""Clustered bytes that are enough to judge clustering by."""

_REMEMBERED: Final = 64
"""Frames that a miss is remembered of."""
_DENSE: Final = BLOCK // _PAY
"""Bytes missed in one frame that show that fetching it whole would have paid."""


class Worth:
    """The account of one image's guesses: draw for what is fetched, earn by what is used of it.

    What was fetched and not used is never more than the credit, plus what was used, plus a trickle
    for each miss, plus what was asked for after the account had forbidden to guess it.
    """

    __slots__ = ("_balance", "_issued", "_trust", "_used")

    def __init__(self) -> None:
        self._balance = _CREDIT
        self._issued = 0
        self._used = 0
        self._trust = 0

    @property
    def allowance(self) -> int:
        """Bytes that may be fetched as a guess now, at least 0."""
        return self._balance

    @property
    def eager(self) -> bool:
        """Say whether clustering was right of late: about three quarters of it were read.

        All that is unread counts against it, whoever guessed it, and what is known to be wasted
        counts twice: this never errs in favour of clustering.
        """
        unused = self._issued - self._used
        return self._trust >= _EVIDENCE and 4 * unused <= self._trust

    def issued(self, size: int) -> None:
        """Note that *size* bytes are fetched before anybody asked."""
        self._balance = max(0, self._balance - size)
        self._issued += size
        if self._issued >= _MEMORY:
            self._issued //= 2
            self._used //= 2
            self._trust //= 2

    def used(self, size: int) -> None:
        """Note that *size* bytes of what was issued are read."""
        self._earn(_PAY * size)
        self._used = min(self._issued, self._used + size)

    def wasted(self, size: int) -> None:
        """Note that *size* bytes of what was issued went unread: what they cost stays paid."""
        self._trust = max(0, self._trust - size)

    def missed(self) -> None:
        """Note that a reader waits for what was not fetched ahead: some day, try again."""
        self._earn(_TRICKLE)

    def clustered(self, size: int) -> None:
        """Note that *size* bytes were named by ``Clusters``, to judge that by."""
        self._trust += size

    def regretted(self, size: int) -> None:
        """Note that *size* bytes that the account forbade to fetch were asked for after all."""
        self._earn(size)

    def _earn(self, size: int) -> None:
        self._balance = min(_MOST, self._balance + size)


class Clusters:
    """Scattered small reads of one image that lie close together: fetch their frame at once.

    Each miss costs a round trip, whatever its size up to some hundred KiB, and directories and
    small files lie together. A frame is named at the second of its blocks that is missed while it
    is remembered: it is among the last frames that were missed, by count and not by time, so that
    a slow source is judged like a fast one. While that proves right it is named at the first.
    """

    __slots__ = ("_capacity", "_missed", "_worth")

    def __init__(self, capacity: int, worth: Worth) -> None:
        self._capacity = capacity
        self._worth = worth
        self._missed: OrderedDict[int, int] = OrderedDict()
        """Of each remembered frame, a bit for each missed block; the latest last."""

    def miss(self, start: int, block: int) -> tuple[int, int]:
        """Note that a scattered read missed the block at *start*, *block* bytes long.

        Returns the frame to fetch along with it, as a range inside the capacity, or an empty one.
        """
        first = start - start % BLOCK
        last = min(first + BLOCK, self._capacity)
        bit = 1 << (start - first) // block
        before = self._missed.pop(first, 0)
        if (self._worth.eager or before & ~bit) and last - first <= self._worth.allowance:
            self._worth.clustered(last - first)
            return first, last
        after = before | bit
        self._missed[first] = after
        if len(self._missed) > _REMEMBERED:
            self._missed.popitem(last=False)
        if after != before and after.bit_count() * block >= _DENSE:
            self._worth.regretted(block)
        return first, first
