"""One disk of a VM hangs under 200 reads: how long do the other disk and .vddkfs take to answer?

The worker of the one disk is stopped (SIGSTOP). What is measured is the other disk, whose worker
runs.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import BenchmarkError, end, until
from benchmarks.systems import Served
from benchmarks.works import Round

READERS: Final = 200
SAMPLES: Final = 100
LONGEST: Final = 20.0
"""Seconds that all samples together may take; the one under way then counts as that long. Well
below op_timeout, after which the hung worker would be replaced."""
_PROBE: Final = Path(__file__).parent / "probe.py"
_HUNG: Final = "one"
LOADS: Final = ("buffered", "direct", "opening")
"""What the readers do: read, or open the file and read, which asks the worker too."""


def hung(this: Round) -> None:
    """Measure with nothing hung, then under readers that hang."""
    served = this.served
    _read_once(served.mount / _HUNG / "disk.raw")
    _measure(this, "nothing hung")
    for load in LOADS:
        with _readers(served, load):
            this.add(f"{load}.in-flight", _settled(served))
            _measure(this, load)


def _settled(served: Served) -> int:
    """Return how many requests hang, when they have become no more for half a second."""
    seen = [0]

    def steady() -> bool:
        worker = _worker(served)
        seen.append(worker["in_flight"] + worker["queued"])
        return seen[-1] == seen[-2] > 0

    until(steady, 5.0, pause=0.5)
    return seen[-1]


def _read_once(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        file.read(4096)


def _worker(served: Served) -> dict[str, Any]:
    disks = served.status()["disks"]
    found: dict[str, Any] = next(disk["workers"][0] for disk in disks if disk["name"] == _HUNG)
    return found


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def _readers(served: Served, load: str) -> Iterator[None]:
    """Have the worker stopped under READERS reads; let them end when it goes on."""
    path = served.mount / _HUNG / "disk.raw"
    words = [sys.executable, "-P", str(_PROBE), "readers", str(path), load, str(READERS)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()
        with _stopped(_worker(served)["pid"]):
            process.stdin.write("\n")
            process.stdin.flush()
            yield
        try:
            said, _ = process.communicate(timeout=30.0)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"{load} reads still hang though the worker goes on") from None
        if said.split()[0] != "0":
            raise BenchmarkError(f"{load} reads of the hung disk failed: {said.strip()}")
    finally:
        end([process.pid], patience=0.1)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _measure(this: Round, load: str) -> None:
    for kind, seconds in _samples(this.served).items():
        this.add(f"{load}.{kind}.max", 1000 * max(seconds))
        this.add(f"{load}.{kind}.median", 1000 * statistics.median(seconds))


def _samples(served: Served) -> dict[str, list[float]]:
    status = served.mount / ".vddkfs" / "status.json"
    words = [str(_PROBE), "sample", str(served.file.parent), str(served.file), str(status)]
    command = [sys.executable, "-P", *words, str(SAMPLES)]
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said, _ = process.communicate(timeout=LONGEST)
        missing = ""
    except subprocess.TimeoutExpired:
        end([process.pid], patience=0.1)
        said, _ = process.communicate()
        missing = "late"
    found: dict[str, list[float]] = {"read": [], "list": [], "status": []}
    last = 0.0
    for line in said.splitlines():
        kind, seconds = line.split()
        found[kind].append(float(seconds))
        last += float(seconds)
    if missing:
        # The sample after the last one that was told is the one that hung.
        kind = min(found, key=lambda name: len(found[name]))
        found[kind].append(time.monotonic() - begun - last)
    elif process.returncode:
        raise BenchmarkError("a read of the disk that does not hang failed")
    return {kind: seconds for kind, seconds in found.items() if seconds}
