"""A new VMDK that is the child of another: a monolithicSparse file with the grains that differ.

Source: VMware "Virtual Disk Format 5.0", as in ``sparse``. Header, embedded descriptor, a grain
directory with all its tables, the same once more, and the grains in their order. The first set is
the redundant one. A grain of zeros has a place like any other, because version 1 has no other way
to say that it is not its parent's; nothing is written there, so that it is a hole of the file.

Lengths and places are in sectors of 512 bytes unless a name ends in ``_bytes``.
"""

import os
import re
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from vddkfs.engines.base import SECTOR
from vddkfs.engines.vmdk.descriptor import NO_PARENT, Descriptor
from vddkfs.engines.vmdk.sparse import ENTRIES_PER_TABLE, build_header
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import UnsupportedFormat, UsageError

GRAIN_BYTES: Final = 65536
_GRAIN: Final = GRAIN_BYTES // SECTOR
_TABLE: Final = ENTRIES_PER_TABLE * 4 // SECTOR
_DESCRIPTOR: Final = 20
"""Sectors that every writer of the format gives to the descriptor."""
_MOST: Final = 1 << 32
"""Sectors of a file: places have 32 bits."""
_LONGEST_HINT: Final = 1023
"""Bytes of a parent's name that other readers take."""

Write = Callable[[bytes | memoryview, int], None]
"""Write bytes at an offset, in bytes."""

_COPIED: Final = {
    "adaptertype": "adapterType",
    "virtualhwversion": "virtualHWVersion",
    "toolsversion": "toolsVersion",
    "toolsinstalltype": "toolsInstallType",
    "geometry.cylinders": "geometry.cylinders",
    "geometry.heads": "geometry.heads",
    "geometry.sectors": "geometry.sectors",
    "geometry.bioscylinders": "geometry.biosCylinders",
    "geometry.biosheads": "geometry.biosHeads",
    "geometry.biossectors": "geometry.biosSectors",
}
"""What a child has of its parent's disk data base: keys as the parser has them, and as written."""
_HARMLESS: Final = re.compile(r"[\w.+-]{1,64}", re.ASCII)
_UNWRITABLE: Final = re.compile(r"[\"\x00-\x1f\x7f]")


class Parent(msgspec.Struct, frozen=True):
    """The link that the child is made on: its absolute *path*, *content_id* and *capacity*.

    *ddb* is what ``copied`` found.
    """

    path: str
    content_id: str
    capacity: int
    ddb: Mapping[str, str]


def copied(descriptors: Sequence[Descriptor]) -> dict[str, str]:
    """Return the entries of the disk data base that a child has of *descriptors*, nearest first."""
    found: dict[str, str] = {}
    for key, name in _COPIED.items():
        values = (each.ddb.get(key, "") for each in descriptors)
        value = next((each for each in values if each), "")
        if _HARMLESS.fullmatch(value):
            found[name] = value
    return found


def hint_of(path: str, parent: str) -> str:
    """Return how the child *path* names its *parent*: without a folder if it is beside it.

    Raises UsageError for a name that a descriptor cannot have.
    """
    folder = os.path.dirname(parent)
    beside = os.path.exists(folder) and os.path.samefile(os.path.dirname(path), folder)
    hint = os.path.basename(parent) if beside else parent
    for name in (hint, os.path.basename(path)):
        if _UNWRITABLE.search(name) or len(os.fsencode(name)) > _LONGEST_HINT:
            raise UsageError(
                f"{printable(name)}: a VMDK cannot name such a file",
                cause="quotation marks, control characters, or more than 1023 bytes",
                advice="rename it, or export the disk as raw",
            )
    return hint


def descriptor(path: str, parent: Parent) -> bytes:
    """Return the descriptor of the child *path*, with a content id of its own."""
    hint = hint_of(path, parent.path)
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="UTF-8"',
        f"CID={_new_id(parent.content_id)}",
        f"parentCID={parent.content_id}",
        'createType="monolithicSparse"',
        f'parentFileNameHint="{hint}"',
        "",
        "# Extent description",
        f'RW {parent.capacity} SPARSE "{os.path.basename(path)}"',
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        *(f'ddb.{key} = "{value}"' for key, value in _ddb(parent).items()),
    ]
    return os.fsencode("\n".join(lines) + "\n")


def write_child(
    write: Write,
    path: str,
    parent: Parent,
    count: int,
    grains: Iterable[tuple[int, bytes | memoryview | None]],
) -> int:
    """Write a child that will be called *path*; return how many bytes the file must be long.

    *grains* are (number, content, None for zeros), *count* of them in rising order, each of
    ``GRAIN_BYTES``. Raises UsageError for names, UnsupportedFormat for a file that would be longer
    than the format allows, and what *write* and *grains* raise.
    """
    text = descriptor(path, parent)
    tables = -(-parent.capacity // (_GRAIN * ENTRIES_PER_TABLE))
    directory = -(-tables * 4 // SECTOR)
    spare_at = 1 + _DESCRIPTOR
    primary_at = spare_at + directory + tables * _TABLE
    lowest = -(-(primary_at + directory + tables * _TABLE) // _GRAIN) * _GRAIN
    end = lowest + count * _GRAIN
    if end > _MOST:
        raise UnsupportedFormat(
            f"{printable(path)}: {count} changed grains of 64 KiB are more than a VMDK of this "
            "format can have (2 TiB)",
            advice="export the disk as raw",
        )
    assert len(text) <= _DESCRIPTOR * SECTOR
    sets = (spare_at, primary_at)
    for at in sets:
        places = range(at + directory, at + directory + tables * _TABLE, _TABLE)
        write(struct.pack(f"<{tables}I", *places), at * SECTOR)
    writer = _Tables(write, [at + directory for at in sets])
    for place, (number, content) in enumerate(grains):
        at = lowest + place * _GRAIN
        if content is not None:
            write(content, at * SECTOR)
        writer.enter(number, at)
    writer.finish()
    write(text.ljust(_DESCRIPTOR * SECTOR, b"\0"), SECTOR)
    # What has no header yet is no VMDK.
    write(
        build_header(
            capacity=parent.capacity,
            grain=_GRAIN,
            descriptor_sectors=_DESCRIPTOR,
            spare=spare_at,
            directory=primary_at,
            lowest=lowest,
        ),
        0,
    )
    return end * SECTOR


class _Tables:
    """Writes the grain tables, in order, to each of the areas that begin at *starts*."""

    def __init__(self, write: Write, starts: Sequence[int]) -> None:
        self._write = write
        self._starts = starts
        self._number = -1
        self._entries = [0] * ENTRIES_PER_TABLE

    def enter(self, grain: int, place: int) -> None:
        """Let *grain* be at *place*."""
        number, index = divmod(grain, ENTRIES_PER_TABLE)
        if number != self._number:
            self.finish()
            self._number, self._entries = number, [0] * ENTRIES_PER_TABLE
        self._entries[index] = place

    def finish(self) -> None:
        """Write the table that is being made; those without a grain stay holes."""
        if self._number < 0:
            return
        table = struct.pack(f"<{ENTRIES_PER_TABLE}I", *self._entries)
        for start in self._starts:
            self._write(table, (start + self._number * _TABLE) * SECTOR)


def _new_id(other: str) -> str:
    """Return a random content id that is neither *other* nor one with a meaning of its own."""
    while True:
        found = f"{secrets.randbits(32):08x}"
        if found not in (other, NO_PARENT, "fffffffe", "00000000"):
            return found


def _ddb(parent: Parent) -> dict[str, str]:
    """Return the disk data base: what is known of the parent's, and a geometry in any case."""
    adapter = parent.ddb.get("adapterType", "lsilogic")
    heads, sectors = (16, 63) if adapter == "ide" else (255, 63)
    cylinders = max(1, parent.capacity // (heads * sectors))
    if adapter == "ide":
        cylinders = min(cylinders, 16383)
    found = {"adapterType": adapter, "virtualHWVersion": "4"}
    if not all(f"geometry.{each}" in parent.ddb for each in ("cylinders", "heads", "sectors")):
        found |= {
            "geometry.cylinders": str(cylinders),
            "geometry.heads": str(heads),
            "geometry.sectors": str(sectors),
        }
        return found | {k: v for k, v in parent.ddb.items() if not k.startswith("geometry.")}
    return found | dict(parent.ddb)
