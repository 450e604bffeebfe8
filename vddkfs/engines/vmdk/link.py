"""One VMDK: its descriptor, opened extents, and identity.

The files of a link stay open from ``open_link`` to ``OpenLink.close``; all of them are regular
files, and what the descriptor promises of them was checked: a link that opens can be read, but for
damage inside its grain tables, which shows when a range is read.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Iterator

from vddkfs.engines.base import ExtentInfo, LinkIdentity, LinkInfo
from vddkfs.engines.vmdk.descriptor import (
    COPY_ADVICE,
    MAX_DESCRIPTOR_BYTES,
    Descriptor,
    ExtentLine,
    looks_like_descriptor,
    parse_descriptor,
)
from vddkfs.engines.vmdk.extents import Extent, FlatExtent, Piece, ZeroExtent
from vddkfs.engines.vmdk.files import OpenFile, open_file, resolve
from vddkfs.engines.vmdk.grains import SparseExtent
from vddkfs.engines.vmdk.sparse import (
    CONVERT_ADVICE,
    COWD_MAGIC,
    HEADER_BYTES,
    MAGIC,
    SESPARSE_MAGIC,
    SparseHeader,
    parse_header,
)
from vddkfs.engines.vmdk.tables import TableCache
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import DamagedSource, NotAVmdk, SourceMissing, UnsupportedFormat

_READABLE_TYPES = frozenset(
    (
        "monolithicsparse",
        "monolithicflat",
        "twogbmaxextentsparse",
        "twogbmaxextentflat",
        "vmfs",
    )
)
_RAW_DISK = "a raw device (RDM or physical disk)"
_UNREAD_TYPES = {
    "streamoptimized": "compressed grains",
    "vmfssparse": "a COWD snapshot extent of ESXi",
    "vmfsthin": "an ESXi format",
    "sesparse": "a space-efficient snapshot extent of ESXi",
    "custom": "a mixture that only its maker knows",
    "fulldevice": _RAW_DISK,
    "partitioneddevice": _RAW_DISK,
    "vmfsraw": _RAW_DISK,
    "vmfsrdm": _RAW_DISK,
    "vmfsrdmp": _RAW_DISK,
    "vmfsrawdevicemap": _RAW_DISK,
    "vmfspassthroughrawdevicemap": _RAW_DISK,
}
_UNREAD_KINDS = {
    "VMFSSPARSE": "vmfsSparse (a COWD snapshot extent of ESXi)",
    "SESPARSE": "seSparse (a space-efficient snapshot extent of ESXi)",
    "VMFSRDM": f"vmfsRDM ({_RAW_DISK})",
    "VMFSRAW": f"vmfsRaw ({_RAW_DISK})",
}
_EXTENT_NAME = re.compile(r"-(flat|delta|sesparse|rdmp?|ctk|[sf]\d{3,})\.vmdk", re.I)
_RAW_NAME = re.compile(r"-(flat|f\d{3,})\.vmdk", re.I)


class OpenLink:
    """An opened VMDK. *extents* cover [0, ``capacity``) sectors without gaps."""

    def __init__(
        self, info: LinkInfo, files: tuple[OpenFile, ...], extents: tuple[Extent, ...]
    ) -> None:
        self.info = info
        self.path = info.path
        self.capacity = info.capacity
        self.extents = extents
        self._files = files
        self._starts = [extent.start for extent in extents]

    def extent_at(self, sector: int) -> Extent:
        """Return the extent that has *sector*, which is below ``capacity``."""
        return self.extents[bisect_right(self._starts, sector) - 1]

    def pieces(self, sector: int, count: int, fresh: bool, flags: int) -> list[Piece]:
        """Return the runs of [*sector*, *sector* + *count*), all in the link; see ``Extent``."""
        extent = self.extent_at(sector)
        if sector + count <= extent.end:
            return extent.pieces(sector, count, fresh, flags)
        found: list[Piece] = []
        end = sector + count
        while sector < end:
            extent = self.extent_at(sector)
            stop = min(end, extent.end)
            found += extent.pieces(sector, stop - sector, fresh, flags)
            sector = stop
        return found

    def areas(self, sector: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield (kind, sectors) of [*sector*, *sector* + *count*); see ``Extent``."""
        end = sector + count
        while sector < end:
            extent = self.extent_at(sector)
            stop = min(end, extent.end)
            yield from extent.areas(sector, stop - sector)
            sector = stop

    def look_again(self, problem: str) -> LinkIdentity:
        """Forget all tables, and return what the open files are now.

        For a link that cannot be opened anew because of *problem*. Raises StaleImage, SourceMissing
        or AccessDenied if a path leads to another file than the one that is open.
        """
        for extent in self.extents:
            extent.forget()
        stamps = tuple(file.stamp_now() for file in self._files)
        was = self.info.identity
        return LinkIdentity(was.path, was.content_id, was.capacity, stamps, problem)

    def close(self) -> None:
        """Close the link's files."""
        for file in self._files:
            file.close()


def open_link(path: str, cache: TableCache, *, follow_any: bool = False) -> OpenLink:
    """Open the VMDK *path* (a descriptor, or a monolithic sparse file) with all its extents.

    Raises SourceMissing, AccessDenied, NotAVmdk, UnsupportedFormat, DamagedSource, BrokenChain (an
    extent outside the folder, without *follow_any*), StaleImage (replaced meanwhile).
    """
    path = os.path.abspath(path)
    files = {path: open_file(path)}
    try:
        descriptor, header = read_descriptor(files[path])
        _check_supported(descriptor, path)
        extents: list[Extent] = []
        infos: list[ExtentInfo] = []
        start = 0
        for line in descriptor.extents:
            extent, info = _open_extent(line, start, header, path, files, cache, follow_any)
            extents.append(extent)
            infos.append(info)
            start += line.sectors
        link = _describe(path, descriptor, tuple(files.values()), tuple(infos))
        return OpenLink(link, tuple(files.values()), tuple(extents))
    except BaseException:
        for file in files.values():
            file.close()
        raise


def read_descriptor(file: OpenFile) -> tuple[Descriptor, SparseHeader | None]:
    """Return the descriptor in *file*, and the header of the sparse file that it is embedded in.

    Raises NotAVmdk (also for an extent without a descriptor), UnsupportedFormat, DamagedSource.
    """
    path = printable(file.path)
    head = file.head(HEADER_BYTES)
    if head.startswith(MAGIC) and not _RAW_NAME.search(os.path.basename(path)):
        header = parse_header(head, path, file.size)
        if header.descriptor_offset == 0:
            raise _bare_extent(path)
        raw = file.at(header.descriptor_offset * 512, header.descriptor_sectors * 512)
        if not looks_like_descriptor(raw):
            raise DamagedSource(
                f"{path}: its embedded descriptor is not one",
                advice=COPY_ADVICE,
            )
        return parse_descriptor(raw, path), header
    if looks_like_descriptor(head):
        if file.size > MAX_DESCRIPTOR_BYTES:
            raise NotAVmdk(
                f"{path}: begins like a descriptor but has {file.size} bytes",
                advice="name another file",
            )
        return parse_descriptor(file.head(file.size), path), None
    if _EXTENT_NAME.search(os.path.basename(path)):
        raise _bare_extent(path)
    if head and len(head) < HEADER_BYTES and MAGIC.startswith(head[:4]):
        raise DamagedSource(
            f"{path}: truncated header: {len(head)} bytes are there", advice=COPY_ADVICE
        )
    for magic, name in ((COWD_MAGIC, "vmfsSparse (COWD)"), (SESPARSE_MAGIC, "seSparse")):
        if head.startswith(magic):
            raise NotAVmdk(
                f"{path}: a bare {name} extent, which is one part of a disk",
                advice="name its descriptor",
            )
    what = "it is empty" if not head else "it has neither a descriptor nor a sparse header"
    raise NotAVmdk(f"{path}: not a VMDK: {what}", advice="name a .vmdk, a .vmx or a folder of them")


def is_extent_name(path: str) -> bool:
    """Say whether *path* is named as VMware names the extents of a disk, not its descriptor."""
    return _EXTENT_NAME.search(os.path.basename(path)) is not None


def _bare_extent(path: str) -> NotAVmdk:
    return NotAVmdk(
        f"{path}: an extent file, which is one part of a disk",
        advice="name the small .vmdk text file that lists it (its descriptor)",
    )


def _check_supported(descriptor: Descriptor, path: str) -> None:
    if descriptor.encrypted:
        raise UnsupportedFormat(
            f"{printable(path)}: the disk is encrypted",
            advice="read it through VDDK, or decrypt the VM first",
        )
    kind = descriptor.create_type.lower()
    if kind not in _READABLE_TYPES:
        what = _UNREAD_TYPES.get(kind, "an unknown format")
        raise UnsupportedFormat(
            f"{printable(path)}: createType {printable(descriptor.create_type)[:60]} ({what}) "
            "is not read by the built-in engine",
            advice=CONVERT_ADVICE,
        )


def _open_extent(
    line: ExtentLine,
    start: int,
    header: SparseHeader | None,
    path: str,
    files: dict[str, OpenFile],
    cache: TableCache,
    follow_any: bool,
) -> tuple[Extent, ExtentInfo]:
    """Open the extent of *line*, adding its file to *files* unless it is there already."""
    if line.kind == "ZERO":
        return ZeroExtent(start, line.sectors), ExtentInfo("ZERO", line.sectors, line.access)
    _check_kind(line, path)
    if header is not None:
        # An embedded descriptor describes the file it is in, whatever that is called by now.
        if line.kind != "SPARSE" or line.sectors > header.capacity:
            raise DamagedSource(
                f"{printable(path)}: its embedded descriptor does not describe this file",
                advice=COPY_ADVICE,
            )
        name = path
    else:
        name = resolve(line.name, path, follow_any=follow_any)
    file = files.get(name) or _open_named(name, path)
    files[name] = file
    info = ExtentInfo(
        kind=line.kind,
        sectors=line.sectors,
        access=line.access,
        path=name,
        offset=line.offset,
        file_bytes=file.size,
        allocated_bytes=file.allocated_bytes,
    )
    if line.kind == "SPARSE":
        header = header or _sparse_header(file, line)
        return SparseExtent(file, header, start, line.sectors, path, cache), info
    needed = (line.offset + line.sectors) * 512
    if file.size < needed:
        raise DamagedSource(
            f"{printable(name)}: truncated extent: {file.size} bytes are there, "
            f"{needed} are needed by {printable(os.path.basename(path))}",
            advice=COPY_ADVICE,
        )
    return FlatExtent(file, start, line.sectors, line.offset), info


def _check_kind(line: ExtentLine, path: str) -> None:
    what = ""
    if line.access == "NOACCESS":
        what = "an extent that nobody may read (NOACCESS)"
    elif line.name.startswith(("/dev/", "\\\\.\\")):
        what = f"{_RAW_DISK}, {printable(line.name)}"
    elif line.kind not in ("SPARSE", "FLAT", "VMFS"):
        what = _UNREAD_KINDS.get(line.kind, f"an extent of kind {line.kind[:40]}")
    if what:
        raise UnsupportedFormat(
            f"{printable(path)}: {what} is not read by the built-in engine", advice=CONVERT_ADVICE
        )


def _open_named(name: str, path: str) -> OpenFile:
    try:
        return open_file(name)
    except SourceMissing as error:
        raise SourceMissing(
            f"{printable(name)}: is missing, but {printable(os.path.basename(path))} "
            "names it as an extent",
            advice="bring the file back, under that name",
        ) from error


def _sparse_header(file: OpenFile, line: ExtentLine) -> SparseHeader:
    """Return the checked header of *file*, an extent listed in another file."""
    path = printable(file.path)
    head = file.head(HEADER_BYTES)
    for magic, name in ((COWD_MAGIC, "VMFSSPARSE"), (SESPARSE_MAGIC, "SESPARSE")):
        if head.startswith(magic):
            raise UnsupportedFormat(
                f"{path}: {_UNREAD_KINDS[name]} is not read by the built-in engine",
                advice=CONVERT_ADVICE,
            )
    if not head.startswith(MAGIC) and not (len(head) < 4 and MAGIC.startswith(head)):
        raise DamagedSource(
            f"{path}: listed as a sparse extent, but it has no sparse header",
            advice=COPY_ADVICE,
        )
    header = parse_header(head, path, file.size)
    # Splitting tools round the header's capacity up to whole grains; the descriptor is exact.
    if header.capacity < line.sectors:
        raise DamagedSource(
            f"{path}: has {header.capacity} sectors, but its descriptor says {line.sectors}",
            advice=COPY_ADVICE,
        )
    return header


def _describe(
    path: str, descriptor: Descriptor, files: tuple[OpenFile, ...], extents: tuple[ExtentInfo, ...]
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
    )
