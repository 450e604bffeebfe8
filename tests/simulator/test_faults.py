"""Faults: which calls they strike; what they do is in test_fault_actions.py."""

import signal
from typing import Any

import pytest

from tests.simulator.client import PASSWORD, Client
from tests.simulator.kit import Kit

PLAIN = "[ds1] plain/plain.vmdk"


# Which calls.


def _reads(client: Client, count: int, path: str, vm: str, start: int) -> list[int]:
    with client.disk(path, vm=vm) as disk:
        return [client.outcome(disk.read, start, 4) for _ in range(count)]


def reads(kit: Kit, count: int = 1, start: int = 0, path: str = PLAIN, vm: str = "vm-17") -> Any:
    return kit.run(_reads, count=count, path=path, vm=vm, start=start)


def test_the_n_th_calls_fail(kit: Kit) -> None:
    kit.configure("fault = Read after=2 count=3 error=13")
    assert reads(kit, 7) == [0, 0, 13, 13, 13, 0, 0]


def test_counts_go_on_in_other_processes(kit: Kit) -> None:
    kit.configure("fault = Read after=2 count=3 error=13")
    assert [reads(kit, 3), reads(kit, 3)] == [[0, 0, 13], [13, 13, 0]]


def test_a_count_survives_a_client_that_it_kills(kit: Kit) -> None:
    kit.configure("fault = Read after=1 count=1 segv")
    process = kit.client(_reads, count=2, path=PLAIN, vm="vm-17", start=0)
    assert process.died() == signal.SIGSEGV
    assert reads(kit, 3) == [0, 0, 0]


def test_a_changed_rule_counts_anew(kit: Kit) -> None:
    kit.configure("fault = Read count=1 error=13")
    assert reads(kit, 2) == [13, 0]
    kit.configure("fault = Read count=1 error=14009")
    assert reads(kit, 2) == [14009, 0]


def test_rules_choose_by_path_transport_and_sector(kit: Kit) -> None:
    kit.configure(
        'fault = Read path="*thin.vmdk" error=4',
        "fault = Read transport=nbdssl error=5",
        "fault = Read at=100 error=16002",
    )
    assert reads(kit, 1, path="[ds1] plain/thin.vmdk") == [4]
    assert reads(kit, 1, start=96) == [0]
    assert reads(kit, 1, start=97) == [16002]
    assert reads(kit, 1, start=100) == [16002]
    assert reads(kit, 1, start=101) == [0]
    assert kit.run(_ssl_read) == 5


def _ssl_read(client: Client) -> int:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17", modes="nbdssl") as disk:
        return client.outcome(disk.read, 0, 1)


def test_a_trigger_file_strikes_once_and_is_gone(kit: Kit) -> None:
    kit.configure("fault = Read trigger=now error=7")
    assert reads(kit, 2) == [0, 0]
    (kit.site / "now").touch()
    assert reads(kit, 3) == [7, 0, 0]
    assert not (kit.site / "now").exists()


def test_probability(kit: Kit) -> None:
    kit.configure("fault = Read probability=0.3 error=13")
    struck = reads(kit, 300).count(13)
    assert 50 < struck < 140, "not 90 or so of 300"
    kit.configure("fault = Read probability=1 error=13")
    assert reads(kit, 5) == [13] * 5
    kit.configure("fault = Read probability=0 error=13")
    assert reads(kit, 5) == [0] * 5


def test_a_star_is_every_function(kit: Kit) -> None:
    kit.configure("fault = * after=3 count=1 error=13")
    process = kit.client(_reads, count=3, path=PLAIN, vm="vm-17", start=0)
    assert 13 in process.result()


def test_a_file_that_is_wrong_is_refused_and_said_so(kit: Kit) -> None:
    kit.configure("fault = Read error=13")
    kit.configure("fault = Read error=13", "unheard.of = 7")
    process = kit.client(_reads, count=1, path=PLAIN, vm="vm-17", start=0)
    process.result()
    assert "unheard.of" in process.stderr


def _reads_while(client: Client) -> list[int]:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        codes = []
        for _ in range(3):
            codes.append(client.outcome(disk.read, 0, 1))
            client.tell(codes[-1])
            client.hear()
        return codes


def test_settings_are_read_again_while_a_client_runs(kit: Kit) -> None:
    process = kit.client(_reads_while)
    assert process.hear() == 0
    kit.configure("fault = Read error=13")
    process.tell("")
    assert process.hear() == 13
    kit.configure()
    process.tell("")
    assert process.hear() == 0
    process.tell("")
    assert process.result() == [0, 13, 0]


# Every function.


def _call(client: Client, name: str) -> int:
    import ctypes

    params = ctypes.byref(client.params("vm-17"))
    if name in ("PrepareForAccess", "EndAccess"):
        return client.code(name, params, b"test")
    if name == "Cleanup":
        return client.code(name, params, None, None)
    if name == "ConnectEx":
        return client.outcome(client.connect, vm="vm-17")
    if name == "Connect":
        return client.code(name, params, ctypes.byref(ctypes.c_void_p()))
    connection = client.connect(vm="vm-17", read_only=False)
    if name == "GetConnectParams":
        given = ctypes.POINTER(ConnectParams)()  # noqa: F821 - of the client
        return client.code(name, connection, ctypes.byref(given))
    if name == "Open":
        return client.outcome(client.open, connection, "[ds1] plain/plain.vmdk", 0)
    if name == "Disconnect":
        return client.code(name, connection)
    disk = client.open(connection, "[ds1] plain/plain.vmdk", 0)
    calls = {
        "Close": disk.close,
        "GetInfo": disk.info,
        "Read": lambda: disk.read(0, 1),
        "Write": lambda: disk.write(0, bytes(512)),
        "ReadAsync": lambda: disk.read_async(0, 1),
        "WriteAsync": lambda: disk.write_async(0, bytes(512)),
        "Wait": disk.wait,
        "Flush": disk.flush,
        "QueryAllocatedBlocks": lambda: disk.query(0, 128),
        "ReadMetadata": lambda: client.check(name, disk.handle, b"ddb.uuid", None, 0, None),
        "GetMetadataKeys": lambda: client.check(name, disk.handle, None, 0, None),
        "WriteMetadata": lambda: client.check(name, disk.handle, b"ddb.x", b"y"),
    }
    return client.outcome(calls[name])


FUNCTIONS = """
PrepareForAccess EndAccess Cleanup ConnectEx Connect GetConnectParams Open Disconnect Close GetInfo
Read Write ReadAsync WriteAsync Wait Flush QueryAllocatedBlocks
ReadMetadata GetMetadataKeys WriteMetadata
"""


@pytest.mark.parametrize("name", FUNCTIONS.split())
def test_each_function_can_fail(kit: Kit, name: str) -> None:
    kit.configure(f"fault = {name} error=14010")
    assert kit.run(_call, name=name) == 14010


def _init_code(client: Client) -> int:
    return client.outcome(client.init)


def test_init_can_fail(bare: Kit) -> None:
    bare.configure_kit("fault = InitEx count=1 error=16053")
    assert bare.run(_init_code, init=False) == 16053


# Errors have more bits than their code.


def _whole_errors(client: Client) -> list[int]:
    import ctypes

    connection = client.connect(vm="vm-17")
    nowhere = ctypes.c_void_p()
    path = b"[ds1] plain/absent.vmdk"
    errors = [client.lib.Open(connection, path, 4, ctypes.byref(nowhere))]
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    errors.append(client.lib.GetInfo(disk.handle, ctypes.byref(ctypes.POINTER(Info)())))  # noqa: F821
    made = disk.read_async(0, 1)
    disk.wait()
    wrong = ctypes.byref(client.params(password="wrong"))
    out = ctypes.byref(ctypes.c_void_p())
    return [*errors, made.whole_error, client.lib.ConnectEx(wrong, b"\1", None, b"nbd", out)]


@pytest.mark.parametrize("upper", [False, True])
def test_the_upper_bits_of_an_error(kit: Kit, upper: bool) -> None:
    lines = ["fault = ReadAsync callback_error=14011", f'password = "{PASSWORD}"']
    kit.configure(*lines, f"errors.upper_bits = {'yes' if upper else 'no'}")
    opened, good, called_back, connected = kit.run(_whole_errors)
    assert good == 0
    failed = (opened, called_back, connected)
    assert [error & 0xFFFF for error in failed] == [4, 14011, 35]
    assert [error > 0xFFFF for error in failed] == [upper] * 3
