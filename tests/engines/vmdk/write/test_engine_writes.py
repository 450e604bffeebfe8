"""Writes to the base, seen by all readers of the engine: every image, by tables new and old."""

import os
import random
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.engines.vmdk.directory import Directory
from vddkfs.engines.vmdk.write import BaseWriter
from vddkfs.errors import EngineError

Read = Callable[..., bytes]
Map = Callable[..., list[tuple[int, int, bool]]]
MIB = 1 << 20
SECTORS = 4 * MIB // 512
NEW = random.Random("new").randbytes(100 * 512)


@pytest.fixture
def disk(qemu: Any, tmp_path: Path) -> Path:
    path = tmp_path / "x.vmdk"
    qemu.create(path, SECTORS * 512, options="subformat=monolithicSparse")
    qemu.io(path, "write -P 1 1M 64k")
    return path


def test_a_write_is_read_at_once_and_by_others(
    disk: Path, qemu: Any, opened: Callable[..., VmdkEngine], read: Read, full_map: Map
) -> None:
    wanted = bytearray(qemu.raw(disk))
    engine = opened(disk, writable=True)
    for sector in (0, 130, 2048 + 64, SECTORS - 100):
        assert read(engine, sector, 100) == wanted[sector * 512 :][: len(NEW)]
        engine.write(sector, memoryview(NEW))
        wanted[sector * 512 : sector * 512 + len(NEW)] = NEW
        for direct in (False, True):
            assert read(engine, 0, SECTORS, direct=direct) == wanted
    data = [(start, count) for start, count, is_data in full_map(engine) if is_data]
    assert data == [(0, 256), (2048, 256), (SECTORS - 128, 128)]
    engine.flush()
    assert disk.read_bytes()[72] == 1, "in use"
    engine.close()
    assert qemu.raw(disk) == wanted
    qemu._run(["qemu-img", "check", "-f", "vmdk", str(disk)])


def test_a_chain_above_shows_it_where_it_has_nothing(
    disk: Path, qemu: Any, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    above = disk
    for number in range(1, 7):
        child = disk.with_name(f"{number}.vmdk")
        qemu.create(child, SECTORS * 512, parent=above.name)
        above = child
    qemu.io(above, "write -P 7 0 4k")
    engine = opened(above, writable=True)
    for _ in range(20):
        assert read(engine, 300, 8, image=6) == bytes(4096)
    engine.write(0, memoryview(NEW))
    engine.write(300, memoryview(NEW))
    assert read(engine, 300, 8, image=6) == NEW[:4096]
    assert read(engine, 8, 8, image=5) == NEW[4096:8192]
    assert read(engine, 0, 8, image=6) == b"\7" * 4096


@pytest.mark.parametrize("how", ["revalidate", "renew"])
def test_writing_goes_on_after_the_files_were_opened_again(
    disk: Path, opened: Callable[..., VmdkEngine], read: Read, how: str
) -> None:
    engine = opened(disk, writable=True)
    for sector in (0, 512, 1024):
        engine.write(sector, memoryview(NEW))
        getattr(engine, how)()
        read(engine, sector + 256, 8)
        engine.write(sector + 256, memoryview(NEW))
        assert read(engine, sector, 100) == read(engine, sector + 256, 100) == NEW


def test_a_flush_without_writes_is_nothing(disk: Path, opened: Callable[..., VmdkEngine]) -> None:
    before = disk.read_bytes()
    engine = opened(disk, writable=True)
    engine.flush()
    engine.close()
    assert disk.read_bytes() == before


def test_lost_data_is_told_at_the_end_and_all_is_closed(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VmdkEngine([str(disk)], writable=True)
    engine.write(2048, memoryview(NEW))

    def lost(self: BaseWriter) -> None:
        raise EngineError("lost")

    monkeypatch.setattr(BaseWriter, "flush", lost)
    fd = engine._links[0].extents[0].fd
    with pytest.raises(EngineError, match="lost"):
        engine.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


class Slow:
    """A reader that has read a table, and keeps it only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_read, self.go_on = threading.Event(), threading.Event()
        plain = Directory._now

        def now(directory: Directory, *arguments: Any, **keys: Any) -> "array[int]":
            found = plain(directory, *arguments, **keys)
            if not self.has_read.is_set():
                self.has_read.set()
                assert self.go_on.wait(20)
            return found

        monkeypatch.setattr(Directory, "_now", now)

    def read_while(self, engine: VmdkEngine, read: Read, act: Callable[[], None]) -> None:
        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(read, engine, 0, 8)
            assert self.has_read.wait(20)
            act()
            self.go_on.set()
            assert reader.result(20) in (bytes(4096), NEW[:4096])


def test_a_table_that_was_read_before_a_write_is_not_kept_after_it(
    disk: Path, opened: Callable[..., VmdkEngine], read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(disk, writable=True)
    Slow(monkeypatch).read_while(engine, read, lambda: engine.write(0, memoryview(NEW)))
    assert read(engine, 0, 100) == NEW


def test_the_trap(
    disk: Path, opened: Callable[..., VmdkEngine], read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept all the same, the old table hides what was written."""

    def keep(self: Directory, key: int, table: "array[int]", changes: int) -> None:
        self._cache.put(key, table)

    monkeypatch.setattr(Directory, "_keep", keep)
    engine = opened(disk, writable=True)
    Slow(monkeypatch).read_while(engine, read, lambda: engine.write(0, memoryview(NEW)))
    assert read(engine, 0, 100) == bytes(len(NEW))
