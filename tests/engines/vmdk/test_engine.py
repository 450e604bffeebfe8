"""Reading: what the formats mean where there is no oracle, damage, files and threads."""

import errno
import os
import random
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest

from vddkfs.engines.base import Engine
from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.engines.vmdk.tables import TableCache, to_entries
from vddkfs.errors import EngineError, NotAVmdk

Read = Callable[..., bytes]
Nowait = Callable[..., bytes | None]
Map = Callable[..., list[tuple[int, int, bool]]]

GRAIN = 128 * 512


def fill(letter: str, size: int = GRAIN) -> bytes:
    return letter.encode() * size


def test_is_an_engine(make: Any, opened: Callable[..., VmdkEngine]) -> None:
    engine: Engine = opened(make.sparse("x.vmdk", 2048, {}))
    (identity,) = engine.identities()
    assert (identity.capacity, identity.content_id) == (2048, "12345678")


# What the formats mean


def test_sparse(make: Any, opened: Callable[..., VmdkEngine], read: Read) -> None:
    engine = opened(make.sparse("x.vmdk", 1024, {1: fill("b"), 3: fill("d"), 2: fill("c")}))
    expected = bytes(GRAIN) + fill("b") + fill("c") + fill("d") + bytes(4 * GRAIN)
    assert read(engine, 0, 1024) == expected
    assert read(engine, 127, 258) == expected[127 * 512 : 385 * 512]


def test_zeroed_grain_hides_the_parent(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, full_map: Map, nowait: Nowait
) -> None:
    make.flat("base", fill("p", 4 * GRAIN), cid="00000001")
    child = {"parent": "00000001", "hint": "base.vmdk", "zero_flag": True}
    engine = opened(make.sparse("x.vmdk", 512, {0: 1, 2: fill("x"), 3: 1}, **child))
    expected = bytes(GRAIN) + fill("p") + fill("x") + bytes(GRAIN)
    assert read(engine, 0, 512) == expected
    assert b"".join(nowait(engine, sector, 1) or b"" for sector in range(512)) == expected
    assert full_map(engine) == [(0, 128, False), (128, 256, True), (384, 128, False)]


def test_entry_1_without_the_flag_is_damage(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, full_map: Map
) -> None:
    path = make.sparse("x.vmdk", 512, {0: fill("a"), 1: 1})
    engine = opened(path)
    assert read(engine, 0, 128) == fill("a")
    with pytest.raises(EngineError, match=r"x\.vmdk.*sector 128 of the image") as caught:
        read(engine, 128, 8)
    assert (caught.value.link, caught.value.sector) == (path, 128)
    assert caught.value.errno == errno.EIO
    assert full_map(engine) == [(0, 256, True), (256, 256, False)]


@pytest.mark.parametrize("grain", [8, 16, 128, 4096])
def test_grain_sizes_and_many_tables(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, grain: int
) -> None:
    span = grain * 512
    spots = {0: b"a", 511: b"b", 512: b"c", 1024: b"d", 1535: b"e"}
    grains: dict[int, bytes | int] = {at: text * grain * 512 for at, text in spots.items()}
    engine = opened(make.sparse("x.vmdk", 3 * span, grains, grain=grain))
    for at, text in spots.items():
        assert read(engine, at * grain, grain) == text * grain * 512
    crossing = read(engine, span - 4, 8)
    assert crossing == b"b" * 2048 + b"c" * 2048
    assert read(engine, 2 * grain, 4) == bytes(2048)


def test_partial_last_grain(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, nowait: Nowait
) -> None:
    """Of the last grain the file needs only the sectors that the disk has."""
    path = make.sparse("x.vmdk", 128 + 5, {0: fill("a"), 1: fill("b")})
    size = os.path.getsize(path)
    os.truncate(path, size - (128 - 5) * 512)
    engine = opened(path)
    assert read(engine, 120, 13) == fill("a", 8 * 512) + fill("b", 5 * 512)
    assert nowait(engine, 130, 3) == fill("b", 3 * 512)
    os.truncate(path, size - (128 - 5) * 512 - 1)
    assert read(engine, 128, 4) == fill("b", 4 * 512)
    with pytest.raises(EngineError, match="sector 132 of the image"):
        read(engine, 128, 5)


def test_mixed_extents(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, full_map: Map, nowait: Nowait
) -> None:
    (make.folder / "x-f001.vmdk").write_bytes(fill("?", 512 * 3) + fill("f", 512 * 10))
    make.sparse("x-s001.vmdk", 256, {0: fill("s"), 1: fill("t")}, embedded=False)
    lines = [
        'RW 7 FLAT "x-f001.vmdk" 3',
        "RW 20 ZERO",
        'RW 133 SPARSE "x-s001.vmdk"',
        'RDONLY 3 FLAT "x-f001.vmdk" 10',
    ]
    engine = opened(make.text("x.vmdk", lines))
    expected = fill("f", 7 * 512) + bytes(20 * 512) + fill("s") + fill("t", 5 * 512)
    expected += fill("f", 3 * 512)
    assert read(engine, 0, 163) == expected
    for _ in range(300):
        sector = random.randrange(163)
        count = random.randint(1, 163 - sector)
        wanted = expected[sector * 512 : (sector + count) * 512]
        assert read(engine, sector, count) == wanted
        assert read(engine, sector, count, direct=True) == wanted
        assert nowait(engine, sector, count) == wanted
    assert full_map(engine) == [(0, 7, True), (7, 20, False), (27, 136, True)]


def test_links_of_different_capacity(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, full_map: Map, nowait: Nowait
) -> None:
    """Beyond a short parent are zeros, even where the grandparent goes on."""
    make.flat("a", fill("a", 400 * 512), cid="00000001")
    make.sparse("b.vmdk", 200, {}, cid="00000002", parent="00000001", hint="a.vmdk")
    leaf = make.sparse("c.vmdk", 600, {3: fill("c")}, parent="00000002", hint="b.vmdk")
    engine = opened(leaf)
    expected = fill("a", 200 * 512) + bytes(184 * 512) + fill("c") + bytes(88 * 512)
    assert read(engine, 0, 600) == expected
    for sector in range(0, 596, 5):
        assert nowait(engine, sector, 4) == expected[sector * 512 : (sector + 4) * 512]
    assert full_map(engine) == [
        (0, 200, True),
        (200, 184, False),
        (384, 128, True),
        (512, 88, False),
    ]
    assert read(engine, 0, 200, image=1) == fill("a", 200 * 512)


def test_zero_extent_hides_the_parent(
    make: Any, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    make.flat("a", fill("a", 100 * 512), cid="00000001")
    leaf = make.text("b.vmdk", ["RW 100 ZERO"], parent="00000001", hint="a.vmdk")
    engine = opened(leaf)
    assert read(engine, 10, 20) == bytes(20 * 512)
    assert read(engine, 10, 20, image=0) == fill("a", 20 * 512)


def test_large_zeros(make: Any, opened: Callable[..., VmdkEngine], read: Read) -> None:
    engine = opened(make.sparse("x.vmdk", 1 << 20, {}))
    assert read(engine, 3, 5000) == bytes(5000 * 512)


# Damage: EIO for the range, never zeros, never short


@pytest.mark.parametrize("entry", [5, 20, 0xFFFFFFFF, 1 << 20])
def test_grain_outside_the_file(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, entry: int, nowait: Nowait
) -> None:
    path = make.sparse("x.vmdk", 512, {0: fill("a"), 1: entry, 2: fill("c")})
    engine = opened(path)
    assert read(engine, 0, 128) == fill("a")
    assert read(engine, 256, 128) == fill("c")
    for direct in (False, True):
        with pytest.raises(EngineError, match=r"x\.vmdk.*sector 130 of the image") as caught:
            read(engine, 130, 8, direct=direct)
        assert (caught.value.link, caught.value.errno) == (path, errno.EIO)
        with pytest.raises(EngineError) as caught:
            read(engine, 0, 512, direct=direct)
        assert caught.value.sector == 128
        assert nowait(engine, 130, 8, direct) is None
        assert nowait(engine, 0, 512, direct) is None


def test_truncated_grain(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, nowait: Nowait
) -> None:
    path = make.sparse("x.vmdk", 256, {0: fill("a"), 1: fill("b")})
    os.truncate(path, os.path.getsize(path) - GRAIN + 8 * 512 + 100)
    engine = opened(path)
    assert read(engine, 0, 136) == fill("a") + fill("b", 8 * 512)
    with pytest.raises(EngineError, match="sector 136 of the image"):
        read(engine, 100, 100)
    assert nowait(engine, 136, 1) is None


@pytest.mark.parametrize("place", [3, 1 << 30])
def test_grain_table_outside_the_file(
    make: Any,
    opened: Callable[..., VmdkEngine],
    read: Read,
    full_map: Map,
    place: int,
    nowait: Nowait,
) -> None:
    span = 128 * 512
    path = make.sparse("x.vmdk", 3 * span, {0: fill("a"), 512: fill("b"), 1024: fill("c")})
    with open(path, "r+b") as file:
        file.seek(21 * 512 + 4)
        file.write(struct.pack("<I", place))
    engine = opened(path)
    assert read(engine, 2 * span, 128) == fill("c")
    for direct in (False, True):
        with pytest.raises(EngineError, match=r"x\.vmdk.*grain table") as caught:
            read(engine, span + 7, 8, direct=direct)
        assert caught.value.sector == span
        assert nowait(engine, span + 7, 8, direct) is None
    # The damaged table, and the grain that follows it.
    assert (span, span + 128, True) in full_map(engine)


def test_damage_in_a_parent_names_the_parent(
    make: Any, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    base = make.sparse("base.vmdk", 512, {1: 1 << 20}, cid="00000001")
    engine = opened(make.sparse("x.vmdk", 512, {}, parent="00000001", hint="base.vmdk"))
    with pytest.raises(EngineError, match=r"base\.vmdk") as caught:
        read(engine, 200, 1)
    assert (caught.value.link, caught.value.sector) == (base, 200)


def test_flat_file_that_shrinks(make: Any, opened: Callable[..., VmdkEngine], read: Read) -> None:
    path = make.flat("x", fill("f", 100 * 512))
    engine = opened(path)
    os.truncate(make.folder / "x-flat.vmdk", 50 * 512)
    assert read(engine, 0, 50) == fill("f", 50 * 512)
    with pytest.raises(EngineError, match=r"x-flat\.vmdk.*sector 50 of the image") as caught:
        read(engine, 40, 20)
    assert (caught.value.link, caught.value.sector) == (path, 50)


def test_failing_disk(
    make: Any,
    opened: Callable[..., VmdkEngine],
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
    nowait: Nowait,
) -> None:
    engine = opened(make.flat("x", fill("f", 100 * 512)))

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(EngineError, match=r"x-flat.vmdk: reading byte 5120 failed: Input"):
            read(engine, 10, 1)
        assert nowait(engine, 10, 1) is None
    assert nowait(engine, 10, 1) == fill("f", 512)


def test_short_reads_are_continued(
    make: Any,
    opened: Callable[..., VmdkEngine],
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
    nowait: Nowait,
) -> None:
    content = bytes(random.randrange(256) for _ in range(20 * 512))
    engine = opened(make.flat("x", content))
    whole = os.preadv

    def short(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        return whole(fd, [buffers[0][:700]], offset, flags)

    monkeypatch.setattr(os, "preadv", short)
    assert read(engine, 1, 19) == content[512:]
    assert nowait(engine, 1, 19) is None


@pytest.mark.parametrize(("sector", "count"), [(-1, 1), (0, 0), (100, 1), (99, 2), (0, 101)])
def test_requests_outside_are_bugs(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, sector: int, count: int
) -> None:
    engine = opened(make.text("x.vmdk", ["RW 100 ZERO"]))
    with pytest.raises(ValueError, match="sectors"):
        read(engine, sector, count)
    with pytest.raises(ValueError, match="sectors"):
        engine.map(0, sector, count, 10, 1)
    with pytest.raises(ValueError, match="image"):
        read(engine, 0, 1, image=1)
    with pytest.raises(ValueError, match="bytes"):
        engine.read(0, 0, 2, memoryview(bytearray(512)), False)


# Resources


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_every_file_is_closed(make: Any) -> None:
    make.flat("base", fill("a", 512), cid="00000001")
    leaf = make.sparse("x.vmdk", 1, {}, parent="00000001", hint="base.vmdk")
    before = open_files()
    engine = VmdkEngine([str(make.folder / "base.vmdk"), leaf])
    assert open_files() == before + 5, "two of them for locks"
    engine.revalidate()
    assert open_files() == before + 5, "two of them for locks"
    engine.close()
    assert open_files() == before
    (make.folder / "junk.vmdk").write_bytes(b"junk" * 200)
    with pytest.raises(NotAVmdk):
        VmdkEngine([leaf, str(make.folder / "junk.vmdk")])
    os.truncate(make.folder / "base-flat.vmdk", 0)
    with pytest.raises(Exception, match="truncated"):
        VmdkEngine([leaf, str(make.folder / "base.vmdk")])
    assert open_files() == before


@pytest.mark.parametrize("room", [0, 3000, 10_000, 8 << 20])
def test_any_table_cache_is_safe_for_threads(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, room: int
) -> None:
    grains: dict[int, bytes | int] = {
        number: number.to_bytes(4, "little") * 1024 for number in range(0, 512 * 40, 37)
    }
    path = make.sparse("x.vmdk", 8 * 512 * 40, grains, grain=8)
    engine = opened(path, table_cache_bytes=room)
    wrong: list[int] = []

    def reader(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(400):
            number = draw.randrange(512 * 40)
            expected = grains.get(number, bytes(4096))
            if read(engine, number * 8, 8) != expected:
                wrong.append(number)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_table_cache_keeps_its_bound() -> None:
    cache = TableCache(10_000)
    keys = cache.new_keys()
    table = to_entries(bytes([1]) * 2048)
    for number in range(100):
        cache.put(keys + number, table)
        assert cache.used_bytes <= 10_000
    assert cache.get(keys + 99) is table
    assert cache.get(keys) is None
    cache.put(keys + 200, to_entries(bytes([1]) * 20_000))
    assert cache.get(keys + 200) is None
    assert cache.new_keys() != keys
