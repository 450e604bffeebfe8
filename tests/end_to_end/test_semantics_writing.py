"""The promises of vddkfs-semantics(7), each held by a test of its name: writing, and overlays."""

import errno
import hashlib
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.freshness import promise, start
from tests.end_to_end.mounting import Mount, Mounts, run, succeed, until, vddkfs
from tests.end_to_end.vms import MIB, make_chain, make_vmdk, make_vmfs, noise, write

SIZE = 8 * MIB
OLD, NEW = (noise(name, SIZE) for name in ("old", "new"))
FULL_MIB = 96
"""Of a file system: what an overlay keeps free, and some more."""


@pytest.fixture
def base(vm: Path) -> Path:
    """Make a disk that is a base alone; return its VMDK."""
    return make_vmfs(vm / "base.vmdk", OLD)


@pytest.fixture
def chain(vm: Path) -> list[Path]:
    """Make a disk with two snapshots, MBR and all; return its VMDKs."""
    return make_chain(vm, links=3, size=SIZE, name="web")


def hashes(folder: Path) -> dict[str, str]:
    """Hash the files in *folder*."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def content(base: Path) -> bytes:
    """Return what the flat file of *base* holds."""
    return base.with_name("base-flat.vmdk").read_bytes()


def opened(mount: Mount, name: str, flags: int = os.O_RDWR) -> int:
    return int(mount.ask("open", mount.path(name), flags))


def refused(mount: Mount, wanted: int, function: str, *arguments: Any) -> None:
    """Ask for what has to fail with the errno *wanted*."""
    with pytest.raises(OSError, match=re.escape(os.strerror(wanted))):
        mount.ask(function, *arguments)


def put(mount: Mount, name: str, data: bytes, offset: int) -> None:
    """Open, write, close."""
    fd = opened(mount, name)
    assert mount.ask("pwrite", fd, data, offset) == len(data)
    mount.ask("close", fd)


@promise(
    "write-seen",
    "What a write has taken is in every read that begins later, through whichever file of the "
    "mount shows those bytes.",
)
@pytest.mark.parametrize("option", ["rw,restore=yes", "overlay"])
def test_write_seen(mount: Mounts, vm: Path, tmp_path: Path, option: str) -> None:
    disk = bytearray(OLD)
    disk[446:510] = bytes.fromhex("00000000830000000008000000200000") + bytes(48)
    disk[510:512] = b"\x55\xaa"
    make_vmdk(vm / "web.vmdk", bytes(disk))
    if option == "overlay":
        found = mount(vm, f"overlay={tmp_path}/overlay")
        wide, narrow, shift = "web/disk.raw", "web/partitions/1.raw", 2048 * 512
    else:
        succeed("qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", "web.vmdk",
                vm / "web-000001.vmdk", cwd=vm)  # fmt: skip
        found = mount(vm, option)
        wide, narrow, shift = "web/chain/0.raw", "web/chain/1.raw", 0
        found.allow("open for writing", "reads it")
    readers = [
        (found.ask("open", found.path(name), os.O_RDONLY | direct), moved)
        for name, moved in ((wide, 0), (narrow, shift))
        for direct in (0, os.O_DIRECT)
    ]
    for fd, moved in readers:
        found.ask("pread", fd, MIB, 2 * MIB - moved)
    dice = random.Random(7)
    for flags in (os.O_RDWR, os.O_WRONLY):
        writer = opened(found, wide, flags)
        for _ in range(20):
            size = dice.choice((1, 511, 512, 4096, 5000, 70_000, 300_000))
            at = dice.randrange(2 * MIB, 4 * MIB)
            disk[at : at + size] = data = dice.randbytes(size)
            assert found.ask("pwrite", writer, data, at) == size
            for fd, moved in readers:
                begin = (at - 600) // 512 * 512
                end = begin + (size + 1800) // 512 * 512
                got = found.ask("pread", fd, end - begin, begin - moved)
                assert got == disk[begin:end]
        found.ask("close", writer)


@promise(
    "write-flushed",
    "When fsync has returned, or the close of a file that was open for writing, what was "
    "written before is on the disk of the source, or of the overlay.",
)
@pytest.mark.parametrize("how", ["fsync", "close"])
def test_write_flushed_to_the_overlay(mount: Mounts, base: Path, tmp_path: Path, how: str) -> None:
    found = mount(base, f"overlay={tmp_path}/overlay")
    fd = opened(found, "base/disk.raw")
    found.ask("pwrite", fd, NEW[:MIB], 4096)
    found.ask(how, fd)
    if how == "fsync":
        found.ask("pwrite", fd, NEW[:512], 0)
    os.kill(found.pid, signal.SIGKILL)
    found.ended = True
    again = mount(base, f"overlay={tmp_path}/overlay")
    assert again.read("base/disk.raw", 4096, MIB) == NEW[:MIB]


@pytest.mark.parametrize("how", ["fsync", "close"])
def test_write_flushed_to_the_base(mount: Mounts, base: Path, tmp_path: Path, how: str) -> None:
    calls = tmp_path / "calls"
    spy = f"""
import os
from vddkfs.engines.vmdk.write.base import BaseWriter
flush = BaseWriter.flush
def flushed(self):
    flush(self)
    with open({str(calls)!r}, "a") as told:
        told.write("flushed\\n")
BaseWriter.flush = flushed
"""
    found = start(mount.prepare(base, "rw"), worker=spy)
    fd = opened(found, "base/disk.raw")
    found.ask("pwrite", fd, NEW[:MIB], 4096)
    before = calls.read_text() if calls.exists() else ""
    found.ask(how, fd)
    assert len(calls.read_text()) > len(before)
    assert content(base)[4096:][:MIB] == NEW[:MIB]


@promise(
    "write-size",
    "A disk keeps its size: O_TRUNC is ignored, ftruncate to another size fails with EPERM, and "
    "a write past the end with ENOSPC.",
)
@pytest.mark.parametrize("option", ["rw", "overlay=tmp"])
def test_write_size(mount: Mounts, base: Path, option: str) -> None:
    found = mount(base, option)
    found.expect("a write past its end")
    name = "base/disk.raw"
    found.ask("close", opened(found, name, os.O_WRONLY | os.O_TRUNC))
    assert found.read(name, 0, SIZE) == OLD
    fd = opened(found, name)
    refused(found, errno.EPERM, "ftruncate", fd, 4096)
    refused(found, errno.EPERM, "truncate", found.path(name), 4096)
    found.ask("ftruncate", fd, SIZE)
    assert found.ask("pwrite", fd, NEW[:8192], SIZE - 4096) == 4096
    refused(found, errno.ENOSPC, "pwrite", fd, b"x", SIZE)
    refused(found, errno.ENOSPC, "write", opened(found, name, os.O_WRONLY | os.O_APPEND), b"x")
    assert found.stat(name).st_size == SIZE
    assert found.read(name, 0, SIZE) == OLD[:-4096] + NEW[:4096]


@promise(
    "write-fenced",
    "A worker that is lost while it writes costs time: its writes are made again, and none of "
    "them lands on what was written later.",
)
def test_write_fenced(mount: Mounts, base: Path) -> None:
    found = mount(base, "rw")
    found.expect("ended unexpectedly")
    found.restarts = None
    disk = bytearray(OLD)
    fd = opened(found, "base/disk.raw", os.O_RDWR)
    dice = random.Random(3)
    for number in range(60):
        at = dice.randrange(0, SIZE - 200_000)
        disk[at : at + 200_000] = data = dice.randbytes(200_000)
        agent = found.agent
        agent.send("pwrite", fd, data, at)
        if number % 6 == 0 and (pid := found.worker()["pid"]):
            os.kill(pid, signal.SIGKILL)
        assert agent.receive() == len(data)
    assert found.read("base/disk.raw", 0, SIZE) == disk
    found.finish()
    assert content(base) == disk


@promise(
    "write-lost",
    "A write to a base that fails for another reason than missing space, or a flush that fails, "
    "ends writing to that disk until it is mounted again; everybody who has it open for writing is "
    "told once, and it can still be read.",
)
def test_write_lost(mount: Mounts, base: Path, tmp_path: Path) -> None:
    failing = tmp_path / "failing"
    broken = f"""
import os
from vddkfs.engines.vmdk.write.base import BaseWriter
from vddkfs.errors import EngineError
flush = BaseWriter.flush
def fails(self):
    if os.path.exists({str(failing)!r}):
        raise EngineError("the disk has lost what was written")
    flush(self)
BaseWriter.flush = fails
"""
    found = start(mount.prepare(base, "rw"), worker=broken)
    found.expect("nothing more is written", "flush at offset 0 failed", "write at offset")
    found.allow("lost what was written", "may be lost")
    found.restarts = None
    name = "base/disk.raw"
    writers = [opened(found, name) for _ in range(3)]
    found.ask("pwrite", writers[0], NEW[:4096], 0)
    failing.touch()
    refused(found, errno.EIO, "fsync", writers[0])
    failing.unlink()
    for writer in writers[1:]:
        refused(found, errno.EIO, "fsync", writer)
    for writer in writers:
        refused(found, errno.EIO, "pwrite", writer, b"x" * 512, 0)
    assert found.read(name, MIB, MIB) == OLD[MIB:][:MIB]
    assert found.status()["writes"]["broken"]
    for writer in writers:
        found.ask("close", writer)
    found.finish()
    again = mount(base, "rw")
    put(again, name, NEW[:4096], 0)
    assert again.read(name, 0, 4096) == NEW[:4096]


# Writing the base


@promise(
    "base-only",
    "With rw only chain/0.raw can be written, and disk.raw where the base is the whole chain.",
)
def test_base_only(mount: Mounts, vm: Path, chain: list[Path], base: Path) -> None:
    found = mount(vm, "rw,restore=yes")
    found.expect("cannot be opened: .*only the base of a chain is written")
    files = [name for name in found.ask("tree", str(found.place)) if not name.endswith("/")]
    writable = {"web/chain/0.raw", "base/chain/0.raw", "base/disk.raw"}
    assert writable < set(files)
    for name in files:
        if name in writable:
            put(found, name, b"x" * 512, 0)
        else:
            for flags in (os.O_WRONLY, os.O_RDWR | os.O_DIRECT):
                refused(found, errno.EROFS, "open", found.path(name), flags)
    assert {name for name in files if found.stat(name).st_mode & 0o200} == writable


@promise(
    "base-alone",
    "A base that another process has open for writing is not opened for writing.",
)
def test_base_alone(mount: Mounts, base: Path, tmp_path: Path) -> None:
    first = mount(base, "rw")
    place = tmp_path / "second"
    place.mkdir()
    second = vddkfs("mount", base, place, "-o", "rw")
    assert second.returncode == 15
    assert "another process has it open for writing" in second.stderr
    first.finish()
    again = vddkfs("mount", base, place, "-o", "rw")
    assert again.returncode == 0, again.stderr
    assert vddkfs("umount", place).returncode == 0


@promise(
    "base-content-id",
    "The content id of a base is changed before the first write of a mount, unless links above "
    "it are mounted as well.",
)
def test_base_content_id(mount: Mounts, base: Path, chain: list[Path]) -> None:
    def content_id(path: Path) -> str:
        found = re.search(rb"^CID=(\w+)", path.read_bytes()[:4096], re.M)
        assert found
        return found[1].decode()

    was = {path: content_id(path) for path in (base, chain[0])}
    found = mount(base.parent, "rw,restore=yes")
    kept = [line for line in found.log.read_text().splitlines() if "its content id stays" in line]
    assert len(kept) == 1
    assert " web: " in kept[0]
    put(found, "base/disk.raw", b"", 0)
    assert content_id(base) == was[base]
    put(found, "web/chain/0.raw", b"x", 0)
    put(found, "base/disk.raw", b"x", 0)
    now = content_id(base)
    assert now != was[base]
    put(found, "base/disk.raw", b"y", 0)
    assert content_id(base) == now
    assert content_id(chain[0]) == was[chain[0]]


# Overlays


@promise("overlay-source", "With an overlay nothing is written to the source.")
def test_overlay_source(mount: Mounts, vm: Path, chain: list[Path], base: Path) -> None:
    before = hashes(vm)
    times = {path: os.stat(path).st_mtime_ns for path in before}
    found = mount(vm, "overlay=tmp")
    for name in ("web/disk.raw", "web/chain/0.raw", "web/chain/1.raw", "base/disk.raw"):
        fd = opened(found, name)
        for at in range(0, SIZE, MIB):
            found.ask("pwrite", fd, NEW[at : at + 70_001], at + 77)
        found.ask("fsync", fd)
        found.ask("close", fd)
        assert found.read(name, 77, 70_001) == NEW[:70_001]
    found.finish()
    assert hashes(vm) == before
    assert {path: os.stat(path).st_mtime_ns for path in before} == times


@promise(
    "overlay-forks",
    "What is written to one image of an overlay shows in no other image, and the files in "
    "partitions/ show what was written to disk.raw.",
)
def test_overlay_forks(mount: Mounts, chain: list[Path], vm: Path) -> None:
    found = mount(vm, "overlay=tmp")
    names = [f"web/chain/{number}.raw" for number in range(3)]
    disks = [bytearray(found.read(name, 0, SIZE)) for name in names]
    table = bytearray(512)
    table[446:462] = bytes.fromhex("00000000830000000008000000200000")
    table[510:512] = b"\x55\xaa"
    for number, (name, disk) in enumerate(zip(names, disks, strict=True)):
        data = noise(("fork", number), 100_000)
        put(found, name, data, 2 * MIB + 1000 * number)
        disk[2 * MIB + 1000 * number : 2 * MIB + 1000 * number + len(data)] = data
    put(found, "web/disk.raw", bytes(table), 0)
    disks[2][:512] = table
    for name, disk in zip(names, disks, strict=True):
        for direct in (False, True):
            assert found.read(name, 0, SIZE, direct) == disk
    assert found.read("web/partitions/1.raw", 0, 4 * MIB) == disks[2][MIB:][: 4 * MIB]


@promise(
    "overlay-crash",
    "Whatever ends the daemon, at whatever moment, each 4 KiB of an overlay are then as they "
    "were before a write or after it, and what was flushed is there.",
)
def test_overlay_crash(mount: Mounts, base: Path, tmp_path: Path) -> None:
    flushed = bytearray(OLD)
    for number in range(4):
        found = mount(base, f"overlay={tmp_path}/overlay")
        assert found.read("base/disk.raw", 0, SIZE) == flushed
        dice = random.Random(number)
        fd = opened(found, "base/disk.raw")
        for _ in range(10):
            at = dice.randrange(0, SIZE - 100_000)
            data = dice.randbytes(100_000)
            found.ask("pwrite", fd, data, at)
            flushed[at : at + len(data)] = data
        found.ask("fsync", fd)
        later = bytearray(flushed)
        for _ in range(10):
            at = dice.randrange(0, SIZE // 4096 - 30) * 4096
            data = dice.randbytes(100 * 1024)
            found.ask("pwrite", fd, data, at)
            later[at : at + len(data)] = data
        os.kill(found.pid, signal.SIGKILL)
        found.ended = True
        until(lambda: not (Path("/proc") / str(found.pid)).exists(), what="the daemon's end")  # noqa: B023
        again = mount(base, f"overlay={tmp_path}/overlay")
        now = again.read("base/disk.raw", 0, SIZE)
        for at in range(0, SIZE, 4096):
            assert now[at : at + 4096] in (flushed[at : at + 4096], later[at : at + 4096])
        flushed[:] = now
        again.finish()


@promise(
    "overlay-belongs",
    "An overlay is not used with a source that is not the one that it was made for.",
)
def test_overlay_belongs(mount: Mounts, base: Path, vm: Path, tmp_path: Path) -> None:
    option = f"overlay={tmp_path}/overlay"
    found = mount(vm, option)
    put(found, "base/disk.raw", NEW[:4096], 0)
    found.finish()
    place = tmp_path / "second"
    place.mkdir()
    write(vm / "base-flat.vmdk", MIB, NEW[:512], "raw")
    done = vddkfs("mount", vm, place, "-o", option)
    assert done.returncode == 44
    assert "was modified" in done.stderr
    forced = vddkfs("mount", vm, place, "-o", f"{option},overlay_force=yes")
    assert forced.returncode == 0, forced.stderr
    assert (place / "base/disk.raw").read_bytes()[:4096] == NEW[:4096]
    assert vddkfs("umount", place).returncode == 0


def test_overlay_belongs_also_while_it_is_mounted(mount: Mounts, base: Path, vm: Path) -> None:
    found = mount(vm, "overlay=tmp")
    found.expect("changed under the mount", "cannot be opened: .*the overlay is for")
    found.expect("write at offset 0 failed: .*the source changed after the file was opened")
    found.allow("the kernel may keep old data")
    fd = opened(found, "base/disk.raw")
    found.ask("pwrite", fd, NEW[:4096], 0)
    write(vm / "base-flat.vmdk", MIB, NEW[:512], "raw")
    refused(found, errno.ESTALE, "open", found.path("base/disk.raw"), os.O_RDONLY)
    refused(found, errno.ESTALE, "pwrite", fd, NEW[:4096], 0)


@pytest.mark.parametrize("inside", ["", "sub", "../link/sub"])
def test_no_overlay_below_the_mount_itself(
    vm: Path, base: Path, tmp_path: Path, inside: str
) -> None:
    """It would be hidden by the mount, and every write would fail."""
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    done = vddkfs("mount", vm, place, "-o", f"overlay={place}/{inside}")
    assert done.returncode == 2
    assert "would be hidden by the mount" in done.stderr
    assert not list(place.iterdir())


def test_no_overlay_above_a_base_that_is_being_written(
    mount: Mounts, chain: list[Path], vm: Path, tmp_path: Path
) -> None:
    first = mount(vm, "rw,restore=yes")
    place = tmp_path / "second"
    place.mkdir()
    done = vddkfs("mount", vm, place, "-o", f"overlay={tmp_path}/overlay")
    assert done.returncode == 44
    assert "no overlay on what is being written" in done.stderr
    assert "web.vmdk" in done.stderr
    first.finish()
    done = vddkfs("mount", vm, place, "-o", f"overlay={tmp_path}/overlay")
    assert done.returncode == 0, done.stderr
    assert vddkfs("umount", place).returncode == 0


@promise(
    "overlay-full",
    "Where there is no space for what is written to an overlay the write fails with ENOSPC; "
    "what is in the overlay can be read and written over all the same.",
)
def test_overlay_full(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    make_vmfs(vm / "base.vmdk", bytes(64 * MIB))
    small = tmp_path / "small"
    small.mkdir()
    succeed("mount", "-t", "tmpfs", "-o", f"size={FULL_MIB}m", "tmpfs", small)
    try:
        found = mount(vm, f"overlay={small}/overlay")
        found.expect("no space for more changed blocks")
        fd = opened(found, "base/disk.raw")
        disk = bytearray()
        while len(disk) < 64 * MIB:
            data = noise(len(disk), MIB)
            try:
                assert found.ask("pwrite", fd, data, len(disk)) == MIB
            except OSError as error:
                failed = error.errno
                break
            disk += data
        else:
            pytest.fail("there was space for all of it")
        assert failed == errno.ENOSPC
        assert len(disk) >= 4 * MIB
        for at in range(0, len(disk), MIB):
            disk[at : at + 4096] = data = noise(("again", at), 4096)
            assert found.ask("pwrite", fd, data, at) == 4096
        found.ask("fsync", fd)
        assert found.read("base/disk.raw", 0, len(disk)) == disk
        found.finish()
    finally:
        done = run("umount", small)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("sync", [os.O_DSYNC, os.O_SYNC], ids=["dsync", "sync"])
def test_overlay_crash_after_a_synchronous_write(
    mount: Mounts, base: Path, tmp_path: Path, how: int, sync: int
) -> None:
    """Who opened the file for synchronous writes needs no fsync."""
    found = mount(base, f"overlay={tmp_path}/overlay")
    fd = opened(found, "base/disk.raw", os.O_RDWR | how | sync)
    assert found.ask("pwrite", fd, NEW[:MIB], MIB) == MIB
    os.kill(found.pid, signal.SIGKILL)
    found.ended = True
    until(lambda: not (Path("/proc") / str(found.pid)).exists(), what="the daemon's end")
    again = mount(base, f"overlay={tmp_path}/overlay")
    assert again.read("base/disk.raw", MIB, MIB) == NEW[:MIB]
    again.finish()
