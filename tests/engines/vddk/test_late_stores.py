"""A read that failed may still be written: its memory is not asked for again by this process."""

import pytest

from tests.engines.vddk.workers import PLAIN, Workers, configured
from tests.simulator.kit import Kit
from vddkfs.errors import EngineError

REFUSED_LATELY = """
from vddkfs.engines.vddk.messages import Messages
Messages.refused_lately = property(lambda self: True)
"""
"""The host has just told, in the log, that it had no memory for a neighbour's request."""


@pytest.mark.parametrize("code", [14011, 36, 3047, 14014, 15])
def test_a_lost_connection_is_no_refusal_of_memory(code: int, kit: Kit, workers: Workers) -> None:
    kit.configure(f"fault = ReadAsync count=1 callback_error={code} late_store_ms=300")
    worker = workers(REFUSED_LATELY)
    worker.open(configured(kit, PLAIN))
    with pytest.raises(EngineError) as caught:
        worker.read(0, 8)
    assert caught.value.retry, "for another process"
    assert not worker.says("asking again")


def test_what_says_too_little_is(kit: Kit, workers: Workers) -> None:
    kit.configure("fault = ReadAsync count=1 callback_error=1")
    worker = workers(REFUSED_LATELY)
    worker.open(configured(kit, PLAIN))
    worker.read(0, 8)
    assert worker.says("asking again")
