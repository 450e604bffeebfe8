"""The functions for the library, connections and disks: what they do, and what they refuse.

Reads and writes over each transport are in test_reads.py, functions on files in
test_local_files.py.
"""

import ctypes
from pathlib import Path
from typing import Any

import pytest

from tests.simulator.client import Client
from tests.simulator.disks import SECTORS
from tests.simulator.kit import CHAIN, Kit, Kits
from tests.simulator.vix import (
    DISK_NOINIT,
    DISK_OUTOFRANGE,
    FILE_NOT_FOUND,
    INVALID_ARG,
    LSILOGIC,
    NETWORK_CONN_REFUSED,
    NOT_SUPPORTED,
    SERVER_NOT_FOUND,
    UID,
    ConnectParams,
)

PLAIN, THIN, SPARSE = (f"[ds1] plain/{name}.vmdk" for name in ("plain", "thin", "sparse"))


# The library as a whole.


def _life(client: Client) -> dict[str, Any]:
    before = client.outcome(client.connect)
    client.init(client.hear())
    modes = client.lib.ListTransportModes()
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        disk.read(0, 1)
    client.exit()
    after = client.outcome(client.connect)
    return {"codes": [before, after], "modes": modes.decode(), "log": client.text()}


def test_a_life_from_init_to_exit(kit: Kit) -> None:
    process = kit.client(_life, init=False)
    process.tell(kit.config())
    told = process.result()
    assert told["codes"] == [DISK_NOINIT, DISK_NOINIT]
    assert told["modes"] == "file:san:hotadd:nbdssl:nbd"
    assert "Release build-" in told["log"]


def _old_init(client: Client) -> tuple[int, str]:
    code = client.code("Init", 6, 5, *client._loggers, client.libdir.encode())
    return code, client.lib.ListTransportModes().decode()


def test_the_old_init_does_the_same(bare: Kit) -> None:
    assert bare.run(_old_init, init=False) == (0, "file:san:hotadd:nbdssl:nbd")


def _init(client: Client, path: str | None = None, libdir: str | None = None) -> tuple[Any, ...]:
    code = client.outcome(client.init, path, True, libdir)
    return code, client.lib.ListTransportModes().decode(), client.text("warn")


def test_init_needs_the_configuration_file_that_it_is_given(bare: Kit) -> None:
    assert bare.run(_init, init=False)[0] == 0
    assert bare.run(_init, init=False, path=bare.config())[0] == 0
    assert bare.run(_init, init=False, path="/nowhere/vixdisklib.conf")[0] != 0


def test_without_the_plugin_there_are_no_advanced_transports(bare: Kit) -> None:
    code, modes, warned = bare.run(_init, init=False, libdir=str(bare.path / "elsewhere"))
    assert (code, modes) == (0, "file:nbdssl:nbd")
    assert "advanced transports" in warned


def test_which_transports_are_offered_is_configured(bare: Kit) -> None:
    bare.configure_kit("transports = file:nbdssl")
    assert bare.run(_init, init=False)[1] == "file:nbdssl"


def _init_by_path_alone(client: Client) -> int:
    return client.outcome(client.init)


def test_init_needs_its_siblings_by_their_bare_names(bare: Kit, tmp_path: Path) -> None:
    """A library that was loaded by its path finds them only in LD_LIBRARY_PATH or preloaded."""
    code = f"""
import ctypes
library = ctypes.CDLL({str(bare.path / "lib64" / "libvixDiskLib.so")!r})
print(library.VixDiskLib_InitEx(6, 5, None, None, None, {str(bare.path).encode()!r}, None))
"""
    bare.configure_kit(f'log_directory = "{tmp_path}"')
    assert bare.python(code) != "0"
    assert bare.python(code, LD_LIBRARY_PATH=str(bare.path / "lib64")) == "0"


def _error_texts(client: Client) -> list[str | None]:
    texts: list[str | None] = []
    for code in (0, 1, 3, 13, 14009, 16000, 25000, 1 << 32 | 4, 65000):
        found = client.lib.GetErrorText(code, None)
        texts.append(ctypes.string_at(found).decode() if found else None)
        client.lib.FreeErrorText(found)
    return texts


def test_errors_have_texts(bare: Kit) -> None:
    texts = bare.run(_error_texts)
    assert all(texts[1:7])
    assert texts[1] == "Unknown error"
    assert texts[7] == bare.run(_error_text, code=4), "the upper bits do not matter"


def _error_text(client: Client, code: int) -> str:
    found = client.lib.GetErrorText(code, None)
    text = ctypes.string_at(found).decode()
    client.lib.FreeErrorText(found)
    return text


# Connections.


def _params(client: Client) -> dict[str, Any]:
    connection = client.connect(
        vm="vm-17", user="someone", password="something", thumbprint="AA:BB", port=1902
    )
    found = ctypes.POINTER(ConnectParams)()
    client.check("GetConnectParams", connection, ctypes.byref(found))
    params = found.contents
    values = {
        "vmxSpec": params.vmxSpec,
        "serverName": params.serverName,
        "thumbPrint": params.thumbPrint,
        "credType": params.credType,
        "userName": params.creds.uid.userName,
        "nfcHostPort": params.nfcHostPort,
    }
    client.lib.FreeConnectParams(found)
    client.check("Disconnect", connection)
    return values


@pytest.mark.parametrize("release", ["6.5", "8.0"])
def test_a_connection_tells_its_parameters(kits: Kits, release: str) -> None:
    assert kits(release).run(_params) == {
        "vmxSpec": b"moref=vm-17",
        "serverName": b"vcenter",
        "thumbPrint": b"AA:BB",
        "credType": UID,
        "userName": b"someone",
        "nfcHostPort": 1902,
    }


def _allocated(client: Client) -> int:
    params = client.lib.AllocateConnectParams()
    wanted = client.params("vm-17")
    for name in ("vmxSpec", "serverName", "credType", "creds"):
        setattr(params.contents, name, getattr(wanted, name))
    connection = ctypes.c_void_p()
    code = client.code("ConnectEx", params, b"\1", None, b"nbd", ctypes.byref(connection))
    client.lib.FreeConnectParams(params)
    client.open(connection, "[ds1] plain/plain.vmdk").close()
    client.check("Disconnect", connection)
    return code


def test_allocated_parameters_may_be_freed_after_connecting(kit: Kit) -> None:
    assert kit.run(_allocated) == 0


def _plain_connect(client: Client) -> str:
    connection = ctypes.c_void_p()
    client.check("Connect", ctypes.byref(client.params("vm-17")), ctypes.byref(connection))
    disk = client.open(connection, "[ds1] plain/plain.vmdk")
    transport = disk.transport
    disk.close()
    client.check("Disconnect", connection)
    return transport


def test_connect_is_connect_ex_without_wishes(kit: Kit) -> None:
    kit.configure("san.available = no", "hotadd.available = no")
    assert kit.run(_plain_connect) in ("nbd", "nbdssl")


def _connects(client: Client, **keys: Any) -> int:
    return client.outcome(client.connect, **keys)


def test_a_server_that_is_not_there(bare: Kit) -> None:
    assert bare.run(_connects, server="elsewhere") == SERVER_NOT_FOUND
    assert bare.run(_connects) == NETWORK_CONN_REFUSED


def test_ipv6_is_not_supported(kit: Kit) -> None:
    (kit.site.parent / "fd00::1").symlink_to(kit.site)
    assert kit.run(_connects, server="fd00::1") == SERVER_NOT_FOUND


def test_connecting_only_logs_in(kit: Kit) -> None:
    """What VM, snapshot and certificate are worth shows when a disk is opened."""
    assert kit.run(_connects, vm="vm-99") == 0
    assert kit.run(_connects, snapshot="snapshot-99") == 0
    assert kit.run(_connects, thumbprint="00:11") == 0


def _access(client: Client) -> list[int]:
    params = ctypes.byref(client.params("vm-17"))
    return [
        client.code("PrepareForAccess", params, b"backup"),
        client.code("EndAccess", params, b"backup"),
        client.code("PrepareForAccess", params, b"x" * 51),
        client.code("PrepareForAccess", ctypes.byref(client.params("vm-99")), b"backup"),
    ]


def test_access_is_prepared_and_ended(kit: Kit) -> None:
    good, ended, long, unknown = kit.run(_access)
    assert (good, ended) == (0, 0)
    assert long == INVALID_ARG
    assert unknown != 0


def _cleanup(client: Client) -> list[int]:
    cleaned, remaining = ctypes.c_uint32(77), ctypes.c_uint32(77)
    params = ctypes.byref(client.params(vm=None))
    client.check("Cleanup", params, ctypes.byref(cleaned), ctypes.byref(remaining))
    client.check("Cleanup", params, None, None)
    return [cleaned.value, remaining.value]


def test_cleanup_of_nothing(kit: Kit) -> None:
    assert kit.run(_cleanup) == [0, 0]


# Disks.


def _info(client: Client, path: str, vm: str, snapshot: str | None) -> dict[str, Any]:
    with client.disk(path, vm=vm, snapshot=snapshot) as disk:
        return disk.info() | {"transport": disk.transport}


def test_a_disk_tells_what_it_is(kit: Kit) -> None:
    info = kit.run(_info, path=CHAIN[2], vm="vm-16", snapshot=None)
    assert info["capacity"] == SECTORS
    assert info["numLinks"] == 3
    assert info["parentFileNameHint"].endswith(b"web01-000001.vmdk")
    assert info["transport"] == "nbd"
    info = kit.run(_info, path=PLAIN, vm="vm-17", snapshot=None)
    assert info["numLinks"] == 1
    assert info["adapterType"] == LSILOGIC
    assert info["parentFileNameHint"] is None
    assert info["uuid"] == b"60 00 C2 9a 11 22 33 44-55 66 77 88 99 aa bb cc"
    cylinders, heads, sectors = info["biosGeo"]
    assert 0 < cylinders * heads * sectors <= SECTORS


def _opens(client: Client, path: str, flags: int = 4, **keys: Any) -> int:
    connection = client.connect(**keys)
    code = client.outcome(client.open, connection, path, flags)
    return code


@pytest.mark.parametrize(
    "path", ["[ds1] plain/absent.vmdk", "[ds1] absent/plain.vmdk", "[ds9] plain/plain.vmdk"]
)
def test_a_disk_that_is_not_there(kit: Kit, path: str) -> None:
    assert kit.run(_opens, vm="vm-17", path=path) == FILE_NOT_FOUND


@pytest.mark.parametrize(
    "path", ["plain/plain.vmdk", "[ds1] ../ds1/plain/plain.vmdk", "[ds1 plain.vmdk", ""]
)
def test_a_path_that_is_none(kit: Kit, path: str) -> None:
    assert kit.run(_opens, vm="vm-17", path=path) != 0


def _bounds(client: Client) -> list[int]:
    codes = []
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17", read_only=False) as disk:
        end = disk.sectors
        for start, count in ((end - 1, 1), (end, 1), (end - 1, 2), (1 << 62, 1), (0, 1 << 55)):
            buffer = (ctypes.c_uint8 * 4096)()
            codes.append(client.code("Read", disk.handle, start, count, buffer))
            if start:
                codes.append(client.code("Write", disk.handle, start, count, buffer))
    return codes


def test_beyond_the_end_nothing_is_read_or_written(kit: Kit) -> None:
    codes = kit.run(_bounds)
    assert codes[:2] == [0, 0]
    assert set(codes[2:]) <= {DISK_OUTOFRANGE, INVALID_ARG}
    assert codes[2:4] == [DISK_OUTOFRANGE, DISK_OUTOFRANGE]


def _read_only(client: Client, flags: int, read_only: bool) -> tuple[int, int]:
    with client.disk("[ds1] plain/plain.vmdk", flags, vm="vm-17", read_only=read_only) as disk:
        return client.outcome(disk.write, 0, disk.read(0, 1)), client.outcome(disk.flush)


def test_a_read_only_handle_does_not_write(kit: Kit) -> None:
    """Opened so, or by a connection that is read-only whatever the flags are."""
    assert kit.run(_read_only, flags=0, read_only=False)[0] == 0
    assert kit.run(_read_only, flags=4, read_only=False)[0] != 0
    assert kit.run(_read_only, flags=0, read_only=True)[0] != 0


def _two_open(client: Client) -> list[bytes]:
    first = client.connect(vm="vm-17")
    plain = client.open(first, "[ds1] plain/plain.vmdk")
    thin = client.open(first, "[ds1] plain/thin.vmdk")
    found = [plain.read(7, 1), thin.read(7, 1)]
    plain.close()
    found.append(thin.read(8, 1))
    thin.close()
    client.check("Disconnect", first)
    return found


def test_one_connection_serves_several_disks(kit: Kit, contents: Any) -> None:
    plain, thin = contents(PLAIN), contents(THIN)
    wanted = [plain[7 * 512 : 8 * 512], thin[7 * 512 : 8 * 512], thin[8 * 512 : 9 * 512]]
    assert kit.run(_two_open) == wanted


def _wait_and_flush(client: Client) -> list[int]:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17", read_only=False) as disk:
        codes = [client.outcome(disk.wait), client.outcome(disk.flush)]
        made = disk.write_async(3, b"w" * 512)
        codes += [client.outcome(disk.wait), made.error, made.calls]
        return [*codes, client.outcome(disk.flush)]


def test_wait_and_flush(kit: Kit) -> None:
    assert kit.run(_wait_and_flush) == [0, 0, 0, 0, 1, 0]


def _compressed(client: Client, flags: int, modes: str) -> int:
    connection = client.connect(vm="vm-17", modes=modes)
    try:
        disk = client.open(connection, "[ds1] plain/plain.vmdk", flags)
    except Failed as failed:  # noqa: F821 - of the client
        return failed.code
    assert len(disk.read(0, 8)) == 8 * 512
    disk.close()
    return 0


@pytest.mark.parametrize("flag", [16, 32, 64])
def test_compression_is_for_the_network(kit: Kit, flag: int) -> None:
    assert kit.run(_compressed, flags=4 | flag, modes="nbdssl") == 0
    assert kit.run(_compressed, flags=4 | flag, modes="hotadd") in (0, NOT_SUPPORTED, INVALID_ARG)
