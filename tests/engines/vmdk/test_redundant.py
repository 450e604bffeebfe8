"""The redundant grain directory and its tables, where the primary ones are damaged."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.vmdk import VmdkEngine, discover, opening
from vddkfs.engines.vmdk.directory import Directory
from vddkfs.errors import EngineError

Read = Callable[..., bytes]
Map = Callable[..., list[tuple[int, int, bool]]]
MIB = 1 << 20
SIZE = 80 * MIB
"""Three grain tables of 32 MiB."""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the engine says."""
    lines: list[str] = []
    monkeypatch.setattr(opening.Context.__init__, "__defaults__", _with(lines.append))
    return lines


def _with(tell: Callable[[str], None]) -> tuple[Any, ...]:
    defaults = opening.Context.__init__.__defaults__
    assert defaults is not None
    return tuple(tell if default is opening.say else default for default in defaults)


class Disk:
    """A sparse disk with two directories, and what it holds."""

    def __init__(self, path: Path, wanted: bytes) -> None:
        self.path = path
        self.wanted = wanted
        raw = path.read_bytes()
        self.spare, self.directory = struct.unpack_from("<QQ", raw, 48)
        assert self.spare
        self.tables = struct.unpack_from("<3I", raw, self.directory * 512)
        self.spares = struct.unpack_from("<3I", raw, self.spare * 512)

    def put(self, sector: int, data: bytes, offset: int = 0) -> None:
        with open(self.path, "r+b") as file:
            file.seek(sector * 512 + offset)
            file.write(data)


@pytest.fixture
def disk(qemu: Any, tmp_path: Path) -> Disk:
    raw = bytearray(SIZE)
    for place in (0, 5 * MIB, 33 * MIB, 79 * MIB):
        raw[place : place + MIB] = random.Random(place).randbytes(MIB)
    (tmp_path / "raw").write_bytes(raw)
    path = tmp_path / "x.vmdk"
    qemu.convert(tmp_path / "raw", path, "subformat=monolithicSparse")
    return Disk(path, bytes(raw))


def check(
    disk: Disk, engine: VmdkEngine, read: Read, full_map: Map, primary_leads: bool = True
) -> None:
    """Check that all of the disk can be read, in all manners, and its map is right."""
    for direct in (False, True):
        for sector in (mib * 2048 for mib in (0, 1, 5, 31, 32, 33, 34, 63, 64, 79)):
            wanted = disk.wanted[sector * 512 :][:MIB]
            assert read(engine, sector, 2048, direct=direct) == wanted
            assert read(engine, sector + 8, 8, direct=direct) == wanted[4096:8192]
    holes = [(sector, count) for sector, count, is_data in full_map(engine) if not is_data]
    if primary_leads:
        assert any(sector <= 131072 and sector + count == 161792 for sector, count in holes)
    for sector, count in holes:
        assert not any(disk.wanted[sector * 512 : (sector + count) * 512])


DAMAGE: dict[str, Callable[[Disk], None]] = {
    "directory entry below the header": lambda disk: disk.put(disk.directory, b"\1\0\0\0"),
    "directory entry outside the file": lambda disk: disk.put(disk.directory, b"\0\0\0\x70", 4),
    "table of nonsense": lambda disk: disk.put(disk.tables[1], b"\xa5" * 2048),
    "one entry outside the file": lambda disk: disk.put(disk.tables[1], b"\0\0\0\x7f", 16),
    "directory of nonsense": lambda disk: disk.put(disk.directory, b"\xff" * 12),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_redundant_one_serves(
    disk: Disk,
    opened: Callable[..., VmdkEngine],
    read: Read,
    full_map: Map,
    told: list[str],
    kind: str,
) -> None:
    DAMAGE[kind](disk)
    check(disk, opened(disk.path), read, full_map, kind != "directory of nonsense")
    (line,) = told
    assert "redundant grain directory is used" in line
    assert "vddkfs check" in line
    assert str(disk.path) in line


def test_a_whole_disk_is_read_without_it(
    disk: Disk, opened: Callable[..., VmdkEngine], read: Read, full_map: Map, told: list[str]
) -> None:
    disk.put(disk.spare, b"\xff" * 512)
    check(disk, opened(disk.path), read, full_map)
    assert told == []


def test_a_directory_that_is_not_in_the_file_is_noted(
    disk: Disk, opened: Callable[..., VmdkEngine], read: Read, full_map: Map
) -> None:
    disk.put(0, struct.pack("<Q", 1 << 33), 56)
    engine = opened(disk.path)
    check(disk, engine, read, full_map)
    (note,) = discover(str(disk.path)).chains[0].links[0].notes
    assert "the redundant one is used" in note


def test_both_damaged_is_an_error_for_their_readers_only(
    disk: Disk, opened: Callable[..., VmdkEngine], read: Read, full_map: Map, told: list[str]
) -> None:
    disk.put(disk.directory, b"\1\0\0\0", 4)
    disk.put(disk.spare, b"\2\0\0\0", 4)
    engine = opened(disk.path)
    for direct in (False, True):
        with pytest.raises(EngineError, match="grain table is said to be at sector 1") as caught:
            read(engine, 67584, 8, direct=direct)
        assert caught.value.sector == 65536
        assert read(engine, 0, 2048, direct=direct) == disk.wanted[:MIB]
    assert (65536, 65536, True) in full_map(engine), "its reader comes and meets the error"
    assert told == []


def test_an_entry_that_both_have_wrong_is_an_error_for_its_readers_only(
    disk: Disk, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    for table in (disk.tables[0], disk.spares[0]):
        disk.put(table, b"\0\0\0\x7f", 4)
    engine = opened(disk.path)
    for direct in (False, True):
        with pytest.raises(EngineError, match="the file ends at byte"):
            read(engine, 128, 8, direct=direct)
        assert read(engine, 256, 1792, direct=direct) == disk.wanted[128 * 1024 : MIB]


def test_the_trap(
    disk: Disk, opened: Callable[..., VmdkEngine], read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the second directory a table of nonsense is lost."""
    DAMAGE["table of nonsense"](disk)
    monkeypatch.setattr(Directory, "_may_use_spare", lambda *_: False)
    with pytest.raises(EngineError):
        read(opened(disk.path), 67584, 2048)


def forget_grains(disk: Disk, grains: range) -> None:
    """Have the redundant table not know grains that the primary one has."""
    table = disk.spares[grains.start // 512]
    disk.put(table, bytes(4 * len(grains)), grains.start % 512 * 4)


@pytest.mark.parametrize("known", [0, 10])
@pytest.mark.parametrize("kind", DAMAGE)
def test_tables_that_were_not_kept_in_step_are_not_believed(
    disk: Disk, opened: Callable[..., VmdkEngine], read: Read, full_map: Map, kind: str, known: int
) -> None:
    """What they do not know would be zeros."""
    forget_grains(disk, range(known, 512))
    forget_grains(disk, range(512, 1024))
    forget_grains(disk, range(1024, 1280))
    DAMAGE[kind](disk)
    engine = opened(disk.path)
    for mib in (0, 5, 33, 79):
        wanted = disk.wanted[mib * MIB :][:MIB]
        for direct in (False, True):
            for sector in range(0, 2048, 128):
                try:
                    found = read(engine, mib * 2048 + sector, 128, direct=direct)
                except EngineError:
                    continue
                assert found == wanted[sector * 512 :][: 64 * 1024]
    for sector, count, is_data in full_map(engine):
        assert is_data or not any(disk.wanted[sector * 512 : (sector + count) * 512])


def test_the_trap_of_tables_that_were_never_kept(
    disk: Disk, opened: Callable[..., VmdkEngine], read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    for grains in (range(512), range(512, 1024), range(1024, 1280)):
        forget_grains(disk, grains)
    DAMAGE["table of nonsense"](disk)
    monkeypatch.setattr(Directory, "_may_use_spare", lambda *_: True)
    assert read(opened(disk.path), 67584, 2048) == bytes(MIB)


def test_only_what_cannot_be_right_is_taken_from_them(
    disk: Disk, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    DAMAGE["one entry outside the file"](disk)
    engine = opened(disk.path)
    assert read(engine, 65536, 2048 + 2048) == disk.wanted[32 * MIB : 34 * MIB]
