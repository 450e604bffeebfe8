"""Reads and writes over every transport: the bytes are qemu-img's, the log tells the path."""

import random
from typing import Any

import pytest

from tests.simulator.client import Client
from tests.simulator.disks import SIZE, check, make_vmdk, noise, raw
from tests.simulator.kit import CHAIN, Kit

TRANSPORTS = ("nbd", "nbdssl", "san", "hotadd")
PLAIN, THIN, SPARSE = (f"[ds1] plain/{name}.vmdk" for name in ("plain", "thin", "sparse"))
SNAPSHOTS = dict(zip(CHAIN, ("snapshot-1", "snapshot-2", None), strict=True))


@pytest.fixture(params=["file", *TRANSPORTS])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name in ("san", "hotadd"):
        request.getfixturevalue("loops")
    return name


def where(kit: Kit, path: str, transport: str) -> dict[str, Any]:
    """Return how a client gets to a disk."""
    if transport == "file":
        return {"path": str(kit.disk(path))}
    vm = "vm-16" if path in CHAIN else "vm-17"
    return {"path": path, "vm": vm, "modes": transport, "snapshot": SNAPSHOTS.get(path)}


# Reading.


def _all_of(client: Client, step: int, path: str, **keys: Any) -> dict[str, Any]:
    with client.disk(path, **keys) as disk:
        data = disk.read_all(step)
        return {"data": data, "transport": disk.transport}


@pytest.mark.parametrize("path", [*CHAIN, PLAIN, THIN, SPARSE])
def test_reads_are_what_qemu_reads(kit: Kit, contents: Any, transport: str, path: str) -> None:
    found = kit.run(_all_of, step=1000, **where(kit, path, transport))
    assert found["transport"] == transport
    assert found["data"] == contents(path)
    prove_path(kit, transport)


def prove_path(kit: Kit, transport: str) -> None:
    """See in the simulator's log by which way the bytes came."""
    closed = kit.events("client-close")
    devices = {event.fields["device"] for event in kit.events("device-open", transport=transport)}
    if transport == "file":
        assert not kit.events("open")
        return
    assert [event.fields["transport"] for event in closed] == [transport]
    counts = {name: int(closed[0].fields[name]) for name in ("read_bytes", "wire_bytes")}
    assert counts["read_bytes"] == SIZE
    if transport in ("nbd", "nbdssl"):
        assert counts["wire_bytes"] == SIZE
        assert not kit.events("device-open")
        return
    assert counts["wire_bytes"] == 0
    assert devices
    assert all(device.startswith("/dev/loop") for device in devices)
    assert bool(kit.events("attach")) is (transport == "hotadd")
    if transport == "san":
        assert {event.fields["device"] for event in kit.events("device-attached")} == devices


def _async_of(client: Client, seed: int, path: str, **keys: Any) -> dict[str, Any]:

    chance = random.Random(seed)
    with client.disk(path, **keys) as disk:
        wanted, end = [], disk.sectors
        for _ in range(60):
            start = chance.randrange(end)
            count = min(chance.choice([1, 3, 128, 700]), end - start)
            wanted.append((start, count, disk.read_async(start, count)))
        disk.wait()
        return {
            "reads": [(start, count, made.wait()) for start, count, made in wanted],
            "calls": {made.calls for _, _, made in wanted},
            "inside": [made.inside for _, _, made in wanted],
        }


@pytest.mark.parametrize("path", [CHAIN[2], SPARSE])
def test_asynchronous_reads_are_what_qemu_reads(
    kit: Kit, contents: Any, transport: str, path: str
) -> None:
    found = kit.run(_async_of, seed=1, **where(kit, path, transport))
    whole = contents(path)
    for start, count, data in found["reads"]:
        assert data == whole[start * 512 : (start + count) * 512], (start, count)
    assert found["calls"] == {1}
    if transport not in ("nbd", "nbdssl"):
        assert all(found["inside"]), "synchronous inside ReadAsync"
    else:
        assert not any(found["inside"])


def test_split_and_other_formats_are_read(bare: Kit) -> None:
    for subformat in ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicFlat"):
        data = noise(subformat, SIZE)
        path = make_vmdk(bare.path / f"{subformat}.vmdk", data, subformat)
        assert bare.run(_all_of, step=4096, path=str(path))["data"] == data


def _single_link(client: Client, path: str) -> bytes:
    with client.disk(path, 2 | 4) as disk:
        return disk.read_all()


def test_a_single_link_has_zeros_where_it_holds_nothing(bare: Kit, contents: Any) -> None:
    """Zeros that say nothing of the composed disk."""
    found = bare.run(_single_link, path=str(bare.disk(CHAIN[1])))
    composed, below = contents(CHAIN[1]), contents(CHAIN[0])
    assert len(found) == len(composed)
    for start in range(0, SIZE, 512):
        sector = found[start : start + 512]
        if sector.strip(b"\0"):
            assert sector == composed[start : start + 512]
    changed = [at for at in range(0, SIZE, 512) if composed[at : at + 512] != below[at : at + 512]]
    assert changed
    assert all(found[at : at + 512] == composed[at : at + 512] for at in changed)
    assert found != composed


# Which transport it becomes.


def _transport_of(client: Client, modes: str | None, path: str, vm: str) -> str | int:
    connection = client.connect(vm=vm, modes=modes)
    try:
        return client.open(connection, path).transport
    except Failed as failed:  # noqa: F821 - of the client
        return failed.code


@pytest.mark.parametrize(
    ("lines", "modes", "wanted"),
    [
        ((), "nbdssl:nbd", "nbdssl"),
        ((), "nbd:nbdssl", "nbd"),
        ((), "hotadd:nbdssl", "hotadd"),
        ((), "san:hotadd", "san"),
        ((), None, "san"),
        (("san.available = no",), "san:hotadd", "hotadd"),
        (("san.available = no",), "san", "nbdssl"),
        (("san.available = no",), "san:nbd", "nbd"),
        (("san.available = no", "hotadd.available = no"), None, "nbdssl"),
        (("hotadd.available = no",), "hotadd", "nbdssl"),
        (("license = no",), "san:hotadd", "nbdssl"),
    ],
)
def test_an_unavailable_transport_silently_becomes_another(
    kit: Kit, loops: None, lines: tuple[str, ...], modes: str | None, wanted: str
) -> None:
    kit.configure(*lines)
    assert kit.run(_transport_of, modes=modes, path=PLAIN, vm="vm-17") == wanted


@pytest.mark.parametrize("line", ["san.available = no", "license = no"])
def test_an_unavailable_transport_fails_where_that_is_configured(kit: Kit, line: str) -> None:
    kit.configure(line, "unavailable = fail")
    assert isinstance(kit.run(_transport_of, modes="san", path=PLAIN, vm="vm-17"), int)


def test_a_refused_licence_says_so(kit: Kit) -> None:
    kit.configure("license = no", "unavailable = fail")
    assert kit.run(_transport_of, modes="san", path=PLAIN, vm="vm-17") in (32, 16064)


@pytest.mark.parametrize(("modes", "dies"), [("san:nbd", True), (None, True), ("nbd", False)])
def test_probing_for_san_may_kill(kit: Kit, loops: None, modes: str | None, dies: bool) -> None:
    """Since 8.0, on a machine without SCSI disks."""
    kit.configure("san.probe_crash = yes", 'san.scsi_disk = "/nowhere"')
    process = kit.client(_transport_of, modes=modes, path=PLAIN, vm="vm-17")
    if dies:
        assert process.died() == 11
    else:
        assert process.result() == "nbd"
    kit.configure("san.probe_crash = yes", f'san.scsi_disk = "{kit.path}"')
    assert kit.run(_transport_of, modes=modes, path=PLAIN, vm="vm-17") == ("san" if dies else "nbd")


def test_san_without_loop_devices_reads_the_files(kit: Kit, contents: Any) -> None:
    kit.configure("san.device = file")
    found = kit.run(_all_of, step=4096, **where(kit, CHAIN[1], "san"))
    assert found == {"data": contents(CHAIN[1]), "transport": "san"}
    devices = {event.fields["device"] for event in kit.events("device-open")}
    assert devices
    assert all(device.startswith(str(kit.site)) for device in devices)
    assert not kit.events("device-attached")


# Writing.


def _write(client: Client, seed: int, path: str, **keys: Any) -> dict[str, Any]:

    chance = random.Random(seed)
    done = []
    with client.disk(path, 0, read_only=False, **keys) as disk:
        end = disk.sectors
        for number in range(30):
            start = chance.randrange(end)
            data = chance.randbytes(min(chance.choice([1, 3, 128, 300]), end - start) * 512)
            if number % 2:
                disk.write_async(start, data)
                disk.wait()
            else:
                disk.write(start, data)
            done.append((start, data))
            assert disk.read(start, len(data) // 512) == data
        disk.flush()
        return {"done": done, "transport": disk.transport}


@pytest.mark.parametrize("path", [PLAIN, THIN, SPARSE])
def test_writes_are_read_back_by_qemu(kit: Kit, contents: Any, transport: str, path: str) -> None:
    found = kit.run(_write, seed=2, **where(kit, path, transport))
    assert found["transport"] == transport
    wanted = bytearray(contents(path))
    for start, data in found["done"]:
        wanted[start * 512 : start * 512 + len(data)] = data
    assert raw(kit.disk(path)) == wanted
    if path == SPARSE:
        check(kit.disk(path))


@pytest.mark.parametrize("transport", ["file", "nbd", "nbdssl", "hotadd"])
def test_writes_into_a_chain_go_to_its_leaf(
    request: pytest.FixtureRequest, kit: Kit, contents: Any, transport: str
) -> None:
    if transport == "hotadd":
        request.getfixturevalue("loops")
    below = [path.read_bytes() for path in _files(kit, CHAIN[0]) + _files(kit, CHAIN[1])]
    found = kit.run(_write, seed=3, **where(kit, CHAIN[2], transport))
    wanted = bytearray(contents(CHAIN[2]))
    for start, data in found["done"]:
        wanted[start * 512 : start * 512 + len(data)] = data
    assert raw(kit.disk(CHAIN[2])) == wanted
    assert below == [path.read_bytes() for path in _files(kit, CHAIN[0]) + _files(kit, CHAIN[1])]
    check(kit.disk(CHAIN[2]))


def _files(kit: Kit, path: str) -> list[Any]:
    descriptor = kit.disk(path)
    flat = descriptor.with_name(f"{descriptor.stem}-flat.vmdk")
    return [flat] if flat.exists() else [descriptor]


# Refusals of SAN.


def _first_write(client: Client, path: str, vm: str, modes: str | None) -> tuple[str, int, int]:
    connection = client.connect(vm=vm, modes=modes, read_only=False)
    disk = client.open(connection, path, 0)
    mode = disk.transport
    read = client.outcome(disk.read, 0, 1)
    write = client.outcome(disk.write, 0, bytes(512))
    disk.close()
    return mode, read, write


def test_san_writes_no_redo_log(kit: Kit, loops: None, contents: Any) -> None:
    mode, read, write = kit.run(_first_write, path=CHAIN[2], vm="vm-16", modes="san")
    assert (mode, read) == ("san", 0)
    assert write != 0
    assert raw(kit.disk(CHAIN[2])) == contents(CHAIN[2])


def test_san_cannot_write_a_disk_of_a_local_datastore(kit: Kit, loops: None, contents: Any) -> None:
    """And it is chosen for it where the client has no wish."""
    path = "[local1] local/local.vmdk"
    mode, read, write = kit.run(_first_write, path=path, vm="vm-18", modes=None)
    assert mode == "san"
    assert write != 0
    assert read != 0
    assert raw(kit.disk(path)) == contents(path)


# Pages that Linux keeps of a block device.


def _before_and_after(client: Client, flags: int, vm: str) -> tuple[bytes, bytes, bytes]:
    path = "[ds1] plain/plain.vmdk"
    with client.disk(path, 4 | flags, vm=vm, modes="san") as disk:
        first = disk.read(64, 8)
        client.tell("changed?")
        client.hear()
        second = disk.read(64, 8)
    with client.disk(path, 4 | flags, vm=vm, modes="san") as disk:
        return first, second, disk.read(64, 8)


@pytest.mark.parametrize(
    ("lines", "flags", "stale"),
    [
        ((), 0, True),
        ((), 1, False),
        (("san.cache = buffered",), 1, True),
        (("san.cache = direct",), 0, False),
        (("san.keep_open = no",), 0, True),
    ],
)
def test_buffered_reads_over_san_show_what_linux_remembers(
    kit: Kit, loops: None, contents: Any, lines: tuple[str, ...], flags: int, stale: bool
) -> None:
    from tests.simulator.disks import write_behind

    kit.configure(*lines)
    process = kit.client(_before_and_after, flags=flags, vm="vm-17")
    process.hear()
    flat = kit.disk(PLAIN).with_name("plain-flat.vmdk")
    old, new = contents(PLAIN)[64 * 512 : 72 * 512], noise("new", 4096)
    write_behind(flat, 64 * 512, new)
    process.tell("yes")
    first, second, reopened = process.result()
    assert first == old
    assert second == (old if stale else new)
    keeps = stale and "san.keep_open = no" not in lines
    assert reopened == (old if keeps else new)
    direct = {event.fields["direct"] for event in kit.events("device-open")}
    assert direct == {"no" if stale else "yes"}
