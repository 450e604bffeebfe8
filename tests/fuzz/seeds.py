"""The inputs that the fuzzer begins with, made anew each time and always the same."""

from collections.abc import Iterator
from random import Random

from tests.fuzz.cases import NAMES, Case, Piece
from tests.fuzz.folders import MAKERS

SEEDS_EACH = 6
FOLDERS = ("folder", "check")
"""The targets whose inputs are whole folders."""

_MAGICS = (b"KDMV", b"COWD", (0xCAFEBABE).to_bytes(8, "little"))


def folder_cases() -> Iterator[tuple[str, Case]]:
    """Yield (name, case), some of every format."""
    for maker in MAKERS:
        for number in range(SEEDS_EACH):
            yield f"{maker.__name__}-{number}", maker(Random(number))


def seeds(target: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) for *target*."""
    seen: set[bytes] = set()
    for name, case in folder_cases():
        raw = case.pack() if target in FOLDERS else _part(target, case)
        if raw and raw not in seen:
            seen.add(raw)
            yield name, raw


def _part(target: str, case: Case) -> bytes:
    """Return what of *case* is an input of a parser's target."""
    for piece in case.pieces:
        data = piece.data
        if target == "vmx" and NAMES[piece.slot] == "vm.vmx":
            return data
        if target == "archive" and NAMES[piece.slot] == "vm.ova":
            return data
        if target == "header" and data.startswith(_MAGICS):
            return _header_of(case, piece)
        begin = data.find(b"# Disk DescriptorFile")
        if target == "descriptor" and begin >= 0:
            return data[begin:].split(b"\0", 1)[0]
    return b""


def _header_of(case: Case, first: Piece) -> bytes:
    """Return the file's size, and what of its start and end is looked at."""
    head = first.data.ljust(2048, b"\0")
    if head.startswith(_MAGICS[0]):
        head = head[:512] + head[-1536:]
    for piece in case.pieces:
        if piece.slot == first.slot and piece.at == 8 * 512:
            head = head.ljust(8 * 512, b"\0") + piece.data.ljust(512, b"\0")
    return (1 << 40).to_bytes(8, "little") + head
