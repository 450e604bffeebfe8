"""Writing through VDDK, from end to end: refusals, parallel writes, and losses that are told."""

import errno
import os
import signal

import pytest

from tests.end_to_end.mounting import children, stopped, until
from tests.end_to_end.remote import BIG, CHAIN, MIB, Proxy, RemoteMount, workers
from tests.end_to_end.storms import ENDED
from tests.end_to_end.vms import KIB, noise, raw
from tests.end_to_end.writing import no_mount, not_writable, opened, put, refused

LIVE = BIG.partition("@")[0]
FILE = "big/chain/0.raw"
HASTE = ("retry_budget=2", "fence_timeout=1")
OFF = "assume=powered-off"
SIZE = 4 * MIB
OLD = noise("old", SIZE)
NEW = noise("new", SIZE)
THREADS = 8
LATENCY_MS = 100


@pytest.fixture
def big(proxy: Proxy) -> Proxy:
    """Return a proxy whose vm-20 has one flat disk, and is powered off."""
    proxy.make_big(OLD)
    return proxy


def writing(proxy: Proxy, *options: str) -> RemoteMount:
    return proxy.mount(LIVE, moref="vm-20", options=("transports=nbd", "rw", OFF, *options))


def on_disk(proxy: Proxy) -> bytes:
    return raw(proxy.kit.site / "ds1/big/big.vmdk")


# Refusals.


def test_a_vm_that_may_be_running_is_not_written(big: Proxy) -> None:
    options = big.options("transports=nbd", "rw")
    code, line = no_mount(big.mounts, big.url(LIVE, moref="vm-20"), *options)
    assert code == 2
    assert "only if its virtual machine is known to be powered off, and nobody said so" in line
    assert "mount with assume=powered-off" in line
    assert not big.kit.events("open")


def test_a_base_that_a_snapshot_holds_is_not_written_unasked(big: Proxy) -> None:
    found = big.mount(BIG, moref="vm-20", options=("transports=nbd", "rw", OFF))
    found.expect("big is only read: .*big.vmdk: .*snapshot.*restore=yes writes it nevertheless")
    not_writable(found, FILE, "big/disk.raw")
    assert found.content(FILE) == OLD


def test_links_above_the_base_are_not_written(proxy: Proxy) -> None:
    refusing = proxy.mount(*CHAIN, options=("transports=nbd", "rw", OFF))
    refusing.expect("web01 is only read: .*links lie above it.*restore=yes")
    not_writable(refusing, "web01/chain/0.raw")
    refusing.finish()
    found = proxy.mount(*CHAIN, options=("transports=nbd", "rw", "restore=yes", OFF))
    found.expect("web01/chain/[12].raw cannot be opened: .*only the base of a chain is written")
    # The server gives the base another content id, so that what lies above it fits no more.
    found.allow("has CID .*its child expects", "VixDiskLib_Open: cannot open")
    not_writable(found, "web01/chain/1.raw", "web01/disk.raw")
    put(found, "web01/chain/0.raw", 0, NEW[:512])
    assert found.read("web01/chain/0.raw", 0, 512, True) == NEW[:512]


def test_two_mounts_of_one_base(big: Proxy) -> None:
    first = writing(big)
    put(first, FILE, 0, NEW[:512])
    options = big.options("transports=nbd", "rw", OFF, "retry_budget=2", "fence_timeout=1")
    code, line = no_mount(big.mounts, big.url(LIVE, moref="vm-20"), *options)
    assert code
    assert "big.vmdk" in line
    put(first, FILE, 512, NEW[512:1024])
    assert first.read(FILE, 0, 1024) == NEW[:1024]


def test_an_overlay_on_a_live_link(big: Proxy) -> None:
    url = big.url(LIVE, moref="vm-20")
    code, line = no_mount(big.mounts, url, *big.options("transports=nbd", "overlay=tmp"))
    assert code == 44
    assert "no overlay on big: its owner may write it" in line
    assert "take a snapshot of the VM and mount that, or force it" in line
    forced = ("transports=nbd", "overlay=tmp", "overlay_force=yes")
    found = big.mount(LIVE, moref="vm-20", options=forced)
    put(found, "big/disk.raw", 4096, NEW[:4096])
    assert found.content("big/disk.raw") == OLD[:4096] + NEW[:4096] + OLD[8192:]
    found.finish()
    assert on_disk(big) == OLD
    assert not any(int(event.fields["writes"]) for event in big.kit.events("client-close"))


# Writing.


def test_parallel_writers_are_parallel(big: Proxy) -> None:
    """Eight threads of one process write past the page cache, in the time of one or two."""
    found = writing(big)
    put(found, FILE, 0, NEW[:512])
    big.kit.configure(f"net.latency_us = {LATENCY_MS * 1000}", "net.jitter = 0", profile="lan")
    places = [number * 64 * KIB for number in range(THREADS)]
    latency = LATENCY_MS / 1000
    took = min(found.ask("write_at_once", found.path(FILE), places, 64 * KIB) for _ in range(3))
    assert latency <= took < THREADS * latency / 2
    big.kit.configure()
    wanted = b"".join(bytes([number + 1]) * 64 * KIB for number in range(THREADS))
    assert found.read(FILE, 0, len(wanted)) == wanted
    found.finish()
    assert on_disk(big) == wanted + OLD[len(wanted) :]


def test_fsync_reaches_the_server(big: Proxy) -> None:
    found = writing(big)
    fd = opened(found, FILE)
    found.ask("pwrite", fd, NEW, 0)
    assert on_disk(big) == NEW, "a write that has returned is at the server"
    big.kit.configure("fault = Flush count=1 error=14011")
    found.ask("fsync", fd)
    found.ask("close", fd)
    found.expect("lost its connection.*14011")
    found.allow("VDDK: ")
    found.restarts = None
    assert on_disk(big) == NEW


# Losses.


def test_a_flush_that_fails_is_told_once_to_every_writer(big: Proxy) -> None:
    found = writing(big, *HASTE)
    found.expect("nothing is written any more", "a write was lost.*reads go on", "flush at offset")
    found.allow(
        "VDDK: ", "write at offset", "another takes over", "may be lost", "no answer within"
    )
    found.restarts = None
    writers = [opened(found, FILE) for _ in range(3)]
    reader = found.open(FILE)
    found.ask("pwrite", writers[0], NEW[:4096], 0)
    big.kit.configure("fault = Flush error=1")
    refused(found, errno.EIO, "fsync", writers[0])
    big.kit.configure()
    for writer in writers[1:]:
        refused(found, errno.EIO, "fsync", writer)
    for writer in writers:
        refused(found, errno.EIO, "pwrite", writer, b"x" * 512, 0)
    assert found.ask("pread", reader, MIB, MIB) == OLD[MIB : 2 * MIB]
    assert found.read(FILE, 2 * MIB, MIB, True) == OLD[2 * MIB : 3 * MIB]
    for writer in writers:
        found.attempt(errno.EIO, "close", writer)
    found.ask("close", reader)
    found.finish()
    again = writing(big)
    put(again, FILE, 0, NEW)
    assert again.content(FILE) == NEW


def test_a_write_that_fails_for_good_makes_the_disk_read_only(big: Proxy) -> None:
    found = writing(big, *HASTE)
    found.expect("a write was lost.*reads go on", "write at offset 65536 failed")
    found.allow("VDDK: ", "another takes over", "nothing is written any more", "flush at offset")
    found.allow("it cannot be written over nbd", "no answer within")
    found.restarts = None
    fd = opened(found, FILE, os.O_RDWR | os.O_DIRECT)
    big.kit.configure("fault = WriteAsync error=1", "fault = Write error=1")
    refused(found, errno.EIO, "pwrite", fd, NEW[:4096], 65536)
    big.kit.configure()
    refused(found, errno.EIO, "pwrite", fd, NEW[:4096], 0)
    assert found.read(FILE, 0, MIB) == OLD[:MIB]
    found.attempt(errno.EIO, "close", fd)
    assert found.status()["disks"]


def test_a_lost_worker_is_fenced_and_its_write_made_again(big: Proxy) -> None:
    """The first write of a worker lands late, after that worker is gone; the newer one stays."""
    found = writing(big)
    found.expect(ENDED)
    found.restarts = None
    fd = opened(found, FILE, os.O_RDWR | os.O_DIRECT)
    found.ask("pwrite", fd, OLD[:512], 0)
    for turn in range(2):
        big.kit.configure("late_write_ms = 400", "net.latency_us = 200000", profile="lan")
        found.agent.send("pwrite", fd, bytes([turn + 1]) * 64 * KIB, 0)
        until(lambda: workers(found)[0]["in_flight"], what="a write under way")
        [worker] = children(found.pid)
        os.kill(worker, signal.SIGKILL)
        assert found.agent.receive() == 64 * KIB
        big.kit.configure("late_write_ms = 400")
        assert found.ask("pwrite", fd, bytes([turn + 101]) * 64 * KIB, 0) == 64 * KIB
    found.ask("fsync", fd)
    found.ask("close", fd)
    assert found.read(FILE, 0, 64 * KIB, True) == bytes([102]) * 64 * KIB
    found.finish()
    assert on_disk(big) == bytes([102]) * 64 * KIB + OLD[64 * KIB :]


def test_without_a_proof_in_time_the_disk_is_read_only(big: Proxy) -> None:
    """The host holds the dead worker's lock for longer than the fence may take."""
    found = writing(big, "fence_timeout=1")
    found.expect(ENDED, "no proof within 1 s that nothing is written late", "reads go on")
    found.allow("cannot open the disk", "VDDK: ", "at offset .* failed", "another takes over")
    found.restarts = None
    fd = opened(found, FILE, os.O_RDWR | os.O_DIRECT)
    big.kit.configure("lock_linger_ms = 6000")
    [worker] = children(found.pid)
    with stopped(worker):
        found.agent.send("pwrite", fd, NEW[:4096], 0)
        until(lambda: workers(found)[0]["in_flight"], what="a write under way")
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(OSError, match="Input/output error"):
        found.agent.receive()
    refused(found, errno.EIO, "pwrite", fd, NEW[:4096], 0)
    found.attempt(errno.EIO, "close", fd)
    assert found.read(FILE, MIB, MIB) == OLD[MIB : 2 * MIB]
