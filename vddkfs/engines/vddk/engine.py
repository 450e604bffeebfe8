"""The VDDK engine: images read by VMware's library, in a worker of their own.

The worker's main thread makes every call but the completions': it connects, opens and closes, and
begins the reads, deep and asynchronous, on one handle for each image (several handles on one disk
make each call slower). Completions come on the library's threads, and answer the daemon from there;
what they cannot settle alone (room in the window, a refused piece) wakes the main thread.

What a new connection may cure is told to the daemon (``EngineError.retry``), which ends this worker
and starts another; nothing is reconnected here. An idle handle is kept alive by reading a sector,
and closed when it is idle for long, or when another worker of this machine waits for a session; it
is opened again when it is read, and has to be the same disk then.
"""

import logging
import math
import os
import time
from collections.abc import Sequence
from typing import Final

from vddkfs.engines.base import (
    SECTOR,
    CallCount,
    Description,
    Done,
    EngineFacts,
    EngineReport,
    LinkIdentity,
    MapExtent,
    MapSlice,
)
from vddkfs.engines.config import VddkConfig, VddkImage
from vddkfs.engines.vddk.codes import RetryClass, VixFailure
from vddkfs.engines.vddk.flow import Flow, Piece
from vddkfs.engines.vddk.layouts import MAX_CHUNKS, MIN_CHUNK
from vddkfs.engines.vddk.runtime import DESCRIBE_SESSION_SECONDS, Runtime
from vddkfs.engines.vddk.session import OpenDisk, aligned_sector, open_disk
from vddkfs.errors import EngineError, VddkfsError

MAX_TRIES: Final = 6
"""How often a piece is asked for on one handle before the daemon hears of it."""
_QUERY_SECONDS: Final = 0.2
"""How long one query of the allocation map may keep reads from being begun."""
_FINE_MAP_SECTORS: Final = 32 * 1024 * 1024 * 1024 // SECTOR
"""Larger disks are mapped by the MiB: the library takes its time for each chunk."""
_COARSE_CHUNK: Final = 2048
_FEWEST_CHUNKS: Final = 64
"""Of one query, however slow the library is or however scattered the data are."""
_LOOK: Final = 1.0
"""Seconds between looks whether somebody waits for a session, while one is held."""


class ImageReader:
    """One image: its disk while that is open, the window of its reads, and when it was last used.

    *wake* has ``tick`` called on the main thread.
    """

    def __init__(self, runtime: Runtime, image: VddkImage) -> None:
        self.runtime = runtime
        self.config = runtime.config
        self.image = image
        self.flow = Flow(self._issue, runtime.wake)
        self.disk: OpenDisk | None = None
        self.identity: LinkIdentity | None = None
        self.last_used = time.monotonic()
        self._last_moved = self.last_used
        """When the server heard of the disk last, for its readers or to be kept alive."""
        self._keepalive = aligned_sector()
        self._chunks_at_once = 4096

    def open(self) -> OpenDisk:
        """Return the open disk, opening it if need be. Raises EngineError."""
        if self.disk is None:
            self.runtime.take_session()
            try:
                self.disk = self._opened()
            except BaseException:
                self.runtime.give_session_back()
                raise
        self.last_used = self._last_moved = time.monotonic()
        return self.disk

    def _opened(self) -> OpenDisk:
        disk = open_disk(
            self.runtime.library,
            self.runtime.spec(self.image),
            self.image,
            self.runtime.say,
            san_check=self.config.san_check,
            compression=self.config.compression,
        )
        try:
            self._compare(disk.identity())
        except BaseException:
            # No read may see it: the daemon has sent more of them than the one that opened it.
            disk.close()
            raise
        return disk

    def _compare(self, found: LinkIdentity) -> None:
        change = self.identity.change_to(found, self.image.live) if self.identity else ""
        if change:
            # The daemon looks at the identities whenever a worker has opened its disks.
            raise EngineError(
                f"{self.image.path}: it is another disk now: {change}", retry="reconnect"
            )
        self.identity = found

    def close(self) -> None:
        """Close the disk, which nobody reads."""
        if self.disk is not None:
            self.disk.close()
            self.disk = None
            self.runtime.give_session_back()

    def renew(self) -> LinkIdentity:
        """Return what the disk is now; one that is live, or another, is opened again.

        Raises EngineError.
        """
        disk = self.open()
        try:
            if not self.image.live:
                disk.info = disk.handle.info()
            if self.image.live or disk.identity() != self.identity:
                disk.renew()
        except BaseException:
            # Without a handle it is not open; the next who wants it opens it anew.
            self.close()
            raise
        self.identity = disk.identity()
        return self.identity

    # Reads.

    def start(self, sector: int, into: memoryview, done: Done) -> None:
        """Begin a read; see ``AsyncEngine``."""
        try:
            self.open()
        except (VddkfsError, OSError, ValueError) as error:
            done(error)
            return
        self.flow.start(sector, into, done)

    def _issue(self, piece: Piece) -> None:
        assert self.disk is not None
        count = len(piece.into) // SECTOR
        try:
            if self.runtime.asynchronous:
                self.disk.handle.read_async(
                    piece.sector, count, piece.into, lambda code: self._ended(piece, code)
                )
                return
            self.disk.handle.read(piece.sector, count, piece.into)
        except VixFailure as error:
            self._failed(piece, error)
        else:
            self._ended(piece, 0)

    def _ended(self, piece: Piece, code: int) -> None:
        """Take a completion, on any thread."""
        self._last_moved = time.monotonic()
        if piece.into.obj is not self._keepalive.obj:
            self.last_used = self._last_moved
        if code == 0:
            self.flow.ended(piece, None)
            return

        # The library is asked for the text of the code later, on the main thread.
        def failed() -> None:
            self._failed(piece, self.runtime.library.failure(code, "ReadAsync", self.image.path))

        self.runtime.defer(failed)

    def _failed(self, piece: Piece, error: VixFailure) -> None:
        """Have a piece that the host had no memory for asked for again; tell any other failure.

        Whatever else has failed may still be written to its buffer: only another process can use
        that again, or the daemon once this one is gone.
        """
        error.sector = piece.sector
        if error.retry_class is RetryClass.SMALLER and piece.tries < MAX_TRIES:
            self.runtime.say(logging.INFO, f"asking again: {error}")
            self.flow.refused(piece)
        else:
            self.flow.ended(piece, error)

    # The allocation map.

    def map(self, sector: int, count: int, limit: int) -> MapSlice:
        """Return a part of the map from *sector*; see ``Engine``."""
        disk = self.open()
        capacity = disk.info.capacity
        end = min(sector + count, capacity)
        chunk = MIN_CHUNK if capacity <= _FINE_MAP_SECTORS else _COARSE_CHUNK
        if not self.runtime.library.has("QueryAllocatedBlocks"):
            return MapSlice((MapExtent(sector, end - sector, True),), end)
        stop = min(end, (sector // chunk + self._chunks_at_once) * chunk)
        began = time.monotonic()
        blocks = disk.handle.query_allocated(sector, stop - sector, chunk)
        took = time.monotonic() - began
        if took < _QUERY_SECONDS / 2:
            self._chunks_at_once = min(MAX_CHUNKS, self._chunks_at_once * 2)
        elif took > _QUERY_SECONDS:
            self._chunks_at_once = max(_FEWEST_CHUNKS, self._chunks_at_once // 2)
        part = _slice(sector, stop, blocks, limit)
        if part.next_sector < stop:
            # What is over the limit was asked for in vain.
            self._chunks_at_once = max(_FEWEST_CHUNKS, (part.next_sector - sector) // chunk)
        return part

    # Time.

    def tick(self) -> float:
        """Do what is due; return in how many seconds to come again."""
        self.flow.pump()
        away = self.flow.due()
        if self.disk is None:
            return away
        # While it is busy it is not idle at all; its completions wake nobody, so look again later.
        now = time.monotonic()
        idle = now - self.last_used if not self.flow.busy else 0.0
        still = now - self._last_moved if not self.flow.busy else 0.0
        if self.config.idle_close and idle >= self.config.idle_close:
            self.runtime.say(logging.DEBUG, f"{self.image.path}: closed, nobody reads it")
            self.close()
            return away
        if idle >= _LOOK and self.runtime.session_wanted():
            self.runtime.say(logging.INFO, f"{self.image.path}: closed, another needs the session")
            self.close()
            return away
        if self.config.keepalive and still >= self.config.keepalive:
            still = 0.0
            self.flow.start(0, self._keepalive, lambda error: None)
        due = [self.config.idle_close - idle if self.config.idle_close else math.inf]
        due.append(self.config.keepalive - still if self.config.keepalive else math.inf)
        due.append(_LOOK if self.runtime.limits_sessions else math.inf)
        return max(0.01, min(away, *due))


class VddkEngine:
    """Implements ``AsyncEngine``; *secret* is a descriptor with the credentials.

    Opens every image at once, so that the daemon hears what they are. Raises EngineError.
    """

    def __init__(self, config: VddkConfig, secret: int) -> None:
        self.runtime = Runtime(config, secret)
        self._images = [ImageReader(self.runtime, image) for image in config.images]
        try:
            for image in self._images:
                image.open()
        except BaseException:
            self.close()
            raise

    def identities(self) -> Sequence[LinkIdentity]:
        """Return what each image was when it was opened last."""
        return tuple(image.identity for image in self._images if image.identity is not None)

    def start_read(
        self, image: int, sector: int, count: int, into: memoryview, direct: bool, done: Done
    ) -> None:
        """Begin a read. This process keeps nothing of a disk, so *direct* changes nothing."""
        try:
            reader = self._images[image]
        except IndexError:
            done(ValueError(f"there is no image {image}"))
            return
        reader.start(sector, into, done)

    def map(self, image: int, sector: int, count: int, limit: int, seconds: float) -> MapSlice:
        """Return a part of the allocation map; one query of the library may take longer."""
        if not 0 <= image < len(self._images) or count < 1:
            raise ValueError(f"there is no image {image}")
        return self._images[image].map(sector, count, limit)

    def revalidate(self) -> Sequence[LinkIdentity]:
        """Look at every image again, and open the live ones anew."""
        return tuple(image.renew() for image in self._images)

    def report(self) -> EngineReport:
        """Return the transports in use, and what each function of the library did so far."""
        open_disks = [image.disk for image in self._images if image.disk is not None]
        return EngineReport(
            transports=tuple(dict.fromkeys(disk.transport for disk in open_disks)),
            calls=tuple(
                CallCount(name, one.count, one.failures, one.seconds, one.bytes)
                for name, one in sorted(self.runtime.library.statistics().items())
            ),
        )

    def complain(self, text: str) -> None:
        """Say *text* now; what the library has printed goes first."""
        self.runtime.say(logging.ERROR, text)
        self.runtime.output.close()

    def fileno(self) -> int:
        """Return what becomes readable when a completion leaves something to do."""
        return self.runtime.woken

    def tick(self) -> float:
        """Do what is due."""
        self.runtime.run_deferred()
        return min((image.tick() for image in self._images), default=math.inf)

    def drain(self) -> None:
        """Go on until no read is under way. The daemon's deadline bounds it."""
        while any(image.flow.busy for image in self._images):
            away = self.tick()
            if any(image.flow.busy for image in self._images):
                self.runtime.wait(min(away, 0.5))

    def close(self) -> None:
        """Close everything, and end the use of the library."""
        for image in self._images:
            image.close()
        self.runtime.close()


def describe(config: VddkConfig, secret: int) -> Description:
    """Return what the images of *config* are, opened one after another. Raises EngineError."""
    runtime = Runtime(config, secret)
    runtime.session_seconds = DESCRIBE_SESSION_SECONDS
    found = []
    transports = []
    try:
        for image in config.images:
            reader = ImageReader(runtime, image)
            disk = reader.open()
            found.append(disk.describe())
            transports.append(disk.transport)
            reader.close()
        facts = EngineFacts(
            version=runtime.library.kit.release_text,
            build=runtime.library.build,
            library=os.fspath(runtime.library.kit.library),
            transport=", ".join(dict.fromkeys(transports)),
        )
    finally:
        runtime.close()
    return Description(tuple(found), facts)


def _slice(start: int, end: int, blocks: list[tuple[int, int]], limit: int) -> MapSlice:
    """Return what *blocks* (allocated, in order) say of [*start*, *end*)."""
    extents: list[MapExtent] = []
    here = start
    for offset, length in blocks:
        if offset > here:
            extents.append(MapExtent(here, offset - here, False))
        extents.append(MapExtent(offset, length, True))
        here = offset + length
    if here < end:
        extents.append(MapExtent(here, end - here, False))
    kept = extents[:limit]
    return MapSlice(tuple(kept), kept[-1].sector + kept[-1].count)
