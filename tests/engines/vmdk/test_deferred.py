"""Links with very many extents: opened when they are read, and few at once."""

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.vmdk import VmdkEngine, deferred, discover, opening
from vddkfs.errors import DamagedSource, EngineError, SourceMissing, StaleImage

Read = Callable[..., bytes]
Map = Callable[..., list[tuple[int, int, bool]]]
EXTENTS, PER = 40, 64
MOST = 6


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MANY_EXTENTS", 8)
    monkeypatch.setattr(opening, "Shelf", lambda: deferred.Shelf(MOST))


class Split:
    """A disk in forty extents, sparse and flat by turns."""

    def __init__(self, make: Any) -> None:
        draw = random.Random("split")
        self.folder: Path = make.folder
        self.content = b""
        lines = []
        for number in range(EXTENTS):
            data = draw.randbytes(PER * 512)
            if number % 4 == 3:
                lines.append(f"RW {PER} ZERO")
                data = bytes(PER * 512)
            elif number % 2:
                (self.folder / f"x-f{number:03}.vmdk").write_bytes(data)
                lines.append(f'RW {PER} FLAT "x-f{number:03}.vmdk" 0')
            else:
                grains = {0: data[:4096], 7: data[7 * 4096 :]}
                data = data[:4096] + bytes(6 * 4096) + data[7 * 4096 :]
                name = f"x-s{number:03}.vmdk"
                make.sparse(name, PER, grains, grain=8, embedded=False)
                lines.append(f'RW {PER} SPARSE "{name}"')
            self.content += data
        self.path = make.text("x.vmdk", lines, kind="twoGbMaxExtentSparse")


@pytest.fixture
def split(make: Any) -> Split:
    return Split(make)


def open_files(folder: Path) -> int:
    """Return how many extents this process has open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        found += target.startswith(f"{folder}/x-")
    return found


def test_all_of_it_is_read_with_few_open(
    split: Split, opened: Callable[..., VmdkEngine], read: Read, full_map: Map
) -> None:
    engine = opened(split.path)
    assert open_files(split.folder) == 0
    capacity = EXTENTS * PER
    for direct in (False, True):
        for sector in range(0, capacity, 50):
            count = min(50, capacity - sector)
            found = read(engine, sector, count, direct=direct)
            assert found == split.content[sector * 512 :][: count * 512]
            assert open_files(split.folder) <= MOST
    assert read(engine, 0, capacity) == split.content
    holes = [(start, count) for start, count, data in full_map(engine) if not data]
    assert (8, 48) in holes
    assert open_files(split.folder) <= MOST
    engine.close()
    assert open_files(split.folder) == 0


def test_readers_at_once_meet_no_descriptor_of_another_file(
    split: Split, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    engine = opened(split.path)

    def reading(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            sector = draw.randrange(EXTENTS * PER - 100)
            assert read(engine, sector, 100) == split.content[sector * 512 :][: 100 * 512]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(reading, range(6)))
    assert open_files(split.folder) <= MOST


def test_what_is_missing_or_too_short_is_told_at_once(split: Split) -> None:
    flat = split.folder / "x-f001.vmdk"
    data = flat.read_bytes()
    flat.write_bytes(data[:-1])
    with pytest.raises(DamagedSource, match="truncated extent"):
        discover(split.path)
    flat.unlink()
    with pytest.raises(SourceMissing, match="names it as an extent"):
        discover(split.path)


def test_a_damaged_header_is_told_to_its_readers(
    split: Split, opened: Callable[..., VmdkEngine], read: Read, full_map: Map
) -> None:
    (split.folder / "x-s002.vmdk").write_bytes(b"junk" * 1024)
    engine = opened(split.path)
    sector = 2 * PER
    with pytest.raises(EngineError, match=r"x-s002\.vmdk.*no header") as caught:
        read(engine, sector + 3, 1)
    assert caught.value.sector == sector
    assert read(engine, 0, sector) == split.content[: sector * 512]
    assert read(engine, sector + PER, PER) == split.content[(sector + PER) * 512 :][: PER * 512]
    assert any(start <= sector < start + count and data for start, count, data in full_map(engine))


def test_a_replaced_file_is_stale(
    split: Split, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    engine = opened(split.path)
    path = split.folder / "x-f001.vmdk"
    other = split.folder / "other"
    other.write_bytes(path.read_bytes())
    other.rename(path)
    with pytest.raises(StaleImage, match="replaced"):
        read(engine, PER, 1)
    before = engine.identities()[0]
    assert "was replaced" in before.change_to(engine.revalidate()[0], True)


def test_written_extents_are_seen_after_a_revalidation(
    split: Split, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    engine = opened(split.path)
    assert read(engine, 0, 8) == split.content[:4096]
    os.utime(split.folder / "x-s000.vmdk", ns=(1, 1))
    before = engine.identities()[0]
    assert "was modified" in before.difference(engine.revalidate()[0])
    assert read(engine, 0, 8) == split.content[:4096]


def test_the_trap(
    split: Split, opened: Callable[..., VmdkEngine], read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the bound all of them stay open."""
    monkeypatch.setattr(deferred.Shelf, "_tidy", lambda self: None)
    engine = opened(split.path)
    for sector in range(0, EXTENTS * PER, 50):
        read(engine, sector, min(50, EXTENTS * PER - sector))
    assert open_files(split.folder) == 30


def test_what_is_open_is_answered_without_waiting(
    split: Split, opened: Callable[..., VmdkEngine], read: Read, nowait: Callable[..., bytes | None]
) -> None:
    engine = opened(split.path)
    assert nowait(engine, 0, 8) is None, "it would have to be opened"
    read(engine, 0, 8)
    assert nowait(engine, 0, 8) == split.content[:4096]


def test_a_close_that_fails_stops_nobody(
    split: Split, opened: Callable[..., VmdkEngine], read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(split.path)
    plain = os.close

    def failing(fd: int) -> None:
        plain(fd)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "close", failing)
    for sector in range(0, EXTENTS * PER, 50):
        count = min(50, EXTENTS * PER - sector)
        assert read(engine, sector, count) == split.content[sector * 512 :][: count * 512]


def test_the_bound_is_one_of_all_links(
    split: Split, make: Any, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    """Links with a few extents each are deferred as well where all of them have too many."""
    data = bytes(512)
    for number in range(5):
        name = f"x-f9{number}.vmdk"
        (split.folder / name).write_bytes(data)
        lines = [f'RW 1 FLAT "{name}" 0'] * 3
        parent = "12345678" if number else "ffffffff"
        hint = f"link{number - 1}.vmdk" if number else ""
        leaf = make.text(
            f"link{number}.vmdk", lines, kind="twoGbMaxExtentFlat", parent=parent, hint=hint
        )
    engine = opened(leaf)
    kinds = [type(link.extents[0]).__name__ for link in engine._links]
    assert kinds == ["FlatExtent"] * 2 + ["DeferredExtent"] * 3
    assert read(engine, 0, 3) == bytes(1536)


def test_each_link_of_a_source_is_described_as_if_it_were_alone(make: Any) -> None:
    """However many disks a folder has, the headers of their extents are looked at."""
    for number in range(12):
        name = f"d{number:02}-s001.vmdk"
        (make.folder / name).write_bytes(b"junk" * 1024)
        make.text(f"d{number:02}.vmdk", [f'RW 8 SPARSE "{name}"'], kind="twoGbMaxExtentSparse")
    make.flat("good", bytes(4096))
    found = discover(str(make.folder))
    assert [chain.name for chain in found.chains] == ["good"]
    assert len(found.left_out) == 12
