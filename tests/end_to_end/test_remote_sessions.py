"""Sessions: few of them for many images, kept alive, closed when idle, and gone in the end."""

import os
import signal
import threading
from collections.abc import Sequence

import pytest

from tests.end_to_end.mounting import Mount, sha256, until
from tests.end_to_end.remote import CHAIN, MIB, Proxy, RemoteMount, dd, total

CLOSED = "closed, another needs the session"
DISK = "big/disk.raw"


def limited(proxy: Proxy, server: str, disks: Sequence[str], limit: int) -> RemoteMount:
    url = proxy.url(*disks, server=server)
    found = proxy.prepare(url, "transports=nbd", f"max_sessions={limit}")
    found.start()
    return found


def passes(mount: Mount, seconds: float) -> None:
    """Have time pass for a mount."""
    start = mount.status()["uptime"]
    until(lambda: mount.status()["uptime"] >= start + seconds, what=f"{seconds} s to pass")


def most_at_once(proxy: Proxy) -> int:
    """Return how many disks were open at once."""
    now = most = 0
    for event in proxy.kit.events():
        now += (event.name == "open") - (event.name in ("close", "session-ended"))
        most = max(most, now)
    return most


def test_fewer_sessions_than_images(proxy: Proxy) -> None:
    found = limited(proxy, proxy.alias(), CHAIN, 2)
    wanted = [sha256(proxy.raw(disk)) for disk in CHAIN]
    for number in (0, 1, 2, 0):
        assert found.sha256(f"web01/chain/{number}.raw", True) == wanted[number]
    hashes = [""] * 3

    def read(number: int) -> None:
        hashes[number] = sha256(dd(found.path(f"web01/chain/{number}.raw"), direct=True))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hashes == wanted
    assert CLOSED in found.log.read_text()
    assert total(found, "errors") == 0
    found.finish()
    assert most_at_once(proxy) == 2


def test_two_mounts_share_the_limit(proxy: Proxy) -> None:
    server = proxy.alias()
    first = limited(proxy, server, CHAIN[:1], 1)
    second = limited(proxy, server, CHAIN[1:2], 1)
    for _ in range(2):
        for mount, disk in ((first, CHAIN[0]), (second, CHAIN[1])):
            (name,) = {d["name"] for d in mount.status()["disks"]}
            assert mount.sha256(f"{name}/disk.raw", True) == sha256(proxy.raw(disk))
    assert CLOSED in first.log.read_text()
    for mount in (first, second):
        mount.finish()
    assert most_at_once(proxy) == 1


def test_keepalive(proxy: Proxy) -> None:
    proxy.kit.configure("sessions.idle_ms = 600")
    found, data = proxy.big(MIB, "keepalive=0.2", "idle_close=never")
    fd = found.open(DISK, direct=True)
    assert found.ask("pread", fd, 4096, 0) == data[:4096]
    passes(found, 1.5)
    assert not proxy.kit.events("session-ended")
    assert found.ask("pread", fd, 4096, 65536) == data[65536:][:4096]
    assert total(found, "restarts") == 0
    assert total(found, "errors") == 0


def test_without_keepalive_the_session_expires(proxy: Proxy) -> None:
    """The trap, and that a reader does not notice."""
    proxy.kit.configure("sessions.idle_ms = 300")
    found, data = proxy.big(MIB, "keepalive=never", "idle_close=never")
    fd = found.open(DISK, direct=True)
    found.expect("worker of big/chain/0: it lost its connection")
    found.allow("VDDK: ")
    found.restarts = None
    for number in range(3):
        assert found.ask("pread", fd, 4096, number * 65536) == data[number * 65536 :][:4096]
        proxy.wait_for_more("session-ended", number)
    assert total(found, "restarts") == 2
    assert total(found, "resent") == 2
    until(lambda: not found.worker()["in_flight"])


@pytest.mark.parametrize("keepalive", ["never", "0.2"])
def test_idle_disk_is_closed_and_opened_again(proxy: Proxy, keepalive: str) -> None:
    found, data = proxy.big(MIB, "idle_close=0.6", f"keepalive={keepalive}")
    fd = found.open(DISK, direct=True)
    pids = set()
    for number in range(3):
        assert found.ask("pread", fd, 4096, number * 65536) == data[number * 65536 :][:4096]
        pids.add(found.worker()["pid"])
        logouts = len(proxy.kit.events("logout"))
        proxy.wait_for_more("logout", logouts)
    assert len(pids) == 1
    assert total(found, "restarts") == 0


def test_umount_while_reads_are_under_way(proxy: Proxy) -> None:
    found, _ = proxy.big(8 * MIB)
    fd = found.open(DISK)
    proxy.kit.configure("net.latency_us = 300000")
    found.agent.send("pread", fd, 4 * MIB, 0)
    until(lambda: found.worker()["in_flight"] >= 1, what="a read under way")
    # Who reads is killed, so that nobody waits for the answer.
    found.allow("fuse_reply_.* failed with No such file")
    found.close_agent()
    found.finish()


def test_hot_added_disks_of_a_killed_worker(proxy: Proxy, loops: None) -> None:
    """K24: its successor takes them away before it attaches its own."""
    found = proxy.mount(*CHAIN[:2], options=("transports=hotadd",))
    found.expect("ended unexpectedly", r"hot-added disks cleaned up: \d+, remaining: 0")
    found.restarts = 1
    assert found.sha256("web01/chain/0.raw", True) == sha256(proxy.raw(CHAIN[0]))
    attached = len(proxy.kit.attachments())
    assert attached >= 2
    os.kill(found.worker()["pid"], signal.SIGKILL)
    assert found.sha256("web01/chain/1.raw", True) == sha256(proxy.raw(CHAIN[1]))
    assert len(proxy.kit.attachments()) == attached
    found.finish()
    assert proxy.kit.attachments() == []
    assert len(proxy.kit.events("cleanup")) >= 1
