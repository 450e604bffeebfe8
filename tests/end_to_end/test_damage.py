"""Files that turn bad under the mount: EIO where it concerns, right data elsewhere, never zeros.

The handles are opened before the damage is done, unless a test says otherwise: then the open is
where the source is looked at again.
"""

import errno
import os
import struct
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mount, Mounts
from tests.end_to_end.vms import (
    KIB,
    MIB,
    SECTOR,
    make_delta,
    make_vmdk,
    make_vmfs,
    noise,
    write,
)

GRAIN = 64 * KIB
SIZE = 4 * MIB
CONTENT = noise("damage", SIZE)
FAILED = r"^\S+ \S+ ERROR disk/chain/\d.raw.*: read at offset \d+ failed: "


def try_read(mount: Mount, fd: int, offset: int, size: int) -> bytes | None:
    """Return the data, or None for EIO."""
    data: bytes | None = mount.attempt(errno.EIO, "pread", fd, size, offset)
    assert data is None or len(data) == size
    return data


def broken(mount: Mount, fd: int, step: int, start: int = 0) -> list[int]:
    """Read a disk in pieces; return which cannot be read, and check all others."""
    found = []
    for offset in range(start, SIZE, step):
        size = min(step, SIZE - offset)
        data = try_read(mount, fd, offset, size)
        if data is None:
            found.append(offset)
        else:
            assert data == CONTENT[offset : offset + size], f"wrong data at {offset}"
    return found


CUTS = {"between pages": 2 * MIB + 3 * 4096, "inside a page": 3 * MIB + 5 * SECTOR}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_flat_extent_is_truncated(mount: Mounts, vm: Path, direct: bool, cut: str) -> None:
    end = CUTS[cut]
    make_vmfs(vm / "disk.vmdk", CONTENT)
    found = mount(vm)
    fd = found.open("disk/disk.raw", direct)
    os.truncate(vm / "disk-flat.vmdk", end)
    # Everything before the cut is still there, and nothing behind it.
    step = SECTOR * 8
    page = end // step * step
    assert broken(found, fd, step) == list(range(page, SIZE, step))
    if direct and end > page:
        assert try_read(found, fd, page, end - page) == CONTENT[page:end]
        assert try_read(found, fd, end - SECTOR, 2 * SECTOR) is None
    found.expect(
        rf"disk/chain/0.raw.* \(link {vm}/disk.vmdk\): read at offset \d+ failed: "
        rf".*disk-flat.vmdk.*"
    )


def test_sequential_reader_gets_everything_before_the_cut(mount: Mounts, vm: Path) -> None:
    """Large blocks, read ahead, must not take good data along with the bad."""
    end = 3 * MIB + 5 * 4096
    make_vmfs(vm / "disk.vmdk", CONTENT)
    found = mount(vm)
    fd = found.open("disk/disk.raw")
    os.truncate(vm / "disk-flat.vmdk", end)
    here = 0
    while data := found.attempt(errno.EIO, "pread", fd, 64 * KIB, here):
        assert data == CONTENT[here : here + len(data)]
        here += len(data)
    assert data is None
    assert here == end
    found.expect("read at offset .* failed")


def test_open_after_a_truncation(mount: Mounts, vm: Path) -> None:
    """What is left can still be read out, by who opens the file now."""
    end = 2 * MIB
    make_vmfs(vm / "disk.vmdk", CONTENT)
    found = mount(vm)
    found.map_known("disk")
    os.truncate(vm / "disk-flat.vmdk", end)
    found.allow("truncated", "read at offset .* failed")
    fd = found.attempt(errno.EIO, "open", found.path("disk/disk.raw"), os.O_RDONLY)
    assert fd is not None, "nothing can be read any more, though half of the disk is there"
    assert broken(found, fd, MIB) == [2 * MIB, 3 * MIB]


PRIMARY, REDUNDANT = 56, 48
"""Where the header says where a grain directory is."""


def grain_entry(path: Path, grain: int, which: int = PRIMARY) -> int:
    """Return the offset of a grain's entry in the table of a monolithic sparse file."""
    with open(path, "rb") as file:
        header = file.read(SECTOR)
        assert header[:4] == b"KDMV"
        (directory,) = struct.unpack_from("<Q", header, which)
        file.seek(directory * SECTOR + grain // 512 * 4)
        (table,) = struct.unpack("<I", file.read(4))
    return int(table) * SECTOR + grain % 512 * 4


def put_entry(path: Path, grain: int, entry: int) -> None:
    """Write a grain's entry in both tables that have it."""
    with open(path, "r+b") as file:
        for which in (PRIMARY, REDUNDANT):
            file.seek(grain_entry(path, grain, which))
            file.write(struct.pack("<I", entry))


GARBAGE = {"outside the file": 0xFFFFFFF0, "in the header": 1}


@pytest.mark.parametrize("entry", GARBAGE)
def test_live_grain_table_turns_to_garbage(mount: Mounts, vm: Path, entry: str) -> None:
    path = make_vmdk(vm / "disk.vmdk", CONTENT)
    found = mount(vm)
    found.map_known("disk")
    held = found.open("disk/disk.raw", direct=True)
    put_entry(path, 20, GARBAGE[entry])
    # Past the cache the table is read anew, on a handle of before as on one of now.
    assert broken(found, held, GRAIN) == [20 * GRAIN]
    for direct in (True, False):
        fd = found.open("disk/disk.raw", direct)
        assert broken(found, fd, GRAIN) == [20 * GRAIN]
        assert broken(found, fd, 4096, start=18 * GRAIN)[:16] == list(
            range(20 * GRAIN, 21 * GRAIN, 4096)
        )
    found.expect(
        rf"disk/chain/0.raw.* \(link {path}\): read at offset {20 * GRAIN} failed: .*{path}",
        FAILED,
    )


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_read_across_a_bad_grain(mount: Mounts, vm: Path, direct: bool) -> None:
    """A read that begins well and ends badly gives what is good, or fails: no zeros."""
    path = make_vmdk(vm / "disk.vmdk", CONTENT)
    found = mount(vm)
    put_entry(path, 20, 0xFFFFFFF0)
    fd = found.open("disk/disk.raw", direct)
    for start in (18 * GRAIN, 19 * GRAIN + 4096, 20 * GRAIN - 4096):
        data = found.attempt(errno.EIO, "pread", fd, 4 * GRAIN, start)
        assert data is None or data == CONTENT[start : start + len(data)]
        assert data is None or 0 < len(data) <= 20 * GRAIN - start
    found.expect(r"read at offset \d+ failed")


def test_frozen_grain_table_turns_to_garbage(mount: Mounts, vm: Path) -> None:
    base = make_vmdk(vm / "disk.vmdk", CONTENT)
    delta = make_delta(vm / "disk-1.vmdk", "disk.vmdk")
    write(delta, 30 * GRAIN, CONTENT[30 * GRAIN : 31 * GRAIN])
    found = mount(vm)
    assert broken(found, found.open("disk/chain/0.raw"), MIB) == []
    put_entry(base, 20, 0xFFFFFFF0)
    put_entry(base, 30, 0xFFFFFFF0)
    found.expect(r"link 0 .* changed under the mount")
    for direct in (False, True):
        assert broken(found, found.open("disk/chain/0.raw", direct), GRAIN) == [
            20 * GRAIN,
            30 * GRAIN,
        ]
        # The delta has grain 30 itself: only the other one is lost at the mounted point.
        assert broken(found, found.open("disk/disk.raw", direct), GRAIN) == [20 * GRAIN]
    found.expect(
        rf"disk/chain/0.raw.* \(link {base}\): read at offset {20 * GRAIN} failed",
        rf"disk/chain/1.raw.* \(link {base}\): read at offset {20 * GRAIN} failed",
        FAILED,
    )


def test_sparse_file_is_truncated(mount: Mounts, vm: Path) -> None:
    path = make_vmdk(vm / "disk.vmdk", CONTENT)
    found = mount(vm)
    fd = found.open("disk/disk.raw", direct=True)
    with open(path, "rb") as file:
        file.seek(grain_entry(path, 40))
        (place,) = struct.unpack("<I", file.read(4))
    os.truncate(path, place * SECTOR + 4 * KIB)
    # qemu-img puts grains in order: what follows is gone as well.
    bad = broken(found, fd, 4 * KIB)
    assert bad == list(range(40 * GRAIN + 4 * KIB, SIZE, 4 * KIB))
    found.expect(rf"\(link {path}\): read at offset {bad[0]} failed: .*{path}", FAILED)


def test_damage_that_is_there_at_the_beginning(mount: Mounts, vm: Path) -> None:
    """A grain table is not looked through at the mount; its damage shows where it is read."""
    path = make_vmdk(vm / "disk.vmdk", CONTENT)
    put_entry(path, 5, 0xFFFFFFF0)
    found = mount(vm)
    assert broken(found, found.open("disk/disk.raw"), GRAIN) == [5 * GRAIN]
    # A map calls it data: whoever copies only the data must meet the error.
    assert found.ask("seek_map", found.path("disk/disk.raw")) == [(0, SIZE, True)]
    found.expect(rf"\(link {path}\): read at offset {5 * GRAIN} failed", FAILED)
    assert found.worker()["errors"] >= 1


def test_same_error_is_logged_once(mount: Mounts, vm: Path) -> None:
    path = make_vmdk(vm / "disk.vmdk", CONTENT)
    put_entry(path, 5, 0xFFFFFFF0)
    found = mount(vm)
    fd = found.open("disk/disk.raw", direct=True)
    for _ in range(50):
        assert try_read(found, fd, 5 * GRAIN, 4096) is None
    found.expect("read at offset")
    assert len(found.loud()) == 1
