"""Two client processes at one host: locks and limits between them, and writes of the dead."""

from pathlib import Path
from typing import Any

import pytest

from tests.simulator.client import Client
from tests.simulator.disks import noise, raw
from tests.simulator.kit import Kit, Process, until
from tests.simulator.vix import FILE_ALREADY_LOCKED

PLAIN = "[ds1] plain/plain.vmdk"
AT = 128


def _writer(client: Client, data: bytes, count: int = 1) -> None:
    """Begin writes that take long, and tell when all are on their way."""
    connection = client.connect(vm="vm-17", read_only=False)
    disk = client.open(connection, "[ds1] plain/plain.vmdk", 0)
    client.tell("open")
    client.hear()
    step = len(data) // count
    for number in range(count):
        disk.write_async(128 + number * step // 512, data[number * step :][:step])
    client.tell("begun")
    client.hear()


def _overwriter(client: Client, data: bytes) -> None:
    connection = client.connect(vm="vm-17", read_only=False)
    disk = client.open(connection, "[ds1] plain/plain.vmdk", 0)
    found = disk.read(128, len(data) // 512)
    disk.write(128, data)
    disk.flush()
    client.tell(found)
    client.hear()
    client.tell(disk.read(128, len(data) // 512))
    disk.close()
    client.check("Disconnect", connection)


def _flat(kit: Kit) -> Path:
    return kit.disk(PLAIN).with_name("plain-flat.vmdk")


def _bytes_at(kit: Kit, size: int) -> bytes:
    with _flat(kit).open("rb") as file:
        file.seek(AT * 512)
        return file.read(size)


SLOW = ("net.latency_us = 60000000", "net.jitter = 0")


def writing(kit: Kit, *lines: str, data: bytes, count: int = 1) -> Process:
    """Start a client whose writes the host has and does not carry out."""
    process = kit.client(_writer, data=data, count=count)
    process.hear()
    kit.configure(*SLOW, *lines)
    process.tell("now")
    process.hear()
    return process


def test_a_dead_client_s_write_lands_late(kit: Kit, contents: Any) -> None:
    data = noise("late", 8192)
    process = writing(kit, "late_write_ms = 200", data=data)
    assert _bytes_at(kit, 8192) == contents(PLAIN)[AT * 512 :][:8192]
    process.kill()
    until(lambda: _bytes_at(kit, 8192) == data, what="the write to land")
    (landed,) = until(lambda: kit.events("late-write-landed"))
    (released,) = kit.events("lock-released")
    assert landed.time - released.time <= 1


@pytest.mark.parametrize("seed", range(3))
def test_no_write_lands_after_the_lock_was_taken_again(kit: Kit, seed: int) -> None:
    lines = ("late_write_ms = 300", f"seed = {seed + 1}")
    writing(kit, *lines, data=noise("old", 16 * 4096), count=16).kill()
    kit.configure(*lines)
    until(lambda: kit.events("lock-released"))
    new = noise("new", 16 * 4096)
    process = kit.client(_overwriter, data=new)
    found = process.hear()
    granted = kit.events("lock-granted")[-1]
    settled = kit.events("late-write-landed") + kit.events("late-write-dropped")
    assert len(settled) == 16, "each has landed or never will"
    assert all(event.time <= granted.time for event in settled)
    for event in kit.events("late-write-landed"):
        start = (int(event.fields["start"]) - AT) * 512
        assert found[start : start + 4096] == noise("old", 16 * 4096)[start : start + 4096]
    process.tell("again")
    assert process.hear() == new
    process.result()
    assert _bytes_at(kit, len(new)) == new
    assert len(kit.events("late-write-landed") + kit.events("late-write-dropped")) == 16


def test_a_dead_client_s_write_is_not_lost_with_a_lingering_lock(kit: Kit) -> None:
    lines = ("late_write_ms = 100", "lock_linger_ms = 1000")
    process = writing(kit, *lines, data=noise("late", 4096))
    process.kill()
    kit.configure(*lines)
    until(lambda: kit.events("late-write-landed"))
    assert not kit.events("lock-released"), "the lock is still the dead client's"
    assert kit.run(_open_to_write) == FILE_ALREADY_LOCKED
    until(lambda: kit.events("lock-released"))
    assert kit.run(_open_to_write) == 0


def _open_to_write(client: Client) -> int:
    connection = client.connect(vm="vm-17", read_only=False)
    return client.outcome(client.open, connection, "[ds1] plain/plain.vmdk", 0)


def test_writes_that_were_answered_are_there_after_kill_9(kit: Kit) -> None:
    process = kit.client(_acknowledged, data=noise("kept", 8192))
    process.hear()
    process.kill()
    assert raw(kit.disk(PLAIN))[AT * 512 :][:8192] == noise("kept", 8192)


def _acknowledged(client: Client, data: bytes) -> None:
    connection = client.connect(vm="vm-17", read_only=False)
    client.open(connection, "[ds1] plain/plain.vmdk", 0).write(128, data)
    client.tell("written")
    client.hear()


# Limits that they share.


def _holder(client: Client, count: int) -> None:
    connection = client.connect(vm="vm-17")
    codes = [
        client.outcome(client.open, connection, "[ds1] plain/plain.vmdk") for _ in range(count)
    ]
    client.tell(codes)
    client.hear()


def test_sessions_are_counted_across_clients(kit: Kit) -> None:
    kit.configure("sessions.limit = 3")
    first = kit.client(_holder, count=2)
    assert first.hear() == [0, 0]
    second = kit.client(_holder, count=2)
    assert second.hear() == [0, 18000]
    first.kill()
    until(lambda: len(kit.events("session-ended", how="client-lost")) == 2)
    assert kit.client(_holder, count=2).hear() == [0, 0]


def _reader(client: Client, sectors: int) -> int:
    disk = client.open(client.connect(vm="vm-17"), "[ds1] plain/plain.vmdk")
    client.tell("open")
    client.hear()
    made = disk.read_async(0, sectors)
    client.tell("begun")
    disk.wait()
    return made.error


def test_memory_is_counted_across_clients(kit: Kit) -> None:
    kit.configure("sessions.memory_bytes = 1048576")
    readers = [kit.client(_reader, sectors=1200) for _ in range(2)]
    for reader in readers:
        reader.hear()
    kit.configure("sessions.memory_bytes = 1048576", "net.latency_us = 300000", "net.jitter = 0")
    for reader in readers:
        reader.tell("now")
    assert {reader.hear() for reader in readers} == {"begun"}
    assert sorted(reader.result() for reader in readers) == [0, 2]


def test_a_reader_sees_what_a_writer_has_written(kit: Kit) -> None:
    writer = kit.client(_overwriter, data=noise("seen", 4096))
    writer.hear()
    assert kit.run(_read_there) == noise("seen", 4096)
    writer.tell("")
    writer.hear()
    writer.result()


def _read_there(client: Client) -> bytes:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        return disk.read(128, 8)
