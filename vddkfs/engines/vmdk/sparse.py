"""The header of a hosted sparse extent (magic KDMV): parsed and checked before anything uses it.

Source: VMware "Virtual Disk Format 5.0", sections "Hosted Sparse Extents" and "Stream-Optimized
Compressed Sparse Extents". Pure: bytes in, structs out. Lengths and offsets are in sectors of 512
bytes unless a name ends in ``_bytes``.

The header is followed by an embedded descriptor (of a monolithic disk), one or two grain
directories, the grain tables, and the grains. A directory entry is the sector of a grain table, a
table entry the sector of a grain, both 32 bits, 0 for "not here".

A streamOptimized extent was written front to back: its grains are compressed, each behind a marker
that says where it belongs and how long it is, and what was known only in the end comes last: the
tables, the directory, and a *footer*, which is the header once more with the directory's place.
"""

import struct

import msgspec

from vddkfs.engines.vmdk.descriptor import COPY_ADVICE, MAX_DESCRIPTOR_BYTES
from vddkfs.engines.vmdk.layout import Layout, check_capacity, check_grain, directory_problem
from vddkfs.errors import DamagedSource, UnsupportedFormat

MAGIC = b"KDMV"
HEADER_BYTES = 512

ENTRIES_PER_TABLE = 512
"""Grains of one grain table: the format allows no other number."""

MIN_GRAIN = 8
"""Sectors of a grain: 4 KiB is the format's minimum."""

ZERO_ENTRY = 1
"""The grain table entry of a grain that is all zeros, if the header says so."""

FOOTER_BYTES = 3 * 512
"""What a file with a footer ends with: the footer's marker, the footer, and the last marker."""

MARKER = struct.Struct("<QII")
"""A marker: a number (a grain's first sector, or how many sectors follow), a size, and a type. The
size is that of a compressed grain in bytes, whose data begins where the type would be, or 0."""

GRAIN_MARKER_BYTES = 12
"""What a compressed grain has before its data: the number and the size."""

MARKER_END, MARKER_TABLE, MARKER_DIRECTORY, MARKER_FOOTER = range(4)
"""The types of markers."""

CONVERT_ADVICE = "convert it (`qemu-img convert -O vmdk OLD NEW`), or read it through VDDK"

_LAYOUT = struct.Struct("<4sIIQQQQIQQQB4sH")
_NEWLINES = b"\n \r\n"
_VERSIONS = (1, 2, 3)
_FLAG_NEWLINES, _FLAG_REDUNDANT, _FLAG_ZERO_GRAINS = 1 << 0, 1 << 1, 1 << 2
_FLAG_COMPRESSED, _FLAG_MARKERS = 1 << 16, 1 << 17
_DEFLATE = 1
_AT_END = (1 << 64) - 1


class SparseHeader(msgspec.Struct, frozen=True):
    """What is needed of a header. *directory* is the grain directory's sector, *spare* that of the
    redundant one, 0 if there is none.

    *at_end*: the directory's place is in the footer, which ``with_footer`` reads. *lowest* is the
    first sector of the file that a grain or a grain table can be in; *zero_grains* says that
    ``ZERO_ENTRY`` has its meaning; *packed* grains are compressed, and *marked* if they have
    markers. *clean* is False where whoever wrote it did not close it.
    """

    version: int
    capacity: int
    grain: int
    directory: int
    spare: int
    lowest: int
    zero_grains: bool
    packed: bool
    marked: bool
    at_end: bool
    clean: bool
    descriptor_offset: int
    descriptor_sectors: int


def parse_header(raw: bytes, path: str, file_bytes: int) -> SparseHeader:
    """Parse *raw*, the first bytes of the file *path*, which has *file_bytes* in all.

    The caller has seen the magic. Raises DamagedSource, or UnsupportedFormat for versions that the
    format note does not know.
    """
    if len(raw) < HEADER_BYTES:
        raise DamagedSource(
            f"{path}: truncated header: {len(raw)} of {HEADER_BYTES} bytes are there",
            advice=COPY_ADVICE,
        )
    (
        _magic,
        version,
        flags,
        capacity,
        grain,
        descriptor_offset,
        descriptor_sectors,
        entries,
        redundant,
        directory,
        _overhead,
        unclean,
        newlines,
        compression,
    ) = _LAYOUT.unpack_from(raw)
    if version not in _VERSIONS:
        raise UnsupportedFormat(f"{path}: sparse header version {version}", advice=CONVERT_ADVICE)
    if flags & _FLAG_NEWLINES and newlines != _NEWLINES:
        raise DamagedSource(
            f"{path}: its line ends were changed by a transfer in text mode",
            advice="copy the file again in binary mode",
        )
    check_capacity(path, capacity)
    check_grain(path, grain, MIN_GRAIN)
    _check_entries(path, entries)
    packed = bool(flags & _FLAG_COMPRESSED)
    _check_compression(path, packed, bool(flags & _FLAG_MARKERS), compression)
    _check_descriptor(path, descriptor_offset, descriptor_sectors, file_bytes)
    spare = redundant if flags & _FLAG_REDUNDANT and not packed else 0
    if directory == 0 and flags & _FLAG_REDUNDANT:
        directory, spare = redundant, 0
    return SparseHeader(
        version=version,
        capacity=capacity,
        grain=grain,
        directory=directory,
        spare=spare,
        # Everything follows the header and the descriptor, unless that was put at the end.
        lowest=descriptor_offset + descriptor_sectors if 0 < descriptor_offset < directory else 1,
        zero_grains=bool(flags & _FLAG_ZERO_GRAINS),
        packed=packed,
        marked=bool(flags & _FLAG_MARKERS),
        at_end=directory == _AT_END,
        clean=unclean == 0,
        descriptor_offset=descriptor_offset,
        descriptor_sectors=descriptor_sectors,
    )


def build_header(
    *, capacity: int, grain: int, descriptor_sectors: int, spare: int, directory: int, lowest: int
) -> bytes:
    """Return the header of a new extent, not compressed, with two directories.

    Its descriptor, of *descriptor_sectors*, follows it; *lowest* is where grains begin.
    """
    head = _LAYOUT.pack(
        MAGIC,
        1,
        _FLAG_NEWLINES | _FLAG_REDUNDANT,
        capacity,
        grain,
        1,
        descriptor_sectors,
        ENTRIES_PER_TABLE,
        spare,
        directory,
        lowest,
        0,
        _NEWLINES,
        0,
    )
    return head.ljust(HEADER_BYTES, b"\0")


def with_footer(header: SparseHeader, end: bytes, path: str, file_bytes: int) -> SparseHeader:
    """Return *header* with the directory of the footer, which is in *end*.

    *end* is the last ``FOOTER_BYTES`` of the file *path* of *file_bytes*. Raises DamagedSource.
    """
    problem = _footer_problem(header, end)
    if problem:
        raise DamagedSource(
            f"{path}: its grain directory is named in a footer at its end, but {problem}: "
            "the file is not complete",
            advice=COPY_ADVICE,
        )
    footer = parse_header(end[512:1024], path, file_bytes)
    if (footer.capacity, footer.grain, footer.packed, footer.marked) != (
        header.capacity,
        header.grain,
        header.packed,
        header.marked,
    ):
        raise DamagedSource(f"{path}: its header and its footer differ", advice=COPY_ADVICE)
    if footer.at_end:
        raise DamagedSource(
            f"{path}: its footer does not say where the grain directory is", advice=COPY_ADVICE
        )
    return msgspec.structs.replace(
        header, directory=footer.directory, zero_grains=footer.zero_grains, at_end=False
    )


def _footer_problem(header: SparseHeader, end: bytes) -> str:
    if len(end) < FOOTER_BYTES:
        return f"the last {len(end)} bytes are too few"
    sectors, size, kind = MARKER.unpack_from(end)
    if (sectors, size, kind) != (1, 0, MARKER_FOOTER):
        return "no footer's marker is there"
    if end[512:516] != MAGIC:
        return "no header is there"
    if MARKER.unpack_from(end, 1024) != (0, 0, MARKER_END):
        return "the last marker is missing"
    return ""


def layout_of(header: SparseHeader, path: str, file_bytes: int) -> Layout:
    """Return the layout that *header* of the file *path* of *file_bytes* describes.

    A redundant directory takes the place of one that is not inside the file; the layout's notes
    then say so. Raises DamagedSource.
    """
    tables = -(-header.capacity // (header.grain * ENTRIES_PER_TABLE))

    def problem_at(directory: int) -> str:
        return directory_problem(directory, tables, 4, header.lowest, file_bytes)

    directory, spare = header.directory, header.spare
    notes: tuple[str, ...] = ()
    problem = problem_at(directory)
    if spare and problem_at(spare):
        if not problem:
            notes = ("the redundant grain directory is not inside the file",)
        spare = 0
    if problem and spare:
        notes = (f"{problem}: the redundant one is used",)
        directory, spare = spare, 0
    elif problem:
        raise DamagedSource(f"{path}: {problem}", advice=COPY_ADVICE)
    return Layout(
        capacity=header.capacity,
        grain=header.grain,
        entries=ENTRIES_PER_TABLE,
        directory=directory,
        lowest=header.lowest,
        spare_directory=spare if spare != directory else 0,
        zero_grains=header.zero_grains,
        packed=header.packed,
        marked=header.marked,
        clean=header.clean,
        notes=notes,
    )


def _check_entries(path: str, entries: int) -> None:
    if entries != ENTRIES_PER_TABLE:
        raise DamagedSource(
            f"{path}: grain tables of {entries} entries, where the format has {ENTRIES_PER_TABLE}",
            advice=COPY_ADVICE,
        )


def _check_compression(path: str, packed: bool, marked: bool, compression: int) -> None:
    if marked and not packed:
        raise UnsupportedFormat(f"{path}: uncompressed grains with markers", advice=CONVERT_ADVICE)
    if compression != (_DEFLATE if packed else 0):
        raise UnsupportedFormat(
            f"{path}: {'' if packed else 'un'}compressed grains with compression method "
            f"{compression}, where the format has {_DEFLATE if packed else 0}",
            advice=CONVERT_ADVICE,
        )


def _check_descriptor(path: str, offset: int, sectors: int, file_bytes: int) -> None:
    if offset == 0:
        return
    if sectors * 512 > MAX_DESCRIPTOR_BYTES or (offset + sectors) * 512 > file_bytes:
        raise DamagedSource(
            f"{path}: its embedded descriptor ({sectors} sectors at sector {offset}) "
            f"does not fit the file of {file_bytes} bytes",
            advice=COPY_ADVICE,
        )
