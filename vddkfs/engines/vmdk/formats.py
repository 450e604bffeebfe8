"""Which formats the built-in engine reads: one table of createTypes, one of kinds of extents."""

from typing import Final

from vddkfs.engines.vmdk.descriptor import Descriptor, ExtentLine
from vddkfs.engines.vmdk.sparse import CONVERT_ADVICE
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import UnsupportedFormat

_RAW_DISK: Final = "a raw device (RDM or physical disk)"

_MAPPED_ADVICE: Final = (
    "on the proxy the LUN itself can be read; on VMFS only ESXi can follow the mapping: "
    "read the disk through VDDK"
)

READ_TYPES: Final = frozenset(
    (
        "monolithicsparse",
        "monolithicflat",
        "twogbmaxextentsparse",
        "twogbmaxextentflat",
        "streamoptimized",
        "custom",
        "vmfs",
        "vmfsthin",
        "vmfspreallocated",
        "vmfseagerzeroedthick",
        "vmfssparse",
        "sesparse",
        "fulldevice",
        "partitioneddevice",
    )
)
"""The createTypes, in lower case, whose extents tell how they are read."""

_MAPPED_TYPES: Final = frozenset(
    (
        "vmfsraw",
        "vmfsrdm",
        "vmfsrdmp",
        "vmfsrawdevicemap",
        "vmfspassthroughrawdevicemap",
    )
)

FLAT: Final = "FLAT"
SPARSE: Final = "SPARSE"
COWD: Final = "VMFSSPARSE"
SESPARSE: Final = "SESPARSE"
ZEROS: Final = "ZERO"

FLAT_KINDS: Final = frozenset((FLAT, "VMFS"))
GRAIN_KINDS: Final = frozenset((SPARSE, COWD, SESPARSE))
_MAPPED_KINDS: Final = {"VMFSRDM": "vmfsRDM", "VMFSRDMP": "vmfsRDMP", "VMFSRAW": "vmfsRaw"}


def check_descriptor(descriptor: Descriptor, path: str) -> None:
    """Raise UnsupportedFormat unless the link at *path* is of a type that can be read."""
    if descriptor.encrypted:
        raise UnsupportedFormat(
            f"{printable(path)}: the disk is encrypted",
            advice="read it through VDDK, or decrypt the VM first",
        )
    kind = descriptor.create_type.lower()
    if kind in READ_TYPES:
        return
    what, advice = "an unknown format", CONVERT_ADVICE
    if kind in _MAPPED_TYPES:
        what, advice = _RAW_DISK, _MAPPED_ADVICE
    raise UnsupportedFormat(
        f"{printable(path)}: createType {printable(descriptor.create_type)[:60]} ({what}) "
        "is not read by the built-in engine",
        advice=advice,
    )


def check_extent(line: ExtentLine, path: str, *, devices: bool) -> None:
    """Raise UnsupportedFormat unless the extent *line* of the link *path* can be read.

    Devices of this machine can where *devices* are allowed.
    """
    what, advice = "", CONVERT_ADVICE
    if line.access == "NOACCESS":
        what = "an extent that nobody may read (NOACCESS)"
    elif line.name.startswith("\\\\.\\"):
        what = f"{_RAW_DISK} of Windows, {printable(line.name)}"
    elif names_device(line) and not devices:
        what = f"{_RAW_DISK}, {printable(line.name)}"
        advice = "if that is the right device of this machine, mount with `-o raw_devices=yes`"
    elif line.kind in _MAPPED_KINDS:
        what, advice = f"{_MAPPED_KINDS[line.kind]} ({_RAW_DISK})", _MAPPED_ADVICE
    elif line.kind not in FLAT_KINDS | GRAIN_KINDS:
        what = f"an extent of kind {line.kind[:40]}"
    if what:
        raise UnsupportedFormat(
            f"{printable(path)}: {what} is not read by the built-in engine", advice=advice
        )


def names_device(line: ExtentLine) -> bool:
    """Say whether the extent is a device, as Linux names them."""
    return line.kind in FLAT_KINDS and line.name.startswith("/dev/")
