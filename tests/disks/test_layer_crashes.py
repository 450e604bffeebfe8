"""Images with an overlay whose process dies between any two system calls, or whose machine does.

Each block is old or new then, and what was written before the last flush that returned is there.
"""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.disks.layered import CAPACITY, add_layer, dug, layered, open_overlay
from tests.disks.overlay.memory import Killed, MemoryDisk
from tests.disks.test_image import read, shown
from vddkfs.disks.image import Handle, Image
from vddkfs.disks.layer import Layer
from vddkfs.disks.overlay import BLOCK

LIVES = 5
STEPS = 30
MOST_CALLS = 120
"""System calls after which a process is dead, at the latest; some are not killed at all."""


def blocks(content: bytes | bytearray) -> list[bytes]:
    return [bytes(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)]


class Versions:
    """What each block may show after a crash: what it was at the last flush, and all since."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.now = bytearray(content)
        self.may = [[block] for block in blocks(content)]

    def write(self, start: int, data: bytes) -> None:
        """Note that *data* is about to be written."""
        self.now[start : start + len(data)] = data
        for number in range(start // BLOCK, -(-(start + len(data)) // BLOCK)):
            self.may[number].append(bytes(self.now[number * BLOCK :][:BLOCK]))

    def flushed(self) -> None:
        self.may = [versions[-1:] for versions in self.may]

    def wrong(self, content: bytes) -> list[int]:
        """Return the numbers of the blocks that show what they must not."""
        pairs = enumerate(zip(blocks(content), self.may, strict=True))
        return [number for number, (block, may) in pairs if block not in may]


async def step(image: Image, handle: Handle, versions: Versions, draw: random.Random) -> None:
    kind = draw.random()
    if kind < 0.2:
        await image.flush(handle)
        versions.flushed()
        return
    if kind < 0.3:
        assert await read(image, handle, 0, CAPACITY) == versions.now
        return
    start = draw.randrange(CAPACITY)
    if draw.random() < 0.5:
        start -= start % draw.choice([512, BLOCK])
    size = min(CAPACITY - start, draw.choice([1, 512, BLOCK, BLOCK, 3 * BLOCK, 9 * BLOCK + 7]))
    data = draw.randbytes(size) if draw.random() < 0.8 else bytes(size)
    versions.write(start, data)
    await image.write(handle, start, data)


async def live(disk: MemoryDisk, versions: Versions, draw: random.Random) -> None:
    """Mount, write what *draw* says, and die or be at the end of it."""
    async with shown(dug(), frozen=True) as image:
        try:
            overlay = open_overlay(disk)
            add_layer(image, overlay)
            handle = await image.open(direct=False, write=True)
            for _ in range(STEPS):
                await step(image, handle, versions, draw)
            if draw.random() < 0.5:
                overlay.close()
                versions.flushed()
        except Killed:
            pass


async def shown_now(disk: MemoryDisk) -> bytes:
    async with layered(dug(), open_overlay(disk)) as image:
        return await read(image, await image.open(direct=False), 0, CAPACITY)


async def lives(seed: int, power: bool) -> list[int]:
    """Live several times, each time with what the last one left; return the blocks that were wrong.

    *power*: it is the machine that dies, and what was not flushed may be lost sector by sector.
    """
    draw = random.Random(seed)
    disk = MemoryDisk()
    versions = Versions(dug().content)
    wrong: list[int] = []
    for _ in range(LIVES):
        disk.left = draw.choice([-1, *[draw.randrange(MOST_CALLS) for _ in range(4)]])
        disk.part = draw.random()
        await live(disk, versions, draw)
        disk = disk.after_power_loss(draw) if power else disk.after_kill()
        # What is shown once after a crash is what there is from now on.
        content = await shown_now(disk)
        wrong += versions.wrong(content)
        versions = Versions(content)
        disk = disk.after_kill()
    return wrong


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
@example(seed=0)
async def test_killed_between_any_two_calls(seed: int) -> None:
    assert await lives(seed, power=False) == []


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
@example(seed=0)
async def test_power_lost_between_any_two_calls(seed: int) -> None:
    assert await lives(seed, power=True) == []


async def test_a_flush_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: what a flush promised is lost, if the layer does not flush."""

    async def nothing(_layer: Layer) -> None:
        return

    monkeypatch.setattr(Layer, "flush", nothing)
    assert [wrong for seed in range(8) for wrong in await lives(seed, power=False)]
