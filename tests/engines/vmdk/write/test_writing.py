"""Writing to the base: every format, compared with qemu."""

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vmdk.write.writers import (
    GRAIN,
    UNCLEAN,
    Disk,
    Open,
    fill,
    open_writers,
    patch_file,
    qemu_check,
)
from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.engines.vmdk.write import BaseWriter
from vddkfs.errors import EngineError

Read = Callable[..., bytes]

KIB = 1024
SPARSE = ["monolithicSparse", "twoGbMaxExtentSparse"]
FLAT = ["monolithicFlat", "twoGbMaxExtentFlat"]


@pytest.fixture
def writer(opened: Callable[..., VmdkEngine]) -> Iterator[Open]:
    """Open a VMDK for reading and for writing; closed after the test."""
    yield from open_writers(opened)


def write_randomly(writer: BaseWriter, model: bytearray, seed: int, times: int = 60) -> None:
    """Write data and zeros of many sizes to many places, and to *model*."""
    draw = random.Random(seed)
    capacity = len(model) // 512
    for _ in range(times):
        length = min(capacity, draw.choice([1, 3, 8, 128, 129, 300, 2048]))
        sector = draw.randrange(capacity - length + 1)
        if draw.random() < 0.5:
            sector -= sector % 128
        data = bytes(length * 512) if draw.random() < 0.3 else draw.randbytes(length * 512)
        writer.write(sector, memoryview(data))
        model[sector * 512 : (sector + length) * 512] = data
        if draw.random() < 0.1:
            writer.flush()


# Every format


@pytest.mark.parametrize("size", [512, 64 * KIB, 64 * KIB + 512, 1000448, 33 << 20])
@pytest.mark.parametrize(
    ("subformat", "options"),
    [(name, "") for name in SPARSE + FLAT] + [(name, "zeroed_grain=on") for name in SPARSE],
)
def test_formats(
    qemu: Any,
    tmp_path: Path,
    writer: Open,
    opened: Callable[..., VmdkEngine],
    read: Read,
    subformat: str,
    size: int,
    options: str,
) -> None:
    path = tmp_path / "x.vmdk"
    qemu.create(path, size, options=f"subformat={subformat},{options}".rstrip(","))
    qemu.io(path, f"write -P 3 {(size - 1) // 512 * 512} 512")
    if options:
        qemu.io(path, f"write -z 0 {min(size, 192 * KIB)}")
    model = bytearray(qemu.raw(path))
    engine, base = writer(path)
    write_randomly(base, model, size)
    assert read(engine, 0, size // 512) == model
    base.close()
    assert read(opened(path), 0, size // 512) == model
    qemu_check(path)
    assert qemu.raw(path) == model
    if subformat in SPARSE:
        disk = Disk(path if subformat == SPARSE[0] else tmp_path / "x-s001.vmdk")
        assert disk.spare_directory
        assert disk.unclean == 0
        entries = disk.check()
        assert any(entries)
        if options:
            assert 1 in entries or size < 33 << 20


def test_converted_is_written_in_place(qemu: Any, tmp_path: Path, writer: Open, read: Read) -> None:
    source = tmp_path / "source"
    model = bytearray(random.Random(1).randbytes(1000 * 512))
    source.write_bytes(model)
    for subformat in SPARSE + FLAT:
        path = tmp_path / f"{subformat}.vmdk"
        qemu.convert(source, path, f"subformat={subformat}")
        sizes = {file: file.stat().st_size for file in tmp_path.iterdir()}
        written = bytearray(model)
        engine, base = writer(path)
        write_randomly(base, written, 5)
        base.close()
        assert qemu.raw(path) == read(engine, 0, 1000) == written
        assert {file: file.stat().st_size for file in tmp_path.iterdir()} == sizes


def test_vmfs(make: Any, qemu: Any, writer: Open, read: Read) -> None:
    model = bytearray(random.Random(2).randbytes(500 * 512))
    (make.folder / "x-flat.vmdk").write_bytes(model)
    path = make.text("x.vmdk", ['RW 500 VMFS "x-flat.vmdk"'], kind="vmfs")
    engine, base = writer(path)
    write_randomly(base, model, 2)
    base.close()
    assert (make.folder / "x-flat.vmdk").read_bytes() == model
    assert qemu.raw(Path(path)) == read(engine, 0, 500) == model


def test_flat_extents_of_one_file(make: Any, writer: Open, read: Read) -> None:
    """With offsets, in another order than in the file, and bytes around that are not theirs."""
    (make.folder / "x.raw").write_bytes(b"\xee" * 700 * 512)
    lines = ['RW 300 FLAT "x.raw" 350', 'RW 200 FLAT "x.raw" 100']
    engine, base = writer(make.text("x.vmdk", lines))
    model = bytearray(read(engine, 0, 500))
    write_randomly(base, model, 3)
    base.close()
    assert read(engine, 0, 500) == model
    content = (make.folder / "x.raw").read_bytes()
    assert content[350 * 512 : 650 * 512] + content[100 * 512 : 300 * 512] == model
    rest = content[: 100 * 512] + content[300 * 512 : 350 * 512] + content[650 * 512 :]
    assert rest == b"\xee" * 200 * 512


@pytest.mark.parametrize("subformat", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
def test_over_the_seams_of_split_disks(
    qemu: Any, tmp_path: Path, writer: Open, read: Read, subformat: str
) -> None:
    gib = 1 << 30
    path = tmp_path / "x.vmdk"
    qemu.create(path, 5 * gib, options=f"subformat={subformat}")
    engine, base = writer(path)
    seam = 2 * gib // 512
    data = random.Random(4).randbytes(300 * 512)
    for place in (seam, 2 * seam):
        base.write(place - 150, memoryview(data))
        assert read(engine, place - 151, 302) == bytes(512) + data + bytes(512)
    base.close()
    qemu_check(path)
    for extent in range(3):
        if subformat in SPARSE:
            disk = Disk(tmp_path / f"x-s{extent + 1:03}.vmdk")
            assert len(list(filter(None, disk.check()))) == [2, 4, 2][extent]
            assert disk.unclean == 0
    again, _ = writer(path)
    assert read(again, seam - 150, 300) == read(again, 2 * seam - 150, 300) == data


def test_only_the_touched_file_is_marked(qemu: Any, tmp_path: Path, writer: Open) -> None:
    path = tmp_path / "x.vmdk"
    qemu.create(path, 5 << 30, options="subformat=twoGbMaxExtentSparse")
    before = [(tmp_path / f"x-s00{number}.vmdk").read_bytes() for number in (1, 2, 3)]
    _, base = writer(path)
    base.write((5 << 21) - 1, memoryview(b"x" * 512))
    after = [(tmp_path / f"x-s00{number}.vmdk").read_bytes() for number in (1, 2, 3)]
    assert [one == two for one, two in zip(before, after, strict=True)] == [True, True, False]


# Holes and zeros


@pytest.mark.parametrize("zero_flag", [False, True])
def test_zeros_leave_holes(make: Any, writer: Open, read: Read, zero_flag: bool) -> None:
    grains = {0: bytes(fill("a")), 2: 1 if zero_flag else 0}
    path = make.sparse("x.vmdk", 1030, grains, zero_flag=zero_flag)
    before = Path(path).read_bytes()
    engine, base = writer(path)
    base.write(128, memoryview(bytes(902 * 512)))
    base.write(300, memoryview(bytes(512)))
    base.close()
    assert Path(path).read_bytes() == before, "not even the mark of the header"
    engine, base = writer(path)
    model = bytearray(fill("a")) + bytes(902 * 512)
    data = bytes(50 * 512) + b"b" * 400 * 512 + bytes(400 * 512)
    base.write(150, memoryview(data))
    model[150 * 512 : 1000 * 512] = data
    assert read(engine, 0, 1030) == model
    base.close()
    entries = Disk(path).check()
    assert [entry > 1 for entry in entries] == [True, True, True, True, True] + [False] * 4
    engine, base = writer(path)
    base.write(0, memoryview(bytes(512 * 300)))
    assert read(engine, 0, 1030) == bytes(512 * 300) + model[512 * 300 :]


def test_a_hole_between_new_grains(make: Any, writer: Open, read: Read) -> None:
    """The first and the last are half new: together as long as two grains, but not one piece."""
    path = make.sparse("x.vmdk", 1024, {})
    engine, base = writer(path)
    data = b"a" * 64 * 512 + bytes(GRAIN) + b"b" * 64 * 512
    base.write(64, memoryview(data))
    assert read(engine, 0, 384) == bytes(64 * 512) + data + bytes(64 * 512)
    assert [bool(entry) for entry in Disk(path).check()] == [True, False, True] + [False] * 5


def test_zeroed_grains_of_qemu(qemu: Any, tmp_path: Path, writer: Open, read: Read) -> None:
    path = tmp_path / "x.vmdk"
    qemu.create(path, 1 << 20, options="zeroed_grain=on")
    qemu.io(path, "write -P 1 0 1M", "write -z 64k 256k")
    assert Disk(path).check()[1:5] == [1] * 4
    engine, base = writer(path)
    base.write(130, fill("z", 512))
    base.write(300, memoryview(bytes(512)))
    base.close()
    assert [entry > 1 for entry in Disk(path).check()[:6]] == [True, True] + [False] * 3 + [True]
    wanted = b"\1" * GRAIN + bytes(1024) + b"z" * 512 + bytes(4 * GRAIN - 1536) + b"\1" * 11 * GRAIN
    assert qemu.raw(path) == read(engine, 0, 2048) == wanted


@pytest.mark.parametrize("zeroed", [0, 2])
def test_the_mark_of_zeros_is_no_place(make: Any, writer: Open, read: Read, zeroed: int) -> None:
    """A grain at sector 1 would end behind this file, which has none yet."""
    path = make.sparse("x.vmdk", 3 * 4096, {zeroed: 1}, grain=4096, zero_flag=True)
    assert os.stat(path).st_size == 4096 * 512
    engine, base = writer(path)
    base.write(4096, fill("a", 512))
    base.write(zeroed * 4096, fill("b", 512))
    assert read(engine, 4096, 2) == b"a" * 512 + bytes(512)
    assert read(engine, zeroed * 4096, 2) == b"b" * 512 + bytes(512)


# Places


def test_missing_tables_are_made(make: Any, qemu: Any, writer: Open, read: Read) -> None:
    path = make.sparse("x.vmdk", 3 * 65536 - 77, {600: bytes(fill("a"))})
    engine, base = writer(path)
    assert read(engine, 0, 1) == bytes(512)
    base.write(1, fill("b", 512))
    base.write(131000, fill("c", 512 * 200))
    base.close()
    model = bytearray((3 * 65536 - 77) * 512)
    model[600 * GRAIN : 601 * GRAIN] = fill("a")
    model[512:1024] = fill("b", 512)
    model[131000 * 512 : 131200 * 512] = fill("c", 512 * 200)
    assert read(engine, 0, len(model) // 512) == model
    assert qemu.raw(Path(path)) == model
    qemu_check(path)
    Disk(path).check()


def test_last_grain_that_is_cut_short(make: Any, writer: Open, read: Read) -> None:
    """It is written where it is, and what comes behind it leaves room for all of it."""
    path = make.sparse("x.vmdk", 130, {1: b"end"}, tail=(256 + 2) * 512)
    assert Disk(path).check() == [0, 128]
    path = make.sparse("y.vmdk", 130, {1: b"e" * 1024}, tail=(128 + 2) * 512)
    engine, base = writer(path)
    base.write(129, fill("f", 512))
    assert os.stat(path).st_size == 130 * 512
    base.write(0, fill("g", 512))
    base.close()
    assert read(engine, 0, 130) == b"g" * 512 + bytes(127 * 512) + b"e" * 512 + b"f" * 512
    assert Disk(path).check() == [256, 128]


def test_garbage_behind_the_last_grain(make: Any, writer: Open, read: Read) -> None:
    path = make.sparse("x.vmdk", 1024, {3: bytes(fill("a"))})
    with open(path, "ab") as file:
        file.write(b"\xa5" * 777)
    engine, base = writer(path)
    base.write(5, fill("b", 512))
    base.close()
    assert read(engine, 0, 128) == bytes(5 * 512) + b"b" * 512 + bytes(122 * 512)
    assert Disk(path).check()[0] == 384


def test_two_tebibytes_are_the_end(make: Any, writer: Open, read: Read) -> None:
    path = make.sparse("x.vmdk", 1024, {0: bytes(fill("a"))})
    os.truncate(path, (1 << 41) - GRAIN)
    engine, base = writer(path)
    base.write(128, fill("b"))
    assert read(engine, 0, 256) == bytes(fill("a")) + bytes(fill("b"))
    for _ in range(2):
        with pytest.raises(EngineError, match="2 TiB") as caught:
            base.write(256, fill("c", 512))
        assert caught.value.errno == errno.ENOSPC
    base.write(128, fill("d"))
    assert read(engine, 0, 512) == bytes(fill("a")) + bytes(fill("d")) + bytes(2 * GRAIN)


# Requests


def test_bad_requests(make: Any, writer: Open) -> None:
    _, base = writer(make.sparse("x.vmdk", 100, {}))
    for sector, size in ((0, 0), (0, 511), (0, 101 * 512), (99, 1024), (-1, 512), (100, 512)):
        with pytest.raises(ValueError, match="link of 100"):
            base.write(sector, memoryview(bytes(size)))
    base.close()
    base.close()
    with pytest.raises(ValueError, match="closed"):
        base.write(0, memoryview(bytes(512)))


def test_zero_extents_take_zeros(make: Any, writer: Open, read: Read) -> None:
    (make.folder / "x.raw").write_bytes(b"x" * 200 * 512)
    lines = ['RW 100 FLAT "x.raw" 0', "RW 100 ZERO", 'RW 100 FLAT "x.raw" 100']
    engine, base = writer(make.text("x.vmdk", lines))
    base.write(50, memoryview(b"y" * 50 * 512 + bytes(100 * 512) + b"z" * 50 * 512))
    wanted = b"x" * 50 * 512 + b"y" * 50 * 512 + bytes(100 * 512)
    wanted += b"z" * 50 * 512 + b"x" * 50 * 512
    assert read(engine, 0, 300) == wanted
    with pytest.raises(EngineError, match="always zeros") as caught:
        base.write(99, fill("w", 1024))
    assert caught.value.errno == errno.EROFS
    assert caught.value.sector == 100
    assert read(engine, 0, 300) == wanted, "nothing of the request was done"


@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_cached_tables_are_forgotten(
    guarded: bool, make: Any, writer: Open, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not guarded:
        monkeypatch.setattr(BaseWriter, "_forget", lambda self, index, number: None)
    engine, base = writer(make.sparse("x.vmdk", 2 * 65536, {0: bytes(fill("a"))}))
    assert read(engine, 0, 256) == bytes(fill("a")) + bytes(GRAIN)
    assert read(engine, 65536, 1) == bytes(512)
    base.write(129, fill("b", 512))
    base.write(65536, fill("c", 512))
    seen = read(engine, 129, 1) + read(engine, 65536, 1)
    assert seen == (b"b" * 512 + b"c" * 512 if guarded else bytes(1024))


def test_a_link_that_is_opened_again_is_followed(
    make: Any, opened: Callable[..., VmdkEngine], writer: Open, read: Read
) -> None:
    path = make.sparse("x.vmdk", 1024, {0: bytes(fill("a"))})
    engine, base = writer(path)
    again = opened(path)
    base.follow(again._links[0])
    assert read(engine, 128, 1) == read(again, 128, 1) == bytes(512)
    base.write(128, fill("b", 512))
    assert read(engine, 128, 1) == read(again, 128, 1) == b"b" * 512
    with pytest.raises(ValueError, match="other extents"):
        base.follow(opened(make.text("y.vmdk", ["RW 5 ZERO", "RW 5 ZERO"]))._links[0])


# Marks and barriers


def test_the_header_says_that_the_file_is_in_use(make: Any, writer: Open) -> None:
    path = make.sparse("x.vmdk", 1024, {0: bytes(fill("a"))})
    _, base = writer(path)
    assert Disk(path).unclean == 0
    base.write(1, fill("b", 512))
    assert Disk(path).unclean == 1
    base.flush()
    assert Disk(path).unclean == 1
    base.close()
    assert Disk(path).unclean == 0
    patch_file(path, UNCLEAN, b"\1")
    _, base = writer(path)
    base.write(1, fill("b", 512))
    base.close()
    assert Disk(path).unclean == 1, "somebody else's problem is not solved by this"


def test_flush_waits_for_what_was_written_only(
    qemu: Any, tmp_path: Path, writer: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.vmdk"
    qemu.create(path, 5 << 30, options="subformat=twoGbMaxExtentFlat")
    _, base = writer(path)
    plain, calls = os.fdatasync, []

    def noting(fd: int) -> None:
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        plain(fd)

    monkeypatch.setattr(os, "fdatasync", noting)
    base.flush()
    assert calls == []
    base.write(0, fill("a", 512))
    base.write((5 << 21) - 1, fill("a", 512))
    base.flush()
    base.flush()
    assert calls == ["x-f001.vmdk", "x-f003.vmdk"]


def test_no_descriptor_is_left_open(make: Any, opened: Callable[..., VmdkEngine]) -> None:
    engine = opened(make.sparse("x.vmdk", 1024, {}))
    before = len(os.listdir("/proc/self/fd"))
    base = BaseWriter(engine._links[0])
    base.write(0, fill("a", 512))
    base.close()
    assert len(os.listdir("/proc/self/fd")) == before
