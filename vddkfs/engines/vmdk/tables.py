"""The cache of grain tables and directory pages: LRU, bounded in bytes, safe for several threads.

Tables are arrays that nobody changes after they were stored, so readers share them.
"""

import sys
import threading
from array import array
from itertools import count

from cachetools import LRUCache

from vddkfs.engines.vmdk.sparse import ENTRIES_PER_TABLE

DEFAULT_CACHE_BYTES = 8 << 20
"""Room for 4096 grain tables, which describe 128 GiB of 64 KiB grains."""

_KEY_SPACE = 1 << 40


def to_entries(raw: bytes | bytearray) -> "array[int]":
    """Return the 32-bit little-endian entries of *raw*, whose length is a multiple of 4."""
    entries = array("I")
    entries.frombytes(raw)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


EMPTY_TABLE = to_entries(bytes(ENTRIES_PER_TABLE * 4))
"""Stands for every grain table without a grain, so that empty disks cost no memory."""


class TableCache:
    """Tables by number. One cache serves all links of a chain; each extent has its own keys."""

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._lru: LRUCache[int, array[int]] = LRUCache(max(max_bytes, 0), getsizeof=_size)
        self._lock = threading.Lock()
        self._spaces = count()

    @property
    def used_bytes(self) -> int:
        """What the stored tables take, about."""
        return int(self._lru.currsize)

    def new_keys(self) -> int:
        """Return the first of 2**40 keys that nobody used. Old ones are forgotten by ageing."""
        return next(self._spaces) * _KEY_SPACE

    def get(self, key: int) -> "array[int] | None":
        """Return the table stored under *key*, if it still is."""
        with self._lock:
            try:
                return self._lru[key]
            except KeyError:
                return None

    def clear(self) -> None:
        """Forget every table."""
        with self._lock:
            self._lru.clear()

    def put(self, key: int, table: "array[int]") -> None:
        """Store *table*, unless it is larger than the whole cache."""
        if _size(table) <= self._lru.maxsize:
            with self._lock:
                self._lru[key] = table


def _size(table: "array[int]") -> int:
    # 200 is what an entry of the cache itself costs, about.
    return 200 if table is EMPTY_TABLE else len(table) * 4 + 280
