"""A trio run that goes on only when the test says so, and everything in it that takes its time.

Between two steps of a state machine nothing moves: no thread, no clock, no task. A step goes on
until all tasks wait, or for a few rounds of the scheduler only, so that the next step finds tasks
that were woken and have not run yet.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio
import trio.testing

_MOST_ROUNDS: Final = 10_000


class SteppedRun(trio.abc.Instrument):
    """One run, in guest mode, with this as its host. It is the nursery of its tasks, too."""

    def __init__(self) -> None:
        self.clock = trio.testing.MockClock()
        self.idle = False
        """Whether all tasks wait."""
        self.failed = False
        """Whether a command or a task has failed, which ``do`` has raised."""
        self._nursery: trio.Nursery
        self._ready: deque[Callable[[], object]] = deque()
        self._commands: deque[Callable[[], object]] = deque()
        self._error: Exception | None = None
        self._closing = False
        self._closed = False
        self._heart: trio.lowlevel.Task | None = None
        self._others_ran = False
        trio.lowlevel.start_guest_run(
            self._beat,
            run_sync_soon_threadsafe=self._ready.append,
            done_callback=self._ended,
            host_uses_signal_set_wakeup_fd=True,
            clock=self.clock,
            instruments=[self],
        )
        self.do()

    def do(self, *commands: Callable[[], object], rounds: int | None = None) -> None:
        """Call *commands* in the run at once, and go on until all wait, or for *rounds* at most.

        Raises what a command or a task has raised.
        """
        self.idle = False
        self._commands.extend(commands)
        self._round()
        done = 0
        while not self.idle and done != rounds:
            done += 1
            assert done < _MOST_ROUNDS, "tasks never come to rest"
            self._others_ran = False
            self._round()
            self.idle = not self._others_ran

    def close(self) -> None:
        """Cancel what is left in the run, and end it."""
        self._closing = True
        while not self._closed:
            self._ready.popleft()()

    def start_soon(self, function: Callable[..., Awaitable[Any]], *args: object) -> None:
        """Start a task. If it fails, that is for the test, and no reason to cancel the others."""
        self._nursery.start_soon(self._caught, function, args)

    async def _caught(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        try:
            await function(*args)
        except Exception as error:
            self._error = error

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Called by trio: see whether anybody but the heart has something to do."""
        if task is not self._heart:
            self._others_ran = True

    def _round(self) -> None:
        self._ready.popleft()()
        error, self._error = self._error, None
        if error is not None:
            self.failed = True
            raise error

    async def _beat(self) -> None:
        """Take the commands. Never waiting, it keeps the run from asking the kernel for news."""
        self._heart = trio.lowlevel.current_task()
        async with trio.open_nursery() as self._nursery:
            while not self._closing:
                try:
                    while self._commands:
                        self._commands.popleft()()
                except Exception as error:
                    self._commands.clear()
                    self._error = error
                await trio.lowlevel.checkpoint()
            self._nursery.cancel_scope.cancel()

    def _ended(self, _: object) -> None:
        self._closed = True


class Gate:
    """Where those wait whose answer comes from elsewhere: a thread, or a process."""

    def __init__(self) -> None:
        self._waiting: list[tuple[trio.Event, list[bool]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    async def passed(self) -> bool:
        """Wait for the answer, whatever is cancelled meanwhile: a thread cannot be stopped."""
        await trio.lowlevel.checkpoint_if_cancelled()
        event, answer = trio.Event(), [False]
        self._waiting.append((event, answer))
        with trio.CancelScope(shield=True):
            await event.wait()
        return answer[0]

    def open(self, number: int, good: bool) -> None:
        """Give one of those who wait its answer, if there are any."""
        if self._waiting:
            event, answer = self._waiting.pop(number % len(self._waiting))
            answer[0] = good
            event.set()
