"""Partitions, and guest file systems mounted from the raw files through loop devices."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mounts, run, sha256, succeed
from tests.end_to_end.vms import KIB, MIB, SECTOR, make_delta, make_vmdk, noise, raw, write

MBR = """label: dos
start=2048, size=4096, type=83, bootable
start=6144, size=16384, type=5
start=8192, size=2048, type=83
start=12288, size=3000, type=82
start=18432, size=2048, type=7
"""
GPT = """label: gpt
start=2048, size=4096, type=L
start=6144, size=2047, type=U
start=10240, size=1, type=L
"""

Loop = Callable[[str, str, Path], Path]


@pytest.fixture
def loop(loops: None) -> Iterator[Loop]:
    """Mount a file as a guest's file system; taken down before the mount below it."""
    with ExitStack() as stack:

        def mounting(name: str, options: str, place: Path) -> Path:
            place.mkdir()
            succeed("mount", "-o", options, name, place)
            stack.callback(succeed, "umount", place)
            return place

        yield mounting


def partitioned(vm: Path, script: str, size: int = 12 * MIB, seed: str = "disk") -> list[dict]:
    """Make vm/disk.vmdk with a partition table; return sfdisk's view of the partitions."""
    image = vm / "disk.raw"
    image.write_bytes(noise(seed, size))
    succeed("sfdisk", "-q", "--wipe=always", image, input=script, stdin=None)
    table = json.loads(succeed("sfdisk", "--json", image).stdout)["partitiontable"]
    make_vmdk(vm / "disk.vmdk", image.read_bytes())
    image.unlink()
    found: list[dict] = table["partitions"]
    return found


@pytest.mark.parametrize("script", [MBR, GPT], ids=["MBR with logicals", "GPT"])
def test_partitions_equal_the_cut(mount: Mounts, vm: Path, script: str) -> None:
    partitions = partitioned(vm, script)
    content = raw(vm / "disk.vmdk")
    found = mount(vm)
    wanted = {}
    for part in partitions:
        number = part["node"].removeprefix(str(vm / "disk.raw"))
        if part["type"] not in ("5", "f"):
            start, size = part["start"] * SECTOR, part["size"] * SECTOR
            wanted[f"{number}.raw"] = content[start : start + size]
    assert len(wanted) == (4 if script == MBR else 3)
    assert set(found.ask("listdir", found.path("disk/partitions"))) == set(wanted)
    for name, cut in wanted.items():
        path = f"disk/partitions/{name}"
        assert found.stat(path).st_size == len(cut)
        assert found.content(path) == cut
        assert found.sha256(path, True) == sha256(cut)
        assert found.read(path, 700, 5000) == cut[700:5700]
        attribute = found.ask("getxattr", found.path(path), "user.vddkfs.capacity")
        assert int(attribute) == len(cut)


def test_without_partitions_the_folder_is_empty(mount: Mounts, vm: Path) -> None:
    make_vmdk(vm / "noise.vmdk", noise("nothing", MIB))
    make_vmdk(vm / "zeros.vmdk", bytes(MIB))
    make_vmdk(vm / "tiny.vmdk", noise("tiny", SECTOR))
    found = mount(vm)
    for name in ("noise", "zeros", "tiny"):
        assert found.ask("listdir", found.path(f"{name}/partitions")) == []


def test_partition_table_of_the_mounted_point(mount: Mounts, vm: Path) -> None:
    """The table is read from the composed image: here the delta has it."""
    make_vmdk(vm / "base.vmdk", noise("base", 12 * MIB))
    partitioned(vm, GPT)
    content = raw(vm / "disk.vmdk")
    (vm / "disk.vmdk").unlink()
    delta = make_delta(vm / "delta.vmdk", "base.vmdk")
    write(delta, 0, content)
    found = mount(vm)
    assert sorted(found.ask("listdir", found.path("base/partitions"))) == [
        "1.raw",
        "2.raw",
        "3.raw",
    ]


def guest_files(folder: Path) -> Path:
    files = folder / "files"
    (files / "etc").mkdir(parents=True)
    (files / "etc/motd").write_text("the words of the guest\n")
    (files / "blob").write_bytes(noise("blob", 3 * MIB))
    return files


def check_guest(place: Path) -> None:
    # The guest's files are read by processes that can be killed, as the mount below them may hang.
    assert succeed("cat", place / "etc/motd").stdout == "the words of the guest\n"
    done = succeed("sha256sum", place / "blob")
    assert done.stdout.split()[0] == sha256(noise("blob", 3 * MIB))
    assert run("touch", place / "new").returncode != 0


def test_ext4(mount: Mounts, vm: Path, tmp_path: Path, loop: Loop) -> None:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("absent: mkfs.ext4 (package e2fsprogs)")
    image = vm / "disk.raw"
    image.write_bytes(bytes(32 * MIB))
    succeed("sfdisk", "-q", image, input="label: gpt\nstart=2048, type=L\n", stdin=None)
    offset = 2048 * SECTOR
    words = ("-q", "-d", guest_files(tmp_path), "-E", f"offset={offset}")
    succeed("mkfs.ext4", *words, image, f"{30 * KIB}k")
    make_vmdk(vm / "disk.vmdk", image.read_bytes())
    image.unlink()

    found = mount(vm)
    part = loop(found.path("disk/partitions/1.raw"), "ro,loop,noload", tmp_path / "guest1")
    check_guest(part)
    options = f"ro,loop,noload,offset={offset}"
    whole = loop(found.path("disk/disk.raw"), options, tmp_path / "guest2")
    check_guest(whole)
    frozen = loop(found.path("disk/chain/0.raw"), options, tmp_path / "guest3")
    check_guest(frozen)


def test_xfs(mount: Mounts, vm: Path, tmp_path: Path, loop: Loop) -> None:
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("absent: mkfs.xfs (package xfsprogs)")
    if "xfs" not in Path("/proc/filesystems").read_text() and run("modprobe", "xfs").returncode:
        pytest.skip("absent: XFS in this kernel")
    files = guest_files(tmp_path)
    proto = tmp_path / "proto"
    proto.write_text(
        "/dev/null\n0 0\nd--755 0 0\n"
        f"etc d--755 0 0\nmotd ---644 0 0 {files / 'etc/motd'}\n$\n"
        f"blob ---644 0 0 {files / 'blob'}\n$\n"
    )
    image = tmp_path / "disk.raw"
    with open(image, "wb") as file:
        file.truncate(320 * MIB)
    succeed("sfdisk", "-q", image, input="label: dos\nstart=2048, type=83\n", stdin=None)
    part = tmp_path / "part.raw"
    with open(part, "wb") as file:
        file.truncate(319 * MIB)
    succeed("mkfs.xfs", "-q", "-p", proto, part)
    words = ("bs=1M", "seek=1", "conv=notrunc,sparse", "status=none")
    succeed("dd", f"if={part}", f"of={image}", *words)
    succeed("qemu-img", "convert", "-f", "raw", "-O", "vmdk", image, vm / "disk.vmdk")

    found = mount(vm)
    options = "ro,loop,norecovery,nouuid"
    first = loop(found.path("disk/partitions/1.raw"), options, tmp_path / "guest1")
    check_guest(first)
    # The same file system a second time: nouuid lets clones be mounted side by side.
    options += f",offset={MIB}"
    second = loop(found.path("disk/disk.raw"), options, tmp_path / "guest2")
    check_guest(second)


def test_loop_device_holds_the_mount(mount: Mounts, vm: Path, tmp_path: Path, loops: None) -> None:
    make_vmdk(vm / "disk.vmdk", noise("loop", MIB))
    found = mount(vm)
    device = succeed("losetup", "--find", "--show", "-r", found.path("disk/disk.raw")).stdout
    try:
        done = found.umount()
        assert done.returncode == 31
        assert f"{device.strip()} is a loop device on {found.path('disk/disk.raw')}" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        read = succeed("dd", f"if={device.strip()}", "bs=64k", "status=none", text=False)
        assert read.stdout == noise("loop", MIB)
    finally:
        succeed("losetup", "-d", device.strip())
