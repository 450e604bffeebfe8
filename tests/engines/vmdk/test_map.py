"""The allocation map: it agrees with reading, comes in slices, and is quick on huge empty disks."""

import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vddkfs.engines.vmdk import VmdkEngine, discover
from vddkfs.engines.vmdk.descriptor import MAX_CAPACITY

Read = Callable[..., bytes]
Map = Callable[..., list[tuple[int, int, bool]]]

GRAIN = 128 * 512


@contextmanager
def few_calls_and_little_memory(monkeypatch: pytest.MonkeyPatch, calls: int) -> Iterator[None]:
    """Fail if the block makes more than *calls* system calls on files, or keeps 4 MiB."""
    seen = 0
    with monkeypatch.context() as patch:
        for name in ("preadv", "pread", "lseek"):
            plain = getattr(os, name)

            def counted(*arguments: Any, plain: Any = plain) -> Any:
                nonlocal seen
                seen += 1
                return plain(*arguments)

            patch.setattr(os, name, counted)
        tracemalloc.start()
        try:
            yield
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert 0 < seen <= calls
    assert peak < 4 << 20


def test_slices(make: Any, opened: Callable[..., VmdkEngine], full_map: Map) -> None:
    grains: dict[int, bytes | int] = {number: b"x" for number in range(0, 40, 2)}
    engine = opened(make.sparse("x.vmdk", 40 * 128, grains))
    whole = [(number * 128, 128, number % 2 == 0) for number in range(40)]
    for limit in (1, 2, 7, 1000):
        assert full_map(engine, limit=limit) == whole
    part = engine.map(0, 100, 100, 10, 60)
    assert part.next_sector == 200
    assert [tuple(map(int, (e.sector, e.count, e.data))) for e in part.extents] == [
        (100, 28, 1),
        (128, 72, 0),
    ]


def test_no_time_still_makes_progress(make: Any, opened: Callable[..., VmdkEngine]) -> None:
    engine = opened(make.sparse("x.vmdk", 40 * 128, {0: b"x"}))
    part = engine.map(0, 0, 40 * 128, 10, 0)
    assert part.next_sector > 0
    assert len(part.extents) == 1


def test_holes_of_a_flat_file(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, full_map: Map
) -> None:
    path = make.flat("x", bytes(512) * 8192)
    flat = make.folder / "x-flat.vmdk"
    with open(flat, "r+b") as file:
        file.truncate(0)
        file.truncate(8192 * 512)
        file.seek(1 << 20)
        file.write(b"d" * (1 << 20))
    found = full_map(opened(path))
    if found == [(0, 8192, True)]:
        pytest.skip("the file system of the temporary folder reports no holes")
    assert found == [(0, 2048, False), (2048, 2048, True), (4096, 4096, False)]


def test_partly_holes_are_data(make: Any, opened: Callable[..., VmdkEngine], read: Read) -> None:
    """With a file system whose holes end inside a sector, no sector with data is called a hole."""
    content = bytes(700) + b"d" * 2000 + bytes(5000) + b"e"
    content += bytes(-len(content) % 512)
    engine = opened(make.flat("x", content))
    runs = [(0, 700, False), (700, 2700, True), (2700, 7700, False), (7700, 7701, True)]
    runs.append((7701, len(content), False))

    def seek(_fd: int, offset: int, how: int) -> int:
        for begin, end, data in runs:
            if begin <= offset < end:
                return offset if data == (how == os.SEEK_DATA) else end
        raise AssertionError(offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "lseek", seek)
        extents = engine.map(0, 0, len(content) // 512, 100, 60).extents
    assert [(extent.sector, extent.count, extent.data) for extent in extents] == [
        (0, 1, False),
        (1, 5, True),
        (6, 9, False),
        (15, 1, True),
    ]
    for extent in extents:
        if not extent.data:
            assert not any(read(engine, extent.sector, extent.count))


def test_file_system_that_knows_no_holes(
    make: Any, opened: Callable[..., VmdkEngine], full_map: Map, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(make.flat("x", bytes(4096)))
    sparse = opened(make.sparse("y.vmdk", 1 << 20, {3: b"x"}))

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "lseek", refuse)
    assert full_map(engine) == [(0, 8, True)]
    assert full_map(sparse) == [(0, 384, False), (384, 128, True), (512, (1 << 20) - 512, False)]


def huge(make: Any, name: str, **keys: Any) -> str:
    """A disk of 62 TiB whose directory names no table."""
    tables = MAX_CAPACITY // (128 * 512)
    path: str = make.sparse(name, MAX_CAPACITY, {}, tail=(tables * 4 // 512 + 200) * 512, **keys)
    return path


def test_62_tib_empty(
    make: Any, read: Read, full_map: Map, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = huge(make, "x.vmdk")
    with few_calls_and_little_memory(monkeypatch, 700):
        (chain,) = discover(path).chains
        engine = VmdkEngine(chain.paths)
        assert full_map(engine) == [(0, MAX_CAPACITY, False)]
        assert read(engine, MAX_CAPACITY - 8, 8) == bytes(4096)
    engine.close()


def test_62_tib_chain(
    make: Any, opened: Callable[..., VmdkEngine], full_map: Map, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge(make, "x.vmdk", cid="00000000")
    for number in range(1, 5):
        parent = "x.vmdk" if number == 1 else f"x-{number - 1}.vmdk"
        child = {"parent": f"{number - 1:08x}", "hint": parent, "cid": f"{number:08x}"}
        path = huge(make, f"x-{number}.vmdk", **child)
    with few_calls_and_little_memory(monkeypatch, 5 * 700):
        assert full_map(opened(path)) == [(0, MAX_CAPACITY, False)]


def test_62_tib_with_tables_allocated(
    qemu: Any,
    tmp_path: Path,
    opened: Callable[..., VmdkEngine],
    full_map: Map,
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """qemu-img allocates all two million tables, as one hole of the file."""
    path = tmp_path / "x.vmdk"
    qemu.create(path, MAX_CAPACITY * 512)
    with few_calls_and_little_memory(monkeypatch, 1000):
        engine = opened(path)
        assert full_map(engine) == [(0, MAX_CAPACITY, False)]
    qemu.io(path, "write -P 7 0 64k", "write -P 8 40T 64k", f"write -P 9 {(62 << 40) - 512} 512")
    engine.revalidate()
    with few_calls_and_little_memory(monkeypatch, 1100):
        middle, end = (40 << 40) // 512, MAX_CAPACITY
        found = [entry for entry in full_map(engine) if entry[2]]
        assert found == [(0, 128, True), (middle, 128, True), (end - 128, 128, True)]
        assert read(engine, middle + 5, 2) == b"\x08" * 1024
        assert read(engine, end - 2, 2) == bytes(512) + b"\x09" * 512


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layers=st.lists(
        st.dictionaries(st.integers(0, 1299), st.sampled_from(["data", "zero"]), max_size=40),
        min_size=1,
        max_size=4,
    ),
    capacity=st.integers(1, 1300 * 8),
    spans=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=20),
)
def test_map_and_reads_follow_the_model(
    make: Any,
    read: Read,
    full_map: Map,
    layers: list[dict[int, str]],
    capacity: int,
    spans: list[tuple[int, int]],
) -> None:
    """Random chains of sparse links against a model of bytes and of what is allocated."""
    content, allocated = bytearray(capacity * 512), bytearray(capacity)
    paths, states = [], []
    for level, layer in enumerate(layers):
        grains: dict[int, bytes | int] = {}
        for number, what in layer.items():
            begin, end = number * 8, min(number * 8 + 8, capacity)
            if begin >= capacity:
                continue
            data = what == "data"
            fill = bytes([level * 50 + number % 50 + 1]) if data else b"\0"
            grains[number] = fill * 4096 if data else 1
            content[begin * 512 : end * 512] = fill * ((end - begin) * 512)
            allocated[begin:end] = bytes([data]) * (end - begin)
        child = {"parent": f"{level:08x}", "hint": f"{level - 1}.vmdk"} if level else {}
        path = make.sparse(
            f"{level}.vmdk",
            capacity,
            grains,
            grain=8,
            zero_flag=True,
            cid=f"{level + 1:08x}",
            **child,
        )
        paths.append(path)
        states.append((bytes(content), bytes(allocated)))
    (chain,) = discover(paths[-1]).chains
    assert list(chain.paths) == paths
    engine = VmdkEngine(paths)
    try:
        for image, (bytes_then, allocated_then) in enumerate(states):
            mapped = bytearray()
            for _, count, data in full_map(engine, image=image):
                mapped += bytes([data]) * count
            assert bytes(mapped) == allocated_then
            for begin, length in spans:
                sector = begin % capacity
                count = length % (capacity - sector) + 1
                wanted = bytes_then[sector * 512 : (sector + count) * 512]
                assert read(engine, sector, count, image=image) == wanted
                assert read(engine, sector, count, image=image, direct=True) == wanted
                buffer = bytearray(count * 512)
                if engine.read_nowait(image, sector, count, memoryview(buffer), begin % 2 == 0):
                    assert buffer == wanted
    finally:
        engine.close()
