"""A disk: the maps and partitions of its images, and what it does when its source changes (with
the real supervisor and worker loop, in a thread, on a scripted engine).
"""

import contextlib
import errno
import logging
import struct
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import product
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.disks.test_image import FakeWorker, make_link, noise, read, shown
from vddkfs.cache.arena import Arena
from vddkfs.cache.frames import SectorCache
from vddkfs.disks.allocation import SEEK_SECONDS
from vddkfs.disks.disk import Disk
from vddkfs.engines import protocol
from vddkfs.engines.base import SECTOR, FileStamp, LinkIdentity, MapExtent, MapSlice
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.pool import PooledEngine
from vddkfs.engines.requests import Patience
from vddkfs.engines.worker import Worker
from vddkfs.errors import SourceMissing, StaleImage, VddkfsError
from vddkfs.source import plan_local

MIB = 1024 * 1024
SPANS = st.lists(st.tuples(st.integers(0, 199), st.integers(1, 60)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(spans=SPANS, known=st.booleans(), step=st.sampled_from([1, 7, 1000]))
async def test_seeking_agrees_with_a_naive_map_also_before_the_map_is_known(
    spans: list[tuple[int, int]], known: bool, step: int
) -> None:
    worker = FakeWorker(noise(200))
    worker.map_step = step
    for start, count in spans:
        worker.dig(start, min(count, 200 - start))
    async with shown(worker, frozen=True) as image:
        if known:
            await image.map_when_known()
        for offset in (0, 1, 511, 512, 50 * 512, 99 * 512 + 7, 200 * 512 - 1):
            later = range(offset // SECTOR, 200)
            data = next((max(offset, s * SECTOR) for s in later if worker.data[s]), None)
            hole = next((max(offset, s * SECTOR) for s in later if not worker.data[s]), 200 * 512)
            assert await image.seek_hole(offset) == hole
            if data is not None:
                assert await image.seek_data(offset) == data
                continue
            with pytest.raises(VddkfsError) as caught:
                await image.seek_data(offset)
            assert caught.value.errno == errno.ENXIO


async def test_seeking_outside_the_file_is_enxio() -> None:
    async with shown(FakeWorker(noise(8)), frozen=True) as image:
        for seek, offset in product((image.seek_data, image.seek_hole), (-1, 4096, 4097, 2**62)):
            with pytest.raises(VddkfsError) as caught:
                await seek(offset)
            assert caught.value.errno == errno.ENXIO


async def test_seeking_in_a_slow_source_ends_in_time_and_takes_it_for_data(
    autojump_clock: Any,
) -> None:
    worker = FakeWorker(noise(8))
    worker.map_seconds, worker.map_step = SEEK_SECONDS * 0.4, 1
    async with shown(worker, frozen=True) as image:
        start = trio.current_time()
        assert await image.seek_hole(700) == 8 * 512
        worker.dig(0, 8)
        assert await image.seek_data(700) == 700
        assert trio.current_time() - start == pytest.approx(2 * SEEK_SECONDS)


async def test_a_seek_in_a_map_that_cannot_be_had_finds_data() -> None:
    """As if nothing was known: a copy goes on, and its reads tell whether the disk is there."""
    worker = FakeWorker(noise(8))
    worker.dig(0, 8)
    worker.map_errors = 2
    async with shown(worker, frozen=True) as image:
        assert await image.seek_data(700) == 700
        assert await image.seek_hole(700) == 8 * 512


@pytest.mark.parametrize("failures", [1, 2, 3])
async def test_a_map_that_fails_three_times_is_all_data(
    failures: int, caplog: pytest.LogCaptureFixture
) -> None:
    worker = FakeWorker(noise(100))
    worker.dig(0, 50)
    worker.map_errors = failures
    async with shown(worker, frozen=True) as image:
        found = await image.map_when_known()
        assert worker.maps == failures + (failures < 3)
        assert found.complete
        assert image.is_hole(0, 50 * 512) is (failures < 3)
        assert image.allocated_bytes() == (50 if failures < 3 else 100) * 512
    assert ("d/chain/0.raw: no allocation map" in caplog.text) is (failures == 3)


async def test_a_map_without_progress_is_all_data(caplog: pytest.LogCaptureFixture) -> None:
    worker = FakeWorker(noise(100))
    worker.map_step = 0
    async with shown(worker, frozen=True) as image:
        assert (await image.map_when_known()).allocated == 100
    assert "no allocation map" in caplog.text


async def test_the_map_is_fetched_once_however_many_want_it(autojump_clock: Any) -> None:
    worker = FakeWorker(noise(100))
    worker.map_seconds = 1
    async with shown(worker, frozen=True) as image, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(image.map_when_known)
            image.want_map()
    assert worker.maps == 1


async def test_a_map_that_the_source_has_outrun_is_fetched_again(autojump_clock: Any) -> None:
    worker = FakeWorker(noise(100))
    worker.dig(0, 50)
    worker.map_seconds, worker.map_step = 1, 60
    async with shown(worker, frozen=True) as image:
        image.want_map()
        await trio.sleep(1.5)
        worker.content[:] = noise(100, 2)
        worker.data = [True] * 100
        image.supersede()
        await image.map_when_known()
        assert not image.is_hole(0, 512), "the first half came from the old disk"
        handle = await image.open(direct=False)
        assert await read(image, handle, 0, 512) == noise(100, 2)[:512]


def put_partition(content: bytearray, start: int, count: int) -> None:
    entry = struct.pack("<B3xB3xII", 0, 0x83, start, count)
    content[:512] = bytes(446) + entry + bytes(48) + b"\x55\xaa"


async def test_partitions_are_parsed_once_for_what_the_image_is() -> None:
    worker = FakeWorker(noise(4096))
    put_partition(worker.content, 64, 1000)
    async with shown(worker, frozen=False) as image:
        table = await image.partitions()
        assert table is not None
        assert [(p.number, p.start, p.size) for p in table.partitions] == [
            (1, 64 * 512, 1000 * 512)
        ]
        put_partition(worker.content, 128, 500)
        assert await image.partitions() is table
        await image.open(direct=False)
        fresh = await image.partitions()
        assert fresh is not None
        assert [p.start for p in fresh.partitions] == [128 * 512]
        image.supersede()
        worker.content[:512] = bytes(512)
        assert await image.partitions() is None
        assert await image.partitions() is None
    async with shown(FakeWorker(noise(1)), frozen=False) as image:
        assert await image.partitions() is None


# The disk, its worker, and a source that changes.


def identity(number: int, capacity: int, cid: str = "1", inode: int = 1, mtime: int = 5) -> Any:
    path = f"/vm/{number}.vmdk"
    return LinkIdentity(path, cid, capacity, (FileStamp(path, 1, inode, 100, mtime, mtime),))


class Vm:
    """The files of a chain of three links, and an engine on them that notes what it is asked."""

    def __init__(self) -> None:
        self.now = [identity(n, 2048) for n in range(3)]
        self.refusal: VddkfsError | None = None
        self.calls: list[str] = []
        self.fill = 1
        self.workers: list[ThreadWorker] = []

    def links(self) -> list[Any]:
        return [
            msgspec.structs.replace(make_link(found.capacity, str(number)), identity=found)
            for number, found in enumerate(self.now)
        ]

    def start(self, name: str) -> "ThreadWorker":
        self.workers.append(ThreadWorker(self))
        return self.workers[-1]


class ScriptedEngine:
    """Sectors are full of the number that the VM had when the engine was opened."""

    threads = 2

    def __init__(self, vm: Vm) -> None:
        vm.calls.append("open")
        if vm.refusal is not None:
            raise vm.refusal
        self.vm = vm
        self.opened = tuple(vm.now)
        self.fill = vm.fill

    def identities(self) -> Sequence[LinkIdentity]:
        return self.opened

    def read_nowait(self, image: int, sector: int, count: int, into: Any, direct: bool) -> bool:
        if image:
            return False
        self.read(image, sector, count, into, direct)
        return True

    def read(self, image: int, sector: int, count: int, into: Any, direct: bool) -> None:
        into[:] = bytes([self.fill]) * len(into)

    def map(self, image: int, sector: int, count: int, limit: int, seconds: float) -> MapSlice:
        return MapSlice((MapExtent(sector, count, True),), sector + count)

    def revalidate(self) -> Sequence[LinkIdentity]:
        self.vm.calls.append("revalidate")
        return tuple(self.vm.now)

    def close(self) -> None:
        self.vm.calls.append("close")


class ThreadWorker:
    """A worker process that is a thread."""

    pid = 0

    def __init__(self, vm: Vm) -> None:
        self.sock, self._theirs = protocol.pair()
        self._worker = Worker(self._theirs, lambda config, fd: PooledEngine(ScriptedEngine(vm)))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(ConnectionError):  # a process would be gone by then
            self._worker.run()

    async def forward_output(self) -> None:
        await trio.sleep_forever()

    def crash(self) -> None:
        self._theirs.shutdown(2)

    async def end(self, kill: bool) -> bool:
        self.sock.close()
        await trio.to_thread.run_sync(self._thread.join)
        self._theirs.close()
        return True

    def ending(self) -> str:
        return ""

    async def reap(self, seconds: float) -> bool:
        return True


@asynccontextmanager
async def mounted(vm: Vm) -> AsyncIterator[Disk]:
    arena = Arena(8 * MIB)
    disks: list[Disk] = []

    def opened(identities: Sequence[LinkIdentity]) -> None:
        for each in disks:
            each.opened(0, identities)

    chain, worker = plan_local(0, "web", tuple(vm.links()), False)
    client = WorkerClient("web", worker.config, Patience(), opened, vm.start)
    async with trio.open_nursery() as nursery:
        cache = SectorCache(arena, nursery)
        disk = Disk(chain, [client], nursery=nursery, cache=cache, read_ahead=MIB)
        disks.append(disk)
        nursery.start_soon(client.run)
        yield disk
        client.stop()
        nursery.cancel_scope.cancel()
    arena.close()


async def is_stale(disk: Disk, handles: Sequence[Any]) -> list[bool]:
    """Say which handles, one an image, are stale."""
    stale = []
    for image, handle in zip(disk.images, handles, strict=True):
        try:
            await image.read(handle, 0, 512)
            stale.append(False)
        except StaleImage:
            stale.append(True)
    return stale


async def test_a_written_live_link_is_the_same_disk_with_a_newer_time() -> None:
    vm = Vm()
    async with mounted(vm) as disk:
        handles = [await image.open(False) for image in disk.images]
        vm.now[2] = identity(2, 2048, cid="2", mtime=77)
        await disk.top.open(False)
        assert disk.top.mtime_ns == 77
        assert await is_stale(disk, handles) == [False, False, False]
        assert disk.capacity == disk.top.capacity == 2048 * 512


@pytest.mark.parametrize(
    ("number", "found"),
    [
        (0, identity(0, 2048, cid="2")),
        (1, identity(1, 2048, mtime=6)),
        (2, identity(2, 2048, inode=9)),
    ],
)
async def test_a_changed_link_makes_its_image_and_those_above_stale(
    number: int,
    found: LinkIdentity,
    caplog: pytest.LogCaptureFixture,
) -> None:
    vm = Vm()
    async with mounted(vm) as disk:
        handles = [await image.open(False) for image in disk.images]
        vm.now[number], vm.fill = found, 2
        new = await disk.images[0].open(False), await disk.top.open(False)
        assert await is_stale(disk, handles) == [n >= number for n in range(3)]
        assert await read(disk.top, new[1], 0, 512) == b"\2" * 512
        assert vm.calls.count("open") == 2, "one look found it, and the chain was opened anew"
    [line] = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert f"link {number} (/vm/{number}.vmdk) changed" in line
    assert f"chain/{number}.raw and above get ESTALE" in line


async def test_opens_at_the_same_time_share_their_looks() -> None:
    vm = Vm()
    async with mounted(vm) as disk:
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(disk.top.open, False)
        assert 1 <= vm.calls.count("revalidate") <= 2


async def test_a_disk_of_another_capacity_cannot_be_opened_until_it_is_mounted_again() -> None:
    vm = Vm()
    async with mounted(vm) as disk:
        await disk.top.open(False)
        vm.now[2] = identity(2, 4096)
        for _ in range(3):
            with pytest.raises(StaleImage, match=r"capacity of /vm/2\.vmdk was 2048 sectors"):
                await disk.top.open(False)


async def test_a_source_that_comes_back_after_a_failed_reopening_is_served_again() -> None:
    vm = Vm()
    async with mounted(vm) as disk:
        await disk.top.open(False)
        vm.now[0], vm.refusal = identity(0, 2048, cid="2"), SourceMissing("gone for a moment")
        with pytest.raises(SourceMissing):
            await disk.top.open(False)
        vm.refusal, vm.fill = None, 2
        handle = await disk.top.open(False)
        assert await read(disk.top, handle, 0, 512) == b"\2" * 512


async def test_a_change_while_the_worker_was_away_is_found_by_the_next_open() -> None:
    vm = Vm()
    async with mounted(vm) as disk:
        handles = [await image.open(False) for image in disk.images]
        vm.now[1], vm.fill = identity(1, 2048, cid="2"), 2
        vm.workers[-1].crash()
        new = await disk.top.open(False)
        assert await is_stale(disk, handles) == [False, True, True]
        assert await read(disk.top, new, 0, 512) == b"\2" * 512


async def test_a_change_found_at_a_restart_fails_no_read_of_an_image_below_it() -> None:
    vm = Vm()
    async with mounted(vm) as disk:
        below = await disk.images[0].open(direct=True)
        vm.now[2] = identity(2, 2048, inode=9)
        vm.workers[-1].crash()
        assert await read(disk.images[0], below, 0, 512) == b"\1" * 512


async def test_another_capacity_found_at_a_restart_makes_open_files_stale() -> None:
    vm = Vm()
    async with mounted(vm) as disk:
        handles = [await image.open(False) for image in disk.images]
        assert await is_stale(disk, handles) == [False, False, False]
        vm.now[1] = identity(1, 4096)
        vm.workers[-1].crash()
        with pytest.raises(StaleImage):
            await disk.top.open(False)
        assert await is_stale(disk, handles) == [False, True, True]
