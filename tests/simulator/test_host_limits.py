"""The host process: limits, states, locks, late writes, and how long things take."""

import struct
import time
from pathlib import Path

import pytest

from tests.simulator.host_client import (
    READ,
    REQUEST,
    SECTOR,
    WRITE,
    Body,
    Disk,
    Host,
    serving,
    until,
)
from tests.simulator.host_site import CAPACITY
from tests.simulator.host_steps import INSTANT, refusal, slow_disk, web_bytes

# ---- limits and states of a host ----


def test_sessions_of_a_host_are_limited(host: Host) -> None:
    host.configure(INSTANT, "sessions.limit = 2")
    login = host.login("vm-3")
    first = host.open(login, "[ds1] plain/a.vmdk")
    second = host.open(login, "[ds1] plain/b.vmdk")
    assert refusal(host) == 18000
    second.close()
    assert refusal(host) == 0
    first.die()
    host.await_event("session-ended", how="client-lost")
    assert refusal(host) == 0


def test_a_snapshot_is_served_by_any_host(host: Host) -> None:
    login = host.login(snapshot="snapshot-1")
    hosts = set()
    for _ in range(30):
        disk = host.open(login)
        hosts.add(disk.host)
        disk.close()
    assert hosts == {"esx1", "esx2"}
    host.configure(INSTANT, "host.esx2 = maintenance")
    for _ in range(10):
        disk = host.open(login)
        assert disk.host == "esx1"
        disk.close()


def test_memory_of_a_host_is_limited(host: Host) -> None:
    host.configure("profile = instant", "net.latency_us = 300000", "sessions.memory_bytes = 100000")
    disk = host.open(host.login())
    numbers = [disk.peer.send(READ, start=0, count=96) for _ in range(3)]
    replies = {reply.request: reply for reply in (disk.peer.reply() for _ in range(3))}
    assert [replies[number].error for number in numbers] == [0, 0, 2]
    why = Body(replies[numbers[2]].body).text()
    assert why == f"Failed to allocate the requested {96 * SECTOR + 24} bytes"
    assert host.await_event("memory-refused")["bytes"] == str(96 * SECTOR + 24)
    assert disk.peer.code(READ, start=0, count=96) == 0
    disk.close()


@pytest.mark.parametrize(
    ("state", "code"),
    [("shutdown", 14014), ("maintenance", 14015), ("down", 14009), ("lost", 14011)],
)
def test_a_host_that_is_not_up(host: Host, state: str, code: int) -> None:
    host.configure(INSTANT, f"host.esx1 = {state}")
    assert refusal(host) == code
    host.configure(INSTANT)
    assert refusal(host) == 0


def test_maintenance_lets_sessions_go_on(host: Host) -> None:
    disk = host.open(host.login())
    host.configure(INSTANT, "host.esx1 = maintenance")
    assert disk.read(0, 1) == web_bytes(host)[:SECTOR]
    disk.close()


def test_a_host_that_shuts_down_answers_so(host: Host) -> None:
    disk = slow_disk(host)
    number = disk.peer.send(READ, count=8)
    host.configure(INSTANT, "net.latency_us = 100000000", "host.esx1 = shutdown")
    reply = disk.peer.reply()
    assert (reply.request, reply.error) == (number, 14014)
    assert disk.peer.code(READ, count=8) == 14014
    assert host.await_event("host-state")["now"] == "shutdown"
    disk.close()


def test_a_lost_host_closes_its_connections(host: Host) -> None:
    disk = slow_disk(host)
    disk.peer.send(READ, count=8)
    host.configure(INSTANT, "host.esx1 = lost")
    with pytest.raises((EOFError, ConnectionError)):
        disk.peer.reply()
    host.await_event("session-ended", how="host-lost")


def test_idle_sessions_are_closed(host: Host) -> None:
    disk = host.open(host.login(), write=True)
    host.configure(INSTANT, "sessions.idle_ms = 40", "lock_linger_ms = 60000")
    with pytest.raises((EOFError, ConnectionError)):
        disk.peer.reply()
    assert host.await_event("session-ended", how="idle")
    host.configure(INSTANT)
    assert refusal(host, write=True) == 0  # no lock is left


def test_settings_that_are_wrong_are_told(host_program: Path, site: Path) -> None:
    with serving(host_program, site, preserve=True) as host:
        host.configure("nonsense = 1")
        assert "nonsense" in host.await_event("settings-error")["why"]
        (site / "registry.conf").write_text("[vm x]\nwhat = 1\n")
        assert refusal(host) == 0  # as before
        assert "line 2" in host.await_event("registry-error")["why"]


# ---- locks and late writes ----


def test_there_is_one_writer(host: Host) -> None:
    login = host.login()
    writer = host.open(login, write=True)
    other = host.open(login, "[ds1] web/child.vmdk", write=True)
    assert refusal(host, write=True) == 15
    writer.write(0, b"x" * 512)  # which changes the descriptor
    assert refusal(host, write=True) == 15
    reader = host.open(login)
    for disk in (reader, other, writer):
        disk.close()
    assert refusal(host, write=True) == 0
    assert host.await_event("lock-refused", holds="open")


def test_a_dead_writers_lock_lingers(host: Host) -> None:
    host.configure(INSTANT, "lock_linger_ms = 400")
    disk = host.open(host.login(), write=True)
    died = time.monotonic()
    disk.die()
    host.await_event("lock-lingers")
    assert refusal(host, write=True) == 15
    host.await_event("lock-released")
    assert time.monotonic() - died >= 0.39
    assert refusal(host, write=True) == 0


def dying_writer(host: Host, late_ms: int, count: int) -> None:
    disk = slow_disk(host, write=True)
    host.configure(INSTANT, "net.latency_us = 100000000", f"late_write_ms = {late_ms}", "seed = 7")
    for sector in range(count):
        disk.peer.send(WRITE, bytes([sector + 1]) * SECTOR, sector, 1)
    disk.die()
    host.await_event("session-ended", how="client-lost")


def test_writes_of_a_dead_client_land_late(host: Host) -> None:
    before = web_bytes(host)
    dying_writer(host, 100, 3)
    until(lambda: len(host.events("late-write-landed")) == 3 or None, "the late writes")
    expected = b"".join(bytes([i + 1]) * SECTOR for i in range(3))
    assert web_bytes(host) == expected + before[3 * SECTOR :]


def test_a_new_writer_settles_late_writes(host: Host) -> None:
    before = web_bytes(host)
    dying_writer(host, 60_000, 40)
    assert web_bytes(host) == before
    host.configure(INSTANT)
    disk = host.open(host.login(), write=True)
    landed = {int(event["start"]) for event in host.events("late-write-landed")}
    dropped = {int(event["start"]) for event in host.events("late-write-dropped")}
    assert len(landed) > 5
    assert len(dropped) > 5
    assert landed | dropped == set(range(40))
    for sector in range(40):
        expected = (
            bytes([sector + 1]) * SECTOR
            if sector in landed
            else before[sector * SECTOR : (sector + 1) * SECTOR]
        )
        assert disk.read(sector, 1) == expected
    names = [event["name"] for event in host.events()]
    assert max(i for i, name in enumerate(names) if name.startswith("late-write")) < max(
        i for i, name in enumerate(names) if name == "lock-granted"
    )
    disk.close()


def test_a_write_that_has_not_arrived_whole_is_none(host: Host) -> None:
    before = web_bytes(host)
    disk = host.open(host.login(), write=True)
    disk.peer.socket.sendall(REQUEST.pack(WRITE, SECTOR, 1, 0, 1) + b"x" * (SECTOR - 1))
    disk.die()
    host.await_event("session-ended", how="client-lost")
    assert web_bytes(host) == before


# ---- time ----


def timed(disk: Disk, *requests: tuple[int, int]) -> float:
    """Seconds until all reads (start, count), sent together, are answered."""
    begun = time.monotonic()
    for start, count in requests:
        disk.peer.send(READ, start=start, count=count)
    for _ in requests:
        disk.peer.reply().checked()
    return time.monotonic() - begun


def test_requests_overlap_their_latencies(host: Host) -> None:
    host.configure(INSTANT, "net.latency_us = 50000", "net.jitter = 0")
    disk = host.open(host.login())
    assert 0.05 <= timed(disk, *[(i, 1) for i in range(32)]) < 0.2
    host.configure(INSTANT, "net.latency_us = 10000", "net.buffers = 2")
    assert 0.079 <= timed(disk, *[(i, 1) for i in range(16)]) < 0.3
    host.configure(INSTANT)
    disk.close()


def test_long_requests_travel_in_fragments(host: Host) -> None:
    tuned = [INSTANT, "net.latency_us = 20000", "net.buffers = 1", "net.buffer_bytes = 65536"]
    host.configure(*tuned, "net.jitter = 0", "net.tunable = yes")
    login = host.login()
    disk = host.open(login)
    assert 0.08 <= timed(disk, (0, 512)) < 0.16  # 4 fragments of 64 KiB
    disk.close()
    disk = host.open(login, buffer_bytes=128 << 10)
    assert 0.04 <= timed(disk, (0, 512)) < 0.08
    disk.close()
    disk = host.open(login, buffers=4)
    assert 0.02 <= timed(disk, (0, 512)) < 0.04
    disk.close()
    disk = host.open(login, buffer_bytes=16 << 20)  # too large: as if it had not been asked for
    assert 0.08 <= timed(disk, (0, 512)) < 0.16
    disk.close()


def test_links_have_their_rates(host: Host) -> None:
    host.configure(INSTANT, "net.handle_bytes_per_s = 10000000")
    disk = host.open(host.login())
    assert 0.2 <= timed(disk, *[(0, CAPACITY)]) < 0.3
    host.configure(INSTANT, "net.host_bytes_per_s = 10000000")
    other = host.open(host.login())
    begun = time.monotonic()
    for peer in (disk.peer, other.peer):
        peer.send(READ, count=CAPACITY // 2)
    for peer in (disk.peer, other.peer):
        peer.reply().checked()
    assert 0.2 <= time.monotonic() - begun < 0.3
    # One handle with much in flight does not starve the other.
    for _ in range(20):
        disk.peer.send(READ, count=CAPACITY)
    assert timed(other, (0, 8)) < 0.1
    disk.die()
    other.close()


def test_opening_takes_its_round_trips(host: Host) -> None:
    host.configure(INSTANT, "net.latency_us = 5000", "net.open_round_trips = 20")
    login = host.login()
    begun = time.monotonic()
    host.open(login).close()
    assert 0.09 <= time.monotonic() - begun < 0.3


def test_queries_cost_by_the_chunk(host: Host) -> None:
    host.configure(INSTANT, "query.call_us = 10000", "query.chunk_ns = 1000000")
    disk = host.open(host.login())
    begun = time.monotonic()
    disk.allocated(0, CAPACITY)
    assert 0.042 <= time.monotonic() - begun < 0.2
    disk.close()


def test_it_is_quick(host: Host) -> None:
    disk = host.open(host.login())
    batch = b"".join(REQUEST.pack(READ, 0, i, i * 8, 8) for i in range(64))
    rounds = 500
    begun = time.monotonic()
    for _ in range(rounds):
        disk.peer.socket.sendall(batch)
        missing = 64 * (struct.calcsize("=IIQII") + struct.calcsize("=IIQQ"))
        while missing:
            missing -= len(disk.peer.socket.recv(missing))
    assert rounds * 64 / (time.monotonic() - begun) > 50_000  # a second; far less than it can
    disk.close()
