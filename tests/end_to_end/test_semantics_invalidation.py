"""The promises of vddkfs-semantics(7), each held by a test of its name: dropping old content on
demand.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.freshness import Gate, invalidate, overwrite, promise, start
from tests.end_to_end.mounting import COMMAND, Mount, Mounts, mounted, succeed, until
from tests.end_to_end.vms import MIB, SECTOR, make_delta, make_vmfs, noise
from vddkfs.control import ask

SIZE = 4 * MIB
OLD, NEW = noise("old", SIZE), noise("new", SIZE)
DISK = "web/disk.raw"


@pytest.fixture
def flat(vm: Path) -> Path:
    """Make a live disk; return the file that has its content."""
    make_vmfs(vm / "web.vmdk", OLD)
    return vm / "web-flat.vmdk"


def held_old(mount: Mount, flat: Path, name: str = DISK) -> int:
    """Return an open file of which old content is kept: its source has become new."""
    fd = mount.open(name)
    assert mount.ask("pread", fd, SIZE, 0) == OLD
    overwrite(flat, 0, NEW)
    assert mount.ask("pread", fd, SIZE, 0) == OLD
    return fd


@promise(
    "invalidate",
    "When vddkfs invalidate has ended with exit code 0, reads that begin later return nothing of "
    "what it named that was old when it began.",
)
@pytest.mark.parametrize("name", ["", DISK])
def test_invalidate(mount: Mounts, vm: Path, flat: Path, name: str) -> None:
    found = mount(vm)
    fd = held_old(found, flat)
    done = invalidate(found.path(name))
    assert "web/chain/0.raw" in done.stdout
    assert done.stderr == ""
    assert found.ask("pread", fd, SIZE, 0) == NEW
    assert found.ask("mapped", found.path(DISK), False, [(0, SIZE)]) == [NEW]


@promise(
    "invalidate-range",
    "With --range that holds for the named bytes; others may still be answered from memory.",
)
def test_invalidate_range(mount: Mounts, vm: Path, flat: Path) -> None:
    found = mount(vm)
    fd = held_old(found, flat)
    invalidate(found.path(DISK), "--range", f"{2 * MIB}:8192")
    data = found.ask("pread", fd, SIZE, 0)
    assert data[2 * MIB :][:8192] == NEW[2 * MIB :][:8192]
    for at in range(0, SIZE, 4096):
        assert data[at : at + 4096] in (OLD[at : at + 4096], NEW[at : at + 4096])
    assert data != NEW


@promise(
    "invalidate-flight",
    "A read that was under way during an invalidation may return old bytes to whoever asked for "
    "it, and leaves nothing old behind.",
)
def test_invalidate_flight(mount: Mounts, vm: Path, flat: Path, tmp_path: Path) -> None:
    """The read is held where it has old bytes already; the invalidation waits for it there."""
    gate = Gate(tmp_path / "gate")
    at = 2 * MIB // SECTOR
    there = f"arguments[1] <= {at} < arguments[1] + arguments[2]"
    found = start(mount.prepare(vm, "readahead=0"), worker=gate.of("read", there))
    fd = found.open(DISK)
    gate.close()
    found.agent.send("pread", fd, 4096, 2 * MIB)
    gate.wait()
    overwrite(flat, 0, NEW)
    command = [str(COMMAND), "invalidate", found.path(DISK)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as invalidation:
        try:
            until(lambda: ask(str(found.place), "invalidating")["waiting"], what="the invalidation")
            assert found.agent.waiting(0)
            gate.open()
            # The kernel may have dropped what came before its reader was awake, and asked again.
            assert found.agent.receive() in (OLD[2 * MIB :][:4096], NEW[2 * MIB :][:4096])
            assert invalidation.wait(20) == 0
        finally:
            invalidation.kill()
    assert found.ask("pread", fd, 4096, 2 * MIB) == NEW[2 * MIB :][:4096]
    assert found.ask("pread", fd, SIZE, 0) == NEW


@promise(
    "invalidate-told",
    "What could not be dropped is named, with the reason, and the exit code is not 0.",
)
def test_invalidate_told(mount: Mounts, vm: Path, flat: Path) -> None:
    found = mount(vm)
    fd = held_old(found, flat)
    flat.rename(vm / "moved")
    done = invalidate(found.path(DISK), code=42)
    assert done.stdout.startswith("library ")
    assert "web-flat.vmdk: is missing" in done.stdout.splitlines()[0]
    [line] = done.stderr.splitlines()
    assert "old content may be left" in line
    assert "web-flat.vmdk: is missing" in line
    (vm / "moved").rename(flat)
    invalidate(found.path(DISK))
    assert found.ask("pread", fd, SIZE, 0) == NEW


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Undo what is put on a mount, before that goes."""
    with contextlib.ExitStack() as undo:
        yield undo


@promise(
    "invalidate-guests",
    "Loop devices and file systems on the named files are named, --loops flushes the devices, and "
    "the exit code is 3 while a mounted file system may hold old data.",
)
def test_invalidate_guests(
    loops: None, mount: Mounts, vm: Path, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("absent: mkfs.ext4 (package e2fsprogs)")
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    succeed("mkfs.ext4", "-q", image)
    make_vmfs(vm / "web.vmdk", image.read_bytes())
    found = mount(vm)
    device = succeed("losetup", "--find", "--show", "--read-only", found.path(DISK)).stdout.strip()
    stack.callback(succeed, "losetup", "--detach", device)
    fd = found.ask("open", device, os.O_RDONLY)
    stack.callback(found.close_agent)
    kept = found.ask("pread", fd, 4096, 3 * MIB)
    overwrite(vm / "web-flat.vmdk", 3 * MIB, NEW[:4096])

    done = invalidate(found.path(DISK), code=3)
    assert device in done.stderr
    assert found.ask("pread", fd, 4096, 3 * MIB) == kept
    done = invalidate(found.path(DISK), "--loops")
    assert f"{device} " in done.stdout
    assert found.ask("pread", fd, 4096, 3 * MIB) == NEW[:4096]

    place = tmp_path / "guest"
    place.mkdir()
    succeed("mount", "-o", "ro,noload", device, place)
    stack.callback(lambda: mounted(place) and succeed("umount", place))
    for words in ([], ["--loops"]):
        done = invalidate(found.path(DISK), *words, code=3)
        assert str(place) in done.stderr
        assert f"{place} " in done.stdout
    succeed("umount", place)
    invalidate(found.path(DISK), "--loops")


@promise(
    "hangup",
    "SIGHUP has the daemon do the same for the whole mount, and write what it did to its log.",
)
def test_hangup(mount: Mounts, vm: Path, flat: Path) -> None:
    make_vmfs(vm / "other.vmdk", OLD)
    make_delta(vm / "other-1.vmdk", "other.vmdk")
    found = mount(vm)
    fd = held_old(found, flat)
    os.kill(found.pid, signal.SIGHUP)
    names = ("web/chain/0.raw", "other/chain/0.raw", "other/chain/1.raw")
    lines = [f"INFO {place}: {name}: " for place in ("cache", "kernel") for name in names]
    until(lambda: all(line in found.log.read_text() for line in lines), what="the log")
    assert found.ask("pread", fd, SIZE, 0) == NEW
