"""Old content is dropped on demand: by ``vddkfs invalidate``, by SIGHUP, and named above the mount.

Each test shows first that something old is kept, and where.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.mounting import (
    COMMAND,
    Done,
    Mount,
    Mounts,
    alive,
    mounted,
    run,
    stopped,
    succeed,
    until,
    vddkfs,
)
from tests.end_to_end.remote import PLAIN, Proxy
from tests.end_to_end.vms import KIB, MIB, SECTOR, make_delta, make_vmfs, noise, write

SIZE = 8 * MIB
START = 2048 * SECTOR
"""Where the one partition begins."""
OLD, NEW = noise("old", SIZE), noise("new", SIZE)
DISK, PART = "web/disk.raw", "web/partitions/1.raw"


def make_disk(vm: Path, name: str = "web", content: bytes = OLD) -> Path:
    """Make a flat disk with a partition; return the file with its content."""
    make_vmfs(vm / f"{name}.vmdk", content)
    flat = vm / f"{name}-flat.vmdk"
    script = f"label: dos\nstart={START // SECTOR}, type=83\n"
    succeed("sfdisk", "-q", flat, input=script, stdin=None)
    return flat


def overwrite(flat: Path, content: bytes, offset: int = MIB) -> None:
    """Write behind the mount's back; what is before *offset* stays."""
    with open(flat, "r+b") as file:
        file.seek(offset)
        file.write(content[offset:])


class Held:
    """A file that was read to its end, and is kept open; it holds old content in the kernel."""

    def __init__(self, mount: Mount, name: str, start: int = 0) -> None:
        self.mount = mount
        self.fd = mount.open(name)
        self.start = start
        mount.ask("pread", self.fd, SIZE, 0)

    def shows(self, content: bytes, offset: int, size: int = 4 * KIB) -> bool:
        """Say whether the disk's bytes from *offset* on are those of *content* in this file."""
        found = self.mount.ask("pread", self.fd, size, offset - self.start)
        assert found in (OLD[offset:][:size], NEW[offset:][:size])
        return bool(found == content[offset:][:size])


def steps(done: Done) -> list[dict[str, Any]]:
    """Return all steps of what `vddkfs invalidate --json` printed."""
    found: list[dict[str, Any]] = []
    for one in json.loads(done.stdout)["mounts"]:
        found += one["steps"]
    return found


def invalidate(*words: str | Path, code: int = 0, **keys: Any) -> Done:
    """Run the command, which has to end with *code*."""
    done = vddkfs("invalidate", *words, **keys)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


# Places 1 to 5


@pytest.mark.parametrize("name", ["", "web", DISK, "web/chain/0.raw", "web/chain", PART])
def test_files_that_are_open_show_what_is_there_now(mount: Mounts, vm: Path, name: str) -> None:
    flat = make_disk(vm)
    found = mount(vm)
    found.map_known("web")
    files = [Held(found, DISK), Held(found, PART, START)]
    overwrite(flat, NEW)
    # The trap: the kernel answers, and below it the sector cache does.
    for file in files:
        assert file.shows(OLD, 2 * MIB)
        found.ask("drop_cache", file.fd)
        assert file.shows(OLD, 3 * MIB)
    done = invalidate(found.path(name))
    assert done.stderr == ""
    for file in files:
        for offset in range(MIB, SIZE, 256 * KIB):
            assert file.shows(NEW, offset)
    places = [text.split()[0] for text in done.stdout.splitlines()]
    assert places == sorted(places, key=["device", "library", "tables", "cache", "kernel"].index)
    assert {"tables", "cache", "kernel"} <= set(places)


def test_a_range_is_new_and_the_rest_may_stay(mount: Mounts, vm: Path) -> None:
    flat = make_disk(vm)
    found = mount(vm)
    files = [Held(found, DISK), Held(found, PART, START)]
    overwrite(flat, NEW)
    invalidate(found.path(DISK), "--range", "3M:6000")
    for file in files:
        assert file.shows(NEW, 3 * MIB, 8 * KIB)
        assert file.shows(OLD, 3 * MIB + 8 * KIB)
        assert file.shows(OLD, 3 * MIB - 4 * KIB)
    # The same by the partition's own offsets.
    invalidate(found.path(PART), "--range", f"{5 * MIB - START}:4096")
    for file in files:
        assert file.shows(NEW, 5 * MIB)
        assert file.shows(OLD, 5 * MIB + 4 * KIB)
        assert file.shows(OLD, 6 * MIB)


def test_a_memory_map_shows_what_is_there_now(mount: Mounts, vm: Path) -> None:
    flat = make_disk(vm)
    found = mount(vm)
    fd = os.open(found.path(DISK), os.O_RDONLY)
    script = (
        "import mmap, sys\nview = mmap.mmap(0, 0, prot=mmap.PROT_READ)\n"
        "for _ in sys.argv[1:]:\n"
        "    print(view[3145728:3145736].hex(), flush=True)\n    open(sys.argv[1]).read()\n"
    )
    pipe = vm / "pipe"
    os.mkfifo(pipe)
    command = ["python3", "-c", script, str(pipe), "again"]
    with subprocess.Popen(command, stdin=fd, stdout=subprocess.PIPE, text=True) as process:
        os.close(fd)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == OLD[3 * MIB :][:8].hex()
        overwrite(flat, NEW)
        invalidate(found.place)
        pipe.write_text("go on")
        assert process.stdout.readline().strip() == NEW[3 * MIB :][:8].hex()
        process.kill()


def test_a_frozen_link_that_changed_is_stale_as_at_an_open(mount: Mounts, vm: Path) -> None:
    flat = make_disk(vm)
    make_delta(vm / "web-1.vmdk", "web.vmdk")
    found = mount(vm)
    file = Held(found, DISK)
    overwrite(flat, NEW)
    assert file.shows(OLD, 2 * MIB)
    found.expect(r"changed under the mount", r"the source changed after the file was opened")
    invalidate(found.place)
    assert found.attempt(errno.ESTALE, "pread", file.fd, 4096, 2 * MIB) is None
    assert found.read(DISK, 2 * MIB, 4096) == NEW[2 * MIB :][:4096]


def test_a_remote_disk_is_opened_anew(proxy: Proxy) -> None:
    found = proxy.mount(PLAIN, moref="vm-17", options=("transports=nbd",))
    fd = found.open("plain/disk.raw")
    old = proxy.raw(PLAIN)
    assert found.ask("pread", fd, 64 * KIB, MIB) == old[MIB:][: 64 * KIB]
    write(proxy.kit.disk(PLAIN.partition("@")[0]), MIB, noise("new", 64 * KIB))
    assert found.ask("pread", fd, 64 * KIB, MIB) == old[MIB:][: 64 * KIB]
    opened = len(proxy.kit.events("open"))
    taken = steps(invalidate(found.place, "--json"))
    assert len(proxy.kit.events("open")) > opened
    places = [step["place"] for step in taken]
    assert places == sorted(places, key=["device", "library", "tables", "cache", "kernel"].index)
    assert "library" in places
    assert found.ask("pread", fd, 64 * KIB, MIB) == noise("new", 64 * KIB)


def test_several_mounts_and_paths_of_all_kinds(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    flat = make_disk(vm)
    first, second = mount(vm), mount(vm)
    files = [Held(first, DISK), Held(second, DISK)]
    overwrite(flat, NEW)
    (tmp_path / "link").symlink_to(first.place)
    words = ("link/web/../web/disk.raw", f"{second.place.name}/./web/disk.raw/../chain/")
    done = invalidate(*words, "--json", cwd=tmp_path)
    places = [one["mountpoint"] for one in json.loads(done.stdout)["mounts"]]
    assert places == [str(first.place), str(second.place)]
    assert all(step["done"] for step in steps(done))
    assert all(file.shows(NEW, 2 * MIB) for file in files)


def test_what_is_not_there_is_told_in_one_line(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    make_disk(vm)
    found = mount(vm)
    cases = {
        found.path("web/none.raw"): (2, "web/none.raw: no such file in the mount"),
        found.path("vm.json"): (2, "made anew at each open"),
        str(tmp_path): (30, f"{tmp_path}: not in a vddkfs mount"),
        str(tmp_path / "none"): (30, "no such file"),
    }
    for path, (code, text) in cases.items():
        done = invalidate(path, code=code)
        (line,) = done.stderr.splitlines()
        assert text in line
        assert done.stdout == ""
    assert found.umount().returncode == 0
    assert "not in a vddkfs mount" in invalidate(found.place, code=30).stderr


def test_the_mount_is_not_touched(mount: Mounts, vm: Path) -> None:
    """A stat of anything in it would wait for a daemon that stands still."""
    make_disk(vm)
    found = mount(vm)
    with stopped(found.pid):
        done = invalidate(found.path(DISK), code=30, timeout=40)
    assert "does not answer" in done.stderr
    invalidate(found.path(DISK))


# What hangs


def test_a_disk_that_hangs_keeps_no_other_waiting(mount: Mounts, vm: Path) -> None:
    hung, well = make_disk(vm, "hung"), make_disk(vm, "well")
    found = mount(vm, "op_timeout=5")
    found.restarts = 1
    found.allow(r"worker of hung", "sent again")
    file = Held(found, "well/disk.raw")
    found.open("hung/disk.raw")
    other = found.open("hung/disk.raw")
    for flat in (hung, well):
        overwrite(flat, NEW)
    with stopped(found.worker(0)["pid"]):
        command = [str(COMMAND), "invalidate", str(found.place), "--json"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        began = time.monotonic()
        process = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
        until(lambda: file.shows(NEW, 2 * MIB), 4, what="the disk that is well")
        assert process.poll() is None
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 40
    assert "waiting for hung: " in err
    taken = [step for one in json.loads(out)["mounts"] for step in one["steps"]]
    assert all(step["done"] for step in taken if "well" in step["subject"])
    # The worker that did not answer was replaced: its successor knows nothing of before.
    assert process.returncode == 0, (out, err)
    assert found.ask("pread", other, 4096, 2 * MIB) == NEW[2 * MIB :][:4096]


# SIGHUP


def test_sighup_drops_everything_and_logs_it(mount: Mounts, vm: Path) -> None:
    flat = make_disk(vm)
    found = mount(vm)
    file = Held(found, DISK)
    overwrite(flat, NEW)
    assert file.shows(OLD, 2 * MIB)
    os.kill(found.pid, signal.SIGHUP)
    until(lambda: file.shows(NEW, 2 * MIB), what="the new content")
    until(lambda: " INFO kernel: web/chain/0.raw: dropped" in found.log.read_text(), what="the log")
    for _ in range(5):
        os.kill(found.pid, signal.SIGHUP)
    asking = [threading.Thread(target=invalidate, args=(found.place,)) for _ in range(3)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert alive(found.pid)
    assert mounted(found.place)
    assert file.shows(NEW, 3 * MIB)


def test_sighup_in_the_foreground_ends_nothing(mount: Mounts, vm: Path) -> None:
    make_disk(vm)
    found = mount.prepare(vm)
    command = [str(COMMAND), "mount", "-f", str(vm), str(found.place)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: vddkfs("status", found.place).returncode == 0, what="the mount")
            process.send_signal(signal.SIGHUP)
            assert found.read(DISK, 2 * MIB, 4096) == OLD[2 * MIB :][:4096]
            assert process.poll() is None
            found.close_agent()
            assert found.umount().returncode == 0
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
            found.destroy()
    assert process.returncode == 0
    assert "SIGHUP: everything that is kept" in said


# Above the mount


Attach = Callable[..., str]


@pytest.fixture
def attach(loops: None) -> Iterator[Attach]:
    """Make loop devices; detached before the mount below them goes."""
    with contextlib.ExitStack() as stack:

        def attaching(file: str, *words: str) -> str:
            device = succeed("losetup", "--find", "--show", "--read-only", *words, file)
            name = device.stdout.strip()
            stack.callback(succeed, "losetup", "--detach", name)
            return name

        yield attaching


def test_a_loop_device_is_named_and_flushed_on_demand(
    mount: Mounts, vm: Path, attach: Attach
) -> None:
    flat = make_disk(vm)
    found = mount(vm)
    part = attach(found.path(DISK), "--offset", str(4 * MIB), "--sizelimit", str(2 * MIB))
    whole = attach(found.path(DISK), "--partscan")
    device = Held(found, whole)
    overwrite(flat, NEW)

    done = invalidate(found.path(DISK), code=3)
    assert device.shows(OLD, 2 * MIB), "the trap: it has pages of its own"
    (line,) = done.stderr.splitlines()
    assert whole in line
    assert part in line
    assert "--loops" in line
    assert re.search(rf"^loop +{whole} .*{found.path(DISK)}", done.stdout, re.M)

    done = invalidate(found.path(DISK), "--loops")
    assert device.shows(NEW, 2 * MIB)
    assert done.stderr == ""
    assert len(re.findall(r"^loop .*: flushed$", done.stdout, re.M)) >= 2

    # Only those that show any of it.
    done = invalidate(found.path(DISK), "--range", "1M:64K", code=3)
    assert part not in done.stdout
    assert whole in done.stdout
    done = invalidate(found.path("web/chain/0.raw"), "--range", "5M:64K", "--loops")
    assert part in done.stdout
    found.ask("close", device.fd)


def test_a_loop_device_on_what_became_another_disk_is_named(
    mount: Mounts, vm: Path, attach: Attach
) -> None:
    """The kernel was told to forget the name of its file, and calls it deleted."""
    flat = make_disk(vm)
    make_delta(vm / "web-1.vmdk", "web.vmdk")
    found = mount(vm)
    loops = [attach(found.path(name)) for name in (DISK, PART)]
    overwrite(flat, NEW)
    found.expect("changed under the mount")
    # Whoever looks at a loop device that has just come, or goes, meets ESTALE.
    found.allow("the source changed after the file was opened")
    for _ in range(2):
        done = invalidate(found.place, "--json", code=3)
        (one,) = json.loads(done.stdout)["mounts"]
        named = {(reader["device"], reader["file"]) for reader in one["readers"]}
        assert named == set(zip(loops, (found.path(DISK), found.path(PART)), strict=True))


def guest_image(tmp_path: Path, content: bytes) -> bytes:
    """Return an ext4 that has *content* in the file ``blob``."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("absent: mkfs.ext4 (package e2fsprogs)")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/blob").write_bytes(content)
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    succeed("mkfs.ext4", "-q", "-d", tmp_path / "files", image)
    return image.read_bytes()


@pytest.fixture
def guest(loops: None, tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """Mount a guest's file system; taken down before the mount below it."""
    place = tmp_path / "guest"
    place.mkdir()

    def mounting(device: str, options: str) -> Path:
        succeed("mount", "-o", options, device, place)
        return place

    yield mounting
    while mounted(place):
        succeed("umount", place)


def test_a_mounted_guest_may_show_old_files_until_it_is_mounted_again(
    mount: Mounts, vm: Path, tmp_path: Path, guest: Callable[[str, str], Path]
) -> None:
    old, new = noise("file", 256 * KIB), noise("file then", 256 * KIB)
    image = guest_image(tmp_path, old)
    offset = image.index(old[:4096])
    assert image[offset:].startswith(old), "in one piece"
    make_vmfs(vm / "web.vmdk", image)
    found = mount(vm)
    place = guest(found.path(DISK), "ro,loop,noload")
    blob = str(place / "blob")
    # Otherwise they might go because the kernel wants their memory.
    found.ask("hold_pages", blob)
    assert found.ask("content", blob) == old
    with open(vm / "web-flat.vmdk", "r+b") as file:
        file.seek(offset)
        file.write(new)
    for words in ([], ["--loops"]):
        done = invalidate(found.place, *words, code=3)
        (line,) = done.stderr.splitlines()
        assert str(place) in line
        assert "unmount" in line
        assert re.search(rf"^loop +{place} .*ext4 on /dev/loop", done.stdout, re.M)
        assert found.ask("content", blob) == old, "the trap: the guest's own pages"
    found.ask("release_pages")
    found.expect(f"loop: {place}: not done", "loop: /dev/loop")
    os.kill(found.pid, signal.SIGHUP)
    until(lambda: found.loud(), what="the log")
    succeed("umount", place)
    guest(found.path(DISK), "ro,loop,noload")
    assert found.ask("content", blob) == new
    succeed("umount", place)
    invalidate(found.place)


def test_a_guest_on_a_mapped_device_is_found(
    mount: Mounts, vm: Path, tmp_path: Path, attach: Attach, guest: Callable[[str, str], Path]
) -> None:
    if shutil.which("dmsetup") is None or run("dmsetup", "version").returncode:
        pytest.skip("absent: the device mapper")
    make_vmfs(vm / "web.vmdk", guest_image(tmp_path, b"x"))
    found = mount(vm)
    loop = attach(found.path(DISK))
    name = f"vddkfs-test-{os.getpid()}"
    lines = f"0 {SIZE // SECTOR} linear {loop} 0"
    if run("dmsetup", "create", "--readonly", name, "--table", lines).returncode:
        pytest.skip("absent: mapped devices in this kernel")
    try:
        node = succeed("dmsetup", "info", "-c", "--noheadings", "-o", "blkdevname", name)
        mapped = f"/dev/{node.stdout.strip()}"
        place = guest(mapped, "ro,noload")
        done = invalidate(found.path("web"), "--loops", code=3)
        assert re.search(rf"^loop +{mapped} .*above {loop}: flushed", done.stdout, re.M)
        assert re.search(rf"^loop +{place} .*ext4 on {mapped}", done.stdout, re.M)
        succeed("umount", place)
        invalidate(found.path("web"), "--loops")
    finally:
        while mounted(tmp_path / "guest"):
            succeed("umount", tmp_path / "guest")
        succeed("dmsetup", "remove", name)


def test_a_btrfs_guest_is_found_by_its_source(
    mount: Mounts, vm: Path, tmp_path: Path, guest: Callable[[str, str], Path]
) -> None:
    if shutil.which("mkfs.btrfs") is None or "btrfs" not in Path("/proc/filesystems").read_text():
        pytest.skip("absent: btrfs")
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(128 * MIB)
    succeed("mkfs.btrfs", "-q", image)
    make_vmfs(vm / "web.vmdk", image.read_bytes())
    found = mount(vm)
    place = guest(found.path(DISK), "ro,loop")
    done = invalidate(found.place, "--loops", code=3)
    assert re.search(rf"^loop +{place} .*btrfs on /dev/loop", done.stdout, re.M)
