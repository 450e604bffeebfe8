"""A vddk:// SOURCE: what it names, and which of its links are one disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vddkfs.disks.vm import Source
from vddkfs.engines.base import Description, EngineFacts, LinkIdentity, LinkInfo
from vddkfs.engines.config import VddkConfig, VddkImage
from vddkfs.errors import EngineError, UnsupportedFormat, UsageError
from vddkfs.options import parse_options
from vddkfs.remote import RemoteChain, group, open_remote, parse_remote, readable

BASE = "[ds 1] web01/web01.vmdk"
DELTA = "[ds 1] web01/web01-000001.vmdk"
LEAF = "[ds 1] web01/web01-000002.vmdk"
DATA = "[ds 1] web01/data.vmdk"


def link(path: str, snapshot: str = "") -> VddkImage:
    return VddkImage(path, snapshot)


def info(path: str, links: int) -> LinkInfo:
    """What the library told of a disk composed of so many links."""
    return LinkInfo(
        path=path,
        format="remote",
        capacity=100,
        content_id="",
        parent_content_id="",
        parent_hint="",
        extents=(),
        mtime_ns=0,
        identity=LinkIdentity(path, "", 100, links=links),
    )


def test_server_vm_and_links_are_read() -> None:
    found = parse_remote(
        f"vddk://vc.example.com:8443/?moref=vm-16&disk={BASE}@snapshot-12&disk={DELTA}"
    )
    assert (found.server, found.port, found.moref) == ("vc.example.com", 8443, "vm-16")
    assert found.links == (link(BASE, "snapshot-12"), link(DELTA))
    assert found.shown == "vddk://vc.example.com/?moref=vm-16"


@pytest.mark.parametrize(
    ("server", "expected"), [("esx1", "esx1"), ("10.0.0.1", "10.0.0.1"), ("[fe80::1]", "fe80::1")]
)
def test_a_server_is_a_name_or_an_address(server: str, expected: str) -> None:
    found = parse_remote(f"vddk://{server}/?moref=2&disk={BASE}")
    assert (found.server, found.port, found.moref) == (expected, 443, "2")


@given(
    name=st.text(
        st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="/@]"),
        min_size=1,
    )
)
def test_names_are_read_encoded_and_a_plus_stays_a_plus(name: str) -> None:
    encoded = "".join(f"%{byte:02X}" for byte in f"[ds] {name}.vmdk".encode())
    found = parse_remote(f"vddk://vc/?disk={encoded}@snapshot-1&moref=vm-1")
    assert found.links == (link(f"[ds] {name}.vmdk", "snapshot-1"),)
    plain = parse_remote("vddk://vc/?moref=vm-1&disk=[d+s] a+b/c d.vmdk")
    assert plain.links == (link("[d+s] a+b/c d.vmdk"),)


def test_an_at_in_a_file_name_is_no_snapshot() -> None:
    found = parse_remote("vddk://vc/?moref=vm-1&disk=[ds] we@b/x@y.vmdk")
    assert found.links == (link("[ds] we@b/x@y.vmdk"),)
    found = parse_remote("vddk://vc/?moref=vm-1&disk=[ds] we@b/x@y.vmdk@snapshot-3")
    assert found.links == (link("[ds] we@b/x@y.vmdk", "snapshot-3"),)


def test_a_local_file_has_no_server() -> None:
    found = parse_remote("vddk:///vms/we b/a%20b.vmdk")
    assert (found.server, found.moref) == ("", "")
    assert found.links == (VddkImage("/vms/we b/a b.vmdk", live=True),)
    assert found.shown == "vddk:///vms/we b/a b.vmdk"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"vddk://root:s3cret@vc/?moref=vm-1&disk={BASE}", "credentials="),
        (f"vddk://vc:0/?moref=vm-1&disk={BASE}", "not a server"),
        (f"vddk://vc:99999/?moref=vm-1&disk={BASE}", "not a server"),
        (f"vddk:// vc/?moref=vm-1&disk={BASE}", "not a server"),
        (f"vddk://vc/?disk={BASE}", "moref="),
        (f"vddk://vc/?moref=&disk={BASE}", "moref="),
        (f"vddk://vc/?moref=vm-1&moref=vm-2&disk={BASE}", "moref="),
        ("vddk://vc/?moref=vm-1", "names no disk="),
        ("vddk://vc/?moref=vm-1&disk=web01.vmdk", "[datastore] folder"),
        ("vddk://vc/?moref=vm-1&disk=[ds] web01.vmx", "[datastore] folder"),
        (f"vddk://vc/?moref=vm-1&disk={BASE}@snap shot", "snapshot reference"),
        (f"vddk://vc/?moref=vm-1&dsk={BASE}", "dsk="),
        ("vddk:///vms/web01", ".vmdk"),
        ("vddk:///vms/web01.vmdk?x=1", ".vmdk"),
    ],
)
def test_what_is_wrong_is_told_and_no_secret_with_it(url: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_remote(url)
    assert says in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_k03_a_datastore_with_an_at_is_refused_before_any_vddk_call() -> None:
    with pytest.raises(UsageError, match="datastore d@s") as caught:
        parse_remote("vddk://vc/?moref=vm-1&disk=[d@s] web/web.vmdk@snapshot-1")
    assert "rename" in caught.value.advice


@pytest.mark.parametrize("url", ["vddk://vc/DC0/vm/web01", "vddk://vc", "vddk://vc/"])
def test_a_vm_by_its_name_is_for_another_release(url: str) -> None:
    with pytest.raises(UnsupportedFormat):
        parse_remote(url)


def test_what_is_said_of_san_devices_reaches_the_worker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[VddkConfig] = []

    def refuse(config: VddkConfig, *_: object) -> None:
        asked.append(config)
        raise EngineError("it is not opened")

    monkeypatch.setattr("vddkfs.remote.state_folder", lambda create=False: tmp_path)
    monkeypatch.setattr("vddkfs.remote.describe_images", refuse)
    for words in ([], ["san_devices=/dev/dm-3:/dev/sdb", "drop_caches=yes"]):
        with pytest.raises(EngineError, match="it is not opened"):
            open_remote("vddk:///vms/web01.vmdk", parse_options(words))
    assert [config.san_devices for config in asked] == [(), ("/dev/dm-3", "/dev/sdb")]
    assert [config.drop_caches for config in asked] == [False, True]


def test_a_link_without_a_snapshot_is_readable_only_at_the_end_of_its_disk() -> None:
    links = (link(BASE), link(DELTA), link(LEAF), link(DATA, "snapshot-1"))
    assert readable(links) == [2, 3]
    assert readable((link(BASE, "snapshot-1"), link(DELTA), link(LEAF))) == [0, 2]
    assert readable((link(DATA), link(BASE))) == [0, 1]


def test_a_base_begins_a_disk_and_what_could_not_be_opened_joins_its_neighbours() -> None:
    links = (link(BASE), link(DELTA, "s"), link(LEAF), link(DATA, "s"))
    opened = {1: info(DELTA, 2), 2: info(LEAF, 3), 3: info(DATA, 1)}
    assert group(links, opened) == [RemoteChain((0, 1, 2), (1, 2)), RemoteChain((3,), (3,))]


def test_a_disk_of_which_nothing_could_be_opened_is_not_there() -> None:
    links = (link(BASE), link(DATA, "s"))
    assert group(links, {1: info(DATA, 1)}) == [RemoteChain((1,), (1,))]


# Which bases are written.

VM = "vddk://vc/?moref=vm-1"
OFF = ["writable", "assume=powered-off"]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Source]:
    """Return a function that plans a mount of links that are composed of so many links each."""
    composed: dict[str, int] = {}

    def describe(config: VddkConfig, *_: object) -> Description:
        assert not any(image.writable for image in config.images)
        found = tuple(info(image.path, composed[image.path]) for image in config.images)
        return Description(found, EngineFacts())

    monkeypatch.setattr("vddkfs.remote.state_folder", lambda create=False: tmp_path)
    monkeypatch.setattr("vddkfs.remote.describe_images", describe)
    monkeypatch.setattr("vddkfs.remote._secret", lambda *_: -1)
    monkeypatch.setattr("vddkfs.remote._clean_up", lambda *_: None)

    def make(words: list[str], *disks: tuple[str, int]) -> Source:
        composed.update((disk.partition("@")[0], links) for disk, links in disks)
        url = "".join([VM, *(f"&disk={disk}" for disk, _ in disks)])
        return open_remote(url, parse_options(words))

    return make


def written(source: Source) -> list[list[str]]:
    """Return the paths that each worker writes; it has nothing else open then."""
    found = []
    for worker in source.workers:
        assert isinstance(worker.config, VddkConfig)
        images = [image.path for image in worker.config.images if image.writable]
        assert not images or len(worker.config.images) == 1
        found.append(images)
    return found


Plan = Callable[..., Source]


def test_a_base_alone_is_written(plan: Plan) -> None:
    source = plan(OFF, (BASE, 1), (DATA, 1))
    assert [chain.writable for chain in source.chains] == [True, True]
    assert written(source) == [[BASE], [DATA]]
    source = plan([], (BASE, 1))
    assert not source.chains[0].writable
    assert source.chains[0].unwritable == ""
    assert written(source) == [[]]


def test_a_vm_that_may_run_is_refused_before_anything_is_asked(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vddkfs.remote.describe_images", lambda *_: pytest.fail("it was asked"))
    monkeypatch.setattr("vddkfs.remote._secret", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(UsageError, match="known to be powered off") as caught:
        plan(["writable"], (BASE, 1))
    assert "assume=powered-off" in caught.value.advice


@pytest.mark.parametrize("transports", ["nbdssl", "san:nbdssl", "hotadd:nbdssl"])
def test_a_base_below_others_is_written_for_a_restore_only(plan: Plan, transports: str) -> None:
    disks = ((f"{BASE}@snapshot-1", 1), (f"{DELTA}@snapshot-2", 2), (LEAF, 3))
    words = [*OFF, f"transports={transports}"]
    [refused] = plan(words, *disks).chains
    assert not refused.writable
    assert BASE in refused.unwritable
    assert "restore=yes" in refused.unwritable

    source = plan([*words, "restore=yes"], *disks)
    [chain] = source.chains
    assert chain.writable
    assert chain.unwritable == ""
    assert chain.live == 2
    base = chain.images[0]
    config = source.workers[base.worker].config
    assert isinstance(config, VddkConfig)
    [image] = config.images
    assert (image.path, image.snapshot, image.writable) == (BASE, "snapshot-1", True)
    assert base.index == 0
    # Every image is where its plan says, and every worker has a folder of its own.
    configs = [worker.config for worker in source.workers]
    folders = [config.tmp_directory for config in configs if isinstance(config, VddkConfig)]
    assert len(set(folders)) == len(source.workers) == (2 if "hotadd" in transports else 3)
    for planned, (path, _) in zip(chain.images, disks, strict=True):
        config = configs[planned.worker]
        assert isinstance(config, VddkConfig)
        assert config.images[planned.index].path == path.partition("@")[0]


def test_a_base_alone_over_hotadd_needs_no_worker_for_others(plan: Plan) -> None:
    source = plan([*OFF, "transports=hotadd"], (BASE, 1))
    assert written(source) == [[BASE]]
    assert source.chains[0].images[0].worker == 0


@pytest.mark.parametrize(
    ("disks", "says"),
    [
        (((f"{BASE}@snapshot-1", 1),), "snapshot-1 holds it"),
        (((DELTA, 2),), "composed of 2 links"),
        (((BASE, 1), (f"{DELTA}@snapshot-2", 2)), "not opened by itself"),
        (
            ((f"{BASE}@snapshot-1", 1), (f"{BASE}@snapshot-2", 1)),
            "another disk of this mount has the same base",
        ),
    ],
)
def test_why_a_base_is_not_written(
    plan: Plan, disks: tuple[tuple[str, int], ...], says: str
) -> None:
    words = OFF if "holds" in says else [*OFF, "restore=yes"]
    source = plan(words, *disks)
    for chain in source.chains:
        assert not chain.writable
        assert says in chain.unwritable
    assert not any(written(source))


def test_a_file_of_this_machine_needs_no_powered_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vddkfs.remote.state_folder", lambda create=False: tmp_path)
    found: list[int] = [1]

    def describe(config: VddkConfig, *_: object) -> Description:
        return Description((info(config.images[0].path, found[0]),), EngineFacts())

    monkeypatch.setattr("vddkfs.remote.describe_images", describe)
    source = open_remote("vddk:///vms/web01.vmdk", parse_options(["writable"]))
    assert written(source) == [["/vms/web01.vmdk"]]
    found[0] = 2
    source = open_remote("vddk:///vms/web01.vmdk", parse_options(["writable", "restore=yes"]))
    assert "composed of 2 links" in source.chains[0].unwritable


def test_a_disk_that_is_written_keeps_a_session_and_the_others_need_one(plan: Plan) -> None:
    disks = ((f"{BASE}@snapshot-1", 1), (LEAF, 3))
    words = [*OFF, "restore=yes", "max_sessions=1"]
    with pytest.raises(UsageError, match="max_sessions=1 leaves too few") as caught:
        plan(words, *disks)
    assert "max_sessions=2" in caught.value.advice
    assert plan([*words, "max_sessions=2"], *disks).chains[0].writable
    assert plan(words, (DATA, 1)).chains[0].writable
    assert plan(["max_sessions=1"], *disks).workers
