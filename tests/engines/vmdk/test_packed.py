"""Compressed grains: read in any pieces, expanded once, and damage that stays where it is."""

import os
import random
import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.vmdk import VmdkEngine, packed
from vddkfs.engines.vmdk.engine import READ_THREADS
from vddkfs.engines.vmdk.packed import GrainCache, PackedExtent
from vddkfs.errors import EngineError

Read = Callable[..., bytes]
KIB = 1024
GRAIN = 64 * KIB
SECTORS = 40 * 128 + 30
"""The last grain is a part of one."""


def content() -> bytes:
    draw = random.Random("packed")
    grains = [draw.randbytes(512) * 128 if n % 3 else draw.randbytes(GRAIN) for n in range(41)]
    for hole in (5, 6, 20):
        grains[hole] = bytes(GRAIN)
    return b"".join(grains)[: SECTORS * 512]


@pytest.fixture
def disk(qemu: Any, tmp_path: Path) -> Path:
    (tmp_path / "raw").write_bytes(content())
    path = tmp_path / "x.vmdk"
    qemu.convert(tmp_path / "raw", path, "subformat=streamOptimized")
    return path


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places of the grains that were expanded, in order."""
    found: list[int] = []
    plain = PackedExtent._expand

    def expand(self: PackedExtent, packed: bytes, piece: Any) -> bytes:
        found.append(piece.offset)
        return plain(self, packed, piece)

    monkeypatch.setattr(PackedExtent, "_expand", expand)
    return found


def place_of(path: Path, grain: int) -> int:
    """Return the byte at which a grain's marker is."""
    raw = path.read_bytes()
    (directory,) = struct.unpack_from("<Q", raw, 56)
    (table,) = struct.unpack_from("<I", raw, directory * 512)
    (place,) = struct.unpack_from("<I", raw, table * 512 + grain * 4)
    return int(place) * 512


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("step", [8, 100, 128, 129, 2048])
@pytest.mark.parametrize("direct", [False, True])
def test_sequential_reading_expands_no_grain_twice(
    disk: Path,
    opened: Callable[..., VmdkEngine],
    read: Read,
    expanded: list[int],
    step: int,
    direct: bool,
) -> None:
    engine = opened(disk)
    found = b"".join(
        read(engine, sector, min(step, SECTORS - sector), direct=direct)
        for sector in range(0, SECTORS, step)
    )
    assert found == content()
    assert len(expanded) == len(set(expanded)) == 41 - 3


def test_readers_at_once_expand_no_grain_twice(
    disk: Path, opened: Callable[..., VmdkEngine], read: Read, expanded: list[int]
) -> None:
    engine, wanted = opened(disk), content()
    gate = threading.Barrier(8)

    def reading(number: int) -> None:
        gate.wait()
        for sector in range(0, SECTORS - 8, 8):
            assert read(engine, sector, 8) == wanted[sector * 512 :][:4096]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reading, range(8)))
    assert len(expanded) == len(set(expanded)) == 41 - 3


def test_without_the_cache_each_piece_expands_its_grain(
    disk: Path,
    opened: Callable[..., VmdkEngine],
    read: Read,
    expanded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trap that the cache is for."""
    monkeypatch.setattr(GrainCache, "get", lambda self, key: None)
    monkeypatch.setattr(GrainCache, "fetch", lambda self, key, make: make())
    engine = opened(disk)
    for sector in range(0, 128, 8):
        read(engine, sector, 8)
    assert len(expanded) == 16


def test_what_is_kept_is_answered_at_once(
    disk: Path, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    engine, buffer = opened(disk), bytearray(4096)
    assert not engine.read_nowait(0, 8, 8, memoryview(buffer), False)
    read(engine, 0, 1)
    assert engine.read_nowait(0, 8, 8, memoryview(buffer), False)
    assert buffer == content()[4096:8192]
    assert not engine.read_nowait(0, 8, 8, memoryview(buffer), True)


def test_the_cache_is_bounded() -> None:
    cache = GrainCache(10_000)
    for number in range(50):
        cache.fetch((1, number), lambda number=number: (b"x", bytes([number]) * 1000))
    kept = [number for number in range(50) if cache.get((1, number))]
    assert kept == list(range(43, 50))[-len(kept) :]
    assert 5 < len(kept) < 10
    assert cache.fetch((2, 0), lambda: (b"", bytes(20_000)))[1] == bytes(20_000)
    assert cache.get((2, 0)) is None, "larger than all of it"


def test_who_waits_for_a_failure_tries_for_himself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = GrainCache()
    begun, go_on = threading.Event(), threading.Event()
    calls = []

    class Telling(Future):  # type: ignore[type-arg]
        def result(self, timeout: float | None = None) -> Any:
            go_on.set()
            return super().result(timeout)

    monkeypatch.setattr(packed, "Future", Telling)

    def fail() -> tuple[bytes, bytes]:
        calls.append(1)
        begun.set()
        assert go_on.wait(20)
        raise EngineError("damaged")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.fetch, (0, 0), fail)
        assert begun.wait(20)
        second = pool.submit(cache.fetch, (0, 0), fail)
        for one in (first, second):
            with pytest.raises(EngineError, match="damaged"):
                one.result(20)
    assert len(calls) == 2
    assert first.exception() is not second.exception(), "each has his own"
    assert cache.fetch((0, 0), lambda: (b"a", b"b")) == (b"a", b"b")


def marker(lba: int, data: bytes) -> bytes:
    return struct.pack("<QI", lba, len(data)) + data


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (struct.pack("<Q", 7), "for sector 7"),
        (marker(2 * 128, b"")[:12], "of 0 bytes"),
        (struct.pack("<QI", 2 * 128, 0xFFFFFFFF), "of 4294967295 bytes"),
        (marker(2 * 128, b"no stream at all"), "damaged"),
        (marker(2 * 128, zlib.compress(bytes(GRAIN - 512))), "65024 bytes"),
        (marker(2 * 128, zlib.compress(bytes(GRAIN + 1))), "65537 bytes or more"),
        (marker(2 * 128, zlib.compress(bytes(1 << 28))[:200]), "65537 bytes or more"),
        (marker(2 * 128, zlib.compress(bytes(GRAIN))[:-1]), "65536 bytes"),
        (marker(2 * 128, zlib.compress(bytes(GRAIN))[:-1] + b"\0"), "damaged"),
    ],
)
def test_a_damaged_grain_is_an_error_of_its_own(
    disk: Path, opened: Callable[..., VmdkEngine], read: Read, damage: bytes, words: str
) -> None:
    wanted = content()
    patch(disk, place_of(disk, 2), damage)
    engine = opened(disk)
    for direct in (False, True):
        with pytest.raises(EngineError, match=r"x\.vmdk: sector 26\d of the image") as caught:
            read(engine, 260, 8, direct=direct)
        assert words in str(caught.value)
        assert caught.value.sector == 260
        assert read(engine, 128, 128, direct=direct) == wanted[GRAIN : 2 * GRAIN]
        assert read(engine, 384, 128, direct=direct) == wanted[3 * GRAIN : 4 * GRAIN]
    extents = engine.map(0, 0, SECTORS, 100, 10).extents
    assert extents[0].data, "its reader comes and meets the error"


def test_a_file_that_was_cut(disk: Path, opened: Callable[..., VmdkEngine], read: Read) -> None:
    place = place_of(disk, 30)
    with open(disk, "r+b") as file:
        file.truncate(place + 100)
    engine = opened(disk)
    assert read(engine, 29 * 128, 128) == content()[29 * GRAIN : 30 * GRAIN]
    with pytest.raises(EngineError, match=f"behind the file's end.*{place + 100} bytes"):
        read(engine, 30 * 128, 1)


def test_a_direct_reader_sees_a_grain_that_was_replaced(
    disk: Path, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    engine, new = opened(disk), random.Random("new").randbytes(512) * 128
    assert read(engine, 128, 128) == content()[GRAIN : 2 * GRAIN]
    patch(disk, place_of(disk, 1), marker(128, zlib.compress(new)))
    assert read(engine, 128, 128) == content()[GRAIN : 2 * GRAIN], "what is kept"
    assert read(engine, 128, 128, direct=True) == new
    assert read(engine, 128, 128) == new


def test_nothing_is_kept_after_a_revalidation(
    disk: Path, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    engine, new = opened(disk), random.Random("new").randbytes(512) * 128
    for again in (engine.revalidate, engine.renew):
        before = read(engine, 128, 128)
        patch(disk, place_of(disk, 1), marker(128, zlib.compress(new)))
        assert read(engine, 128, 128) == before
        again()
        assert read(engine, 128, 128) == new
        new = new[::-1]


def test_expanding_takes_no_more_threads_than_there_are_processors(
    disk: Path, qemu: Any, tmp_path: Path, opened: Callable[..., VmdkEngine]
) -> None:
    assert opened(disk).threads == max(2, os.cpu_count() or 1)
    plain = tmp_path / "plain.vmdk"
    qemu.create(plain, 64 * KIB)
    assert opened(plain).threads == READ_THREADS
