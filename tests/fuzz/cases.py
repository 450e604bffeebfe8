"""A fuzz input as a folder of files: packed into bytes, and written out again.

The first byte says what is given to ``discover``, the second holds options. Then come pieces: a
slot (which file, one byte), a length (16 bits), the byte of the file where it goes (64 bits), and
the content. A piece without content makes the file at least that long. Any bytes unpack to some
case, so an engine that knows nothing of this can mutate them too.
"""

import os
import struct
from typing import NamedTuple

NAMES = (
    "d.vmdk",
    "d-s001.vmdk",
    "d-flat.vmdk",
    "d-delta.vmdk",
    "d-sesparse.vmdk",
    "p.vmdk",
    "p-s001.vmdk",
    "vm.vmx",
    "vm.ova",
    "d-s002.vmdk",
)
"""The files of a case by their slot."""

ENTRIES = ("", "d.vmdk", "vm.vmx", "vm.ova", "vm.ova/d.vmdk", "p.vmdk")
"""What ``discover`` is given, below the folder."""

MAX_PIECES = 64
MAX_FILE = (1 << 43) - 1
"""The longest file of a case; almost all of it is a hole."""

_PIECE = struct.Struct("<BHQ")


class Piece(NamedTuple):
    """*data* at byte *at* of the file of *slot*."""

    slot: int
    at: int
    data: bytes


class Case(NamedTuple):
    """What one execution is about."""

    entry: int
    options: int
    pieces: tuple[Piece, ...]

    def pack(self) -> bytes:
        """Return the bytes that ``unpack`` makes this case of."""
        parts = [bytes((self.entry, self.options))]
        for piece in self.pieces:
            for begin in range(0, max(len(piece.data), 1), 0xFFFF):
                data = piece.data[begin : begin + 0xFFFF]
                parts += [_PIECE.pack(piece.slot, len(data), piece.at + begin), data]
        return b"".join(parts)

    def write(self, folder: str) -> str:
        """Write the files into *folder*, which is empty; return what to open."""
        files: dict[int, int] = {}
        try:
            for piece in self.pieces:
                if piece.slot not in files:
                    path = os.path.join(folder, NAMES[piece.slot])
                    files[piece.slot] = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                fd = files[piece.slot]
                if piece.data:
                    os.pwrite(fd, piece.data, piece.at)
                elif os.fstat(fd).st_size < piece.at:
                    os.ftruncate(fd, piece.at)
        finally:
            for fd in files.values():
                os.close(fd)
        return os.path.join(folder, ENTRIES[self.entry])


def unpack(raw: bytes) -> Case:
    """Return the case that *raw* means. A last piece that is cut short has what is there."""
    if len(raw) < 2:
        return Case(0, 0, ())
    pieces: list[Piece] = []
    here = 2
    while here + _PIECE.size <= len(raw) and len(pieces) < MAX_PIECES:
        slot, size, at = _PIECE.unpack_from(raw, here)
        here += _PIECE.size
        pieces.append(Piece(slot % len(NAMES), at & MAX_FILE, raw[here : here + size]))
        here += size
    return Case(raw[0] % len(ENTRIES), raw[1], tuple(pieces))


def case(entry: str, files: dict[str, bytes | list[tuple[int, bytes]]], options: int = 0) -> Case:
    """Return the case that opens *entry* of *files*, by name: content, or (place, content)..."""
    pieces = []
    for name, content in files.items():
        parts = [(0, content)] if isinstance(content, bytes) else content
        pieces += [Piece(NAMES.index(name), at, data) for at, data in parts]
    return Case(ENTRIES.index(entry), options, tuple(pieces))
