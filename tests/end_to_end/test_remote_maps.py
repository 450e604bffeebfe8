"""Where data is, as VDDK tells it: in map.json, by SEEK_HOLE, in st_blocks, and to cp."""

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.mounting import sha256, succeed, until
from tests.end_to_end.remote import BIG, CHAIN, MIB, PLAIN, Proxy, RemoteMount
from tests.end_to_end.vms import data_ranges
from tests.simulator import disks
from tests.simulator.disks import SECTOR, SIZE

CHUNK = 128
TAIL = SIZE // SECTOR // CHUNK * CHUNK * SECTOR
"""Where the part begins that VDDK cannot be asked about."""


def wanted_ranges(path: Path) -> list[tuple[int, int]]:
    """Return (start, end) in bytes of what has to be data: by qemu-img in chunks, and the tail."""
    found = [
        (start * SECTOR, min(end * SECTOR, SIZE)) for start, end in disks.data_ranges(path, CHUNK)
    ]
    before = [(start, min(end, TAIL)) for start, end in found if start < TAIL]
    if before and before[-1][1] == TAIL:
        return [*before[:-1], (before[-1][0], SIZE)]
    return [*before, (TAIL, SIZE)]


def judge_map(mount: RemoteMount, folder: str, name: str, wanted: list[tuple[int, int]]) -> None:
    """Compare all that tells of one image's holes."""
    told = mount.ask("seek_map", mount.path(f"{folder}/{name}"))
    assert [(start, end) for start, end, data in told if data] == wanted
    assert told[-1][1] == SIZE
    blocks = sum(end - start for start, end in wanted) // SECTOR
    assert until(lambda: mount.stat(f"{folder}/{name}").st_blocks == blocks, what="st_blocks")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_images_of_a_chain(proxy: Proxy, number: int) -> None:
    found = proxy.mount(*CHAIN)
    path = proxy.kit.disk(CHAIN[number].partition("@")[0])
    wanted = wanted_ranges(path)
    assert len(wanted) > 5
    judge_map(found, "web01", f"chain/{number}.raw", wanted)
    if number == 2:
        extents: list[dict[str, Any]] = found.json("web01/map.json")
        assert data_ranges(extents) == wanted
        assert extents[0]["start"] == 0
        assert sum(extent["length"] for extent in extents) == SIZE


def test_thick_thin_and_sparse(proxy: Proxy) -> None:
    names = ("plain", "thin", "sparse")
    found = proxy.mount(*(PLAIN.replace("plain.vmdk", f"{n}.vmdk") for n in names), moref="vm-17")
    for name in names:
        path = proxy.kit.disk(f"[ds1] plain/{name}.vmdk")
        found.map_known(name)
        judge_map(found, name, "disk.raw", wanted_ranges(path))
    assert found.stat("plain/disk.raw").st_blocks == SIZE // SECTOR
    assert found.stat("thin/disk.raw").st_blocks < SIZE // SECTOR * 3 // 4


def test_holes_are_not_asked_for(proxy: Proxy) -> None:
    data = disks.sparse_noise("holes", 16 * MIB, step=4 * MIB)
    proxy.make_big(data, thin=True)
    found = proxy.mount(BIG, moref="vm-20", options=("transports=nbd",))
    found.map_known("big")
    assert found.sha256("big/disk.raw") == sha256(data)
    found.finish()
    read = sum(int(e.fields["read_bytes"]) for e in proxy.kit.events("client-close"))
    assert read == 8 * MIB


def test_a_live_leaf_is_data_in_its_reads(proxy: Proxy) -> None:
    """Its map is told, but never used for zeros: somebody may be writing there."""
    leaf = CHAIN[2].partition("@")[0]
    found = proxy.mount(*CHAIN[:2], leaf, options=("transports=nbd",))
    found.map_known("web01")
    assert found.sha256("web01/chain/2.raw") == sha256(proxy.raw(CHAIN[2]))
    found.finish()
    closed = proxy.kit.events("client-close", path=leaf)
    assert sum(int(event.fields["read_bytes"]) for event in closed) >= SIZE


def test_cp_and_qemu_img_see_the_holes(proxy: Proxy, tmp_path: Path) -> None:
    found = proxy.mount(*CHAIN)
    found.map_known("web01")
    copy = tmp_path / "copy.raw"
    succeed("cp", "--sparse=auto", found.path("web01/chain/0.raw"), copy)
    assert sha256(copy.read_bytes()) == sha256(proxy.raw(CHAIN[0]))
    assert copy.stat().st_blocks <= found.stat("web01/chain/0.raw").st_blocks + 64
    succeed(*("qemu-img", "convert", "-f", "raw", "-O", "raw"), found.path("web01/disk.raw"), copy)
    assert sha256(copy.read_bytes()) == sha256(proxy.raw(CHAIN[2]))


def test_a_map_that_cannot_be_had_is_all_data(proxy: Proxy) -> None:
    proxy.kit.configure("fault = QueryAllocatedBlocks error=6")
    found = proxy.mount(CHAIN[0])
    found.expect("no allocation map, so all is data")
    assert found.sha256("web01/disk.raw") == sha256(proxy.raw(CHAIN[0]))
    assert data_ranges(found.json("web01/map.json")) == [(0, SIZE)]
    assert found.stat("web01/disk.raw").st_blocks == SIZE // SECTOR
