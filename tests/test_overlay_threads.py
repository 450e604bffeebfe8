"""The overlay of a mount: its disks do not wait for one another."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from tests.disks.layered import Stop, dug, open_overlay, write
from tests.disks.test_image import shown
from vddkfs import overlays
from vddkfs.engines.requests import ReadRequest


async def test_a_disk_whose_source_hangs_stops_no_other(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, well = dug(1), dug(2)
    async with shown(hung, True) as first, shown(well, True) as second:
        disks: Any = []
        for name, image in (("a", first), ("b", second)):
            image.name = f"{name}/chain/0.raw"
            disks.append(SimpleNamespace(images=[image]))
        overlays._attach(open_overlay(), disks)
        handle = await first.open(direct=False, write=True)
        hung.held = True
        asked = trio.Event()
        submit = hung.submit_read

        def submit_read(request: ReadRequest) -> None:
            submit(request)
            if len(hung.waiting) == 16:
                asked.set()

        monkeypatch.setattr(hung, "submit_read", submit_read)
        stops = [Stop() for _ in range(20)]
        for number, stop in enumerate(stops):
            nursery.start_soon(write, first, handle, number * 8192 + 5, b"part", stop)
        await asked.wait()
        other = await second.open(direct=False, write=True)
        with trio.fail_after(5):
            await second.write(other, 7, b"a part")
            await second.flush(other)
        hung.let_go()
        for stop in stops:
            await stop.done.wait()
            assert stop.error is None
