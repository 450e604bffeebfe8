"""How long a supervisor waits before it starts the next process: longer while none is of use.

Units: seconds.
"""

from typing import Final

SHORTEST: Final = 0.02
LONGEST: Final = 5.0
REFUSED: Final = 1.0
"""The first wait after a login or an open that was refused for good: servers lock accounts out."""
MAINTENANCE: Final = 20.0
"""Between tries while a host says that it is not to be had for a while."""


class Backoff:
    """``seconds`` is how long to wait now. Each further process that was of no use doubles it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def grow(self, first: float = SHORTEST, *, series: bool) -> None:
        """Take the end of a process; *series*: what it was of use for was none of what failed."""
        before = self.seconds if series else 0.0
        self.seconds = min(LONGEST, max(first, 2 * before))
