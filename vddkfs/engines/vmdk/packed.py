"""Compressed grains: the extents of a streamOptimized disk.

Source: VMware "Virtual Disk Format 5.0", section "Stream-Optimized Compressed Sparse Extents".
Each grain is a zlib stream (RFC 1950), usually behind a marker with the grain's first sector and
the stream's length in bytes.

Grains are expanded on the threads that read, several at once. What was expanded is kept for a
while, and who wants what is just being expanded waits for it: a sequential reader has no grain
expanded twice, whatever pieces it reads in.
"""

import threading
from array import array
from collections.abc import Callable
from concurrent.futures import Future

from cachetools import LRUCache

from vddkfs.engines.vmdk.deflate import StreamError, expand, longest_bytes
from vddkfs.engines.vmdk.extents import PACKED, Piece, WouldWait, read_exactly
from vddkfs.engines.vmdk.files import OpenFile
from vddkfs.engines.vmdk.grains import SparseExtent
from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.sparse import GRAIN_MARKER_BYTES, MARKER
from vddkfs.engines.vmdk.tables import TableCache
from vddkfs.errors import EngineError

DEFAULT_GRAIN_BYTES = 16 << 20
"""Room for the expanded grains of 16 frames of the sector cache."""

Key = tuple[int, int, int]
"""An extent's own number, the place of a grain, and the number of that grain."""

Expanded = tuple[bytes, bytes]
"""A grain's compressed form, as it was in the file, and what it expanded to."""


class GrainCache:
    """Expanded grains by place: LRU, bounded in bytes, safe for several threads."""

    def __init__(self, max_bytes: int = DEFAULT_GRAIN_BYTES) -> None:
        self._lru: LRUCache[Key, Expanded] = LRUCache(max_bytes, getsizeof=_size)
        self._under_way: dict[Key, Future[Expanded | None]] = {}
        self._lock = threading.Lock()

    def get(self, key: Key) -> Expanded | None:
        """Return what is kept under *key*."""
        with self._lock:
            try:
                return self._lru[key]
            except KeyError:
                return None

    def fetch(self, key: Key, make: Callable[[], Expanded]) -> Expanded:
        """Return what is kept under *key*, or what *make* returns, which runs once at a time.

        Raises what *make* raises. Who waited for a failure tries for himself, and gets his own.
        """
        with self._lock:
            try:
                return self._lru[key]
            except KeyError:
                pass
            others = self._under_way.get(key)
            mine: Future[Expanded | None] = Future()
            if others is None:
                self._under_way[key] = mine
        if others is not None:
            made = others.result()
            return make() if made is None else made
        try:
            made = make()
        except BaseException:
            with self._lock:
                del self._under_way[key]
            mine.set_result(None)
            raise
        with self._lock:
            del self._under_way[key]
            if _size(made) <= self._lru.maxsize:
                self._lru[key] = made
        mine.set_result(made)
        return made

    def put(self, key: Key, made: Expanded) -> None:
        """Keep *made* under *key*."""
        with self._lock:
            if _size(made) <= self._lru.maxsize:
                self._lru[key] = made

    def clear(self) -> None:
        """Forget every grain."""
        with self._lock:
            self._lru.clear()


class PackedExtent(SparseExtent):
    """An extent of compressed grains. See ``Extent``."""

    __slots__ = ("_cache", "_file", "_grains", "_link", "_marked", "_space")

    def __init__(
        self,
        file: OpenFile,
        layout: Layout,
        start: int,
        sectors: int,
        link: str,
        cache: TableCache,
        grains: GrainCache,
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(file, layout, start, sectors, link, cache, tell)
        self._cache = cache
        self._file = file
        self._link = link
        self._grains = grains
        self._space = cache.new_keys()
        self._marked = layout.marked
        self._bounded = True

    def forget(self) -> None:
        """See ``Extent``."""
        super().forget()
        self._space = self._cache.new_keys()

    def unpack(self, piece: Piece, view: memoryview, fresh: bool, flags: int) -> None:
        """See ``Extent``. With *fresh* the file is read again, and compared with what is kept."""
        # Two entries may name one place: what is there fits one of them at most.
        key = self._space, piece.offset, (piece.sector - self.start) >> self._grain_shift
        kept = self._grains.get(key)
        if kept is None or fresh:
            if flags:
                raise WouldWait
            kept = self._fresh(key, piece) if fresh else self._fetch(key, piece)
        begin = ((piece.sector - self.start) & self._grain_mask) << 9
        view[:] = memoryview(kept[1])[begin : begin + len(view)]

    def _fetch(self, key: Key, piece: Piece) -> Expanded:
        def make() -> Expanded:
            packed = self._read(piece)
            return packed, self._expand(packed, piece)

        return self._grains.fetch(key, make)

    def _fresh(self, key: Key, piece: Piece) -> Expanded:
        packed = self._read(piece)
        kept = self._grains.fetch(key, lambda: (packed, self._expand(packed, piece)))
        if kept[0] != packed:
            kept = packed, self._expand(packed, piece)
            self._grains.put(key, kept)
        return kept

    def _append_data(
        self, found: list[Piece], sector: int, stop: int, within: int, entries: "array[int]"
    ) -> None:
        """See ``SparseExtent``: a piece for each grain."""
        for place in self._places(sector, entries):
            until = min(stop, sector - within + self.grain)
            offset = (place + self._base) << 9
            found.append(Piece(PACKED, sector, until - sector, self.fd, offset))
            sector, within = until, 0

    def _read(self, piece: Piece) -> bytes:
        """Return the compressed form of the grain that *piece* is of."""
        if not self._marked:
            # Nothing says how long it is; what follows is ignored.
            end = min(self.limit, self._file.base + self._file.size)
            return self._at(
                piece, piece.offset, max(0, min(longest_bytes(self.grain), end - piece.offset))
            )
        number, size, _ = MARKER.unpack(
            self._at(piece, piece.offset, GRAIN_MARKER_BYTES) + bytes(4)
        )
        grain = (piece.sector - self.start) & ~self._grain_mask
        if number != grain or not 0 < size <= longest_bytes(self.grain):
            raise self._directory.damage(
                piece.sector,
                f"the marker at byte {piece.offset} is of {size} bytes for sector {number} "
                f"of the extent, not for {grain}",
            )
        return self._at(piece, piece.offset + GRAIN_MARKER_BYTES, size)

    def _at(self, piece: Piece, offset: int, size: int) -> bytes:
        raw = bytearray(size)
        try:
            read_exactly(
                self.fd,
                memoryview(raw),
                offset,
                path=self.path,
                link=self._link,
                sector=piece.sector,
                limit=self.limit,
            )
        except EngineError as error:
            if isinstance(error.__cause__, OSError):
                raise
            # How many bytes of it are there says nothing about sectors.
            what = f"its compressed grain at byte {piece.offset} goes on behind the file's end"
            raise self._directory.damage(piece.sector, what) from error
        return bytes(raw)

    def _expand(self, packed: bytes, piece: Piece) -> bytes:
        """Return what *packed* expands to: at least what the disk has of the grain."""
        grain = (piece.sector - self.start) & ~self._grain_mask
        wanted = min(self.grain, self.end - self.start - grain) << 9
        whole = self.grain << 9
        try:
            found, _, ended = expand(packed, whole)
        except StreamError as error:
            raise self._broken(piece, str(error)) from error
        if not wanted <= len(found) <= whole or not ended:
            raise self._broken(piece, f"it expands to {len(found)} bytes or more")
        return bytes(found)

    def _broken(self, piece: Piece, what: str) -> EngineError:
        return self._directory.damage(
            piece.sector, f"its compressed grain at byte {piece.offset} is damaged: {what}"
        )


def _size(made: Expanded) -> int:
    return len(made[0]) + len(made[1]) + 300
