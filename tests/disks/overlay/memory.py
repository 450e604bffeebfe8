"""A disk in memory, with what kills and power losses do to it, and with an end to its space."""

import errno
import os
import random
from dataclasses import dataclass, field

from vddkfs.disks.overlay.files import Files

PAGE = 4096
SECTOR = 512
STALE = 0xA5


class Killed(BaseException):
    """The process ends here: no further call of it arrives."""


@dataclass(eq=False)
class Inode:
    content: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    pages: set[int] = field(default_factory=set)


Names = dict[str, "Inode | None"]


class MemoryDisk(Files):
    """Files in memory. Paths are what they are called; None is a folder.

    *space* is how many pages there are. *left* calls from now on, ``Killed`` is raised. If the last
    of them writes, it does twice *part* of that, up to all of it.
    """

    def __init__(self, space: int = 1 << 30) -> None:
        self.names_now: Names = {"/": None}
        self.durable: Names = {"/": None}
        self.ops: list[tuple[str, str, Inode | str | None]] = []
        self.fds: dict[int, Inode] = {}
        self.locked: set[int] = set()
        self.next_fd = 3
        self.space = space
        self.left = -1
        self.calls = 0
        self.part = 0.0
        self.barriers = True
        self.fail: dict[str, int] = {}

    # Faults

    def step(self, what: str = "") -> bool:
        """Count a call. Raises Killed from the last on; True if it is the last."""
        if self.left == 0:
            raise Killed
        self.calls += 1
        if what in self.fail:
            raise OSError(self.fail[what], os.strerror(self.fail[what]))
        if self.left > 0:
            self.left -= 1
            return self.left == 0
        return False

    def fill(self) -> None:
        """Let somebody else take all the space that is left."""
        self.space = self.used()

    def used(self) -> int:
        inodes = {id(inode): inode for inode in self.names_now.values() if inode is not None}
        inodes |= {id(inode): inode for inode in self.fds.values()}
        return sum(len(inode.pages) for inode in inodes.values())

    def after_kill(self) -> "MemoryDisk":
        """Return the disk as the next process finds it: the kernel has all that was written."""
        found = MemoryDisk(self.space)
        found.names_now, found.durable, found.ops = self.names_now, self.durable, self.ops
        return found

    def after_power_loss(self, draw: random.Random) -> "MemoryDisk":
        """Return a disk with any of what was written since the last barriers, sector by sector."""
        names = dict(self.durable)
        for op in self.ops[: draw.randint(0, len(self.ops))]:
            _apply(names, op)
        found = MemoryDisk(self.space)
        made: dict[int, Inode] = {}
        for name, inode in names.items():
            if inode is not None and id(inode) not in made:
                made[id(inode)] = _lost(inode, draw)
            found.names_now[name] = None if inode is None else made[id(inode)]
        found.durable = dict(found.names_now)
        return found

    # Calls

    def open(self, path: str, *, create: bool = False, read_only: bool = False) -> int:
        self.step("open")
        if create:
            if path in self.names_now:
                raise FileExistsError(errno.EEXIST, "exists", path)
            self._op(("put", path, Inode()))
        inode = self.names_now.get(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        self.next_fd += 1
        self.fds[self.next_fd] = inode
        return self.next_fd

    def close(self, fd: int) -> None:
        del self.fds[fd]
        self.locked.discard(fd)

    def read_into(self, fd: int, into: memoryview, offset: int) -> int:
        self.step("read")
        part = self.fds[fd].content[offset : offset + len(into)]
        into[: len(part)] = part
        return len(part)

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        inode = self.fds[fd]
        if self.step("write"):
            data = bytes(data)[: int(len(data) * self.part * 2) // PAGE * PAGE]
            if not data:
                raise Killed
        pages = set(range(offset // PAGE, -(-(offset + len(data)) // PAGE)))
        if self.used() + len(pages - inode.pages) > self.space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inode.pages |= pages
        _put(inode.content, offset, bytes(data))
        inode.writes.append((offset, bytes(data)))
        return len(data)

    def sync(self, fd: int) -> None:
        self.step("sync")
        inode = self.fds[fd]
        if self.barriers:
            inode.durable = bytearray(inode.content)
            inode.writes = []

    def allocate(self, fd: int, offset: int, size: int) -> None:
        self.step("allocate")
        inode = self.fds[fd]
        pages = set(range(offset // PAGE, -(-(offset + size) // PAGE)))
        if self.used() + len(pages - inode.pages) > self.space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inode.pages |= pages
        if offset + size > len(inode.content):
            inode.content.extend(bytes(offset + size - len(inode.content)))

    def size(self, fd: int) -> int:
        return len(self.fds[fd].content)

    def free(self, path: str) -> int:
        return (self.space - self.used()) * PAGE

    def lock(self, fd: int) -> None:
        inode = self.fds[fd]
        if any(self.fds[other] is inode for other in self.locked):
            raise BlockingIOError(errno.EAGAIN, "locked")
        self.locked.add(fd)

    def make_folder(self, path: str) -> None:
        self.step("mkdir")
        if path in self.names_now:
            raise FileExistsError(errno.EEXIST, "exists", path)
        self._op(("put", path, None))

    def sync_folder(self, path: str) -> None:
        self.step("sync_folder")
        if self.barriers:
            # As journalling file systems do, all that came before is there too.
            self.durable, self.ops = dict(self.names_now), []

    def rename(self, old: str, new: str) -> None:
        self.step("rename")
        if old not in self.names_now:
            raise FileNotFoundError(errno.ENOENT, "no such file", old)
        self._op(("rename", old, new))

    def link(self, old: str, new: str) -> None:
        self.step("link")
        assert new not in self.names_now
        self._op(("put", new, self.names_now[old]))

    def remove(self, path: str) -> None:
        self.step("remove")
        if path not in self.names_now:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        self._op(("remove", path, None))

    def remove_folder(self, path: str) -> None:
        self.step("rmdir")
        assert not self.names(path)
        self._op(("remove", path, None))

    def names(self, path: str) -> list[str]:
        self.step("names")
        if self.names_now.get(path, self) is not None:
            raise FileNotFoundError(errno.ENOENT, "no such folder", path)
        found = [name for name in self.names_now if os.path.dirname(name) == path and name != "/"]
        return sorted(os.path.basename(name) for name in found)

    def _op(self, op: tuple[str, str, "Inode | str | None"]) -> None:
        _apply(self.names_now, op)
        self.ops.append(op)


def _apply(names: Names, op: tuple[str, str, "Inode | str | None"]) -> None:
    kind, path, what = op
    if kind == "put":
        assert not isinstance(what, str)
        names[path] = what
    elif kind == "remove":
        names.pop(path)
    else:
        assert isinstance(what, str)
        for name in [each for each in names if each == path or each.startswith(path + "/")]:
            names[what + name[len(path) :]] = names.pop(name)


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data


def _lost(inode: Inode, draw: random.Random) -> Inode:
    """Return what the disk has of *inode* after a power loss."""
    content = bytearray(inode.durable)
    if draw.random() < 0.5:
        content.extend(bytes([STALE]) * (len(inode.content) - len(content)))
    chance = draw.choice([0.1, 0.5, 0.9])
    for offset, data in inode.writes:
        for begin in range(0, len(data), SECTOR):
            if draw.random() < chance:
                _put(content, offset + begin, data[begin : begin + SECTOR])
    return Inode(content, bytearray(content), [], set(range(-(-len(content) // PAGE))))
