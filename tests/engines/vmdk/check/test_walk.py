"""`vddkfs check`, the walk: health is no finding, and damage to hosted sparse files is told."""

import gzip
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vmdk.check.checking import (
    DATA,
    GRAIN,
    HEALTHY,
    SECTOR,
    TABLE,
    TYPES,
    entry,
    events,
    number_at,
    patch,
    shapes,
    write,
)
from tests.engines.vmdk.makers_chain import Link, write_chain
from tests.engines.vmdk.makers_stream import write_ova
from vddkfs.engines.vmdk.check import ChainDone
from vddkfs.errors import VddkfsError


@pytest.mark.parametrize("name", HEALTHY)
def test_health(name: str, tmp_path: Path) -> None:
    findings, chains = events(write(tmp_path, name, HEALTHY[name]))
    assert findings == []
    assert chains == [ChainDone("0", 1, 0, 0, 0)]


@pytest.mark.parametrize("name", ["hosted", "hosted-redundant", "stream", "stream-tables-first"])
def test_health_of_one_file(name: str, tmp_path: Path) -> None:
    link = Link("monolithicSparse", (HEALTHY[name],), embedded=True)
    assert shapes(write_chain(tmp_path, [link])[0]) == []


def test_health_of_a_chain_and_of_an_archive(tmp_path: Path) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    kinds = ["hosted", "cowd", "sesparse"]
    links = [Link(TYPES.get(kind, "custom"), (HEALTHY[kind],)) for kind in kinds]
    write_chain(folder, links)
    assert events(folder) == ([], [ChainDone("0", 3, 0, 0, 0)])
    ova = tmp_path / "vm.ova"
    write_ova(ova, {path.name: path for path in folder.iterdir()})
    assert events(ova / "2.vmdk") == ([], [ChainDone("0", 3, 0, 0, 0)])


@pytest.mark.parametrize(
    "options",
    [
        "subformat=monolithicSparse",
        "subformat=monolithicSparse,zeroed_grain=on",
        "subformat=monolithicFlat",
        "subformat=twoGbMaxExtentSparse",
        "subformat=twoGbMaxExtentFlat",
        "subformat=streamOptimized",
    ],
)
def test_health_of_what_qemu_writes(options: str, tmp_path: Path, qemu: Any) -> None:
    raw = tmp_path / "raw"
    with open(raw, "wb") as file:
        file.truncate(200 << 20)
        for place in (0, 1 << 20, 70 << 20, (200 << 20) - 5000):
            file.seek(place)
            file.write(os.urandom(3000))
    qemu.convert(raw, tmp_path / "a.vmdk", options)
    assert shapes(tmp_path / "a.vmdk") == []


def test_health_of_a_chain_that_qemu_writes(tmp_path: Path, qemu: Any) -> None:
    qemu.create(tmp_path / "a.vmdk", 20 << 20)
    qemu.io(tmp_path / "a.vmdk", "write -P 1 0 1M", "write -P 2 7M 100k")
    qemu.create(tmp_path / "b.vmdk", 20 << 20, parent="a.vmdk", options="zeroed_grain=on")
    qemu.io(tmp_path / "b.vmdk", "write -P 1 64k 64k", "write -z 7M 128k", "write -P 2 0 4k")
    assert events(tmp_path) == ([], [ChainDone("a", 2, 0, 0, 0)])


def test_health_of_the_samples(samples: Path, tmp_path: Path) -> None:
    assert shapes(samples) == []
    with (
        gzip.open(samples / "sesparse-extent.vmdk.gz") as packed,
        open(tmp_path / "x-sesparse.vmdk", "wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    (tmp_path / "x.vmdk").write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        'createType="seSparse"\nRW 1048576 SESPARSE "x-sesparse.vmdk"\n'
    )
    assert shapes(tmp_path) == []


@pytest.mark.parametrize(
    ("patches", "expected"),
    [
        ([entry(0, 1)], [("grain-place", 0, 128)]),
        ([entry(0, 20), entry(1, 20)], [("grain-place", 0, 256)]),
        ([entry(1, 1 << 31)], [("grain-outside", 128, 128)]),
        ([entry(3, 513)], [("grain-outside", 384, 128)]),
        ([entry(0, 513)], [("grain-outside", 0, 128)]),
        ([entry(1, 128)], [("overlap", 0, 256)]),
        ([entry(3, 129)], [("overlap", 0, 256), ("overlap", 384, 128)]),
        ([entry(9, 384)], [("overlap", 256, 128), ("overlap", 1152, 128)]),
        ([entry(9, TABLE)], [("overlap", 0, 65536), ("overlap", 1152, 128)]),
        ([(21 * SECTOR, struct.pack("<I", 7))], [("table-place", 0, 65536)]),
        ([(21 * SECTOR, struct.pack("<I", 1 << 30))], [("table-outside", 0, 65536)]),
    ],
    ids=str,
)
def test_grains_of_a_hosted_sparse_file(
    patches: list[tuple[int, bytes]], expected: list[tuple[str, int, int]], make: Any
) -> None:
    path = make.sparse("a.vmdk", 512 * GRAIN, DATA)
    assert shapes(path) == []
    for offset, data in patches:
        patch(path, offset, data)
    found = [shape for shape in shapes(path) if shape[0] == "damage"]
    merged = [(code, sector, sectors) for _, code, _, sector, sectors in found]
    covered = {(code, s) for code, sector, n in merged for s in range(sector, sector + n, GRAIN)}
    wanted = {(code, s) for code, sector, n in expected for s in range(sector, sector + n, GRAIN)}
    assert covered == wanted
    assert len(found) <= 4
    assert {shape[2] for shape in found} == {"a.vmdk"}


def test_an_overlap_names_both(make: Any) -> None:
    path = make.sparse("a.vmdk", 512 * GRAIN, DATA)
    patch(path, *entry(9, 100))
    whats = [one.what for one in events(path)[0] if one.code == "overlap"]
    assert whats == [
        f"the grain of sector {one} of the image has sectors 128 to 227 of the file, "
        f"which belong to the grain of sector {other} of the image as well"
        for one, other in [(0, 1152), (1152, 0)]
    ]


def test_an_overlap_with_everything(make: Any) -> None:
    """A grain over directory, table and a grain: each is named, with what it loses."""
    path = make.sparse("a.vmdk", 512 * GRAIN, DATA)
    patch(path, *entry(9, 21))
    found = [one for one in events(path)[0] if one.code == "overlap"]
    assert [(one.sector, one.sectors, one.what.split(" of the file")[0]) for one in found] == [
        (-1, 0, "the grain directory has sectors 21 to 21"),
        (0, 512 * GRAIN, "the grain table 0 has sectors 22 to 25"),
        (9 * GRAIN, GRAIN, "the grain of sector 1152 of the image has sectors 21 to 25"),
        (0, GRAIN, "the grain of sector 0 of the image has sectors 128 to 148"),
        (9 * GRAIN, GRAIN, "the grain of sector 1152 of the image has sectors 128 to 148"),
    ]
    assert found[0].what.endswith("belong to the grain of sector 1152 of the image as well")
    assert found[2].what.endswith("belong to the grain directory and the grain table 0 as well")


def test_a_table_with_two_masters(make: Any) -> None:
    path = make.sparse("a.vmdk", 1024 * GRAIN, DATA)
    patch(path, 21 * SECTOR + 4, struct.pack("<I", TABLE))
    found = [(one.code, one.sector, one.sectors) for one in events(path)[0]]
    span = 512 * GRAIN
    assert found == [
        ("overlap", 0, span),
        ("overlap", span, span),
        ("overlap", 0, 4 * GRAIN),
        ("overlap", span, 4 * GRAIN),
    ]


def test_what_belongs_to_nothing(make: Any) -> None:
    path = make.sparse("a.vmdk", 512 * GRAIN, DATA)
    patch(path, *entry(2, 0))
    assert shapes(path) == [("warning", "unreferenced", "a.vmdk", -1, 0)]
    assert "65536 bytes" in events(path)[0][0].what
    patch(path, os.path.getsize(path), bytes(4096))
    assert "69632 bytes" in events(path)[0][0].what


def test_a_little_that_belongs_to_nothing_is_padding(make: Any) -> None:
    path = make.sparse("a.vmdk", 512 * GRAIN, DATA)
    patch(path, os.path.getsize(path), bytes(127 * SECTOR))
    assert shapes(path) == []


def test_a_file_cut_at_every_sector(make: Any) -> None:
    """All that is lost is told, and nothing else."""
    whole = Path(make.sparse("a.vmdk", 512 * GRAIN, DATA)).read_bytes()
    for sectors in range(len(whole) // SECTOR):
        path = make.folder / "b.vmdk"
        path.write_bytes(whole[: sectors * SECTOR])
        if sectors < 21:
            with pytest.raises(VddkfsError) if sectors == 0 else nothing():
                assert [one.level for one in events(path)[0]] == ["damage"]
            continue
        found = shapes(path)
        lost = {s for *_, sector, count in found for s in range(sector, sector + count, GRAIN)}
        if sectors >= TABLE + 4:
            there = max(0, sectors - GRAIN) // GRAIN
            assert lost == set(range(there * GRAIN, 4 * GRAIN, GRAIN))
        else:
            assert lost == set(range(0, 512 * GRAIN, GRAIN))
        assert {shape[0] for shape in found} == {"damage"}


@contextmanager
def nothing() -> Iterator[None]:
    yield


def test_the_last_grain_may_be_cut_short(make: Any) -> None:
    path = make.sparse("a.vmdk", 500, {0: DATA[0], 3: DATA[3]}, tail=(256 + 116) * SECTOR)
    assert shapes(path) == []
    os.truncate(path, (256 + 116) * SECTOR - 1)
    assert shapes(path) == [("damage", "grain-outside", "a.vmdk", 384, 116)]


def redundant(folder: Path) -> tuple[Path, int, int]:
    """Return a disk with two directories, and the sectors of these: redundant, primary."""
    path = write(folder, "hosted-redundant", HEALTHY["hosted-redundant"]).parent / "0-s001.vmdk"
    return path, number_at(path, 48, 8), number_at(path, 56, 8)


def test_redundant_tables_that_differ(tmp_path: Path) -> None:
    path, spare, _ = redundant(tmp_path)
    table = number_at(path, spare * SECTOR + 4)
    patch(path, *entry(3, 77777, table))
    patch(path, *entry(10, 0, table))
    (one,) = events(tmp_path)[0]
    assert (one.level, one.code, one.sector, one.sectors) == (
        "damage",
        "tables-differ",
        (512 + 3) * 8,
        8 * 8,
    )
    assert "differ in 2 entries" in one.what


def test_redundant_tables_that_are_lost(tmp_path: Path) -> None:
    path, spare, _ = redundant(tmp_path)
    patch(path, spare * SECTOR, struct.pack("<II", 0xFFFFFF, 0))
    found = [(one.code, one.sector, one.sectors) for one in events(tmp_path)[0]]
    assert found == [
        ("redundant-table-outside", 0, 4096),
        ("tables-differ", 4096, 511 * 8),
    ]


def test_primary_tables_that_are_lost_are_read_from_their_copies(tmp_path: Path) -> None:
    """Their grains are then neither unreferenced nor unknown."""
    path, _, primary = redundant(tmp_path)
    patch(path, primary * SECTOR, struct.pack("<I", 0xFFFFFF))
    assert shapes(tmp_path) == [("damage", "table-outside", "0-s001.vmdk", 0, 4096)]


def test_a_primary_directory_that_is_lost(tmp_path: Path) -> None:
    path, _, _ = redundant(tmp_path)
    patch(path, 56, struct.pack("<Q", 1 << 40))
    assert shapes(tmp_path) == [("damage", "directory", "0-s001.vmdk", -1, 0)]
    patch(path, 48, struct.pack("<Q", 1 << 40))
    assert shapes(tmp_path) == [("damage", "header", "0-s001.vmdk", 0, 8800)]


@pytest.mark.parametrize("name", ["hosted", "cowd"])
def test_a_file_that_was_not_closed(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, HEALTHY[name]).parent / "0-s001.vmdk"
    patch(path, 72 if name == "hosted" else 1648, b"\1")
    assert shapes(tmp_path) == [("warning", "unclean", "0-s001.vmdk", -1, 0)]
