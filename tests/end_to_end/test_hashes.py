"""Every image equals what qemu-img reads from the same link, buffered and past the page cache."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mount, Mounts, sha256
from tests.end_to_end.vms import (
    KIB,
    MIB,
    SECTOR,
    descriptor,
    make_chain,
    make_delta,
    make_vmdk,
    make_vmfs,
    noise,
    raw_sha256,
    sparse_noise,
    write,
)

ODD = 3 * MIB + 37 * KIB + SECTOR
"""A capacity that is a multiple of neither a grain nor a page."""
SIZES = {"even": 4 * MIB, "odd": ODD}
SUBFORMATS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]

SAMPLES = {
    "ext2": "a6c2f0e39afe6c6ab432ca5465349fcefe8dc944398e97b2d957d3f89dbb5d80",
    "monolithicSparse": "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727",
    "streamOptimized": "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727",
    "twoGbMaxExtentSparse": "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727",
    "vmfs_thick": "8d43c795d24bce01b49f92744f934c1072210dcac170bb1c83a5aa56df46ab7d",
}


def dd(path: str, direct: bool, block: int = MIB) -> bytes:
    command = ["dd", f"if={path}", f"bs={block}", "status=none"]
    command += ["iflag=direct"] if direct else []
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    return done.stdout


def hashes(mount: Mount, name: str) -> set[str]:
    """Hash a file in several ways, which have to agree: with blocks that fit and that do not."""
    path = mount.path(name)
    found = {sha256(dd(path, direct=True)), sha256(dd(path, direct=True, block=44 * KIB))}
    found.add(sha256(dd(path, direct=False, block=100_000)))
    found.add(mount.sha256(name))
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_subformats_of_qemu(mount: Mounts, vm: Path, subformat: str, size: str) -> None:
    path = make_vmdk(vm / "d.vmdk", sparse_noise(subformat, SIZES[size]), subformat)
    assert hashes(mount(path), "d/disk.raw") == {raw_sha256(path)}


@pytest.mark.parametrize("size", SIZES)
def test_vmfs_flat(mount: Mounts, vm: Path, size: str) -> None:
    path = make_vmfs(vm / "d.vmdk", noise("vmfs", SIZES[size]))
    assert hashes(mount(vm), "d/disk.raw") == {raw_sha256(path)}


@pytest.mark.parametrize("size", SIZES)
def test_chain_of_five(mount: Mounts, vm: Path, size: str) -> None:
    links = make_chain(vm, links=5, size=SIZES[size])
    found = mount(vm)
    wanted = [raw_sha256(link) for link in links]
    assert len(set(wanted)) == 5
    for number, expected in enumerate(wanted):
        assert hashes(found, f"web/chain/{number}.raw") == {expected}
    assert hashes(found, "web/disk.raw") == {wanted[-1]}


def test_delta_on_a_flat_base(mount: Mounts, vm: Path) -> None:
    base = make_vmfs(vm / "d.vmdk", noise("base", ODD))
    delta = make_delta(vm / "d-1.vmdk", "d.vmdk")
    write(delta, ODD - 5 * SECTOR, noise("tail", 5 * SECTOR))
    write(delta, 64 * KIB - SECTOR, noise("astride", 2 * SECTOR))
    found = mount(vm)
    assert hashes(found, "d/chain/0.raw") == {raw_sha256(base)}
    assert hashes(found, "d/chain/1.raw") == {raw_sha256(delta)}


def test_zero_extents(mount: Mounts, vm: Path) -> None:
    """qemu-img passes over ZERO extents, so the content is put together here."""
    first, last = noise("first", MIB + SECTOR), noise("last", 512 * KIB)
    (vm / "d-f001.vmdk").write_bytes(first)
    (vm / "d-f002.vmdk").write_bytes(bytes(4096) + last)
    (vm / "d.vmdk").write_text(
        descriptor(
            [
                f'RW {len(first) // SECTOR} FLAT "d-f001.vmdk" 0',
                "RW 3000 ZERO",
                f'RW {len(last) // SECTOR} FLAT "d-f002.vmdk" 8',
                "RW 7 ZERO",
            ],
            kind="twoGbMaxExtentFlat",
        )
    )
    found = mount(vm)
    wanted = first + bytes(3000 * SECTOR) + last + bytes(7 * SECTOR)
    assert hashes(found, "d/disk.raw") == {sha256(wanted)}
    assert found.ask("seek_map", found.path("d/disk.raw")) == [
        (0, len(first), True),
        (len(first), len(first) + 3000 * SECTOR, False),
        (len(first) + 3000 * SECTOR, len(wanted) - 7 * SECTOR, True),
        (len(wanted) - 7 * SECTOR, len(wanted), False),
    ]


def test_unaligned_reads(mount: Mounts, vm: Path) -> None:
    data = sparse_noise("unaligned", ODD, step=40 * KIB)
    make_vmdk(vm / "d.vmdk", data)
    found = mount(vm)
    ranges = [(0, 1), (511, 2), (65535, 3), (1_000_001, 333_333), (ODD - 1, 1), (ODD - 700, 9000)]
    for offset, size in ranges:
        assert found.read("d/disk.raw", offset, size) == data[offset : offset + size]
    for offset in range(0, ODD, 300 * KIB + SECTOR):
        size = 129 * SECTOR
        assert found.read("d/disk.raw", offset, size, True) == data[offset : offset + size]
    assert found.read("d/disk.raw", ODD, 4096) == b""
    assert found.read("d/disk.raw", ODD + MIB, 4096, True) == b""


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_memory_map(mount: Mounts, vm: Path, direct: bool) -> None:
    data = sparse_noise("mapped", ODD)
    make_vmdk(vm / "d.vmdk", data)
    found = mount(vm)
    ranges = [(0, 10_000), (MIB - 5, 10), (ODD - 999, 999), (700_000, 300_000)]
    pieces = found.ask("mapped", found.path("d/disk.raw"), direct, ranges)
    assert pieces == [data[start : start + size] for start, size in ranges]


def test_samples(mount: Mounts) -> None:
    folder = os.environ.get("VDDKFS_SAMPLES")
    if not folder:
        pytest.skip("absent: VDDKFS_SAMPLES, which names a folder of sample VMDKs")
    found = mount(Path(folder))
    names = set(found.ask("listdir", found.path()))
    assert names == {*SAMPLES, "vm.json", ".vddkfs"}
    for name, expected in SAMPLES.items():
        assert hashes(found, f"{name}/disk.raw") == {expected}
    assert found.json("vm.json")["left_out"] == []
