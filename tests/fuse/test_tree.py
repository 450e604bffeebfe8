"""The tree of the mount: names, inode numbers, and partitions that follow the disk."""

import copy
import errno
from types import SimpleNamespace
from typing import Any

import pytest

from vddkfs.cache.coherence import policy
from vddkfs.disks.extents import ExtentMap
from vddkfs.disks.partitions import Partition, PartitionTable
from vddkfs.errors import EngineError, VddkfsError
from vddkfs.fuse.tree import ROOT, Folder, Node, Text, Tree, Window

SECTORS = 4096


class FakeImage:
    """What the kernel's side needs of an image. Byte n of it is n // 512 modulo 256."""

    def __init__(self, number: int = 0, frozen: bool = False) -> None:
        self.number = number
        self.name = f"web/chain/{number}.raw"
        self.capacity = SECTORS * 512
        self.policy = policy(frozen, "auto")
        self.mtime_ns = 1000 + number
        self.map: ExtentMap | None = None
        self.table: PartitionTable | None = None
        self.error: Exception | None = None
        self.wanted = 0
        self.looks = 0
        self.opened: list[bool] = []
        self.reads: list[tuple[int, int]] = []
        self.writable = False
        self.above_writes = False
        self.written: list[tuple[int, bytes]] = []
        self.flushes = 0
        self.settled = 0
        link = SimpleNamespace(path="/vm/a.vmdk", format="monolithicSparse", content_id="0badcafe")
        self.links = (link,)

    async def open(self, direct: bool, write: bool = False) -> Any:
        if write and not self.writable:
            raise EngineError("it is mounted to be read only", errno=errno.EROFS)
        self.opened.append(direct)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(keep_cache=self.policy.lasts, writes=write, image=self)

    async def read(self, handle: Any, start: int, size: int) -> bytes:
        self.reads.append((start, size))
        if self.error is not None:
            raise self.error
        end = min(start + size, self.capacity)
        first = start // 512
        data = b"".join(bytes([n % 256]) * 512 for n in range(first, -(-end // 512)))
        return data[start - first * 512 : end - first * 512]

    async def write(self, handle: Any, start: int, data: bytes) -> int:
        if self.error is not None:
            raise self.error
        if start >= self.capacity:
            raise EngineError("a write past its end", errno=errno.ENOSPC)
        self.written.append((start, data))
        return min(len(data), self.capacity - start)

    async def flush(self, handle: Any) -> None:
        self.flushes += 1
        if self.error is not None:
            raise self.error

    async def settle(self) -> None:
        self.settled += 1

    async def partitions(self) -> PartitionTable | None:
        self.looks += 1
        if self.error is not None:
            raise self.error
        return self.table

    def want_map(self) -> None:
        self.wanted += 1

    def allocated_bytes(self) -> int:
        return self.map.allocated * 512 if self.map is not None else 100_000

    async def seek_data(self, offset: int) -> int:
        found = self.map.seek_data(offset // 512) if self.map is not None else offset // 512
        if found is None:
            raise VddkfsError("no data after that offset", errno=errno.ENXIO)
        return max(offset, found * 512)

    async def seek_hole(self, offset: int) -> int:
        found = self.map.seek_hole(offset // 512) if self.map is not None else SECTORS
        return max(offset, found * 512)


def make_disk(name: str = "web", links: int = 3) -> Any:
    images = tuple(FakeImage(number, number < links - 1) for number in range(links))
    return SimpleNamespace(name=name, images=images, top=images[-1])


def text(content: bytes) -> Any:
    async def render() -> bytes:
        return content

    return render


def make_tree(*disks: Any) -> Tree:
    tree = Tree(text(b"vm"), text(b"status"), text(b"metrics"), 7)
    for disk in disks or (make_disk(),):
        tree.add_disk(disk, text(b"info"), text(b"map"))
    return tree


def find(tree: Tree, path: str) -> Any:
    node: Any = tree.root
    for name in path.split("/"):
        node = node.children[name]
    return node


def paths(folder: Folder, prefix: str = "") -> dict[str, Node]:
    found: dict[str, Node] = {}
    for name, node in folder.children.items():
        found[prefix + name] = node
        if isinstance(node, Folder):
            found |= paths(node, f"{prefix}{name}/")
    return found


def test_the_tree_is_the_one_of_the_manual() -> None:
    assert set(paths(make_tree().root)) == {
        "vm.json",
        ".vddkfs",
        ".vddkfs/status.json",
        ".vddkfs/metrics",
        "web",
        "web/disk.raw",
        "web/chain",
        "web/chain/0.raw",
        "web/chain/1.raw",
        "web/chain/2.raw",
        "web/partitions",
        "web/info.json",
        "web/map.json",
    }


async def test_each_file_of_a_disk_knows_its_names_and_keeps_them() -> None:
    disk = make_disk()
    disk.top.table = TABLE
    tree = make_tree(disk)
    await find(tree, "web/partitions").entries()
    windows = {path: node for path, node in paths(tree.root).items() if isinstance(node, Window)}
    assert len(windows) == 4 + len(find(tree, "web/partitions").children)
    for path, node in windows.items():
        assert path in node.names
        assert all(windows[name] is node for name in node.names)
    for image in disk.images:
        tree.renew(image)
    disk.top.table = copy.copy(TABLE)
    await find(tree, "web/partitions").entries()
    for path, node in windows.items():
        assert find(tree, path).names == node.names


def test_disk_raw_is_the_top_of_the_chain_under_another_name() -> None:
    tree = make_tree()
    top = find(tree, "web/disk.raw")
    assert top is find(tree, "web/chain/2.raw")
    assert (top.links, top.start, top.size) == (2, 0, SECTORS * 512)
    assert find(tree, "web/chain/0.raw").links == 1


def test_each_node_has_a_number_of_its_own_and_is_found_by_it() -> None:
    tree = make_tree(make_disk("a", 1), make_disk("b", 200), make_disk("c", 3))
    nodes = paths(tree.root)
    numbers: dict[int, Node] = {}
    for node in nodes.values():
        assert numbers.setdefault(node.inode, node) is node
        assert tree.nodes[node.inode] is node
    assert len(numbers) == len(nodes) - 3, "disk.raw is a hard link in each of three folders"
    assert tree.nodes[ROOT] is tree.root


def test_the_same_source_has_the_same_numbers_at_every_mount() -> None:
    first, second = (make_tree(make_disk("a"), make_disk("b")) for _ in range(2))
    assert {p: n.inode for p, n in paths(first.root).items()} == {
        p: n.inode for p, n in paths(second.root).items()
    }
    longer = make_tree(make_disk("a"), make_disk("b", 2))
    assert find(longer, "b/info.json").inode == find(first, "b/info.json").inode


def test_every_folder_knows_the_one_above_it() -> None:
    tree = make_tree()
    for folder in [tree.root, *(n for n in paths(tree.root).values() if isinstance(n, Folder))]:
        for child in folder.children.values():
            if isinstance(child, Folder):
                assert child.parent == folder.inode
    assert tree.root.parent == ROOT


async def test_documents_are_rendered_when_they_are_asked_for() -> None:
    tree = make_tree()
    for path, content, changing in (
        ("vm.json", b"vm", False),
        ("web/info.json", b"info", False),
        ("web/map.json", b"map", True),
        (".vddkfs/status.json", b"status", True),
        (".vddkfs/metrics", b"metrics", True),
    ):
        node = find(tree, path)
        assert isinstance(node, Text)
        assert await node.render() == content
        assert node.changing is changing


# Partitions

ONE = Partition(number=1, start=512, size=1024, type="0x83")
TABLE = PartitionTable(
    "dos",
    (
        ONE,
        Partition(number=2, start=2048, size=8192, type="0x05"),
        Partition(number=3, start=0, size=0, type="0x83"),
        Partition(number=5, start=4096, size=512, type="0x07"),
    ),
)


async def test_partitions_are_windows_without_the_containers() -> None:
    disk = make_disk()
    tree = make_tree(disk)
    folder = find(tree, "web/partitions")
    assert await folder.entries() == {}
    disk.top.table = TABLE
    entries = await folder.entries()
    assert sorted(entries) == ["1.raw", "5.raw"]
    window = entries["5.raw"]
    assert (window.image, window.start, window.size, window.links) == (disk.top, 4096, 512, 1)
    assert len({node.inode for node in entries.values()} | {disk.top}) == 3
    assert all(tree.nodes[node.inode] is node for node in entries.values())


async def test_a_partition_keeps_its_number_while_the_table_is_the_same() -> None:
    disk = make_disk()
    folder = find(make_tree(disk), "web/partitions")
    disk.top.table = TABLE
    first = dict(await folder.entries())
    assert dict(await folder.entries()) == first
    disk.top.table = PartitionTable("dos", (ONE,))
    assert list(await folder.entries()) == ["1.raw"]


async def test_partitions_of_a_disk_that_cannot_be_read_are_an_error_and_come_back() -> None:
    disk = make_disk()
    folder = find(make_tree(disk), "web/partitions")
    disk.top.table = TABLE
    disk.top.error = VddkfsError("bad sector")
    with pytest.raises(VddkfsError, match="bad sector"):
        await folder.entries()
    disk.top.error = None
    assert len(await folder.entries()) == 2


# An image that has become another disk


def test_files_of_another_disk_are_other_inodes() -> None:
    disk = make_disk()
    tree = make_tree(disk)
    old = paths(tree.root)
    forgotten = tree.renew(disk.top)
    new = paths(tree.root)
    changed = {path for path in old if old[path] is not new[path]}
    assert changed == {"web/disk.raw", "web/chain/2.raw"}, "the other images stay"
    was, now = old["web/disk.raw"], new["web/disk.raw"]
    assert isinstance(was, Window)
    assert isinstance(now, Window)
    assert now is new["web/chain/2.raw"], "still one inode"
    assert (was.stale, now.stale) == (True, False)
    assert now.inode != was.inode
    assert (now.start, now.size, now.links) == (was.start, was.size, was.links)
    assert tree.nodes[was.inode] is was, "a handle of before still finds it"
    assert tree.nodes[now.inode] is now
    folders = old["web"].inode, old["web/chain"].inode
    expected = [(folders[0], "disk.raw", was.inode), (folders[1], "2.raw", was.inode)]
    assert sorted(forgotten) == sorted(expected)


async def test_every_change_gives_a_number_that_was_never_used() -> None:
    disk = make_disk()
    tree = make_tree(disk)
    disk.top.table = TABLE
    seen: set[int] = set()
    for _ in range(4):
        entries = await find(tree, "web/partitions").entries()
        numbers = {node.inode for node in (find(tree, "web/disk.raw"), *entries.values())}
        assert len(numbers) == 3
        assert not numbers & seen
        seen |= numbers
        tree.renew(disk.top)
        disk.top.table = PartitionTable("dos", TABLE.partitions)


async def test_a_partition_that_moved_or_went_is_stale_under_its_old_number() -> None:
    disk = make_disk()
    tree = make_tree(disk)
    folder = find(tree, "web/partitions")
    disk.top.table = TABLE
    old = dict(await folder.entries())
    moved = Partition(number=1, start=1024, size=1024, type="0x83")
    disk.top.table = PartitionTable("dos", (moved,))
    new = dict(await folder.entries())
    assert list(new) == ["1.raw"]
    assert new["1.raw"].start == 1024
    assert new["1.raw"].inode not in {node.inode for node in old.values()}
    assert all(node.stale for node in old.values())
    disk.top.table = PartitionTable("dos", (moved, TABLE.partitions[3]))
    again = dict(await folder.entries())
    assert again["1.raw"] is new["1.raw"], "it is where it was"
    assert not again["5.raw"].stale
    assert all(tree.nodes[node.inode] is node for node in again.values())
