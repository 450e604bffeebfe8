"""Writing through the kernel's requests, without a kernel: who may, and what is refused."""

import errno
import os
import stat
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fuse.test_operations import CTX, SIZE, Mount, known
from tests.fuse.test_tree import TABLE, find, paths
from vddkfs.errors import EngineError, OverlayError, StaleImage, VddkfsError
from vddkfs.fuse import session
from vddkfs.fuse.tree import Window

import pyfuse3  # isort: skip

assert session, "imported first: it loads what pyfuse3 stands on"

WRITE_FLAGS = [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND]


async def add_partitions(mount: Mount) -> None:
    mount.top.table = TABLE
    await find(mount.tree, "web/partitions").entries()


@pytest.fixture
async def overlaid() -> Mount:
    """Every image can be written, and the partitions are there."""
    mount = Mount()
    for image in mount.disk.images:
        image.writable = True
    await add_partitions(mount)
    return mount


@pytest.fixture
async def based() -> Mount:
    """The base can be written, and is below all else."""
    mount = Mount()
    base, *above = mount.disk.images
    base.writable = True
    for image in above:
        image.above_writes = True
    await add_partitions(mount)
    return mount


def fields(*wanted: str) -> Any:
    names = ("atime", "mtime", "ctime", "mode", "uid", "gid", "size")
    return SimpleNamespace(**{f"update_{name}": name in wanted for name in names})


async def set_attributes(
    mount: Mount, path: str, *names: str, size: int = 0, fh: int | None = None
) -> Any:
    """Set what *names* say of a file."""
    inode = find(mount.tree, path).inode
    attributes: Any = SimpleNamespace(st_size=size, st_mode=0, st_uid=0, st_gid=0)
    return await mount.handlers.setattr(inode, attributes, fields(*names), fh, CTX)


async def refused(mount: Mount, path: str, flags: int) -> int:
    before = mount.handlers.open_files
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.open(path, flags)
    assert mount.handlers.open_files == before
    return int(caught.value.errno)


# Who may


@pytest.mark.parametrize("flags", WRITE_FLAGS)
async def test_an_overlay_lets_every_image_be_written_and_nothing_else(
    flags: int, overlaid: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("web/disk.raw", "web/chain/0.raw", "web/chain/1.raw"):
        assert await overlaid.open(path, flags)
    for path in ("vm.json", "web/map.json", "web/info.json", "web", ".vddkfs/status.json"):
        assert await refused(overlaid, path, flags) == errno.EROFS
    caplog.clear()
    assert await refused(overlaid, "web/partitions/5.raw", flags) == errno.EROFS
    assert "web/partitions/5.raw: partitions are only read" in caplog.text
    assert await overlaid.open("web/partitions/5.raw")


@pytest.mark.parametrize("flags", WRITE_FLAGS)
async def test_of_a_chain_only_the_base_is_written(
    flags: int, based: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    assert await based.open("web/chain/0.raw", flags)
    for path in ("web/disk.raw", "web/chain/1.raw", "web/partitions/1.raw"):
        caplog.clear()
        assert await refused(based, path, flags) == errno.EROFS
        [record] = caplog.records
        assert record.levelname == "WARNING", "it is nobody's fault"
        assert "cannot be opened: it is mounted to be read only" in record.getMessage()


async def test_modes_show_what_can_be_written(based: Mount) -> None:
    for path, node in paths(based.tree.root).items():
        if isinstance(node, Window):
            mode = (await based.stat(path)).st_mode
            can = path == "web/chain/0.raw"
            assert mode == stat.S_IFREG | (0o600 if can else 0o400), path
    found = await based.stat("web/chain/0.raw")
    assert found.st_size == SIZE


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
async def test_umask_takes_permissions_away_from_what_can_be_written(umask: int) -> None:
    mount = Mount(umask=umask)
    mount.top.writable = True
    assert stat.S_IMODE((await mount.stat("web/disk.raw")).st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((await mount.stat("web/chain/0.raw")).st_mode) == 0o444 & ~umask


async def test_attributes_of_what_is_written_are_never_kept(overlaid: Mount) -> None:
    for image in overlaid.disk.images:
        image.map = known((0, 10))
    for path in ("web/disk.raw", "web/chain/0.raw"):
        settled = find(overlaid.tree, path).image.settled
        assert (await overlaid.stat(path)).attr_timeout == 0
        assert find(overlaid.tree, path).image.settled == settled + 1
    assert (await overlaid.stat("web/partitions/5.raw")).attr_timeout == 0


# The kernel's pages


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDONLY | os.O_DIRECT])
async def test_what_is_written_by_way_of_another_file_is_never_in_the_kernels_pages(
    flags: int, overlaid: Mount, based: Mount
) -> None:
    for mount, path, past in (
        (based, "web/chain/0.raw", False),
        (based, "web/chain/1.raw", True),
        (based, "web/disk.raw", True),
        (based, "web/partitions/1.raw", True),
        (overlaid, "web/chain/1.raw", False),
        (overlaid, "web/disk.raw", False),
        (overlaid, "web/partitions/1.raw", True),
    ):
        assert (await mount.open(path, flags)).direct_io is past, path


async def test_partitions_of_a_base_that_is_the_whole_chain_are_past_the_kernels_pages() -> None:
    mount = Mount()
    mount.top.writable = True
    await add_partitions(mount)
    assert (await mount.open("web/partitions/1.raw")).direct_io
    assert not (await mount.open("web/disk.raw", os.O_RDWR)).direct_io


async def test_direct_writers_write_in_parallel_and_others_through_the_kernels_pages(
    overlaid: Mount,
) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR):
        assert (await overlaid.open("web/disk.raw", flags | os.O_DIRECT)).direct_io
        assert not (await overlaid.open("web/disk.raw", flags)).direct_io
    assert overlaid.top.opened == [True, False, True, False]


# Writes


async def test_what_is_written_goes_to_the_image_and_is_counted(overlaid: Mount) -> None:
    handle = (await overlaid.open("web/disk.raw", os.O_RDWR)).fh
    assert await overlaid.handlers.write(handle, 5, b"abc") == 3
    assert await overlaid.handlers.write(handle, SIZE - 1, b"abc") == 1, "less at the end"
    assert overlaid.top.written == [(5, b"abc"), (SIZE - 1, b"abc")]
    served = overlaid.handlers.served[overlaid.top.name]
    assert (served.written, served.write_times.count, served.errors) == (4, 2, 0)
    assert (served.bytes, served.times.count) == (0, 0)


@pytest.mark.parametrize("flags", [os.O_DSYNC, os.O_SYNC, os.O_SYNC | os.O_DIRECT])
async def test_synchronous_writes_are_flushed(flags: int, overlaid: Mount) -> None:
    handle = (await overlaid.open("web/disk.raw", os.O_RDWR | flags)).fh
    other = (await overlaid.open("web/disk.raw", os.O_RDWR)).fh
    assert await overlaid.handlers.write(handle, 5, b"abc") == 3
    assert overlaid.top.flushes == 1
    assert await overlaid.handlers.write(other, 5, b"abc") == 3
    assert overlaid.top.flushes == 1
    await overlaid.handlers.release(handle)
    assert not overlaid.handlers._synchronous


async def test_appending_ends_at_the_end(overlaid: Mount) -> None:
    handle = (await overlaid.open("web/disk.raw", os.O_WRONLY | os.O_APPEND)).fh
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await overlaid.handlers.write(handle, SIZE, b"more")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("torn grain"), errno.EIO),
        (EngineError("full", errno=errno.ENOSPC), errno.ENOSPC),
        (OverlayError("full", errno=errno.EDQUOT), errno.EDQUOT),
        (EngineError("locked", errno=errno.EROFS), errno.EROFS),
        (StaleImage("gone"), errno.ESTALE),
        (VddkfsError("x", errno=errno.ENOENT), errno.EIO),
    ],
)
async def test_a_write_that_fails_is_told_and_logged_with_its_place(
    error: VddkfsError, code: int, overlaid: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    handle = (await overlaid.open("web/disk.raw", os.O_RDWR)).fh
    overlaid.top.error = error
    for call in (
        overlaid.handlers.write(handle, 4608, b"x"),
        overlaid.handlers.fsync(handle, True),
        overlaid.handlers.flush(handle),
    ):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await call
        assert caught.value.errno == code
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(" failed")[0] for line in lines] == [
        "web/chain/2.raw: write at offset 4608",
        "web/chain/2.raw: flush at offset 0",
    ]
    assert overlaid.handlers.served[overlaid.top.name].errors == 3


async def test_a_bug_in_a_write_ends_no_mount(
    overlaid: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    handle = (await overlaid.open("web/disk.raw", os.O_RDWR)).fh
    overlaid.top.error = KeyError("oops")
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await overlaid.handlers.write(handle, 0, b"x")
    assert caught.value.errno == errno.EIO
    assert "a bug in vddkfs" in caplog.text


# Flushes


async def test_a_writer_that_closes_and_anybody_who_syncs_has_it_flushed(overlaid: Mount) -> None:
    writer = (await overlaid.open("web/disk.raw", os.O_WRONLY)).fh
    reader = (await overlaid.open("web/disk.raw")).fh
    document = (await overlaid.open("vm.json")).fh
    await overlaid.handlers.flush(reader)
    await overlaid.handlers.flush(document)
    await overlaid.handlers.fsync(document, False)
    assert overlaid.top.flushes == 0
    for number, call in enumerate(
        (
            overlaid.handlers.flush(writer),
            overlaid.handlers.fsync(writer, True),
            overlaid.handlers.fsync(writer, False),
            overlaid.handlers.fsync(reader, False),
        ),
        1,
    ):
        await call
        assert overlaid.top.flushes == number


async def test_images_that_have_writers_are_known(overlaid: Mount) -> None:
    handlers = overlaid.handlers
    assert handlers.written_images == {}
    reader = (await overlaid.open("web/disk.raw")).fh
    document = (await overlaid.open("vm.json")).fh
    assert handlers.written_images == {}
    writers = [(await overlaid.open("web/disk.raw", os.O_RDWR)).fh for _ in range(2)]
    base = (await overlaid.open("web/chain/0.raw", os.O_WRONLY)).fh
    assert set(handlers.written_images) == {"web/chain/2.raw", "web/chain/0.raw"}
    for handle in (writers[0], base, reader, document):
        await handlers.release(handle)
    assert list(handlers.written_images.values()) == [overlaid.top]
    await handlers.release(writers[1])
    assert handlers.written_images == {}


# What tools set before they write


async def test_truncating_at_open_is_ignored(overlaid: Mount) -> None:
    found = await set_attributes(overlaid, "web/disk.raw", "size", size=0)
    assert found.st_size == SIZE


@pytest.mark.parametrize(
    ("by_handle", "size", "code"),
    [
        (True, 0, errno.EPERM),
        (True, SIZE - 1, errno.EPERM),
        (True, SIZE + 1, errno.EPERM),
        (False, SIZE - 1, errno.EPERM),
        (False, SIZE + 1, errno.EPERM),
        (True, SIZE, 0),
        (False, SIZE, 0),
        (False, 0, 0),
    ],
)
async def test_a_disk_keeps_its_size(
    by_handle: bool, size: int, code: int, overlaid: Mount
) -> None:
    handle = (await overlaid.open("web/disk.raw", os.O_RDWR)).fh if by_handle else None
    call = set_attributes(overlaid, "web/disk.raw", "size", size=size, fh=handle)
    if code:
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await call
        assert caught.value.errno == code
    else:
        assert (await call).st_size == SIZE
    assert overlaid.top.written == []


@pytest.mark.parametrize("name", ["mode", "uid", "gid"])
async def test_owner_and_mode_are_the_mounts(name: str, overlaid: Mount) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await set_attributes(overlaid, "web/disk.raw", name)
    assert caught.value.errno == errno.EPERM


async def test_times_are_taken_and_ignored(overlaid: Mount) -> None:
    before = (await overlaid.stat("web/disk.raw")).st_mtime_ns
    found = await set_attributes(overlaid, "web/disk.raw", "atime", "mtime", "ctime")
    assert found.st_mtime_ns == before == overlaid.top.mtime_ns


@pytest.mark.parametrize("path", ["web", "vm.json", "web/partitions/1.raw"])
@pytest.mark.parametrize("name", ["mode", "mtime", "size"])
async def test_nothing_is_set_of_what_is_not_to_be_written(
    path: str, name: str, overlaid: Mount
) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await set_attributes(overlaid, path, name)
    assert caught.value.errno == errno.EROFS
