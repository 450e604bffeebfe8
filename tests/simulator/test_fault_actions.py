"""Faults: what each of them does to a call."""

import signal
import time
from typing import Any

import pytest

from tests.simulator.client import Client
from tests.simulator.disks import noise
from tests.simulator.kit import SANITIZE, Kit, until
from tests.simulator.vix import (
    FILE_ACCESS_ERROR,
    HOST_CONNECTION_LOST,
    HOST_SERVER_SHUTDOWN,
    TCP_CONN_LOST,
)

PLAIN = "[ds1] plain/plain.vmdk"
damaging = pytest.mark.skipif(bool(SANITIZE), reason="a sanitizer would find it")


def _reads(client: Client, count: int, path: str, vm: str, start: int) -> list[int]:
    with client.disk(path, vm=vm) as disk:
        return [client.outcome(disk.read, start, 4) for _ in range(count)]


def reads(kit: Kit, count: int = 1, start: int = 0, path: str = PLAIN, vm: str = "vm-17") -> Any:
    return kit.run(_reads, count=count, path=path, vm=vm, start=start)


def _one_read(client: Client) -> tuple[int, float]:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        begin = time.monotonic()
        return client.outcome(disk.read, 0, 8), time.monotonic() - begin


@pytest.mark.parametrize(("action", "number"), [("segv", 11), ("abort", 6)])
def test_the_process_dies(kit: Kit, action: str, number: int) -> None:
    kit.configure(f"fault = Read {action}")
    assert kit.client(_one_read).died() == number


def _scribbled(client: Client) -> int:
    """Use the heap until the damage shows."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        for _ in range(64):
            disk.read(0, 8)
            blocks = [libc.malloc(size) for size in range(16, 4096, 16)]
            for block in blocks:
                libc.free(block)
    return 0


@damaging
def test_a_damaged_heap_ends_the_process(kit: Kit) -> None:
    kit.configure("fault = Read scribble")
    assert kit.client(_scribbled).died() in (signal.SIGABRT, signal.SIGSEGV)


def test_a_delay(kit: Kit) -> None:
    kit.configure("fault = Read delay_ms=150")
    code, seconds = kit.run(_one_read)
    assert code == 0
    assert seconds >= 0.15


def _opened_and_closed(client: Client) -> list[float]:
    connection = client.connect(vm="vm-17")
    times = [time.monotonic()]
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    times.append(time.monotonic())
    disk.close()
    times.append(time.monotonic())
    return [times[1] - times[0], times[2] - times[1]]


def test_open_and_close_may_be_slow(kit: Kit) -> None:
    kit.configure("fault = Open delay_ms=100", "fault = Close delay_ms=150")
    opening, closing = kit.run(_opened_and_closed)
    assert opening >= 0.1
    assert closing >= 0.15


@pytest.mark.parametrize("name", ["Open", "Close", "Read"])
def test_a_hang_is_for_ever(kit: Kit, name: str) -> None:
    kit.configure(f"fault = {name} hang")
    process = kit.client(_hanging, name=name)
    process.hear()
    assert process.silent(0.15)
    process.kill()


def _hanging(client: Client, name: str) -> int:
    connection = client.connect(vm="vm-17")
    if name == "Open":
        client.tell("now")
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    client.tell("now")
    if name == "Read":
        disk.read(0, 1)
    disk.close()
    return 0


def _async_read(client: Client, path: str = "", seconds: float = 0.0) -> dict[str, Any]:
    connection = client.connect_local() if path else client.connect(vm="vm-17")
    disk = client.open(connection, path or "[ds1] plain/plain.vmdk")
    begin = time.monotonic()
    made = disk.read_async(0, 8)
    returned = time.monotonic() - begin
    made.done.wait(5)
    time.sleep(seconds)
    return {
        "error": made.error,
        "inside": made.inside,
        "returned": returned,
        "finished": made.finished - begin,
        "data": made.buffer.data,
        "wait": client.outcome(disk.wait),
    }


def test_an_accepted_request_can_fail_in_its_callback(kit: Kit) -> None:
    kit.configure("fault = ReadAsync callback_error=14011")
    found = kit.run(_async_read)
    assert (found["error"], found["inside"], found["wait"]) == (14011, False, 0)


def test_a_callback_inside_the_call(kit: Kit, contents: Any) -> None:
    kit.configure()
    assert not kit.run(_async_read)["inside"]
    kit.configure("fault = ReadAsync inline")
    found = kit.run(_async_read)
    assert found["inside"]
    assert found["data"] == contents(PLAIN)[:4096]


def test_a_late_callback(kit: Kit) -> None:
    kit.configure("fault = ReadAsync late_ms=200")
    found = kit.run(_async_read)
    assert found["error"] == 0
    assert found["returned"] < 0.15
    assert 0.2 <= found["finished"] < 3


def _dropped(client: Client) -> int:
    disk = client.open(client.connect(vm="vm-17"), "[ds1] plain/plain.vmdk")
    made = disk.read_async(0, 8)
    client.tell(made.done.wait(0.15))
    disk.wait()
    return 0


def test_a_callback_that_never_comes(kit: Kit) -> None:
    kit.configure("fault = ReadAsync drop")
    process = kit.client(_dropped)
    assert process.hear() is False
    assert process.silent(0.15)
    process.kill()


def _late_store(client: Client, name: str) -> tuple[int, bytes, bytes]:
    disk = client.open(client.connect(vm="vm-17"), "[ds1] plain/plain.vmdk")
    buffer = Buffer(4096).fill(b"m" * 4096)  # noqa: F821 - of the client
    made = client.remember(Request(buffer))  # noqa: F821
    arguments = (disk.handle, 0, 8, buffer.bytes)
    if name == "ReadAsync":
        arguments += (client.completion, made)
    code = client.code(name, *arguments)
    if code == 25000:
        client.requests[made].done.wait(5)
        code = client.requests[made].error
    mine = buffer.data
    deadline = time.monotonic() + 5
    while buffer.data == mine and time.monotonic() < deadline:
        time.sleep(0.01)
    return code, mine, buffer.data


@damaging
@pytest.mark.parametrize(
    ("name", "action"),
    [("Read", "error=13"), ("ReadAsync", "error=13"), ("ReadAsync", "callback_error=13")],
)
def test_a_buffer_is_written_after_the_error(kit: Kit, name: str, action: str) -> None:
    kit.configure(f"fault = {name} {action} late_store_ms=150")
    code, mine, after = kit.run(_late_store, name=name)
    assert code == 13
    if action.startswith("error"):
        assert mine == b"m" * 4096
    assert after not in (mine, b"m" * 4096)


def _outliving(client: Client) -> list[Any]:
    disk = client.open(client.connect(vm="vm-17"), "[ds1] plain/plain.vmdk")
    first = disk.read(0, 1)
    client.tell("read")
    client.hear()
    return [first, client.outcome(disk.read, 0, 1)]


def test_a_host_that_stands_still(kit: Kit) -> None:
    kit.configure("fault = Read after=1 stop_host")
    process = kit.client(_outliving)
    process.hear()
    process.tell("")
    pid = kit.hosts[0].process.pid
    until(lambda: _state(pid) == "T", what="the host to stop")
    assert process.silent(0.15)
    kit.hosts[0].process.send_signal(signal.SIGCONT)
    assert process.result()[1] == 0


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


LOST = (TCP_CONN_LOST, HOST_CONNECTION_LOST, HOST_SERVER_SHUTDOWN)


def test_a_connection_that_breaks(kit: Kit) -> None:
    kit.configure("fault = Read after=1 count=1 lose")
    codes = reads(kit, 3)
    assert codes[0] == 0
    assert codes[1] in LOST
    assert codes[2] in LOST, "it does not come back"
    assert reads(kit, 1) == [0], "but another handle works"


def _requests_in_flight(client: Client) -> list[int]:
    disk = client.open(client.connect(vm="vm-17"), "[ds1] plain/plain.vmdk")
    made = [disk.read_async(8 * n, 8) for n in range(20)]
    client.outcome(disk.read_async, 0, 8)
    disk.wait()
    return [request.error for request in made] + [client.outcome(disk.close)]


def test_requests_in_flight_end_with_the_connection(kit: Kit) -> None:
    kit.configure("net.latency_us = 400000", "fault = ReadAsync after=20 lose")
    codes = kit.run(_requests_in_flight)
    assert set(codes[:20]) <= set(LOST)


def test_several_actions_in_one_rule(kit: Kit) -> None:
    kit.configure(f"fault = Read delay_ms=100 error={FILE_ACCESS_ERROR}")
    code, seconds = kit.run(_one_read)
    assert code == FILE_ACCESS_ERROR
    assert seconds >= 0.1


def test_faults_of_the_file_transport_are_the_kit_s(bare: Kit) -> None:
    bare.configure_kit('fault = ReadAsync path="*plain*" callback_error=7')
    assert bare.run(_async_read, path=str(bare.disk(PLAIN)))["error"] == 7
    bare.configure_kit("fault = ReadAsync late_ms=100")
    found = bare.run(_async_read, path=str(bare.disk(PLAIN)))
    assert found["error"] == 0
    assert not found["inside"]
    assert noise("plain", 4096) == found["data"]
