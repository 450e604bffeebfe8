"""The tree: names, modes, owners, sizes, times, blocks, and the documents in it."""

import errno
import itertools
import json
import os
import stat
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mount, Mounts, run, succeed, until, vddkfs
from tests.end_to_end.vms import (
    KIB,
    MIB,
    SECTOR,
    data_ranges,
    link_files,
    make_chain,
    make_empty,
    make_vmdk,
    make_vmfs,
    noise,
    qemu_map,
    sparse_noise,
    write,
)

NAMES = [
    ".vddkfs/",
    ".vddkfs/metrics",
    ".vddkfs/status.json",
    "vm.json",
    "web/",
    "web/chain/",
    "web/chain/0.raw",
    "web/chain/1.raw",
    "web/chain/2.raw",
    "web/disk.raw",
    "web/info.json",
    "web/map.json",
    "web/partitions/",
]


@pytest.fixture
def links(vm: Path) -> list[Path]:
    return make_chain(vm, links=3, size=2 * MIB + 5 * SECTOR)


def all_stats(mount: Mount) -> dict[str, os.stat_result]:
    return {name: mount.stat(name) for name in ["", *NAMES]}


def test_names_modes_and_owner(mount: Mounts, vm: Path, links: list[Path]) -> None:
    found = mount(vm)
    assert found.ask("tree", found.path()) == NAMES
    for name, status in all_stats(found).items():
        assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
        folder = not name or name.endswith("/")
        kind = stat.S_IFDIR | 0o500 if folder else stat.S_IFREG | 0o400
        assert status.st_mode == kind, name


def test_uid_gid_and_umask(mount: Mounts, vm: Path, links: list[Path]) -> None:
    found = mount(vm, "uid=1234", "gid=5678", "umask=027")
    for name, status in all_stats(found).items():
        assert (status.st_uid, status.st_gid) == (1234, 5678)
        folder = not name or name.endswith("/")
        assert stat.S_IMODE(status.st_mode) == (0o550 if folder else 0o440), name


def test_disk_is_a_hard_link_of_the_top(mount: Mounts, vm: Path, links: list[Path]) -> None:
    found = mount(vm)
    disk, top = found.stat("web/disk.raw"), found.stat("web/chain/2.raw")
    assert (disk.st_ino, disk.st_dev) == (top.st_ino, top.st_dev)
    assert disk.st_nlink == top.st_nlink == 2
    for name in ("web/chain/0.raw", "web/chain/1.raw"):
        assert found.stat(name).st_nlink == 1
        assert found.stat(name).st_ino != disk.st_ino
    numbers = [status.st_ino for status in all_stats(found).values()]
    assert len(set(numbers)) == len(numbers) - 1


def test_remount_shows_the_same(mount: Mounts, vm: Path, links: list[Path]) -> None:
    make_vmdk(vm / "second.vmdk", noise("second", MIB))
    found = mount(vm)

    def seen() -> dict[str, tuple[int, int, int, int]]:
        names = [name for name in NAMES if not name.startswith(".vddkfs/")]
        names += ["second/disk.raw", "second/chain/", "second/info.json"]
        every = {name: found.stat(name) for name in names}
        return {
            name: (one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns)
            for name, one in every.items()
        }

    first = seen()
    found.close_agent()
    assert found.umount().returncode == 0
    found.start()
    assert seen() == first


def test_exact_sizes(mount: Mounts, vm: Path) -> None:
    sizes = {"a": MIB, "b": MIB + SECTOR, "c": 64 * KIB - SECTOR, "d": 3 * MIB + 7 * KIB}
    for name, size in sizes.items():
        make_vmdk(vm / f"{name}.vmdk", noise(name, size))
    found = mount(vm)
    for name, size in sizes.items():
        assert found.stat(f"{name}/disk.raw").st_size == size
        assert len(found.content(f"{name}/disk.raw")) == size
    for name in ("vm.json", "a/info.json"):
        assert found.stat(name).st_size == len(found.content(name)), name
    # How long the map is, is known when it was made.
    length = len(found.content("a/map.json"))
    assert found.stat("a/map.json").st_size == length


def test_mtimes_are_those_of_the_newest_link(mount: Mounts, vm: Path, links: list[Path]) -> None:
    times = [1_500_000_000_000_000_001, 1_400_000_000_000_000_002, 1_600_000_000_000_000_003]
    for link, time in zip(links, times, strict=True):
        for file in link_files(link) if link is not links[0] else [links[0]]:
            os.utime(file, ns=(time, time))
    found = mount(vm)
    for number, newest in enumerate(itertools.accumulate(times, max)):
        assert found.stat(f"web/chain/{number}.raw").st_mtime_ns == newest
    assert found.stat("web/disk.raw").st_mtime_ns == times[2]
    found.sha256("web/disk.raw")
    found.sha256("web/chain/0.raw", True)
    found.map_known("web")
    assert found.stat("web/disk.raw").st_mtime_ns == times[2]
    assert found.stat("web/chain/0.raw").st_mtime_ns == times[0]
    names = ["", "web/", "web/chain/", "web/info.json"]
    before = [found.stat(name).st_mtime_ns for name in names]
    assert before == [times[2]] * 4


def test_blocks_are_below_the_size_until_known(mount: Mounts, vm: Path) -> None:
    """`cp` asks for holes only if a file has fewer blocks than its size needs."""
    make_vmfs(vm / "full.vmdk", noise("full", 2 * MIB))
    found = mount(vm)
    assert found.stat("full/disk.raw").st_blocks * SECTOR < 2 * MIB
    found.map_known("full")
    assert found.stat("full/disk.raw").st_blocks * SECTOR == 2 * MIB


def test_blocks_count_the_data(mount: Mounts, vm: Path, links: list[Path]) -> None:
    found = mount(vm)
    for number in range(3):
        name = f"web/chain/{number}.raw"
        found.stat(name)
        expected = sum(end - start for start, end in data_ranges(qemu_map(links[number], "vmdk")))
        assert 0 < expected < found.stat(name).st_size
        until(lambda n=name, e=expected: found.stat(n).st_blocks * SECTOR == e, what="the map")


def test_statfs(mount: Mounts, vm: Path, links: list[Path]) -> None:
    make_vmdk(vm / "second.vmdk", noise("second", MIB))
    found = mount(vm)
    capacity = MIB + 2 * MIB + 5 * SECTOR
    status: os.statvfs_result = found.ask("statvfs", found.path())
    assert 0 <= status.f_blocks * status.f_frsize - capacity < status.f_frsize
    assert status.f_bfree == status.f_bavail == 0
    assert status.f_flag & os.ST_RDONLY
    line = succeed("df", "--output=source,fstype,avail", found.place).stdout.splitlines()[1]
    assert line.split() == [str(vm), "fuse.vddkfs", "0"]


def test_vm_json(mount: Mounts, vm: Path, links: list[Path]) -> None:
    found = mount(vm)
    document = found.json("vm.json")
    assert document["source"] == str(vm)
    assert document["engine"]["name"] == "vmdk"
    assert document["left_out"] == []
    (disk,) = document["disks"]
    assert disk["name"] == "web"
    assert disk["capacity"] == 2 * MIB + 5 * SECTOR
    assert [link["file"] for link in disk["links"]] == [str(link) for link in links]
    cids = [link["cid"] for link in disk["links"]]
    assert [link["parent_cid"] for link in disk["links"]] == ["ffffffff", *cids[:-1]]
    assert json.loads(vddkfs("info", "--json", vm).stdout) == document


def test_info_json(mount: Mounts, vm: Path, links: list[Path]) -> None:
    found = mount(vm)
    document = found.json("web/info.json")
    assert document["name"] == "web"
    assert document["capacity"] == 2 * MIB + 5 * SECTOR
    assert document["logical_sector_size"] == SECTOR
    assert document["writable"] == []
    assert [link["image"] for link in document["links"]] == [f"chain/{n}.raw" for n in range(3)]
    policies = [link["cache_policy"] for link in document["links"]]
    assert policies == ["immutable", "immutable", "close-to-open"]
    for link, path in zip(document["links"], links, strict=True):
        (extent,) = link["extents"]
        assert extent["file"] == str(path)
        assert extent["file_size"] == path.stat().st_size


def test_map_json(mount: Mounts, vm: Path, links: list[Path]) -> None:
    found = mount(vm)
    document = found.json("web/map.json")
    assert data_ranges(document) == data_ranges(qemu_map(links[2], "vmdk"))
    here = 0
    for extent in document:
        assert extent["start"] == here
        assert extent["zero"] is not extent["data"]
        assert extent["length"] > 0
        here += extent["length"]
    assert here == 2 * MIB + 5 * SECTOR


def test_map_json_equals_that_of_the_raw_file(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    path = make_vmdk(vm / "thin.vmdk", sparse_noise("thin", 5 * MIB))
    target = tmp_path / "thin.raw"
    succeed("qemu-img", "convert", "-O", "raw", path, target)
    wanted = data_ranges(qemu_map(target))
    assert wanted == [(start, start + 256 * KIB) for start in range(0, 5 * MIB, 512 * KIB)]
    assert data_ranges(mount(vm).json("thin/map.json")) == wanted


def test_map_of_a_large_thin_disk(mount: Mounts, vm: Path) -> None:
    path = make_empty(vm / "thin.vmdk", 200 << 30)
    write(path, 100 << 30, noise("thin", 64 * KIB))
    found = mount(vm)
    assert data_ranges(found.json("thin/map.json")) == [(100 << 30, (100 << 30) + 64 * KIB)]
    assert found.stat("thin/disk.raw").st_size == 200 << 30
    assert found.stat("thin/disk.raw").st_blocks * SECTOR == 64 * KIB


def test_status_json(mount: Mounts, vm: Path, links: list[Path]) -> None:
    found = mount(vm)
    found.sha256("web/disk.raw")
    document = found.json(".vddkfs/status.json")
    assert document["pid"] == found.pid
    assert document["mountpoint"] == str(found.place)
    assert document["source"] == str(vm)
    (disk,) = document["disks"]
    assert (disk["name"], disk["links"], disk["capacity"]) == ("web", 3, 2 * MIB + 5 * SECTOR)
    worker = disk["workers"][0]
    assert worker["pid"] == found.worker()["pid"]
    assert worker["restarts"] == worker["resent"] == worker["errors"] == 0
    assert worker["requests"] > 0
    asked = json.loads(vddkfs("status", "--json", found.place).stdout)
    assert asked.keys() == document.keys()
    text = vddkfs("status", found.place).stdout
    assert str(vm) in text
    assert "web" in text
    # A changing file has the size of what is in it now, for `cat` and `cp` alike.
    assert json.loads(run("cat", found.path(".vddkfs/status.json")).stdout)["pid"] == found.pid


def test_no_such_name(mount: Mounts, vm: Path, links: list[Path]) -> None:
    found = mount(vm)
    for name in ("nothing", "web/chain/3.raw", "web/partitions/1.raw", "web/snapshots/x.raw"):
        with pytest.raises(OSError, match="No such file") as caught:
            found.stat(name)
        assert caught.value.errno == errno.ENOENT
