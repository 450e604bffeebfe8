"""The quick wait for the kernel: others have their turn, and the lock is fair."""

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from vddkfs.fuse import quick_wait
from vddkfs.fuse.quick_wait import BURST, QuickWait

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def make_lock() -> trio.Lock:
    """Return the lock that pyfuse3 gets instead of trio's."""
    lock: trio.Lock = QuickWait(lambda: False).stand_in().Lock()
    return lock


@pytest.mark.parametrize("busy", [False, True])
async def test_requests_in_a_row_let_other_tasks_run(busy: bool, pipe: Pipe) -> None:
    os.write(pipe[1], b"x")
    waited = turns = 0
    longest = 0

    async def other(*, task_status: trio.TaskStatus[None]) -> None:
        nonlocal turns, longest, waited
        task_status.started()
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1
            longest, waited = max(longest, waited), 0

    wait = QuickWait(lambda: busy)
    async with trio.open_nursery() as nursery:
        await nursery.start(other)
        for _ in range(50 * BURST):
            waited += 1
            await wait.wait_readable(pipe[0])
        nursery.cancel_scope.cancel()
    assert turns >= 40
    assert BURST // 2 <= longest <= 2 * BURST + 2


async def test_nothing_to_read_means_waiting(pipe: Pipe) -> None:
    wait = QuickWait(lambda: False)
    for _ in range(3):
        done = trio.Event()

        async def waiter(done: trio.Event = done) -> None:
            await wait.wait_readable(pipe[0])
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter)
            await trio.testing.wait_all_tasks_blocked()
            assert not done.is_set()
            os.write(pipe[1], b"x")
        assert done.is_set()
        os.read(pipe[0], 1)


async def test_a_wait_may_be_cancelled_and_begun_again(pipe: Pipe) -> None:
    wait = QuickWait(lambda: False)
    with trio.move_on_after(0.01) as scope:
        await wait.wait_readable(pipe[0])
    assert scope.cancelled_caught
    os.write(pipe[1], b"x")
    with trio.fail_after(5):
        await wait.wait_readable(pipe[0])


async def test_it_looks_longer_only_while_requests_are_close_and_no_worker_owes_one(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick_wait, "LOOK_SECONDS", 0.02)
    busy = False
    wait = QuickWait(lambda: busy)
    looks: list[bool] = []
    real = wait._look
    monkeypatch.setattr(wait, "_look", lambda: looks.append(True) or real())

    async def write_soon() -> None:
        await trio.testing.wait_all_tasks_blocked()
        os.write(pipe[1], b"x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_soon)
        await wait.wait_readable(pipe[0])
    os.read(pipe[0], 1)
    assert wait._close_by, "the request came while it was looked for"
    assert not wait._look(), "nothing came"
    assert not wait._close_by, "so the next wait sleeps at once"
    wait._close_by = busy = True
    assert not wait._look()
    assert wait._close_by, "it did not even look"
    assert looks


async def test_the_end_of_the_session_ends_a_wait_under_way(pipe: Pipe) -> None:
    wait = QuickWait(lambda: False)

    async def ended() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await wait.wait_readable(pipe[0])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ended)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(pipe[0])


async def test_a_closed_descriptor_is_an_error_soon() -> None:
    ends = os.pipe()
    wait = QuickWait(lambda: False)
    os.write(ends[1], b"x")
    await wait.wait_readable(ends[0])
    for fd in ends:
        os.close(fd)
    with pytest.raises((trio.ClosedResourceError, OSError)):  # noqa: PT012
        for _ in range(BURST + 1):
            await wait.wait_readable(ends[0])


# The lock


async def test_the_lock_is_held_by_one_at_a_time_in_the_order_of_asking() -> None:
    lock = make_lock()
    order: list[int] = []
    inside = 0

    async def use(number: int) -> None:
        nonlocal inside
        async with lock:
            inside += 1
            assert inside == 1
            order.append(number)
            await trio.lowlevel.checkpoint()
            inside -= 1

    async with trio.open_nursery() as nursery, lock:
        for number in range(20):
            nursery.start_soon(use, number)
            await trio.testing.wait_all_tasks_blocked()
    assert order == list(range(20))
    async with lock:
        pass


async def test_one_who_comes_back_at_once_does_not_overtake_those_who_wait() -> None:
    lock = make_lock()
    order: list[str] = []

    async def use() -> None:
        async with lock:
            order.append("other")

    async with trio.open_nursery() as nursery:
        async with lock:
            nursery.start_soon(use)
            await trio.testing.wait_all_tasks_blocked()
        async with lock:
            order.append("again")
    assert order == ["other", "again"]


@pytest.mark.parametrize("leaver", range(4))
async def test_one_who_gives_up_waiting_does_not_take_the_lock_along(leaver: int) -> None:
    lock = make_lock()
    scopes = [trio.CancelScope() for _ in range(4)]
    got: list[int] = []

    async def use(number: int) -> None:
        with scopes[number]:
            async with lock:
                got.append(number)
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery, lock:
        for number in range(4):
            nursery.start_soon(use, number)
            await trio.testing.wait_all_tasks_blocked()
        scopes[leaver].cancel()
        await trio.testing.wait_all_tasks_blocked()
    assert got == [number for number in range(4) if number != leaver]
    with trio.fail_after(5):
        async with lock:
            pass


async def test_one_who_is_cancelled_as_the_lock_comes_passes_it_on() -> None:
    lock = make_lock()
    scope = trio.CancelScope()
    got: list[str] = []

    async def cancelled() -> None:
        with scope:
            async with lock:
                await trio.sleep_forever()

    async def later() -> None:
        async with lock:
            got.append("later")

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(cancelled)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(later)
                await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert got == ["later"]


async def test_the_lock_is_free_again_after_an_error_inside() -> None:
    lock = make_lock()
    with pytest.raises(KeyError):
        async with lock:
            raise KeyError
    with trio.fail_after(5):
        async with lock:
            pass


def test_what_pyfuse3_uses_of_trio_is_there() -> None:
    stand_in = QuickWait(lambda: False).stand_in()
    assert stand_in.open_nursery is trio.open_nursery
    assert stand_in.ClosedResourceError is trio.ClosedResourceError
    for name in ("notify_closing", "current_task", "current_trio_token"):
        assert getattr(stand_in.lowlevel, name) is getattr(trio.lowlevel, name)
