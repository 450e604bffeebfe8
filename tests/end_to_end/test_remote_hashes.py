"""Through VDDK every image equals what qemu-img reads of the same links, over every transport."""

import re
from collections.abc import Callable, Sequence

import pytest

from tests.end_to_end.mounting import sha256
from tests.end_to_end.remote import CHAIN, Proxy, RemoteMount, hashes, workers
from tests.simulator.disks import SIZE

PLAINS = tuple(f"[ds1] plain/{name}.vmdk@snapshot-9" for name in ("plain", "thin", "sparse"))


def moved(mount: RemoteMount, path: str, transport: str) -> int:
    """Return the bytes that clients read of a disk over a transport, once they are gone."""
    closed = mount.kit.events("client-close", path=path.partition("@")[0], transport=transport)
    return sum(int(event.fields["read_bytes"]) for event in closed)


def judge_path(mount: RemoteMount, disks: Sequence[str], transport: str) -> None:
    """Unmount, and check in the simulator's own log which way the bytes went."""
    mount.finish()
    kit = mount.kit
    assert {event.fields["transport"] for event in kit.events("client-open")} == {transport}
    for disk in disks:
        assert moved(mount, disk, transport) >= SIZE
    wire = sum(int(event.fields["wire_bytes"]) for event in kit.events("client-close"))
    if transport in ("nbd", "nbdssl"):
        assert wire >= SIZE * len(disks)
        assert not kit.events("device-open")
    else:
        assert wire == 0
        assert len(kit.events("device-open", transport=transport)) >= len(disks)
    assert bool(kit.events("attach")) is (transport == "hotadd")


def judge_chain(proxy: Proxy, mount: RemoteMount) -> None:
    wanted = [sha256(proxy.raw(disk)) for disk in CHAIN]
    assert len(set(wanted)) == 3
    for number, expected in enumerate(wanted):
        assert hashes(mount, f"web01/chain/{number}.raw") == {expected}
    assert hashes(mount, "web01/disk.raw") == {wanted[2]}


def judge_status(mount: RemoteMount, transport: str) -> None:
    found = workers(mount)
    assert {worker["transport"] for worker in found} == {transport}
    # A chain over hotadd has one worker, which every image has counted in.
    done = [worker["calls"]["VixDiskLib_ReadAsync"] for worker in found]
    assert all(calls["count"] and not calls["failures"] for calls in done)
    assert sum(calls["bytes"] for calls in done) >= SIZE


def judge_documents(mount: RemoteMount, transport: str) -> None:
    judge_status(mount, transport)
    engine = mount.json("vm.json")["engine"]
    assert engine["name"] == "vddk"
    assert engine["transport"] == transport
    assert re.fullmatch(r"\d+\.\d+\.\d+", engine["version"])
    assert re.fullmatch(r"\d{5,}", engine["build"])
    assert engine["library"].startswith(str(mount.kit.path))
    info = mount.json("web01/info.json")
    assert (info["engine"], info["transport"]) == ("vddk", transport)
    assert [link["file"] for link in info["links"]] == [disk.partition("@")[0] for disk in CHAIN]
    assert [link["snapshot"] for link in info["links"]] == [f"snapshot-{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("transport", ["nbd", "nbdssl"])
def test_chain_over_the_network(proxy: Proxy, transport: str) -> None:
    found = proxy.mount(*CHAIN, options=(f"transports={transport}",))
    judge_chain(proxy, found)
    judge_documents(found, transport)
    judge_path(found, CHAIN, transport)


def test_chain_over_san(proxy: Proxy, loops: None, scsi_disk: Sequence[str]) -> None:
    proxy.kit.configure("san.scsi_disk = /sys")
    found = proxy.prepare(proxy.url(*CHAIN), "transports=san")
    found.prefix = scsi_disk
    found.start()
    judge_chain(proxy, found)
    judge_documents(found, "san")
    judge_path(found, CHAIN, "san")


def test_chain_over_hotadd(proxy: Proxy, loops: None) -> None:
    found = proxy.mount(*CHAIN, options=("transports=hotadd:nbd",))
    judge_chain(proxy, found)
    judge_status(found, "hotadd")
    assert len(proxy.kit.attachments()) >= 1
    found.finish()
    assert moved(found, CHAIN[0], "hotadd") >= SIZE
    assert proxy.kit.events("attach")
    assert not proxy.kit.attachments()


def test_the_transport_in_use_is_told(proxy: Proxy, loops: None) -> None:
    found = proxy.mount(CHAIN[0], options=("transports=hotadd:nbd",))
    assert found.read("web01/disk.raw", 0, 4096, True)
    assert proxy.kit.events("attach")
    judge = [found.json(name) for name in ("vm.json", "web01/info.json")]
    found.finish()
    assert [judge[0]["engine"]["transport"], judge[1]["transport"]] == ["hotadd"] * 2


def test_plain_disks_in_one_url(proxy: Proxy) -> None:
    found = proxy.mount(*PLAINS, moref="vm-17")
    names = ("plain", "thin", "sparse")
    assert [disk["name"] for disk in found.json("vm.json")["disks"]] == list(names)
    for name, disk in zip(names, PLAINS, strict=True):
        assert hashes(found, f"{name}/disk.raw") == {sha256(proxy.raw(disk))}
        assert hashes(found, f"{name}/chain/0.raw") == {sha256(proxy.raw(disk))}
    # Nothing was said of the transports: the first of the usual ones serves.
    judge_path(found, PLAINS, "nbdssl")


@pytest.mark.parametrize("name", ["web01/web01-000002.vmdk", "plain/sparse.vmdk"])
def test_local_file(proxy: Proxy, name: str) -> None:
    path = proxy.kit.site / "ds1" / name
    found = proxy.mounted_file(path)
    (disk,) = found.json("vm.json")["disks"]
    assert hashes(found, f"{disk['name']}/disk.raw") == {sha256(proxy.content(f"[ds1] {name}"))}
    assert found.json("vm.json")["engine"]["transport"] == "file"


def test_link_without_a_snapshot_is_shown_only(proxy: Proxy) -> None:
    middle = CHAIN[1].partition("@")[0]
    found = proxy.mount(CHAIN[0], middle, CHAIN[2])
    tree = found.ask("tree", found.path("web01"))
    assert [name for name in tree if name.startswith("chain/")] == [
        "chain/",
        "chain/0.raw",
        "chain/2.raw",
    ]
    links = found.json("web01/info.json")["links"]
    assert [link["file"] for link in links] == [disk.partition("@")[0] for disk in CHAIN]
    assert "image" not in links[1]
    for number in (0, 2):
        assert found.sha256(f"web01/chain/{number}.raw", True) == sha256(proxy.raw(CHAIN[number]))
    assert not proxy.kit.events("client-open", path=middle)


@pytest.mark.parametrize("release", ["6.5", "6.7", "7.0"])
def test_older_releases(proxies: Callable[..., Proxy], release: str) -> None:
    proxy = proxies(release)
    found = proxy.mount(*CHAIN, options=("transports=nbd",))
    assert found.json("vm.json")["engine"]["version"].startswith(release)
    for number, disk in enumerate(CHAIN):
        assert found.sha256(f"web01/chain/{number}.raw") == sha256(proxy.raw(disk))
    assert found.sha256("web01/disk.raw", True) == sha256(proxy.raw(CHAIN[2]))


def test_a_live_leaf_is_its_own_policy(proxy: Proxy) -> None:
    found = proxy.mount(*CHAIN[:2], CHAIN[2].partition("@")[0])
    links = found.json("web01/info.json")["links"]
    assert [link["cache_policy"] for link in links] == ["immutable", "immutable", "close-to-open"]
    assert found.sha256("web01/disk.raw") == sha256(proxy.raw(CHAIN[2]))
