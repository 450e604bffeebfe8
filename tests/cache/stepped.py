"""A trio run that goes on only when the test says so, and everything in it that takes its time.

Between two steps of a state machine nothing moves: no thread, no clock, no task. A step goes on
until all tasks wait, or for a few rounds of the scheduler only, so that the next step finds tasks
that were woken and have not run yet.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import trio
import trio.testing

T = TypeVar("T")


class SteppedRun(trio.abc.Instrument):
    """One run, in guest mode, with this as its host. ``nursery`` is for the tasks of the test."""

    def __init__(self) -> None:
        self.clock = trio.testing.MockClock()
        self.nursery: trio.Nursery
        self.idle = False
        """Whether all tasks wait."""
        self._ready: deque[Callable[[], object]] = deque()
        self._commands: deque[Callable[[], object]] = deque()
        self._answer: Any = None
        self._error: BaseException | None = None
        self._end: Exception | None = None
        self._closing = False
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
        self.do(lambda: None)

    def do(self, command: Callable[[], T], rounds: int | None = None) -> T:
        """Call *command* in the run, and go on until all wait, or for *rounds* rounds at most.

        Raises what the command raises, or what a task of the run has died of.
        """
        self._commands.append(command)
        self.idle = False
        if self._end is not None:
            raise self._end
        while self._commands:
            self._round()
        while not self.idle and rounds != 0:
            self._others_ran = False
            self._round()
            self.idle = not self._others_ran
            rounds = None if rounds is None else rounds - 1
        if self._error is not None:
            raise self._error
        answer: T = self._answer
        return answer

    @property
    def over(self) -> bool:
        """Whether the run has died of something, which ``do`` has raised."""
        return self._end is not None

    def close(self) -> None:
        """Cancel what is left in the run, and end it."""
        self._closing = True
        while self._end is None:
            self._ready.popleft()()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Called by trio: see whether anybody but the heart has something to do."""
        if task is not self._heart:
            self._others_ran = True

    def _round(self) -> None:
        self._ready.popleft()()
        if self._end is not None:
            self._commands.clear()
            raise self._end

    async def _beat(self) -> None:
        """Take the commands. Never waiting, it keeps the run from asking the kernel for news."""
        self._heart = trio.lowlevel.current_task()
        async with trio.open_nursery() as self.nursery:
            while not self._closing:
                if self._commands:
                    self._obey(self._commands.popleft())
                await trio.lowlevel.checkpoint()
            self.nursery.cancel_scope.cancel()

    def _obey(self, command: Callable[[], object]) -> None:
        self._answer = self._error = None
        try:
            self._answer = command()
        except Exception as error:
            self._error = error

    def _ended(self, end: Any) -> None:
        self._end = AssertionError("the run is over")
        try:
            end.unwrap()
        except ExceptionGroup as group:
            error: Exception = group
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            self._end = error


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
        """Give one of those who wait its answer."""
        event, answer = self._waiting.pop(number % len(self._waiting))
        answer[0] = good
        event.set()
