"""The daemon's end of a worker: requests out, answers in, and a new process when one is lost.

``WorkerClient.run`` is the supervisor, one task a worker. It starts the process when something is
asked, opens the chain in it, lends it the chunks of its disk, and watches: for answers, for the
deadline of the oldest request, for the end of the process. A worker that dies or misses a deadline
is killed, reaped and replaced, and the reads that were under way are sent again. A request ends
with an error only when the worker says so or when ``retry_budget`` is spent.

While a lost worker is not yet reaped (it may hang in the kernel) it may still write to the slots of
its last requests: those slots stay out of use until it is gone, and the requests get new ones.

Writes are fenced. Where the base is opened to be written, no other process is started before the
lost one is reaped, so that reads wait as well; the next has to open the base, which takes the lock
that the lost one had; it is sent what a library may have lost, then what was under way. If all that
takes longer than ``fence_timeout``, nothing is written any more until the disk is mounted again:
``write_failure`` says why, and reads go on, by processes that open the disk for reading alone.

Everything here runs on the trio thread. The process is started on that same thread, and it has to
be the main one: PR_SET_PDEATHSIG ends a child with the *thread* that made it.
"""

import errno
import functools
import logging
import math
import shutil
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import trio

from vddkfs.engines import backoff
from vddkfs.engines.base import LinkIdentity
from vddkfs.engines.config import EngineConfig, VddkConfig
from vddkfs.engines.opening import open_chain
from vddkfs.engines.pending import TICK
from vddkfs.engines.port import WorkerPort
from vddkfs.engines.process import STOP_SECONDS, Process, WorkerProcess
from vddkfs.engines.requests import Patience
from vddkfs.engines.unflushed import write_again
from vddkfs.errors import EngineError, StaleImage, VddkfsError

log = logging.getLogger(__name__)

_VDDK_STOP_SECONDS: Final = 5.0
_DETACH_SECONDS: Final = 10.0
_LOST: Final = "ended unexpectedly"
_IDLE: Final = "idle"
_REFUSED: Final = "refused"
_BUSY: Final = "busy"
_NO_LOSS: Final = (_IDLE, _REFUSED, _BUSY)
"""Why a process is of no more use; all but the first are no losses."""


class WorkerClient(WorkerPort):
    """One worker and its supervisor.

    *opened* is called with the identities of the chain each time a process has opened it, before
    any request is sent to that process; what it raises fails the requests that wait. *secret* is a
    descriptor with the credentials, which each process is given and this one never reads.
    """

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        patience: Patience,
        opened: Callable[[tuple[LinkIdentity, ...]], None],
        start: Callable[[str], Process] | None = None,
        *,
        secret: int = -1,
    ) -> None:
        super().__init__(name, config, patience)
        self._secret = secret
        self._opened = opened
        self._start = start or functools.partial(WorkerProcess, stop_seconds=_stop_seconds(config))
        self._process: Process | None = None
        self._backoff = backoff.Backoff()
        self._stopping = False
        self._patiently = False
        self._reaper: trio.Nursery | None = None
        self._reaped = trio.Event()

    @property
    def pid(self) -> int | None:
        """The process id, or None while no process runs."""
        return self._process.pid if self._process is not None else None

    @property
    def state(self) -> str:
        """What the worker is doing: "serving", "starting" or "not running"."""
        if self._pending.sock is not None:
            return "serving"
        return "starting" if self._process is not None else "not running"

    @property
    def ends_gently(self) -> bool:
        """Whether even a process that is given up gets the chance to end in good order.

        Disks that it attached to this machine would stay attached.
        """
        return self.config.hot_adds

    def stop(self) -> None:
        """Have ``run``, when it is cancelled, end the process in good order and not by force."""
        self._stopping = True

    def refuse(self) -> None:
        """Fail everything that is asked, now and from now on: the mount is going down."""
        self._pending.refuse()

    # The supervisor.

    async def run(self) -> None:
        """Serve until cancelled; the process is stopped then, in good order if it answers."""
        async with trio.open_nursery() as nursery:
            self._reaper = nursery
            try:
                while True:
                    await self._until_wanted()
                    await self._until_fenced()
                    if not self._pending.useful:
                        await self._back_off()
                    await self._one_process()
            finally:
                self.refuse()
                self._empty_folder()

    def _empty_folder(self) -> None:
        """Remove what processes that ended badly have left; a good end removes it by itself.

        Where disks may still be attached to this machine, it is needed to take them away.
        """
        if isinstance(self.config, VddkConfig) and not self.config.hot_adds:
            shutil.rmtree(self.config.tmp_directory, ignore_errors=True)

    async def _back_off(self) -> None:
        """Wait before the next process; what waits too long for it is given up meanwhile.

        Half of a request's budget at most, so that each is tried at least once.
        """
        seconds = min(self._backoff.seconds, self._patience.retry_budget / 2)
        until = trio.current_time() + seconds
        while self._wanted and (left := until - trio.current_time()) > 0:
            await trio.sleep(min(left, TICK))
            self._pending.expire()

    async def _until_wanted(self) -> None:
        pending = self._pending
        while not self._wanted:
            pending.wanted = trio.Event()
            await pending.wanted.wait()

    @property
    def _wanted(self) -> bool:
        """Whether a process is needed; what was written and may be lost needs one unasked."""
        return bool(self._pending.waiting) or self._pending.fence.in_doubt

    async def _until_fenced(self) -> None:
        """Wait for the end of a process that hangs, if it may still write, and the next could."""
        while self._hanging and self._config_now.writable:
            self._reaped = trio.Event()
            with trio.move_on_after(TICK):
                await self._reaped.wait()
            self._pending.expire()

    async def _one_process(self) -> None:
        """Start a process, serve with it, and clean up after it."""
        try:
            self._process = process = self._start(self.name)
        except OSError as error:
            self._lost(f"cannot be started: {error}")
            self._pending.take_over(hanging=False)
            return
        self.counters.starts += 1
        began = trio.current_time()
        reason = _LOST
        try:
            reason = await self._serve(process)
        except VddkfsError as error:
            self._pending.note(str(error))
            retry = error.retry if isinstance(error, EngineError) else ""
            if retry == "busy":
                reason = _BUSY
            elif retry:
                reason = f"cannot open the disk: {error}"
                self._patiently = retry == "later"
            else:
                reason = _REFUSED
                self._refused(error)
        finally:
            self._pending.sock = None
            self._process = None
            with trio.CancelScope(shield=True):
                orderly = reason in _NO_LOSS or self._stopping or self.ends_gently
                reaped = await process.end(kill=not orderly)
        if reason == _LOST and (how := process.ending()):
            reason = f"{_LOST} ({how})"
        if reason == _BUSY:
            self._pending.excuse(began)
            self._pending.useful, self._backoff.seconds = False, TICK
        elif reason not in _NO_LOSS:
            self.counters.restarts += 1
            self._lost(reason)
        freed = self._pending.take_over(hanging=not reaped)
        if not reaped and self._reaper is not None:
            self._hanging += 1
            log.error("worker of %s (pid %d) cannot be killed", self.name, process.pid)
            self._reaper.start_soon(self._reap_later, process, freed)

    async def _serve(self, process: Process) -> str:
        """Return why the process is of no more use."""
        reason = _REFUSED
        opened = False
        refusal: VddkfsError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.forward_output)
            nursery.start_soon(self._mind_budget)
            with trio.move_on_after(self._patience.open_timeout):
                try:
                    opened = await self._open(process) and await self._write_again(process.sock)
                except VddkfsError as error:
                    refusal = error
            if not opened:
                nursery.cancel_scope.cancel()
            else:
                self._pending.served_by(process.sock)
                self._serving = nursery.cancel_scope
                self._pending.prepend(self._loan(number) for number in self._chunks)
                self._pending.pump()

                async def until(wait: Callable[[], Awaitable[str]]) -> None:
                    nonlocal reason
                    reason = await wait()
                    # At once, so that nothing more is sent to a process that is given up.
                    self._pending.sock = None
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until, lambda: self._receive(process.sock))
                nursery.start_soon(until, self._watch)
                nursery.start_soon(until, self._until_trouble)
        self._serving = None
        if refusal is not None:
            raise refusal
        return reason if opened else "did not open the chain"

    async def _open(self, process: Process) -> bool:
        """Open the chain in a new process; raises the engine's error.

        Returns False where the process ended first.
        """
        identities = await open_chain(self.name, process.sock, self._config_now, self._secret)
        if identities is None:
            return False
        self._look_at_base(identities)
        self._opened(identities)
        return True

    def _look_at_base(self, identities: Sequence[LinkIdentity]) -> None:
        """See to it that nothing is written to another disk than the one it was for."""
        base, found = self._base, identities[0] if identities else None
        pending = self._pending
        asked = pending.fence.in_doubt or any(request.writes for request in pending.waiting)
        if asked and base is not None:
            change = base.replaced_by(found) if found is not None else "it is gone"
            if change:
                pending.fail_writes(
                    StaleImage(f"{self.name}: writes were for the disk of before: {change}")
                )
        self._base = found

    async def _write_again(self, sock: socket.socket) -> bool:
        """Send the process what others may have lost. Raises what another process may cure."""
        pending = self._pending
        kept = pending.unflushed.kept
        try:
            if kept and not await write_again(sock, kept):
                return False
        except VddkfsError as error:
            if isinstance(error, EngineError) and error.retry:
                raise
            pending.fail_writes(
                EngineError(
                    f"{self.name}: what a lost worker had written cannot be written again",
                    cause=str(error),
                    advice="mount again, and write everything since the last good flush once more",
                )
            )
        self.counters.rewritten += len(kept)
        pending.fence.settle()
        return True

    async def _receive(self, sock: socket.socket) -> str:
        while True:
            await trio.lowlevel.wait_readable(sock)
            if self._pending.drain(sock) < 0:
                return _LOST

    async def _until_trouble(self) -> str:
        """Return when the worker says that it has lost its connection."""
        await self._pending.troubled.wait()
        error = self._pending.trouble
        if error is not None and error.retry == "busy":
            return _BUSY
        self._patiently = error is not None and error.retry == "later"
        return f"lost its connection: {error}"

    async def _watch(self) -> str:
        """Return when a deadline is missed, or when the worker was idle for long."""
        while True:
            if self._pending:
                await trio.sleep(TICK)
                if self._pending.overdue():
                    return f"did not answer within {self._patience.op_timeout:g} s"
                self._pending.pump()
            elif await self._idle_too_long() and self._may_end():
                return _IDLE

    async def _idle_too_long(self) -> bool:
        """Sleep until there is something to do; say whether that took longer than it may."""
        pending = self._pending
        until = pending.last_activity + self._patience.idle_timeout
        pending.wanted = trio.Event()
        with trio.move_on_at(until):
            await pending.wanted.wait()
        return not pending and trio.current_time() >= until

    def _may_end(self) -> bool:
        """Say whether the idle process may end. What it has written is flushed before.

        One that may write never does: it holds the lock that others who write are refused by, and
        that keeps a virtual machine from starting on the disk.
        """
        if self.write_failure is not None:
            return True
        dirty = self._pending.unflushed.dirty
        if dirty:
            self._flush_behind()
        if dirty or self.config.writable:
            self._pending.last_activity = trio.current_time()
            return False
        return True

    async def _mind_budget(self) -> None:
        """Give up what waits too long for a process that does not get ready."""
        while self._pending.sock is None:
            await trio.sleep(TICK)
            self._pending.expire()

    def _lost(self, reason: str) -> None:
        """Tell the loss of a process, and wait longer before the next if it repeats."""
        if self._stopping:
            return
        log.warning("worker of %s: it %s; another takes over", self.name, reason)
        self._pending.note("the worker " + reason)
        self._pending.charge()
        self._slow_down()
        if self._patiently:
            self._backoff.seconds = backoff.MAINTENANCE
            self._patiently = False

    def _refused(self, error: VddkfsError) -> None:
        """Fail what waits with *error*, and do not log in again for each that is asked now.

        Where it can be read, but not be written any more, reads are for the next process.
        """
        pending = self._pending
        lost_lock = error.errno == errno.EROFS and self._base is not None
        if pending.fence.in_doubt or lost_lock:
            pending.fail_writes(error)
        if not lost_lock:
            pending.fail_all(error)
        pending.charge()
        if self.config.uses_library:
            self._slow_down(backoff.REFUSED)

    def _slow_down(self, first: float = backoff.SHORTEST) -> None:
        self._backoff.grow(first, series=not self._pending.useful or self._pending.stuck)
        self._pending.useful = False

    async def _reap_later(self, process: Process, freed: Iterable[Callable[[], None]]) -> None:
        await process.reap(math.inf)
        self._hanging -= 1
        if not self._hanging:
            self._pending.fence.gone()
        self._reaped.set()
        for free in freed:
            free()


def _stop_seconds(config: EngineConfig) -> float:
    """Return how long a process may take to end by itself.

    VMware's library takes a second for its own end; to detach a disk, the server reconfigures a
    virtual machine.
    """
    if not isinstance(config, VddkConfig):
        return STOP_SECONDS
    return _VDDK_STOP_SECONDS + (_DETACH_SECONDS * len(config.images) if config.hot_adds else 0.0)
