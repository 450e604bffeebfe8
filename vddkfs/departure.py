"""How a mount comes down that is told to stop.

Umount ends the session, and everything goes. SIGTERM and SIGINT try a plain umount; files that are
open for reading are waited for ``stop_timeout``, or until a second signal, and are let go then. A
file that is open for writing may have a guest's file system on it, whose journal would be aborted:
it is waited for until a second signal, however long that takes, and what was written is flushed
then.
"""

import logging
from collections.abc import AsyncIterator, Sequence

import trio

from vddkfs.disks.image import Image
from vddkfs.engines.client import WorkerClient
from vddkfs.errors import MountBusy, VddkfsError
from vddkfs.fuse.operations import Operations
from vddkfs.mounts import holders, unmount

log = logging.getLogger(__name__)

_UMOUNT_AGAIN = 0.5
_PLAIN_UMOUNT = 4 * _UMOUNT_AGAIN
"""Seconds in which a plain umount has its turn after the last writer has left."""
_LAST_FLUSH = 10.0
"""Seconds for what was written to reach the disk, when files are let go."""
_LAST_ANSWERS = 0.05
"""Seconds for handlers to tell their callers that the mount goes down."""


class Departure:
    """The end of the mount at *mountpoint*, whose files *operations* knows and *clients* read."""

    def __init__(
        self,
        mountpoint: str,
        stop_timeout: float,
        operations: Operations,
        clients: Sequence[WorkerClient],
    ) -> None:
        self._mountpoint = mountpoint
        self._stop_timeout = stop_timeout
        self._operations = operations
        self._clients = clients

    async def on_signals(self, signals: AsyncIterator[int], serving: trio.CancelScope) -> None:
        """Unmount on the first signal, or let go: see the module's docstring."""
        await anext(signals)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._unmount)
            nursery.start_soon(self._until_read_only, nursery.cancel_scope)
            await anext(signals)
            nursery.cancel_scope.cancel()
        log.warning("%s is let go with files open", self._mountpoint)
        await self._flush_all()
        # Reads that are under way end with EIO first: unanswered, they would hang in the kernel.
        for client in self._clients:
            client.refuse()
        await trio.sleep(_LAST_ANSWERS)
        serving.cancel()

    async def _until_read_only(self, waiting: trio.CancelScope) -> None:
        """End the wait after ``stop_timeout``, once no file is open for writing."""
        await trio.sleep(self._stop_timeout)
        told: frozenset[str] = frozenset()
        while names := frozenset(self._operations.written_images):
            if not names <= told:
                told = names
                log.warning(
                    "still here: a guest may be mounted on %s, which is open for writing; unmount "
                    "that, or send a second signal to let go of it",
                    ", ".join(sorted(names)),
                )
            await trio.sleep(_UMOUNT_AGAIN)
        if told:
            # Who wrote has left just now: with nothing else open, a plain umount works now.
            await trio.sleep(_PLAIN_UMOUNT)
        waiting.cancel()

    async def _flush_all(self) -> None:
        """Have what was written on the disk, as far as that is done in a short time."""

        async def flush(image: Image) -> None:
            with trio.move_on_after(_LAST_FLUSH):
                try:
                    await image.sync()
                except VddkfsError as error:
                    log.error("%s: what was written may be lost: %s", image.name, error)
                return
            log.error("%s: what was written may be lost: no answer", image.name)

        async with trio.open_nursery() as nursery:
            for image in self._operations.written_images.values():
                nursery.start_soon(flush, image)

    async def _unmount(self) -> None:
        """Try a plain umount until it works; the session then ends by itself."""
        told = False
        while True:
            try:
                await trio.to_thread.run_sync(unmount, self._mountpoint)
            except MountBusy:
                if not told:
                    told = True
                    who = await trio.to_thread.run_sync(holders, self._mountpoint)
                    log.warning(
                        "told to stop, but files are open: %s; waiting %g s for them",
                        "; ".join(who) or "by whom is not to be seen",
                        self._stop_timeout,
                    )
                await trio.sleep(_UMOUNT_AGAIN)
            except VddkfsError as error:
                log.warning("%s", error)
                return
            else:
                await trio.sleep_forever()
