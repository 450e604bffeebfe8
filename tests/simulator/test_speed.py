"""What takes how long, as far as it is exact: nothing is ever faster than it was told to be."""

import time
from typing import Any

import pytest

from tests.simulator.client import Client
from tests.simulator.kit import Kit

MS = 1e-3


def _opening(client: Client) -> float:
    connection = client.connect(vm="vm-17")
    begin = time.monotonic()
    client.open(connection, "[ds1] plain/plain.vmdk")
    return time.monotonic() - begin


def test_open_takes_many_round_trips(kit: Kit) -> None:
    kit.configure("net.latency_us = 10000", "net.jitter = 0", "net.open_round_trips = 20")
    assert kit.run(_opening) >= 200 * MS


def _reading(client: Client, sectors: int, count: int, modes: str) -> float:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17", modes=modes) as disk:
        begin = time.monotonic()
        made = [disk.read_async(0, sectors) for _ in range(count)]
        disk.wait()
        assert all(request.error == 0 for request in made)
        return max(request.finished for request in made) - begin


def test_requests_on_the_network_are_in_flight_together(kit: Kit) -> None:
    kit.configure("net.latency_us = 100000", "net.jitter = 0")
    seconds = kit.run(_reading, sectors=8, count=20, modes="nbd")
    assert 100 * MS <= seconds < 20 * 100 * MS / 2


def test_long_requests_travel_in_fragments(kit: Kit) -> None:
    """So many of them at once; the client's own configuration says how many."""
    lines = ("net.latency_us = 20000", "net.jitter = 0", "net.buffers = 1")
    kit.configure(*lines, "net.buffer_bytes = 65536", "net.tunable = yes")
    keys: dict[str, Any] = {"sectors": 10 * 128, "count": 1, "modes": "nbd"}
    slow = kit.run(_reading, **keys)
    assert slow >= 10 * 20 * MS
    more = kit.config("vixDiskLib.nfcAio.Session.BufCount=10")
    larger = kit.config("vixDiskLib.nfcAio.Session.BufSizeIn64KB=10")
    assert 20 * MS <= kit.run(_reading, config=more, **keys) < slow
    assert 20 * MS <= kit.run(_reading, config=larger, **keys) < slow
    kit.configure(*lines, "net.buffer_bytes = 65536", "net.tunable = no")
    assert kit.run(_reading, config=more, **keys) >= 10 * 20 * MS


def test_a_handle_has_its_rate(kit: Kit) -> None:
    kit.configure("net.handle_bytes_per_s = 4000000")
    assert kit.run(_reading, sectors=2048, count=1, modes="nbd") >= 0.95 * 1048576 / 4e6


def _two_handles(client: Client) -> float:
    connection = client.connect(vm="vm-17")
    disks = [client.open(connection, f"[ds1] plain/{name}.vmdk") for name in ("plain", "thin")]
    begin = time.monotonic()
    made = [disk.read_async(0, 1024) for disk in disks]
    for disk in disks:
        disk.wait()
    return max(request.finished for request in made) - begin


def test_the_handles_of_a_host_share_its_rate(kit: Kit) -> None:
    kit.configure("net.host_bytes_per_s = 4000000")
    assert kit.run(_two_handles) >= 0.95 * 1048576 / 4e6


@pytest.mark.parametrize("modes", ["san", "hotadd"])
def test_devices_are_read_one_request_at_a_time(kit: Kit, loops: None, modes: str) -> None:
    kit.configure("device.read_us = 20000", "net.jitter = 0")
    assert kit.run(_reading, sectors=8, count=5, modes=modes) >= 5 * 20 * MS


def _writing(client: Client, modes: str) -> tuple[float, float]:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17", modes=modes, read_only=False) as disk:
        begin = time.monotonic()
        for number in range(5):
            disk.write_async(8 * number, bytes(4096))
        accepted = time.monotonic() - begin
        disk.wait()
        return accepted, time.monotonic() - begin


def test_writes_over_san_are_queued(kit: Kit, loops: None) -> None:
    kit.configure("device.write_us = 40000", "net.jitter = 0")
    accepted, done = kit.run(_writing, modes="san")
    assert done >= 5 * 40 * MS
    assert accepted < done - 40 * MS


def _asking(client: Client, count: int) -> float:
    with client.disk("[ds1] plain/thin.vmdk", vm="vm-17") as disk:
        begin = time.monotonic()
        disk.query(0, count)
        return time.monotonic() - begin


def test_asking_what_is_allocated_has_its_price(kit: Kit) -> None:
    kit.configure("query.call_us = 50000")
    assert kit.run(_asking, count=128) >= 50 * MS
    kit.configure("query.chunk_ns = 2000000")
    assert kit.run(_asking, count=64 * 128) >= 64 * 2 * MS


def _leaving(client: Client) -> float:
    begin = time.monotonic()
    client.exit()
    return time.monotonic() - begin


def test_exit_takes_its_time(bare: Kit) -> None:
    bare.configure_kit("exit_ms = 150")
    assert bare.run(_leaving) >= 150 * MS
