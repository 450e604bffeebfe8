"""How long things took, counted in buckets: cheap enough for every read.

Here, below the daemon's other observers, because workers time the calls of their library with it.
"""

from collections.abc import Iterable, Sequence
from typing import Final

SHORTEST: Final = 8e-6
"""Seconds: the bound of the first bucket. Each bucket after it reaches twice as far."""
BUCKETS: Final = 24
"""Buckets with a bound; the last bound is 67 s. One more bucket takes what took longer."""
BOUNDS: Final[tuple[float, ...]] = tuple(SHORTEST * 2**number for number in range(BUCKETS))
_PER_SECOND: Final = 1 / SHORTEST
_ROOM: Final = 64
"""More than there are buckets: no time that a clock can show is beyond, so none is compared."""


class Histogram:
    """Times by powers of two, and their sum in ``seconds``. For one thread at a time.

    *counts* are those of another histogram's ``buckets``.
    """

    __slots__ = ("_counts", "seconds")

    def __init__(self, counts: Sequence[int] = (), seconds: float = 0.0) -> None:
        self._counts = [*counts, *[0] * (_ROOM - len(counts))]
        self.seconds = seconds

    def observe(self, seconds: float) -> None:
        """Count one time. A time that is a bound exactly counts in the bucket above it."""
        self._counts[int(seconds * _PER_SECOND).bit_length()] += 1
        self.seconds += seconds

    @property
    def count(self) -> int:
        """How many times were counted."""
        return sum(self._counts)

    @property
    def buckets(self) -> list[int]:
        """The counts of the buckets, BUCKETS and the last one, each without those below it."""
        return [*self._counts[:BUCKETS], sum(self._counts[BUCKETS:])]

    def cumulative(self) -> list[int]:
        """Return how many times are below each of BOUNDS, and how many there are at all."""
        total, found = 0, []
        for count in self.buckets:
            total += count
            found.append(total)
        return found

    def quantile(self, share: float) -> float | None:
        """Return the seconds that *share* (0 to 1) of all times are below; None without any.

        Times are taken to be spread evenly in their bucket; beyond the last bound that is told.
        """
        below = 0.0
        wanted = share * self.count
        for number, count in enumerate(self.buckets[:BUCKETS]):
            if count and below + count >= wanted:
                start = BOUNDS[number - 1] if number else 0.0
                return start + (BOUNDS[number] - start) * (wanted - below) / count
            below += count
        return BOUNDS[-1] if self.count else None


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """Return a new histogram of all times that *histograms* have counted."""
    counts, seconds = [0] * (BUCKETS + 1), 0.0
    for one in histograms:
        counts = [mine + more for mine, more in zip(counts, one.buckets, strict=True)]
        seconds += one.seconds
    return Histogram(counts, seconds)
