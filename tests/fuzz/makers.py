"""Small valid files of every format, in many shapes: what the fuzzer begins with.

Written from the format notes, without the code under test. Lengths and places are in sectors unless
a name ends in ``_bytes``. A *random* decides the shape, so the same one gives the same file.
"""

import io
import struct
import tarfile
import zlib
from collections.abc import Sequence
from functools import cache
from random import Random

SECTOR = 512
AT_END = (1 << 64) - 1


def text(
    extents: Sequence[str],
    kind: str,
    *,
    cid: str = "12345678",
    parent: str = "ffffffff",
    hint: str = "",
    more: str = "",
) -> bytes:
    """A descriptor."""
    lines = ["# Disk DescriptorFile", "version=1", f"CID={cid}", f"parentCID={parent}"]
    lines += [f'createType="{kind}"']
    if hint:
        lines.append(f'parentFileNameHint="{hint}"')
    lines += ["", *extents, "", "# The Disk Data Base", 'ddb.adapterType = "lsilogic"']
    return "\n".join([*lines, *more.split("|"), ""]).encode()


def padded(data: bytes, unit: int = SECTOR) -> bytes:
    """*data* with zeros up to a multiple of *unit*."""
    return data + bytes(-len(data) % unit)


def pattern(random: Random, sectors: int) -> bytes:
    """Content that differs from sector to sector."""
    first = random.randrange(256)
    return b"".join(bytes(((first + number) & 255 or 1,)) * SECTOR for number in range(sectors))


def kdmv(
    capacity: int,
    grain: int,
    directory: int,
    *,
    flags: int = 3,
    version: int = 1,
    descriptor: tuple[int, int] = (0, 0),
    redundant: int = 0,
    overhead: int = 0,
    compression: int = 0,
) -> bytes:
    """The header of a hosted sparse file, 512 bytes."""
    fixed = struct.pack(
        "<4sIIQQQQIQQQB4sH",
        b"KDMV",
        version,
        flags,
        capacity,
        grain,
        *descriptor,
        512,
        redundant,
        directory,
        overhead,
        0,
        b"\n \r\n",
        compression,
    )
    return padded(fixed)


def _entries(random: Random, capacity: int, grain: int, first: int, zero: bool) -> list[int]:
    """Grain table entries for all grains of *capacity*, the data from sector *first* on."""
    here, entries = first, []
    for _ in range(-(-capacity // grain)):
        choice = random.randrange(5)
        if choice < 2:
            entries.append(here)
            here += grain
        else:
            entries.append(1 if zero and choice == 2 else 0)
    return entries


def sparse(
    random: Random, descriptor: bytes = b"", capacity: int = 0, grain: int = 8
) -> list[tuple[int, bytes]]:
    """A hosted sparse file, with *descriptor* embedded if there is one."""
    embedded = padded(descriptor, 20 * SECTOR) if descriptor else b""
    start = 1 + len(embedded) // SECTOR
    zero = random.random() < 0.5
    redundant = random.random() < 0.5
    tables = -(-capacity // (grain * 512))
    step = 1 + tables * 4  # a directory of a sector, then its tables
    directory = start + step if redundant else start
    first = directory + step
    entries = _entries(random, capacity, grain, first, zero)
    raw_tables = struct.pack(f"<{len(entries)}I", *entries)
    header = kdmv(
        capacity,
        grain,
        directory,
        flags=1 | 2 * redundant | 4 * zero,
        version=2 if zero else 1,
        descriptor=(1, len(embedded) // SECTOR) if embedded else (0, 0),
        redundant=start if redundant else 0,
        overhead=first,
    )
    pieces = [(0, header + descriptor)]
    for place in {start, directory}:
        places = [place + 1 + number * 4 for number in range(tables)]
        pieces.append((place * SECTOR, padded(struct.pack(f"<{tables}I", *places)) + raw_tables))
    return pieces + _grains(random, entries, first, grain)


def _grains(random: Random, entries: list[int], first: int, grain: int) -> list[tuple[int, bytes]]:
    end = max([first, *(entry + grain for entry in entries)])
    pieces = [(end * SECTOR, b"")]
    for entry in entries:
        if entry >= first and random.random() < 0.5:
            pieces.append((entry * SECTOR, pattern(random, 1)))
    return pieces


@cache
def zeros_packed(size_bytes: int) -> bytes:
    """A zlib stream of zeros, a thousandth of what it expands to."""
    return zlib.compress(bytes(size_bytes), 9)


def stream(random: Random, capacity: int, grain: int, descriptor: bytes) -> bytes:
    """A streamOptimized file: directory in a footer, or named by the header."""
    footer = random.random() < 0.7
    body = bytearray(padded(descriptor, 2 * SECTOR))
    start = 1 + len(body) // SECTOR
    entries = []
    for number in range(-(-capacity // grain)):
        if random.random() < 0.5:
            entries.append(0)
            continue
        entries.append(1 + len(body) // SECTOR)
        data = zlib.compress(pattern(random, grain), 1)
        body += padded(struct.pack("<QI", number * grain, len(data)) + data)
    places = []
    for begin in range(0, len(entries), 512):
        table = entries[begin : begin + 512]
        body += padded(struct.pack("<QII", 4, 0, 1))
        places.append(1 + len(body) // SECTOR)
        body += padded(struct.pack("<512I", *table, *[0] * (512 - len(table))))
    body += padded(struct.pack("<QII", -(-len(places) // 128), 0, 2))
    directory = 1 + len(body) // SECTOR
    body += padded(struct.pack(f"<{len(places)}I", *places))

    def header(place: int) -> bytes:
        return kdmv(
            capacity,
            grain,
            place,
            flags=0x30001,
            version=3,
            descriptor=(1, start - 1),
            overhead=start,
            compression=1,
        )

    if not footer:
        return header(directory) + body + bytes(SECTOR)
    end = padded(struct.pack("<QII", 1, 0, 3)) + header(directory) + bytes(SECTOR)
    return header(AT_END) + body + end


def cowd(random: Random, capacity: int, grain: int) -> list[tuple[int, bytes]]:
    """A COWD extent: a directory, tables of 4096 entries, grains."""
    tables = -(-capacity // (grain * 4096))
    first = 5 + tables * 32
    entries = _entries(random, capacity, grain, first, False)
    header = struct.pack(
        "<4sIIIIIII", b"COWD", 1, 3, capacity, grain, 4, tables, first + grain * len(entries)
    )
    places = [5 + number * 32 for number in range(tables)]
    pieces = [
        (0, header),
        (4 * SECTOR, struct.pack(f"<{tables}I", *places)),
        (5 * SECTOR, struct.pack(f"<{len(entries)}I", *entries)),
    ]
    return pieces + _grains(random, entries, first, grain)


def sesparse(random: Random, capacity: int) -> list[tuple[int, bytes]]:
    """An seSparse extent of grains of 8 sectors and tables of 64 sectors."""
    tables = -(-capacity // (8 * 4096))
    # Place and sectors: volatile header, journal header, journal, directory, tables, free bitmap,
    # back map, grains.
    grains = -(-capacity // 8)
    at, areas = 8, []
    for sectors in (8, 8, 8, 8, tables * 64, 8, 8, grains * 8):
        areas += [at, sectors]
        at += sectors
    fixed = (0xCAFEBABE, 0x200000001, capacity, 8, 64, 0, 0, 0, 0, 0)
    header = padded(struct.pack("<26Q", *fixed, *areas))
    entries, used = [], 0
    for _ in range(grains):
        nibble = random.choice((0, 1, 2, 3, 3, 3))
        index = used if nibble == 3 else 0
        used += nibble == 3
        entries.append(nibble << 60 | (index >> 12) & 0xFFFFFFFFFFFF | (index & 0xFFF) << 48)
    directory, first_table, first_grain = areas[6], areas[8], areas[14]
    pieces = [
        (0, header),
        (8 * SECTOR, struct.pack("<QQ", 0xCAFECAFE, 0)),
        (
            directory * SECTOR,
            struct.pack(f"<{tables}Q", *(1 << 60 | number for number in range(tables))),
        ),
        (first_table * SECTOR, struct.pack(f"<{grains}Q", *entries)),
        (at * SECTOR, b""),
    ]
    for number in range(used):
        if random.random() < 0.5:
            pieces.append(((first_grain + number * 8) * SECTOR, pattern(random, 1)))
    return pieces


def ova(random: Random, files: dict[str, bytes]) -> bytes:
    """A tar archive of *files*, in one of the dialects."""
    out = io.BytesIO()
    dialect = random.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=out, mode="w", format=dialect) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            if dialect == tarfile.PAX_FORMAT and random.random() < 0.5:
                entry.pax_headers = {"size": str(len(data)), "path": name}
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def vmx(names: Sequence[str]) -> bytes:
    """A .vmx with disks of *names*."""
    lines = ['.encoding = "UTF-8"', 'config.version = "8"', 'displayName = "vm"']
    for number, name in enumerate(names):
        lines += [f'scsi0:{number}.present = "TRUE"', f'scsi0:{number}.fileName = "{name}"']
    return "\n".join([*lines, 'ide1:0.deviceType = "cdrom-raw"', ""]).encode()
