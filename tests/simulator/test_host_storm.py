"""The host process under clients that do anything at any time, while its settings change."""

import random
from contextlib import suppress
from functools import partial

import pytest

from tests.simulator.host_client import (
    CLEANUP,
    CLOSE,
    FLUSH,
    MAP,
    METADATA,
    OPEN,
    QUERY,
    READ,
    SECTOR,
    WRITE,
    Disk,
    Host,
    Login,
    Peer,
    Refused,
    pack,
    until,
)
from tests.simulator.host_site import CAPACITY, can_make_loops
from tests.simulator.host_steps import INSTANT, web_bytes

STATES = ("up", "shutdown", "maintenance", "lost", "down")


def settings(dice: random.Random) -> list[str]:
    lines = [INSTANT, "seed = 3", "san.available = yes", "hotadd.available = yes"]
    lines += ["hotadd.proxy = proxy", f"host.esx1 = {dice.choice(STATES + ('up',) * 8)}"]
    lines += [f"net.latency_us = {dice.choice([0, 100, 20000])}", "net.jitter = 0.5"]
    lines += [f"net.buffers = {dice.choice([0, 1, 4])}", "query.chunk_ns = 10000"]
    lines += [f"net.buffer_bytes = {dice.choice([0, 4096, 65536])}"]
    lines += [f"net.handle_bytes_per_s = {dice.choice([0, 10**7, 10**9])}"]
    lines += [f"net.host_bytes_per_s = {dice.choice([0, 10**7, 10**9])}"]
    lines += [f"late_write_ms = {dice.choice([0, 30])}", f"lock_linger_ms = {dice.choice([0, 5])}"]
    lines += [f"sessions.memory_bytes = {dice.choice([0, 10**6])}", "sessions.idle_ms = 2000"]
    return lines


def request(dice: random.Random, peer: Peer) -> None:
    op = dice.choice((READ,) * 6 + (WRITE,) * 4 + (FLUSH, QUERY, MAP, METADATA, OPEN, CLOSE, 99))
    start = dice.randrange(CAPACITY)
    count = dice.choice([0, 1, 8, 300, CAPACITY - start, 2**40])
    body = b""
    if op == WRITE:
        count = min(count, 300)
        body = dice.randbytes(count * SECTOR + dice.choice([0] * 20 + [7]))
    elif op == QUERY:
        start, count, body = 0, dice.choice([128, CAPACITY, CAPACITY + 128]), pack(128)
    elif op in (METADATA, OPEN):
        body = dice.choice([pack("ddb.note", str(start)), dice.randbytes(40)])
    peer.send(op, body, start, count)


def opened(dice: random.Random, host: Host, login: Login) -> Disk | None:
    transports = ["nbd", "nbdssl"] + (["san", "hotadd"] if can_make_loops() else [])
    path = dice.choice(["[ds1] plain/a.vmdk", "[ds1] plain/b.vmdk", "[ds1] plain/child.vmdk"])
    with suppress(Refused, EOFError, ConnectionError):
        write = dice.random() < 0.7 and "/b." not in path  # which has a child
        return host.open(login, path, write=write, transport=dice.choice(transports))
    return None


@pytest.mark.parametrize("seed", range(3))
def test_a_storm(host: Host, seed: int) -> None:
    dice = random.Random(seed)
    disks: list[Disk] = []
    login = host.login("vm-3")
    for _ in range(400):
        if dice.random() < 0.05:
            host.configure(*settings(dice))
        if len(disks) < 6 and (disk := opened(dice, host, login)) is not None:
            disks.append(disk)
        for disk in list(disks):
            try:
                for _ in range(dice.randrange(4)):
                    request(dice, disk.peer)
                disk.peer.socket.setblocking(False)
                with suppress(BlockingIOError):
                    while True:
                        for fd in disk.peer.reply().fds:
                            disk.fds.append(fd)
            except (EOFError, ConnectionError):
                disks.remove(disk)
                disk.die()
            else:
                disk.peer.socket.settimeout(20)
        if disks and dice.random() < 0.1:
            disks.pop(dice.randrange(len(disks))).die()
    for disk in disks:
        disk.die()
    host.configure(INSTANT)
    fine = host.open(host.login())
    assert fine.read(0, CAPACITY) == web_bytes(host)
    fine.close()
    for path in [f"[ds1] plain/{name}.vmdk" for name in ("a", "child")]:
        until(partial(writable, host, login, path), f"the lock of {path}")
    login.peer.ask(CLEANUP, pack("moref=vm-3", "/tmp/own"))
    assert (host.site / ".sim/attachments").read_text() == ""


def writable(host: Host, login: Login, path: str) -> bool | None:
    with suppress(Refused):
        host.open(login, path, write=True).close()
        return True
    return None
