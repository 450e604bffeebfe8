"""Whole folders of valid VMDKs as cases, one maker for each format and way to reach it."""

import struct
from collections.abc import Callable
from random import Random

from tests.fuzz.cases import Case, case
from tests.fuzz.makers import (
    SECTOR,
    cowd,
    kdmv,
    ova,
    padded,
    pattern,
    sesparse,
    sparse,
    stream,
    text,
    vmx,
    zeros_packed,
)


def monolithic_sparse(random: Random) -> Case:
    grain = random.choice((8, 8, 16, 128))
    capacity = grain * random.randrange(1, 40) + random.choice((0, 0, 3))
    descriptor = text([f'RW {capacity} SPARSE "d.vmdk"'], "monolithicSparse")
    return case("d.vmdk", {"d.vmdk": sparse(random, descriptor, capacity, grain)})


def split_sparse(random: Random) -> Case:
    sizes = [8 * random.randrange(1, 20) for _ in range(2)]
    lines = [f'RW {size} SPARSE "d-s00{n}.vmdk"' for n, size in enumerate(sizes, 1)]
    files = {
        "d.vmdk": text(lines, "twoGbMaxExtentSparse"),
        "d-s001.vmdk": sparse(random, b"", sizes[0]),
        "d-s002.vmdk": sparse(random, b"", sizes[1]),
    }
    return case(random.choice(("", "d.vmdk")), files)


def flat(random: Random) -> Case:
    size, skip = random.randrange(1, 40), random.randrange(3)
    lines = [f'RW {size} VMFS "d-flat.vmdk" {skip}', f"RW {random.randrange(1, 99)} ZERO"]
    lines.append(f'RW {size} FLAT "d-flat.vmdk" 0')
    random.shuffle(lines)
    content = [(0, pattern(random, 2)), ((size + skip) * SECTOR, b"")]
    files = {"d.vmdk": text(lines, "monolithicFlat"), "d-flat.vmdk": content}
    return case("d.vmdk", files)


def chain(random: Random) -> Case:
    """A delta of one format on a parent of another."""
    capacity = 8 * random.randrange(1, 30)
    keys = {"cid": "2", "parent": "12345678", "hint": "p.vmdk"}
    files: dict[str, bytes | list[tuple[int, bytes]]] = {}
    choice = random.randrange(3)
    if choice == 0:
        line = f'RW {capacity} SPARSE "d.vmdk"'
        descriptor = text([line], "monolithicSparse", **keys)
        files["d.vmdk"] = sparse(random, descriptor, capacity)
    elif choice == 1:
        line = f'RW {capacity} VMFSSPARSE "d-delta.vmdk"'
        files["d.vmdk"] = text([line], "vmfsSparse", **keys)
        files["d-delta.vmdk"] = cowd(random, capacity, 1)
    else:
        line = f'RW {capacity} SESPARSE "d-sesparse.vmdk"'
        files["d.vmdk"] = text([line], "seSparse", **keys)
        files["d-sesparse.vmdk"] = sesparse(random, capacity)
    below = capacity - random.choice((0, 0, 1)) * random.randrange(1, 8)
    if random.random() < 0.5:
        files["p.vmdk"] = sparse(
            random, text([f'RW {below} SPARSE "p.vmdk"'], "monolithicSparse"), below
        )
    else:
        files["p.vmdk"] = text([f'RW {below} FLAT "d-flat.vmdk" 0'], "monolithicFlat")
        files["d-flat.vmdk"] = [(SECTOR, pattern(random, 3)), (below * SECTOR, b"")]
    return case(random.choice(("", "d.vmdk")), files)


def huge(random: Random) -> Case:
    """A disk, often of many TiB, in a file that is a hole almost everywhere."""
    grain = random.choice((8, 128, 4096))
    capacity = random.choice((1024 * grain, 1 << 32, 1 << 36, (62 << 40) // SECTOR))
    descriptor = text([f'RW {capacity} SPARSE "d.vmdk"'], "monolithicSparse")
    tables = -(-capacity // (grain * 512))
    start = 21 + -(-tables * 4 // SECTOR)
    entry = random.randrange(min(tables, 200)) * random.randrange(2)
    # The first of two tables is in a hole of the file.
    places = struct.pack("<2I", start, start + 16) if tables > 1 else struct.pack("<I", start + 16)
    pieces = [
        (0, kdmv(capacity, grain, 21, descriptor=(1, 20)) + descriptor),
        (21 * SECTOR + min(entry, max(0, tables - 2)) * 4, places),
        ((start + 16) * SECTOR, struct.pack("<3I", 0, start + 32, 0)),
        ((start + 32) * SECTOR, pattern(random, 2)),
        ((start + 32 + 4096) * SECTOR, b""),
    ]
    return case("d.vmdk", {"d.vmdk": pieces})


def stream_optimized(random: Random) -> Case:
    return case("d.vmdk", {"d.vmdk": _stream(random)})


def _stream(random: Random) -> bytes:
    grain = random.choice((8, 16, 128))
    capacity = grain * random.randrange(1, 12) + random.choice((0, 0, 5))
    descriptor = text([f'RW {capacity} SPARSE "d.vmdk"'], "streamOptimized")
    return stream(random, capacity, grain, descriptor)


def _small(random: Random) -> bytes:
    """A monolithic sparse file, holes and all."""
    capacity = 8 * random.randrange(1, 5)
    descriptor = text([f'RW {capacity} SPARSE "d.vmdk"'], "monolithicSparse")
    pieces = sparse(random, descriptor, capacity)
    content = bytearray(max(at + len(data) for at, data in pieces))
    for at, data in pieces:
        content[at : at + len(data)] = data
    return bytes(content)


def vmfs_sparse(random: Random) -> Case:
    grain = random.choice((1, 1, 8, 128))
    capacity = grain * random.randrange(1, 60)
    line = f'RW {capacity} VMFSSPARSE "d-delta.vmdk"'
    files = {"d.vmdk": text([line], "vmfsSparse"), "d-delta.vmdk": cowd(random, capacity, grain)}
    return case("d.vmdk", files)


def se_sparse(random: Random) -> Case:
    capacity = 8 * random.randrange(1, 60)
    line = f'RW {capacity} SESPARSE "d-sesparse.vmdk"'
    files = {"d.vmdk": text([line], "seSparse"), "d-sesparse.vmdk": sesparse(random, capacity)}
    return case("d.vmdk", files)


def bomb(_: Random) -> Case:
    """A compressed grain that would expand to much more than a grain."""
    packed = zeros_packed(1 << 25)
    grain = struct.pack("<QI", 0, len(packed)) + packed
    entries = struct.pack("<I", 4) + bytes(2044)
    descriptor = text(['RW 256 SPARSE "d.vmdk"'], "streamOptimized")
    end = 4 + len(padded(grain)) // SECTOR
    head = kdmv(
        256, 128, end + 4, flags=0x30001, version=3, descriptor=(1, 2), overhead=3, compression=1
    )
    tables = [((end + 4) * SECTOR, struct.pack("<I", end) + bytes(508)), (end * SECTOR, entries)]
    content = [(0, head + descriptor), (4 * SECTOR, grain), *tables]
    return case("d.vmdk", {"d.vmdk": content})


def outside(random: Random) -> Case:
    """An extent, or a parent, in a file that is none of the folder's."""
    name = random.choice(("/etc/passwd", "../../../../../../etc/passwd", "./../../../etc/passwd"))
    if random.random() < 0.5:
        files = {"d.vmdk": text([f'RW 1 FLAT "{name}" 0'], "monolithicFlat")}
        return case("d.vmdk", files)
    disk = sparse(
        random, text(['RW 8 SPARSE "d.vmdk"'], "monolithicSparse", hint=name, parent="1"), 8
    )
    return case("d.vmdk", {"d.vmdk": disk})


def machine(random: Random) -> Case:
    """A .vmx with two disks, one of them perhaps missing."""
    disk = monolithic_sparse(random)
    content = vmx(["d.vmdk", random.choice(("p.vmdk", "no.vmdk", "/etc/p.vmdk", "|64.vmdk"))])
    parent = text(['RW 8 FLAT "d-flat.vmdk" 0'], "monolithicFlat")
    more = {"vm.vmx": content, "p.vmdk": parent, "d-flat.vmdk": [(8 * SECTOR, b"")]}
    return case("vm.vmx", more)._replace(pieces=case("vm.vmx", more).pieces + disk.pieces)


def appliance(random: Random) -> Case:
    """An OVA of an OVF and one or two disks."""
    files = {"vm.ovf": b'<?xml version="1.0"?><Envelope/>', "vm.mf": b"SHA256(vm.ovf)= 00\n"}
    files["d.vmdk"] = _stream(random) if random.random() < 0.5 else _small(random)
    if random.random() < 0.3:
        files["p.vmdk"] = text(['RW 8 FLAT "d-flat.vmdk" 0'], "monolithicFlat")
        files["d-flat.vmdk"] = pattern(random, 8)
    return case(random.choice(("vm.ova", "vm.ova/d.vmdk")), {"vm.ova": ova(random, files)})


MAKERS: tuple[Callable[[Random], Case], ...] = (
    monolithic_sparse,
    split_sparse,
    flat,
    chain,
    huge,
    stream_optimized,
    vmfs_sparse,
    se_sparse,
    bomb,
    outside,
    machine,
    appliance,
)
