"""What the kernel is told to forget, without a kernel; tests/end_to_end has the real one."""

import errno
import logging
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from tests.fuse.test_operations import Mount
from tests.fuse.test_tree import find
from vddkfs.fuse import session
from vddkfs.fuse.notify import KernelPages

import pyfuse3  # isort: skip


class Kernel:
    """Notes what it is told, in which thread, and answers with an errno or not at all."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.codes: dict[Any, int] = {}
        self.may_answer = threading.Event()
        self.may_answer.set()

    def _tell(self, *arguments: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.told.append(arguments)
        self.may_answer.wait(10)
        code = self.codes.get(arguments[0])
        if code:
            raise OSError(code, "no")

    def notify_inode(self, inode: int, start: int, size: int) -> int:
        try:
            self._tell(inode, start, size)
        except OSError as error:
            return -(error.errno or 0)
        return 0

    def invalidate_inode(self, inode: int) -> None:
        self._tell(inode)

    def invalidate_entry(self, folder: int, name: bytes) -> None:
        self._tell(folder, name)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    fake = Kernel()
    monkeypatch.setattr(session, "_hooks", SimpleNamespace(lib=fake))
    monkeypatch.setattr(pyfuse3, "invalidate_inode", fake.invalidate_inode)
    monkeypatch.setattr(pyfuse3, "invalidate_entry", fake.invalidate_entry)
    return fake


@pytest.fixture
def mount() -> Mount:
    return Mount()


async def test_a_range_is_told(kernel: Kernel, mount: Mount) -> None:
    pages = KernelPages(mount.tree)
    assert await pages.drop(77, 4096, 512)
    assert await pages.drop(78)
    assert kernel.told == [(77, 4096, 512), (78, 0, 0)]


async def test_without_the_c_module_the_whole_file_is_told(
    kernel: Kernel, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_hooks", None)
    assert await KernelPages(mount.tree).drop(77, 4096, 512)
    assert kernel.told == [(77,)]
    kernel.codes[77] = errno.ENOENT
    assert not await KernelPages(mount.tree).drop(77)


async def test_what_the_kernel_does_not_know_it_has_nothing_of(
    kernel: Kernel, mount: Mount
) -> None:
    kernel.codes = {77: errno.ENOENT, 78: errno.ENOTCONN}
    assert not await KernelPages(mount.tree).drop(77)
    with pytest.raises(OSError) as caught:  # noqa: PT011 (the errno is what matters)
        await KernelPages(mount.tree).drop(78)
    assert caught.value.errno == errno.ENOTCONN


async def test_the_kernel_is_not_told_before_reads_of_before_are_answered(
    kernel: Kernel, mount: Mount
) -> None:
    """It would wait for them in a thread that nothing can end."""
    node = find(mount.tree, "web/disk.raw")
    other = find(mount.tree, "web/chain/0.raw")
    go = trio.Event()
    real = mount.top.read

    async def slow(*arguments: Any) -> bytes:
        await go.wait()
        return await real(*arguments)

    mount.top.read = slow  # type: ignore[method-assign]
    handle = (await mount.open("web/disk.raw")).fh
    pages = KernelPages(mount.tree)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mount.handlers.read, handle, 0, 512)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.05) as waiting:
            await pages.drop(node.inode)
        assert waiting.cancelled_caught
        assert await pages.drop(other.inode, 0, 1)
        assert kernel.told == [(other.inode, 0, 1)], "another file is no matter"
        nursery.start_soon(pages.drop, node.inode)
        await trio.testing.wait_all_tasks_blocked()
        assert len(kernel.told) == 1
        go.set()
    assert kernel.told[1:] == [(node.inode, 0, 0)]


async def test_the_kernel_is_not_told_before_writes_of_before_are_answered(
    kernel: Kernel, mount: Mount
) -> None:
    """It keeps the pages locked that it writes from."""
    node = find(mount.tree, "web/disk.raw")
    go = trio.Event()
    real = mount.top.write

    async def slow(*arguments: Any) -> int:
        await go.wait()
        return await real(*arguments)

    mount.top.writable = True
    mount.top.write = slow  # type: ignore[method-assign]
    handle = (await mount.open("web/disk.raw", os.O_RDWR)).fh
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mount.handlers.write, handle, 0, b"x")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(KernelPages(mount.tree).drop, node.inode)
        with trio.move_on_after(0.05):
            await trio.sleep_forever()
        assert kernel.told == []
        go.set()
    assert kernel.told == [(node.inode, 0, 0)]


async def test_a_read_that_failed_is_answered_too(kernel: Kernel, mount: Mount) -> None:
    handle = (await mount.open("web/disk.raw")).fh
    mount.top.error = KeyError("a bug")
    with pytest.raises(pyfuse3.FUSEError):
        await mount.handlers.read(handle, 0, 512)
    with trio.fail_after(5):
        assert await KernelPages(mount.tree).drop(find(mount.tree, "web/disk.raw").inode)


async def test_a_wait_in_the_kernel_can_be_given_up_and_keeps_no_other_waiting(
    kernel: Kernel, mount: Mount
) -> None:
    pages = KernelPages(mount.tree)
    stuck = kernel.may_answer = threading.Event()
    try:
        for inode in range(5):
            with trio.move_on_after(0.02) as waiting:
                await pages.drop(inode)
            assert waiting.cancelled_caught
        kernel.may_answer = threading.Event()
        kernel.may_answer.set()
        with trio.fail_after(5):
            assert await pages.drop(77)
    finally:
        stuck.set()


async def test_names_and_pages_are_forgotten_and_what_is_not_known_is_no_news(
    kernel: Kernel, mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.codes = {7: errno.ENOENT, 8: errno.ENOTCONN, 70: errno.ENOENT}
    async with trio.open_nursery() as nursery:
        pages = KernelPages(mount.tree)
        pages.forget(nursery, [(7, "unknown", 70), (8, "caf\udce9", 80)])
    assert sorted(kernel.told, key=str) == [
        (7, b"unknown"),
        (70, 0, 0),
        (8, b"caf\xe9"),
        (80, 0, 0),
    ]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "caf" in warnings[0]
