"""The fence before writes that are sent again: when it is proved that a lost process writes nothing
any more, and what if that takes too long.

A write that was under way when its process was lost is *in doubt*, and so is one that was answered
and not flushed, where the process had it: it may be on the disk, or come late. It is settled when
that process is gone and the next has opened the base to be written, which takes the lock that the
lost one had.
"""

import errno
import math
from collections.abc import Iterable

from vddkfs.engines.requests import Patience, Request
from vddkfs.errors import VddkfsError, WorkerFailed


class Fence:
    """Of the writes of one worker. Times are those of trio's clock."""

    def __init__(self, name: str, patience: Patience) -> None:
        self._name = name
        self._patience = patience
        self._doubt_since = math.inf
        self._hanging_since = math.inf
        self.failure: VddkfsError | None = None
        """Why nothing is written any more: what was written may be lost."""

    @property
    def in_doubt(self) -> bool:
        """Whether it is open what became of a write."""
        return self._doubt_since < math.inf

    @property
    def hangs(self) -> bool:
        """Whether a process that was killed is not gone; it has the base open."""
        return self._hanging_since < math.inf

    def doubt(self, now: float) -> None:
        """Note that a process was lost which had written, or was about to."""
        if self.failure is None:
            self._doubt_since = min(self._doubt_since, now)

    def settle(self) -> None:
        """Doubt nothing any more: what may be lost is written again, or about to be."""
        self._doubt_since = math.inf

    def hang(self, now: float) -> None:
        """Note that a process cannot be ended."""
        self._hanging_since = min(self._hanging_since, now)

    def gone(self) -> None:
        """Note that no such process is left."""
        self._hanging_since = math.inf

    def overdue(self, now: float, waiting: Iterable[Request], excused: bool) -> VddkfsError | None:
        """Return what writes fail with if something is in doubt, or waits, for too long.

        *excused*: a session of the server is waited for, and no reason: the lost process is gone.
        """
        if self.failure is not None or (excused and not self.hangs):
            return None
        since = self._doubt_since
        if self.hangs:
            born = (request.born for request in waiting if request.writes)
            since = min([since, *(max(one, self._hanging_since) for one in born)])
        patience = self._patience.fence_timeout
        if now - since <= patience:
            return None
        if self.hangs:
            told = "a process that had the disk open cannot be ended, and may still write to it"
        else:
            told = "a process was lost, and no other has opened the disk to be written since"
        return WorkerFailed(
            f"{self._name}: no proof within {patience:g} s that nothing is written late: {told}",
            advice="mount again, and write everything since the last good flush once more",
            errno=errno.EIO,
        )
