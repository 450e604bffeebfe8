"""The host process: reads, writes, queries, and clients that do not behave."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.simulator.host_client import (
    CLOSE,
    FLUSH,
    METADATA,
    OPEN,
    QUERY,
    READ,
    REQUEST,
    SECTOR,
    WRITE,
    Host,
    pack,
)
from tests.simulator.host_site import CAPACITY
from tests.simulator.host_steps import INSTANT, refusal, web_bytes

# ---- reading and writing ----


def test_what_is_written_is_read(host: Host) -> None:
    disk = host.open(host.login(), "[ds1] web/child.vmdk", write=True)
    expected = bytearray(web_bytes(host))
    assert disk.read(0, CAPACITY) == expected
    for start, count in [(0, 1), (127, 3), (1000, 500), (CAPACITY - 1, 1)]:
        data = os.urandom(count * SECTOR)
        disk.write(start, data)
        expected[start * SECTOR : (start + count) * SECTOR] = data
    assert disk.read(0, CAPACITY) == expected
    disk.peer.ask(FLUSH)
    disk.peer.ask(METADATA, pack("ddb.note", "kept"))
    disk.close()
    disk = host.open(host.login(), "[ds1] web/child.vmdk")
    assert disk.metadata["ddb.note"] == "kept"
    disk.close()
    raw = host.site / "raw"
    path = host.site / "ds1/web/child.vmdk"
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
    assert raw.read_bytes() == expected
    event = host.await_event("close", how="closed", writes="4")
    assert event["written_bytes"] == str(505 * SECTOR)


@pytest.mark.parametrize(
    ("op", "start", "count", "body", "code"),
    [
        (READ, 0, 0, b"", 3),
        (READ, CAPACITY, 1, b"", 16007),
        (READ, CAPACITY - 1, 2, b"", 16007),
        (READ, 2**64 - 1, 2, b"", 16007),
        (READ, 1, 2**64 - 1, b"", 16007),
        (WRITE, CAPACITY, 1, b"x" * SECTOR, 16007),
        (WRITE, 0, 2, b"x" * SECTOR, 3),
        (WRITE, 0, 1, b"", 3),
        (METADATA, 0, 0, b"rubbish", 3),
        (METADATA, 0, 0, pack(None, None), 3),
        (QUERY, 0, 128, b"", 3),
        (OPEN, 0, 0, b"", 3),
        (77, 0, 0, b"what is this", 6),
    ],
)
def test_requests_that_make_no_sense(
    host: Host, op: int, start: int, count: int, body: bytes, code: int
) -> None:
    disk = host.open(host.login(), write=True)
    assert disk.peer.code(op, body, start, count) == code
    assert disk.read(5, 1) == web_bytes(host)[5 * SECTOR : 6 * SECTOR]
    disk.close()


def test_a_session_without_a_disk(host: Host) -> None:
    with host.connect("nfc.sock") as peer:
        assert peer.code(READ, count=1) == 1000
        assert peer.code(OPEN, b"\xff" * 40) == 3
        peer.ask(CLOSE)
        with pytest.raises(EOFError):
            peer.reply()


def test_what_is_allocated(host: Host) -> None:
    data = host.site / "ds1/web/web-flat.vmdk"
    data.write_bytes(b"")
    os.truncate(data, CAPACITY * SECTOR)
    with data.open("r+b") as file:
        file.seek(256 * SECTOR)
        file.write(b"x" * 4096)
    disk = host.open(host.login())
    assert disk.allocated(0, CAPACITY) == [(256, 128)]
    assert disk.allocated(0, 256) == []
    for start, count, chunk in [
        (1, 128, 128),
        (0, 127, 128),
        (0, 0, 128),
        (0, 64, 64),
        (0, 384, 192),
        (0, 2**18, 2**18),
        (CAPACITY, 128, 128),
        (128, CAPACITY, 128),
    ]:
        assert disk.peer.code(QUERY, pack(chunk), start, count) == 3
    disk.close()


# ---- clients that do not behave ----


def test_a_body_beyond_the_limit_ends_the_connection(host: Host) -> None:
    disk = host.open(host.login())
    disk.peer.socket.sendall(REQUEST.pack(WRITE, (64 << 20) + 1, 1, 0, 1))
    with pytest.raises((EOFError, ConnectionError)):
        disk.peer.reply()
    assert refusal(host) == 0


def test_an_announced_body_takes_no_memory_before_it_comes(host: Host) -> None:
    liars = [host.connect("nfc.sock") for _ in range(64)]
    for liar in liars:
        liar.socket.sendall(REQUEST.pack(WRITE, 64 << 20, 1, 0, 1))
    assert refusal(host) == 0
    status = Path(f"/proc/{host.process.pid}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    assert int(resident.split()[1]) < 1_000_000  # KiB; the bodies would be 4 GiB
    for liar in liars:
        liar.end()


def test_rubbish_harms_nobody(host: Host) -> None:
    disk = host.open(host.login())
    for seed in range(20):
        for name in ("vim.sock", "nfc.sock"):
            with host.connect(name) as peer:
                head = REQUEST.pack(seed % 15, 1000 + seed, 1, seed, 1)
                peer.socket.sendall(head + os.urandom(500 + 50 * seed))
                peer.socket.shutdown(socket.SHUT_WR)
                while peer.socket.recv(4096):
                    pass
    assert disk.read(0, CAPACITY) == web_bytes(host)
    disk.close()


def test_who_takes_no_answers_is_not_read_from(host: Host) -> None:
    slow, other = host.open(host.login()), host.open(host.login())
    request = REQUEST.pack(READ, 0, 1, 0, 8)
    slow.peer.socket.setblocking(False)
    sent = 0
    quiet = time.monotonic()
    while time.monotonic() < quiet + 0.2:
        try:
            sent += slow.peer.socket.send(request * 1000)
            quiet = time.monotonic()
        except BlockingIOError:
            assert other.read(7, 1) == web_bytes(host)[7 * SECTOR : 8 * SECTOR]
        assert sent < 64 << 20, "all of it was taken"
    slow.peer.socket.settimeout(10)
    requests = sent // REQUEST.size
    for _ in range(requests):  # and nothing is lost
        assert slow.peer.reply().error == 0
    slow.die()
    other.close()


def test_more_requests_than_are_worked_on_at_once(host: Host) -> None:
    host.configure(INSTANT, "net.latency_us = 20000")
    disk = host.open(host.login())
    count = 10_000
    disk.peer.socket.sendall(b"".join(REQUEST.pack(READ, 0, i, i % 512, 1) for i in range(count)))
    assert sorted(disk.peer.reply().checked().request for _ in range(count)) == [*range(count)]
    disk.close()


def test_requests_that_come_byte_by_byte(host: Host) -> None:
    disk = host.open(host.login(), write=True)
    message = REQUEST.pack(WRITE, SECTOR, 1, 3, 1) + b"z" * SECTOR
    for i in range(len(message)):
        disk.peer.socket.send(message[i : i + 1])
    assert disk.peer.reply().error == 0
    assert web_bytes(host)[3 * SECTOR : 4 * SECTOR] == b"z" * SECTOR
    disk.close()
