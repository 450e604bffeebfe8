"""Reads past the cache: each is one answer in a slot of its own, which goes back at once."""

import trio

from vddkfs.cache.arena import Slot
from vddkfs.cache.frames import DiskCache
from vddkfs.engines.base import SECTOR
from vddkfs.engines.requests import Moved, ReadRequest
from vddkfs.errors import VddkfsError


async def fetch(disk: DiskCache, image: int, start: int, end: int) -> Slot:
    """Return a slot into which [*start*, *end*) of *image* was read: whole sectors, in bytes.

    The slot is free again: what is in it is valid until the next await. Raises VddkfsError. When it
    is cancelled the slot goes back as soon as nobody writes to it.
    """
    slot = await disk.slot(end - start)
    answer = Answer(slot, disk)
    first, count = start // SECTOR, (end - start) // SECTOR
    disk.source.submit_read(
        ReadRequest(image, first, count, slot, answer.done, answer.moved, direct=True)
    )
    disk.source.poll()
    slot = await answer.wait()
    disk.release(slot)
    return slot


class Answer:
    """The answer to one direct read, or one write; once nobody waits for it, the slot goes back by
    itself."""

    __slots__ = ("disk", "error", "finished", "left", "lost", "slot", "task")

    def __init__(self, slot: Slot, disk: DiskCache) -> None:
        self.slot = slot
        self.disk = disk
        self.error: VddkfsError | None = None
        self.finished = False
        self.left = False
        self.lost = False
        self.task: trio.lowlevel.Task | None = None

    def done(self, error: VddkfsError | None) -> None:
        self.error = error
        self.finished = True
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None
        elif self.left and not self.lost:
            self.disk.release(self.slot)

    def leave(self) -> None:
        """Have the slot go back by itself: nobody will wait."""
        self.left = True
        if self.finished and not self.lost:
            self.disk.release(self.slot)

    def moved(self) -> Moved:
        disk, old = self.disk, self.slot
        fresh = disk.slot_at_once(old.size)
        if fresh is None:
            self.lost = True
            return None, lambda: disk.release(old)
        self.slot = fresh
        return fresh, lambda: disk.release(old)

    async def wait(self) -> Slot:
        if not self.finished:
            self.task = trio.lowlevel.current_task()

            def abort(_: object) -> trio.lowlevel.Abort:
                self.task = None
                self.left = True
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        if self.error is not None:
            if not self.lost:
                self.disk.release(self.slot)
            raise self.error
        return self.slot
