"""The header of a vmfsSparse extent (magic COWD): the snapshot delta of ESXi on VMFS.

Source: VMware "Virtual Disk Format 5.0", section "ESXi Host Sparse Extents". Pure: bytes in, a
``Layout`` out. The header is followed by the grain directory, then tables and grains as they were
needed. All entries are 32-bit sectors, 0 for "not here"; there is one directory only, and no entry
for zeros. A grain is usually one sector, and a table has 4096 entries.
"""

import struct

from vddkfs.engines.vmdk.descriptor import COPY_ADVICE
from vddkfs.engines.vmdk.layout import Layout, check_capacity, check_grain, directory_problem
from vddkfs.errors import DamagedSource, UnsupportedFormat

MAGIC = b"COWD"
HEADER_BYTES = 2048
ENTRIES_PER_TABLE = 4096

_LAYOUT = struct.Struct("<4sIIIIIII")
_UNCLEAN = struct.Struct("<I")
_UNCLEAN_AT = 1648


def parse_header(raw: bytes, path: str, file_bytes: int) -> Layout:
    """Parse *raw*, the first bytes of the file *path*, which has *file_bytes* in all.

    The caller has seen the magic. Raises DamagedSource, or UnsupportedFormat for a version that the
    format note does not know.
    """
    if len(raw) < HEADER_BYTES:
        raise DamagedSource(
            f"{path}: truncated header: {len(raw)} of {HEADER_BYTES} bytes are there",
            advice=COPY_ADVICE,
        )
    _magic, version, _flags, capacity, grain, directory, tables, _free = _LAYOUT.unpack_from(raw)
    if version != 1:
        raise UnsupportedFormat(
            f"{path}: COWD header version {version}",
            advice="read it through VDDK, or consolidate the snapshot",
        )
    check_capacity(path, capacity)
    check_grain(path, grain, 1)
    layout = Layout(
        capacity=capacity,
        grain=grain,
        entries=ENTRIES_PER_TABLE,
        directory=directory,
        lowest=HEADER_BYTES // 512,
        clean=_UNCLEAN.unpack_from(raw, _UNCLEAN_AT)[0] == 0,
    )
    if tables < layout.tables:
        raise DamagedSource(
            f"{path}: its grain directory has {tables} entries, but {capacity} sectors "
            f"need {layout.tables}",
            advice=COPY_ADVICE,
        )
    problem = directory_problem(directory, layout.tables, 4, layout.lowest, file_bytes)
    if problem:
        raise DamagedSource(f"{path}: {problem}", advice=COPY_ADVICE)
    return layout
