"""The machine's sessions of a server, as one worker takes and gives them."""

import logging

import pytest

from tests.engines.vddk.workers import BASE, MIDDLE, PLAIN, Workers, configured
from tests.simulator.kit import Kit, until
from vddkfs.errors import EngineError


def test_more_disks_than_sessions_in_one_worker_is_an_error_and_no_wait(
    kit: Kit, workers: Workers
) -> None:
    config = configured(kit, BASE, MIDDLE, max_sessions=1)
    worker = workers()
    with pytest.raises(EngineError, match="max_sessions=1") as caught:
        worker.open(config)
    assert caught.value.retry == "", "no wait can help"


def test_whoever_looks_at_disks_waits_longer_for_a_session(kit: Kit, workers: Workers) -> None:
    first = workers()
    first.open(configured(kit, PLAIN, max_sessions=1, tmp_directory=str(kit.path / "first")))
    short = "from vddkfs.engines.vddk import runtime; runtime.SESSION_SECONDS = 0.1"
    one = configured(kit, BASE, max_sessions=1)
    assert len(workers(short).describe(one).links) == 1


def test_that_a_session_is_waited_for_is_said(kit: Kit, workers: Workers) -> None:
    first = workers()
    first.open(configured(kit, PLAIN, max_sessions=1, tmp_directory=str(kit.path / "first")))
    second = workers()
    second.open(configured(kit, BASE, max_sessions=1))
    assert second.says("waiting for one of 1 sessions of vcenter", level=logging.INFO)
    until(lambda: first.says("closed, another needs the session"))
