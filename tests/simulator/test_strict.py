"""What a client must not do: it aborts with a message, or fails, or is let through."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.simulator.client import Buffer, Client
from tests.simulator.kit import Kit
from tests.simulator.vix import (
    FAIL,
    INVALID_ARG,
    UNBUFFERED,
    CompletionCB,
)

MIXED_MODE = 26000
SLOW = "net.latency_us = 100000"


def outcome(
    kit: Kit, rule: str, mode: str, function: Callable[..., Any], slow: str = "", **keys: Any
) -> Any:
    """Run a client under a rule; return what it returns, or its signal and last words."""
    lines = [slow, f"strict.{rule} = {mode}"] if mode else [slow]
    kit.configure(*lines)
    kit.configure_kit(*lines)
    process = kit.client(function, **keys)
    if mode in ("abort", ""):
        return process.died(), process.stderr
    return process.result()


def aborts(found: tuple[int, str], function: str, *words: str) -> bool:
    number, text = found
    assert number == signal.SIGABRT, text
    assert f"VixDiskLib_{function}" in text
    return all(word in text for word in words)


# Two calls at once on one handle.


def _concurrent(client: Client) -> list[int]:
    codes: list[int] = []
    connection = client.connect(vm="vm-17")
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    start = threading.Barrier(2)

    def read() -> None:
        start.wait()
        codes.append(client.outcome(disk.read, 0, 1))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(codes)


def test_concurrent_calls_on_one_handle(kit: Kit) -> None:
    assert aborts(outcome(kit, "concurrency", "", _concurrent, SLOW), "Read", "handle")
    assert aborts(outcome(kit, "concurrency", "abort", _concurrent, SLOW), "Read", "handle")
    refused = outcome(kit, "concurrency", "error", _concurrent, SLOW)
    assert refused[0] == 0
    assert refused[1] != 0
    assert outcome(kit, "concurrency", "off", _concurrent, SLOW) == [0, 0]


def _parallel(client: Client, trigger: str) -> int:
    connection = client.connect(vm="vm-17")
    disks = [client.open(connection, f"[ds1] plain/{name}.vmdk") for name in ("plain", "thin")]
    hanging = threading.Thread(target=disks[0].read, args=(0, 1), daemon=True)
    hanging.start()
    while os.path.exists(trigger):
        time.sleep(0.005)  # until the first has taken it away
    return client.outcome(disks[1].read, 0, 1)


def test_a_call_on_one_handle_holds_up_no_other(kit: Kit) -> None:
    """The first hangs for ever."""
    kit.configure('fault = Read path="*plain.vmdk" trigger=hang hang')
    (kit.site / "hang").touch()
    assert kit.run(_parallel, trigger=str(kit.site / "hang")) == 0


# Closing with I/O outstanding.


def _close_early(client: Client) -> dict[str, Any]:
    connection = client.connect(vm="vm-17")
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    made = disk.read_async(0, 8)
    code = client.outcome(disk.close)
    made.wait()
    return {"close": code, "read": made.error, "done": made.calls}


def test_closing_with_requests_outstanding(kit: Kit) -> None:
    assert aborts(outcome(kit, "close", "", _close_early, SLOW), "Close", "outstanding")
    refused = outcome(kit, "close", "error", _close_early, SLOW)
    assert refused["close"] != 0
    assert (refused["read"], refused["done"]) == (0, 1)
    assert outcome(kit, "close", "off", _close_early, SLOW) == {"close": 0, "read": 0, "done": 1}


def _disconnect_early(client: Client) -> int:
    connection = client.connect(vm="vm-17")
    client.open(connection, "[ds1] plain/plain.vmdk")
    return client.code("Disconnect", connection)


def test_disconnecting_with_disks_open(kit: Kit) -> None:
    assert aborts(outcome(kit, "close", "", _disconnect_early), "Disconnect", "open")
    assert outcome(kit, "close", "error", _disconnect_early) != 0


def _close_that_fails(client: Client) -> list[int]:
    connection = client.connect(vm="vm-17")
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    codes = [client.outcome(disk.close), client.code("Disconnect", connection)]
    return [*codes, client.outcome(disk.read, 0, 1), client.outcome(disk.close)]


def test_a_close_that_failed_is_not_held_against_the_client(kit: Kit) -> None:
    """It can only go on to Disconnect; the disk stays open, and what it needs stays there."""
    kit.configure("fault = Close count=1 error=14011")
    assert kit.run(_close_that_fails) == [14011, 0, 0, 0]


def _beside_reads(client: Client) -> list[int]:
    connection = client.connect(vm="vm-17")
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    made = [disk.read_async(128 * n, 128) for n in range(64)]
    codes = [client.outcome(call) for call in (disk.info, lambda: disk.query(0, 128))]
    finished = sum(request.done.is_set() for request in made)
    codes += [client.outcome(disk.flush), finished]
    for request in made:
        request.wait()
    disk.close()  # each callback has come: Wait would have nothing to wait for
    return [*codes, client.code("Disconnect", connection)]


def test_what_a_client_may_do_while_reads_are_outstanding(kit: Kit) -> None:
    kit.configure("net.latency_us = 300000")
    *codes, finished, disconnected = kit.run(_beside_reads)
    assert (codes, disconnected) == ([0, 0, 0], 0)
    assert finished < 64


def _read_then_close(client: Client) -> int:
    connection = client.connect(vm="vm-17")
    for _ in range(200):
        disk = client.open(connection, "[ds1] plain/plain.vmdk")
        disk.read(0, 1)
        disk.read(1, 1)
        disk.close()
    return 0


def test_a_synchronous_read_is_over_when_it_returns(kit: Kit) -> None:
    """So neither the next call nor Close meets a request outstanding."""
    assert kit.run(_read_then_close) == 0


# The thread of the session.


def _elsewhere(client: Client, name: str) -> tuple[int, str]:
    connection = client.connect(vm="vm-17")
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    codes: list[int] = []

    def call() -> None:
        if name == "ConnectEx":
            codes.append(client.outcome(client.connect, vm="vm-17"))
        elif name == "Connect":
            codes.append(client.outcome(client.connect_local))
        elif name == "Open":
            codes.append(client.outcome(client.open, connection, "[ds1] plain/thin.vmdk"))
        elif name == "Close":
            codes.append(client.outcome(disk.close))
        elif name == "Disconnect":
            disk.close()
            codes.append(client.code("Disconnect", connection))
        elif name == "Cleanup":
            codes.append(client.code("Cleanup", ctypes.byref(client.params()), None, None))
        elif name == "Read":
            codes.append(client.outcome(disk.read, 0, 1))
        else:
            client.lib.Exit()
            codes.append(client.outcome(client.open, connection, "[ds1] plain/thin.vmdk"))

    if name == "Disconnect":
        disk.close()
        disk.close = lambda: None  # type: ignore[method-assign]
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return codes[0], client.text()


SESSION_CALLS = ("ConnectEx", "Connect", "Open", "Close", "Disconnect", "Cleanup", "Exit")


@pytest.mark.parametrize("name", SESSION_CALLS)
def test_session_calls_off_their_thread(kit: Kit, name: str) -> None:
    assert aborts(outcome(kit, "threads", "", _elsewhere, name=name), name, "WrongThreadException")
    code, log = outcome(kit, "threads", "error", _elsewhere, name=name)
    assert "WrongThreadException" in log
    assert code == FAIL
    code, _ = outcome(kit, "threads", "off", _elsewhere, name=name)
    assert code == (0 if name != "Exit" else 16001)


def test_reads_may_come_from_any_thread(kit: Kit) -> None:
    assert outcome(kit, "threads", "error", _elsewhere, name="Read")[0] == 0


# Forks.


def _forked(client: Client) -> tuple[int, int]:
    connection = client.connect(vm="vm-17")
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    child = os.fork()
    if not child:
        os._exit(0 if client.outcome(disk.info) == 0 else 3)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), client.outcome(disk.read, 0, 1)


def test_use_after_fork(kit: Kit) -> None:
    kit.configure()
    process = kit.client(_forked)
    assert process.result() == (-signal.SIGABRT, 0)
    assert "VixDiskLib_GetInfo" in process.stderr
    assert "fork" in process.stderr
    assert outcome(kit, "fork", "error", _forked) == (3, 0)
    assert outcome(kit, "fork", "off", _forked) == (0, 0)


def _forked_while_others_read(client: Client) -> set[int]:
    connection = client.connect(vm="vm-17")
    disk, *others = (client.open(connection, "[ds1] plain/plain.vmdk") for _ in range(4))
    over = threading.Event()

    def read(other: Any) -> None:
        while not over.is_set():
            other.read(0, 1)

    threads = [threading.Thread(target=read, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    ends = set()
    for _ in range(150):
        if not (child := os.fork()):
            signal.alarm(3)
            client.lib.GetTransportMode(disk.handle)
            os._exit(0)
        ends.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    over.set()
    for thread in threads:
        thread.join()
    return ends


def test_use_after_fork_never_hangs(kit: Kit) -> None:
    """Whatever another thread held when the fork was made."""
    kit.configure()
    assert kit.run(_forked_while_others_read) == {-signal.SIGABRT}


# Buffers.


def _unaligned(client: Client, flags: int, modes: str) -> tuple[int, int]:
    connection = client.connect(vm="vm-17", modes=modes)
    disk = client.open(connection, "[ds1] plain/plain.vmdk", 4 | flags)
    aligned = client.outcome(disk.read, 0, 8)
    return aligned, client.outcome(disk.read, 0, 8, 8)


def test_unaligned_buffers_over_hotadd_unbuffered(kit: Kit, loops: None) -> None:
    keys = {"flags": UNBUFFERED, "modes": "hotadd"}
    assert aborts(outcome(kit, "alignment", "", _unaligned, **keys), "Read", "buffer")
    assert outcome(kit, "alignment", "error", _unaligned, **keys) == (0, INVALID_ARG)
    assert outcome(kit, "alignment", "off", _unaligned, **keys) == (0, 0)


@pytest.mark.parametrize(("flags", "modes"), [(0, "hotadd"), (UNBUFFERED, "nbd")])
def test_unaligned_buffers_elsewhere(kit: Kit, loops: None, flags: int, modes: str) -> None:
    kit.configure("strict.alignment = abort")
    assert kit.run(_unaligned, flags=flags, modes=modes) == (0, 0)


# NULL.


def _null(client: Client, name: str) -> int:
    out = ctypes.byref(ctypes.c_void_p())
    if name == "ConnectEx":
        return client.code("ConnectEx", None, b"\1", None, None, out)
    connection = client.connect(vm="vm-17")
    if name == "Open":
        return client.code("Open", connection, None, 4, out)
    if name == "Close":
        return client.code("Close", None)
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    if name == "Read":
        return client.code("Read", disk.handle, 0, 1, None)
    if name == "ReadAsync":
        buffer = Buffer(512)
        return client.code("ReadAsync", disk.handle, 0, 1, buffer.bytes, CompletionCB(), None)
    return client.code("GetInfo", None, None)


@pytest.mark.parametrize("name", ["ConnectEx", "Open", "Close", "Read", "ReadAsync", "GetInfo"])
def test_null_where_the_real_library_crashes(kit: Kit, name: str) -> None:
    assert aborts(outcome(kit, "null", "", _null, name=name), name, "NULL")
    assert outcome(kit, "null", "error", _null, name=name) == INVALID_ARG
    kit.configure("strict.null = off")
    kit.configure_kit("strict.null = off")
    assert kit.client(_null, name=name).died() == signal.SIGSEGV


# InitEx.


def _twice(client: Client) -> int:
    client.init()
    return client.outcome(client.init)


def _in_a_thread(client: Client) -> int:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(client.outcome(client.init)))
    thread.start()
    thread.join()
    return codes[0]


@pytest.mark.parametrize("function", [_twice, _in_a_thread])
def test_init_is_for_once_and_for_the_main_thread(bare: Kit, function: Any) -> None:
    assert aborts(outcome(bare, "init", "", function, init=False), "InitEx")
    assert outcome(bare, "init", "error", function, init=False) != 0
    assert outcome(bare, "init", "off", function, init=False) == 0


# Synchronous and asynchronous requests on one handle.


def _mixed(client: Client) -> list[int]:
    connection = client.connect(vm="vm-17")
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    made = disk.read_async(0, 8)
    codes = [client.outcome(disk.read, 8, 8)]
    disk.wait()
    return [*codes, made.error, client.outcome(disk.read, 8, 8)]


def test_synchronous_among_asynchronous_requests(kit: Kit) -> None:
    assert aborts(outcome(kit, "mixed", "abort", _mixed, SLOW), "Read", "asynchronous")
    assert outcome(kit, "mixed", "error", _mixed, SLOW) == [MIXED_MODE, 0, 0]
    assert outcome(kit, "mixed", "off", _mixed, SLOW) == [0, 0, 0]
    kit.configure(SLOW)
    assert kit.run(_mixed) == [MIXED_MODE, 0, 0]


# Requests that overlap are the client's own fault, whatever it gets: they must not hurt.


def _overlapping(client: Client) -> list[int]:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17", read_only=False) as disk:
        made = [disk.write_async(start, bytes([start]) * 4096) for start in range(20)]
        disk.wait()
        return [request.error for request in made]


def test_overlapping_writes_are_not_refused(kit: Kit) -> None:
    assert set(kit.run(_overlapping)) == {0}
