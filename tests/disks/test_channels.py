"""A disk whose images are read by workers of their own, as VDDK does it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from tests.disks.test_disk import identity
from tests.disks.test_image import make_link
from vddkfs.cache.arena import Arena
from vddkfs.cache.frames import SectorCache
from vddkfs.disks.disk import Disk
from vddkfs.disks.vm import Chain, ImagePlan
from vddkfs.engines.base import LinkIdentity, MapSlice, Renewal, Step
from vddkfs.errors import StaleImage, WorkerFailed

MIB = 1024 * 1024


class Client:
    """Stands for a worker of one image, and notes what it is asked."""

    def __init__(self, number: int) -> None:
        self.name = f"worker {number}"
        self.config = SimpleNamespace(uses_library=True)
        self.now = identity(number, 2048)
        self.refusal: WorkerFailed | None = None
        self.calls: list[str] = []

    async def revalidate(self) -> tuple[LinkIdentity, ...]:
        self.calls.append("revalidate")
        return (self.now,)

    async def renew(self) -> Renewal:
        self.calls.append("renew")
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal
        return Renewal((self.now,), (Step("library", self.name, "opened again", 0.0),))

    async def reopen(self) -> tuple[LinkIdentity, ...]:
        self.calls.append("reopen")
        return (self.now,)

    async def map(self, *_: Any) -> MapSlice:
        await trio.sleep_forever()
        raise AssertionError


@asynccontextmanager
async def mounted(clients: list[Client], mode: str = "auto") -> AsyncIterator[Disk]:
    links = tuple(
        msgspec.structs.replace(make_link(2048, str(number)), identity=client.now)
        for number, client in enumerate(clients)
    )
    plans = tuple(ImagePlan(number, number, 0) for number in range(len(clients)))
    arena = Arena(16 * MIB, len(clients))
    async with trio.open_nursery() as nursery:
        yield Disk(
            Chain("web", links, plans),
            clients,  # type: ignore[arg-type]
            nursery=nursery,
            cache=SectorCache(arena, nursery),
            read_ahead=MIB,
            mode=mode,
        )
        nursery.cancel_scope.cancel()
    arena.close()


async def test_what_one_worker_has_found_the_others_above_it_open_anew() -> None:
    clients = [Client(0), Client(1)]
    async with mounted(clients) as disk:
        handle = await disk.top.open(False)
        assert clients[1].calls == ["revalidate"]
        clients[0].now = identity(0, 2048, cid="2")
        await disk.images[0].open(False)
        assert clients[0].calls == ["revalidate", "reopen"]
        with pytest.raises(StaleImage):
            await disk.top.read(handle, 0, 512)
        await disk.top.open(False)
        await disk.top.open(False)
        assert clients[1].calls == ["revalidate", "renew", "revalidate"]


async def test_and_go_on_trying_until_that_works() -> None:
    clients = [Client(0), Client(1)]
    async with mounted(clients) as disk:
        disk.opened(0, [identity(0, 2048, cid="2")])
        clients[1].refusal = WorkerFailed("gone")
        with pytest.raises(WorkerFailed):
            await disk.top.open(False)
        clients[1].refusal = None
        await disk.top.open(False)
        assert clients[1].calls == ["renew", "renew"]
        assert clients[0].calls == []


@pytest.mark.parametrize("mode", ["strict", "none"])
async def test_other_modes_open_anew_each_time(mode: str) -> None:
    clients = [Client(0), Client(1)]
    async with mounted(clients, mode) as disk:
        await disk.top.open(False)
        await disk.top.open(False)
        assert clients[1].calls == ["renew", "renew"]


async def test_invalidation_asks_all_workers_before_anything_is_dropped() -> None:
    clients = [Client(0), Client(1)]
    async with mounted(clients) as disk:
        epochs = [image.cache.epoch for image in disk.images]
        clients[0].refusal = WorkerFailed("gone")
        steps = await disk.invalidate(disk.images)
        assert [client.calls for client in clients] == [["renew"], ["renew"]]
        assert [image.cache.epoch for image in disk.images] == [epoch + 1 for epoch in epochs]
        assert [(step.place, step.done) for step in steps[:2]] in (
            [("library", False), ("library", True)],
            [("library", True), ("library", False)],
        )
        assert [step.place for step in steps[2:]] == ["tables", "cache"] * 2
        await disk.invalidate([disk.top], 0, 512)
        assert clients[0].calls == ["renew"], "that of another image"
