"""The kernel's requests without a kernel: attributes, folders, errors; test_writing has writes."""

import errno
import os
import stat
from functools import partial
from typing import Any

import pytest
import trio

from tests.fuse.test_tree import SECTORS, TABLE, FakeImage, find, make_disk, make_tree, paths
from vddkfs.disks.extents import ExtentMap
from vddkfs.disks.partitions import Partition, PartitionTable
from vddkfs.errors import EngineError, SourceMissing, StaleImage, VddkfsError
from vddkfs.fuse import session
from vddkfs.fuse.operations import Operations
from vddkfs.fuse.tree import Folder
from vddkfs.options import MountOptions

import pyfuse3  # isort: skip

SIZE = SECTORS * 512
CTX: Any = None
assert session, "imported first: it loads what pyfuse3 stands on"


class Mount:
    """The handlers of a mount of one disk with three links, and short ways to call them."""

    def __init__(self, **options: Any) -> None:
        self.disk = make_disk()
        self.top: FakeImage = self.disk.top
        self.tree = make_tree(self.disk)
        self.handlers = Operations(self.tree, MountOptions(**options), 3 * SIZE + 1)

    async def stat(self, path: str) -> Any:
        return await self.handlers.getattr(find(self.tree, path).inode, CTX)

    async def open(self, path: str, flags: int = os.O_RDONLY) -> Any:
        return await self.handlers.open(find(self.tree, path).inode, flags, CTX)

    async def seek(self, path: str, offset: int, whence: int) -> int:
        return await self.handlers.lseek(find(self.tree, path).inode, offset, whence)


@pytest.fixture
def mount() -> Mount:
    return Mount(uid=5, gid=6)


def known(*runs: tuple[int, int]) -> ExtentMap:
    """Return a whole map with data in [first, last) of *runs*, in sectors."""
    found = ExtentMap(SECTORS)
    for first, last in runs:
        found.append(found.known, first - found.known, False)
        found.append(first, last - first, True)
    found.append(found.known, SECTORS - found.known, False)
    return found


# Attributes


async def test_attributes_are_those_of_a_read_only_tree(mount: Mount) -> None:
    for path, node in paths(mount.tree.root).items():
        found = await mount.stat(path)
        assert found.st_ino == node.inode
        assert (found.st_uid, found.st_gid) == (5, 6)
        is_folder = isinstance(node, Folder)
        assert found.st_mode == (stat.S_IFDIR | 0o500 if is_folder else stat.S_IFREG | 0o400)
        assert found.st_mtime_ns == found.st_ctime_ns == found.st_atime_ns
    assert (await mount.stat("web")).st_nlink == 4
    assert (await mount.stat("web/chain")).st_nlink == 2


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
async def test_umask_takes_permissions_away(umask: int) -> None:
    mount = Mount(umask=umask)
    assert stat.S_IMODE((await mount.stat("web")).st_mode) == 0o555 & ~umask
    assert stat.S_IMODE((await mount.stat("web/disk.raw")).st_mode) == 0o444 & ~umask


async def test_an_image_has_its_exact_size_and_honest_blocks(mount: Mount) -> None:
    found = await mount.stat("web/disk.raw")
    assert (found.st_size, found.st_blocks, found.st_nlink) == (SIZE, 100_000 // 512, 2)
    assert found.attr_timeout == 0, "its blocks are not known yet"
    assert mount.top.wanted == 1, "somebody looked, so they will be"
    for image in mount.disk.images:
        image.map = known((0, 10), (100, 103))
    assert (await mount.stat("web/disk.raw")).st_blocks == 13
    assert (await mount.stat("web/disk.raw")).attr_timeout == 0, "the live one may change"
    frozen = await mount.stat("web/chain/0.raw")
    assert (frozen.st_blocks, frozen.st_nlink) == (13, 1)
    assert frozen.attr_timeout > 60
    mount.top.mtime_ns = 777
    assert (await mount.stat("web/disk.raw")).st_mtime_ns == 777


async def test_blocks_of_a_partition_are_those_in_its_window(mount: Mount) -> None:
    mount.top.table = TABLE
    await find(mount.tree, "web/partitions").entries()
    assert (await mount.stat("web/partitions/1.raw")).st_blocks == 1, "a guess"
    mount.top.map = known((0, 2), (8, 4000))
    assert (await mount.stat("web/partitions/1.raw")).st_blocks == 1
    assert (await mount.stat("web/partitions/5.raw")).st_blocks == 1


async def test_documents_have_the_size_of_their_content(mount: Mount) -> None:
    assert (await mount.stat("vm.json")).st_size == len(b"vm")
    assert (await mount.stat("vm.json")).attr_timeout > 60
    assert (await mount.stat(".vddkfs/status.json")).st_size == len(b"status")
    assert (await mount.stat(".vddkfs/status.json")).attr_timeout == 0


async def test_statfs_tells_the_capacity_and_nothing_free(mount: Mount) -> None:
    found = await mount.handlers.statfs(CTX)
    assert found.f_blocks * found.f_frsize >= 3 * SIZE + 1
    assert (found.f_bfree, found.f_bavail) == (0, 0)


# Names and folders


async def test_names_are_found_and_others_are_not(mount: Mount) -> None:
    root, web = mount.tree.root.inode, find(mount.tree, "web").inode
    lookup = mount.handlers.lookup
    assert (await lookup(root, b"web", CTX)).st_ino == web
    assert (await lookup(web, b".", CTX)).st_ino == web
    assert (await lookup(web, b"..", CTX)).st_ino == root
    assert (await lookup(root, b"..", CTX)).st_ino == root
    vm_json = find(mount.tree, "vm.json").inode
    for inode, name, code in (
        (root, b"none", errno.ENOENT),
        (root, b"caf\xe9", errno.ENOENT),
        (vm_json, b"x", errno.ENOTDIR),
        (999_999, b"x", errno.ESTALE),
    ):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await lookup(inode, name, CTX)
        assert caught.value.errno == code


async def test_a_name_that_is_not_utf_8_is_found_and_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = make_tree(make_disk("caf\udce9"))
    handlers = Operations(tree, MountOptions(), SIZE)
    found = await handlers.lookup(tree.root.inode, b"caf\xe9", CTX)
    assert found.st_ino == find(tree, "caf\udce9").inode
    assert b"caf\xe9" in await listed(handlers, tree.root.inode, 100, monkeypatch)


async def listed(
    handlers: Operations, inode: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> list[bytes]:
    """List a folder as the kernel does, *room* entries at a time."""
    names: list[bytes] = []
    position = left = 0

    def reply(token: Any, name: bytes, attributes: Any, next_id: int) -> bool:
        nonlocal position, left
        if not left:
            return False
        left -= 1
        assert next_id > position
        assert attributes.st_ino
        names.append(name)
        position = next_id
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    handle = await handlers.opendir(inode, CTX)
    while True:
        before, left = position, room
        await handlers.readdir(handle, position, CTX)
        if position == before:
            break
    await handlers.releasedir(handle)
    return names


@pytest.mark.parametrize("room", [1, 2, 3, 100])
async def test_a_folder_is_listed_whole_however_little_room_there_is(
    room: int, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("", ".vddkfs", "web", "web/chain", "web/partitions"):
        folder = find(mount.tree, path) if path else mount.tree.root
        names = await listed(mount.handlers, folder.inode, room, monkeypatch)
        assert names[:2] == [b".", b".."]
        assert names[2:] == sorted(os.fsencode(name) for name in folder.children)


async def test_a_listing_is_of_the_moment_it_began(
    mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount.top.table = TABLE
    names: list[bytes] = []
    monkeypatch.setattr(pyfuse3, "readdir_reply", lambda t, name, a, n: names.append(name) or True)
    handle = await mount.handlers.opendir(find(mount.tree, "web/partitions").inode, CTX)
    mount.top.table = None
    await mount.handlers.readdir(handle, 2, CTX)
    assert names == [b"1.raw", b"5.raw"]
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.handlers.opendir(find(mount.tree, "vm.json").inode, CTX)
    assert caught.value.errno == errno.ENOTDIR


# Files


async def test_reads_are_those_of_the_window(mount: Mount) -> None:
    mount.top.table = TABLE
    await find(mount.tree, "web/partitions").entries()
    for path, start, size in (("web/disk.raw", 0, SIZE), ("web/partitions/5.raw", 4096, 512)):
        handle = (await mount.open(path)).fh
        whole = await mount.top.read(None, start, size)
        for offset, length in ((0, 10), (500, 100), (size - 5, 100), (size, 1), (size + 99, 7)):
            got = await mount.handlers.read(handle, offset, length)
            assert bytes(got) == whole[offset : offset + length]
        await mount.handlers.release(handle)
    assert mount.handlers.open_files == 0


async def test_reads_count_for_their_image_those_of_its_partitions_too(mount: Mount) -> None:
    mount.top.table = TABLE
    await find(mount.tree, "web/partitions").entries()
    assert mount.handlers.served == {}
    handles = [(await mount.open(path)).fh for path in ("web/disk.raw", "web/partitions/5.raw")]
    for handle in handles:
        await mount.handlers.read(handle, 0, 512)
    document = (await mount.open("vm.json")).fh
    await mount.handlers.read(document, 0, 100)
    assert mount.handlers.served.keys() == {mount.top.name}
    served = mount.handlers.served[mount.top.name]
    assert (served.times.count, served.bytes, served.errors) == (2, 1024, 0)
    mount.top.error = EngineError("torn grain")
    with pytest.raises(pyfuse3.FUSEError):
        await mount.handlers.read(handles[0], 0, 512)
    assert (served.times.count, served.bytes, served.errors) == (3, 1024, 1)
    assert served.times.seconds > 0


async def test_a_document_stays_what_it_was_when_it_was_opened(mount: Mount) -> None:
    content = b"first"

    async def render() -> bytes:
        return content

    find(mount.tree, ".vddkfs/status.json").render = render
    info = await mount.open(".vddkfs/status.json")
    content = b"second"
    assert info.direct_io
    assert not info.keep_cache
    assert await mount.handlers.read(info.fh, 0, 100) == b"first"
    assert await mount.handlers.read(info.fh, 2, 2) == b"rs"
    assert mount.handlers.open_files == 1


async def test_o_direct_is_told_to_the_image_and_not_to_the_kernel(mount: Mount) -> None:
    for flags, direct in ((os.O_RDONLY, False), (os.O_RDONLY | os.O_DIRECT, True)):
        info = await mount.open("web/chain/0.raw", flags)
        assert not info.direct_io
        assert info.keep_cache
        assert mount.disk.images[0].opened[-1] is direct
    assert not (await mount.open("web/disk.raw")).keep_cache


@pytest.mark.parametrize("path", ["vm.json", "web/disk.raw", "web"])
@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
async def test_nothing_is_opened_for_writing(path: str, flags: int, mount: Mount) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.open(path, flags)
    assert caught.value.errno == errno.EROFS
    assert mount.handlers.open_files == 0


@pytest.mark.parametrize(
    "name",
    [
        "setattr",
        "mknod",
        "mkdir",
        "unlink",
        "rmdir",
        "symlink",
        "rename",
        "link",
        "create",
        "setxattr",
        "removexattr",
    ],
)
async def test_every_change_is_refused(name: str, mount: Mount) -> None:
    handler = getattr(mount.handlers, name)
    assert getattr(Operations, name) is not getattr(pyfuse3.Operations, name), "that is ENOSYS"
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await handler(1, b"x", 2, b"y", CTX)
    assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize("path", ["vm.json", "web/disk.raw"])
async def test_what_was_opened_to_be_read_is_not_written(path: str, mount: Mount) -> None:
    """The kernel asks for no such thing."""
    for image in mount.disk.images:
        image.writable = True
    handle = (await mount.open(path)).fh
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.handlers.write(handle, 0, b"x" * 512)
    assert caught.value.errno == errno.EBADF
    assert mount.top.written == []


async def test_what_needs_no_answer_is_answered(mount: Mount) -> None:
    handle = (await mount.open("web/disk.raw")).fh
    await mount.handlers.flush(handle)
    await mount.handlers.fsync(handle, True)
    await mount.handlers.fsyncdir(handle, False)
    assert await mount.handlers.access(1, os.W_OK, CTX)
    assert mount.top.flushes == 0, "nothing was written"


# Files of a disk that has changed


async def test_a_file_of_what_was_is_looked_up_again(mount: Mount) -> None:
    old = find(mount.tree, "web/disk.raw").inode
    mount.tree.renew(mount.top)  # type: ignore[arg-type]
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.handlers.open(old, os.O_RDONLY, CTX)
    assert caught.value.errno == errno.ESTALE
    assert await mount.open("web/disk.raw")


async def test_a_partition_that_moved_is_never_opened_at_its_old_place(mount: Mount) -> None:
    mount.top.table = TABLE
    entries = await find(mount.tree, "web/partitions").entries()
    moved = Partition(number=1, start=51200, size=1024, type="0x83")
    mount.top.table = PartitionTable("dos", (moved,))
    for inode in [node.inode for node in entries.values()]:
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await mount.handlers.open(inode, os.O_RDONLY, CTX)
        assert caught.value.errno == errno.ESTALE
    info = await mount.open("web/partitions/1.raw")
    assert await mount.handlers.read(info.fh, 0, 512) == bytes([100]) * 512


# Errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (VddkfsError("x"), errno.EIO),
        (StaleImage("x"), errno.ESTALE),
        (SourceMissing("x"), errno.EIO),
        (EngineError("x", errno=errno.EILSEQ), errno.EIO),
    ],
)
async def test_a_file_whose_data_cannot_be_had_is_eio_or_estale(
    error: VddkfsError, code: int, mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    handle = (await mount.open("web/disk.raw")).fh
    mount.top.error = error
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.handlers.read(handle, 0, 512)
    assert caught.value.errno == code
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.open("web/disk.raw")
    assert caught.value.errno == code
    assert "web/chain/2.raw cannot be opened: x" in caplog.text
    assert "Traceback" not in caplog.text
    assert mount.handlers.open_files == 1, "what could not be opened is not open"


@pytest.mark.parametrize("error", [VddkfsError("x"), StaleImage("x"), VddkfsError("x", errno=5)])
async def test_an_expected_error_becomes_its_errno(error: VddkfsError, mount: Mount) -> None:
    folder = find(mount.tree, "web/partitions").inode
    mount.top.error = error
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.handlers.opendir(folder, CTX)
    assert caught.value.errno == error.errno
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.handlers.lookup(folder, b"1.raw", CTX)
    assert caught.value.errno == error.errno


async def test_a_bug_becomes_eio_with_its_traceback_in_the_log(
    mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    handle = (await mount.open("web/disk.raw")).fh
    mount.top.error = KeyError("oops")
    calls: list[Any] = [
        partial(mount.handlers.read, handle, 0, 512),
        partial(mount.open, "web/disk.raw"),
        partial(mount.handlers.read, 9999, 0, 1),
        partial(mount.handlers.readdir, 9999, 0, CTX),
    ]
    for call in calls:
        caplog.clear()
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await call()
        assert caught.value.errno == errno.EIO
        assert "a bug in vddkfs" in caplog.text
        assert "Traceback" in caplog.text


def test_every_handler_is_guarded() -> None:
    for name, handler in vars(Operations).items():
        if callable(handler) and not name.startswith("_") and name != "lseek":
            assert hasattr(handler, "__wrapped__"), name


async def test_cancellation_passes_the_guard(mount: Mount) -> None:
    async def hangs() -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    find(mount.tree, "vm.json").render = hangs
    with trio.move_on_after(0.01) as scope:
        await mount.open("vm.json")
    assert scope.cancelled_caught
