"""Old content over SAN (row K26): each place that can hold some, alone, then all of them guarded.

The simulator's LUN is a loop device over a flat extent; the host writes it past this machine.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end import agent
from tests.end_to_end.freshness import (
    BUFFERED,
    HEEDFUL,
    LEAF,
    PIECE,
    WAYS,
    Source,
    delete_middle_snapshot,
    extent,
    invalidate,
    leaf,
    looks,
    over_san,
    overwrite,
    start,
    touching,
)
from tests.end_to_end.mounting import Agent, Mount, Mounts, sha256
from tests.end_to_end.remote import CHAIN, PLAIN, Proxy
from tests.end_to_end.vms import MIB, make_empty, make_vmfs, noise, raw, write

pytestmark = pytest.mark.usefixtures("loops")

ALL_NEW = dict.fromkeys(WAYS, "new")
ALL_OLD = dict.fromkeys(WAYS, "old")
LAYOUT = ALL_NEW | {"direct": "old"}
"""By design: what VDDK knew when it opened the disk, for a file that stays open."""

NOT_DIRECT = """
from vddkfs.disks.image import Image
opened = Image.open
async def open(self, direct, write=False):
    return await opened(self, False, write)
Image.open = open
"""
KERNEL = """
from vddkfs.disks.image import Handle
from vddkfs.fuse.notify import KernelPages
async def drop(self, inode, start=0, size=0):
    return True
KernelPages.drop = drop
made = Handle.__init__
def keeping(self, image, direct, keep, *others):
    made(self, image, direct, True, *others)
Handle.__init__ = keeping
"""
CACHE = f"""
{NOT_DIRECT}
from vddkfs.cache.sector_cache import ImageCache
ImageCache.invalidate = lambda self, start=0, end=None: None
"""
LIBRARY = """
from vddkfs.engines.vddk.session import OpenDisk
OpenDisk.renew = lambda self: None
"""
PAGES = """
from vddkfs.engines.vddk.devices import Flush
Flush.of = lambda self, luns, about: []
"""
MAP = f"""
{NOT_DIRECT}
class Kept:
    def __get__(self, source, owner=None):
        return vars(source).get("first")
    def __set__(self, source, found):
        if found is not None:
            vars(source).setdefault("first", found)
from vddkfs.disks.allocation import Allocation
Allocation.map = Kept()
Allocation._zeros = property(lambda source: source.map, lambda source, found: None)
"""
TABLES = """
from vddkfs.engines.vmdk.grains import SparseExtent
from vddkfs.engines.vmdk.tables import TableCache
def never_fresh(method):
    return lambda self, sector, count, fresh, flags: method(self, sector, count, False, flags)
SparseExtent.locate = never_fresh(SparseExtent.locate)
SparseExtent.pieces = never_fresh(SparseExtent.pieces)
TableCache.clear = lambda self: None
TableCache.new_keys = lambda self: 0
"""
MAP_USED = """
from vddkfs.cache.coherence import Policy
from vddkfs.disks import disk
disk.policy = lambda frozen, mode: Policy.IMMUTABLE
"""
NOT_COMPARED = """
from vddkfs.engines.vddk.reader import ImageReader
def adopt(self, found):
    self.identity = found
ImageReader._compare = adopt
"""


@pytest.mark.parametrize(
    ("name", "settings", "guard", "seen"),
    [
        # With O_DIRECT Linux itself goes past its pages of our file.
        ("plain", HEEDFUL, {"daemon": KERNEL}, ALL_OLD | {"direct": "new", "direct open": "new"}),
        ("plain", HEEDFUL, {"daemon": CACHE}, ALL_OLD),
        ("leaf", HEEDFUL, {"worker": LIBRARY}, ALL_OLD),
        ("plain", BUFFERED, {"worker": PAGES}, ALL_OLD),
        ("thin", HEEDFUL, {"daemon": MAP}, ALL_OLD),
    ],
    ids=["1-kernel", "2-sector-cache", "3-library", "4-device", "5-map"],
)
def test_k26_each_place_alone_without_its_guard(
    proxy: Proxy,
    name: str,
    settings: tuple[str, ...],
    guard: dict[str, str],
    seen: dict[str, str],
) -> None:
    proxy.kit.configure(*settings)
    disk = LEAF if name == "leaf" else f"[ds1] plain/{name}.vmdk"
    mount = over_san(proxy, disk, **guard)
    source = leaf(proxy) if name == "leaf" else extent(proxy, name)
    mount.map_known(source.name)
    with kept_pages(proxy) if guard == {"worker": PAGES} else contextlib.nullcontext():
        assert looks(mount, source) == seen


@contextlib.contextmanager
def kept_pages(proxy: Proxy) -> Iterator[None]:
    """Have the kernel keep the pages of the devices that are open, which it may drop by itself."""
    (device,) = {event.fields["device"] for event in proxy.kit.events("device-open")}
    agent.hold_pages(device)
    try:
        yield
    finally:
        agent.release_pages()


@pytest.mark.parametrize("settings", [HEEDFUL, BUFFERED], ids=["heedful", "buffered"])
def test_k26_all_places_guarded(proxy: Proxy, settings: tuple[str, ...]) -> None:
    proxy.kit.configure(*settings)
    found = {}
    for disks in (["[ds1] plain/plain.vmdk", "[ds1] plain/thin.vmdk"], [LEAF]):
        mount = over_san(proxy, *disks)
        sources = [leaf(proxy)] if LEAF in disks else [extent(proxy, n) for n in ("plain", "thin")]
        for source in sources:
            mount.map_known(source.name)
            found[source.name] = looks(mount, source)
    direct = {event.fields["direct"] for event in proxy.kit.events("device-open")}
    assert direct == {"no" if settings is BUFFERED else "yes"}
    assert found == {"plain": ALL_NEW, "thin": ALL_NEW, "web01-000002": LAYOUT}


@pytest.mark.parametrize("cache", ["auto", "strict"])
def test_k26_a_frozen_image_is_fresh_where_it_is_asked_for(proxy: Proxy, cache: str) -> None:
    """Nobody should write it: it is kept from one open to the next, but with cache=strict."""
    proxy.kit.configure(*BUFFERED)
    mount = over_san(proxy, PLAIN, options=(f"cache={cache}",))
    source = extent(proxy, "plain")
    assert looks(mount, source) == ALL_NEW | ({"open": "old"} if cache == "auto" else {})


# Place 5 without SAN: the tables of the built-in engine.


def sparse(vm: Path) -> Source:
    """Make a disk that is empty but for its beginning; its VM allocates."""
    path = make_empty(vm / "live.vmdk", 8 * MIB)
    write(path, 0, noise("first", PIECE))
    return Source(
        "live", raw(path), range(MIB, 8 * MIB, MIB), lambda at, data: write(path, at, data)
    )


@pytest.mark.parametrize(
    ("worker", "seen"), [(TABLES, ALL_OLD), ("", ALL_NEW)], ids=["trap", "guard"]
)
def test_k26_the_tables_of_the_built_in_engine(
    mount: Mounts, vm: Path, worker: str, seen: dict[str, str]
) -> None:
    source = sparse(vm)
    found = start(mount.prepare(vm), worker=worker)
    found.map_known("live")
    assert looks(found, source) == seen


@pytest.mark.parametrize("over", ["file", "san"])
@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_k26_a_block_that_the_running_vm_allocates_is_not_read_as_zeros(
    proxy: Proxy, mount: Mounts, vm: Path, over: str, guarded: bool
) -> None:
    """The map of a live image says hole, and nobody has read the block: only the map is old."""
    daemon = "" if guarded else MAP_USED
    if over == "san":
        found: Mount = over_san(proxy, LEAF, daemon=daemon)
        source = leaf(proxy)
    else:
        source = sparse(vm)
        found = start(mount.prepare(vm), daemon)
    found.map_known(source.name)
    first, second = source.places[-2:]
    held = found.open(source.file)
    found.map_known(source.name)
    for at in (first, second):
        source.change(at, noise(at, PIECE))
    wanted = noise(first, PIECE) if guarded else bytes(PIECE)
    assert found.read(source.file, first, PIECE) == wanted
    invalidate(found.path(source.file))
    assert found.ask("pread", held, PIECE, second) == noise(second, PIECE)


# A disk that becomes another one while VDDK has it closed.


@pytest.mark.parametrize("disk", [LEAF, CHAIN[2]], ids=["live", "frozen"])
@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_k26_a_middle_snapshot_is_deleted_while_an_idle_disk_is_closed(
    proxy: Proxy, tmp_path: Path, disk: str, guarded: bool
) -> None:
    """Its reader goes on all the time: every read is of the old disk, or ESTALE."""
    proxy.kit.configure(*HEEDFUL)
    options = ("idle_close=0.3", "keepalive=never")
    found = over_san(proxy, disk, options=options, worker="" if guarded else NOT_COMPARED)
    name = "web01-000002/disk.raw"
    (tmp_path / "old").write_bytes(proxy.raw(disk))
    with touching("Reads", found.path(name), tmp_path / "old") as reader:
        closed = len(proxy.kit.events("logout"))
        proxy.wait_for_more("logout", closed)
        new = delete_middle_snapshot(proxy)
        # Until now it has read what the kernel keeps, and kept nobody from closing the disk.
        assert set(reader.seen()) == {"old"}
        kinds = {"old"}
        while kinds == {"old"}:
            kinds |= {what.partition(" at ")[0] for what in reader.seen()}
    assert kinds == {"old", "stale" if guarded else "another disk"}
    found.expect(r"changed under the mount: .*it had 3 links and has 2")
    if guarded:
        found.restarts = None
        found.allow("lost its connection", "the source changed after the file was opened")
    for direct in (False, True):
        assert found.sha256(name, direct) == sha256(new)


def test_k26_dirty_maps_do_not_keep_an_invalidation(mount: Mounts, vm: Path) -> None:
    """Processes that map two files and go on touching their pages, readers, and invalidations."""
    disks = ("one", "two")
    for disk in disks:
        make_vmfs(vm / f"{disk}.vmdk", noise("first", MIB))
    found = mount(vm)
    files = [found.path(f"{disk}/disk.raw") for disk in disks]
    with contextlib.ExitStack() as stack:
        touchers = [stack.enter_context(touching("Maps", file)) for file in files]
        agents = [Agent() for _ in files]
        for agent in agents:
            stack.callback(agent.close)
        for count in range(10):
            content = noise(count, MIB)
            for disk in disks:
                overwrite(vm / f"{disk}-flat.vmdk", 0, content)
            for agent, file in zip(agents, files, strict=True):
                agent.send("sha256", file)
            invalidate(*files)
            for agent in agents:
                agent.receive(10)
            for file in files:
                [page] = found.ask("mapped", file, False, [(MIB // 2, 4096)])
                assert page == content[MIB // 2 :][:4096]
            for toucher in touchers:
                assert set(toucher.seen()) == {"round"}
