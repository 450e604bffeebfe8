"""Logins, hosts, locks and limits: what the host process keeps, whatever its clients do."""

import signal
import time
from typing import Any

import pytest

from tests.simulator.client import PASSWORD, USER, Client
from tests.simulator.kit import CHAIN, REGISTRY, Kit, Kits, until
from tests.simulator.vix import (
    AUTHENTICATION_FAIL,
    FAIL,
    FILE_ALREADY_LOCKED,
    HOST_CONNECTION_LOST,
    HOST_SERVER_NOT_AVAILABLE,
    HOST_SERVER_SHUTDOWN,
    INVALID_AUTHENTICATION_SESSION,
    NETWORK_CONN_REFUSED,
    TCP_CONN_LOST,
    TCP_SOCKET_ERROR,
    VM_NOT_FOUND,
)

PLAIN = "[ds1] plain/plain.vmdk"
CANNOT_CONNECT = 18000
GONE = (TCP_CONN_LOST, HOST_CONNECTION_LOST, TCP_SOCKET_ERROR, HOST_SERVER_SHUTDOWN)


def _connect(client: Client, **keys: Any) -> int:
    return client.outcome(client.connect, **keys)


def _open(client: Client, path: str, flags: int = 4, **keys: Any) -> int:
    return client.outcome(client.open, client.connect(**keys), path, flags)


# Logins.


def test_the_password_is_checked_at_connect(kit: Kit) -> None:
    kit.configure(f"user = {USER}", f'password = "{PASSWORD}"')
    assert kit.run(_connect) == 0
    assert kit.run(_connect, password="another") == AUTHENTICATION_FAIL
    assert kit.run(_connect, user="another") == AUTHENTICATION_FAIL
    kit.configure(f'password = "{PASSWORD}"', "login_error = 3014")
    assert kit.run(_connect, password="another") == 3014


def test_a_cookie_logs_in_too(kit: Kit) -> None:
    kit.configure("cookie = 52f1")
    assert kit.run(_connect, cookie="52f1") == 0
    assert kit.run(_connect, cookie="52f2") in (AUTHENTICATION_FAIL, INVALID_AUTHENTICATION_SESSION)


def test_the_thumbprint_is_checked_at_open(kit: Kit) -> None:
    kit.configure("thumbprint = AA:BB:CC")
    keys = {"path": PLAIN, "vm": "vm-17"}
    assert kit.run(_open, thumbprint="AA:BB:CC", **keys) == 0
    assert kit.run(_open, thumbprint="AA:BB:CD", **keys) == FAIL
    assert kit.run(_connect, vm="vm-17", thumbprint="AA:BB:CD") == 0


# What fits a login.


@pytest.mark.parametrize(
    ("path", "snapshot", "good"),
    [
        (CHAIN[2], None, True),
        (CHAIN[0], "snapshot-1", True),
        (CHAIN[1], "snapshot-2", True),
        (CHAIN[2], "snapshot-1", False),
        (CHAIN[2], "snapshot-2", False),
        (CHAIN[0], "snapshot-99", False),
        (PLAIN, None, False),
    ],
)
def test_vm_snapshot_and_path_have_to_fit(
    kit: Kit, path: str, snapshot: str | None, good: bool
) -> None:
    assert (kit.run(_open, path=path, vm="vm-16", snapshot=snapshot) == 0) is good


def test_a_vm_that_is_not_there(kit: Kit) -> None:
    assert kit.run(_open, path=PLAIN, vm="vm-99") == VM_NOT_FOUND


def test_a_vm_by_the_path_of_its_vmx(kit: Kit) -> None:
    vm = "web01/web01.vmx?dcPath=DC0&dsName=ds1"
    assert kit.run(_open, path=CHAIN[2], vm=vm) == 0
    assert kit.run(_open, path=CHAIN[2], vm="web01/other.vmx?dcPath=DC0&dsName=ds1") != 0


def test_a_running_vm_s_disk_needs_a_snapshot(kit: Kit) -> None:
    kit.register(REGISTRY.replace("power = off", "power = on"))
    assert kit.run(_open, path=CHAIN[2], vm="vm-16") != 0
    assert kit.run(_open, path=CHAIN[0], vm="vm-16", snapshot="snapshot-1") == 0


@pytest.mark.parametrize(("release", "code"), [("6.7", 0), ("7.0", FAIL), ("8.0", FAIL)])
def test_independent_disks_do_not_open_since_7_0(kits: Kits, release: str, code: int) -> None:
    kit = kits(release)
    text = REGISTRY.replace("disk = [ds1] plain/thin", "independent = [ds1] plain/thin")
    kit.register(text)
    assert kit.run(_open, path="[ds1] plain/thin.vmdk", vm="vm-17") == code
    assert kit.run(_open, path=PLAIN, vm="vm-17") == 0


def test_an_at_sign_in_a_datastore_s_name(kit: Kit) -> None:
    (kit.site / "ds@2").symlink_to(kit.site / "ds1")
    kit.register(REGISTRY.replace("ds1, ds2", "ds1, ds@2").replace("[ds1] plain", "[ds@2] plain"))
    assert kit.run(_open, path="[ds@2] plain/plain.vmdk", vm="vm-17") != 0


# Hosts.


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("up", 0),
        ("shutdown", HOST_SERVER_SHUTDOWN),
        ("maintenance", HOST_SERVER_NOT_AVAILABLE),
        ("down", NETWORK_CONN_REFUSED),
        ("lost", TCP_CONN_LOST),
    ],
)
def test_the_state_of_the_vm_s_host(kit: Kit, state: str, code: int) -> None:
    kit.configure(f"host.esx1 = {state}")
    assert kit.run(_open, path=PLAIN, vm="vm-17") == code


def test_a_snapshot_is_read_from_any_host_with_its_datastore(kit: Kit) -> None:
    kit.configure("host.esx1 = maintenance")
    assert kit.run(_open, path=CHAIN[0], vm="vm-16", snapshot="snapshot-1") == 0
    assert kit.run(_open, path=CHAIN[2], vm="vm-16") != 0


def _reading(client: Client, path: str = "[ds1] plain/plain.vmdk") -> list[int]:
    connection = client.connect(vm="vm-17")
    disk = client.open(connection, path)
    codes = [client.outcome(disk.read, 0, 1)]
    client.tell("read")
    while client.hear():
        codes.append(client.outcome(disk.read, 0, 1))
        client.tell(codes[-1])
    return [*codes, client.outcome(disk.close), client.code("Disconnect", connection)]


def test_a_lost_host_breaks_its_connections(kit: Kit) -> None:
    process = kit.client(_reading)
    process.hear()
    kit.configure("host.esx1 = lost")
    until(lambda: kit.events("host-state", now="lost"))
    process.tell(True)
    assert process.hear() in GONE
    kit.configure()
    process.tell(True)
    assert process.hear() in GONE, "a broken connection stays broken"
    process.tell(False)
    assert process.result()[-2:] == [0, 0]
    assert kit.run(_open, path=PLAIN, vm="vm-17") == 0


@pytest.mark.parametrize(
    ("state", "code"), [("shutdown", HOST_SERVER_SHUTDOWN), ("maintenance", 0)]
)
def test_a_host_that_goes_down_while_it_is_read_from(kit: Kit, state: str, code: int) -> None:
    """Maintenance lets those go on that have a disk open."""
    process = kit.client(_reading)
    process.hear()
    kit.configure(f"host.esx1 = {state}")
    until(lambda: kit.events("host-state", now=state))
    process.tell(True)
    assert process.hear() == code
    process.tell(False)
    assert process.result()[-2:] == [0, 0]


def test_the_host_process_dies_and_comes_back(kit: Kit) -> None:
    process = kit.client(_reading)
    process.hear()
    kit.hosts[0].stop(signal.SIGKILL)
    process.tell(True)
    assert process.hear() in GONE
    process.tell(False)
    process.result()
    assert kit.run(_connect) == NETWORK_CONN_REFUSED
    kit.start()
    assert kit.run(_open, path=PLAIN, vm="vm-17") == 0


# Limits.


def _several(client: Client, count: int) -> list[int]:
    connection = client.connect(vm="vm-17")
    disks: list[Any] = []

    def another() -> None:
        disks.append(client.open(connection, "[ds1] plain/plain.vmdk"))

    codes = [client.outcome(another) for _ in range(count)]
    disks.pop().close()
    return [*codes, client.outcome(another)]


def test_sessions_of_a_host_are_limited(kit: Kit) -> None:
    kit.configure("sessions.limit = 3")
    codes = kit.run(_several, count=4)
    assert codes[:3] == [0, 0, 0]
    assert codes[3] == CANNOT_CONNECT
    assert codes[4] == 0


def _large(client: Client, sizes: list[int]) -> tuple[list[int], str]:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        return [client.outcome(disk.read, 0, size) for size in sizes], client.text("warn")


def test_memory_of_a_host_is_limited(kit: Kit) -> None:
    """What is asked for and 24 bytes have to fit into it."""
    kit.configure("sessions.memory_bytes = 1048576")
    codes, warned = kit.run(_large, sizes=[2047, 2048, 4096, 8])
    assert codes[0] == codes[3] == 0
    assert codes[1] != 0
    assert codes[2] != 0
    assert "Failed to allocate the requested 1048600 bytes" in warned
    assert "NFC error 5" in warned


def _many(client: Client, count: int) -> list[int]:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        made = [disk.read_async(0, 1024) for _ in range(count)]
        disk.wait()
        return [request.error for request in made] + [client.outcome(disk.read, 0, 1024)]


def test_requests_in_flight_share_that_memory(kit: Kit) -> None:
    kit.configure("sessions.memory_bytes = 2097152", "net.latency_us = 100000")
    codes = kit.run(_many, count=8)
    assert codes.count(0) == 4, codes
    assert codes[-1] == 0


def _idle(client: Client, keep: bool) -> list[int]:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        codes = [client.outcome(disk.read, 0, 1)]
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            time.sleep(0.03)
            if keep:
                codes.append(client.outcome(disk.read, 0, 1))
        return [*codes, client.outcome(disk.read, 0, 1)]


def test_an_idle_session_is_closed(kit: Kit) -> None:
    kit.configure("sessions.idle_ms = 250")
    codes = kit.run(_idle, keep=False)
    assert codes[0] == 0
    assert codes[1] == TCP_CONN_LOST
    assert set(kit.run(_idle, keep=True)) == {0}


# Locks.


def _writer(client: Client, path: str = "[ds1] plain/plain.vmdk", vm: str = "vm-17") -> None:
    connection = client.connect(vm=vm, read_only=False)
    disk = client.open(connection, path, 0)
    disk.write(0, bytes(512))
    client.tell("open")
    if client.hear() == "close":
        disk.close()
        client.tell("closed")
        client.hear()


WRITE = {"path": PLAIN, "vm": "vm-17", "flags": 0, "read_only": False}


def test_a_disk_has_one_writer_at_a_time(kit: Kit) -> None:
    """Also when it has written: its descriptor is then another file."""
    process = kit.client(_writer)
    process.hear()
    assert kit.run(_open, **WRITE) == FILE_ALREADY_LOCKED
    assert kit.run(_open, **WRITE | {"path": "[ds1] plain/thin.vmdk"}) == 0
    process.tell("close")
    assert process.hear() == "closed"
    assert kit.run(_open, **WRITE) == 0
    process.kill()


def test_readers_are_not_locked_out(kit: Kit) -> None:
    process = kit.client(_writer)
    process.hear()
    assert kit.run(_open, path=PLAIN, vm="vm-17") == 0
    process.kill()


def test_a_dead_writer_s_lock_lingers(kit: Kit) -> None:
    kit.configure("lock_linger_ms = 400")
    process = kit.client(_writer)
    process.hear()
    process.kill()
    killed = time.monotonic()
    assert kit.run(_open, **WRITE) == FILE_ALREADY_LOCKED
    until(lambda: kit.run(_open, **WRITE) == 0)
    assert time.monotonic() - killed >= 0.35


def test_a_dead_writer_s_lock_is_free_at_once_without_that(kit: Kit) -> None:
    process = kit.client(_writer)
    process.hear()
    process.kill()
    until(lambda: kit.events("lock-released"))
    assert kit.run(_open, **WRITE) == 0


def test_the_file_transport_locks_too(bare: Kit) -> None:
    process = bare.client(_local_writer, path=str(bare.disk(PLAIN)))
    process.hear()
    assert bare.run(_local_open, path=str(bare.disk(PLAIN)), flags=0) == FILE_ALREADY_LOCKED
    assert bare.run(_local_open, path=str(bare.disk(PLAIN)), flags=4) == 0
    process.kill()
    assert bare.run(_local_open, path=str(bare.disk(PLAIN)), flags=0) == 0


def _local_writer(client: Client, path: str) -> None:
    disk = client.open(client.connect_local(), path, 0)
    disk.write(0, bytes(512))
    client.tell("open")
    client.hear()
    disk.close()


def _local_open(client: Client, path: str, flags: int) -> int:
    return client.outcome(client.open, client.connect_local(), path, flags)


# Time-outs that the client asks for.


def test_a_read_timeout_of_the_client(kit: Kit) -> None:
    kit.configure("fault = Read stop_host")
    config = kit.config("vixDiskLib.nfc.ReadTimeoutMs=200")
    process = kit.client(_read_of_stopped, config=config)
    code, seconds = process.hear()
    assert code in GONE
    assert 0.2 <= seconds < 3
    process.kill()


def _read_of_stopped(client: Client) -> None:
    disk = client.open(client.connect(vm="vm-17"), "[ds1] plain/plain.vmdk")
    begin = time.monotonic()
    client.tell((client.outcome(disk.read, 0, 1), time.monotonic() - begin))
    client.hear()
