"""HotAdd: what refuses it, what it leaves behind, and what Cleanup does."""

import ctypes
from typing import Any

import pytest

from tests.simulator.client import Client
from tests.simulator.kit import CHAIN, REGISTRY, Kit, until

PLAIN = "[ds1] plain/plain.vmdk"
pytestmark = pytest.mark.usefixtures("loops")


def _open(client: Client, path: str, vm: str) -> tuple[str | int, str]:
    connection = client.connect(vm=vm, modes="hotadd")
    try:
        mode: str | int = client.open(connection, path).transport
    except Failed as failed:  # noqa: F821 - of the client
        mode = failed.code
    return mode, client.text("warn")


def prepare(kit: Kit, name: str) -> None:
    """Give HotAdd a reason to be refused."""
    text, lines = REGISTRY, []
    vm = "[vm vm-17]\n"
    if name in ("independent", "ide"):
        text = text.replace(vm, f"{vm}{name} = [ds1] plain/scratch.vmdk\n")
    elif name == "slot":
        lines.append("hotadd.slots = 0")
    elif name == "block size":
        text += "[datastore ds1]\nblock_size = 1048576\n[datastore ds2]\nblock_size = 8388608\n"
    elif name == "space":
        text += "[datastore ds2]\nfree = 1048576\n"
    kit.register(text)
    kit.configure(*lines)


@pytest.mark.parametrize("name", ["", "independent", "ide", "slot", "block size", "space"])
def test_a_refused_attachment(kit: Kit, name: str) -> None:
    prepare(kit, name)
    mode, warned = kit.run(_open, path=PLAIN, vm="vm-17")
    if not name:
        assert mode == "hotadd"
        return
    assert isinstance(mode, int)
    assert mode != 0
    assert warned
    assert not kit.events("attach")
    assert not kit.attachments()


def test_a_refused_attachment_may_fall_back(kit: Kit) -> None:
    kit.configure("hotadd.slots = 0", "hotadd.refusal = fallback")
    assert kit.run(_open, path=PLAIN, vm="vm-17")[0] == "nbdssl"


def _several(client: Client) -> list[int]:
    connection = client.connect(vm="vm-17", modes="hotadd")
    disks: list[Any] = []
    codes = []
    for name in ("plain", "thin", "sparse"):
        path = f"[ds1] plain/{name}.vmdk"
        codes.append(client.outcome(lambda path=path: disks.append(client.open(connection, path))))
    disks.pop().close()
    codes.append(client.outcome(client.open, connection, "[ds1] plain/sparse.vmdk"))
    return codes


def test_slots_are_taken_and_given_back(kit: Kit) -> None:
    kit.configure("hotadd.slots = 2")
    codes = kit.run(_several)
    assert codes[:2] == [0, 0]
    assert codes[2] != 0
    assert codes[3] == 0


def test_the_last_release_names_the_want_of_slots(kit: Kit) -> None:
    kit.configure("hotadd.slots = 0")
    mode, warned = kit.run(_open, path=PLAIN, vm="vm-17")
    assert mode == 13
    assert "slot" in warned.lower()


# What is left behind.


def _hold(client: Client) -> None:
    connection = client.connect(vm="vm-16", modes="hotadd", snapshot="snapshot-1")
    disk = client.open(connection, "[ds1] web01/web01.vmdk")
    disk.read(0, 1)
    client.tell("attached")
    client.hear()


def _cleanup(client: Client, vm: str | None = "vm-16") -> list[int]:
    cleaned, remaining = ctypes.c_uint32(99), ctypes.c_uint32(99)
    params = ctypes.byref(client.params(vm))
    client.check("Cleanup", params, ctypes.byref(cleaned), ctypes.byref(remaining))
    return [cleaned.value, remaining.value]


def killed(kit: Kit, config: str) -> None:
    """Have a client attach a disk, and kill it."""
    process = kit.client(_hold, config=config)
    process.hear()
    process.kill()
    until(lambda: kit.events("attachment-left"), what="the host to see its client dead")


def test_attachments_outlive_their_client_and_the_host(kit: Kit) -> None:
    config = kit.config(f"tmpDirectory={kit.path / 'own'}")
    killed(kit, config)
    assert len(kit.attachments()) == 1
    kit.hosts[0].stop(9)
    kit.start()
    assert kit.run(_cleanup, config=config) == [1, 0]
    assert not kit.attachments()
    assert kit.run(_cleanup, config=config) == [0, 0]


def test_cleanup_finds_only_those_of_its_own_tmp_directory(kit: Kit) -> None:
    mine = kit.config(f"tmpDirectory={kit.path / 'mine'}")
    other = kit.config(f"tmpDirectory={kit.path / 'other'}")
    killed(kit, mine)
    assert kit.run(_cleanup, config=other) == [0, 1]
    assert len(kit.attachments()) == 1
    assert kit.run(_cleanup, config=mine, vm="vm-17") == [0, 0]
    assert kit.run(_cleanup, config=mine) == [1, 0]
    assert not kit.attachments()


@pytest.mark.parametrize("spoils", [True, False])
def test_cleanup_spoils_change_tracking(kit: Kit, spoils: bool) -> None:
    kit.configure(f"hotadd.spoils_tracking = {'yes' if spoils else 'no'}")
    tracking = kit.disk("[ds1] web01/web01-ctk.vmdk")
    tracking.write_bytes(b"c" * 4096)
    config = kit.config(f"tmpDirectory={kit.path / 'own'}")
    killed(kit, config)
    assert tracking.read_bytes() == b"c" * 4096
    assert kit.run(_cleanup, config=config) == [1, 0]
    assert (tracking.read_bytes() == b"c" * 4096) is not spoils


def _close(client: Client) -> list[int]:
    with client.disk("[ds1] web01/web01.vmdk", modes="hotadd", snapshot="snapshot-1") as disk:
        disk.read(0, 1)
    cleaned, remaining = ctypes.c_uint32(99), ctypes.c_uint32(99)
    params = ctypes.byref(client.params("vm-16"))
    client.check("Cleanup", params, ctypes.byref(cleaned), ctypes.byref(remaining))
    return [cleaned.value, remaining.value]


def test_a_closed_disk_is_detached(kit: Kit) -> None:
    assert kit.run(_close) == [0, 0]
    assert len(kit.events("attach")) == len(kit.events("detach")) == 1
    assert not kit.attachments()


def _attach_and_clean(client: Client) -> list[int]:
    connection = client.connect(vm="vm-16", modes="hotadd", snapshot="snapshot-1")
    disk = client.open(connection, "[ds1] web01/web01.vmdk")
    cleaned, remaining = ctypes.c_uint32(99), ctypes.c_uint32(99)
    params = ctypes.byref(client.params("vm-16"))
    client.check("Cleanup", params, ctypes.byref(cleaned), ctypes.byref(remaining))
    return [cleaned.value, client.outcome(disk.read, 0, 1)]


def test_cleanup_leaves_what_is_in_use(kit: Kit) -> None:
    assert kit.run(_attach_and_clean) == [0, 0]


def test_the_proxy_s_own_vm_loses_its_disk(kit: Kit) -> None:
    kit.configure("hotadd.proxy = vm-16")
    mode, _ = kit.run(_open, path=CHAIN[2], vm="vm-16")
    assert mode == "hotadd"
    until(lambda: kit.events("attachment-left"))
    assert kit.run(_cleanup) == [1, 0]
    assert kit.events("proxy-disk-removed", vm="vm-16")


# Temporary files.


def _temporary(client: Client) -> int:
    connection = client.connect(vm="vm-17")
    client.check("Disconnect", connection)
    return 0


def test_temporary_folders_are_left_behind(kit: Kit) -> None:
    own = kit.path / "own"
    kit.run(_temporary, config=kit.config(f"tmpDirectory={own}"))
    assert list(own.iterdir())
