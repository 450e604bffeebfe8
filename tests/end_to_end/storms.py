"""Storms: fio that verifies what it has written, while the workers below it are killed.

A storm lasts a few passes of fio; with VDDKFS_THOROUGH set in the environment it goes on for ten
minutes, or for VDDKFS_STORM_SECONDS.
"""

import contextlib
import os
import re
import shutil
import signal
import threading
import time
from typing import Final, Self

import pytest

from tests.end_to_end.mounting import Mount, children, run

THOROUGH: Final = bool(os.environ.get("VDDKFS_THOROUGH"))
SECONDS: Final = float(os.environ.get("VDDKFS_STORM_SECONDS", "600" if THOROUGH else "0"))
"""How long each storm goes on at least; until enough workers were killed in any case."""
TIMEOUT: Final = SECONDS + 300
MARKS: Final = pytest.mark.timeout(TIMEOUT + 60)
ENDED: Final = "it ended unexpectedly.*; another takes over"
SMALL: Final = "512-256k"
LARGE: Final = "4k-128k"
KILLS: Final = 3
"""At least so many, which takes more than one pass where all is quick."""


class Beside(threading.Thread):
    """Does ``step`` every so many seconds, until the block ends. What it raises is raised there."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._enough = threading.Event()
        self._error: BaseException | None = None

    def step(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            while not self._enough.wait(self._seconds):
                self.step()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self.join()
        if self._error is not None:
            raise self._error


class Killer(Beside):
    """Kills the workers of a mount, each after it has served so many *seconds* or a bit more.

    ``count`` says how many were killed. All of them are restarts that the test announces.
    """

    def __init__(self, mount: Mount, seconds: float = 0.2) -> None:
        super().__init__(seconds)
        mount.expect(ENDED)
        mount.restarts = None
        self.count = 0
        self._mount = mount
        self._seen: set[int] = set()
        self._killed: set[int] = set()

    def step(self) -> None:
        workers = [worker for disk in self._mount.status()["disks"] for worker in disk["workers"]]
        serving = {worker["pid"] for worker in workers if worker["state"] == "serving"}
        serving &= set(children(self._mount.pid))
        for pid in (serving & self._seen) - self._killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self._killed.add(pid)
                self.count += 1
        self._seen = serving


class Reader(Beside):
    """Reads the end of a file, which nobody writes, and compares it: from *start* on *wanted*.

    It asks the agent of the mount, which nobody else may do meanwhile.
    """

    def __init__(self, mount: Mount, name: str, start: int, wanted: bytes) -> None:
        super().__init__(0.01)
        self._mount, self._name = mount, name
        self._start, self._wanted = start, wanted
        self._turn = 0

    def step(self) -> None:
        at = self._turn * 65536 % len(self._wanted)
        found = self._mount.read(self._name, self._start + at, 65536, True)
        assert found == self._wanted[at : at + 65536]
        self._turn += 1


def need_fio() -> None:
    """Skip where fio is absent."""
    if shutil.which("fio") is None:
        pytest.skip("absent: the tool fio")


def fio(name: str, *words: str) -> str:
    """Run fio on a file; return what it says. It must find all that it wrote."""
    command = ["fio", "--name=storm", f"--filename={name}", "--thread", *words]
    # What it writes for itself (the state of its verification) goes nowhere.
    done = run(*command, timeout=TIMEOUT, cwd="/tmp")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert re.search(r"\berr= *0\b", said), said
    assert "verify:" not in said, said
    return said


def storm(name: str, size: int, killer: Killer, *, direct: bool, sizes: str) -> None:
    """Write and verify *size* bytes of a file at random, in as many passes as it takes to have
    workers killed and the time over.

    Each pass touches every byte once and verifies what it wrote: on the way, 64 writes behind, and
    all of it at the end.
    """
    end = time.monotonic() + SECONDS
    passes = 0
    while killer.count < KILLS or time.monotonic() < end:
        assert killer.is_alive()
        fio(
            name,
            *("--rw=randrw", "--ioengine=libaio", "--iodepth=16", f"--direct={int(direct)}"),
            *(f"--size={size}", f"--bsrange={sizes}", "--bs_unaligned=0", "--norandommap=0"),
            *("--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--do_verify=1"),
            *("--verify_state_save=0", "--fsync=40", f"--randseed={passes + 1}"),
        )
        passes += 1


def settings_of_a_bad_day(profile: str) -> list[str]:
    """Return lines for the simulator: it jitters, and what the dead wrote lands late."""
    return [f"profile = {profile}", "net.jitter = 0.9", "late_write_ms = 150", "exit_ms = 10"]
