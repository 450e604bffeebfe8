"""A change of the source under the mount: what frozen links and a live leaf show after it."""

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.mounting import sha256, until
from tests.end_to_end.remote import CHAIN, PLAIN, Proxy, RemoteMount
from tests.end_to_end.vms import KIB, SECTOR, noise, write
from tests.simulator.disks import SIZE, make_vmdk, make_vmfs, raw

DISK = "web01/disk.raw"
LEAF = CHAIN[2].partition("@")[0]
CHANGED = r"link \d \(.*\) changed under the mount"


def lose_worker(mount: RemoteMount) -> None:
    """Kill the idle worker; the next reader makes a new one open the disk."""
    pid = mount.worker_at(-1)["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: mount.worker_at(-1)["pid"] != pid, what="the loss to be noticed")
    mount.restarts = 1
    mount.expect("ended unexpectedly")


def attempt_stale(mount: RemoteMount, fd: int, offset: int) -> None:
    mount.allow(f"read at offset {offset} failed: .* the source changed after the file was opened")
    with pytest.raises(OSError, match=r"[Ss]tale") as caught:
        mount.ask("pread", fd, 4096, offset)
    assert caught.value.errno == errno.ESTALE


def consolidate(proxy: Proxy, data: bytes) -> None:
    """Put a whole disk in the place of the last link."""
    path = proxy.kit.disk(LEAF)
    new = make_vmdk(path.with_name("new.vmdk"), data)
    new.rename(path)


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_consolidation_of_a_frozen_chain(proxy: Proxy, direct: bool) -> None:
    """It is another disk at the next open of its handle: open files are stale, new ones right."""
    found = proxy.mount(CHAIN[2], options=("transports=nbd",))
    name = "web01-000002/disk.raw"
    fd = found.open(name, direct)
    assert found.ask("pread", fd, 4096, 0) == proxy.raw(CHAIN[2])[:4096]
    data = noise("restored", SIZE)
    consolidate(proxy, data)
    lose_worker(found)
    found.expect(CHANGED)
    attempt_stale(found, fd, 2 * 1024 * KIB)
    assert found.sha256(name, direct) == sha256(data)
    assert found.sha256(name, not direct) == sha256(data)
    attempt_stale(found, fd, 0)


def test_change_while_the_disk_is_closed(proxy: Proxy) -> None:
    """The same where the idle disk was closed, and its worker opens it again."""
    options = ("transports=nbd", "idle_close=0.2", "keepalive=never")
    found = proxy.mount(CHAIN[2], options=options)
    name = "web01-000002/disk.raw"
    fd = found.open(name, direct=True)
    assert found.ask("pread", fd, 4096, 0) == proxy.raw(CHAIN[2])[:4096]
    until(lambda: len(proxy.kit.events("logout")) >= 2, what="the disk to be closed")
    data = noise("restored", SIZE)
    consolidate(proxy, data)
    found.restarts = None
    found.expect(CHANGED)
    found.allow("lost its connection")
    attempt_stale(found, fd, 1024 * KIB)
    assert found.sha256(name, True) == sha256(data)


def test_another_disk_by_its_uuid(proxy: Proxy) -> None:
    found = proxy.mount(PLAIN, moref="vm-17", options=("transports=nbd",))
    fd = found.open("plain/disk.raw")
    assert found.ask("pread", fd, 4096, 0) == proxy.raw(PLAIN)[:4096]
    path = proxy.kit.disk(PLAIN.partition("@")[0])
    data = noise("another", SIZE)
    make_vmfs(path, data)
    path.write_text(path.read_text().replace("11 22 33 44", "44 33 22 11"))
    lose_worker(found)
    found.expect(CHANGED)
    attempt_stale(found, fd, 2 * 1024 * KIB)
    assert found.sha256("plain/disk.raw") == sha256(data)


def test_another_size_is_not_shown(proxy: Proxy) -> None:
    found = proxy.mount(PLAIN, moref="vm-17", options=("transports=nbd",))
    fd = found.open("plain/disk.raw", direct=True)
    assert found.ask("pread", fd, 4096, 0)
    make_vmfs(proxy.kit.disk(PLAIN.partition("@")[0]), noise("larger", SIZE + 128 * SECTOR))
    lose_worker(found)
    found.expect(CHANGED)
    found.expect(r"read at offset 4096 failed: .* the capacity of \[ds1\] plain/plain.vmdk was")
    attempt_stale(found, fd, 4096)
    make_vmfs(proxy.kit.disk(PLAIN.partition("@")[0]), noise("back", SIZE))
    found.restarts = None
    assert found.sha256("plain/disk.raw") == sha256(noise("back", SIZE))


def live(proxy: Proxy, *options: str) -> RemoteMount:
    found = proxy.mount(*CHAIN[:2], LEAF, options=("transports=nbd", *options))
    found.map_known("web01")
    return found


def write_leaf(proxy: Proxy, offset: int, data: bytes) -> bytes:
    """Have the owner write; return what qemu-img reads after it."""
    path: Path = proxy.kit.disk(LEAF)
    write(path, offset, data)
    return raw(path)


def holes_of(data: bytes) -> int:
    """Return the offset of a grain that is all zeros."""
    return next(n for n in range(0, SIZE - 64 * KIB, 64 * KIB) if not any(data[n : n + 64 * KIB]))


def test_live_leaf_shows_at_open_what_its_owner_wrote(proxy: Proxy) -> None:
    found = live(proxy)
    before = proxy.raw(CHAIN[2])
    assert found.sha256(DISK) == sha256(before)
    for number, offset in enumerate((holes_of(before), 64 * KIB, SIZE - SECTOR)):
        after = write_leaf(proxy, offset, noise(("owner", number), SECTOR))
        assert sha256(after) != sha256(before)
        assert found.sha256(DISK) == sha256(after)
        assert found.sha256(DISK, True) == sha256(after)
        before = after
    # The links below are as they were, and came from the cache or not.
    for number in (0, 1):
        assert found.sha256(f"web01/chain/{number}.raw") == sha256(proxy.raw(CHAIN[number]))


def test_open_file_of_a_live_leaf_goes_on(proxy: Proxy) -> None:
    """Writes of the owner are no other disk: nothing is stale."""
    found = live(proxy)
    fd = found.open(DISK)
    before = proxy.raw(CHAIN[2])
    assert found.ask("pread", fd, 4096, 0) == before[:4096]
    after = write_leaf(proxy, 0, noise("owner", 4096))
    again = found.open(DISK)
    assert found.ask("pread", again, 4096, 0) == after[:4096]
    assert found.ask("pread", fd, 4096, 8192) == after[8192:12288]
    lose_worker(found)
    assert found.ask("pread", again, 4096, 0) == after[:4096]
    assert found.sha256(DISK, True) == sha256(after)


def test_live_leaf_that_becomes_another_disk(proxy: Proxy) -> None:
    found = live(proxy)
    fd = found.open(DISK, direct=True)
    assert found.ask("pread", fd, 4096, 0)
    data = noise("restored", SIZE)
    consolidate(proxy, data)
    found.expect(CHANGED)
    # Without a restart: every open looks.
    assert found.sha256(DISK) == sha256(data)
    attempt_stale(found, fd, 0)


def test_loop_device_on_a_frozen_image(proxy: Proxy, loops: None) -> None:
    found = proxy.mount(*CHAIN)
    found.map_known("web01")
    words = ("losetup", "--find", "--show", "--read-only", found.path("web01/chain/2.raw"))
    device = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    try:
        assert sha256(Path(device.strip()).read_bytes()) == sha256(proxy.raw(CHAIN[2]))
    finally:
        subprocess.run(["losetup", "-d", device.strip()], check=True, timeout=20)
