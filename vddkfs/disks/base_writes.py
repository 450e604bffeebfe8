"""Writes to the base of a chain, through the worker that has it open for that.

The order of a write: the source has it; what is cached of it is dropped, of the base and of every
image above it; its range is let go; the writer is answered. Ends that are no whole sectors are
read, merged and written, with the range locked. Long writes go out in pieces, several at once.

A write that failed for good leaves a disk that is partly old and partly new. Nothing more is
written to it then until it is mounted again; reads go on.

Offsets and sizes in bytes. Methods run on the trio thread.
"""

import errno
import logging
from collections.abc import Callable
from typing import Final

import trio

from vddkfs.cache.arena import FRAME, Slot
from vddkfs.cache.direct import Answer
from vddkfs.cache.frames import DiskCache
from vddkfs.cache.sector_cache import ImageCache
from vddkfs.disks.ranges import RangeLocks
from vddkfs.engines.base import SECTOR
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.requests import WriteRequest
from vddkfs.errors import EngineError, VddkfsError

log = logging.getLogger(__name__)

_FRAMES_AT_ONCE: Final = 8
_PIECE: Final = 256 * 1024
"""Bytes of one request, so that copies in one process go on beside those in the next."""
_HARMLESS: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL))
"""Errnos that an engine refuses a write with before anything of it is written anywhere else."""


class BaseWrites:
    """Writes to the image *name*, whose *cache* is filled by *client*.

    *wrote* is told of each range that was written, or may have been.
    """

    def __init__(
        self,
        name: str,
        client: WorkerClient,
        cache: ImageCache,
        wrote: Callable[[int, int], None],
    ) -> None:
        self.name = name
        self.broken = ""
        """Why nothing is written any more, or empty."""
        self.failures = 0
        """Flushes that failed, and other losses of what was written: each writer is told of it."""
        self._client = client
        self._cache = cache
        self._wrote = wrote
        self._ranges = RangeLocks(SECTOR)

    async def write(self, start: int, data: bytes | memoryview, check: Callable[[], None]) -> None:
        """Write *data* from *start* on; the source has it when this returns.

        *check* raises VddkfsError once the source is another disk than the one it is for.
        Raises VddkfsError: a part may have been written. When it is cancelled that is so too.
        """
        self._check()
        end = start + len(data)
        async with self._ranges.hold(start, end):
            self._check()
            first, whole = await self._whole_sectors(start, memoryview(data))
            try:
                await self._write_pieces(first, whole, check)
            except VddkfsError as error:
                check()
                self._failed(error)
                raise
            finally:
                self._wrote(first, first + len(whole))

    async def flush(self) -> None:
        """Return when all that was written is on the disk.

        Raises VddkfsError if it may be lost: to the one who finds that. ``failures`` tells others,
        and nothing is to be flushed after that.
        """
        if self.failures:
            return
        try:
            await self._client.flush()
        except VddkfsError as error:
            # One loss, also where several flushes find it at once.
            self.failures = 1
            self._break(f"what was written may be lost: {error}")
            raise

    async def _whole_sectors(self, start: int, data: memoryview) -> tuple[int, memoryview]:
        """Return where whole sectors begin that hold *data*, and their content."""
        end = start + len(data)
        first, last = start - start % SECTOR, end + -end % SECTOR
        if (first, last) == (start, end):
            return start, data
        whole = bytearray(last - first)
        if first < start:
            whole[:SECTOR] = await self._cache.read_direct(first, first + SECTOR)
        if end < last and (first == start or last - first > SECTOR):
            whole[-SECTOR:] = await self._cache.read_direct(last - SECTOR, last)
        whole[start - first : end - first] = data
        return first, memoryview(whole)

    async def _write_pieces(self, start: int, data: memoryview, check: Callable[[], None]) -> None:
        if len(data) <= FRAME:
            await self._write_frame(start, data, check)
            return
        errors: list[VddkfsError] = []
        limit = trio.Semaphore(_FRAMES_AT_ONCE)

        async def write(at: int) -> None:
            async with limit:
                if not errors:
                    try:
                        await self._write_frame(start + at, data[at : at + FRAME], check)
                    except VddkfsError as error:
                        errors.append(error)

        async with trio.open_nursery() as nursery:
            for at in range(0, len(data), FRAME):
                nursery.start_soon(write, at)
        if errors:
            raise _worst(errors)

    async def _write_frame(self, start: int, data: memoryview, check: Callable[[], None]) -> None:
        """Write what has space in one slot: in pieces, each sent while the next is copied."""
        disk: DiskCache = self._cache.disk
        slot = await disk.slot(len(data))
        try:
            # Requests are served in their order: what opens another disk comes behind these.
            check()
        except VddkfsError:
            disk.release(slot)
            raise
        if len(data) <= _PIECE:
            answer = self._submit(slot, 0, start, data)
            self._client.poll()
            disk.release(await answer.wait())
            return
        answers = []
        for at in range(0, len(data), _PIECE):
            slot.pin()
            answers.append(self._submit(slot, at, start + at, data[at : at + _PIECE]))
        disk.release(slot)
        self._client.poll()
        errors = []
        while answers:
            answer = answers.pop()
            try:
                disk.release(await answer.wait())
            except VddkfsError as error:
                errors.append(error)
            except BaseException:
                for other in answers:
                    other.leave()
                raise
        if errors:
            raise _worst(errors)

    def _submit(self, slot: Slot, at: int, start: int, data: memoryview) -> Answer:
        """Have *data*, from byte *at* of *slot* on, written to *start*; one pin is the answer's."""
        disk = self._cache.disk
        slot.fill(at, data)
        answer = Answer(slot, disk)

        def held() -> Callable[[], None]:
            slot.pin()
            return lambda: disk.release(slot)

        target = slot if not at else _Part(slot.chunk_number, slot.offset + at)
        count = len(data) // SECTOR
        request = WriteRequest(start // SECTOR, count, target, data, answer.done, held)
        self._client.submit_write(request)
        return answer

    def _check(self) -> None:
        if self.broken:
            raise EngineError(
                f"{self.name}: nothing is written any more: {self.broken}",
                advice="unmount, see that the disk is right, and mount it again",
            )

    def _failed(self, error: VddkfsError) -> None:
        if error.errno not in _HARMLESS:
            self._break(str(error))

    def _break(self, why: str) -> None:
        if not self.broken:
            self.broken = why
            log.error(
                "%s: a write was lost, so that nothing more is written until it is mounted again; "
                "reads go on: %s",
                self.name,
                why,
            )


class _Part:
    """A place in a slot; see ``Target``."""

    __slots__ = ("chunk_number", "offset")

    def __init__(self, chunk_number: int, offset: int) -> None:
        self.chunk_number = chunk_number
        self.offset = offset


def _worst(errors: list[VddkfsError]) -> VddkfsError:
    """Return the one that says most: a piece that is lost, whichever was refused beside it."""
    return next((one for one in errors if one.errno not in _HARMLESS), errors[0])
