"""The allocation map of an open disk, asked for in parts that do not keep its readers waiting."""

import time
from typing import Final

from vddkfs.engines.base import SECTOR, MapExtent, MapSlice
from vddkfs.engines.vddk.layouts import MAX_CHUNKS, MIN_CHUNK
from vddkfs.engines.vddk.session import OpenDisk

_QUERY_SECONDS: Final = 0.2
"""How long one query of the allocation map may keep reads from being begun."""
_FINE_MAP_SECTORS: Final = 32 * 1024 * 1024 * 1024 // SECTOR
"""Larger disks are mapped by the MiB: the library takes its time for each chunk."""
_COARSE_CHUNK: Final = 2048
_FEWEST_CHUNKS: Final = 64
"""Of one query, however slow the library is or however scattered the data are."""


class AllocationMap:
    """Learns how much of one image can be asked for at once. For the worker's main thread."""

    def __init__(self) -> None:
        self._chunks_at_once = 4096

    def map(self, disk: OpenDisk, sector: int, count: int, limit: int) -> MapSlice:
        """Return a part of the map from *sector*; see ``Engine``. Raises EngineError."""
        library = disk.connection.library
        capacity = disk.info.capacity
        end = min(sector + count, capacity)
        chunk = MIN_CHUNK if capacity <= _FINE_MAP_SECTORS else _COARSE_CHUNK
        if not library.has("QueryAllocatedBlocks"):
            return MapSlice((MapExtent(sector, end - sector, True),), end)
        stop = min(end, (sector // chunk + self._chunks_at_once) * chunk)
        began = time.monotonic()
        blocks = disk.handle.query_allocated(sector, stop - sector, chunk)
        took = time.monotonic() - began
        if took < _QUERY_SECONDS / 2:
            self._chunks_at_once = min(MAX_CHUNKS, self._chunks_at_once * 2)
        elif took > _QUERY_SECONDS:
            self._chunks_at_once = max(_FEWEST_CHUNKS, self._chunks_at_once // 2)
        part = _slice(sector, stop, blocks, limit)
        if part.next_sector < stop:
            # What is over the limit was asked for in vain.
            self._chunks_at_once = max(_FEWEST_CHUNKS, (part.next_sector - sector) // chunk)
        return part


def _slice(start: int, end: int, blocks: list[tuple[int, int]], limit: int) -> MapSlice:
    """Return what *blocks* (allocated, in order) say of [*start*, *end*)."""
    extents: list[MapExtent] = []
    here = start
    for offset, length in blocks:
        if offset > here:
            extents.append(MapExtent(here, offset - here, False))
        extents.append(MapExtent(offset, length, True))
        here = offset + length
    if here < end:
        extents.append(MapExtent(here, end - here, False))
    kept = extents[:limit]
    return MapSlice(tuple(kept), kept[-1].sector + kept[-1].count)
