"""SEEK_DATA and SEEK_HOLE, and what other tools make of them."""

import errno
import os
import random
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mount, Mounts, run, sha256, succeed
from tests.end_to_end.vms import (
    KIB,
    MIB,
    SECTOR,
    data_ranges,
    make_chain,
    make_empty,
    make_vmdk,
    make_vmfs,
    noise,
    qemu_map,
    raw,
    raw_sha256,
    sparse_noise,
    write,
)

GRAIN = 64 * KIB
CAPACITY = 6 * MIB + 3 * SECTOR


@pytest.fixture
def thin(vm: Path) -> Path:
    """A disk with data in a few grains, none at either end."""
    path = make_empty(vm / "thin.vmdk", CAPACITY)
    for grain in (3, 4, 7, 40, 95):
        write(path, grain * GRAIN + 512, noise(grain, 1024))
    return path


DATA = [(3, 5), (7, 8), (40, 41), (95, 96)]
RANGES = [(first * GRAIN, last * GRAIN) for first, last in DATA]


def naive(offset: int, whence: int, ranges: list[tuple[int, int]], size: int) -> int | None:
    """Return what lseek(2) promises, None for ENXIO."""
    if offset >= size or offset < 0:
        return None
    inside = next((end for start, end in ranges if start <= offset < end), None)
    if whence == os.SEEK_HOLE:
        return offset if inside is None else inside
    if inside is not None:
        return offset
    return next((start for start, _ in ranges if start > offset), None)


def seek(mount: Mount, fd: int, offset: int, whence: int) -> int | None:
    found: int | None = mount.attempt(errno.ENXIO, "lseek", fd, offset, whence)
    return found


@pytest.mark.parametrize("known", [False, True], ids=["map not known yet", "map known"])
def test_against_a_naive_map(mount: Mounts, thin: Path, known: bool) -> None:
    found = mount(thin)
    if known:
        found.map_known("thin")
    fd = found.open("thin/disk.raw")
    edges = [edge + off for part in RANGES for edge in part for off in (-1, 0, 1)]
    randoms = random.Random("seek").choices(range(CAPACITY), k=30)
    for offset in [0, 1, SECTOR, CAPACITY - 1, CAPACITY, CAPACITY + MIB, *edges, *randoms]:
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            wanted = naive(offset, whence, RANGES, CAPACITY)
            assert seek(found, fd, offset, whence) == wanted, (offset, whence)
    # SEEK_SET, SEEK_END and SEEK_CUR stay the kernel's.
    assert seek(found, fd, 0, os.SEEK_END) == CAPACITY
    assert seek(found, fd, -SECTOR, os.SEEK_CUR) == CAPACITY - SECTOR


def test_first_thing_after_mounting(mount: Mounts, thin: Path) -> None:
    found = mount(thin)
    fd = found.open("thin/disk.raw")
    assert seek(found, fd, 0, os.SEEK_DATA) == 3 * GRAIN
    assert seek(found, fd, 3 * GRAIN, os.SEEK_HOLE) == 5 * GRAIN
    assert seek(found, fd, 96 * GRAIN, os.SEEK_DATA) is None
    assert seek(found, fd, 96 * GRAIN, os.SEEK_HOLE) == 96 * GRAIN


def test_empty_and_full(mount: Mounts, vm: Path) -> None:
    make_empty(vm / "empty.vmdk", CAPACITY)
    make_vmfs(vm / "full.vmdk", noise("full", MIB))
    found = mount(vm)
    fd = found.open("empty/disk.raw")
    assert seek(found, fd, 0, os.SEEK_DATA) is None
    assert seek(found, fd, 0, os.SEEK_HOLE) == 0
    assert seek(found, fd, CAPACITY, os.SEEK_HOLE) is None
    fd = found.open("full/disk.raw")
    assert seek(found, fd, 5000, os.SEEK_DATA) == 5000
    assert seek(found, fd, 5000, os.SEEK_HOLE) == MIB
    assert seek(found, fd, MIB, os.SEEK_DATA) is None


def test_every_point_of_a_chain(mount: Mounts, vm: Path) -> None:
    links = make_chain(vm, links=4, size=4 * MIB)
    found = mount(vm)
    for number, link in enumerate(links):
        seen = found.ask("seek_map", found.path(f"web/chain/{number}.raw"))
        ranges = [(start, end) for start, end, data in seen if data]
        assert ranges == data_ranges(qemu_map(link, "vmdk"))


def test_thin_flat_file(mount: Mounts, vm: Path) -> None:
    """Holes of the source's own file system may show, and data must never be one."""
    path = make_vmfs(vm / "flat.vmdk", b"")
    flat = vm / "flat-flat.vmdk"
    with open(flat, "r+b") as file:
        file.truncate(4 * MIB)
        file.seek(MIB)
        file.write(noise("flat", 256 * KIB))
    path.write_text(path.read_text().replace("RW 0 VMFS", f"RW {4 * MIB // SECTOR} VMFS"))
    found = mount(vm)
    content = found.content("flat/disk.raw")
    assert content == flat.read_bytes()
    for start, end, data in found.ask("seek_map", found.path("flat/disk.raw")):
        assert data or not any(content[start:end])


def test_qemu_img_map_finds_the_holes(mount: Mounts, thin: Path) -> None:
    found = mount(thin)
    wanted = data_ranges(qemu_map(thin, "vmdk"))
    assert data_ranges(qemu_map(Path(found.path("thin/disk.raw")))) == wanted == RANGES


@pytest.mark.parametrize("name", ["thin/disk.raw", "thin/chain/0.raw"])
def test_cp_first_makes_a_sparse_copy(mount: Mounts, thin: Path, tmp_path: Path, name: str) -> None:
    found = mount(thin)
    copy = tmp_path / "copy.raw"
    succeed("cp", "--sparse=auto", found.path(name), copy)
    assert sha256(copy.read_bytes()) == raw_sha256(thin)
    assert copy.stat().st_blocks * SECTOR <= 5 * GRAIN


def test_cp_first_of_a_frozen_link(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    links = make_chain(vm, links=2, size=8 * MIB)
    found = mount(vm)
    copy = tmp_path / "copy.raw"
    succeed("cp", "--sparse=auto", found.path("web/chain/0.raw"), copy)
    assert copy.read_bytes() == raw(links[0])
    assert copy.stat().st_blocks * SECTOR <= 5 * MIB


def test_cp_first_of_a_large_thin_disk(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    path = make_empty(vm / "huge.vmdk", 2 << 40)
    write(path, 1 << 40, noise("huge", 128 * KIB))
    found = mount(path)
    copy = tmp_path / "copy.raw"
    succeed("cp", "--sparse=auto", found.path("huge/disk.raw"), copy, timeout=30)
    assert copy.stat().st_size == 2 << 40
    assert copy.stat().st_blocks * SECTOR <= 256 * KIB
    with open(copy, "rb") as file:
        file.seek(1 << 40)
        assert file.read(128 * KIB) == noise("huge", 128 * KIB)


def test_cp_of_a_full_disk(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    data = noise("full", 3 * MIB + SECTOR)
    make_vmdk(vm / "full.vmdk", data)
    found = mount(vm)
    copy = tmp_path / "copy.raw"
    succeed("cp", "--sparse=auto", found.path("full/disk.raw"), copy)
    assert copy.read_bytes() == data


def test_tar_and_rsync_read_it_sparsely(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    data = sparse_noise("tar", 4 * MIB)
    make_vmdk(vm / "a.vmdk", data)
    found = mount(vm)
    archive = tmp_path / "a.tar"
    done = run("tar", "-C", found.path("a"), "--sparse", "-cf", archive, "disk.raw")
    assert done.returncode == 0, done.stderr
    assert archive.stat().st_size < 2 * MIB + 64 * KIB
    succeed("tar", "-C", tmp_path, "-xf", archive)
    assert (tmp_path / "disk.raw").read_bytes() == data


def test_documents_and_folders(mount: Mounts, thin: Path) -> None:
    """What is no disk still behaves: a file without holes, or an error, never a hang."""
    found = mount(thin)
    content = found.content("vm.json")
    fd = found.open("vm.json")
    assert found.ask("lseek", fd, 0, os.SEEK_DATA) == 0
    assert found.ask("lseek", fd, 0, os.SEEK_HOLE) == len(content)
