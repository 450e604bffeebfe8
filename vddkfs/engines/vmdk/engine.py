"""The built-in engine: a chain of VMDKs, opened, read, mapped, and written at its base.

See ``vddkfs.engines.base``.

A request is answered from the image's top link down: what a link has is read, what it does not have
is asked of its parent, and what the base does not have is zeros. Reading and mapping share that
walk and the extents' view of it, so that they cannot disagree.

Threads: ``read`` changes nothing but the caches of tables and of expanded grains, which have locks.
"""

import errno
import os
import time
from collections.abc import Iterator, Sequence
from typing import Final

from vddkfs.engines.base import LinkIdentity, MapExtent, MapSlice, Renewal, Step
from vddkfs.engines.vmdk.extents import (
    ABSENT,
    AT_ABSENT,
    AT_ZERO,
    DATA,
    PACKED,
    WouldWait,
    read_exactly,
)
from vddkfs.engines.vmdk.files import Trust
from vddkfs.engines.vmdk.link import OpenLink
from vddkfs.engines.vmdk.opening import Context, open_link
from vddkfs.engines.vmdk.owners import DEEP, Owners
from vddkfs.engines.vmdk.packed import PackedExtent
from vddkfs.engines.vmdk.tables import DEFAULT_CACHE_BYTES
from vddkfs.engines.vmdk.text import printable
from vddkfs.engines.vmdk.write import Locks, WritableBase, lock_to_read
from vddkfs.errors import DamagedSource, EngineError, StaleImage

_NOWAIT: Final = os.RWF_NOWAIT
READ_THREADS: Final = 8
"""Reads at once that a disk or a network file system does well with."""
_NO_SUCH_FLAG: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_ZEROS: Final = memoryview(bytes(1 << 20))


class VmdkEngine:
    """An opened chain; implements ``vddkfs.engines.base.Engine``.

    *paths* are the links' VMDKs, base first. The links are opened and described anew, but whether
    they belong together (content ids, hints) is what ``describe_chain`` has checked: compare
    ``identities`` with what it returned. *table_cache_bytes* bounds the tables kept in memory.
    *writable*: the base is opened to be written, and gets *content_id* at the first write, unless
    that is empty. It is then taken for a live link: its content changes, and it stays the same.

    Raises what ``open_link`` and ``WritableBase`` raise.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        follow_any: bool = False,
        raw_devices: bool = False,
        table_cache_bytes: int = DEFAULT_CACHE_BYTES,
        writable: bool = False,
        content_id: str = "",
    ) -> None:
        if not paths:
            raise ValueError("a chain has at least one link")
        self._context = Context(Trust(follow_any, raw_devices), table_cache_bytes)
        self._links: list[OpenLink] = []
        self._may_try_nowait = True
        self._writer: WritableBase | None = None
        self._locks: Locks | None = None
        try:
            for path in paths:
                self._links.append(self._open(path))
            base = self._links[0]
            if writable:
                self._writer = WritableBase(base, content_id, self._context.say)
            elif not (base.in_archive or base.deferred):
                self._locks = lock_to_read(base.info, self._context.say)
        except BaseException:
            self.close()
            raise
        self._last = len(self._links) - 1
        self._in_archive = any(link.in_archive for link in self._links)
        self._owners = Owners(self._links, self._context.tables)

    @property
    def threads(self) -> int:
        """See ``BlockingEngine``: expanding grains takes all of a processor."""
        extents = (extent for link in self._links for extent in link.extents)
        packed = any(isinstance(extent, PackedExtent) for extent in extents)
        return max(2, os.cpu_count() or 1) if packed else READ_THREADS

    def identities(self) -> Sequence[LinkIdentity]:
        """Return the links' identities as they were when they were opened, base first."""
        return tuple(link.info.identity for link in self._links)

    def read_nowait(
        self, image: int, sector: int, count: int, into: memoryview, direct: bool
    ) -> bool:
        """Fill *into* if all that takes is in memory already; say whether it was done.

        Damage makes it False as well: ``read`` then tells what is wrong.
        """
        if not self._may_try_nowait:
            return False
        shelf = self._context.shelf
        if shelf.in_use and not shelf.try_reading():
            return False
        try:
            if not self._read_one_place(image, sector, count, into, direct, _NOWAIT):
                self._compose(image, sector, into, direct, _NOWAIT)
            self._check_archives(image)
        except (BlockingIOError, WouldWait, EngineError, StaleImage):
            return False
        except OSError as error:
            if error.errno in _NO_SUCH_FLAG:
                self._may_try_nowait = False
            return False
        finally:
            if shelf.in_use:
                shelf.end_reading()
        return True

    def read(self, image: int, sector: int, count: int, into: memoryview, direct: bool) -> None:
        """Fill *into* with *count* sectors of *image* from *sector*.

        Raises EngineError, naming link and sector, if one of them cannot be read, and StaleImage if
        it is in an archive that was written.
        """
        try:
            if self._context.shelf.in_use:
                with self._context.shelf.reading():
                    self._read(image, sector, count, into, direct)
            else:
                self._read(image, sector, count, into, direct)
        finally:
            self._check_archives(image)

    def _check_archives(self, image: int) -> None:
        """Raise StaleImage if an archive was written: what was read may be of another file."""
        if self._in_archive:
            for link in self._links[: image + 1]:
                link.check_holders()

    def _read(self, image: int, sector: int, count: int, into: memoryview, direct: bool) -> None:
        try:
            if self._read_one_place(image, sector, count, into, direct, 0):
                return
        except OSError:
            pass  # met again below, where the error gets its place
        self._compose(image, sector, into, direct, 0)

    def write(self, sector: int, data: memoryview) -> None:
        """Write *data*, whole sectors, to the base from *sector* on: to image 0, and all above it.

        Any thread, several at once, and beside reads. Raises what ``WritableBase`` raises, and
        EngineError (EROFS) if it was opened for reading alone.
        """
        if self._writer is None:
            path = self._links[0].path
            raise EngineError(
                f"{printable(path)}: was opened for reading alone", errno=errno.EROFS, link=path
            )
        self._writer.write(sector, data)

    def flush(self) -> None:
        """Return when all that was written is on the disk. Raises EngineError if data was lost."""
        if self._writer is not None:
            self._writer.flush()

    def map(self, image: int, sector: int, count: int, limit: int, seconds: float) -> MapSlice:
        """Return the allocation of [*sector*, *sector* + *count*); see ``Engine``.

        Damaged ranges are data. Grain tables are read past the cache.
        """
        self._check_range(image, sector, count)
        with self._context.shelf.reading():
            return self._map(image, sector, count, limit, seconds)

    def _map(self, image: int, sector: int, count: int, limit: int, seconds: float) -> MapSlice:
        deadline = time.monotonic() + seconds
        found: list[MapExtent] = []
        start = here = sector
        kind: bool | None = None
        for data, length in self._allocation(image, sector, count):
            if data is not kind:
                if kind is not None:
                    found.append(MapExtent(start, here - start, kind))
                    if len(found) >= limit:
                        return MapSlice(tuple(found), here)
                start, kind = here, data
            here += length
            if time.monotonic() >= deadline or self._context.shelf.is_full:
                break
        if kind is not None:
            found.append(MapExtent(start, here - start, kind))
        return MapSlice(tuple(found), here)

    def revalidate(self) -> Sequence[LinkIdentity]:
        """Open all paths again, forget all tables of the last link, return what is there now.

        The last link is from now on read as it is now; if it is damaged, as far as it can be. A
        link that became another file altogether, and any lower link that changed, is only
        reported: the caller closes this engine then.
        """
        found = []
        for link in self._links[:-1]:
            fresh = self._open(link.path)
            fresh.close()
            found.append(fresh.info.identity)
        last, _ = self._renew_link(self._last)
        return (*found, last)

    def renew(self) -> Renewal:
        """Open all files of all links again, and forget every table.

        The kernel keeps the files' pages as they are on their disks, a network file system asks its
        server when a file is opened, and what is kept of a device is dropped then: nothing else is
        kept. What is another file altogether is
        only reported, as by ``revalidate``, and a damaged last link read as far as it can be.
        """
        identities, steps = [], []
        for index, link in enumerate(self._links):
            began = time.perf_counter()
            found, told = self._renew_link(index)
            seconds = time.perf_counter() - began
            identities.append(found)
            told = f"{told}, and its tables are dropped"
            steps.append(Step("tables", printable(link.path), told, seconds))
        self._context.tables.clear()
        self._context.grains.clear()
        return Renewal(tuple(identities), tuple(steps))

    def _renew_link(self, index: int) -> tuple[LinkIdentity, str]:
        """Open one link again, and read it as it is now; return what it is, and what was done."""
        old = self._links[index]
        last = index == self._last
        try:
            fresh = self._open(old.path)
        except DamagedSource as error:
            if not last:
                raise
            self._owners.forget(index)
            return old.look_again(str(error)), f"it is damaged: {error.message}"
        found = fresh.info.identity
        live = last or (index == 0 and self._writer is not None)
        if change := old.info.identity.change_to(found, live):
            fresh.close()
            return found, f"it is not what was opened: {change}"
        if index == 0 and self._writer is not None:
            self._writer.follow(fresh)
        self._links[index] = fresh
        self._owners.forget(index)
        old.close()
        return found, "its files are opened again"

    def close(self) -> None:
        """Flush what was written, and close every file. Raises EngineError if data was lost."""
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            if self._locks is not None:
                self._locks.close()
            for link in self._links:
                link.close()
            self._links.clear()

    def _open(self, path: str) -> OpenLink:
        return open_link(path, self._context)

    def _check_range(self, image: int, sector: int, count: int) -> None:
        if not 0 <= image <= self._last:
            raise ValueError(f"image {image} of {self._last + 1}")
        capacity = self._links[image].capacity
        if sector < 0 or count <= 0 or sector + count > capacity:
            raise ValueError(f"sectors {sector}+{count} of an image of {capacity}")

    def _read_one_place(
        self, image: int, sector: int, count: int, into: memoryview, direct: bool, flags: int
    ) -> bool:
        """Do a request that one place in one file, or a hole, answers; say whether it was one.

        The hot path: no objects but what preadv needs. What is said to be done may be wrong in no
        case; what is not done may be for any reason.
        """
        if len(into) != count << 9:
            raise ValueError(f"{len(into)} bytes for {count} sectors")
        self._check_range(image, sector, count)
        links = self._links
        if image >= DEEP and not direct:
            top = self._owners.top(image, sector, count)
            if top == image:
                self._owners.walked(image, sector, flags)
            image = top
        while True:
            link = links[image]
            if sector + count > link.capacity:
                return False
            extent = link.extent_at(sector)
            place = extent.locate(sector, count, direct, flags)
            if place >= 0:
                return os.preadv(extent.fd, (into,), place, flags) == len(into)
            if place == AT_ABSENT and image > 0:
                image -= 1
            elif place in (AT_ABSENT, AT_ZERO):
                _zero(into)
                return True
            else:
                return False

    def _compose(self, image: int, sector: int, into: memoryview, direct: bool, flags: int) -> None:
        """Fill *into* from *sector* on, with as many reads as it takes."""
        link = self._links[image]
        inside = min(len(into), max(0, link.capacity - sector) << 9)
        if inside < len(into):
            _zero(into[inside:])
        if inside == 0:
            return
        for piece in link.pieces(sector, inside >> 9, direct, flags):
            begin = (piece.sector - sector) << 9
            view = into[begin : begin + (piece.count << 9)]
            if piece.kind == DATA:
                extent = link.extent_at(piece.sector)
                read_exactly(
                    piece.fd,
                    view,
                    piece.offset,
                    path=extent.path,
                    link=link.path,
                    sector=piece.sector,
                    limit=extent.limit,
                    flags=flags,
                )
            elif piece.kind == PACKED:
                link.extent_at(piece.sector).unpack(piece, view, direct, flags)
            elif piece.kind == ABSENT and image > 0:
                self._compose(image - 1, piece.sector, view, direct, flags)
            else:
                _zero(view)

    def _allocation(self, image: int, sector: int, count: int) -> Iterator[tuple[bool, int]]:
        """Yield (data, sectors) of [*sector*, *sector* + *count*) in order, hole by hole."""
        link = self._links[image]
        inside = min(count, max(0, link.capacity - sector))
        if inside:
            for kind, length in link.areas(sector, inside):
                if kind == ABSENT and image > 0:
                    yield from self._allocation(image - 1, sector, length)
                else:
                    yield kind == DATA, length
                sector += length
        if inside < count:
            yield False, count - inside


def _zero(view: memoryview) -> None:
    """Fill *view* with zeros."""
    for begin in range(0, len(view), len(_ZEROS)):
        part = view[begin : begin + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]
