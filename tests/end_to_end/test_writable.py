"""What may be written and what may not: every refusal of writing, on mounts of local disks."""

import errno
import os
import shutil
import struct
import tarfile
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mount, Mounts, succeed
from tests.end_to_end.vms import (
    MIB,
    SECTOR,
    descriptor,
    make_chain,
    make_delta,
    make_vmdk,
    make_vmfs,
    noise,
    raw,
    write,
)
from tests.end_to_end.writing import (
    content_id,
    no_mount,
    not_writable,
    opened,
    put,
    refused,
    small_disk,
)
from tests.engines.vmdk.makers import Grains
from tests.engines.vmdk.makers_esx import SeSparse

SIZE = 4 * MIB
OLD = noise("old", SIZE)
NEW = noise("new", SIZE)
BASE = "disk/chain/0.raw"
TOP = "disk/disk.raw"
RAW = "raw_devices=yes"
ACCESS = 15
OVERLAY = 44


@pytest.fixture
def base(vm: Path) -> Path:
    return make_vmfs(vm / "disk.vmdk", OLD)


# Which files.


def test_nothing_is_written_without_being_asked_for(mount: Mounts, base: Path) -> None:
    found = mount(base)
    not_writable(found, BASE, TOP, "disk/info.json")
    # The kernel itself refuses: the mount is read-only as a whole.
    assert found.ask("statvfs", str(found.place)).f_flag & os.ST_RDONLY


def test_only_the_base_is_written(mount: Mounts, vm: Path) -> None:
    paths = make_chain(vm)
    found = mount(vm, "rw", "restore=yes")
    found.expect("web/chain/1.raw cannot be opened: .*only the base of a chain is written")
    found.expect("web/chain/2.raw cannot be opened: .*only the base of a chain is written")
    others = ["web/chain/1.raw", "web/chain/2.raw", "web/disk.raw", "web/map.json", "vm.json"]
    not_writable(found, *others, ".vddkfs/metrics")
    refused(found, errno.EROFS, "unlink", found.path("web/disk.raw"))
    refused(found, errno.EROFS, "mkdir", found.path("new"))
    was = content_id(paths[0])
    put(found, "web/chain/0.raw", 0, NEW[:SECTOR])
    found.finish()
    assert content_id(paths[0]) == was
    assert raw(paths[0])[:SECTOR] == NEW[:SECTOR]
    succeed("qemu-img", "check", paths[-1])


def test_a_base_with_children_is_not_written_unasked(mount: Mounts, vm: Path) -> None:
    make_chain(vm, links=2)
    found = mount(vm, "rw")
    why = r"web.vmdk: links lie above it \(1 of them\), which would not fit any more; restore=yes"
    found.expect(f"web is only read: .*{why}")
    not_writable(found, "web/chain/0.raw", "web/chain/1.raw")


def test_a_base_of_two_disks_is_not_written(mount: Mounts, vm: Path) -> None:
    make_vmfs(vm / "base.vmdk", OLD)
    make_delta(vm / "one.vmdk", "base.vmdk")
    make_delta(vm / "two.vmdk", "base.vmdk")
    found = mount(vm, "rw,restore=yes")
    found.expect("base.vmdk: another disk of this mount has the same base")
    for folder in found.ask("listdir", str(found.place)):
        if folder not in (".vddkfs", "vm.json"):
            refused(found, errno.EROFS, "open", found.path(f"{folder}/chain/0.raw"), os.O_RDWR)


def test_partitions_are_not_written(mount: Mounts, vm: Path) -> None:
    # By hand: sfdisk calls sync(2), which waits for every file system of the machine.
    entry = struct.pack("<B3xB3xII", 0, 0x83, MIB // SECTOR, MIB // SECTOR)
    table = bytes(446) + entry + bytes(48) + b"\x55\xaa"
    make_vmfs(vm / "disk.vmdk", table + bytes(SIZE - SECTOR))
    for option in ("rw", "overlay=tmp"):
        found = mount(vm, option)
        found.expect("cannot be opened: .*partitions are only read.*loop,offset=")
        part = "disk/partitions/1.raw"
        not_writable(found, part)
        reader = found.open(part)
        put(found, TOP, MIB + 700, NEW[:5000])
        assert found.ask("pread", reader, 5000, 700) == NEW[:5000]
        found.ask("close", reader)
        found.finish()


# Which formats.


def unwritable(mount: Mounts, source: Path, why: str, *options: str) -> None:
    """Mount to write a disk that cannot be: it is read-only, the log has the reason."""
    found = mount(source, "rw", *options)
    found.expect(f"disk is only read: .*{why}")
    not_writable(found, BASE, TOP)
    assert len(found.content(TOP))


def test_packed_disks_are_not_written(mount: Mounts, vm: Path) -> None:
    path = make_vmdk(vm / "disk.vmdk", OLD, "streamOptimized")
    unwritable(mount, path, "disks of type streamOptimized are only read; convert it")


def test_sesparse_disks_are_not_written(mount: Mounts, vm: Path) -> None:
    extent = SeSparse(Grains(SIZE // SECTOR, 8, {0: OLD[:4096], 3: OLD[4096:8192]}))
    extent.write(vm / "disk-sesparse.vmdk", b"")
    (vm / "disk.vmdk").write_text(descriptor([extent.line("disk-sesparse.vmdk")], kind="seSparse"))
    unwritable(mount, vm / "disk.vmdk", "disks of type seSparse are only read; convert it")


def test_one_disk_that_is_only_read_beside_one_that_is_written(mount: Mounts, vm: Path) -> None:
    make_vmdk(vm / "disk.vmdk", OLD, "streamOptimized")
    make_vmfs(vm / "other.vmdk", OLD)
    found = mount(vm, "rw")
    why = "disks of type streamOptimized are only read"
    found.expect(f"disk is only read: .*{why}")
    found.expect(f"disk/chain/0.raw cannot be opened: .*not to be written: .*{why}")
    not_writable(found, BASE, TOP)
    put(found, "other/disk.raw", 0, NEW)
    assert found.content("other/disk.raw") == NEW


def test_members_of_archives_are_not_written(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    make_vmdk(vm / "disk.vmdk", OLD)
    archive = tmp_path / "disk.ova"
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(vm / "disk.vmdk", "disk.vmdk")
    unwritable(mount, archive, "it is in an archive, which is only read")


def test_devices_are_not_written(mount: Mounts, vm: Path, loops: None) -> None:
    backing = vm / "backing"
    backing.write_bytes(OLD)
    device = succeed("losetup", "--find", "--show", backing).stdout.strip()
    try:
        line = f'RW {SIZE // SECTOR} FLAT "{device}" 0'
        (vm / "disk.vmdk").write_text(descriptor([line], kind="fullDevice"))
        unwritable(mount, vm / "disk.vmdk", "disks of type fullDevice are only read", RAW)
        mount.finish()
        assert backing.read_bytes() == OLD
    finally:
        succeed("losetup", "--detach", device)


def test_an_extent_that_its_descriptor_protects(mount: Mounts, base: Path) -> None:
    base.write_text(base.read_text().replace("RW ", "RDONLY "))
    unwritable(mount, base, "its descriptor says RDONLY of an extent")


# Who else has it.


def test_two_mounts_of_one_base(mount: Mounts, base: Path) -> None:
    first = mount(base, "rw")
    code, line = no_mount(mount, base, "rw")
    assert code == ACCESS
    assert "disk.vmdk: cannot be written: " in line
    assert "another process has it open for writing (a mount of vddkfs, or qemu)" in line
    put(first, BASE, 0, NEW[:SECTOR])
    first.finish()
    second = mount(base, "rw")
    put(second, BASE, SECTOR, NEW[SECTOR : 2 * SECTOR])
    assert second.read(BASE, 0, 2 * SECTOR) == NEW[: 2 * SECTOR]


def test_a_base_that_another_mount_reads(mount: Mounts, base: Path) -> None:
    reader = mount(base)
    assert reader.read(BASE, 0, MIB) == OLD[:MIB]
    writer = mount(base, "rw")
    writer.expect("disk-flat.vmdk: another process reads it")
    writer.allow("disk.vmdk: another process reads it")
    put(writer, BASE, 0, NEW[:SECTOR])
    reader.allow("open for writing", "changed under the mount", "cannot be opened", "kernel may")


def test_a_reader_of_a_base_that_another_mount_writes(mount: Mounts, base: Path) -> None:
    mount(base, "rw")
    reader = mount(base)
    reader.expect("another process has it open for writing: what is read may be a mix")
    assert reader.read(BASE, 0, MIB) == OLD[:MIB]


def test_a_disk_that_vmware_holds(mount: Mounts, base: Path) -> None:
    lock = base.with_name("disk.vmdk.lck")
    lock.mkdir()
    (lock / "M31415.lck").touch()
    code, line = no_mount(mount, base, "rw")
    assert code == ACCESS
    assert f"VMware has it open: {lock}/M31415.lck exists" in line
    shutil.rmtree(lock)
    put(mount(base, "rw"), BASE, 0, NEW[:SECTOR])


def test_options_that_exclude_each_other(mount: Mounts, base: Path) -> None:
    assert no_mount(mount, base, "rw", "overlay=tmp")[0] == 2
    assert no_mount(mount, base, "ro", "rw")[0] == 2
    assert no_mount(mount, base, "ro", "overlay=tmp")[0] == 2


# The content id.


def test_the_content_id_changes_once_a_mount(mount: Mounts, vm: Path) -> None:
    path = make_vmdk(vm / "disk.vmdk", OLD)
    ids = [content_id(path)]
    for _ in range(2):
        found = mount(vm, "rw")
        put(found, BASE, 0, b"")
        assert content_id(path) == ids[-1], "it was opened, and not written"
        put(found, BASE, 0, NEW[:SECTOR])
        ids.append(content_id(path))
        put(found, BASE, MIB, NEW[:SECTOR])
        found.finish()
        assert content_id(path) == ids[-1]
    assert len(set(ids)) == 3
    assert raw(path) == NEW[:SECTOR] + OLD[SECTOR:MIB] + NEW[:SECTOR] + OLD[MIB + SECTOR :]


def test_a_mount_that_writes_nothing_changes_nothing(mount: Mounts, vm: Path) -> None:
    path = make_vmdk(vm / "disk.vmdk", OLD)
    before = path.read_bytes()
    found = mount(vm, "rw")
    fd = opened(found, BASE, os.O_RDWR | os.O_TRUNC)
    found.ask("fsync", fd)
    found.ask("close", fd)
    assert found.sha256(BASE) == found.sha256(BASE, True)
    found.finish()
    assert path.read_bytes() == before


# Overlays.


def test_an_overlay_of_another_disk(mount: Mounts, base: Path, tmp_path: Path) -> None:
    folder = f"overlay={tmp_path / 'overlay'}"
    found = mount(base, folder)
    put(found, TOP, 0, NEW[:4096])
    code, line = no_mount(mount, base, folder)
    assert code == OVERLAY
    assert "another mount is using it" in line
    found.finish()
    write(base.with_name("disk-flat.vmdk"), MIB, NEW[:SECTOR], "raw")
    code, line = no_mount(mount, base, folder)
    assert code == OVERLAY
    assert "it was made for another source: disk disk: " in line
    assert "`vddkfs overlay discard`; or force it" in line
    found = mount(base, folder, "overlay_force=yes")
    found.expect("forced onto disk, whose files have changed")
    assert found.read(TOP, 0, 4096) == NEW[:4096]
    assert found.read(TOP, MIB, SECTOR) == NEW[:SECTOR]


def test_a_folder_that_is_no_overlay(mount: Mounts, base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter").touch()
    code, line = no_mount(mount, base, f"overlay={tmp_path / 'mine'}")
    assert code == OVERLAY
    assert "not an overlay: it has letter in it" in line
    assert os.listdir(tmp_path / "mine") == ["letter"]


def test_no_space_for_an_overlay_at_mount(mount: Mounts, base: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 16) as small:
        code, line = no_mount(mount, base, f"overlay={small / 'overlay'}")
        assert code == OVERLAY
        assert str(small) in line
        assert "space" in line


def test_no_space_for_an_overlay_while_it_grows(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    disk = bytearray(noise("disk", 64 * MIB))
    make_vmfs(vm / "disk.vmdk", bytes(disk))
    with small_disk(tmp_path / "small", 100) as small:
        found = mount(vm, f"overlay={small / 'overlay'}")
        found.expect("write at offset .* failed: .*no space for more changed blocks.*are free")
        fd = opened(found, TOP)
        written = fill(found, fd, disk)
        assert MIB <= written < len(disk)
        for at in range(0, written, MIB):
            data = noise(("again", at), 70_000)
            disk[at : at + len(data)] = data
            assert found.ask("pwrite", fd, data, at) == len(data)
        found.ask("fsync", fd)
        found.ask("close", fd)
        # What the failed write has left is old or new: it is not looked at.
        sure = [slice(0, written), slice(written + MIB, len(disk))]
        assert all(found.content(TOP)[part] == disk[part] for part in sure)
        found.finish()
        # Space comes, and it goes on.
        succeed("mount", "-o", "remount,size=400m", small)
        again = mount(vm, f"overlay={small / 'overlay'}")
        assert all(again.content(TOP)[part] == disk[part] for part in sure)
        put(again, TOP, 0, NEW)
        put(again, TOP, 60 * MIB, NEW)
        assert again.read(TOP, 60 * MIB, MIB) == NEW[:MIB]
        again.finish()


def fill(found: Mount, fd: int, disk: bytearray) -> int:
    """Write the disk from its beginning until there is no space; return how far that was."""
    for at in range(0, len(disk), MIB):
        data = noise(at, MIB)
        try:
            assert found.ask("pwrite", fd, data, at) == MIB
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return at
        disk[at : at + MIB] = data
    return len(disk)
