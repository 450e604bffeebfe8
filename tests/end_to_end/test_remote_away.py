"""A server, or one of its hosts, that is away for longer than anybody wants to wait."""

import errno
import os
import signal

import pytest

from tests.end_to_end.mounting import alive, sha256, until
from tests.end_to_end.remote import MIB, Proxy, RemoteMount, dd, total, workers
from tests.simulator.kit import REGISTRY
from vddkfs.errors import MountBusy

DISK = "big/disk.raw"
AWAY = ("lost its connection", "cannot open the disk", "VDDK: ")
TWO_HOSTS = """
[vm vm-21]
name = two
host = esx1
power = off
disk = [local1] local/local.vmdk
disk = [ds1] plain/plain.vmdk
[snapshot snapshot-7]
vm = vm-21
disk = [local1] local/local.vmdk
disk = [ds1] plain/plain.vmdk
"""


def away(proxy: Proxy, *options: str) -> tuple[RemoteMount, bytes, int]:
    """Mount a disk, open it, and have the server go."""
    found, data = proxy.big(4 * MIB, *options)
    found.map_known("big")
    fd = found.open(DISK, direct=True)
    assert found.ask("pread", fd, 4096, 0) == data[:4096]
    proxy.host.stop(9)
    found.allow(*AWAY)
    found.restarts = None
    return found, data, fd


def test_longer_than_the_budget(proxy: Proxy) -> None:
    found, data, fd = away(proxy, "retry_budget=1")
    found.expect("big/chain/0: no answer within 1 s", "read at offset 65536 failed")
    with pytest.raises(OSError, match="Input/output error") as caught:
        found.ask("pread", fd, 4096, 65536, timeout=20)
    assert caught.value.errno == errno.EIO
    assert found.status()["warnings"]
    assert workers(found)[0]["last_errors"]
    # The mount answers meanwhile, and heals by itself.
    assert found.json("vm.json")["engine"]["name"] == "vddk"
    proxy.kit.start()
    assert found.ask("pread", fd, 4096, 65536) == data[65536:][:4096]
    assert dd(found.path(DISK), direct=True) == data
    assert found.sha256(DISK) == sha256(data)


def test_forever(proxy: Proxy) -> None:
    found, data, fd = away(proxy, "retry_budget=forever")
    found.agent.send("pread", fd, MIB, MIB)
    starts = total(found, "starts")
    until(lambda: total(found, "starts") >= starts + 3, what="three tries in vain")
    assert found.agent.waiting(0.1)
    proxy.kit.start()
    assert found.agent.receive() == data[MIB : 2 * MIB]
    assert found.sha256(DISK) == sha256(data)


def test_forever_can_be_unmounted(proxy: Proxy) -> None:
    """Who stops the daemon is not made to wait for ever as well."""
    found, _, fd = away(proxy, "retry_budget=forever", "stop_timeout=0.5")
    found.allow("fuse_reply_.* failed", "read at offset 0 failed", "is busy|in use|open")
    found.agent.send("pread", fd, 4096, 0)
    until(lambda: found.worker()["queued"] or found.worker()["in_flight"], what="a read that waits")
    assert found.umount().returncode == MountBusy.exit_code
    os.kill(found.pid, signal.SIGTERM)
    with pytest.raises(OSError, match=r"error|not connected|abort"):
        found.agent.receive(timeout=15)
    until(lambda: not alive(found.pid), what="the end of the daemon")


def test_the_disk_of_another_host_goes_on(proxy: Proxy) -> None:
    registry = (proxy.kit.site / "registry.conf").read_text()
    assert REGISTRY in registry
    proxy.kit.register(registry + TWO_HOSTS)
    disks = ("[local1] local/local.vmdk@snapshot-7", "[ds1] plain/plain.vmdk@snapshot-7")
    found = proxy.mount(*disks, moref="vm-21", options=("transports=nbd", "retry_budget=forever"))
    found.allow(*AWAY)
    found.restarts = None
    for name in ("local", "plain"):
        found.map_known(name)
        assert found.read(f"{name}/disk.raw", 0, 4096, True)
    local, plain = (proxy.raw(disk) for disk in disks)
    fd = found.open("local/disk.raw", direct=True)
    proxy.kit.configure("host.esx1 = lost")
    found.agent.send("pread", fd, MIB, MIB)
    until(lambda: workers(found)[0]["restarts"], what="the loss to be noticed")
    # The other disk has another host that serves it, with its own worker.
    assert dd(found.path("plain/disk.raw"), direct=True) == plain
    assert dd(found.path("plain/chain/0.raw"), direct=False) == plain
    assert found.agent.waiting(0.1)
    proxy.kit.configure()
    assert found.agent.receive() == local[MIB : 2 * MIB]
