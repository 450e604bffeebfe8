"""The tree of the mount: what is there and under which inode number. Knows nothing of FUSE.

Inode numbers follow from the order of disks, links and partitions, so that the same source has the
same numbers at every mount: each disk has a range of 2^20 of its own.
"""

import errno
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from vddkfs.disks.allocation import guessed_bytes
from vddkfs.disks.disk import Disk
from vddkfs.disks.extents import ExtentMap
from vddkfs.disks.image import Image
from vddkfs.disks.partitions import Partition, PartitionTable
from vddkfs.engines.base import SECTOR
from vddkfs.errors import EngineError
from vddkfs.fuse.reads import Reads

ROOT: Final = 1
_VM_JSON: Final = 2
_CONTROL: Final = 3
_STATUS: Final = 4
_METRICS: Final = 5
_DISK_RANGE: Final = 1 << 20
_INFO, _MAP, _CHAIN, _PARTITIONS = 1, 2, 3, 4
_GENERATION: Final = 1 << 48
"""Added to the inode number of an image each time that it becomes another disk."""
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
    """A file whose content is made when it is opened. *size* is that of the last content made.

    *changing*: another one may be made each time. *costly*: not for a mere look at the size.
    """

    def __init__(
        self,
        inode: int,
        mtime_ns: int,
        render: Render,
        changing: bool = True,
        costly: bool = False,
    ) -> None:
        super().__init__(inode, mtime_ns)
        self.render = render
        self.changing = changing
        self.costly = costly
        self.size = 0


class Window(Node):
    """A view of [*start*, *start* + *size*) of an image, in bytes.

    *folder* is the one that found it, for a partition. *names* are the file's paths in the mount.
    """

    def __init__(
        self,
        inode: int,
        image: Image,
        start: int,
        size: int,
        links: int = 1,
        folder: "Partitions | None" = None,
        names: tuple[str, ...] = (),
    ) -> None:
        super().__init__(inode, image.mtime_ns)
        self.image = image
        self.names = names
        self.reads = Reads()
        self.start = start
        self.size = size
        self.links = links
        self.folder = folder
        self.stale = False
        """Set when another inode shows what is at this place now."""
        self._allocated: tuple[ExtentMap, int] | None = None

    @property
    def writable(self) -> bool:
        """Whether the file may be opened to be written. A partition may not: two inodes must never
        show the same writable bytes.
        """
        return self.image.writable and self.folder is None

    @property
    def written_elsewhere(self) -> bool:
        """Whether the file's bytes are written by way of another file of the mount."""
        return self.image.above_writes or (self.image.writable and self.folder is not None)

    def check_access(self, write: bool) -> None:
        """Raise EngineError, EROFS, if the file is to be written and is a partition."""
        if write and self.folder is not None and self.image.writable:
            raise EngineError(
                f"{self.names[0]}: partitions are only read",
                advice="write disk.raw; a guest's file system is mounted with -o loop,offset=",
                errno=errno.EROFS,
            )

    def renewed(self, start: int, size: int) -> "Window":
        """Return the node that shows what is here from now on; this one goes stale.

        It is another inode, because the kernel keeps what was read by inode: a file opened before
        must not be shown what one opened later has read.
        """
        self.stale = True
        inode = self.inode + _GENERATION
        return Window(inode, self.image, start, size, self.links, self.folder, self.names)

    async def check(self) -> None:
        """See whether a partition is still where it was; it is stale otherwise."""
        if self.folder is not None:
            await self.folder.entries()

    def allocated_bytes(self) -> int:
        """Return the bytes of data: exact once the map is known, below the size before that."""
        image = self.image
        if self.size == image.capacity:
            return image.allocated_bytes()
        if image.map is None or image.writable:
            return guessed_bytes(image.allocated_bytes(), self.size)
        if self._allocated is None or self._allocated[0] is not image.map:
            first, last = self.start // SECTOR, -(-(self.start + self.size) // SECTOR)
            count = sum(run.count for run in image.map.runs(first, last) if run.data)
            self._allocated = image.map, count * SECTOR
        return self._allocated[1]


class Partitions(Folder):
    """The partitions of an image: found when somebody looks, and again when the image changed.

    *path* is that of the folder in the mount.
    """

    def __init__(
        self, inode: int, parent: int, image: Image, first_inode: int, path: str = ""
    ) -> None:
        super().__init__(inode, image.mtime_ns, parent)
        self.image = image
        self._path = path
        self._first_inode = first_inode
        self._table: PartitionTable | None = None
        self._known: dict[int, Window] = {}
        self.found: Callable[[Node], None] | None = None

    async def entries(self) -> Mapping[str, Node]:
        """Return a window for each partition. Raises VddkfsError if the image cannot be read."""
        table = await self.image.partitions()
        if table is not self._table:
            self._table = table
            parts = [part for part in table.partitions if part.size] if table is not None else []
            self.children = {
                f"{part.number}.raw": self._window(part)
                for part in parts
                if part.type not in _EXTENDED
            }
            for number, window in self._known.items():
                if f"{number}.raw" not in self.children:
                    window.stale = True
        return self.children

    def _window(self, part: Partition) -> Window:
        """Return the node of *part*: the one it had, if it is where it was."""
        window = self._known.get(part.number)
        if window is None:
            inode = self._first_inode + part.number
            names = (f"{self._path}/{part.number}.raw",)
            window = Window(inode, self.image, part.start, part.size, folder=self, names=names)
        elif window.stale or (window.start, window.size) != (part.start, part.size):
            window = window.renewed(part.start, part.size)
        self._known[part.number] = window
        if self.found is not None:
            self.found(window)
        return window


class Tree:
    """All nodes by inode number."""

    def __init__(
        self,
        vm_json: Render,
        status: Render,
        metrics: Render,
        mtime_ns: int,
        changing: bool = False,
    ) -> None:
        self._changing = changing
        self.nodes: dict[int, Node] = {}
        self.root = Folder(ROOT, mtime_ns, ROOT)
        control = Folder(_CONTROL, mtime_ns, ROOT)
        self._add(self.root)
        self._enter(self.root, "vm.json", Text(_VM_JSON, mtime_ns, vm_json, changing))
        self._enter(self.root, ".vddkfs", control)
        self._enter(control, "status.json", Text(_STATUS, mtime_ns, status))
        self._enter(control, "metrics", Text(_METRICS, mtime_ns, metrics))
        self._disks = 0

    def add_disk(self, disk: Disk, info: Render, allocation: Render) -> None:
        """Add the folder of *disk*."""
        self._disks += 1
        base = self._disks * _DISK_RANGE
        mtime = disk.top.mtime_ns
        folder = Folder(base, mtime, ROOT)
        chain = Folder(base + _CHAIN, mtime, base)
        partitions = Partitions(
            *(base + _PARTITIONS, base, disk.top, base + _FIRST_PARTITION),
            path=f"{disk.name}/partitions",
        )
        partitions.found = self._add
        self._enter(self.root, disk.name, folder)
        for image in disk.images:
            first = (f"{disk.name}/disk.raw",) if image is disk.top else ()
            names = (*first, f"{disk.name}/chain/{image.number}.raw")
            inode = base + _FIRST_IMAGE + image.number
            window = Window(inode, image, 0, image.capacity, len(names), names=names)
            self._enter(chain, f"{image.number}.raw", window)
        self._enter(folder, "disk.raw", window)
        self._enter(folder, "chain", chain)
        self._enter(folder, "partitions", partitions)
        self._enter(folder, "info.json", Text(base + _INFO, mtime, info, self._changing))
        self._enter(folder, "map.json", Text(base + _MAP, mtime, allocation, costly=True))

    def renew(self, image: Image) -> list[tuple[int, str, int]]:
        """Give every file of *image* a new inode.

        Returns (folder, name, old inode) of each, which the kernel is to forget.
        """
        fresh: dict[Window, Window] = {}
        forgotten = []
        for folder in [node for node in self.nodes.values() if isinstance(node, Folder)]:
            for name, node in list(folder.children.items()):
                if not isinstance(node, Window) or node.image is not image:
                    continue
                forgotten.append((folder.inode, name, node.inode))
                if node.folder is not None:
                    # Its folder looks for the partitions of the new disk when somebody asks.
                    node.stale = True
                    del folder.children[name]
                    continue
                if node not in fresh:
                    fresh[node] = node.renewed(node.start, node.size)
                    self._add(fresh[node])
                folder.children[name] = fresh[node]
        return forgotten

    def _enter(self, folder: Folder, name: str, node: Node) -> None:
        folder.children[name] = node
        self._add(node)

    def _add(self, node: Node) -> None:
        self.nodes[node.inode] = node
