"""The tree of the mount: what is there and under which inode number. Knows nothing of FUSE.

Inode numbers follow from the order of disks, links and partitions, so that the same source has the
same numbers at every mount: each disk has a range of 2^20 of its own.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Final

from vddkfs.disks.disk import Disk
from vddkfs.disks.image import Image
from vddkfs.disks.partitions import PartitionTable

ROOT: Final = 1
_VM_JSON: Final = 2
_CONTROL: Final = 3
_STATUS: Final = 4
_DISK_RANGE: Final = 1 << 20
_INFO, _MAP, _CHAIN, _PARTITIONS = 1, 2, 3, 4
_FIRST_IMAGE: Final = 0x1000
_FIRST_PARTITION: Final = 0x4000

_EXTENDED: Final = frozenset({"0x05", "0x0f", "0x85", "0x5", "0xf"})
"""MBR types of an extended partition: a container of others, with nothing to mount in it."""

Render = Callable[[], Awaitable[bytes]]


class Node:
    """Something with an inode number. *mtime_ns* is fixed unless a subclass says otherwise."""

    def __init__(self, inode: int, mtime_ns: int) -> None:
        self.inode = inode
        self.mtime_ns = mtime_ns


class Folder(Node):
    """A folder whose entries are known from the beginning."""

    def __init__(self, inode: int, mtime_ns: int, parent: int) -> None:
        super().__init__(inode, mtime_ns)
        self.parent = parent
        self.children: dict[str, Node] = {}

    async def entries(self) -> Mapping[str, Node]:
        """Return the entries. May wait for a disk in subclasses, and raise VddkfsError."""
        return self.children


class Text(Node):
    """A file whose content is made when it is opened. *size* is that of the last content made."""

    def __init__(self, inode: int, mtime_ns: int, render: Render, changing: bool = True) -> None:
        super().__init__(inode, mtime_ns)
        self.render = render
        self.changing = changing
        self.size = 0


class Window(Node):
    """A read-only view of [*start*, *start* + *size*) of an image, in bytes."""

    def __init__(self, inode: int, image: Image, start: int, size: int, links: int = 1) -> None:
        super().__init__(inode, image.mtime_ns)
        self.image = image
        self.start = start
        self.size = size
        self.links = links

    @property
    def whole(self) -> bool:
        """Say whether this is the image itself and not a partition."""
        return self.start == 0 and self.size == self.image.capacity


class Partitions(Folder):
    """The partitions of an image: found when somebody looks, and again when the image changed."""

    def __init__(self, inode: int, parent: int, image: Image, first_inode: int) -> None:
        super().__init__(inode, image.mtime_ns, parent)
        self._image = image
        self._first_inode = first_inode
        self._table: PartitionTable | None = None
        self.found: Callable[[Node], None] | None = None

    async def entries(self) -> Mapping[str, Node]:
        """Return a window for each partition. Raises VddkfsError if the image cannot be read."""
        table = await self._image.partitions()
        if table is not self._table:
            self._table = table
            self.children = dict(self._windows(table))
            for node in self.children.values():
                if self.found is not None:
                    self.found(node)
        return self.children

    def _windows(self, table: PartitionTable | None) -> Iterator[tuple[str, Node]]:
        for part in table.partitions if table is not None else ():
            if part.type not in _EXTENDED and part.size:
                inode = self._first_inode + part.number
                yield f"{part.number}.raw", Window(inode, self._image, part.start, part.size)


class Tree:
    """All nodes by inode number."""

    def __init__(self, vm_json: Render, status: Render, mtime_ns: int) -> None:
        self.nodes: dict[int, Node] = {}
        self.root = Folder(ROOT, mtime_ns, ROOT)
        control = Folder(_CONTROL, mtime_ns, ROOT)
        self._add(self.root)
        self._enter(self.root, "vm.json", Text(_VM_JSON, mtime_ns, vm_json, changing=False))
        self._enter(self.root, ".vddkfs", control)
        self._enter(control, "status.json", Text(_STATUS, mtime_ns, status))
        self._disks = 0

    def add_disk(self, disk: Disk, info: Render, allocation: Render) -> None:
        """Add the folder of *disk*."""
        self._disks += 1
        base = self._disks * _DISK_RANGE
        mtime = disk.top.mtime_ns
        folder = Folder(base, mtime, ROOT)
        chain = Folder(base + _CHAIN, mtime, base)
        partitions = Partitions(base + _PARTITIONS, base, disk.top, base + _FIRST_PARTITION)
        partitions.found = self._add
        self._enter(self.root, disk.name, folder)
        for number, image in enumerate(disk.images):
            links = 2 if image is disk.top else 1
            window = Window(base + _FIRST_IMAGE + number, image, 0, image.capacity, links)
            self._enter(chain, f"{number}.raw", window)
        self._enter(folder, "disk.raw", window)
        self._enter(folder, "chain", chain)
        self._enter(folder, "partitions", partitions)
        self._enter(folder, "info.json", Text(base + _INFO, mtime, info, changing=False))
        self._enter(folder, "map.json", Text(base + _MAP, mtime, allocation))

    def _enter(self, folder: Folder, name: str, node: Node) -> None:
        folder.children[name] = node
        self._add(node)

    def _add(self, node: Node) -> None:
        self.nodes[node.inode] = node
