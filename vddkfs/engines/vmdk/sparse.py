"""The header of a hosted sparse extent (magic KDMV): parsed and checked before anything uses it.

Source: VMware "Virtual Disk Format 5.0", section "Hosted Sparse Extents". Pure: bytes in, a struct
out. Lengths and offsets are in sectors of 512 bytes unless a name ends in ``_bytes``.

The header is followed by an embedded descriptor (of a monolithic disk), one or two grain
directories, the grain tables, and the grains. A directory entry is the sector of a grain table, a
table entry the sector of a grain, both 32 bits, 0 for "not here".
"""

import struct

import msgspec

from vddkfs.engines.vmdk.descriptor import COPY_ADVICE, MAX_CAPACITY, MAX_DESCRIPTOR_BYTES
from vddkfs.errors import DamagedSource, UnsupportedFormat

MAGIC = b"KDMV"
COWD_MAGIC = b"COWD"
SESPARSE_MAGIC = b"\xbe\xba\xfe\xca\0\0\0\0"
HEADER_BYTES = 512

ENTRIES_PER_TABLE = 512
"""Grains of one grain table: the format allows no other number."""

MIN_GRAIN, MAX_GRAIN = 8, 4096
"""Sectors of a grain: 4 KiB is the format's minimum; nobody writes more than 2 MiB."""

ZERO_ENTRY = 1
"""The grain table entry of a grain that is all zeros, if the header says so."""

CONVERT_ADVICE = "convert it (`qemu-img convert -O vmdk OLD NEW`), or read it through VDDK"

_LAYOUT = struct.Struct("<4sIIQQQQIQQQB4sH")
_NEWLINES = b"\n \r\n"
_VERSIONS = (1, 2, 3)
_FLAG_NEWLINES, _FLAG_REDUNDANT, _FLAG_ZERO_GRAINS = 1 << 0, 1 << 1, 1 << 2
_FLAG_COMPRESSED, _FLAG_MARKERS = 1 << 16, 1 << 17
_GD_AT_END = (1 << 64) - 1


class SparseHeader(msgspec.Struct, frozen=True):
    """What is needed of a header. *directory* is the grain directory's sector.

    *lowest* is the first sector of the file that a grain or a grain table can be in;
    *zero_grains* says that ``ZERO_ENTRY`` has its meaning.
    """

    version: int
    capacity: int
    grain: int
    directory: int
    lowest: int
    zero_grains: bool
    descriptor_offset: int
    descriptor_sectors: int

    @property
    def grains(self) -> int:
        """Grains of the extent; the last may be partial."""
        return -(-self.capacity // self.grain)

    @property
    def tables(self) -> int:
        """Grain tables of the extent, which is the number of entries of the grain directory."""
        return -(-self.grains // ENTRIES_PER_TABLE)


def parse_header(raw: bytes, path: str, file_bytes: int) -> SparseHeader:
    """Parse *raw*, the first bytes of the file *path*, which has *file_bytes* in all.

    The caller has seen the magic. Raises DamagedSource, or UnsupportedFormat for streamOptimized
    and for versions that the format note does not know.
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
        _unclean,
        newlines,
        compression,
    ) = _LAYOUT.unpack_from(raw)
    if version not in _VERSIONS:
        raise UnsupportedFormat(f"{path}: sparse header version {version}", advice=CONVERT_ADVICE)
    if flags & (_FLAG_COMPRESSED | _FLAG_MARKERS) or compression or directory == _GD_AT_END:
        raise UnsupportedFormat(
            f"{path}: streamOptimized (compressed grains) is not read by the built-in engine",
            advice=CONVERT_ADVICE,
        )
    if flags & _FLAG_NEWLINES and newlines != _NEWLINES:
        raise DamagedSource(
            f"{path}: its line ends were changed by a transfer in text mode",
            advice="copy the file again in binary mode",
        )
    _check_geometry(path, capacity, grain, entries)
    _check_descriptor(path, descriptor_offset, descriptor_sectors, file_bytes)
    if directory == 0 and flags & _FLAG_REDUNDANT:
        directory = redundant
    header = SparseHeader(
        version=version,
        capacity=capacity,
        grain=grain,
        directory=directory,
        # Everything follows the header and the descriptor, unless that was put at the end.
        lowest=descriptor_offset + descriptor_sectors if 0 < descriptor_offset < directory else 1,
        zero_grains=bool(flags & _FLAG_ZERO_GRAINS),
        descriptor_offset=descriptor_offset,
        descriptor_sectors=descriptor_sectors,
    )
    _check_directory(path, header, file_bytes)
    return header


def _check_geometry(path: str, capacity: int, grain: int, entries: int) -> None:
    if not 0 < capacity <= MAX_CAPACITY:
        raise DamagedSource(
            f"{path}: a capacity of {capacity} sectors is not between 1 and the "
            f"{MAX_CAPACITY} of 62 TiB",
            advice=COPY_ADVICE,
        )
    if not MIN_GRAIN <= grain <= MAX_GRAIN or grain & (grain - 1):
        raise DamagedSource(
            f"{path}: a grain size of {grain} sectors is not a power of two "
            f"from {MIN_GRAIN} to {MAX_GRAIN}",
            advice=COPY_ADVICE,
        )
    if entries != ENTRIES_PER_TABLE:
        raise DamagedSource(
            f"{path}: grain tables of {entries} entries, where the format has {ENTRIES_PER_TABLE}",
            advice=COPY_ADVICE,
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


def _check_directory(path: str, header: SparseHeader, file_bytes: int) -> None:
    end_bytes = header.directory * 512 + header.tables * 4
    if header.directory < header.lowest or end_bytes > file_bytes:
        raise DamagedSource(
            f"{path}: its grain directory ({header.tables} entries at sector {header.directory}) "
            f"is not inside the file of {file_bytes} bytes",
            advice=COPY_ADVICE,
        )
