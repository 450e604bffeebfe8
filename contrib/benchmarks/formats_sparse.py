"""Writers of vmfsSparse and seSparse extents, and of an empty part of a disk in parts.

No more is in them than a reader looks at: the bookkeeping of seSparse (which of its grains are
taken, and by what) is left out. Places and sizes are in sectors of 512 bytes.
"""

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

PIECE: Final = 64 * 1024
"""What is written at once, in bytes."""
_SECTOR: Final = 512
_ENTRIES: Final = 4096
"""Grains of one table, in both formats of ESXi."""
_COWD_GRAINS: Final = PIECE // _SECTOR
_SESPARSE_GRAINS: Final = PIECE // 4096
NO_PARENT: Final = "ffffffff"

Pieces = Sequence[int]
"""Where data is: in pieces from the start of the disk, in order."""


def write_descriptor(
    path: Path,
    kind: str,
    extents: Sequence[str],
    cid: str = "12345678",
    parent_cid: str = NO_PARENT,
    hint: str = "",
) -> None:
    """Write the descriptor of a disk of the createType *kind*; *hint* names its parent."""
    parent = f'parentFileNameHint="{hint}"\n' if hint else ""
    # QEMU takes an extent line twice if an empty line is right before it.
    path.write_text(
        f"# Disk DescriptorFile\nversion=1\nCID={cid}\nparentCID={parent_cid}\n"
        f'createType="{kind}"\n{parent}\n# Extents\n'
        + "".join(f"{line}\n" for line in extents)
        + "\n"
        'ddb.adapterType = "lsilogic"\nddb.virtualHWVersion = "14"\n'
    )


def write_cowd(path: Path, sectors: int, pieces: Pieces, data: Iterable[bytes]) -> None:
    """Write a vmfsSparse extent with grains of one sector, as ESXi makes them."""
    tables = _tables(pieces, _COWD_GRAINS)
    entries = -(-sectors // _ENTRIES)
    tables_at = 4 + -(-entries * 4 // _SECTOR)
    grains_at = tables_at + len(tables) * 32
    end = grains_at + len(pieces) * _COWD_GRAINS
    header = struct.pack("<4s7I", b"COWD", 1, 3, sectors, 1, 4, entries, end)
    header += struct.pack("<III", 1, 16, 63)
    with path.open("wb") as file:
        file.write(header)
        for number, table in enumerate(tables):
            file.seek(4 * _SECTOR + table * 4)
            file.write(struct.pack("<I", tables_at + number * 32))
        for number, piece in enumerate(pieces):
            here = grains_at + number * _COWD_GRAINS
            file.seek(_entry_at(tables, piece, _COWD_GRAINS, tables_at, 4))
            file.write(struct.pack(f"<{_COWD_GRAINS}I", *range(here, here + _COWD_GRAINS)))
        file.seek(grains_at * _SECTOR)
        file.writelines(data)
        file.truncate(end * _SECTOR)


def write_sesparse(path: Path, sectors: int, pieces: Pieces, data: Iterable[bytes]) -> None:
    """Write an seSparse extent; each of its areas has room for the whole disk, as ESXi's has."""
    tables = _tables(pieces, _SESPARSE_GRAINS)
    grains = -(-sectors // 8)
    all_tables = -(-grains // _ENTRIES)
    # Two headers, journal, directory, tables, bitmap of free grains, map back, grains.
    lengths = [1, 2, 2048, -(-all_tables * 8 // _SECTOR), all_tables * 64]
    lengths += [-(-grains // (8 * _SECTOR)), -(-grains * 8 // _SECTOR), grains * 8]
    places = [1, 2]
    for length in lengths[1:-1]:
        # Multiples of 1 MiB.
        places.append(-(-(places[-1] + length) // 2048) * 2048)
    directory_at, tables_at, grains_at = places[3], places[4], places[7]
    header = struct.pack("<6Q", 0xCAFEBABE, 0x2_0000_0001, sectors, 8, 64, 0) + bytes(32)
    header += b"".join(struct.pack("<QQ", *area) for area in zip(places, lengths, strict=True))
    with path.open("wb") as file:
        file.write(header)
        file.seek(places[0] * _SECTOR)
        file.write(struct.pack("<4Q", 0xCAFECAFE, len(tables), 1, 0))
        for number, table in enumerate(tables):
            file.seek(directory_at * _SECTOR + table * 8)
            file.write(struct.pack("<Q", 1 << 60 | number))
        for number, piece in enumerate(pieces):
            first = number * _SESPARSE_GRAINS
            row = [_sesparse_entry(first + grain) for grain in range(_SESPARSE_GRAINS)]
            file.seek(_entry_at(tables, piece, _SESPARSE_GRAINS, tables_at, 8))
            file.write(struct.pack(f"<{_SESPARSE_GRAINS}Q", *row))
        file.seek(grains_at * _SECTOR)
        file.writelines(data)
        file.truncate(grains_at * _SECTOR + len(pieces) * PIECE)


def write_empty_part(path: Path, sectors: int) -> None:
    """Write a part of a disk in parts, with a grain directory but nothing in it: 64 KiB."""
    header = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, sectors, 128, 0, 0)
    header += struct.pack("<IQQQB4sH", _SECTOR, 0, 1, 128, 0, b"\n \r\n", 0)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(PIECE)


def _tables(pieces: Pieces, grains: int) -> dict[int, int]:
    """Return the tables that *pieces* of so many *grains* need, each with its number."""
    needed = dict.fromkeys(piece * grains // _ENTRIES for piece in pieces)
    return {table: number for number, table in enumerate(needed)}


def _entry_at(tables: dict[int, int], piece: int, grains: int, tables_at: int, width: int) -> int:
    """Return the byte where the entries of *piece* begin."""
    table, entry = divmod(piece * grains, _ENTRIES)
    return tables_at * _SECTOR + (tables[table] * _ENTRIES + entry) * width


def _sesparse_entry(grain: int) -> int:
    """Return the entry of a *grain*: the lowest twelve bits of its number are on top."""
    return 3 << 60 | (grain & 0xFFF) << 48 | grain >> 12
