"""What a file is that may be a VMDK: a descriptor, a sparse file with one, or a bare extent."""

import os
import re

from vddkfs.engines.vmdk import cowd, sesparse, sparse
from vddkfs.engines.vmdk.descriptor import (
    COPY_ADVICE,
    MAX_DESCRIPTOR_BYTES,
    Descriptor,
    looks_like_descriptor,
    parse_descriptor,
)
from vddkfs.engines.vmdk.files import OpenFile
from vddkfs.engines.vmdk.sparse import HEADER_BYTES, SparseHeader
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import DamagedSource, NotAVmdk

_EXTENT_NAME = re.compile(r"-(flat|delta|sesparse|rdmp?|ctk|[sf]\d{3,})\.vmdk", re.I)
_RAW_NAME = re.compile(r"-(flat|f\d{3,})\.vmdk", re.I)


def read_descriptor(file: OpenFile) -> tuple[Descriptor, SparseHeader | None]:
    """Return the descriptor in *file*, and the header of the sparse file that it is embedded in.

    Raises NotAVmdk (also for an extent without a descriptor), UnsupportedFormat, DamagedSource.
    """
    path = printable(file.path)
    head = file.head(HEADER_BYTES)
    if head.startswith(sparse.MAGIC) and not _RAW_NAME.search(os.path.basename(path)):
        header = sparse.parse_header(head, path, file.size)
        if header.descriptor_offset == 0:
            raise _bare_extent(path)
        raw = file.at(header.descriptor_offset * 512, header.descriptor_sectors * 512)
        if not looks_like_descriptor(raw):
            raise DamagedSource(f"{path}: its embedded descriptor is not one", advice=COPY_ADVICE)
        return parse_descriptor(raw, path), header
    if looks_like_descriptor(head):
        if file.size > MAX_DESCRIPTOR_BYTES:
            raise NotAVmdk(
                f"{path}: begins like a descriptor but has {file.size} bytes",
                advice="name another file",
            )
        return parse_descriptor(file.head(file.size), path), None
    raise _no_descriptor(path, head)


def is_extent_name(path: str) -> bool:
    """Say whether *path* is named as VMware names the extents of a disk, not its descriptor."""
    return _EXTENT_NAME.search(os.path.basename(path)) is not None


def _no_descriptor(path: str, head: bytes) -> DamagedSource | NotAVmdk:
    if is_extent_name(path):
        return _bare_extent(path)
    if head and len(head) < HEADER_BYTES and sparse.MAGIC.startswith(head[:4]):
        return DamagedSource(
            f"{path}: truncated header: {len(head)} bytes are there", advice=COPY_ADVICE
        )
    for magic, name in ((cowd.MAGIC, "vmfsSparse (COWD)"), (sesparse.MAGIC, "seSparse")):
        if head.startswith(magic):
            return NotAVmdk(
                f"{path}: a bare {name} extent, which is one part of a disk",
                advice="name its descriptor",
            )
    what = "it is empty" if not head else "it has neither a descriptor nor a sparse header"
    return NotAVmdk(
        f"{path}: not a VMDK: {what}", advice="name a .vmdk, a .vmx, an .ova or a folder of VMDKs"
    )


def _bare_extent(path: str) -> NotAVmdk:
    return NotAVmdk(
        f"{path}: an extent file, which is one part of a disk",
        advice="name the small .vmdk text file that lists it (its descriptor)",
    )
