"""Writing to the base of a chain: flat disks (monolithic, split, vmfs) and hosted sparse ones.

Everything else is only read, and ``BaseWriter`` says why: links with a parent, other formats,
extents that the descriptor protects, members of archives, devices.

The content id in the descriptor is left as it is (see ``content_id``). What a file of tracked
changes ("changeTrackPath") knows is not touched either.
"""

import errno
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Protocol

from vddkfs.engines.base import ExtentInfo, LinkInfo
from vddkfs.engines.vmdk.deferred import DeferredExtent
from vddkfs.engines.vmdk.descriptor import NO_PARENT
from vddkfs.engines.vmdk.extents import Extent
from vddkfs.engines.vmdk.formats import FLAT_KINDS, SPARSE, ZEROS
from vddkfs.engines.vmdk.grains import SparseExtent
from vddkfs.engines.vmdk.link import OpenLink
from vddkfs.engines.vmdk.sparse import HEADER_BYTES, MAGIC, layout_of, parse_header
from vddkfs.engines.vmdk.text import printable
from vddkfs.engines.vmdk.write.allocate import SparseWriter
from vddkfs.engines.vmdk.write.writable import Loss, WritableFile, open_writable, refusal
from vddkfs.errors import EngineError, VddkfsError

_FLAT_TYPES = frozenset(("monolithicflat", "vmfs", "twogbmaxextentflat"))
_SPARSE_TYPES = frozenset(("monolithicsparse", "twogbmaxextentsparse"))
_FLAGS_BYTE = 8
_PACKED_FLAGS = 3 << 16
_CONVERT_ADVICE = "convert it (`qemu-img convert -O vmdk OLD NEW`), or mount it without rw"
_CHECK_ADVICE = "`vddkfs check` tells more"

_FileId = tuple[int, int]


class _Writer(Protocol):
    """Writes one extent. Sectors are those of the image."""

    def check(self, sector: int, data: memoryview) -> None:
        """Raise EngineError if this can be written by no means."""

    def write(self, sector: int, data: memoryview) -> None:
        """Write *data* from *sector* on."""

    def prove(self) -> None:
        """Write the first sector as it is, if that changes nothing."""

    def finish(self) -> None:
        """Do what is left when all was flushed."""


class BaseWriter:
    """Writes sectors of the base of a chain. ``close`` ends it; *link* stays open and its own.

    Nobody else may write the files meanwhile: two that allocate at once destroy them. That is the
    caller's to see to (see ``opened``).

    Raises a VddkfsError with errno EROFS, saying why, if *link* cannot be written.
    """

    def __init__(self, link: OpenLink) -> None:
        _check_link(link)
        self.capacity = link.capacity
        self._links = [link]
        self._loss = Loss()
        self._told = False
        self._closed = False
        self._close_lock = threading.Lock()
        self._files: dict[int, WritableFile] = {}
        self._starts = [extent.start for extent in link.extents]
        self._writers: list[_Writer] = []
        self._ends = [extent.end for extent in link.extents]
        try:
            for index, info in enumerate(link.info.extents):
                self._writers.append(self._open(link, index, info))
        except BaseException:
            self._close_files()
            raise

    def prove(self) -> None:
        """See to it that the disk takes writes: the first sector is written as it is.

        That changes no byte. Where a sparse file has no place for it there is nothing to write: its
        files are open for writing all the same. It is not waited for, because the kernel may have
        much to write of a process that was killed; the next flush waits for that. Raises
        EngineError.
        """
        self._writers[0].prove()
        for file in self._files.values():
            file.suspect()

    def write(self, sector: int, data: memoryview) -> None:
        """Write *data*, whole sectors, from *sector* on.

        Any thread, several at once. A write is in the file when this returns, and on the disk when
        a ``flush`` that was called later returns.

        Raises ValueError for sectors that the link does not have, and EngineError with the errno of
        what failed: a part of the request may have been written then, sector by sector, and a
        sparse file may have grown. EROFS: the place is an extent of zeros and *data* is not.
        """
        size = len(data)
        if sector < 0 or not size or size % 512 or sector + size // 512 > self.capacity:
            raise ValueError(f"{size} bytes from sector {sector} of a link of {self.capacity}")
        if self._closed:
            raise ValueError("the writer is closed")
        self._loss.check()
        pieces = list(self._pieces(sector, data))
        for writer, first, part in pieces:
            writer.check(first, part)
        for writer, first, part in pieces:
            writer.write(first, part)

    def flush(self) -> None:
        """Return when all writes that have returned are on the disk.

        Raises EngineError if that failed, now or before: then data is lost, which the kernel tells
        once only, and this writer accepts no more.
        """
        try:
            for file in self._files.values():
                file.sync()
            self._loss.check()
        except EngineError:
            self._told = True
            raise

    def follow(self, link: OpenLink) -> None:
        """Have the tables that *link* keeps forgotten when they change: the same files, opened
        again. To be called before anybody reads by it; the link before it is remembered as well."""
        if [extent.start for extent in link.extents] != self._starts:
            raise ValueError(f"{link.path} has other extents than before")
        self._links = [self._links[-1], link]

    def close(self) -> None:
        """Flush, mark sparse files as complete, and close all files; no other call may run.

        Raises EngineError for what failed, unless a ``flush`` has told that data is lost. All is
        closed then as well.
        """
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        told = self._told
        try:
            self.flush()
            for writer in self._writers:
                writer.finish()
        except EngineError:
            if not told:
                raise
        finally:
            self._close_files()

    def _pieces(self, sector: int, data: memoryview) -> Iterator[tuple[_Writer, int, memoryview]]:
        """Yield (writer, sector, data) for each extent that the request concerns."""
        done = 0
        index = bisect_right(self._starts, sector) - 1
        while done < len(data):
            here = sector + done // 512
            stop = min(len(data), done + (self._ends[index] - here) * 512)
            yield self._writers[index], here, data[done:stop]
            done = stop
            index += 1

    def _open(self, link: OpenLink, index: int, info: ExtentInfo) -> _Writer:
        extent = link.extents[index]
        if info.kind == ZEROS:
            return _ZeroWriter(link.path)
        file = self._files.get(extent.fd)
        if file is None:
            fd = open_writable(extent.fd, extent.path)
            file = WritableFile(fd, extent.path, link.path, self._loss)
            self._files[extent.fd] = file
        if info.kind == SPARSE:
            return _sparse_writer(file, extent, partial(self._forget, index))
        return _FlatWriter(file, info.offset - extent.start)

    def _forget(self, index: int, number: int) -> None:
        """Have readers forget grain table *number* of extent *index*."""
        for link in self._links:
            extent = link.extents[index]
            if isinstance(extent, SparseExtent):
                extent.forget_table(number)

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class _ZeroWriter:
    """An extent without a file: it is zeros, and can be told so."""

    def __init__(self, link: str) -> None:
        self._link = link

    def check(self, sector: int, data: memoryview) -> None:
        """See ``_Writer``."""
        if data.tobytes() != bytes(len(data)):
            raise EngineError(
                f"{printable(self._link)}: sector {sector} is in an extent that has no file and is "
                "always zeros",
                advice="convert the disk to one that has files for all of it",
                errno=errno.EROFS,
                link=self._link,
                sector=sector,
            )

    def write(self, sector: int, data: memoryview) -> None:
        """See ``_Writer``: they are zeros already."""

    def prove(self) -> None:
        """See ``_Writer``: there is nothing to write."""

    def finish(self) -> None:
        """See ``_Writer``."""


class _FlatWriter:
    """An extent whose sectors lie in *file* as they are, *shift* sectors behind their number."""

    def __init__(self, file: WritableFile, shift: int) -> None:
        self._file = file
        self._shift = shift

    def check(self, sector: int, data: memoryview) -> None:
        """See ``_Writer``."""

    def write(self, sector: int, data: memoryview) -> None:
        """See ``_Writer``."""
        self._file.write(data, (sector + self._shift) * 512, sector)

    def prove(self) -> None:
        """See ``_Writer``."""
        self.write(0, memoryview(self._file.read(512, self._shift * 512, 0)))

    def finish(self) -> None:
        """See ``_Writer``."""


def check_described(info: LinkInfo) -> None:
    """Raise the refusal if what is described forbids writing."""
    if info.parent_content_id != NO_PARENT:
        raise refusal(info.path, "it has a parent: only the base of a chain is written")
    kind = info.format.lower()
    if kind not in _FLAT_TYPES | _SPARSE_TYPES:
        what = printable(info.format)[:60]
        raise refusal(info.path, f"disks of type {what} are only read", _CONVERT_ADVICE)
    for extent in info.extents:
        if extent.access != "RW":
            what = f"its descriptor says {extent.access} of an extent"
            raise refusal(extent.path or info.path, what)
        fits = extent.kind in FLAT_KINDS if kind in _FLAT_TYPES else extent.kind == SPARSE
        if not fits and extent.kind != ZEROS:
            what = f"an extent of kind {extent.kind} in a disk of type {printable(info.format)}"
            raise refusal(extent.path or info.path, what, _CONVERT_ADVICE)


def _check_link(link: OpenLink) -> None:
    """Raise the refusal if the descriptor, or what its extents share, forbids writing."""
    info = link.info
    check_described(info)
    if any(isinstance(extent, DeferredExtent) for extent in link.extents):
        what = f"its {len(link.extents)} extents are more than are kept open"
        raise refusal(info.path, what, _CONVERT_ADVICE)
    _check_shared(link.extents, info)


def _check_shared(extents: tuple[Extent, ...], info: LinkInfo) -> None:
    """Refuse a sparse file that is two extents, and a descriptor that is its own flat extent."""
    seen: set[_FileId] = set()
    try:
        found = os.stat(info.path)
        named = {(found.st_dev, found.st_ino)}
    except OSError:
        named = set()
    for extent, told in zip(extents, info.extents, strict=True):
        if told.kind == ZEROS:
            continue
        found = os.fstat(extent.fd)
        identity = found.st_dev, found.st_ino
        if told.kind == SPARSE and identity in seen:
            raise refusal(told.path, "two extents are in this one sparse file", _CHECK_ADVICE)
        if told.kind != SPARSE and identity in named:
            raise refusal(told.path, "its descriptor is in the same file", _CHECK_ADVICE)
        seen.add(identity)


def _sparse_writer(
    file: WritableFile, extent: Extent, forget: Callable[[int], None]
) -> SparseWriter:
    """Return the writer of the hosted sparse extent in *file*; its headers are read again.

    Raises the refusal if the file's structures are such that nothing may be written.
    """
    path = printable(file.path)
    raw = file.read(HEADER_BYTES, 0, extent.start)
    flags = int.from_bytes(raw[_FLAGS_BYTE : _FLAGS_BYTE + 4], "little")
    if not raw.startswith(MAGIC):
        raise refusal(file.path, "it is not a hosted sparse file", _CONVERT_ADVICE)
    if flags & _PACKED_FLAGS:
        raise refusal(file.path, "its grains are compressed", _CONVERT_ADVICE)
    try:
        header = parse_header(raw, path, file.size())
        layout = layout_of(header, path, file.size())
    except VddkfsError as error:
        why = error.message.removeprefix(f"{path}: ")
        raise refusal(file.path, why, _CHECK_ADVICE) from error
    if layout.notes:
        raise refusal(file.path, layout.notes[0], _CHECK_ADVICE)
    length = -(-layout.tables * 4 // 512)
    reserved = [(0, 1), (layout.directory, layout.directory + length)]
    if header.descriptor_offset:
        end = header.descriptor_offset + header.descriptor_sectors
        reserved.append((header.descriptor_offset, end))
    if layout.spare_directory:
        reserved.append((layout.spare_directory, layout.spare_directory + length))
    reserved.sort()
    if any(end > after for (_, end), (after, _) in pairwise(reserved)):
        raise refusal(file.path, "its header, descriptor or directories overlap", _CHECK_ADVICE)
    sectors = extent.end - extent.start
    return SparseWriter(file, layout, extent.start, sectors, tuple(reserved), forget)
