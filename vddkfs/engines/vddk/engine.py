"""The VDDK engine: images read by VMware's library, in a worker of their own.

The worker's main thread makes every call but the completions': it connects, opens and closes, and
begins the reads, deep and asynchronous, on one handle for each image (several handles on one disk
make each call slower); most reads without Python (see ``fast``). Completions come on the library's
threads, and answer the daemon from there; what they cannot settle alone (room in the window, a
refused piece) wakes the main thread.

What a new connection may cure is told to the daemon (``EngineError.retry``), which ends this worker
and starts another; nothing is reconnected here. An idle handle is kept alive by reading a sector,
and closed when it is idle for long, or when another worker of this machine waits for a session; it
is opened again when it is read (see ``reader``). One that is written stays open, and is the first
image of its worker (see ``writer``).
"""

import errno
import logging
import math
import os
import socket
from collections.abc import Sequence

import msgspec

from vddkfs.engines.base import (
    Answer,
    CallCount,
    Description,
    Done,
    EngineFacts,
    EngineReport,
    LinkIdentity,
    MapSlice,
    Receiver,
    Renewal,
)
from vddkfs.engines.config import VddkConfig
from vddkfs.engines.vddk import fast
from vddkfs.engines.vddk.devices import Flush
from vddkfs.engines.vddk.reader import ImageReader
from vddkfs.engines.vddk.runtime import DESCRIBE_SESSION_SECONDS, Runtime
from vddkfs.engines.vddk.writer import ImageWriter, make_image
from vddkfs.errors import EngineError


class VddkEngine:
    """Implements ``AsyncEngine``; *secret* is a descriptor with the credentials.

    Opens every image at once, so that the daemon hears what they are. Raises EngineError.
    """

    def __init__(self, config: VddkConfig, secret: int) -> None:
        self.runtime = Runtime(config, secret)
        self._images = [make_image(self.runtime, image) for image in config.images]
        self._fast: fast.FastReads | None = None
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
        """Begin a read. *direct* sees to it that no page of a block device answers it."""
        try:
            reader = self._images[image]
        except IndexError:
            done(ValueError(f"there is no image {image}"))
            return
        reader.start(sector, into, direct, done)

    def start_write(self, sector: int, data: memoryview, done: Done) -> None:
        """Begin a write to the first image; see ``writer``."""
        try:
            self._written().start_write(sector, data, done)
        except EngineError as error:
            done(error)

    def start_flush(self, done: Done) -> None:
        """Begin a flush of the first image: the library's other requests end first."""
        try:
            self._written().start_flush(done)
        except EngineError as error:
            done(error)

    def _written(self) -> ImageWriter:
        image = self._images[0]
        if isinstance(image, ImageWriter):
            return image
        raise EngineError(f"{image.image.path}: it was opened to be read only", errno=errno.EROFS)

    def map(self, image: int, sector: int, count: int, limit: int, seconds: float) -> MapSlice:
        """Return a part of the allocation map; one query of the library may take longer."""
        if not 0 <= image < len(self._images) or count < 1:
            raise ValueError(f"there is no image {image}")
        return self._images[image].map(sector, count, limit)

    def revalidate(self) -> Sequence[LinkIdentity]:
        """Look at every image again, and open the live ones anew."""
        self._expect_the_same()
        return tuple(image.revalidate() for image in self._images)

    def renew(self) -> Renewal:
        """Drop the pages of all devices, then open every image again: see ``Engine``.

        This engine keeps no tables. The open of one image reads nothing of another, and no read is
        under way, so that all pages can be dropped first.
        """
        self._expect_the_same()
        flush = Flush(self.runtime.config.drop_caches)
        for image in self._images:
            image.flush(flush)
        renewed = [image.renew(flush) for image in self._images]
        steps = [*flush.steps, *(step for _, step in renewed)]
        return Renewal(tuple(identity for identity, _ in renewed), tuple(steps))

    def _expect_the_same(self) -> None:
        """Raise EngineError if the daemon may not know of all images what they have become.

        It asks again for one disk; that of another image may not have heard of what was told.
        """
        for image in self._images if len(self._images) > 1 else ():
            if image.another is not None:
                raise EngineError(f"{image.image.path}: it is another disk now", retry="reconnect")

    def report(self) -> EngineReport:
        """Return the transports in use, and what each function of the library did so far."""
        open_disks = [image.disk for image in self._images if image.disk is not None]
        return EngineReport(
            transports=tuple(dict.fromkeys(disk.transport for disk in open_disks)),
            calls=tuple(
                CallCount(
                    name, one.count, one.failures, one.seconds, one.bytes, tuple(one.times.buckets)
                )
                for name, one in sorted(self.runtime.library.statistics().items())
            ),
            reads_in_c=self._fast.count if self._fast is not None else 0,
        )

    def complain(self, text: str) -> None:
        """Say *text* now; what the library has printed goes first."""
        self.runtime.say(logging.ERROR, text)
        self.runtime.output.close()

    def receiver(self, sock: socket.socket, answer: Answer) -> Receiver | None:
        """Return the loop in C, None where it is not built or not to be used."""
        self._fast = fast.receiver(self.runtime, self._images, sock, self.tick, answer)
        return self._fast

    def fileno(self) -> int:
        """Return what becomes readable when a completion leaves something to do."""
        return self.runtime.woken

    def tick(self) -> float:
        """Do what is due."""
        self.runtime.run_deferred()
        return min((image.tick() for image in self._images), default=math.inf)

    def drain(self) -> None:
        """Go on until no request is under way. The daemon's deadline bounds it."""
        for image in self._images:
            image.drain()

    def close(self) -> None:
        """Close everything, and end the use of the library."""
        for image in self._images:
            image.close()
        if self._fast is not None:
            self._fast.close()
        self.runtime.close()


def describe(config: VddkConfig, secret: int) -> Description:
    """Return what the images of *config* are, opened one after another. Raises EngineError."""
    runtime = Runtime(config, secret)
    runtime.session_seconds = DESCRIBE_SESSION_SECONDS
    found = []
    transports = []
    try:
        for image in config.images:
            reader = ImageReader(runtime, msgspec.structs.replace(image, writable=False))
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
