"""What one request fetched for the cache, or is fetching: its place, its waiters, its worth."""

from typing import Protocol

import trio

from vddkfs.cache.arena import FRAME, Slot
from vddkfs.cache.eviction import MOST_USES
from vddkfs.cache.worth import Worth
from vddkfs.engines.requests import Moved
from vddkfs.errors import VddkfsError


class Home(Protocol):
    """The cache of the image that a run is a part of."""

    epoch: int

    def forget(self, run: "Run") -> None:
        """Take *run* out of the index."""

    def ahead_used(self, run: "Run", start: int, end: int) -> None:
        """Note that a part of what was fetched ahead is read."""

    def ahead_over(self, run: "Run") -> None:
        """Note that what is unread of it will not be read."""


class Keeper(Protocol):
    """The memory of the disk that a run is in."""

    def keep(self, run: "Run") -> None:
        """Keep *run* until it is evicted."""

    def release(self, slot: Slot) -> None:
        """Undo one pin of *slot*."""

    def slot_at_once(self, size: int) -> Slot | None:
        """Return a pinned slot for *size* bytes, or None."""


class Run:
    """[*start*, *end*) of an image, in bytes, in *slot*, which is pinned while it is fetched.

    *number* is the image's. Where a run was fetched before anybody asked, ``worth`` is the account
    of that guess, and ``unread`` has a bit for each of its blocks that nobody has read yet.
    ``uses`` counts reads that go back to where
    somebody has read before: going forward through a run is one use of it, the first, which is not
    counted.
    """

    __slots__ = (
        "end",
        "epoch",
        "error",
        "home",
        "keeper",
        "kept",
        "key",
        "pins",
        "reach",
        "ready",
        "slot",
        "start",
        "unread",
        "uses",
        "waiters",
        "weight",
        "worth",
    )

    def __init__(
        self, home: Home, keeper: Keeper, number: int, start: int, end: int, slot: Slot, block: int
    ) -> None:
        self.home = home
        self.keeper = keeper
        self.start = start
        self.end = end
        self.slot = slot
        self.key = (number, start, slot.size)
        self.weight = slot.size // block
        self.uses = 0
        self.reach = start
        self.pins = 0
        self.epoch = home.epoch
        self.ready = False
        self.kept = False
        self.worth: Worth | None = None
        self.unread = 0
        self.error: VddkfsError | None = None
        self.waiters: trio.lowlevel.ParkingLot | None = None
        slot.tenant = self

    @property
    def large(self) -> bool:
        """Whether it is a whole frame, as it is fetched for those who go forward."""
        return self.slot.size == FRAME

    def used(self, start: int, end: int) -> None:
        """Note that [*start*, *end*), a part of it, is read."""
        if start >= self.reach:
            self.reach = end
        elif self.uses < MOST_USES:
            self.uses += 1
        if self.unread:
            self.home.ahead_used(self, start, end)

    async def wait(self) -> None:
        """Wait until the run is there. Raises what the fetch failed with."""
        while not self.ready:
            if self.error is not None:
                raise self.error
            if self.waiters is None:
                self.waiters = trio.lowlevel.ParkingLot()
            await self.waiters.park()

    def done(self, error: VddkfsError | None) -> None:
        """Take the answer to the request."""
        self.error = error
        self.ready = error is None
        if error is not None or self.epoch != self.home.epoch:
            self.left()
        else:
            self.keeper.keep(self)
        if self.waiters is not None:
            self.waiters.unpark_all()
        self.keeper.release(self.slot)

    def left(self) -> None:
        """Leave the index: nobody finds it any more."""
        self.kept = False
        self.home.forget(self)
        if self.unread:
            self.home.ahead_over(self)

    def moved(self) -> Moved:
        """Leave the slot, which a lost worker may still write to, for a new one if there is one."""
        keeper, old = self.keeper, self.slot
        fresh = keeper.slot_at_once(old.size)
        if fresh is None:
            # The request will fail, and undo its own pin; the memory stays out of use all the same.
            old.pin()
            return None, lambda: keeper.release(old)
        old.tenant = None
        self.slot = fresh
        fresh.tenant = self
        for _ in range(self.pins):
            # Those who wait for this run hold a pin each, and will undo it on the new slot.
            fresh.pin()
            old.unpin()
        return fresh, lambda: keeper.release(old)
