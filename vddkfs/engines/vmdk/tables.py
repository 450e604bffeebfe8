"""The cache of grain tables and directory pages: LRU, bounded in bytes, safe for several threads.

Tables are arrays that nobody changes after they were stored, so readers share them. Their entries
have 32 bits, those of seSparse 64.
"""

import sys
import threading
from array import array
from itertools import count, product

from cachetools import LRUCache

DEFAULT_CACHE_BYTES = 8 << 20
"""Room for 4096 grain tables, which describe 128 GiB of 64 KiB grains."""

_KEY_SPACE = 1 << 40
_CODES = {4: "I", 8: "Q"}


def to_entries(raw: bytes | bytearray, width: int = 4) -> "array[int]":
    """Return the little-endian entries of *raw*, of *width* bytes each, 4 or 8."""
    entries = array(_CODES[width])
    entries.frombytes(raw)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


_EMPTY = {
    (entries, width): to_entries(bytes(entries * width), width)
    for entries, width in product((512, 4096), _CODES)
}


def empty_table(entries: int, width: int) -> "array[int]":
    """Return what stands for every table of 512 or 4096 *entries* without a grain.

    It is always the same, so that empty disks cost no memory.
    """
    return _EMPTY[entries, width]


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

    def drop(self, key: int) -> None:
        """Forget the table under *key*."""
        with self._lock:
            self._lru.pop(key, None)

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
    if any(table is empty for empty in _EMPTY.values()):
        return 200
    return len(table) * table.itemsize + 280
