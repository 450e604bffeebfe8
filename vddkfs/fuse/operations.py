"""The kernel's requests, answered from the tree: inode and handle in, bytes or errno out. No
policy.

Every handler is guarded (see ``guard``). Offsets and sizes in bytes.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Sequence
from typing import Final

from vddkfs.disks.image import Handle, Image
from vddkfs.errors import VddkfsError
from vddkfs.fuse.complaints import Complaints
from vddkfs.fuse.guard import file_errno, guarded
from vddkfs.fuse.read_only import ReadOnly
from vddkfs.fuse.served import Served
from vddkfs.fuse.session import pyfuse3
from vddkfs.fuse.tree import Folder, Node, Text, Tree, Window
from vddkfs.options import MountOptions

log = logging.getLogger(__name__)

STATIC: Final = 300.0
"""Seconds for which the kernel may trust a name or attribute that never changes."""
BRIEF: Final = 1.0
"""The same where another look is worth a request."""
_BLOCK: Final = 4096
_XATTR: Final = "user.vddkfs."


class Operations(ReadOnly):
    """The handlers of one mount."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self,
        tree: Tree,
        options: MountOptions,
        capacity: int,
        engine: str = "vmdk",
        transport: str = "file",
    ) -> None:
        super().__init__()
        self._engine = engine
        self._transport = transport
        self._tree = tree
        self._options = options
        self._capacity = capacity
        self.served: dict[str, Served] = {}
        """What was read of each image, by its name; of those that were opened."""
        self._handles: dict[int, tuple[Window, Handle, Served] | bytes] = {}
        self._synchronous: set[int] = set()
        """Files that were opened with O_SYNC or O_DSYNC: the kernel leaves that to us where its
        pages are passed by."""
        self._folders: dict[int, tuple[Folder, list[tuple[str, Node]]]] = {}
        self._next_handle = 1
        self._complaints = Complaints()

    @property
    def open_files(self) -> int:
        """How many files of the mount are open."""
        return len(self._handles)

    @property
    def written_images(self) -> dict[str, Image]:
        """The images that have a file open to be written, by their names."""
        opened = [found[1] for found in self._handles.values() if not isinstance(found, bytes)]
        return {handle.image.name: handle.image for handle in opened if handle.writes}

    def _node(self, inode: int) -> Node:
        node = self._tree.nodes.get(inode)
        if node is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return node

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.inode
        entry.st_uid, entry.st_gid = self._options.uid, self._options.gid
        entry.st_blksize = _BLOCK
        entry.entry_timeout = entry.attr_timeout = STATIC
        mtime = node.mtime_ns
        if isinstance(node, Folder):
            entry.st_mode = stat.S_IFDIR | (0o555 & ~self._options.umask)
            folders = sum(isinstance(child, Folder) for child in node.children.values())
            entry.st_nlink = 2 + folders
        else:
            entry.st_mode = stat.S_IFREG | (0o444 & ~self._options.umask)
        if isinstance(node, Text):
            entry.st_size = node.size
            entry.st_blocks = -(-node.size // 512)
            entry.attr_timeout = 0.0 if node.changing else STATIC
        elif isinstance(node, Window):
            entry.st_size = node.size
            entry.st_nlink = node.links
            entry.st_blksize = 1024 * 1024
            entry.st_blocks = node.allocated_bytes() // 512
            settled = node.image.map is not None and node.image.policy.lasts
            entry.attr_timeout = STATIC if settled and not node.image.writable else 0.0
            if node.writable:
                entry.st_mode = stat.S_IFREG | (0o666 & ~self._options.umask)
            if node.folder is not None:
                entry.entry_timeout = 0.0
            mtime = node.image.mtime_ns
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = mtime
        return entry

    async def _fresh(self, node: Node) -> pyfuse3.EntryAttributes:
        """Return the attributes of a node that somebody looks at."""
        if isinstance(node, Text) and not node.costly and (node.changing or not node.size):
            node.size = len(await node.render())
        elif isinstance(node, Window):
            node.image.want_map()
            await node.image.settle()
        return self._attributes(node)

    @guarded
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name in a folder."""
        folder = self._node(parent_inode)
        if not isinstance(folder, Folder):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        node: Node | None
        if name == b".":
            node = folder
        elif name == b"..":
            node = self._node(folder.parent)
        else:
            node = (await folder.entries()).get(os.fsdecode(name))
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self._fresh(node)

    @guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return a node's attributes."""
        return await self._fresh(self._node(inode))

    @guarded
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Open a folder; its entries are those of now."""
        folder = self._node(inode)
        if not isinstance(folder, Folder):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        entries: list[tuple[str, Node]] = sorted((await folder.entries()).items())
        handle = self._new_handle()
        self._folders[handle] = (folder, entries)
        return handle

    @guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Hand out the entries from the *start_id*-th on; ``.`` and ``..`` first."""
        folder, entries = self._folders[fh]
        all_entries = [(".", folder), ("..", self._node(folder.parent)), *entries]
        for number, (name, node) in enumerate(all_entries[start_id:], start_id + 1):
            attributes = self._attributes(node)
            if isinstance(node, Text | Window):
                # The size or the blocks may not be known yet: whoever wants them asks for them.
                attributes.attr_timeout = 0.0
            if not pyfuse3.readdir_reply(token, os.fsencode(name), attributes, number):
                break

    @guarded
    async def releasedir(self, fh: int) -> None:
        """Close a folder."""
        self._folders.pop(fh, None)

    def _new_handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    @guarded
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file; EROFS for writing one that is not to be written."""
        node = self._node(inode)
        write = flags & os.O_ACCMODE != os.O_RDONLY
        number = self._new_handle()
        if write and not isinstance(node, Window):
            raise pyfuse3.FUSEError(errno.EROFS)
        if isinstance(node, Text):
            content = await node.render()
            node.size = len(content)
            self._handles[number] = content
            return pyfuse3.FileInfo(fh=number, direct_io=True, keep_cache=False)
        if not isinstance(node, Window):
            raise pyfuse3.FUSEError(errno.EISDIR)
        direct = bool(flags & os.O_DIRECT)
        try:
            node.check_access(write)
            handle = await node.image.open(direct, write)
        except VddkfsError as error:
            level = logging.WARNING if error.errno == errno.EROFS else logging.ERROR
            log.log(level, "%s cannot be opened: %s", node.image.name, error)
            raise pyfuse3.FUSEError(file_errno(error)) from error
        await node.check()
        if node.stale:
            # The open found the source changed. On ESTALE the kernel looks the name up again, and
            # opens the inode that shows the disk as it is now.
            raise pyfuse3.FUSEError(errno.ESTALE)
        served = self.served.setdefault(node.image.name, Served())
        self._handles[number] = (node, handle, served)
        if write and flags & os.O_DSYNC:  # O_SYNC has that bit too
            self._synchronous.add(number)
        # What is kept of nothing is not kept by the kernel either, and what is written by way of
        # another file it would not hear of. Who writes past the kernel's pages writes in parallel.
        past = not node.image.policy.caches or node.written_elsewhere or (write and direct)
        return pyfuse3.FileInfo(fh=number, direct_io=past, keep_cache=handle.keep_cache)

    @guarded
    async def read(  # type: ignore[override]  # any buffer will do, whatever the stub says
        self, fh: int, off: int, size: int
    ) -> memoryview | bytes:
        """Return *size* bytes, less only at the end of the file. A view is valid until an await."""
        found = self._handles[fh]
        if isinstance(found, bytes):
            return found[off : off + size]
        window, handle, served = found
        under_way = window.reads.begin()
        began = time.perf_counter()
        try:
            data = await window.image.read(
                handle, window.start + off, max(0, min(size, window.size - off))
            )
        except VddkfsError as error:
            served.errors += 1
            self._complaints.tell("read", window.image.name, window.start + off, error)
            raise pyfuse3.FUSEError(file_errno(error)) from error
        finally:
            under_way.end()
            served.times.observe(time.perf_counter() - began)
        served.bytes += len(data)
        return data

    @guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write *buf* to the image, less only at its end; it is there when this returns, and on the
        disk if the file was opened for that.
        """
        found = self._handles[fh]
        if isinstance(found, bytes) or not found[1].writes:
            raise pyfuse3.FUSEError(errno.EBADF)
        window, handle, served = found
        under_way = window.reads.begin()
        began = time.perf_counter()
        try:
            size = await window.image.write(handle, off, buf)
        except VddkfsError as error:
            served.errors += 1
            self._complaints.tell("write", window.image.name, off, error)
            raise pyfuse3.FUSEError(file_errno(error)) from error
        finally:
            under_way.end()
            served.write_times.observe(time.perf_counter() - began)
        served.written += size
        if fh in self._synchronous:
            await self._flush(window, handle, served)
        return size

    @guarded
    async def release(self, fh: int) -> None:
        """Close a file."""
        self._handles.pop(fh, None)
        self._synchronous.discard(fh)

    @guarded
    async def flush(self, fh: int) -> None:
        """Have what was written on the disk when a file is closed."""
        found = self._handles[fh]
        if not isinstance(found, bytes) and found[1].writes:
            await self._flush(*found)

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Have what was written on the disk, whoever wrote it."""
        found = self._handles[fh]
        if not isinstance(found, bytes) and found[1].image.writable:
            await self._flush(*found)

    async def _flush(self, window: Window, handle: Handle, served: Served) -> None:
        try:
            await window.image.flush(handle)
        except VddkfsError as error:
            served.errors += 1
            self._complaints.tell("flush", window.image.name, 0, error)
            raise pyfuse3.FUSEError(file_errno(error)) from error

    @guarded
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Take what tools say before they write over a disk; nothing of it changes anything.

        O_TRUNC arrives here as a size of 0 without a handle. A disk has the size that it has.
        """
        node = self._node(inode)
        if not isinstance(node, Window) or not node.writable:
            raise pyfuse3.FUSEError(errno.EROFS)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        resized = fields.update_size and attr.st_size != node.size
        if resized and (fh is not None or attr.st_size):
            raise pyfuse3.FUSEError(errno.EPERM)
        return self._attributes(node)

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Nothing is ever dirty."""

    async def lseek(self, inode: int, offset: int, whence: int) -> int:
        """Return where data or a hole begins, as lseek(2). Raises FUSEError only."""
        return await self._lseek(inode, offset, whence)

    @guarded
    async def _lseek(self, inode: int, offset: int, whence: int) -> int:
        node = self._node(inode)
        if not isinstance(node, Text | Window):
            raise pyfuse3.FUSEError(errno.EISDIR)
        if not 0 <= offset < node.size:
            raise pyfuse3.FUSEError(errno.ENXIO)
        if isinstance(node, Text):
            # ENOSYS would make the kernel ask no more, for any file of the mount.
            return offset if whence == os.SEEK_DATA else node.size
        if whence == os.SEEK_DATA:
            found = await node.image.seek_data(node.start + offset) - node.start
            if found >= node.size:
                raise pyfuse3.FUSEError(errno.ENXIO)
            return found
        if whence == os.SEEK_HOLE:
            return min(node.size, await node.image.seek_hole(node.start + offset) - node.start)
        raise pyfuse3.FUSEError(errno.EINVAL)

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the disks' capacity as the size, and nothing free."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_blocks = -(-self._capacity // _BLOCK)
        data.f_files = len(self._tree.nodes)
        data.f_namemax = 255
        return data

    @guarded
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        """Leave the decision to the kernel (default_permissions)."""
        return True

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return one of the ``user.vddkfs.*`` attributes of an image."""
        value = self._xattrs(self._node(inode)).get(os.fsdecode(name))
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return os.fsencode(value)

    @guarded
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """Attributes are not listed, so that a copy does not try to take them along."""
        return []

    def _xattrs(self, node: Node) -> dict[str, str]:
        if not isinstance(node, Window):
            return {}
        image = node.image
        values = {
            "capacity": str(node.size),
            "transport": self._transport,
            "engine": self._engine,
            "policy": image.policy.value,
            "link": image.links[-1].path,
            "format": image.links[-1].format,
            "cid": image.links[-1].content_id,
        }
        return {_XATTR + key: value for key, value in values.items()}
