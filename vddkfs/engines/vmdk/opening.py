"""Opening a VMDK: its descriptor, then every extent that it lists, each checked."""

import os
import sys
from collections.abc import Callable
from functools import partial

from vddkfs.engines.base import ExtentInfo, LinkIdentity, LinkInfo
from vddkfs.engines.vmdk import cowd, sesparse, sparse
from vddkfs.engines.vmdk.deferred import DeferredExtent, Shelf
from vddkfs.engines.vmdk.descriptor import COPY_ADVICE, Descriptor, ExtentLine
from vddkfs.engines.vmdk.device import DeviceExtent
from vddkfs.engines.vmdk.extents import Extent, FlatExtent, ZeroExtent
from vddkfs.engines.vmdk.files import (
    NOTHING_OUTSIDE,
    Archives,
    OpenFile,
    Trust,
    open_device,
    open_file,
    resolve,
    stamp_and_space,
)
from vddkfs.engines.vmdk.formats import (
    COWD,
    GRAIN_KINDS,
    SESPARSE,
    ZEROS,
    check_descriptor,
    check_extent,
    names_device,
)
from vddkfs.engines.vmdk.grains import SeSparseExtent, SparseExtent
from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.link import OpenLink, StampedFile
from vddkfs.engines.vmdk.packed import GrainCache, PackedExtent
from vddkfs.engines.vmdk.recognise import read_descriptor
from vddkfs.engines.vmdk.sparse import SparseHeader
from vddkfs.engines.vmdk.tables import DEFAULT_CACHE_BYTES, TableCache
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import DamagedSource, SourceMissing

_MAGICS = {
    "SPARSE": sparse.MAGIC,
    COWD: cowd.MAGIC,
    SESPARSE: sesparse.MAGIC,
}
MANY_EXTENTS = 512
"""What the links of a chain may have opened with them: 1 TiB in pieces of 2 GiB."""


def say(line: str) -> None:
    """Print *line* where the daemon hears what a worker says."""
    print(line, file=sys.stderr, flush=True)


class Context:
    """What the links of a chain share: memory for tables and grains, what files may name, a voice.

    *tell* gets a line for each file that can be read only by its redundant directory. *shelf* holds
    what is open of links with very many extents.
    """

    def __init__(
        self,
        trust: Trust = NOTHING_OUTSIDE,
        table_cache_bytes: int = DEFAULT_CACHE_BYTES,
        tell: Callable[[str], None] = say,
        archives: Archives | None = None,
    ) -> None:
        self.trust = trust
        self.tables = TableCache(table_cache_bytes)
        self.grains = GrainCache()
        self.shelf = Shelf()
        self.archives = archives or Archives()
        self._eager = MANY_EXTENTS
        self._deferred: dict[str, bool] = {}
        self.say = tell
        self._told: set[str] = set()

    def defers(self, path: str, extents: int) -> bool:
        """Say whether the *extents* of the link *path* are opened when they are read.

        All links of a chain together may have a bounded number open; each stays as it began.
        """
        if path not in self._deferred:
            self._deferred[path] = extents > self._eager
            self._eager -= 0 if self._deferred[path] else extents
        return self._deferred[path]

    def tell(self, path: str, line: str) -> None:
        """Tell *line* of the file *path*, of which nothing was told before."""
        if path not in self._told:
            self._told.add(path)
            self.say(line)


def open_link(path: str, context: Context) -> OpenLink:
    """Open the VMDK *path* (a descriptor, or a monolithic sparse file) with all its extents.

    Raises SourceMissing, AccessDenied, NotAVmdk, UnsupportedFormat, DamagedSource, BrokenChain (an
    extent outside the folder that is not trusted), StaleImage (replaced meanwhile).
    """
    path = os.path.abspath(path)
    opening = _Opening(path, context)
    try:
        return opening.link()
    except BaseException:
        opening.close()
        raise


class _Opening:
    """A link that is being opened: what is open of it already."""

    def __init__(self, path: str, context: Context) -> None:
        self._path = path
        self._context = context
        self._files = {path: open_file(path, context.archives)}
        self._deferred: list[DeferredExtent] = []
        self._notes: list[str] = []

    def link(self) -> OpenLink:
        descriptor, header = read_descriptor(self._files[self._path])
        check_descriptor(descriptor, self._path)
        apart = header is None and not self._files[self._path].holder
        many = apart and self._context.defers(self._path, len(descriptor.extents))
        extents: list[Extent] = []
        infos: list[ExtentInfo] = []
        start = 0
        for line in descriptor.extents:
            if many and line.kind != ZEROS and not names_device(line):
                extent, info = self._later(line, start)
            else:
                extent, info = self._extent(line, start, header)
            extents.append(extent)
            infos.append(info)
            start += line.sectors
        files: tuple[StampedFile, ...] = (*self._files.values(), *self._deferred)
        info_of_link = _describe(self._path, descriptor, files, tuple(infos), tuple(self._notes))
        return OpenLink(info_of_link, files, tuple(extents))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _later(self, line: ExtentLine, start: int) -> tuple[Extent, ExtentInfo]:
        """Return what opens the extent *line* when it is read."""
        check_extent(line, self._path, devices=False)
        name = resolve(line.name, self._path, self._context.trust)
        try:
            stamp, space = stamp_and_space(name)
        except SourceMissing:
            # It may be in an archive; and if not, that is told as of any other.
            return self._extent(line, start, None)
        info = ExtentInfo(
            line.kind, line.sectors, line.access, name, line.offset, stamp.size, space
        )
        if line.kind not in GRAIN_KINDS:
            self._check_length(name, stamp.size, line)

        def opener() -> tuple[Extent, OpenFile]:
            file = open_file(name, self._context.archives)
            try:
                return self._opened(file, line, start, None, []), file
            except BaseException:
                file.close()
                raise

        extent = DeferredExtent(
            start, line.sectors, name, self._path, stamp, opener, self._context.shelf
        )
        self._context.shelf.in_use = True
        self._deferred.append(extent)
        return extent, info

    def _extent(
        self, line: ExtentLine, start: int, header: SparseHeader | None
    ) -> tuple[Extent, ExtentInfo]:
        if line.kind == ZEROS:
            return ZeroExtent(start, line.sectors), ExtentInfo(ZEROS, line.sectors, line.access)
        check_extent(line, self._path, devices=self._context.trust.devices)
        file = self._file(line, start, header)
        info = ExtentInfo(
            kind=line.kind,
            sectors=line.sectors,
            access=line.access,
            path=file.path,
            offset=line.offset,
            file_bytes=file.size,
            allocated_bytes=file.allocated_bytes,
        )
        return self._opened(file, line, start, header, self._notes), info

    def _opened(
        self,
        file: OpenFile,
        line: ExtentLine,
        start: int,
        header: SparseHeader | None,
        notes: list[str],
    ) -> Extent:
        """Return the extent *line*, which is in *file*. What is odd about it goes to *notes*."""
        if line.kind in GRAIN_KINDS:
            layout = self._layout(file, line, header, notes)
            return self._grain_extent(file, layout, line, start)
        self._check_length(file.path, file.size, line)
        if file.direct_fd >= 0:
            return DeviceExtent(file, start, line.sectors, line.offset, self._path)
        return FlatExtent(file, start, line.sectors, line.offset)

    def _check_length(self, path: str, size: int, line: ExtentLine) -> None:
        needed = (line.offset + line.sectors) * 512
        if size < needed:
            raise DamagedSource(
                f"{printable(path)}: truncated extent: {size} bytes are there, "
                f"{needed} are needed by {printable(os.path.basename(self._path))}",
                advice=COPY_ADVICE,
            )

    def _missing(self, name: str) -> SourceMissing:
        return SourceMissing(
            f"{printable(name)}: is missing, but {printable(os.path.basename(self._path))} "
            "names it as an extent",
            advice="bring the file back, under that name",
        )

    def _file(self, line: ExtentLine, start: int, header: SparseHeader | None) -> OpenFile:
        """Return the file of the extent *line*, which is opened unless it is open already."""
        if header is not None:
            # An embedded descriptor describes the file it is in, whatever that is called by now.
            if line.kind != "SPARSE" or line.sectors > header.capacity or start:
                raise DamagedSource(
                    f"{printable(self._path)}: its embedded descriptor does not describe this file",
                    advice=COPY_ADVICE,
                )
            return self._files[self._path]
        if names_device(line):
            name = line.name
        else:
            name = resolve(line.name, self._path, self._context.trust)
        if name not in self._files:
            try:
                if names_device(line):
                    self._files[name] = open_device(name)
                else:
                    self._files[name] = open_file(name, self._context.archives)
            except SourceMissing as error:
                raise self._missing(name) from error
        return self._files[name]

    def _layout(
        self, file: OpenFile, line: ExtentLine, header: SparseHeader | None, notes: list[str]
    ) -> Layout:
        """Return the checked layout of *file*, an extent with grains."""
        layout = read_layout(file, line.kind, header)
        # Splitting tools round the header's capacity up to whole grains; the descriptor is exact.
        if layout.capacity < line.sectors:
            raise DamagedSource(
                f"{printable(file.path)}: has {layout.capacity} sectors, but its descriptor says "
                f"{line.sectors}",
                advice=COPY_ADVICE,
            )
        name = printable(os.path.basename(file.path))
        notes += [f"{name}: {note}" for note in layout.notes]
        if not layout.clean:
            notes.append(f"{name}: was not closed by whoever wrote it last")
        return layout

    def _grain_extent(self, file: OpenFile, layout: Layout, line: ExtentLine, start: int) -> Extent:
        tables, tell = self._context.tables, partial(self._context.tell, file.path)
        if layout.packed:
            grains = self._context.grains
            return PackedExtent(file, layout, start, line.sectors, self._path, tables, grains, tell)
        kind = SeSparseExtent if line.kind == SESPARSE else SparseExtent
        return kind(file, layout, start, line.sectors, self._path, tables, tell)


def read_layout(file: OpenFile, kind: str, header: SparseHeader | None = None) -> Layout:
    """Return the checked layout of *file*, which is listed as an extent of *kind*.

    *header* is what was parsed of it already. Raises DamagedSource, UnsupportedFormat.
    """
    path = printable(file.path)
    if header is None:
        head = file.head(cowd.HEADER_BYTES)
        magic = _MAGICS[kind]
        if not head.startswith(magic) and not (len(head) < 4 and magic.startswith(head)):
            raise DamagedSource(
                f"{path}: listed as an extent of kind {kind}, but it has no header of that kind",
                advice=COPY_ADVICE,
            )
        if kind == COWD:
            return cowd.parse_header(head, path, file.size)
        if kind == SESPARSE:
            constant = sesparse.parse_constant(head, path, file.size)
            volatile = file.at(constant.volatile * 512, sesparse.HEADER_BYTES)
            return sesparse.parse_header(head, volatile, path, file.size)
        header = sparse.parse_header(head, path, file.size)
    if header.at_end:
        end = file.at(max(0, file.size - sparse.FOOTER_BYTES), sparse.FOOTER_BYTES)
        header = sparse.with_footer(header, end, path, file.size)
    return sparse.layout_of(header, path, file.size)


def _describe(
    path: str,
    descriptor: Descriptor,
    files: tuple[StampedFile, ...],
    extents: tuple[ExtentInfo, ...],
    notes: tuple[str, ...],
) -> LinkInfo:
    stamps = tuple(file.stamp for file in files)
    return LinkInfo(
        path=path,
        format=descriptor.create_type,
        capacity=descriptor.capacity,
        content_id=descriptor.cid,
        parent_content_id=descriptor.parent_cid,
        parent_hint="" if descriptor.is_base else descriptor.parent_hint,
        extents=extents,
        mtime_ns=max(stamp.mtime_ns for stamp in stamps),
        identity=LinkIdentity(printable(path), descriptor.cid, descriptor.capacity, stamps),
        adapter=descriptor.ddb.get("adaptertype", ""),
        hardware_version=descriptor.ddb.get("virtualhwversion", ""),
        uuid=descriptor.ddb.get("uuid", ""),
        tools_version=descriptor.ddb.get("toolsversion", ""),
        change_tracking=descriptor.settings.get("changetrackpath", ""),
        notes=notes,
    )
