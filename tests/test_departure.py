"""How a mount goes down: readers are let go after a while, writers when they are told twice."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from vddkfs import departure
from vddkfs.departure import Departure
from vddkfs.errors import EngineError, MountBusy, VddkfsError

STOP_TIMEOUT = 10.0
MOMENT = 3.0
"""Seconds within which what is due has to be done."""
LONG = 1000.0


class Written:
    """An image that has writers. *seconds* is how long its flush takes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds = 0.0
        self.error: VddkfsError | None = None
        self.flushed = -1.0

    async def sync(self) -> None:
        await trio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.flushed = trio.current_time()


class Mounted:
    """A mount on which files are open. *ended* is when it stopped serving, -1 while it does."""

    def __init__(self) -> None:
        self.written_images: dict[str, Written] = {}
        self.busy = True
        self.umounts = 0
        self.refused = -1.0
        self.ended = -1.0
        self.signal, self.signals = trio.open_memory_channel[int](9)

    def add_writer(self, name: str) -> Written:
        found = self.written_images[name] = Written(name)
        return found

    def refuse(self) -> None:
        self.refused = trio.current_time()

    def unmount(self, mountpoint: str) -> None:
        assert mountpoint == "/mnt/web"
        self.umounts += 1
        if self.busy:
            raise MountBusy("files are open")

    async def serve(self, task_status: Any) -> None:
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await trio.sleep_forever()
        self.ended = trio.current_time()


@asynccontextmanager
async def going_down() -> AsyncIterator[Mounted]:
    """A mount that takes signals, on a clock that jumps."""
    mounted: Any = Mounted()
    async with trio.open_nursery() as nursery:
        scope = await nursery.start(mounted.serve)
        leaving = Departure("/mnt/web", STOP_TIMEOUT, mounted, [mounted])
        nursery.start_soon(leaving.on_signals, mounted.signals, scope)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(departure, "unmount", mounted.unmount)
            patch.setattr(departure, "holders", lambda _: ["dd (pid 7)"])
            # A clock that jumps does not wait for threads.
            patch.setattr(trio.to_thread, "run_sync", inline)
            yield mounted
        nursery.cancel_scope.cancel()


async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return function(*arguments)


async def test_nothing_happens_before_a_signal(autojump_clock: Any) -> None:
    async with going_down() as mounted:
        await trio.sleep(LONG)
        assert (mounted.umounts, mounted.ended) == (0, -1)


async def test_a_plain_umount_is_all_where_nothing_is_open(autojump_clock: Any) -> None:
    """The session ends by itself then, and takes this with it."""
    async with going_down() as mounted:
        mounted.busy = False
        await mounted.signal.send(15)
        await trio.sleep(MOMENT)
        assert mounted.umounts == 1
        assert mounted.refused == -1


async def test_readers_are_let_go_after_the_stop_timeout(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with going_down() as mounted:
        await mounted.signal.send(15)
        await trio.sleep(STOP_TIMEOUT - 0.1)
        assert mounted.ended == -1
        assert mounted.umounts > 10, "a plain umount is tried again and again"
        await trio.sleep(MOMENT)
        assert STOP_TIMEOUT <= mounted.ended < STOP_TIMEOUT + 1
        assert mounted.refused < mounted.ended, "what is under way is answered first"
    assert caplog.text.count("files are open: dd (pid 7)") == 1
    assert "let go with files open" in caplog.text


async def test_a_second_signal_lets_readers_go_at_once(autojump_clock: Any) -> None:
    async with going_down() as mounted:
        for _ in range(2):
            await mounted.signal.send(15)
            await trio.sleep(1)
        assert 1 <= mounted.ended < 2


async def test_writers_are_never_let_go_by_time(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with going_down() as mounted:
        mounted.add_writer("web/chain/0.raw")
        await mounted.signal.send(15)
        await trio.sleep(LONG)
        assert (mounted.refused, mounted.ended) == (-1, -1)
        assert caplog.text.count("a guest may be mounted on web/chain/0.raw") == 1
        mounted.add_writer("db/chain/0.raw")
        await trio.sleep(MOMENT)
        assert "a guest may be mounted on db/chain/0.raw, web/chain/0.raw" in caplog.text
        mounted.written_images.clear()
        await trio.sleep(2 * MOMENT)
        assert mounted.ended > LONG, "the readers that are left are let go"


async def test_a_mount_whose_last_writer_left_is_unmounted_as_any_other(
    autojump_clock: Any,
) -> None:
    async with going_down() as mounted:
        mounted.add_writer("web/chain/0.raw")
        await mounted.signal.send(15)
        await trio.sleep(100.2)
        mounted.written_images.clear()
        mounted.busy = False
        await trio.sleep(1)
        tried = mounted.umounts
        await trio.sleep(0.4)
        assert mounted.umounts == tried, "it has worked, the session ends by itself"
        assert mounted.refused == -1


async def test_a_writer_that_comes_back_is_not_let_go(autojump_clock: Any) -> None:
    """Tools open a disk one after the other: mkfs, then losetup for the guest."""
    async with going_down() as mounted:
        mounted.add_writer("web/chain/0.raw")
        await mounted.signal.send(15)
        await trio.sleep(20)
        mounted.written_images.clear()
        await trio.sleep(1)
        mounted.add_writer("web/chain/0.raw")
        await trio.sleep(LONG)
        assert (mounted.refused, mounted.ended) == (-1, -1)


async def test_a_second_signal_lets_writers_go_after_a_flush(
    autojump_clock: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with going_down() as mounted:
        quick, slow = mounted.add_writer("a"), mounted.add_writer("b")
        slow.seconds = 2
        await mounted.signal.send(15)
        await trio.sleep(50)
        await mounted.signal.send(2)
        await trio.sleep(MOMENT)
        assert quick.flushed == 50
        assert slow.flushed == 52, "both at once"
        assert 52 <= mounted.refused < mounted.ended
        assert "may be lost" not in caplog.text


async def test_what_cannot_be_flushed_is_named_and_holds_nothing_up(
    autojump_clock: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with going_down() as mounted:
        mounted.add_writer("hangs").seconds = LONG
        mounted.add_writer("fails").error = EngineError("the array is gone")
        well = mounted.add_writer("well")
        for _ in range(2):
            await mounted.signal.send(15)
        await trio.sleep(60)
        assert well.flushed >= 0
        assert 0 < mounted.ended < 30
    assert "fails: what was written may be lost: the array is gone" in caplog.text
    assert "hangs: what was written may be lost: no answer" in caplog.text
    assert "well: " not in caplog.text


async def test_an_umount_that_cannot_be_made_is_told_and_files_are_let_go_all_the_same(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with going_down() as mounted:

        def denied(_: str) -> None:
            raise VddkfsError("not yours")

        monkeypatch.setattr(departure, "unmount", denied)
        await mounted.signal.send(15)
        await trio.sleep(STOP_TIMEOUT + MOMENT)
        assert mounted.ended >= STOP_TIMEOUT
    assert caplog.text.count("not yours") == 1
