"""Images with an overlay over a worker that is not one, and what they must show."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.disks.overlay.memory import MemoryDisk
from tests.disks.test_image import FakeWorker, noise, shown
from vddkfs.disks.image import Handle, Image
from vddkfs.disks.layer import Layer, Threads
from vddkfs.disks.overlay import BLOCK, Limits, Overlay, SourceDisk
from vddkfs.disks.overlay.files import Files
from vddkfs.engines.base import SECTOR, LinkIdentity
from vddkfs.engines.requests import ReadRequest

SECTORS = 1003
CAPACITY = SECTORS * SECTOR
"""No whole blocks: the last one is a part."""
LIMITS = Limits(
    reserve=0,
    grow=16,
    spare=8,
    piece=4,
    segment_bytes=256 * BLOCK,
    log_room=BLOCK,
    pending=40,
    retired=20,
)
SOURCE = (SourceDisk("d", CAPACITY, (LinkIdentity("/vm/d.vmdk", "12345678", SECTORS),)),)


def open_overlay(files: Files | None = None, folder: str = "/overlay") -> Overlay:
    return Overlay.open(folder, SOURCE, files=files or MemoryDisk(), limits=LIMITS)


def add_layer(image: Image, overlay: Overlay, name: str = "d/chain/0.raw") -> Layer:
    """Let *image* be written into the fork *name*, with what is there already."""
    fork = overlay.find(name, image.capacity)
    image.layer = Layer(overlay, name, image.capacity, fork, Threads())
    return image.layer


@asynccontextmanager
async def layered(
    worker: FakeWorker, overlay: Overlay, frozen: bool = True, name: str = "d/chain/0.raw"
) -> AsyncIterator[Image]:
    """An image of what *worker* holds, with a fork over it."""
    async with shown(worker, frozen) as image:
        add_layer(image, overlay, name)
        yield image


class Source(FakeWorker):
    """A worker that may be held, and says when it was asked for something then."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.asked = trio.Event()

    def submit_read(self, request: ReadRequest) -> None:
        super().submit_read(request)
        if self.held:
            self.asked.set()

    def let_go(self) -> None:
        """Answer all that was asked, and whatever is asked later."""
        self.held = False
        while self.waiting or self.performed:
            self.step(random.Random(0))


def dug(seed: int = 1) -> Source:
    """Return a source with data and holes."""
    worker = Source(noise(SECTORS, seed))
    worker.dig(5, 60)
    worker.dig(200, 300)
    return worker


class Forked:
    """What an image with an overlay must show: computed block by block and sector by sector."""

    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker
        self.content = bytearray(worker.content)
        self.written: set[int] = set()

    def write(self, start: int, data: bytes) -> int:
        """Return how much of *data* there is room for."""
        part = data[: len(self.content) - start]
        self.content[start : start + len(part)] = part
        self.written |= set(range(start // BLOCK, -(-(start + len(part)) // BLOCK)))
        return len(part)

    @property
    def data(self) -> list[bool]:
        """For each sector, whether it is data."""
        found = list(self.worker.data)
        for block in self.written:
            inside = self.content[block * BLOCK : (block + 1) * BLOCK]
            for sector in range(block * 8, block * 8 + len(inside) // SECTOR):
                found[sector] = any(inside)
        return found

    def seek(self, offset: int, data: bool) -> int | None:
        found = self.data
        for sector in range(offset // SECTOR, len(found)):
            if found[sector] == data:
                return max(offset, sector * SECTOR)
        return None

    @property
    def changed_bytes(self) -> int:
        size = len(self.content)
        return sum(min(BLOCK, size - block * BLOCK) for block in self.written)


class Stop:
    """Ends a task that a test has started."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.error: Exception | None = None
        self.done = trio.Event()


async def write(image: Image, handle: Handle, start: int, data: bytes, stop: Stop) -> None:
    """Write, and keep how that ended."""
    try:
        with stop.scope:
            await image.write(handle, start, data)
    except Exception as error:
        stop.error = error
    finally:
        stop.done.set()
