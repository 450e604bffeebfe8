"""Writing with ordinary tools, to the base and to an overlay: what they do arrives, in order."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mount, Mounts, run, succeed
from tests.end_to_end.vms import KIB, MIB, SECTOR, make_empty, make_vmdk, make_vmfs, noise, raw
from tests.end_to_end.writing import opened, put, refused

SIZE = 12 * MIB + 3 * SECTOR
OLD = noise("old", SIZE)
NEW = noise("new", SIZE)
FILE = "disk/disk.raw"

pytestmark = pytest.mark.parametrize("option", ["rw", "overlay=tmp"])


@pytest.fixture
def written(mount: Mounts, vm: Path, option: str) -> Mount:
    """Return a mount of a sparse disk that can be written."""
    make_vmdk(vm / "disk.vmdk", OLD)
    return mount(vm, option)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    path = tmp_path / "new.raw"
    path.write_bytes(NEW)
    return path


def judge(mount: Mount, wanted: bytes, option: str) -> None:
    """See to it that the disk is what was written, here and in its VMDK after the mount."""
    assert mount.content(FILE) == wanted
    mount.finish()
    path = Path(mount.source) / "disk.vmdk"
    assert raw(path) == (wanted if option == "rw" else OLD)
    succeed("qemu-img", "check", "-f", "vmdk", path)


def test_the_size_stays(written: Mount, option: str) -> None:
    written.expect("write at offset .* failed: .*a write past its end")
    written.ask("close", opened(written, FILE, os.O_WRONLY | os.O_TRUNC))
    fd = opened(written, FILE)
    for size in (0, 4096, SIZE - 1, SIZE + 1):
        refused(written, errno.EPERM, "ftruncate", fd, size)
    refused(written, errno.EPERM, "truncate", written.path(FILE), MIB)
    refused(written, errno.EPERM, "chmod", written.path(FILE), 0o777)
    refused(written, errno.ENOSPC, "pwrite", fd, b"x", SIZE)
    appending = opened(written, FILE, os.O_WRONLY | os.O_APPEND)
    refused(written, errno.ENOSPC, "write", appending, b"x")
    # What fits is written, as on a block device.
    assert written.ask("pwrite", fd, b"e" * 4096, SIZE - SECTOR) == SECTOR
    assert written.stat(FILE).st_size == SIZE
    for each in (fd, appending):
        written.ask("close", each)
    judge(written, OLD[:-SECTOR] + b"e" * SECTOR, option)


@pytest.mark.parametrize("flags", ["", "oflag=direct", "oflag=dsync", "oflag=sync"])
def test_dd(written: Mount, new: Path, flags: str, option: str) -> None:
    words = ["dd", f"if={new}", f"of={written.path(FILE)}", "bs=1M", "conv=fsync"]
    succeed(*words, *flags.split())
    at = ["bs=512", "skip=777", "seek=777", "count=3", "conv=fsync,notrunc"]
    succeed("dd", "if=/dev/zero", f"of={written.path(FILE)}", *at[2:], "bs=512")
    judge(written, NEW[: 777 * 512] + bytes(3 * 512) + NEW[780 * 512 :], option)


def test_cp(written: Mount, new: Path, option: str) -> None:
    succeed("cp", new, written.path(FILE))
    judge(written, NEW, option)


@pytest.mark.parametrize(
    ("cache", "size"), [("writeback", SIZE), ("unsafe", SIZE), ("none", 12 * MIB)]
)
def test_qemu_img_convert(
    mount: Mounts, vm: Path, cache: str, size: int, tmp_path: Path, option: str
) -> None:
    """Past the page cache qemu writes whole 4 KiB, also at the end: what is no such size it fails
    to write, and says that there is no space.
    """
    target = make_vmdk(vm / "disk.vmdk", OLD[:size])
    found = mount(vm, option)
    data = NEW[: size // 2] + bytes(size - size // 2)
    source = make_vmdk(tmp_path / "source.vmdk", data)
    words = ["qemu-img", "convert", "-n", "-f", "vmdk", "-O", "raw", "-t", cache]
    succeed(*words, source, found.path(FILE))
    assert found.content(FILE) == data
    found.finish()
    assert raw(target) == (data if option == "rw" else OLD[:size])


def test_a_shell(written: Mount, new: Path, option: str) -> None:
    done = run("sh", "-c", 'cat "$1" > "$2"', "sh", new, written.path(FILE))
    assert done.returncode == 0, done.stderr
    judge(written, NEW, option)


def test_a_memory_map(written: Mount, option: str) -> None:
    wanted = bytearray(OLD)
    for offset, size in ((0, SECTOR), (MIB - 100, 5000), (SIZE - 700, 700)):
        data = noise(("map", offset), size)
        assert written.ask("map_write", written.path(FILE), offset, data) == data
        wanted[offset : offset + size] = data
    judge(written, bytes(wanted), option)


def test_a_file_that_is_written_and_read_in_every_way(written: Mount, option: str) -> None:
    """Unaligned pieces through a buffered and a direct file, and what readers of before see."""
    wanted = bytearray(OLD)
    reader, buffered = written.open(FILE), opened(written, FILE)
    direct = opened(written, FILE, os.O_RDWR | os.O_DIRECT)
    assert written.ask("pread", reader, 4096, MIB) == OLD[MIB : MIB + 4096]
    for turn in range(60):
        fd = (buffered, direct)[turn % 2]
        size = (1, 511, 512, 513, 4096, 65_537, 300_000)[turn % 7]
        offset = turn * 199_933 % (SIZE - size)
        data = noise(("turn", turn), size)
        assert written.ask("pwrite", fd, data, offset) == size
        wanted[offset : offset + size] = data
        around = max(0, offset - 600)
        for other in (reader, buffered):
            assert (
                written.ask("pread", other, size + 1200, around) == wanted[around:][: size + 1200]
            )
    for fd in (reader, buffered, direct):
        written.ask("close", fd)
    judge(written, bytes(wanted), option)


def test_a_guest_on_a_loop_device(
    mount: Mounts, vm: Path, tmp_path: Path, loops: None, option: str
) -> None:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("absent: mkfs.ext4 (package e2fsprogs)")
    make_empty(vm / "disk.vmdk", 64 * MIB)
    found = mount(vm, option)
    place = tmp_path / "guest"
    place.mkdir()
    device = succeed("losetup", "--find", "--show", found.path(FILE)).stdout.strip()
    try:
        succeed("mkfs.ext4", "-q", device)
        succeed("mount", device, place)
        try:
            (place / "blob").write_bytes(NEW)
            (place / "motd").write_text("the words of the guest\n")
            succeed("sync", "-f", place)
            (place / "motd").rename(place / "renamed")
        finally:
            succeed("umount", place)
        succeed("e2fsck", "-f", "-n", device)
    finally:
        succeed("losetup", "--detach", device)
    copy = tmp_path / "copy.raw"
    succeed("cp", "--sparse=always", found.path(FILE), copy)
    found.finish()
    if option == "rw":
        succeed("qemu-img", "check", vm / "disk.vmdk")
        assert raw(vm / "disk.vmdk") == copy.read_bytes()
    succeed("e2fsck", "-f", "-n", copy)
    succeed("debugfs", "-R", f"dump blob {tmp_path / 'blob'}", copy)
    assert (tmp_path / "blob").read_bytes() == NEW


def test_zeros_stay_holes(mount: Mounts, vm: Path, option: str) -> None:
    path = make_empty(vm / "disk.vmdk", 64 * MIB)
    found = mount(vm, option)
    size = path.stat().st_size
    found.map_known("disk")
    for flags in (os.O_RDWR, os.O_RDWR | os.O_DIRECT):
        for offset in range(0, 64 * MIB, 4 * MIB):
            put(found, FILE, offset, bytes(MIB), flags)
    assert not any(data for _, _, data in found.ask("seek_map", found.path(FILE)))
    assert not any(extent["data"] for extent in found.json("disk/map.json"))
    assert found.stat(FILE).st_blocks == 0
    put(found, FILE, 32 * MIB, NEW[: 64 * KIB])
    data = [each[:2] for each in found.ask("seek_map", found.path(FILE)) if each[2]]
    assert data == [(32 * MIB, 32 * MIB + 64 * KIB)]
    assert found.stat(FILE).st_blocks == 128
    found.finish()
    assert path.stat().st_size <= size + 256 * KIB


def test_zeros_over_data(mount: Mounts, vm: Path, option: str) -> None:
    make_vmfs(vm / "disk.vmdk", OLD)
    found = mount(vm, option)
    put(found, FILE, MIB + 512, bytes(MIB))
    assert found.content(FILE) == OLD[: MIB + 512] + bytes(MIB) + OLD[2 * MIB + 512 :]
