"""An image: the raw view of a disk up to one link. What the files of the mount read and write.

The way of a read: what an overlay has of it; else hole or cached block, answered at once; else the
sector cache, which asks the worker. A file opened with O_DIRECT always asks the worker. A write
goes to the overlay (see ``layer``), or to the base of the chain (see ``base_writes``), or nowhere.

Offsets and sizes in bytes. Methods run on the trio thread.
"""

import errno
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from vddkfs.cache.coherence import Policy
from vddkfs.cache.frames import DiskCache
from vddkfs.cache.readahead import Stream, Streams
from vddkfs.cache.sector_cache import ImageCache
from vddkfs.disks.allocation import Allocation, guessed_bytes
from vddkfs.disks.base_writes import BaseWrites
from vddkfs.disks.extents import ExtentMap, overlaid
from vddkfs.disks.layer import Layer
from vddkfs.disks.partitions import PartitionTable, parse
from vddkfs.engines.base import SECTOR, LinkIdentity, LinkInfo
from vddkfs.engines.client import WorkerClient
from vddkfs.errors import EngineError, StaleImage, VddkfsError

log = logging.getLogger(__name__)

_ZEROS: Final = memoryview(bytes(2 * 1024 * 1024))
_QUICK_BYTES: Final = 256 * 1024 * 1024
"""What an overlay has of an image, up to which its map is looked at for each stat."""
_RUNS_AT_ONCE: Final = 1024
"""Runs of that map that are looked at before others have their turn."""


class Handle:
    """An open file on an image. It serves what the image was when it was opened, or ESTALE.

    *direct* reads go past the cache; *keep_cache*: the kernel may keep the pages of before;
    *writes*: it was opened to be written, and ``failures`` of the image are told to it once.
    """

    __slots__ = ("direct", "failures", "generation", "image", "keep_cache", "streams", "writes")

    def __init__(
        self, image: "Image", direct: bool, keep_cache: bool, read_ahead: int, writes: bool = False
    ) -> None:
        self.image = image
        self.generation = image.generation
        self.direct = direct
        self.keep_cache = keep_cache
        self.writes = writes
        self.failures = image.failures
        self.streams = Streams(image.capacity, read_ahead, image.cache.worth)


class Image:
    """*links*, base first, composed. *name* is what messages call it; *policy* says what is kept of
    it; *index* is its number for the worker. *read_ahead* is how far to read ahead, in bytes.

    *revalidate* compares the source with what it was, and calls ``supersede`` or ``modified``.
    Where it can be written, ``layer`` or ``writes`` takes that; ``read_only`` says why not.
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
        self.capacity = links[-1].capacity * SECTOR
        self.policy = policy
        self.generation = 0
        self.mtime_ns = max(link.mtime_ns for link in links)
        self.cache = ImageCache(cache, index, self.capacity)
        self.allocation = Allocation(
            name,
            self.links,
            index=index,
            policy=policy,
            client=client,
            nursery=nursery,
            epoch=lambda: self.cache.epoch,
        )
        self.is_hole = self.cache.is_hole = self.allocation.is_hole
        self.layer: Layer | None = None
        self.writes: BaseWrites | None = None
        self.read_only = "it is mounted to be read only"
        self.above_writes = False
        """Set where a link below is written, so that its bytes may change under the kernel."""
        self.superseded: Callable[[], None] = _nobody
        """Called when the image has become another disk, so that nothing old is shown above it."""
        self._revalidate = revalidate
        self._read_ahead = read_ahead
        self._written = 0
        self._written_past = False
        """Set once a file was written past the kernel's pages: not every kernel drops those."""
        self._union: tuple[ExtentMap, int, ExtentMap] | None = None
        self._partitions: tuple[tuple[int, int, int], PartitionTable | None] | None = None

    @property
    def writable(self) -> bool:
        """Whether files on the image may be opened to be written."""
        return self.layer is not None or self.writes is not None

    @property
    def failures(self) -> int:
        """How often what was written has been lost."""
        writes = self.writes or self.layer
        return writes.failures if writes is not None else 0

    @property
    def broken(self) -> str:
        """Why nothing more is written, or empty."""
        return self.writes.broken if self.writes is not None else ""

    async def look(self) -> None:
        """Compare the source with what it was. Raises VddkfsError."""
        await self._revalidate()

    async def open(self, direct: bool, write: bool = False) -> Handle:
        """Open a file on the image, after a look at the source that began after this call.

        Raises VddkfsError if the source cannot be read any more, and EngineError with EROFS if it
        is to be written and cannot be.
        """
        if write and not self.writable:
            raise EngineError(
                f"{self.name}: not to be written: {self.read_only}", errno=errno.EROFS
            )
        await self._revalidate()
        if self.layer is not None and self.generation:
            raise StaleImage(
                f"{self.name}: the source is another disk than the one that the overlay is for",
                advice="unmount, and mount the disk as it is now with another overlay",
            )
        if not self.policy.lasts:
            self.drop()
        self.want_map()
        # A frozen image that changed has become another inode: the kernel has nothing old of it.
        past = direct or not self.policy.caches
        keep_cache = self.policy.lasts and not self._written_past
        return Handle(self, past, keep_cache, self._read_ahead, write)

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
        if self.layer is not None and self.layer.touched(start, end):

            async def below(first: int, last: int) -> memoryview | bytes:
                return await self._read_source(handle, first, last)

            return await self.layer.read(start, end, below)
        return await self._read_source(handle, start, end)

    async def _read_source(self, handle: Handle, start: int, end: int) -> memoryview | bytes:
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
        if end - start <= len(_ZEROS) and self.is_hole(start, end):
            self.cache.counts.zero_bytes += end - start
            return _ZEROS[: end - start]
        return self.cache.read_nowait(start, end, stream.sequential)

    # Writing.

    async def write(self, handle: Handle, start: int, data: bytes | memoryview) -> int:
        """Write *data* from *start* on, as far as the image goes; return how many bytes that is.

        Every read that begins after this has returned has them. Raises VddkfsError: ENOSPC at the
        end of the image, and where there is no space; what was to be written may be there in part.
        """
        room = self.capacity - start
        if room <= 0:
            raise EngineError(f"{self.name}: a write past its end", errno=errno.ENOSPC)

        def check() -> None:
            if handle.generation != self.generation:
                raise self._stale()

        check()
        part = data if len(data) <= room else memoryview(data)[:room]
        self._written_past = self._written_past or handle.direct

        async def below(first: int, last: int) -> memoryview | bytes:
            found = await self.cache.read_direct(first, last)
            check()  # What is kept must not be made of two disks.
            return found

        try:
            if self.layer is not None:
                await self.layer.write(start, part, below)
            elif self.writes is not None:
                await self.writes.write(start, part, check)
        finally:
            self._changed()
        return len(part)

    async def flush(self, handle: Handle) -> None:
        """Return when all that was written before is on the disk.

        Raises VddkfsError if it is not, and once if what was written since the file was opened, or
        since this was raised the last time, has been lost.
        """
        try:
            await self.sync()
        finally:
            lost, handle.failures = self.failures - handle.failures, self.failures
        if lost:
            raise EngineError(f"{self.name}: what was written may be lost: a flush has failed")

    async def sync(self) -> None:
        """Return when all that was written before is on the disk. Raises VddkfsError."""
        writes = self.writes or self.layer
        if writes is not None:
            await writes.flush()

    def wrote(self, start: int, end: int) -> None:
        """Note that [*start*, *end*) of a link of the image was written by this mount."""
        self.cache.wrote(start, end)
        self.allocation.wrote(start, end)
        self._changed()

    def _changed(self) -> None:
        self._written += 1
        self.mtime_ns = max(self.mtime_ns + 1, time.time_ns())

    # What is allocated.

    @property
    def map(self) -> ExtentMap | None:
        """The allocation map of the source, if it is known."""
        return self.allocation.map

    @map.setter
    def map(self, found: ExtentMap | None) -> None:
        self.allocation.map = found

    def want_map(self) -> None:
        """Have the allocation map fetched in the background, unless it is there or on its way."""
        self.allocation.want()

    async def map_when_known(self) -> ExtentMap:
        """Return the allocation map of the source, fetching it if need be."""
        return await self.allocation.when_known()

    async def map_now(self) -> ExtentMap:
        """Return the allocation map, with what an overlay has; that of a live image is asked for
        anew, because its owner may have written since.
        """
        return await self._with_layer(await self.allocation.now())

    async def _with_layer(self, source: ExtentMap) -> ExtentMap:
        layer = self.layer
        if layer is None or not layer.changed_bytes:
            return source
        known = self._union
        if known is not None and known[0] is source and known[1] == layer.changes:
            return known[2]
        changes = layer.changes
        union = await trio.to_thread.run_sync(overlaid, source, layer.extents())
        self._union = source, changes, union
        return union

    async def settle(self) -> None:
        """Have ``allocated_bytes`` tell what is allocated now, as far as that is quickly found."""
        layer, source = self.layer, self.allocation.map
        if source is not None and layer is not None and layer.changed_bytes <= _QUICK_BYTES:
            await self._with_layer(source)

    def allocated_bytes(self) -> int:
        """Return the bytes of data: exact once the map is known, a guess before that.

        A guess is below the capacity, so that a copy asks for the holes, and never nothing: tar
        takes a file without blocks for one without data.
        """
        source = self.allocation.bytes()
        layer = self.layer
        if layer is None or not layer.changed_bytes:
            return source
        union = self._union
        if union is not None and union[0] is self.map and union[1] == layer.changes:
            return union[2].allocated * SECTOR
        return guessed_bytes(source + layer.changed_bytes, self.capacity)

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
        if self.layer is None or not self.layer.changed_bytes:
            return await self.allocation.seek(offset, data)
        # The source's next place is good until the walk has passed it.
        next_below: int | None = -1
        for number, (start, end, kind) in enumerate(self.layer.kinds(offset), 1):
            if not number % _RUNS_AT_ONCE:
                await trio.lowlevel.checkpoint()
            if kind is data:
                return start
            if kind is not None:
                continue
            if next_below is not None and next_below < start:
                next_below = await self.allocation.seek(start, data)
            if next_below is not None and next_below < end:
                return next_below
        return None

    async def partitions(self) -> PartitionTable | None:
        """Return the partition table in the image, or None without one. Raises VddkfsError."""
        key = (self.generation, self.cache.epoch, self._written)
        if self._partitions is None or self._partitions[0] != key:
            reader = Handle(self, False, False, 0)
            search = parse(self.capacity)
            try:
                offset, length = next(search)
                while True:
                    data = bytes(await self.read(reader, offset, length))
                    offset, length = search.send(data)
            except StopIteration as end:
                table: PartitionTable | None = end.value
            known = self._partitions[1] if self._partitions is not None else None
            if known is not None and known == table and self._partitions is not None:
                table = known
            else:
                for warning in table.warnings if table is not None else ():
                    log.warning("%s: %s", self.name, warning)
            self._partitions = key, table
        return self._partitions[1]

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
        self.allocation.drop()

    def _stale(self) -> StaleImage:
        return StaleImage(
            f"{self.name}: the source changed after the file was opened",
            advice="close the file and open it again to see the disk as it is now",
        )


def _nobody() -> None:
    """Nobody keeps anything of the image above it."""
