"""Images through the real cache, against a byte array: what is served is what was there."""

import errno
import mmap
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from vddkfs.cache.arena import FRAME, Arena
from vddkfs.cache.coherence import policy
from vddkfs.cache.frames import SectorCache
from vddkfs.disks.image import Handle, Image
from vddkfs.engines.base import SECTOR, ExtentInfo, LinkIdentity, LinkInfo, MapExtent, MapSlice
from vddkfs.engines.protocol import MapQuery
from vddkfs.engines.requests import ReadRequest
from vddkfs.errors import EngineError, StaleImage, VddkfsError

MIB = 1024 * 1024


def make_link(
    capacity: int, name: str = "a", allocated: int = 0, cid: str = "00000001"
) -> LinkInfo:
    """Describe a link of *capacity* sectors that occupies *allocated* bytes."""
    path = f"/vm/{name}.vmdk"
    extent = ExtentInfo("SPARSE", capacity, path=path, allocated_bytes=allocated)
    identity = LinkIdentity(path, cid, capacity)
    return LinkInfo(path, "monolithicSparse", capacity, cid, "", "", (extent,), 5, identity)


class FakeWorker:
    """Stands for the worker of one disk. Reads are done at once, or by ``step`` if *held*."""

    def __init__(self, content: bytes, held: bool = False) -> None:
        self.content = bytearray(content)
        self.data = [True] * (len(content) // SECTOR)
        self.held = held
        self.waiting: list[ReadRequest] = []
        self.performed: list[ReadRequest] = []
        self.reads: list[tuple[int, int, bool]] = []
        self.error: VddkfsError | None = None
        self.areas: dict[int, mmap.mmap] = {}
        self.maps = 0
        self.map_errors = 0
        self.map_seconds = 0.0
        self.map_step = 10**9

    def submit_read(self, request: ReadRequest) -> None:
        self.reads.append((request.sector, request.count, request.direct))
        self.waiting.append(request)
        while not self.held and (self.waiting or self.performed):
            self.step(random.Random(0))

    def poll(self) -> None:
        """Answers come when the test says so."""

    def lend(self, number: int, fd: int, size: int) -> None:
        self.areas[number] = mmap.mmap(fd, size)

    async def take_back(self, number: int) -> bool:
        self.areas.pop(number).close()
        return True

    def step(self, chooser: random.Random) -> None:
        """Read for a request, or answer one that was read, in any order."""
        index = chooser.randrange(len(self.waiting) + len(self.performed))
        if index >= len(self.waiting):
            self.performed.pop(index - len(self.waiting)).done(self.error)
            return
        request = self.waiting.pop(index)
        start, place = request.sector * SECTOR, request.target.offset
        found = self.content[start : start + request.count * SECTOR]
        self.areas[request.target.chunk_number][place : place + len(found)] = found
        self.performed.append(request)

    def dig(self, start: int, count: int) -> None:
        """Make a hole, in the content too."""
        self.content[start * SECTOR : (start + count) * SECTOR] = bytes(count * SECTOR)
        self.data[start : start + count] = [False] * count

    async def map(self, image: int, sector: int, query: MapQuery) -> MapSlice:
        self.maps += 1
        await trio.sleep(self.map_seconds)
        if self.map_errors:
            self.map_errors -= 1
            raise EngineError("no map today")
        end = min(sector + query.count, sector + self.map_step)
        extents: list[MapExtent] = []
        while sector < end and len(extents) < query.limit:
            stop = sector + 1
            while stop < end and self.data[stop] == self.data[sector]:
                stop += 1
            extents.append(MapExtent(sector, stop - sector, self.data[sector]))
            sector = stop
        return MapSlice(tuple(extents), sector)


async def unchanged() -> None:
    """Find the source as it was."""


@asynccontextmanager
async def shown(
    worker: FakeWorker,
    frozen: bool,
    revalidate: Callable[[], Awaitable[None]] = unchanged,
    links: Sequence[LinkInfo] = (),
    mode: str = "auto",
) -> AsyncIterator[Image]:
    """An image of what *worker* holds, over a cache of 4 MiB."""
    arena = Arena(4 * MIB)
    async with trio.open_nursery() as nursery:
        disk = SectorCache(arena, nursery).disk("disk", worker)
        # Memory is made in a thread: tests that look at what is under way begin after that.
        disk.release(await disk.slot(FRAME))
        yield Image(
            "d/chain/0.raw",
            links or [make_link(len(worker.content) // SECTOR)],
            index=0,
            policy=policy(frozen, mode),
            client=worker,  # type: ignore[arg-type]
            cache=disk,
            revalidate=revalidate,
            nursery=nursery,
            read_ahead=2 * MIB,
        )
        nursery.cancel_scope.cancel()
    arena.close()
    for area in worker.areas.values():
        area.close()


def noise(sectors: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(sectors * SECTOR)


async def read(image: Image, handle: Handle, start: int, size: int) -> bytes:
    return bytes(await image.read(handle, start, size))


# The model: one byte array, and for each sector what it held since the last open.

OFFSETS = st.integers(0, 7000 * SECTOR) | st.integers(0, 64).map(lambda n: n * 64 * 1024)
SIZES = st.sampled_from([1, 511, 512, 4096, 65536, 65537, MIB, MIB + 1, 3 * MIB])
STEPS = st.one_of(
    st.tuples(st.just("open"), st.booleans()),
    st.tuples(st.just("read"), st.integers(0, 5), OFFSETS, SIZES),
    st.tuples(st.just("modify"), st.integers(0, 6999), st.integers(1, 300)),
    st.tuples(st.just("replace"), st.integers(2, 9)),
    st.tuples(st.just("wait")),
)


class Model:
    """Does steps to an image, and knows what each may return."""

    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker
        self.image: Image | None = None
        self.older: dict[int, list[bytes]] = {}
        self.handles: list[tuple[Handle, int]] = []
        self.replacement: bytes | None = None
        self.generation = 0

    async def revalidate(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.replacement is not None:
            assert self.image is not None
            self.worker.content[:] = self.replacement
            self.worker.data = [True] * len(self.worker.data)
            self.replacement = None
            self.generation += 1
            self.image.supersede()

    async def do(self, image: Image, step: tuple[Any, ...]) -> None:
        match step:
            case "open", direct:
                handle = await image.open(direct)
                self.older.clear()
                self.handles = [*self.handles, (handle, self.generation)][-6:]
            case "read", number, start, size if self.handles:
                await self.read(image, *self.handles[number % len(self.handles)], start, size)
            case "modify", sector, count if not image.policy.lasts:
                self.modify(sector, count)
            case "replace", seed:
                self.replacement = noise(7000, seed)
            case ("wait",):
                await trio.testing.wait_all_tasks_blocked()

    def modify(self, sector: int, count: int) -> None:
        content = self.worker.content
        for number in range(sector, min(sector + count, 7000)):
            place = slice(number * SECTOR, (number + 1) * SECTOR)
            self.older.setdefault(number, []).append(bytes(content[place]))
            content[place] = random.Random(len(self.older)).randbytes(SECTOR)

    async def read(
        self, image: Image, handle: Handle, generation: int, start: int, size: int
    ) -> None:
        content = self.worker.content
        end = min(start + size, len(content))
        if generation != self.generation and start < end:
            with pytest.raises(StaleImage):
                await image.read(handle, start, size)
            return
        got = await read(image, handle, start, size)
        assert len(got) == max(0, end - start)
        for sector in range(start // SECTOR, -(-end // SECTOR)):
            first, last = max(start, sector * SECTOR), min(end, (sector + 1) * SECTOR)
            may = [bytes(content[first:last])]
            if not handle.direct:
                skip = first - sector * SECTOR
                may += [o[skip : skip + last - first] for o in self.older.get(sector, ())]
            assert got[first - start : last - start] in may, f"sector {sector}"


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEPS, max_size=40), frozen=st.booleans(), holes=st.booleans())
async def test_every_read_is_what_was_there_since_the_last_open(
    steps: list[tuple[Any, ...]], frozen: bool, holes: bool
) -> None:
    worker = FakeWorker(noise(7000))
    for place in range(100, 7000, 1000) if holes else ():
        worker.dig(place, 700)
    model = Model(worker)
    async with shown(worker, frozen, model.revalidate) as image:
        model.image = image
        await model.do(image, ("open", False))
        for step in steps:
            await model.do(image, step)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
async def test_readers_at_once_never_see_what_is_older_than_their_open(seed: int) -> None:
    """Sector n holds (n, version). Versions only grow, while readers open and read."""
    chooser = random.Random(seed)
    worker = FakeWorker(b"", held=True)

    def put(version: int) -> None:
        content = b"".join(struct.pack("<QQ", n, version) * 32 for n in range(6000))
        worker.content[:] = content
        worker.data = [True] * 6000

    async def reader(image: Image, own: random.Random) -> None:
        for _ in range(3):
            oldest = worker.content[8]
            handle = await image.open(own.random() < 0.3)
            for _ in range(5):
                start, size = own.randrange(6000 * SECTOR), own.choice([512, 4096, MIB, 2 * MIB])
                got = await read(image, handle, start, size)
                assert len(got) == min(size, 6000 * SECTOR - start)
                for place in range(-start % SECTOR, len(got) - 16, SECTOR):
                    sector, version = struct.unpack_from("<QQ", got, place)
                    assert sector == (start + place) // SECTOR
                    assert oldest <= version <= worker.content[8]

    put(0)
    async with shown(worker, frozen=False) as image, trio.open_nursery() as nursery:
        for _ in range(chooser.randrange(1, 12)):
            nursery.start_soon(reader, image, random.Random(chooser.random()))
        version = idle = 0
        while nursery.child_tasks:
            await trio.lowlevel.checkpoint()
            if worker.waiting or worker.performed:
                idle = 0
                worker.step(chooser)
                if chooser.random() < 0.03 and version < 250:
                    version += 1
                    put(version)
            else:
                # A chunk may be in the making in a thread; anything longer is a lost wake-up.
                idle += 1
                await trio.sleep(0.0005)
                assert idle < 10_000, "readers wait for ever"


async def test_a_changed_frozen_image_is_stale_for_old_handles_and_new_for_new_ones() -> None:
    worker = FakeWorker(noise(64), held=True)
    async with shown(worker, frozen=True) as image, trio.open_nursery() as nursery:
        told: list[int] = []
        image.superseded = lambda: told.append(image.generation)
        old = await image.open(direct=False)

        async def reads(direct: bool) -> None:
            handle = await image.open(direct)
            with pytest.raises(StaleImage) as caught:
                await image.read(handle, 0, 512)
            assert caught.value.errno == errno.ESTALE

        nursery.start_soon(reads, False)
        nursery.start_soon(reads, True)
        await trio.testing.wait_all_tasks_blocked()
        image.supersede()
        worker.held = False
        while worker.waiting or worker.performed:
            worker.step(random.Random(0))
        assert told == [1]
        with pytest.raises(StaleImage):
            await image.read(old, 0, 512)
        worker.content[:] = noise(64, 2)
        new = await image.open(direct=False)
        assert await read(image, new, 0, 64 * SECTOR) == noise(64, 2), "the late answer is not kept"


@pytest.mark.parametrize("frozen", [True, False])
async def test_known_holes_are_zeros_without_a_read_on_a_frozen_image_only(frozen: bool) -> None:
    worker = FakeWorker(noise(8000))
    worker.data[64:7900] = [False] * 7836  # a lie, to see who believes it
    async with shown(worker, frozen) as image:
        handle = await image.open(direct=False)
        await image.map_when_known()
        for start, size in ((64, 8), (200, 4096), (100, 5000)):
            got = await read(image, handle, start * SECTOR, size * SECTOR)
            whole = size * SECTOR <= 2 * MIB
            assert (got == bytes(size * SECTOR)) == (frozen and whole)
        assert (
            await read(image, handle, 63 * SECTOR, 2 * SECTOR) == noise(8000)[63 * 512 : 65 * 512]
        )
        direct = await image.open(direct=True)
        assert await read(image, direct, 64 * SECTOR, 512) == noise(8000)[64 * 512 : 65 * 512]


async def test_open_looks_at_the_source_each_time_and_tells_what_it_met() -> None:
    looks: list[VddkfsError | None] = [None, StaleImage("gone"), None]

    async def revalidate() -> None:
        await trio.lowlevel.checkpoint()
        error = looks.pop(0)
        if error is not None:
            raise error

    async with shown(FakeWorker(noise(8)), True, revalidate) as image:
        await image.open(direct=False)
        assert len(looks) == 2
        with pytest.raises(StaleImage, match="gone"):
            await image.open(direct=False)
        assert (await image.open(direct=True)).keep_cache


async def test_the_kernel_keeps_what_it_has_of_a_frozen_image_only() -> None:
    """One that changed is another inode (see the tree), of which the kernel has nothing old."""
    async with shown(FakeWorker(noise(8)), frozen=True) as image:
        assert [(await image.open(False)).keep_cache for _ in range(2)] == [True, True]
    async with shown(FakeWorker(noise(8)), frozen=False) as image:
        assert [(await image.open(False)).keep_cache for _ in range(2)] == [False, False]


async def test_a_failed_read_is_told_and_the_next_one_tries_again() -> None:
    worker = FakeWorker(noise(300))
    async with shown(worker, frozen=True) as image:
        for direct in (False, True):
            handle = await image.open(direct)
            worker.error = EngineError("bad sector", sector=3)
            with pytest.raises(EngineError, match="bad sector"):
                await image.read(handle, 5, 100_000)
            worker.error = None
            assert await read(image, handle, 5, 100_000) == noise(300)[5:100_005]


@pytest.mark.parametrize("allocated", [0, 10_000, 100 * 512, 2**40])
async def test_blocks_are_fewer_than_the_size_until_the_map_is_known(allocated: int) -> None:
    worker = FakeWorker(noise(100))
    worker.dig(10, 10)
    async with shown(worker, frozen=True, links=[make_link(100, allocated=allocated)]) as image:
        # Never nothing: tar takes a file without blocks for one without data.
        assert image.allocated_bytes() == min(allocated or 2**50, 100 * 512 - 4096)
        await image.map_when_known()
        assert image.allocated_bytes() == 90 * 512
    async with shown(FakeWorker(noise(2)), frozen=True, links=[make_link(2, allocated=9)]) as image:
        assert image.allocated_bytes() == 512
