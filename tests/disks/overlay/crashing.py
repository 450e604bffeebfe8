"""A fork on a disk that fails, and what its blocks may show."""

import random

from tests.disks.overlay.memory import Killed, MemoryDisk
from vddkfs.disks.overlay import BLOCK, Fork, Limits, Overlay, SourceDisk
from vddkfs.engines.base import LinkIdentity

LIMITS = Limits(
    reserve=0,
    grow=16,
    spare=8,
    piece=4,
    segment_bytes=24 * BLOCK,
    log_room=BLOCK,
    pending=12,
    retired=10,
)
CAPACITY = 40 * BLOCK + 100
SOURCE = (SourceDisk("disk", CAPACITY, (LinkIdentity("/vm/disk.vmdk", "12345678", 321),)),)
BELOW = random.Random(0).randbytes(CAPACITY)


def read_below(offset: int, size: int) -> bytes:
    return BELOW[offset : offset + size]


def open_overlay(disk: MemoryDisk) -> Overlay:
    return Overlay.open("/overlay", SOURCE, files=disk, limits=LIMITS)


def content(fork: Fork) -> bytes:
    """Return the whole image, as its reader sees it."""
    found = bytearray(b"\x5a" * fork.capacity)
    for gap in fork.read_into(0, memoryview(found)):
        found[gap.offset : gap.offset + gap.size] = read_below(gap.offset, gap.size)
    return bytes(found)


def blocks(image: bytes) -> list[bytes]:
    return [image[at : at + BLOCK] for at in range(0, len(image), BLOCK)]


class Expected:
    """What each block may show: its versions since the last flush, the newest last."""

    def __init__(self) -> None:
        self.now = bytearray(BELOW)
        self.versions = [[block] for block in blocks(BELOW)]

    def writes(self, offset: int, data: bytes) -> None:
        """Note that *data* is about to be written."""
        self.now[offset : offset + len(data)] = data
        for number in range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)):
            self.versions[number].append(bytes(self.now[number * BLOCK :][:BLOCK]))

    def flushed(self) -> None:
        self.versions = [versions[-1:] for versions in self.versions]

    def wrong(self, image: bytes) -> list[int]:
        """Return the blocks of *image* that show what they must not."""
        pairs = enumerate(zip(blocks(image), self.versions, strict=True))
        return [number for number, (block, versions) in pairs if block not in versions]

    def take(self, image: bytes) -> None:
        """Go on with what a crash left."""
        self.now = bytearray(image)
        self.versions = [[block] for block in blocks(image)]


class Host:
    """A process with the overlay open, and what it must show. *overlay* is None once it died."""

    def __init__(self, disk: MemoryDisk) -> None:
        self.disk = disk
        self.expected = Expected()
        self.open()

    def open(self) -> None:
        self.overlay = open_overlay(self.disk)
        self.fork = self.overlay.fork("disk/0", CAPACITY)

    def write(self, offset: int, data: bytes) -> None:
        self.expected.writes(offset, data)
        self.fork.write(offset, data, read_below)

    def zero(self, offset: int, size: int) -> None:
        self.expected.writes(offset, bytes(size))
        self.fork.zero(offset, size, read_below)

    def flush(self) -> None:
        self.fork.flush()
        self.expected.flushed()

    def close(self) -> None:
        self.overlay.close()
        self.expected.flushed()

    def random_step(self, draw: random.Random) -> None:
        """Do anything."""
        size = min(CAPACITY, draw.choice([1, 100, BLOCK, BLOCK, 3 * BLOCK, 9 * BLOCK + 7]))
        offset = draw.randrange(CAPACITY - size + 1)
        if draw.random() < 0.6:
            offset -= offset % BLOCK
        kind = draw.random()
        if kind < 0.15:
            self.flush()
        elif kind < 0.3:
            self.zero(offset, size)
        elif kind < 0.35:
            assert content(self.fork) == self.expected.now
        elif kind < 0.38:
            self.close()
            self.open()
        else:
            data = bytearray(draw.randbytes(size))
            if draw.random() < 0.2:
                data[size // 3 :] = bytes(size - size // 3)
            self.write(offset, bytes(data))


def lived(disk: MemoryDisk, seed: int, steps: int) -> Host | None:
    """Let a process write as *seed* says until it is through or killed; None if it never began."""
    draw = random.Random(seed)
    host = None
    try:
        host = Host(disk)
        for _ in range(steps):
            host.random_step(draw)
    except Killed:
        pass
    return host
