"""Changes of a case that know its structures, so that they get past the first checks.

Blind changes of a file of some KiB hit its magic, or content that nobody looks at. These put odd
numbers into fields and tables, keep the checksums of archives right, and edit descriptors by line
and token. All of it is decided by a *Random*.
"""

import re
import struct
import zlib
from collections.abc import Callable
from random import Random

from tests.fuzz.cases import ENTRIES, NAMES, Case, Piece, unpack
from tests.fuzz.folders import MAKERS
from tests.fuzz.makers import zeros_packed

Blind = Callable[[bytes, int], bytes]
"""The fuzzing engine's own mutation: content and the most bytes that it may become."""

_NUMBER = re.compile(rb"\d+")
_BLOCK = 512
_WORDS = (
    b"RW", b"RDONLY", b"NOACCESS", b"FLAT", b"SPARSE", b"ZERO", b"VMFS", b"VMFSSPARSE", b"SESPARSE",
    b"VMFSRDM", b"VMFSRAW", b"monolithicSparse", b"monolithicFlat", b"twoGbMaxExtentSparse",
    b"twoGbMaxExtentFlat", b"streamOptimized", b"vmfsSparse", b"seSparse", b"vmfs", b"custom",
    b"fullDevice", b"vmfsRawDeviceMap", b"ffffffff", b"12345678", b"/etc/passwd",
    b"../../../etc/passwd", b"\\\\.\\PhysicalDrive0", b"encryption.keySafe", b'encoding="GBK"',
    b"changeTrackPath", b"parentFileNameHint", b"|22", b"\xff", b"\0", b"\x85", b"\xe2\x80\xa8",
    b'"', b"=", b"\r",
    *(name.encode() for name in NAMES),
)  # fmt: skip
_LINE = re.compile(rb"[^\n]*\n?")


def mutate(raw: bytes, max_size: int, random: Random, blind: Blind) -> bytes:
    """Return another packed case made from *raw*, of at most *max_size* bytes."""
    case = unpack(raw)
    for _ in range(random.choice((1, 1, 2, 4))):
        if not case.pieces or random.random() < 0.02:
            case = random.choice(MAKERS)(random)
        elif random.random() < 0.12:
            case = _whole(case, random)
        else:
            index = random.randrange(len(case.pieces))
            case = _with(case, index, _piece(case.pieces[index], random, blind))
    packed = case.pack()
    return packed if len(packed) <= max_size else raw[:max_size]


def cross(one: bytes, other: bytes, max_size: int, random: Random) -> bytes:
    """Return a case with files of both."""
    case, donor = unpack(one), unpack(other)
    slots = {piece.slot for piece in donor.pieces if random.random() < 0.5}
    pieces = [piece for piece in case.pieces if piece.slot not in slots]
    pieces += [piece for piece in donor.pieces if piece.slot in slots]
    packed = case._replace(pieces=tuple(pieces)).pack()
    return packed if len(packed) <= max_size else one[:max_size]


def _with(case: Case, index: int, *pieces: Piece) -> Case:
    old = case.pieces
    return case._replace(pieces=old[:index] + pieces + old[index + 1 :])


def _whole(case: Case, random: Random) -> Case:
    """Change which files there are, where their pieces lie, or what is opened."""
    index = random.randrange(len(case.pieces))
    piece = case.pieces[index]
    match random.randrange(7):
        case 0:
            return case._replace(entry=random.randrange(len(ENTRIES)))
        case 1:
            return case._replace(options=random.randrange(256))
        case 2:
            return _with(case, index)
        case 3:
            return _with(case, index, piece, piece._replace(slot=random.randrange(len(NAMES))))
        case 4:
            return _with(case, index, piece._replace(slot=random.randrange(len(NAMES))))
        case 5:
            at = max(0, piece.at + random.choice((-512, 512, 4, -1, 1 << 30, -piece.at)))
            return _with(case, index, piece._replace(at=at))
        case _:
            end = Piece(piece.slot, random.choice((1 << 20, 1 << 31, 1 << 42)), b"")
            return _with(case, index, piece, end)


def _piece(piece: Piece, random: Random, blind: Blind) -> Piece:
    data = piece.data
    if not data:
        return piece._replace(at=max(0, piece.at + random.choice((-1, 1, -512, 512, 1 << 20))))
    choice = random.randrange(12)
    if choice == 0:
        return piece._replace(data=blind(data, len(data) + 64))
    if choice == 1:
        return piece._replace(data=data[: random.randrange(len(data))])
    begin = data.find(b"# Disk Descr")
    if data[257:262] == b"ustar":
        return piece._replace(data=archive(data, random, blind))
    if begin < 0 and data[:1] in (b".", b"#"):
        begin = 0
    if begin >= 0 and (begin == 0 or choice < 6):
        return piece._replace(data=data[:begin] + _embedded(data[begin:], random, begin > 0))
    if choice < 9 or data[:4] != b"KDMV":
        return piece._replace(data=number(data, random))
    return piece._replace(data=_grain(data, random))


# ---------------------------------------------------------------- numbers in structures


def number(data: bytes, random: Random) -> bytes:
    """Put an odd number at a place of *data*, early ones (headers) before all."""
    width = random.choice((1, 2, 4, 4, 4, 8, 8))
    reach = min(random.choice((96, 256, len(data))), len(data))
    at = random.randrange(max(1, reach)) // min(width, 4) * min(width, 4)
    for _ in range(random.choice((0, 0, 60))):  # until it is something that somebody looks at
        if any(data[at : at + 4]):
            break
        at = random.randrange(max(1, len(data))) & ~3
    if random.random() < 0.1:
        at = max(0, len(data) - 1024 + random.randrange(96))  # a footer
    old = int.from_bytes(data[at : at + width], "little")
    new = _odd(old, data, random) & (1 << 8 * width) - 1
    return (data[:at] + new.to_bytes(width, "little") + data[at + width :])[: len(data)]


def _odd(old: int, data: bytes, random: Random) -> int:
    match random.randrange(7):
        case 0:
            return random.choice((0, 1, 2, 3, 4, 7, 8, 20, 21, 64, 127, 128, 511, 512, 513, 4096))
        case 1:
            return (1 << random.randrange(65)) - random.choice((0, 1, 1))
        case 2:
            return old + random.choice((-1, 1, -8, 8, 128, 512))
        case 3:
            return old ^ 1 << random.randrange(64)
        case 4:
            return random.randrange(5) << 60 | old & (1 << 60) - 1
        case 5:
            return -random.randrange(1, 4)
        case _:
            at = random.randrange(max(1, len(data) - 4))
            return int.from_bytes(data[at : at + 4], "little")


def _grain(data: bytes, random: Random) -> bytes:
    """Put another compressed grain, or a marker, over a sector of a stream."""
    sector = random.randrange(1, max(2, len(data) // _BLOCK))
    at = sector * _BLOCK
    lba, size = struct.unpack("<QI", data[at : at + 12].ljust(12, b"\0"))
    match random.randrange(4):
        case 0:  # more than a grain, up to a thousandfold of what is stored
            body = zeros_packed(random.choice((4096, 1 << 16, 1 << 20, 1 << 25)))
        case 1:
            body = zlib.compress(random.randbytes(random.choice((1, 4095, 4096))))
            body = body[: random.randrange(len(body) + 1)]
        case 2:
            lba = _odd(lba, data, random) & (1 << 64) - 1
            body = data[at + 12 : at + 12 + min(size, 4096)]
        case _:
            marker = struct.pack("<QII", random.randrange(9), 0, random.randrange(5))
            return data[:at] + marker + data[at + len(marker) :]
    size = len(body) if random.random() < 0.7 else _odd(size, data, random) & 0xFFFFFFFF
    grain = struct.pack("<QI", lba, size) + body
    return data[:at] + grain + data[at + len(grain) :]


# ---------------------------------------------------------------- archives


def archive(data: bytes, random: Random, blind: Blind) -> bytes:
    """Change a member's header, its checksum made right again, or the members' content."""
    heads = [at for at in range(0, len(data), _BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    at = random.choice(heads)
    head = bytearray(data[at : at + _BLOCK].ljust(_BLOCK, b"\0"))
    match random.randrange(10):
        case 0:
            place = random.randrange(len(data))
            return data[:place] + number(data[place:], random)
        case 6 | 7 | 8:
            return _member(data, at + _BLOCK, random)
        case 9:  # the size, so that the next member is still found
            size = max(0, _octal(bytes(head[124:136])) - random.randrange(_BLOCK))
            head[124:136] = b"%011o\0" % size
        case 1:  # the size, in octal or base 256
            size = _odd(int.from_bytes(data[-4:], "little"), data, random) & (1 << 88) - 1
            octal = b"%011o\0" % (size & (1 << 33) - 1)
            head[124:136] = random.choice((octal, b"\x80" + size.to_bytes(11, "big"), b"\xff" * 12))
        case 2:
            head[156] = random.choice(b"0\x001234567LKxgSVM")
        case 3:
            name = random.choice((b"d.vmdk", b"../d.vmdk", b"/d.vmdk", b"a/d.vmdk", b"x" * 100))
            head[0:100] = name.ljust(100, b"\0")
        case 4:
            field = random.choice(((100, 108), (148, 156), (257, 265), (345, 500)))
            head[slice(*field)] = random.randbytes(field[1] - field[0])
        case _:
            place = random.randrange(_BLOCK)
            changed = blind(bytes(head[place:]), _BLOCK - place)
            head[place:] = changed.ljust(_BLOCK - place, b"\0")[: _BLOCK - place]
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    moved = data[:at] + bytes(head) + data[at + _BLOCK :]
    if random.random() < 0.1:  # a member twice
        moved += moved[at : at + 2 * _BLOCK]
    return moved


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else 0


def _member(data: bytes, at: int, random: Random) -> bytes:
    """Change the content of the member whose content begins at *at*; its length stays."""
    end = at + _octal(data[at - _BLOCK + 124 : at - _BLOCK + 136])
    content = data[at:end]
    if not content:
        return data
    begin = content.find(b"# Disk Descr")
    if begin >= 0 and random.random() < 0.3:
        content = content[:begin] + _embedded(content[begin:], random, True)
    elif content[:4] == b"KDMV" and random.random() < 0.4:
        content = _grain(content, random)
    else:
        content = number(content, random)
    content = content[: end - at].ljust(len(data[at:end]), b"\0")
    return data[:at] + content + data[at + len(content) :]


# ---------------------------------------------------------------- text


def _embedded(data: bytes, random: Random, keep_length: bool) -> bytes:
    """Change a descriptor; what follows it in its file stays where it is."""
    content, nul, rest = data.partition(b"\0")
    changed = text(content, random)
    if not keep_length:
        return changed + nul + rest
    return (changed + nul + rest)[: len(data)].ljust(len(data), b"\0")


def text(data: bytes, random: Random) -> bytes:
    """Change a number, a word or a line of *data*."""
    match random.randrange(6):
        case 0:
            numbers = list(_NUMBER.finditer(data))
            if numbers:
                found = random.choice(numbers)
                new = _odd(int(found.group()[:19]), data, random)
                return data[: found.start()] + b"%d" % new + data[found.end() :]
        case 1:
            words = list(re.finditer(rb"[^\s=]+", data))
            if words:
                found = random.choice(words)
                return data[: found.start()] + random.choice(_WORDS) + data[found.end() :]
        case 2:
            at = random.randrange(len(data) + 1)
            return data[:at] + random.choice(_WORDS) + data[at:]
        case 3:
            at = random.randrange(len(data) + 1)
            return data[:at] + data[at + random.randrange(4) :]
    lines = _LINE.findall(data)
    index = random.randrange(len(lines))
    other = random.randrange(len(lines))
    match random.randrange(4):
        case 0:
            del lines[index]
        case 1:
            lines.insert(other, lines[index])
        case 2:
            lines[index], lines[other] = lines[other], lines[index]
        case _:
            lines[index] = lines[index] * random.choice((2, 5, 60))
    return b"".join(lines)
