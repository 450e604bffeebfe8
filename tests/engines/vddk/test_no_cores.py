"""A worker holds the password: no core of it may be made, not even by a program that takes them."""

import ctypes
import os
import sys
from pathlib import Path

import pytest

from tests.engines.vddk.workers import PLAIN, Workers, configured, credentials
from tests.simulator.kit import Kit
from vddkfs.doctor import probe

TELLS = """
import ctypes, logging
from vddkfs.engines.vddk.engine import VddkEngine
identities = VddkEngine.identities
def told(self):
    dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
    self.runtime.say(logging.INFO, f"dumpable: {dumpable}.")
    return identities(self)
VddkEngine.identities = told
"""


def test_a_worker_is_not_dumpable(kit: Kit, workers: Workers) -> None:
    assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 1, "what it is without our doing"
    worker = workers(TELLS)
    worker.open(configured(kit, PLAIN))
    assert worker.says("dumpable: 0.")


ASK = """
import os, sys
from vddkfs.doctor import questions
def ask(bench):
    import ctypes
    bench.tell("dumpable", ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
questions.QUESTIONS["open"] = questions.Question("?", ask, True)
questions.main(sys.argv[1:])
"""


def test_whoever_asks_for_doctor_is_not_dumpable(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is there to see the library crash."""
    monkeypatch.setattr(probe, "_COMMAND", (sys.executable, "-I", "-X", "utf8", "-c", ASK))
    secret = credentials()
    question = probe.QUESTIONS["open"]
    answer = probe.ask("open", question, configured(kit, PLAIN), tmp_path, secret)
    os.close(secret)
    assert answer.answers == {"dumpable": 0}, answer
