"""The fuzz targets: functions of bytes that return, or raise a Finding or whatever the code raised.

They need no fuzzer, so the tests replay inputs through them.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from random import Random

import msgspec

from tests.fuzz.cases import Case, unpack
from tests.fuzz.guard import Finding, check_error, reads_inside, watched
from vddkfs.engines.base import MapExtent
from vddkfs.engines.vmdk import Chain, VmdkEngine, cowd, discover, sesparse, sparse
from vddkfs.engines.vmdk.archive import looks_like_archive, read_members
from vddkfs.engines.vmdk.check import Finding as VmdkFinding
from vddkfs.engines.vmdk.check import check_source
from vddkfs.engines.vmdk.descriptor import MAX_CAPACITY, parse_descriptor
from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.vmx import parse_vmx
from vddkfs.errors import EngineError

SECTOR = 512
MAX_BYTES_READ = 3 << 20
"""What one input may cost in content, about."""

MAX_ARCHIVE_READ = 128 << 10
"""The longest piece of an archive's structures that is asked for at once."""

MAX_ARCHIVE = 1 << 20
"""Longer archives are not looked at in memory."""

CHECK_GROWTH = 160 << 20
"""Bytes of address space: marks of what is used are kept for windows of 64 MiB."""

MAX_CHAINS = 2
MAX_SLICES = 3
MAP_LIMIT = 64
MAP_SECONDS = 0.01


def descriptor(raw: bytes) -> None:
    """``parse_descriptor`` of any bytes."""
    with watched():
        found = parse_descriptor(raw, "d.vmdk")
        if not found.encrypted and found.capacity <= 0:
            raise Finding(f"a capacity of {found.capacity}")


def header(raw: bytes) -> None:
    """The header of an extent in a file of the size that the first eight bytes say."""
    head = raw[8:]
    size = max(int.from_bytes(raw[:8], "little") & (1 << 48) - 1, len(head))
    with watched():
        found = _layout(head, size)
        end = found.directory * SECTOR + found.tables * 4
        if end > size or found.lowest < 1 or not 0 < found.capacity <= MAX_CAPACITY:
            raise Finding(f"a layout of {found} in a file of {size} bytes")


def _layout(head: bytes, size: int) -> Layout:
    if head.startswith(cowd.MAGIC):
        return cowd.parse_header(head, "d.vmdk", size)
    if head.startswith(sesparse.MAGIC):
        volatile = head[8 * SECTOR : 9 * SECTOR]
        return sesparse.parse_header(head, volatile, "d.vmdk", size)
    found = sparse.parse_header(sparse.MAGIC + head[4:SECTOR], "d.vmdk", size)
    if found.at_end:
        found = sparse.with_footer(found, head[-sparse.FOOTER_BYTES :], "d.vmdk", size)
    return sparse.layout_of(found, "d.vmdk", size)


def archive(raw: bytes) -> None:
    """The members of a tar archive of any bytes."""
    reads = 0

    def read(offset: int, count: int) -> bytes:
        nonlocal reads
        reads += 1
        if not (0 <= offset <= len(raw) and 0 <= count <= MAX_ARCHIVE_READ):
            raise Finding(f"asks for {count} bytes at {offset} of {len(raw)}")
        return raw[offset : offset + count]

    with watched():
        looks_like_archive(raw[:SECTOR])
        for member in read_members(read, len(raw), "vm.ova"):
            if member.offset < SECTOR or not 0 <= member.size <= len(raw) - member.offset:
                raise Finding(f"{member} in an archive of {len(raw)} bytes")
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise Finding(f"a member named {member.name!r}")
    if reads > 2 * (len(raw) // SECTOR + 1):
        raise Finding(f"{reads} reads of an archive of {len(raw)} bytes")


def vmx(raw: bytes) -> None:
    """``parse_vmx`` of any bytes."""
    with watched():
        parse_vmx(raw, "vm.vmx")


def folder(raw: bytes) -> None:
    """``discover`` and ``VmdkEngine`` on the case that the bytes mean."""
    case = unpack(raw)
    scratch = _scratch()
    try:
        source = case.write(scratch)
    except OSError:
        return  # no such file can be
    with watched(scratch):
        found = discover(source)
        for left in found.left_out:
            check_error(left.error)
        for chain in found.chains[:MAX_CHAINS]:
            _look_at(chain, case)


def check(raw: bytes) -> None:
    """``vddkfs check`` of the case that the bytes mean."""
    case = unpack(raw)
    scratch = _scratch()
    try:
        source = case.write(scratch)
    except OSError:
        return  # no such file can be
    with watched(scratch, CHECK_GROWTH):
        for event in check_source(source):
            if isinstance(event, VmdkFinding) and not event.what.isprintable():
                raise Finding(f"a line of {event.what!r}")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "descriptor": descriptor,
    "header": header,
    "archive": archive,
    "vmx": vmx,
    "folder": folder,
    "check": check,
}

_folders: dict[int, str] = {}


def _scratch() -> str:
    """Return this process's own folder, emptied."""
    pid = os.getpid()
    if pid not in _folders:
        memory = "/dev/shm"
        place = memory if "TMPDIR" not in os.environ and os.access(memory, os.W_OK) else None
        _folders[pid] = os.path.realpath(tempfile.mkdtemp(prefix="vddkfs-fuzz-", dir=place))
    for entry in os.scandir(_folders[pid]):
        os.unlink(entry.path)
    return _folders[pid]


def clean_up() -> None:
    """Remove this process's folder."""
    path = _folders.pop(os.getpid(), "")
    if path:
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- one chain


def _look_at(chain: Chain, case: Case) -> None:
    engine = VmdkEngine(chain.paths)
    try:
        before = tuple(engine.identities())
        random = Random(case.options)
        with reads_inside(_members(chain)):
            seen = _read_all(engine, chain, random)
        if tuple(engine.revalidate()) != before:
            raise Finding("revalidate tells of a change")
        if engine.renew().identities != before:
            raise Finding("renew tells of a change")
        for image, sector, count, content in seen[:4]:
            if _read(engine, image, sector, count, False) != content:
                raise Finding(f"{sector}+{count} of image {image} changed when renewed")
    finally:
        engine.close()


def _members(chain: Chain) -> list[tuple[int, int]]:
    """Return where the files of *chain* lie in the archive that they are members of, if any."""
    paths = {extent.path for link in chain.links for extent in link.extents if extent.path}
    holders = {path.partition(".ova/")[0] + ".ova" for path in paths if ".ova/" in path}
    places = []
    for holder in holders:
        with open(holder, "rb") as file:
            raw = file.read(MAX_ARCHIVE)
        if len(raw) == MAX_ARCHIVE:
            return []
        for member in read_members(lambda at, size, raw=raw: raw[at : at + size], len(raw), holder):
            if f"{holder}/{member.name}" in paths:
                places.append((member.offset, member.offset + member.size))
    return places


def _read_all(
    engine: VmdkEngine, chain: Chain, random: Random
) -> list[tuple[int, int, int, bytes | None]]:
    """Read and map the images; return (image, sector, count, content) of what was read."""
    budget = MAX_BYTES_READ
    seen = []
    for image in {len(chain.links) - 1, 0}:
        capacity = chain.links[image].capacity
        for sector, count in _ranges(chain, image, random):
            budget -= 6 * count * SECTOR
            if budget > 0 and sector + count <= capacity:
                seen.append((image, sector, count, _check_range(engine, image, sector, count)))
        holes = _holes(engine, image, capacity)
        for where, sector, _, content in seen:
            if where == image and content is not None:
                _check_holes(holes, sector, content)
    return seen


def _ranges(chain: Chain, image: int, random: Random) -> Iterator[tuple[int, int]]:
    """Yield (sector, count): ends, seams, places in between; they may lie outside."""
    link = chain.links[image]
    capacity = link.capacity
    yield 0, min(capacity, 33)
    yield max(0, capacity - 9), min(capacity, 9)
    yield capacity - 1, 1
    seam = 0
    for extent in link.extents[:3]:
        seam += extent.sectors
        yield max(0, seam - 3), 7
    for grain in (8, 128, 512 * 8):
        yield grain - 1, 2
        at = random.randrange(capacity) // grain * grain
        yield at, min(grain, 128)
        yield 512 * grain + grain - 1, 2
        yield max(0, at - 1), 3
    yield random.randrange(capacity), random.choice((1, 5, 64, 300))


def _read(engine: VmdkEngine, image: int, sector: int, count: int, direct: bool) -> bytes | None:
    """Return the content, None for an error, which is checked."""
    into = bytearray(b"\xa5" * (count * SECTOR))
    try:
        engine.read(image, sector, count, memoryview(into), direct)
    except EngineError as error:
        check_error(error)
        return None
    return bytes(into)


def _check_range(engine: VmdkEngine, image: int, sector: int, count: int) -> bytes | None:
    """Read a range in every way; return what it has."""
    where = f"{sector}+{count} of image {image}"
    direct = _read(engine, image, sector, count, True)
    content = _read(engine, image, sector, count, False)
    if content is not None and direct is not None and content != direct:
        raise Finding(f"{where}: direct reads differ")
    if _read(engine, image, sector, count, False) != content:
        raise Finding(f"{where}: two reads differ")
    for way, expected in ((False, content), (True, direct)):
        into = bytearray(b"\x5a" * (count * SECTOR))
        if engine.read_nowait(image, sector, count, memoryview(into), way) and into != expected:
            raise Finding(f"{where}: read_nowait differs")
    if content is not None and count > 1:
        half = count // 2
        first = _read(engine, image, sector, half, False)
        second = _read(engine, image, sector + half, count - half, False)
        if first is None or second is None or first + second != content:
            raise Finding(f"{where}: differs when read in two")
    return content


def _check_holes(holes: list[MapExtent], sector: int, content: bytes) -> None:
    """Raise Finding if *content*, which was read from *sector* on, is not zeros in *holes*."""
    for hole in holes:
        begin = max(0, hole.sector - sector) * SECTOR
        end = max(0, hole.sector + hole.count - sector) * SECTOR
        if any(content[begin:end]):
            raise Finding(f"content at {sector}, in the hole {hole}")


def _holes(engine: VmdkEngine, image: int, capacity: int) -> list[MapExtent]:
    """Walk the map from the start; return the holes, the ends of which were read as zeros."""
    here = 0
    holes = []
    for _ in range(MAX_SLICES):
        found = engine.map(image, here, capacity - here, MAP_LIMIT, MAP_SECONDS)
        kind = None
        for extent in found.extents:
            if extent.sector != here or extent.count <= 0 or extent.data is kind:
                raise Finding(f"a map of {msgspec.to_builtins(found)} at sector {here}")
            kind = extent.data
            here += extent.count
            if not extent.data:
                holes.append(extent)
                for sector in {extent.sector, here - 1}:
                    if _read(engine, image, sector, 1, False) != bytes(SECTOR):
                        raise Finding(f"a hole with content at sector {sector} of image {image}")
        if found.next_sector != here or not found.extents:
            raise Finding(f"a map that ends at {found.next_sector}, not at {here}")
        if here == capacity:
            return holes
    tail = engine.map(image, capacity - 1, 1, 1, MAP_SECONDS)
    if tail.next_sector != capacity:
        raise Finding("a map of the last sector that does not end there")
    return holes
