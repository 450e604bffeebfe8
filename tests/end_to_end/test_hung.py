"""One disk hangs under two hundred readers: nothing else of the mount does."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.mounting import (
    SECONDS,
    Mounts,
    sha256,
    stopped,
    succeed,
    threads,
    until,
    vddkfs,
)
from tests.end_to_end.readers import READERS, SIZE, STEP
from tests.end_to_end.vms import MIB, make_vmfs, noise

SCRIPT = Path(__file__).with_name("readers.py")
PROMPTLY = 2.0
"""Seconds in which everything else has to answer here; the goal of 0.1 is for the benchmarks."""


@contextlib.contextmanager
def readers(name: str, how: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-I", "-S", str(SCRIPT), name, how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)


def waiting_in_the_kernel(pid: int) -> int:
    """Return how many threads of a process wait for an answer of the mount."""
    found = 0
    for task in threads(pid):
        with contextlib.suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            where = (task / "wchan").read_text()
            found += state == "D" or "request_wait" in where or "fuse" in where
    return found


@pytest.mark.parametrize("how", ["opened", "opening"])
def test_others_answer(
    mount: Mounts, vm: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    content = noise("hung", READERS * STEP)
    make_vmfs(vm / "hung.vmdk", content)
    make_vmfs(vm / "well.vmdk", noise("well", 8 * MIB))
    found = mount(vm)
    found.map_known("hung")
    found.map_known("well")
    assert [disk["name"] for disk in found.status()["disks"]] == ["hung", "well"]
    took: dict[str, float] = {}

    def timed(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.monotonic()
        result = function(*arguments)
        took[what] = time.monotonic() - start
        return result

    with readers(found.path("hung/disk.raw"), how) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if how == "opened":
            assert process.stdout.readline() == "ready\n"
        with stopped(found.worker(0)["pid"]):
            if how == "opened":
                process.stdin.write("go\n")
                process.stdin.flush()
            until(lambda: waiting_in_the_kernel(process.pid) >= READERS, what="200 that wait")
            status = timed("status.json", found.json, ".vddkfs/status.json")
            for number, direct in enumerate((False, True, False, True)):
                data = timed(
                    f"read {number}", found.read, "well/disk.raw", number * MIB, 65536, direct
                )
                assert data == noise("well", 8 * MIB)[number * MIB :][:65536]
            timed("hash", found.sha256, "well/disk.raw")
            timed("ls", succeed, "ls", "-la", found.place, found.path("hung"))
            timed("ls of the chain", succeed, "ls", "-la", found.path("hung/chain"))
            timed("ls -R of another", succeed, "ls", "-laR", found.path("well"))
            timed("df", succeed, "df", found.place)
            done = timed("vddkfs status", vddkfs, "status", found.place)
            assert done.returncode == 0
            assert "hung" in done.stdout
            assert process.poll() is None
        out, _ = process.communicate(timeout=SECONDS)
    hashes = json.loads(out)
    wanted = [sha256(content[number * STEP :][:SIZE]) for number in range(READERS)]
    assert hashes == wanted
    hung, well = status["disks"]
    assert hung["workers"][0]["in_flight"] + hung["workers"][0]["queued"] >= 1
    assert hung["workers"][0]["oldest_request"] > 0
    assert well["workers"][0]["in_flight"] == 0
    with capsys.disabled():
        worst = max(took, key=lambda what: took[what])
        print(f"\n  slowest beside a hung disk: {worst}, {took[worst] * 1000:.0f} ms")
    assert all(seconds < PROMPTLY for seconds in took.values()), took
