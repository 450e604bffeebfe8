"""A disk that was closed for idleness is opened again for a read: it has to be the same then."""

import msgspec
import pytest

from tests.engines.vddk.workers import PLAIN, Workers, configured
from tests.simulator.kit import Kit, until
from vddkfs.errors import EngineError

FROZEN = msgspec.structs.replace(PLAIN, live=False)


def test_reads_of_another_disk_all_fail_until_the_worker_is_replaced(
    kit: Kit, workers: Workers
) -> None:
    worker = workers()
    worker.open(configured(kit, FROZEN, idle_close=0.2, keepalive=0.0))
    worker.read(0, 1)
    until(lambda: kit.events("client-close"), what="the idle disk to be closed")
    descriptor = kit.site / "ds1" / "plain" / "plain.vmdk"
    descriptor.write_text(descriptor.read_text().replace("11 22 33", "99 88 77"))

    for _ in range(3):
        # The daemon may have sent several before it hears of the first.
        worker.begin_read(0, 1)
    for _ in range(3):
        with pytest.raises(EngineError, match="it is another disk now") as caught:
            worker.answer()
        assert caught.value.retry == "reconnect"
