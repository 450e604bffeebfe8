"""One image of the VDDK engine: opened, read, mapped, kept alive, closed when idle, opened again.

An image that is opened again has to be the same disk: reads that the daemon has sent are for what
it was. Where it has become another one it is closed and stays so: its reads fail (a new process is
worth a try: the daemon looks at what that has opened before it sends any), until the daemon asks
again what the image is, which it does when it has told all readers.
"""

import logging
import math
import time
from typing import Final

from vddkfs.engines.base import SECTOR, Done, LinkIdentity, MapSlice, Step
from vddkfs.engines.config import VddkImage
from vddkfs.engines.vddk.allocation import AllocationMap
from vddkfs.engines.vddk.codes import RetryClass, VixFailure
from vddkfs.engines.vddk.devices import Flush, Luns
from vddkfs.engines.vddk.flow import Elsewhere, Flow, Piece
from vddkfs.engines.vddk.runtime import Runtime
from vddkfs.engines.vddk.session import OpenDisk, aligned_sector, open_disk
from vddkfs.errors import EngineError, VddkfsError

MAX_TRIES: Final = 6
"""How often a piece is asked for on one handle before the daemon hears of it."""
_LOOK: Final = 1.0
"""Seconds between looks whether somebody waits for a session, while one is held."""


class ImageReader:
    """One image: its disk while that is open, the window of its reads, and when it was last used.

    ``luns`` are the devices under a disk that was opened over SAN, also while it is closed: others
    may hold them open. ``another`` is what the daemon was told that the image has become, until it
    asks again. ``may_change``: its content may become another without its being another disk.
    """

    may_change: bool

    def __init__(self, runtime: Runtime, image: VddkImage) -> None:
        self.runtime = runtime
        self.config = runtime.config
        self.image = image
        self.may_change = image.live
        self.flow = Flow(self._issue, runtime.wake)
        self.disk: OpenDisk | None = None
        self.luns: Luns | None = None
        self.identity: LinkIdentity | None = None
        self.another: LinkIdentity | None = None
        self.last_used = time.monotonic()
        self._last_moved = self.last_used
        """When the server heard of the disk last, for its readers or to be kept alive."""
        self._keepalive = aligned_sector()
        self._allocation = AllocationMap()
        self._told: set[str] = set()
        """What the operator was told of the devices: it would be the same at every open."""

    def open(self, flush: Flush | None = None) -> OpenDisk:
        """Return the open disk, opening it if need be. Raises EngineError."""
        if self.disk is None:
            self.runtime.take_session()
            try:
                self.disk = self._opened(flush or self._new_flush())
            except BaseException:
                self.runtime.give_session_back()
                raise
        self._used()
        return self.disk

    def _used(self) -> None:
        self.last_used = self._last_moved = time.monotonic()

    def _opened(self, flush: Flush) -> OpenDisk:
        self.flush(flush)
        disk = open_disk(
            self.runtime.library,
            self.runtime.spec(self.image),
            self.image,
            self.runtime.say,
            san_check=self.config.san_check,
            compression=self.config.compression,
        )
        try:
            self._look_below(disk, flush)
            self._compare(disk.identity())
        except BaseException:
            # No read may see it: the daemon has sent more of them than the one that opened it.
            disk.close()
            raise
        return disk

    def _compare(self, found: LinkIdentity) -> None:
        change = self.identity.change_to(found, self.may_change) if self.identity else ""
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

    # What it is now.

    def revalidate(self) -> LinkIdentity:
        """Return what the image is now; one that is live, or another disk, is opened again.

        Raises EngineError.
        """
        return self._look(self.image.live, self._new_flush(), strict=True)

    def renew(self, flush: Flush) -> tuple[LinkIdentity, Step]:
        """Open the disk again, for the library to know nothing of before. Raises EngineError.

        One that was closed is opened: the daemon wants to know what it is now. *flush* has dropped
        the devices' pages, but for those of devices that are found only now.
        """
        began = time.perf_counter()
        closed = self.disk is None
        found = self._look(True, flush)
        if self.disk is None:
            told = "it is another disk now: closed, until the readers of before are told"
        elif closed:
            told = f"VDDK had it closed, so it knew nothing; opened over {self.disk.transport}"
        else:
            told = f"VDDK closed it, and opened it again over {self.disk.transport}"
        return found, Step("library", self.image.path, told, time.perf_counter() - began)

    def _look(self, anew: bool, flush: Flush, strict: bool = False) -> LinkIdentity:
        """Return what the image is now: opened *anew*, if it was open, or if it has changed.

        *strict*: fail where pages are left that the disk may be read through.
        """
        if self.another is not None:
            self.identity, self.another = self.another, None
        disk = self.disk
        if disk is None:
            return self.open(flush).identity()
        try:
            if not anew:
                disk.info = disk.handle.info()
            if anew or disk.identity() != self.identity:
                left = [step for step in self.flush(flush) if not step.done]
                if left and strict and self.luns is not None and self.luns.buffered:
                    raise self._kept(left[0])
                disk.renew()
                self._look_below(disk, flush)
        except BaseException:
            # Without a handle it is not open; the next who wants it opens it anew.
            self.close()
            raise
        self._used()
        found = disk.identity()
        if self.identity is not None and self.identity.change_to(found, self.may_change):
            self.close()
            self.another = found
        else:
            self.identity = found
        return found

    # The pages of block devices.

    def _new_flush(self) -> Flush:
        return Flush(self.config.drop_caches)

    def flush(self, flush: Flush) -> list[Step]:
        """Have Linux forget what it keeps of the devices under the disk; nothing may be under way.

        The operator is told once of what cannot be done.
        """
        if self.luns is None:
            return []
        if self.disk is not None:
            # The library may have opened another device since, or lost one.
            self.luns.look()
        steps = flush.of(self.luns, self.image.path)
        for step in steps:
            if not step.done:
                self._tell(logging.WARNING, f"{step.subject}: {step.told}")
        return steps

    def _tell(self, level: int, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.runtime.say(level, text)

    def _look_below(self, disk: OpenDisk, flush: Flush) -> None:
        """See which devices *disk*, just opened, is read of.

        If through their pages, these are dropped, also at the first open: of a LUN that others hold
        open, Linux may have kept what was there before the snapshot.
        """
        if disk.transport != "san":
            self.luns = None
            return
        luns = self.luns = self.luns or Luns(self.config.san_devices)
        luns.look()
        if luns.devices:
            names = ", ".join(device.name for device in luns.devices)
            how = "past" if luns.direct else "through"
            self._tell(logging.INFO, f"{self.image.path}: VDDK reads {names} {how} the page cache")
        else:
            self._tell(
                logging.WARNING,
                f"{self.image.path}: no block device is found that VDDK reads over san, so that "
                "its pages on this machine cannot be dropped; name it with san_devices=",
            )
        if luns.buffered:
            self.flush(flush)

    @property
    def buffered(self) -> bool:
        """Whether VDDK reads through pages that a read past all caches has to have dropped."""
        return self.luns is not None and self.luns.buffered

    def _pass_pages(self) -> None:
        """Have the read that comes next see the devices themselves. Raises EngineError.

        A library that reads past their pages does anyway: the usual case costs nothing. Otherwise
        reads that are under way come to their end first, because a page that is being filled would
        survive the flush, with what the device had before this read was asked for.
        """
        if not self.buffered:
            return
        self.drain()
        left = [step for step in self.flush(self._new_flush()) if not step.done]
        if left:
            raise self._kept(left[0])

    def _kept(self, step: Step) -> EngineError:
        """Return what to fail with where pages are left that VDDK may answer from."""
        return EngineError(
            f"{self.image.path}: VDDK reads through the pages of {step.subject}, which may be old "
            "and cannot be dropped",
            cause=step.told,
            advice="name its block devices with san_devices=, or mount with drop_caches=yes",
        )

    # Reads.

    def start(self, sector: int, into: memoryview, direct: bool, done: Done) -> None:
        """Begin a read; see ``AsyncEngine``."""
        try:
            self.open()
            if direct:
                self._pass_pages()
        except (VddkfsError, OSError, ValueError) as error:
            done(error)
            return
        self.flow.start(sector, into, done)

    def read_elsewhere(self, elsewhere: Elsewhere) -> None:
        """Let *elsewhere* read the disk as well, while it is open, within the flow's window."""
        self.flow.elsewhere = elsewhere

    def take_failed(self, sector: int, into: memoryview, done: Done, code: int) -> None:
        """Take over a read that was begun elsewhere and ended with *code*."""
        piece = self.flow.adopt(sector, into, done)
        self._failed(piece, self._failure(piece, code))

    def _hear_of_elsewhere(self) -> None:
        if self.flow.elsewhere is None:
            return
        moved, size = self.flow.elsewhere.news()
        self.last_used = max(self.last_used, moved)
        self._last_moved = max(self._last_moved, moved)
        if size:
            self.flow.came_back(size)

    def drain(self) -> None:
        """Go on until no request is under way. The daemon's deadline bounds it."""
        self.flow.draining = True
        while self.flow.busy:
            self.runtime.run_deferred()
            self.flow.pump()
            if self.flow.busy:
                self.runtime.wait(min(self.flow.due(), 0.5))
        self.flow.draining = False

    def _issue(self, piece: Piece) -> None:
        if self.disk is None:
            # A flush that closes the disk may have failed to open it again since.
            raise EngineError(f"{self.image.path}: is closed", retry="reconnect")
        handle, memory = self.disk.handle, piece.memory
        span = piece.sector, len(memory) // SECTOR
        try:
            if self.runtime.asynchronous:
                begin = handle.write_async if piece.writes else handle.read_async
                begin(*span, memory, lambda code: self._ended(piece, code))
                return
            transfer = handle.write if piece.writes else handle.read
            transfer(*span, memory)
        except VixFailure as error:
            self._failed(piece, error)
        else:
            self._ended(piece, 0)

    def _ended(self, piece: Piece, code: int) -> None:
        """Take a completion, on any thread."""
        self._last_moved = time.monotonic()
        if piece.memory.obj is not self._keepalive.obj:
            self.last_used = self._last_moved
        if code == 0:
            self.flow.ended(piece, None)
            return

        # The library is asked for the text of the code later, on the main thread.
        self.runtime.defer(lambda: self._failed(piece, self._failure(piece, code)))

    def _failure(self, piece: Piece, code: int) -> VixFailure:
        call = "WriteAsync" if piece.writes else "ReadAsync"
        return self.runtime.library.failure(code, call, self.image.path)

    def _failed(self, piece: Piece, error: VixFailure) -> None:
        """Have a piece that the host had no memory for asked for again; tell any other failure.

        Whatever else has failed may still be written to its buffer, or come from there: only
        another process can use that again, or the daemon once this one is gone.
        """
        error.sector = piece.sector
        if error.retry_class is RetryClass.SMALLER and piece.tries < MAX_TRIES:
            self.runtime.say(logging.INFO, f"asking again: {error}")
            self.flow.refused(piece)
        else:
            self.flow.ended(piece, error)

    def map(self, sector: int, count: int, limit: int) -> MapSlice:
        """Return a part of the map from *sector*; see ``Engine``."""
        return self._allocation.map(self.open(), sector, count, limit)

    # Time.

    def tick(self) -> float:
        """Do what is due; return in how many seconds to come again."""
        self.flow.pump()
        away = self.flow.due()
        if self.disk is None:
            return away
        # While it is busy it is not idle at all; its completions wake nobody, so look again later.
        busy = self.flow.busy
        self._hear_of_elsewhere()
        now = time.monotonic()
        idle = now - self.last_used if not busy else 0.0
        still = now - self._last_moved if not busy else 0.0
        if self._may_rest(idle):
            self.close()
            return away
        if self.config.keepalive and still >= self.config.keepalive:
            still = 0.0
            self.flow.start(0, self._keepalive, lambda error: None)
        due = [self.config.idle_close - idle if self.config.idle_close else math.inf]
        due.append(self.config.keepalive - still if self.config.keepalive else math.inf)
        due.append(_LOOK if self.runtime.limits_sessions else math.inf)
        return max(0.01, min(away, *due))

    def _may_rest(self, idle: float) -> bool:
        """Say whether the disk, unused for *idle* seconds, is to be closed until it is used."""
        if self.config.idle_close and idle >= self.config.idle_close:
            self.runtime.say(logging.DEBUG, f"{self.image.path}: closed, nobody reads it")
            return True
        if idle >= _LOOK and self.runtime.session_wanted():
            self.runtime.say(logging.INFO, f"{self.image.path}: closed, another needs the session")
            return True
        return False
