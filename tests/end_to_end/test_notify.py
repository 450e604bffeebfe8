"""A daemon that told the kernel to forget a file with a read that hangs can still be killed."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.hanging import SIZE
from tests.end_to_end.mounting import SECONDS, Agent, alive, mounted, run, until

SCRIPT = Path(__file__).with_name("hanging.py")


@contextlib.contextmanager
def hanging(place: Path, how: str) -> Iterator[tuple[subprocess.Popen[str], Agent]]:
    """Mount; a read of the second half hangs. Whatever happens, nothing is left."""
    place.mkdir()
    command = [sys.executable, str(SCRIPT), str(place), how]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process: subprocess.Popen[str] = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
    agent = Agent()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        agent.send("read", f"{place}/file", SIZE * 3 // 4, 4096)
        assert agent.waiting(0.5)
        yield process, agent
    finally:
        process.kill()
        # This also ends what waits in the kernel for answers of the dead.
        until(lambda: run("umount", "-f", place).returncode == 0 or not mounted(place), SECONDS)
        process.communicate(timeout=SECONDS)
        agent.close()


def tell(process: subprocess.Popen[str]) -> str:
    """Have the kernel told; return how that ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("now\n")
    process.stdin.flush()
    assert process.stdout.readline() == "telling\n"
    return process.stdout.readline()


def ends_within(pid: int, seconds: float) -> bool:
    """Say whether all threads of a process, and with them its files, end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not alive(pid) and len(os.listdir(f"/proc/{pid}/task")) <= 1:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("how", ["bare", "guarded"])
def test_a_killed_daemon_goes(able: None, tmp_path: Path, how: str) -> None:
    with hanging(tmp_path / "mnt", how) as (process, agent):
        assert tell(process) == "given up\n"
        process.kill()
        if how == "bare":
            # The trap: its thread in the kernel waits for a read that only it could answer.
            assert not ends_within(process.pid, 1)
            assert agent.waiting(0)
        else:
            assert ends_within(process.pid, 10)
            with pytest.raises(OSError):  # noqa: PT011 (which error is the kernel's choice)
                agent.receive(10)
