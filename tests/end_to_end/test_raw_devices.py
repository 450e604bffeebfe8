"""Extents that are devices of this machine: read with raw_devices=yes, and never without it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mounts, mounted, sha256, succeed, vddkfs
from tests.end_to_end.vms import (
    MIB,
    SECTOR,
    descriptor,
    make_delta,
    make_vmdk,
    noise,
    raw,
    sparse_noise,
    write,
)
from vddkfs.errors import DamagedSource, NotAVmdk, SourceMissing, UnsupportedFormat, VddkfsError

SIZE = 3 * MIB + SECTOR
YES = "raw_devices=yes"
ADVICE = "if that is the right device of this machine, mount with `-o raw_devices=yes`"

Attach = Callable[[bytes], str]
Refused = Callable[..., str]


@pytest.fixture
def attach(loops: None, tmp_path: Path) -> Iterator[Attach]:
    """Return a function that makes a loop device with some content, and returns its name."""
    devices: list[str] = []

    def attaching(content: bytes) -> str:
        backing = tmp_path / f"backing{len(devices)}"
        backing.write_bytes(content)
        command = ("losetup", "--find", "--show", "--direct-io=off", backing)
        devices.append(succeed(*command).stdout.strip())
        return devices[-1]

    yield attaching
    for device in devices:
        succeed("losetup", "--detach", device)


@pytest.fixture
def refused(able: None, tmp_path: Path) -> Refused:
    """Check that a source is refused in one line, by `mount` and by `info`; return it."""
    place = tmp_path / "place"
    place.mkdir()

    def refusing(source: Path, kind: type[VddkfsError], *words: str, options: str = "uid=0") -> str:
        lines = set()
        for command in (("mount", source, place), ("info", source)):
            done = vddkfs(*command, "-o", options)
            assert (done.returncode, done.stdout) == (kind.exit_code, ""), done.stderr
            assert not mounted(place)
            (line,) = done.stderr.splitlines()
            assert line.startswith("vddkfs: ")
            assert line.isprintable()
            for word in words:
                assert word in line
            lines.add(line)
        (only,) = lines
        return only

    return refusing


def disk(folder: Path, *extents: str, kind: str = "fullDevice", name: str = "d") -> Path:
    path = folder / f"{name}.vmdk"
    path.write_text(descriptor([*extents], kind=kind))
    return path


def by_qemu(path: Path) -> bytes:
    """Return what qemu-img reads; it is shown a createType that it knows."""
    twin = path.with_name("twin.tmp")
    text = path.read_text()
    for kind in ("fullDevice", "partitionedDevice", "custom"):
        text = text.replace(f'"{kind}"', '"twoGbMaxExtentFlat"')
    twin.write_text(text)
    try:
        return raw(twin)
    finally:
        twin.unlink()


def whole(device: str, size: int = SIZE) -> str:
    return f'RW {size // SECTOR} FLAT "{device}" 0'


@pytest.mark.parametrize("options", ["uid=0", "raw_devices=no", "follow_parents=any"])
def test_refused_without_the_option(
    refused: Refused, attach: Attach, vm: Path, options: str
) -> None:
    device = attach(noise("device", SIZE))
    path = disk(vm, whole(device))
    words = (str(path), f"a raw device (RDM or physical disk), {device}", ADVICE)
    refused(path, UnsupportedFormat, *words, options=options)


def test_left_out_without_the_option(mount: Mounts, attach: Attach, vm: Path) -> None:
    device = attach(noise("device", SIZE))
    disk(vm, whole(device))
    other = make_vmdk(vm / "other.vmdk", sparse_noise("other", MIB))
    found = mount.prepare(vm)
    found.expect("left out: .*d.vmdk")
    done = found.start()
    assert ADVICE in done.stderr
    assert set(found.ask("listdir", found.path())) == {"other", "vm.json", ".vddkfs"}
    assert found.sha256("other/disk.raw") == sha256(raw(other))
    (left,) = found.json("vm.json")["left_out"]
    assert left["path"] == str(vm / "d.vmdk")
    assert device in left["reason"]


@pytest.mark.parametrize("kind", ["fullDevice", "monolithicFlat", "custom"])
@pytest.mark.parametrize("line", ['FLAT "{}" 0', 'VMFS "{}"'], ids=["FLAT", "VMFS"])
def test_whole_device(mount: Mounts, attach: Attach, vm: Path, kind: str, line: str) -> None:
    device = attach(noise("device", SIZE))
    path = disk(vm, f"RW {SIZE // SECTOR} {line.format(device)}", kind=kind)
    found = mount(path, YES)
    assert by_qemu(path) == noise("device", SIZE)
    assert found.sha256("d/disk.raw", True) == sha256(noise("device", SIZE))
    done = succeed("sha256sum", found.path("d/disk.raw"))
    assert done.stdout.split()[0] == sha256(noise("device", SIZE))
    assert found.ask("seek_map", found.path("d/disk.raw")) == [(0, SIZE, True)]
    assert found.stat("d/disk.raw").st_size == SIZE
    assert found.json("vm.json")["left_out"] == []


def test_a_device_by_a_link_below_dev(mount: Mounts, attach: Attach, vm: Path) -> None:
    """As /dev/disk/by-id has them, which do not change with the order of discovery."""
    name = f"/dev/vddkfs-test-{os.getpid()}"
    os.symlink(attach(noise("device", SIZE)), name)
    try:
        found = mount(disk(vm, whole(name)), YES)
        assert found.sha256("d/disk.raw") == sha256(noise("device", SIZE))
    finally:
        os.unlink(name)


def test_info(attach: Attach, vm: Path) -> None:
    device = attach(noise("device", SIZE))
    done = vddkfs("info", disk(vm, whole(device)), "-o", YES)
    assert done.returncode == 0, done.stderr
    heading, row = (line.split("\t") for line in done.stdout.splitlines()[:2])
    told = dict(zip(heading, row, strict=True))
    assert (told["format"], told["extents"]) == ("fullDevice", "FLAT")


def test_a_part_of_a_larger_device(mount: Mounts, attach: Attach, vm: Path) -> None:
    """The disk is as large as its descriptor says, from the sector that it says."""
    content = noise("large", 4 * SIZE)
    path = disk(vm, f'RW {SIZE // SECTOR} FLAT "{attach(content)}" 1000')
    found = mount(path, YES)
    wanted = content[1000 * SECTOR :][:SIZE]
    assert by_qemu(path) == wanted
    for direct in (False, True):
        assert found.sha256("d/disk.raw", direct) == sha256(wanted)


def test_partitioned_device(mount: Mounts, attach: Attach, vm: Path) -> None:
    """The partition table is in a file, a partition on the device, and what is between is left."""
    head, content = noise("head", 63 * SECTOR), noise("large", 2 * SIZE)
    tail = noise("tail", 17 * SECTOR)
    (vm / "d-pt.vmdk").write_bytes(head)
    (vm / "d-f002.vmdk").write_bytes(bytes(5 * SECTOR) + tail)
    path = disk(
        vm,
        'RW 63 FLAT "d-pt.vmdk" 0',
        f'RW {SIZE // SECTOR} FLAT "{attach(content)}" 2048',
        'RW 17 FLAT "d-f002.vmdk" 5',
        kind="partitionedDevice",
    )
    found = mount(vm, YES)
    wanted = head + content[MIB:][:SIZE] + tail
    assert by_qemu(path) == wanted
    for direct in (False, True):
        assert found.sha256("d/disk.raw", direct) == sha256(wanted)
    seam = len(head) + SIZE
    assert found.read("d/disk.raw", seam - 700, 1400) == wanted[seam - 700 :][:1400]
    assert set(found.ask("listdir", found.path())) == {"d", "vm.json", ".vddkfs"}


def test_partitioned_device_with_zeros(mount: Mounts, attach: Attach, vm: Path) -> None:
    content = noise("device", SIZE)
    disk(vm, "RW 63 ZERO", whole(attach(content)), "RW 100 ZERO", kind="partitionedDevice")
    found = mount(vm, YES)
    wanted = bytes(63 * SECTOR) + content + bytes(100 * SECTOR)
    assert found.sha256("d/disk.raw") == found.sha256("d/disk.raw", True) == sha256(wanted)
    seen = found.ask("seek_map", found.path("d/disk.raw"))
    assert seen == [
        (0, 63 * SECTOR, False),
        (63 * SECTOR, 63 * SECTOR + SIZE, True),
        (63 * SECTOR + SIZE, len(wanted), False),
    ]


def test_snapshot_on_a_device(mount: Mounts, attach: Attach, vm: Path) -> None:
    base = disk(vm, whole(attach(noise("device", SIZE))), kind="monolithicFlat")
    delta = make_delta(vm / "d-000001.vmdk", base.name)
    write(delta, MIB, noise("delta", 70_000 // SECTOR * SECTOR))
    found = mount(vm, YES)
    for name, path in (("chain/0.raw", base), ("chain/1.raw", delta), ("disk.raw", delta)):
        for direct in (False, True):
            assert found.sha256(f"d/{name}", direct) == sha256(raw(path))


def test_a_guest_writes_to_the_device(mount: Mounts, attach: Attach, vm: Path) -> None:
    """An open shows nothing that is older, and neither does a read past the cache."""
    device = attach(noise("device", SIZE))
    found = mount(disk(vm, whole(device)), YES)
    direct = found.open("d/disk.raw", direct=True)
    assert found.sha256("d/disk.raw") == sha256(noise("device", SIZE))
    new = noise("new", 8192)
    fd = os.open(device, os.O_WRONLY)
    try:
        os.pwrite(fd, new, MIB)
        os.fsync(fd)
    finally:
        os.close(fd)
    assert found.ask("pread", direct, 8192, MIB) == new
    assert found.read("d/disk.raw", MIB, 8192) == new


def write_behind(folder: Path, content: bytes) -> None:
    """Write what is behind the first device, as another host does: the device is not told."""
    fd = os.open(folder / "backing0", os.O_WRONLY)
    try:
        assert os.pwrite(fd, content, 0) == len(content)
        os.fsync(fd)
    finally:
        os.close(fd)


OLD, NEW = noise("device", SIZE), noise("another host", SIZE)


def test_another_host_writes_to_the_device(
    mount: Mounts, attach: Attach, vm: Path, tmp_path: Path
) -> None:
    """Linux keeps old pages of the device; an open drops them, and a direct read goes past them."""
    device = attach(OLD)
    found = mount(disk(vm, whole(device)), YES)
    direct = found.open("d/disk.raw", direct=True)
    assert found.sha256("d/disk.raw") == sha256(OLD)
    write_behind(tmp_path, NEW)
    assert Path(device).read_bytes() == OLD, "the trap: these are the device's pages"
    assert found.ask("pread", direct, 8192, MIB) == NEW[MIB:][:8192]
    assert found.sha256("d/disk.raw") == sha256(NEW)
    assert found.sha256("d/disk.raw", direct=True) == sha256(NEW)


def test_another_host_writes_to_a_frozen_base(
    mount: Mounts, attach: Attach, vm: Path, tmp_path: Path
) -> None:
    """Nothing tells of it: direct reads are of now, and all others are after `invalidate`."""
    base = disk(vm, whole(attach(OLD)), kind="monolithicFlat")
    make_delta(vm / "d-000001.vmdk", base.name)
    found = mount(vm, YES)
    names = ("d/chain/0.raw", "d/disk.raw")
    assert [found.sha256(name) for name in names] == [sha256(OLD)] * 2
    write_behind(tmp_path, NEW)
    assert [found.sha256(name, direct=True) for name in names] == [sha256(NEW)] * 2
    done = vddkfs("invalidate", found.place)
    assert done.returncode == 0, done.stderr
    assert [found.sha256(name) for name in names] == [sha256(NEW)] * 2


@pytest.mark.parametrize("what", ["/dev/null", "/dev/shm", "a link", "a file"])
def test_what_is_no_block_device(refused: Refused, vm: Path, tmp_path: Path, what: str) -> None:
    name = f"/dev/vddkfs-test-{os.getpid()}"
    if what == "a link":
        os.symlink("/dev/zero", name)
    elif what == "a file":
        Path(name).write_bytes(bytes(SIZE))
    else:
        name = what
    try:
        path = disk(vm, whole(name))
        refused(path, NotAVmdk, f"{name}: is not a block device", options=YES)
    finally:
        if name.startswith("/dev/vddkfs-"):
            os.unlink(name)


def test_a_device_that_is_missing(refused: Refused, vm: Path) -> None:
    path = disk(vm, whole("/dev/vddkfs-no-such-device"))
    assert not os.path.lexists("/dev/vddkfs-no-such-device")
    words = ("/dev/vddkfs-no-such-device", "is missing", "d.vmdk")
    refused(path, SourceMissing, *words, options=YES)


def test_a_device_that_is_too_small(refused: Refused, attach: Attach, vm: Path) -> None:
    device = attach(noise("device", SIZE - SECTOR))
    words = (f"{device}: truncated extent", str(SIZE), str(SIZE - SECTOR), "d.vmdk")
    refused(disk(vm, whole(device)), DamagedSource, *words, options=YES)


@pytest.mark.parametrize("name", ["/dev/../{}", "/dev/./{}", "/dev//{}"])
def test_a_device_by_a_crooked_name(refused: Refused, attach: Attach, vm: Path, name: str) -> None:
    """However it is spelt, a device is one, and is not read without the option."""
    device = attach(noise("device", SIZE))
    crooked = name.format(device.lstrip("/") if ".." in name else Path(device).name)
    refused(disk(vm, whole(crooked)), UnsupportedFormat, ADVICE)


@pytest.mark.parametrize("trust", ["uid=0", YES, "follow_parents=any"])
def test_a_device_behind_a_link_in_the_folder(
    refused: Refused, attach: Attach, vm: Path, trust: str
) -> None:
    """Only a name below /dev is a device: a guest's file cannot become one by a symbolic link."""
    (vm / "d-flat.vmdk").symlink_to(attach(noise("device", SIZE)))
    path = disk(vm, whole("d-flat.vmdk"), kind="monolithicFlat")
    refused(path, NotAVmdk, f"{vm}/d-flat.vmdk", "regular file", options=trust)
