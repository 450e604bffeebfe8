"""What the documents of the mount tell of a VM: sizes in bytes, every link, and what is missing."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from vddkfs import __version__
from vddkfs.cache.coherence import policy
from vddkfs.disks.describe import describe_disk, describe_link, describe_source
from vddkfs.disks.vm import LeftOut, Source
from vddkfs.engines.base import ExtentInfo, LinkIdentity, LinkInfo
from vddkfs.source import plan_local


def make_link(number: int, capacity: int = 100, **more: Any) -> LinkInfo:
    extents = (
        ExtentInfo("SPARSE", 60, "RW", f"/vm/{number}-s001.vmdk", 0, 9999, 4096),
        ExtentInfo("ZERO", 40, "NOACCESS"),
    )
    path = f"/vm/{number}.vmdk"
    return LinkInfo(
        path=path,
        format="twoGbMaxExtentSparse",
        capacity=capacity,
        content_id=f"0000000{number}",
        parent_content_id="ffffffff" if number == 0 else f"0000000{number - 1}",
        parent_hint="" if number == 0 else f"{number - 1}.vmdk",
        extents=extents,
        mtime_ns=0,
        identity=LinkIdentity(path, f"0000000{number}", capacity),
        **more,
    )


def make_disk(*links: LinkInfo) -> Any:
    images = [
        SimpleNamespace(number=n, policy=policy(n < len(links) - 1, "auto"))
        for n in range(len(links))
    ]
    capacity = links[-1].capacity * 512
    return SimpleNamespace(name="web", links=links, images=images, capacity=capacity)


def make_source(text: str, *links: LinkInfo, left_out: tuple[LeftOut, ...] = ()) -> Source:
    chain, worker = plan_local(0, "web", links, False)
    return Source(text, "/" + text, "vmdk", (chain,), (worker,), left_out)


def test_a_source_is_described_with_its_disks_and_what_was_left_out() -> None:
    links = (make_link(0), make_link(1, capacity=200))
    source = make_source("vm", *links, left_out=(LeftOut("/vm/x.vmdk", "x: is bad"),))
    [chain] = source.chains
    found = describe_source(source)
    assert found["vddkfs"] == __version__
    assert found["source"] == "/vm"
    assert found["engine"]["name"] == "vmdk"
    assert found["left_out"] == [{"path": "/vm/x.vmdk", "reason": "x: is bad"}]
    [disk] = found["disks"]
    assert disk["name"] == "web"
    assert disk["capacity"] == chain.capacity_bytes == 200 * 512, "that of the mounted point"
    assert [link["file"] for link in disk["links"]] == ["/vm/0.vmdk", "/vm/1.vmdk"]


def test_a_link_is_described_in_bytes_with_each_extent() -> None:
    found = describe_link(make_link(1))
    assert found["capacity"] == 100 * 512
    assert (found["cid"], found["parent_cid"]) == ("00000001", "00000000")
    assert found["parent_hint"] == "0.vmdk"
    sparse, zero = found["extents"]
    assert sparse["size"] == 60 * 512
    assert (sparse["file"], sparse["file_size"], sparse["allocated"]) == (
        "/vm/1-s001.vmdk",
        9999,
        4096,
    )
    assert (zero["kind"], zero["file"], zero["allocated"]) == ("ZERO", "", 0)


def test_a_disk_tells_which_links_are_frozen_and_which_image_each_is() -> None:
    found = describe_disk(make_disk(make_link(0), make_link(1), make_link(2)))
    assert [link["cache_policy"] for link in found["links"]] == [
        "immutable",
        "immutable",
        "close-to-open",
    ]
    assert [link["image"] for link in found["links"]] == [
        "chain/0.raw",
        "chain/1.raw",
        "chain/2.raw",
    ]
    assert found["writable"] == []
    assert found["capacity"] == 100 * 512


@pytest.mark.parametrize("owner", [0, 1])
def test_what_only_one_end_of_the_chain_knows_is_told(owner: int) -> None:
    facts = {"uuid": "60 00", "adapter": "lsilogic", "hardware_version": "19", "tools_version": "7"}
    links = [make_link(n, **(facts if n == owner else {})) for n in range(2)]
    found = describe_disk(make_disk(*links), writers=["disk.raw"])
    assert {key: found[key] for key in facts} == facts
    assert found["writable"] == ["disk.raw"]


def test_the_documents_are_json_also_for_names_that_are_not_utf_8() -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")
    source = make_source(name, make_link(0))
    for content in (describe_source(source), describe_disk(make_disk(make_link(0)))):
        assert json.loads(json.dumps(content).encode()) == content
