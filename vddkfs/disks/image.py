"""An image: the raw view of a disk up to one link. What the files of the mount read.

The way of a read: hole or cached block, answered at once; else the sector cache, which asks the
worker. A file opened with O_DIRECT always asks the worker.

Offsets and sizes in bytes. Methods run on the trio thread.
"""

import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from vddkfs.cache.coherence import Policy
from vddkfs.cache.frames import DiskCache
from vddkfs.cache.readahead import Stream, Streams
from vddkfs.cache.sector_cache import ImageCache
from vddkfs.disks.extents import ExtentMap
from vddkfs.disks.partitions import PartitionTable, parse
from vddkfs.engines.base import SECTOR, LinkIdentity, LinkInfo
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.protocol import MapQuery
from vddkfs.errors import EngineError, StaleImage, VddkfsError, WorkerFailed

log = logging.getLogger(__name__)

SEEK_SECONDS: Final = 2.0
"""How long SEEK_DATA and SEEK_HOLE look before everything counts as data."""
MAP_FAILURES: Final = 3
"""Failed queries after which the rest of a map counts as data."""
_ZEROS: Final = memoryview(bytes(2 * 1024 * 1024))


class Handle:
    """An open file on an image. It serves what the image was when it was opened, or ESTALE.

    *direct* reads go past the cache; *keep_cache*: the kernel may keep the pages of before.
    """

    __slots__ = ("direct", "generation", "image", "keep_cache", "streams")

    def __init__(self, image: "Image", direct: bool, keep_cache: bool, read_ahead: int) -> None:
        self.image = image
        self.generation = image.generation
        self.direct = direct
        self.keep_cache = keep_cache
        self.streams = Streams(image.capacity, read_ahead, image.cache.worth)


class Image:
    """*links*, base first, composed. *name* is what messages call it; *policy* says what is kept of
    it; *index* is its number for the worker. *read_ahead* is how far to read ahead, in bytes.

    *revalidate* compares the source with what it was, and calls ``supersede`` or ``modified``.
    """

    def __init__(
        self,
        name: str,
        links: Sequence[LinkInfo],
        *,
        index: int,
        policy: Policy,
        client: WorkerClient,
        cache: DiskCache,
        revalidate: Callable[[], Awaitable[None]],
        nursery: trio.Nursery,
        read_ahead: int,
    ) -> None:
        self.name = name
        self.links = tuple(links)
        self.number = len(links) - 1
        self._index = index
        self.capacity = links[-1].capacity * SECTOR
        self.policy = policy
        self.generation = 0
        self.mtime_ns = max(link.mtime_ns for link in links)
        self.cache = ImageCache(cache, index, self.capacity)
        self.cache.is_hole = self.is_hole
        self.map: ExtentMap | None = None
        self.superseded: Callable[[], None] = _nobody
        """Called when the image has become another disk, so that nothing old is shown above it."""
        self._client = client
        self._revalidate = revalidate
        self._nursery = nursery
        self._read_ahead = read_ahead
        self._zeros: ExtentMap | None = None
        self._fetching: trio.Event | None = None
        self._partitions: tuple[int, int, PartitionTable | None] | None = None

    async def open(self, direct: bool) -> Handle:
        """Open a file on the image, after a look at the source that began after this call.

        Raises VddkfsError if the source cannot be read any more.
        """
        await self._revalidate()
        if not self.policy.lasts:
            self.drop()
        self.want_map()
        # A frozen image that changed has become another inode: the kernel has nothing old of it.
        past = direct or not self.policy.caches
        return Handle(self, past, self.policy.lasts, self._read_ahead)

    async def read(self, handle: Handle, start: int, size: int) -> memoryview | bytes:
        """Return the *size* bytes from *start*; less only at the image's end.

        A memoryview is valid until the next await. Raises VddkfsError: StaleImage if the image is
        another disk than the one that the handle was opened on.
        """
        end = min(start + size, self.capacity)
        if end <= start:
            return b""
        if handle.generation != self.generation:
            raise self._stale()
        if handle.direct:
            data = await self.cache.read_direct(start, end)
        else:
            stream = handle.streams.access(start, end)
            found = self._read_at_once(stream, start, end)
            if found is not None:
                return found
            stream.waited()
            data = await self.cache.read(start, end, stream.sequential)
        if handle.generation != self.generation:
            raise self._stale()
        return data

    def _read_at_once(self, stream: Stream, start: int, end: int) -> memoryview | None:
        # What is fetched ahead may take the place of what a view shows: it comes before the view.
        first, last = stream.ahead
        if first < last:
            stopped = self.cache.prefetch(first, last)
            if stopped < last:
                stream.took(stopped)
        if self._zeros is not None and end - start <= len(_ZEROS) and self.is_hole(start, end):
            self.cache.counts.zero_bytes += end - start
            return _ZEROS[: end - start]
        return self.cache.read_nowait(start, end, stream.sequential)

    def is_hole(self, start: int, end: int) -> bool:
        """Say whether the range is known to be zeros for as long as the generation lasts."""
        zeros = self._zeros
        return zeros is not None and zeros.is_hole(start // SECTOR, -(-end // SECTOR))

    async def seek_data(self, offset: int) -> int:
        """Return the first offset of data at or after *offset*. Raises ENXIO past the last data."""
        found = await self._seek(offset, data=True)
        if found is None:
            raise VddkfsError("no data after that offset", errno=errno.ENXIO)
        return found

    async def seek_hole(self, offset: int) -> int:
        """Return the first offset of a hole at or after *offset*; there is one at the end.

        Raises ENXIO at or past the end.
        """
        found = await self._seek(offset, data=False)
        return self.capacity if found is None else found

    async def _seek(self, offset: int, data: bool) -> int | None:
        if not 0 <= offset < self.capacity:
            raise VddkfsError("an offset outside the file", errno=errno.ENXIO)
        sector = offset // SECTOR
        # What a live image's map calls a hole may be data by now.
        if self.map is not None and self.policy.lasts:
            found = self.map.seek_data(sector) if data else self.map.seek_hole(sector)
        else:
            found = await self._query(sector, data)
        return None if found is None else max(offset, found * SECTOR)

    async def _query(self, sector: int, data: bool) -> int | None:
        """Look for data, or for a hole, in the source itself, while the map is not there yet."""
        total = self.capacity // SECTOR
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

    def allocated_bytes(self) -> int:
        """Return the bytes of data: exact once the map is known, a guess before that.

        A guess is below the capacity, so that a copy asks for the holes, and never nothing: tar
        takes a file without blocks for one without data.
        """
        if self.map is not None:
            return self.map.allocated * SECTOR
        guess = sum(extent.allocated_bytes for link in self.links for extent in link.extents)
        return guessed_bytes(guess or self.capacity, self.capacity)

    def want_map(self) -> None:
        """Have the allocation map fetched in the background, unless it is there or on its way."""
        if self.map is None and self._fetching is None:
            self._fetching = trio.Event()
            self._nursery.start_soon(self._fetch_map, self._fetching)

    async def _fetch_map(self, fetched: trio.Event) -> None:
        try:
            while self.map is None:
                epoch = self.cache.epoch
                found = await self._fetched_map(epoch)
                if epoch == self.cache.epoch:
                    self.map = found
                    self._zeros = found if self.policy.lasts else None
        finally:
            self._fetching = None
            fetched.set()

    async def _fetched_map(self, epoch: int) -> ExtentMap:
        """Return the map, or a part of it once *epoch* is over: nobody wants it any more."""
        total = self.capacity // SECTOR
        fetched = ExtentMap(total)
        failures = 0
        while not fetched.complete and epoch == self.cache.epoch:
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
                log.warning("%s: no allocation map, so all is data: %s", self.name, error)
                fetched.append(fetched.known, total - fetched.known, True)
                break
        return fetched

    async def map_now(self) -> ExtentMap:
        """Return the allocation map; that of a live image is asked for anew, because its owner may
        have written since.
        """
        if not self.policy.lasts:
            if self._fetching is not None:
                await self._fetching.wait()
            self.map = None
        return await self.map_when_known()

    async def map_when_known(self) -> ExtentMap:
        """Return the allocation map, fetching it if need be."""
        while self.map is None:
            self.want_map()
            if self._fetching is not None:
                await self._fetching.wait()
        return self.map

    async def partitions(self) -> PartitionTable | None:
        """Return the partition table in the image, or None without one. Raises VddkfsError."""
        key = (self.generation, self.cache.epoch)
        if self._partitions is None or self._partitions[:2] != key:
            search = parse(self.capacity)
            try:
                offset, length = next(search)
                while True:
                    data = bytes(await self.cache.read(offset, offset + length, False))
                    offset, length = search.send(data)
            except StopIteration as end:
                table: PartitionTable | None = end.value
            self._partitions = (*key, table)
            for warning in table.warnings if table is not None else ():
                log.warning("%s: %s", self.name, warning)
        return self._partitions[2]

    def modified(self, identity: LinkIdentity) -> None:
        """Note that the live link was written by its owner."""
        self.mtime_ns = max([self.mtime_ns, *(stamp.mtime_ns for stamp in identity.files)])

    def supersede(self) -> None:
        """Note that the source is another disk now: handles of before get ESTALE."""
        self.generation += 1
        self.drop()
        self.superseded()

    def drop(self, start: int = 0, end: int | None = None) -> None:
        """Forget what is cached of [*start*, *end*), or of everything, and the allocation map."""
        self.cache.invalidate(start, end)
        self.map = None
        self._zeros = None

    def _stale(self) -> StaleImage:
        return StaleImage(
            f"{self.name}: the source changed after the file was opened",
            advice="close the file and open it again to see the disk as it is now",
        )


def guessed_bytes(guess: int, size: int) -> int:
    """Return *guess* as what a file of *size* bytes may be said to have allocated."""
    return max(min(guess, size - 4096), min(size, SECTOR))


def _nobody() -> None:
    """Nobody keeps anything of the image above it."""
