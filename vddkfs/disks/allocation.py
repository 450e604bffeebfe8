"""What the source has of an image: its allocation map, fetched in the background, and seeks.

Offsets and sizes in bytes. Methods run on the trio thread.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Final

import trio

from vddkfs.cache.coherence import Policy
from vddkfs.disks.extents import ExtentMap
from vddkfs.engines.base import SECTOR, LinkInfo
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.protocol import MapQuery
from vddkfs.errors import EngineError, VddkfsError, WorkerFailed

log = logging.getLogger(__name__)

SEEK_SECONDS: Final = 2.0
"""How long SEEK_DATA and SEEK_HOLE look before everything counts as data."""
_AGAIN_SECONDS: Final = 1.0
_PAUSES: Final = 20
"""How much longer the pause between two maps of an image that is being written is than the fetching
of one."""
MAP_FAILURES: Final = 3
"""Failed queries after which the rest of a map counts as data."""


class Allocation:
    """Of the image *name*, number *index* for the worker behind *client*: *links* composed.

    *epoch* tells when what was asked of the source before is not worth keeping any more.
    """

    def __init__(
        self,
        name: str,
        links: Sequence[LinkInfo],
        *,
        index: int,
        policy: Policy,
        client: WorkerClient,
        nursery: trio.Nursery,
        epoch: Callable[[], int],
    ) -> None:
        self.map: ExtentMap | None = None
        self._name = name
        self._links = links
        self._index = index
        self._policy = policy
        self._client = client
        self._nursery = nursery
        self._epoch = epoch
        self._capacity = links[-1].capacity * SECTOR
        self._zeros: ExtentMap | None = None
        self._fetching: trio.Event | None = None
        self._outdated = False
        """Set when this mount has written where the map has, or may have, a hole."""
        self._again_at = 0.0
        """When an outdated map may be fetched again: that must not be what writers wait for."""

    def drop(self) -> None:
        """Forget the map."""
        self.map = None
        self._zeros = None

    def wrote(self, start: int, end: int) -> None:
        """Note that this mount has written [*start*, *end*), so that there are no holes in it.

        The map of what is written is for people alone: no read and no seek relies on it.
        """
        found = self.map
        holes = found is None or found.seek_hole(start // SECTOR) < -(-end // SECTOR)
        self._outdated = self._outdated or holes

    def is_hole(self, start: int, end: int) -> bool:
        """Say whether the range is known to be zeros for as long as the generation lasts."""
        zeros = self._zeros
        return zeros is not None and zeros.is_hole(start // SECTOR, -(-end // SECTOR))

    async def seek(self, offset: int, data: bool) -> int | None:
        """Return the first offset of data, or of a hole, at or after *offset*; None without one."""
        sector = offset // SECTOR
        # What a live image's map calls a hole may be data by now.
        if self.map is not None and self._policy.lasts:
            found = self.map.seek_data(sector) if data else self.map.seek_hole(sector)
        else:
            found = await self._query(sector, data)
        return None if found is None else max(offset, found * SECTOR)

    async def _query(self, sector: int, data: bool) -> int | None:
        """Look for data, or for a hole, in the source itself, while the map is not there yet."""
        total = self._capacity // SECTOR
        start = sector
        # What cannot be told counts as data: its reads fail, if the disk itself is not to be had.
        with trio.move_on_after(SEEK_SECONDS), contextlib.suppress(EngineError, WorkerFailed):
            while sector < total:
                query = MapQuery(count=total - sector, limit=64, seconds=0.1)
                part = await self._client.map(self._index, sector, query)
                for extent in part.extents:
                    if extent.data == data:
                        return extent.sector
                sector = part.next_sector
            return None
        return start if data else total

    def bytes(self) -> int:
        """Return the bytes of data: exact once the map is known, a guess before that.

        A guess is below the capacity, so that a copy asks for the holes, and never nothing: tar
        takes a file without blocks for one without data.
        """
        if self.map is not None:
            return self.map.allocated * SECTOR
        guess = sum(extent.allocated_bytes for link in self._links for extent in link.extents)
        return guessed_bytes(guess or self._capacity, self._capacity)

    def want(self) -> None:
        """Have the map fetched in the background, unless it is there or on its way."""
        if self._fetching is not None:
            return
        late = self._outdated and trio.current_time() >= self._again_at
        if self.map is None or late:
            self.drop()
            self._outdated = False
            self._fetching = trio.Event()
            self._nursery.start_soon(self._fetch, self._fetching)

    async def _fetch(self, fetched: trio.Event) -> None:
        began = trio.current_time()
        try:
            while self.map is None:
                epoch = self._epoch()
                found = await self._fetched(epoch)
                if epoch == self._epoch():
                    self.map = found
                    self._zeros = found if self._policy.lasts else None
        finally:
            now = trio.current_time()
            self._again_at = now + max(_AGAIN_SECONDS, _PAUSES * (now - began))
            self._fetching = None
            fetched.set()

    async def _fetched(self, epoch: int) -> ExtentMap:
        """Return the map, or a part of it once *epoch* is over: nobody wants it any more."""
        total = self._capacity // SECTOR
        fetched = ExtentMap(total)
        failures = 0
        while not fetched.complete and epoch == self._epoch():
            query = MapQuery(count=total - fetched.known)
            try:
                part = await self._client.map(self._index, fetched.known, query)
                if not part.extents:
                    raise EngineError("a part of the allocation map is empty")
                fetched.extend(part.extents)
            except (VddkfsError, ValueError) as error:
                failures += 1
                if failures < MAP_FAILURES:
                    continue
                log.warning("%s: no allocation map, so all is data: %s", self._name, error)
                fetched.append(fetched.known, total - fetched.known, True)
                break
        return fetched

    async def now(self) -> ExtentMap:
        """Return the map; that of a live image is asked for anew, because its owner may have
        written since.
        """
        if not self._policy.lasts:
            if self._fetching is not None:
                await self._fetching.wait()
            self.map = None
        return await self.when_known()

    async def when_known(self) -> ExtentMap:
        """Return the map, fetching it if need be."""
        while self.map is None:
            self.want()
            if self._fetching is not None:
                await self._fetching.wait()
        return self.map


def guessed_bytes(guess: int, size: int) -> int:
    """Return *guess* as what a file of *size* bytes may be said to have allocated."""
    return max(min(guess, size - 4096), min(size, SECTOR))
