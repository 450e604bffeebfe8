"""A worker that hot-added disks gets the time that their end takes, and is not killed in it."""

import trio

from tests.engines.vddk.test_known_recovery import FILES, attached, hot, reader
from tests.simulator.kit import Kit
from vddkfs.engines.requests import Patience


async def test_a_slow_close_of_a_hot_added_disk_is_waited_for(kit: Kit) -> None:
    kit.configure(FILES, "fault = Close transport=hotadd delay_ms=4000")
    with reader(hot(kit), Patience()) as guarded:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guarded.client.run)
            with trio.fail_after(30):
                await guarded.read(0, 8)
            assert attached(kit) == 1
            guarded.client.stop()
            nursery.cancel_scope.cancel()
    assert attached(kit) == 0
