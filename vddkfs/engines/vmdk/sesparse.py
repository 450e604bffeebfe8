"""The headers of an seSparse extent: the snapshot delta of ESXi on large disks, 4 KiB grains.

VMware has not published the format; the facts are those that QEMU's driver relies on. Pure: bytes
in, a ``Layout`` out. A header that never changes leads to a volatile one, a journal, the grain
directory, an area of grain tables, and an area of grains. All numbers have 64 bits:

- a directory entry is 0, or has 1 in its highest four bits and the number of a table below;
- a table entry has its kind in its highest four bits: 0 not here, 1 unmapped by the guest, 2 zeros,
  3 a grain, whose number is bits 0 to 47, shifted left by 12, and bits 48 to 59 below them.
"""

import struct

import msgspec

from vddkfs.engines.vmdk.descriptor import COPY_ADVICE
from vddkfs.engines.vmdk.layout import Layout, check_capacity, check_grain, directory_problem
from vddkfs.errors import DamagedSource, UnsupportedFormat

MAGIC = b"\xbe\xba\xfe\xca\0\0\0\0"
VOLATILE_MAGIC = b"\xfe\xca\xfe\xca\0\0\0\0"
HEADER_BYTES = 512
TABLE_SECTORS = 64
ENTRIES_PER_TABLE = TABLE_SECTORS * 512 // 8
MIN_GRAIN = 8

MAX_PLACE = 1 << 53
"""A bound for the sectors of any file: in bytes it fits what the kernel takes."""

TABLE_TAG = 1
"""The highest four bits of a directory entry that names a table."""

UNALLOCATED, UNMAPPED, ZEROED, ALLOCATED = range(4)
"""The highest four bits of a table entry."""

_VERSION = 0x2_0000_0001
_CONSTANT = struct.Struct("<8s25Q")
_VOLATILE = struct.Struct("<8s3Q")
_VDDK_ADVICE = "read it through VDDK, or have the host consolidate the snapshot"


class Constant(msgspec.Struct, frozen=True):
    """What is needed of the header that never changes. Places and sizes in sectors."""

    capacity: int
    grain: int
    volatile: int
    directory: int
    directory_sectors: int
    tables: int
    tables_sectors: int
    grains: int


def parse_constant(raw: bytes, path: str, file_bytes: int) -> Constant:
    """Parse *raw*, the first bytes of the file *path*, which has *file_bytes* in all.

    The caller has seen the magic. Raises DamagedSource, UnsupportedFormat.
    """
    if len(raw) < HEADER_BYTES:
        raise DamagedSource(
            f"{path}: truncated header: {len(raw)} of {HEADER_BYTES} bytes are there",
            advice=COPY_ADVICE,
        )
    _magic, version, capacity, grain, table_sectors, flags, *rest = _CONSTANT.unpack_from(raw)
    if version != _VERSION or flags:
        raise UnsupportedFormat(
            f"{path}: seSparse header version {version:#x} with flags {flags:#x}",
            advice=_VDDK_ADVICE,
        )
    check_capacity(path, capacity)
    check_grain(path, grain, MIN_GRAIN)
    if table_sectors != TABLE_SECTORS:
        raise DamagedSource(
            f"{path}: grain tables of {table_sectors} sectors, where the format has "
            f"{TABLE_SECTORS}",
            advice=COPY_ADVICE,
        )
    # Behind four reserved numbers come place and size of each area.
    places, sizes = rest[4::2], rest[5::2]
    volatile, _, _, directory, tables, _, _, grains = places
    _, _, _, directory_sectors, tables_sectors, _, _, _ = sizes
    found = Constant(
        capacity, grain, volatile, directory, directory_sectors, tables, tables_sectors, grains
    )
    for what, place in (("volatile header", volatile), ("area of grain tables", tables)):
        if not 0 < place <= file_bytes // 512:
            raise DamagedSource(
                f"{path}: its {what} is said to be at sector {place}, "
                f"in a file of {file_bytes} bytes",
                advice=COPY_ADVICE,
            )
    # An empty delta may end where its first grain will be.
    if not 0 < grains <= MAX_PLACE or tables_sectors > MAX_PLACE:
        raise DamagedSource(
            f"{path}: its grains are said to begin at sector {grains}, behind "
            f"{tables_sectors} sectors of grain tables",
            advice=COPY_ADVICE,
        )
    return found


def parse_header(raw: bytes, volatile: bytes, path: str, file_bytes: int) -> Layout:
    """Return the layout of a file that begins with *raw*; *volatile* is its volatile header.

    Raises DamagedSource, or UnsupportedFormat for a file whose journal must be replayed first.
    """
    found = parse_constant(raw, path, file_bytes)
    if len(volatile) < _VOLATILE.size or not volatile.startswith(VOLATILE_MAGIC):
        raise DamagedSource(
            f"{path}: there is no volatile header at sector {found.volatile}", advice=COPY_ADVICE
        )
    if _VOLATILE.unpack_from(volatile)[3]:
        raise UnsupportedFormat(
            f"{path}: its journal was not replayed: the file was copied while the VM was running, "
            "or its host crashed",
            advice="copy it again when nobody writes it, or read it through VDDK",
        )
    layout = Layout(
        capacity=found.capacity,
        grain=found.grain,
        entries=ENTRIES_PER_TABLE,
        directory=found.directory,
        lowest=found.grains,
        zero_grains=True,
        tables_at=found.tables,
        tables_end=found.tables + found.tables_sectors,
    )
    problem = directory_problem(found.directory, layout.tables, 8, 1, file_bytes)
    if not problem and layout.tables * 8 > found.directory_sectors * 512:
        problem = (
            f"its grain directory of {found.directory_sectors} sectors is too short for "
            f"{found.capacity} sectors"
        )
    if problem:
        raise DamagedSource(f"{path}: {problem}", advice=COPY_ADVICE)
    return layout
