"""Which link of a long chain has what is at a place: the walk down the chain, remembered.

A read asks the image's top link, then its parent, and so on; with thirty snapshots that walk costs
more than the read. What it finds is kept for whole regions, once a region has been walked a few
times: a byte for each granule, which is the smallest grain of the chain but at least 4 KiB.

What is kept depends on the tables of the links above the base only: whether the base has a sector
is always asked of the base, so it may be written. Damage is never kept.
"""

import contextlib
from array import array
from collections.abc import Sequence
from typing import Final

from vddkfs.engines.vmdk.extents import ABSENT, WouldWait
from vddkfs.engines.vmdk.link import OpenLink
from vddkfs.engines.vmdk.tables import TableCache
from vddkfs.errors import VddkfsError

DEEP: Final = 4
"""Images of so many links or fewer are walked."""
_WALKS: Final = 2
"""Walks for each link that a region has before it is looked at, which costs about as much."""
_GRANULES: Final = 256
"""Granules of a region."""
_MIXED: Final = 255
"""A granule of several owners, or one that some link is too short for."""
_MIN_GRANULE: Final = 8
_COUNTED: Final = 4096
"""Regions whose walks are counted at once."""


class Owners:
    """The owners of *links*, base first, kept in *cache*. For the engine; see there for threads."""

    def __init__(self, links: Sequence[OpenLink], cache: TableCache) -> None:
        self._links = links
        self._cache = cache
        self._keys = [cache.new_keys() for _ in links]
        grains = [extent.grain for link in links[1:] for extent in link.extents if extent.grain]
        self._shift = max(min(grains, default=_MIN_GRANULE), _MIN_GRANULE).bit_length() - 1
        self._walked: dict[int, int] = {}

    def forget(self, image: int) -> None:
        """Forget what is kept of *image*, whose last link may have changed."""
        self._keys[image] = self._cache.new_keys()

    def top(self, image: int, sector: int, count: int) -> int:
        """Return the highest link from *image* down that can have any of the request.

        That is *image* itself where nothing is known. Never waits.
        """
        granule = sector >> self._shift
        if (sector + count - 1) >> self._shift != granule:
            return image
        owners = self._cache.get(self._keys[image] + granule // _GRANULES)
        if owners is None:
            return image
        owner = owners[granule % _GRANULES]
        return image if owner == _MIXED else owner

    def walked(self, image: int, sector: int, flags: int) -> None:
        """Take note of a walk from *image* at *sector*; look at the region if it is time to.

        That reads tables, and takes a while: with *flags* it raises WouldWait instead. On any
        thread: two may do the same.
        """
        key = self._keys[image] + (sector >> self._shift) // _GRANULES
        walks = self._walked.get(key, 0) + 1
        if len(self._walked) >= _COUNTED:
            self._walked.clear()
        if walks % (_WALKS * (image + 1)) or self._cache.get(key) is not None:
            self._walked[key] = walks
            return
        if flags:
            raise WouldWait
        self._walked[key] = walks
        # What cannot be looked at as a whole can be read in part all the same.
        with contextlib.suppress(VddkfsError, OSError):
            self._cache.put(key, self._look(image, key - self._keys[image]))

    def _look(self, image: int, region: int) -> "array[int]":
        """Return the owners of *region*, a byte for each granule; 0 is the base."""
        shift = self._shift
        first = region * _GRANULES
        begin, end = first << shift, min((first + _GRANULES) << shift, self._links[image].capacity)
        owners = bytearray(_GRANULES)
        for number in range(image, -1, -1):
            link = self._links[number]
            inside = min(end, link.capacity)
            if inside < end:
                # What is beyond this link is zeros, whatever is below it.
                _set(owners, max(0, (inside >> shift) - first), _GRANULES, _MIXED)
            if number == 0 or inside <= begin:
                continue
            for piece in link.pieces(begin, inside - begin, False, 0):
                if piece.kind != ABSENT:
                    self._own(owners, piece.sector - begin, piece.count, number)
        return array("B", owners)

    def _own(self, owners: bytearray, start: int, count: int, number: int) -> None:
        """Enter link *number* for the sectors from *start* on, where nobody is entered yet."""
        whole = -(-start >> self._shift), (start + count) >> self._shift
        _set(owners, whole[0], whole[1], number)
        _set(owners, start >> self._shift, whole[0], _MIXED)
        _set(owners, whole[1], -(-(start + count) >> self._shift), _MIXED)


def _set(owners: bytearray, first: int, stop: int, number: int) -> None:
    if first < stop:
        owners[first:stop] = owners[first:stop].replace(b"\0", bytes((number,)))
