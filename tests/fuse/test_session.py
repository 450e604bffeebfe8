"""The session: mounting, and seeks from the C module to the tree."""

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.fuse.test_operations import CTX, Mount, known
from tests.fuse.test_tree import SECTORS, TABLE, find
from vddkfs.disks.partitions import Partition, PartitionTable
from vddkfs.errors import EngineError, FuseUnavailable
from vddkfs.fuse import session
from vddkfs.mounts import Mounted

import pyfuse3  # isort: skip

SIZE = SECTORS * 512


@pytest.fixture
def mount() -> Mount:
    return Mount()


class FakeHooks:
    """Stands for the C module."""

    def __init__(self) -> None:
        self.lib = self
        self.ffi = self
        self.replies: dict[int, int | str] = {}
        self.wanted: tuple[int, int] | None = None
        self.on_lseek: Callable[[int, int, int, int, int], None] | None = None

    def def_extern(self, name: str) -> Callable[[Any], Any]:
        assert name == "vddkfs_on_lseek"

        def keep(function: Any) -> Any:
            self.on_lseek = function
            return function

        return keep

    def reply_lseek(self, req: int, offset: int) -> None:
        assert self.replies.setdefault(req, offset) == offset

    def reply_error(self, req: int, error: int) -> None:
        assert req not in self.replies
        self.replies[req] = errno.errorcode[error]

    def set_wanted(self, background: int, auto_inval: int) -> None:
        self.wanted = background, auto_inval

    def agreed_value(self, which: int) -> int:
        return (512, 1 << 20, 1 << 17)[which]

    def library_version(self) -> bytes:
        return b"3.14.0"

    def string(self, text: bytes) -> bytes:
        return text


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> FakeHooks:
    fake = FakeHooks()
    monkeypatch.setattr(session, "_hooks", fake)
    return fake


# Mounting


def test_the_mount_is_read_only_named_and_private(
    hooks: FakeHooks, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, str, set[str]]] = []
    monkeypatch.setattr(pyfuse3, "init", lambda *arguments: calls.append(arguments))
    session.mount(mount.handlers, "/mnt/web", "/vms/a,b", allow_other=False)
    session.mount(mount.handlers, "/mnt/web", "/vms/web", allow_other=True)
    first, second = calls
    assert first[:2] == (mount.handlers, "/mnt/web")
    assert {"default_permissions", "ro", "subtype=vddkfs", "fsname=/vms/a\\,b"} == first[2]
    assert second[2] - first[2] == {"allow_other", "fsname=/vms/web"}
    assert hooks.wanted == (512, 0), "a longer queue, and no invalidation by itself"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("a,b", "a\\,b"),
        ("a\\b", "a\\\\b"),
        ("\u00fc", "\\\\xfc"),
        ("\udce9", "\\\\udce9"),
        ("a\nb", "a\\\\nb"),
    ],
)
def test_a_source_is_one_ascii_word_of_the_options(text: str, expected: str) -> None:
    found = session._option_text(text)
    assert found == expected
    assert found.isascii()
    assert "\n" not in found


def test_a_refused_mount_is_an_error_for_a_person(
    mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("fuse_session_mount failed")

    monkeypatch.setattr(pyfuse3, "init", refuse)
    with pytest.raises(FuseUnavailable, match="/mnt/web: the kernel or fusermount3") as caught:
        session.mount(mount.handlers, "/mnt/web", "/vms/web", allow_other=False)
    assert caught.value.cause == "fuse_session_mount failed"
    assert caught.value.advice


def test_what_was_agreed_is_told(hooks: FakeHooks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.has_hooks()
    assert session.libfuse_version() == "3.14.0"
    assert session.agreed() == {
        "max_background": 512,
        "max_readahead": 1 << 20,
        "max_write": 1 << 17,
    }
    monkeypatch.setattr(session, "_hooks", None)
    assert not session.has_hooks()
    assert session.libfuse_version() == "unknown"
    assert session.agreed() == {}


def test_read_ahead_that_cannot_be_raised_is_a_reason_and_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "mounted_at", lambda place: None)
    assert "mountinfo" in session.raise_read_ahead("/mnt/web")
    monkeypatch.setattr(session, "mounted_at", lambda place: Mounted("0:0", place, "fuse.vddkfs"))
    assert "0:0" in session.raise_read_ahead("/mnt/web")


# Seeks on their way


async def serve(seek: Any, hooks: FakeHooks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a session that is asked for four seeks, and then ends."""
    end = trio.Event()

    async def main(**tasks: int) -> None:
        assert tasks == {"min_tasks": 16, "max_tasks": 1024}
        await end.wait()

    monkeypatch.setattr(pyfuse3, "main", main)
    monkeypatch.setitem(vars(pyfuse3), "trio", trio)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.serve, seek, lambda: False, nursery)
        await trio.testing.wait_all_tasks_blocked()
        assert hooks.on_lseek is not None
        for number in range(4):
            hooks.on_lseek(number, 77, 5, number * 10, os.SEEK_DATA)
        await trio.testing.wait_all_tasks_blocked()
        end.set()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_each_seek_is_answered_in_a_task_of_its_own(
    hooks: FakeHooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def seek(inode: int, offset: int, whence: int) -> int:
        assert (inode, whence) == (77, os.SEEK_DATA)
        if offset == 0:
            await trio.sleep_forever()
        if offset == 10:
            raise pyfuse3.FUSEError(errno.ENXIO)
        return offset + 1

    await serve(seek, hooks, monkeypatch)
    assert hooks.replies == {0: "EIO", 1: "ENXIO", 2: 21, 3: 31}, "one that was cut off is told"


async def test_a_seek_that_hits_a_bug_is_answered_all_the_same(
    hooks: FakeHooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def seek(inode: int, offset: int, whence: int) -> int:
        if offset == 20:
            raise KeyError("oops")
        return offset

    with contextlib.suppress(BaseExceptionGroup):
        await serve(seek, hooks, monkeypatch)
    assert hooks.replies[2] == "EIO"
    assert set(hooks.replies) == {0, 1, 2, 3}


# Where data and holes are


async def test_data_and_holes_of_an_image_are_those_of_its_map(mount: Mount) -> None:
    mount.top.map = known((10, 20), (4000, 4096))
    path = "web/disk.raw"
    assert await mount.seek(path, 0, os.SEEK_DATA) == 5120
    assert await mount.seek(path, 6000, os.SEEK_DATA) == 6000
    assert await mount.seek(path, 0, os.SEEK_HOLE) == 0
    assert await mount.seek(path, 5120, os.SEEK_HOLE) == 10240
    assert await mount.seek(path, 4000 * 512, os.SEEK_HOLE) == SIZE


async def test_a_partition_is_a_window_on_the_map(mount: Mount) -> None:
    mount.top.table = PartitionTable("dos", (Partition(1, 51200, 51200, "0x83"),))
    await find(mount.tree, "web/partitions").entries()
    path = "web/partitions/1.raw"
    mount.top.map = known((0, 110), (190, 4096))
    assert await mount.seek(path, 0, os.SEEK_DATA) == 0
    assert await mount.seek(path, 0, os.SEEK_HOLE) == 10 * 512
    assert await mount.seek(path, 7777, os.SEEK_DATA) == 90 * 512
    assert await mount.seek(path, 90 * 512, os.SEEK_HOLE) == 51200, "it ends with the partition"
    for runs in (((0, 100), (200, 300)), ()):
        mount.top.map = known(*runs)
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await mount.seek(path, 0, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize(
    ("path", "offset", "whence", "code"),
    [
        ("web/disk.raw", SIZE, os.SEEK_HOLE, errno.ENXIO),
        ("web/disk.raw", -1, os.SEEK_DATA, errno.ENXIO),
        ("web/disk.raw", 0, 77, errno.EINVAL),
        ("web", 0, os.SEEK_DATA, errno.EISDIR),
    ],
)
async def test_a_wrong_seek_is_refused(
    path: str, offset: int, whence: int, code: int, mount: Mount
) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.seek(path, offset, whence)
    assert caught.value.errno == code


async def test_a_document_is_all_data(mount: Mount) -> None:
    await mount.stat("vm.json")
    assert await mount.seek("vm.json", 1, os.SEEK_DATA) == 1
    assert await mount.seek("vm.json", 1, os.SEEK_HOLE) == 2


# What is told of images


async def test_a_failed_read_is_logged_once_a_minute_with_its_place(
    mount: Mount, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("vddkfs.fuse.operations.time.monotonic", lambda: now)
    mount.top.table = TABLE
    await find(mount.tree, "web/partitions").entries()
    whole = (await mount.open("web/disk.raw")).fh
    part = (await mount.open("web/partitions/5.raw")).fh
    mount.top.error = EngineError("torn grain", link="/vm/b.vmdk", sector=9)

    async def lines(handle: int, offset: int) -> list[str]:
        caplog.clear()
        with pytest.raises(pyfuse3.FUSEError):
            await mount.handlers.read(handle, offset, 10)
        return [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]

    [line] = await lines(whole, 4608)
    assert line.startswith("web/chain/2.raw (link /vm/b.vmdk): read at offset 4608 failed: ")
    assert "torn grain" in line
    assert await lines(whole, 4608) == []
    assert len(await lines(whole, 9216)) == 1, "another place is news"
    [line] = await lines(part, 100)
    assert "read at offset 4196 failed" in line, "the place in the disk"
    now += 59
    assert await lines(whole, 4608) == []
    now += 2
    assert len(await lines(whole, 4608)) == 1


@pytest.mark.parametrize("path", [b"/vm/a.vmdk", b"/vm/caf\xe9.vmdk"])
async def test_facts_of_an_image_are_attributes_that_are_not_listed(
    path: bytes, mount: Mount
) -> None:
    for image in mount.disk.images:
        image.links[-1].path = os.fsdecode(path)
    inode = find(mount.tree, "web/disk.raw").inode

    async def get(name: str) -> bytes:
        return await mount.handlers.getxattr(inode, b"user.vddkfs." + name.encode(), CTX)

    assert await get("capacity") == str(SIZE).encode()
    assert await get("policy") == b"close-to-open"
    assert await get("cid") == b"0badcafe"
    assert await get("format") == b"monolithicSparse"
    assert await get("link") == path
    assert await mount.handlers.listxattr(inode, CTX) == []


@pytest.mark.parametrize("name", [b"user.vddkfs.none", b"security.selinux", b"user.\xff"])
@pytest.mark.parametrize("path", ["web/disk.raw", "vm.json", "web"])
async def test_there_are_no_other_attributes(path: str, name: bytes, mount: Mount) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.handlers.getxattr(find(mount.tree, path).inode, name, CTX)
    assert caught.value.errno == pyfuse3.ENOATTR
