"""How the grains of one extent file are found, whatever the format of its header.

A *directory* names grain tables, a table names grains. ``sparse``, ``cowd`` and ``sesparse`` make a
``Layout`` out of the headers of their formats, and ``grains`` reads by it. Pure.

Lengths and places are in sectors of 512 bytes of the file.
"""

import msgspec

from vddkfs.engines.vmdk.descriptor import COPY_ADVICE, MAX_CAPACITY
from vddkfs.errors import DamagedSource

MAX_GRAIN = 4096
"""Sectors of a grain at most: nobody writes more than 2 MiB."""


class Layout(msgspec.Struct, frozen=True):
    """Where an extent's directory, tables and grains are, all checked against the file's size.

    *grain* and *entries* (of one table) are powers of two. *lowest* is the first sector that a
    grain or a table can be in. *spare_directory* leads to a second set of tables with the same
    content, 0 if there is none. *zero_grains*: an entry can say that a grain is zeros, whatever the
    parent has. *packed* grains are compressed, and *marked* if each says which it is and how long.
    *tables_at* and *tables_end* bound the area of the tables where the format has one.
    *clean* is False where whoever wrote the file did not end well; *notes* are for the operator.
    """

    capacity: int
    grain: int
    entries: int
    directory: int
    lowest: int
    spare_directory: int = 0
    zero_grains: bool = False
    packed: bool = False
    marked: bool = False
    tables_at: int = 0
    tables_end: int = 0
    clean: bool = True
    notes: tuple[str, ...] = ()

    @property
    def grains(self) -> int:
        """Grains of the extent; the last may be partial."""
        return -(-self.capacity // self.grain)

    @property
    def tables(self) -> int:
        """Grain tables of the extent, which is the number of entries of the directory."""
        return -(-self.grains // self.entries)


def check_capacity(path: str, capacity: int) -> None:
    """Raise DamagedSource unless *capacity* sectors can be a disk."""
    if not 0 < capacity <= MAX_CAPACITY:
        raise DamagedSource(
            f"{path}: a capacity of {capacity} sectors is not between 1 and the "
            f"{MAX_CAPACITY} of 62 TiB",
            advice=COPY_ADVICE,
        )


def check_grain(path: str, grain: int, smallest: int) -> None:
    """Raise DamagedSource unless *grain* sectors can be the size of a grain."""
    if not smallest <= grain <= MAX_GRAIN or grain & (grain - 1):
        raise DamagedSource(
            f"{path}: a grain size of {grain} sectors is not a power of two "
            f"from {smallest} to {MAX_GRAIN}",
            advice=COPY_ADVICE,
        )


def directory_problem(
    directory: int, entries: int, width: int, lowest: int, file_bytes: int
) -> str:
    """Say why a directory of *entries*, *width* bytes each, cannot be at sector *directory*.

    Empty if it can: not below *lowest*, and inside the file of *file_bytes*.
    """
    if lowest <= directory and directory * 512 + entries * width <= file_bytes:
        return ""
    return (
        f"its grain directory ({entries} entries at sector {directory}) "
        f"is not inside the file of {file_bytes} bytes"
    )
