"""Every supported format, made and converted by qemu-img, and compared byte by byte."""

import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vddkfs.engines.vmdk import VmdkEngine, discover

Read = Callable[..., bytes]
Map = Callable[..., list[tuple[int, int, bool]]]

SPARSE = ["monolithicSparse", "twoGbMaxExtentSparse"]
FLAT = ["monolithicFlat", "twoGbMaxExtentFlat"]
KIB = 1024


def compare(engine: VmdkEngine, image: int, raw: bytes, read: Read, seed: int) -> None:
    """Compare the whole image and many parts of it with *raw*."""
    capacity = len(raw) // 512
    assert engine.identities()[image].capacity == capacity
    assert read(engine, 0, capacity, image=image) == raw
    draw = random.Random(seed)
    for _ in range(60):
        sector = draw.randrange(capacity)
        length = min(capacity - sector, draw.choice([1, 7, 8, 128, 129, 2048, capacity]))
        wanted = raw[sector * 512 : (sector + length) * 512]
        direct = draw.random() < 0.5
        assert read(engine, sector, length, image=image, direct=direct) == wanted
        buffer = bytearray(length * 512)
        if engine.read_nowait(image, sector, length, memoryview(buffer), direct):
            assert buffer == wanted


def compare_map(
    mine: list[tuple[int, int, bool]], theirs: list[dict[str, Any]], raw: bytes
) -> None:
    """Compare maps: what we call a hole is zeros for qemu too, what it calls data is data."""
    capacity = len(raw) // 512
    data = bytearray()
    for sector, length, is_data in mine:
        data += bytes([is_data]) * length
        if not is_data:
            assert not any(raw[sector * 512 : (sector + length) * 512])
    assert len(data) == capacity
    for entry in theirs:
        begin, end = entry["start"] // 512, (entry["start"] + entry["length"]) // 512
        if entry["data"] and not entry["zero"]:
            assert all(data[begin:end])
        if not entry["data"]:
            assert entry["zero"]
            assert not any(data[begin:end])


@pytest.mark.parametrize("size", [512, 64 * KIB, 64 * KIB + 512, 1000448, 33 << 20])
@pytest.mark.parametrize(
    ("subformat", "options"),
    [(name, "") for name in SPARSE + FLAT] + [(name, "zeroed_grain=on") for name in SPARSE],
)
def test_formats(
    qemu: Any,
    tmp_path: Path,
    opened: Callable[..., VmdkEngine],
    read: Read,
    full_map: Map,
    subformat: str,
    size: int,
    options: str,
) -> None:
    path = tmp_path / "x.vmdk"
    qemu.create(path, size, options=f"subformat={subformat},{options}".rstrip(","))
    last = (size - 1) // 512 * 512
    qemu.io(path, f"write -P 3 {last} 512", f"write -P 4 {size // 1024 * 512} 512")
    if size > 200 * KIB:
        qemu.io(path, "write -P 5 128k 40k", "write -P 6 64k 64k", "write -z 64k 64k")
    raw = qemu.raw(path)
    engine = opened(path)
    compare(engine, 0, raw, read, size)
    compare_map(full_map(engine), qemu.map(path), raw)


def test_converted(
    qemu: Any, tmp_path: Path, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(1000 * 512))
    for subformat in SPARSE + FLAT:
        path = tmp_path / f"{subformat}.vmdk"
        qemu.convert(source, path, f"subformat={subformat}")
        compare(opened(path), 0, source.read_bytes(), read, 1)


def test_vmfs(make: Any, qemu: Any, opened: Callable[..., VmdkEngine], read: Read) -> None:
    content = random.Random(2).randbytes(500 * 512)
    (make.folder / "x-flat.vmdk").write_bytes(content)
    path = make.text("x.vmdk", ['RW 500 VMFS "x-flat.vmdk"'], kind="vmfs")
    assert qemu.raw(Path(path)) == content
    compare(opened(path), 0, content, read, 2)


def test_several_extents(
    qemu: Any, tmp_path: Path, opened: Callable[..., VmdkEngine], read: Read, full_map: Map
) -> None:
    """Over the seams of extents of 2 GiB."""
    gib = 1 << 30
    for subformat in ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
        path = tmp_path / f"{subformat}.vmdk"
        qemu.create(path, 5 * gib, options=f"subformat={subformat}")
        qemu.io(path, f"write -P 1 {2 * gib - 64 * KIB} 128k", f"write -P 2 {4 * gib - 512} 1k")
        engine = opened(path)
        assert len(discover(str(path)).chains[0].links[0].extents) == 3
        seam = 2 * gib // 512
        assert read(engine, seam - 129, 258) == bytes(512) + b"\1" * 128 * KIB + bytes(512)
        assert read(engine, 2 * seam - 2, 4) == bytes(512) + b"\2" * KIB + bytes(512)
        data = [(sector, length) for sector, length, data in full_map(engine) if data]
        if subformat == "twoGbMaxExtentSparse":
            assert data == [(seam - 128, 256), (2 * seam - 128, 256)]
        else:
            assert sum(length for _, length in data) < 2048


writes = st.tuples(
    st.integers(0, 3200),
    st.integers(1, 400),
    st.integers(0, 255),
    st.booleans(),
)
links = st.tuples(st.sampled_from(SPARSE), st.booleans(), st.lists(writes, max_size=5))
_numbers = count()


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    base=st.sampled_from(SPARSE + FLAT),
    first=st.lists(writes, min_size=1, max_size=6),
    deltas=st.lists(links, max_size=4),
    sectors=st.integers(1, 3200),
    growth=st.sampled_from([0, 0, 0, 100]),
)
def test_chains(
    qemu: Any,
    tmp_path: Path,
    read: Read,
    full_map: Map,
    base: str,
    first: list[tuple[int, int, int, bool]],
    deltas: list[tuple[str, bool, list[tuple[int, int, int, bool]]]],
    sectors: int,
    growth: int,
) -> None:
    """Chains of up to five links with random writes: every image, and its map."""
    folder = tmp_path / str(next(_numbers))
    folder.mkdir()
    path = folder / "0.vmdk"
    paths = [path]
    qemu.create(path, sectors * 512, options=f"subformat={base}")
    write(qemu, path, first, sectors)
    for number, (subformat, zeroed, layout) in enumerate(deltas, 1):
        options = f"subformat={subformat}" + (",zeroed_grain=on" if zeroed else "")
        sectors += growth
        path = folder / f"{number}.vmdk"
        qemu.create(path, sectors * 512, options=options, parent=paths[-1].name)
        write(qemu, path, layout, sectors)
        paths.append(path)
    (chain,) = discover(str(folder)).chains
    assert list(chain.paths) == [str(path) for path in paths]
    engine = VmdkEngine(chain.paths)
    try:
        for image, path in enumerate(paths):
            raw = qemu.raw(path)
            compare(engine, image, raw, read, image)
            compare_map(full_map(engine, image=image), qemu.map(path), raw)
    finally:
        engine.close()


def write(qemu: Any, path: Path, layout: list[tuple[int, int, int, bool]], sectors: int) -> None:
    commands = []
    for sector, length, pattern, zero in layout:
        begin = sector % sectors
        size = min(length, sectors - begin) * 512
        how = "-z" if zero else f"-P {pattern}"
        commands.append(f"write {how} {begin * 512} {size}")
    if commands:
        qemu.io(path, *commands)
