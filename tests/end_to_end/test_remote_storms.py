"""Twenty losses of each kind in the middle of an O_DIRECT dd of a whole disk: the bytes are right.

The simulator strikes once at each of twenty places of the disk, so that a request is always under
way when a worker, its session or its host is lost.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.end_to_end.mounting import PROMPT, children, sha256, until
from tests.end_to_end.remote import MIB, Proxy, RemoteMount, total, workers

TIMES = 20
STEP = 2 * MIB
SIZE = (TIMES * 2 + 1) * MIB + 37 * 512
ENDED = "worker of big/chain/0: it ended unexpectedly"
SECONDS = 60.0


def strikes(action: str) -> list[str]:
    """Return the faults: each strikes the first read of its place, once."""
    places = [(number * STEP + STEP // 2) // 512 + 77 for number in range(TIMES)]
    return [
        f"fault = ReadAsync at={place} trigger=place{number} {action}"
        for number, place in enumerate(places)
    ]


class Copy:
    """A dd of a whole disk past the page cache, into a file."""

    def __init__(self, mount: RemoteMount, target: Path) -> None:
        self.target = target
        source = mount.path("big/disk.raw")
        words = ["dd", f"if={source}", f"of={target}", "bs=1M", "iflag=direct", "status=none"]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

    def result(self) -> str:
        """Wait for its end, and return the hash of what it has read."""
        _, said = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0, said
        return sha256(self.target.read_bytes())

    @property
    def goes_on(self) -> bool:
        return self.process.poll() is None


@contextlib.contextmanager
def copying(mount: RemoteMount, folder: Path) -> Iterator[Copy]:
    copy = Copy(mount, folder / "copy.raw")
    try:
        yield copy
    finally:
        copy.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            copy.process.communicate(timeout=PROMPT)


def begin(proxy: Proxy, action: str, *options: str) -> tuple[RemoteMount, str]:
    """Mount a disk whose reads are struck; return the hash that has to come out."""
    mount, data = proxy.big(SIZE, *options)
    mount.map_known("big")
    for number in range(TIMES):
        proxy.trigger(f"place{number}")
    proxy.kit.configure(*strikes(action))
    return mount, sha256(data)


def wait_for_strike(place: Path) -> None:
    """Wait until the library takes the file away, as it does when it strikes."""
    until(lambda: not place.exists(), what=f"the strike of {place.name}")


def judge(mount: RemoteMount, *, losses: int = TIMES) -> None:
    assert total(mount, "restarts") == losses
    assert total(mount, "starts") == losses + 1
    assert total(mount, "resent") >= TIMES
    mount.restarts = losses


def test_kill_of_the_worker(proxy: Proxy, tmp_path: Path) -> None:
    found, wanted = begin(proxy, "hang")
    found.expect(ENDED)
    with copying(found, tmp_path) as copy:
        for number in range(TIMES):
            wait_for_strike(proxy.kit.site / f"place{number}")
            assert copy.goes_on
            [worker] = children(found.pid)
            os.kill(worker, signal.SIGKILL)
        assert copy.result() == wanted
    judge(found)


def test_crash_of_the_worker(proxy: Proxy, tmp_path: Path) -> None:
    found, wanted = begin(proxy, "segv")
    found.expect(ENDED)
    with copying(found, tmp_path) as copy:
        assert copy.result() == wanted
    judge(found)


def test_worker_that_hangs(proxy: Proxy, tmp_path: Path) -> None:
    found, wanted = begin(proxy, "hang", "op_timeout=0.2")
    found.expect("worker of big/chain/0: it did not answer within 0.2 s")
    with copying(found, tmp_path) as copy:
        assert copy.result() == wanted
    judge(found)


def test_session_that_is_lost(proxy: Proxy, tmp_path: Path) -> None:
    found, wanted = begin(proxy, "lose")
    found.expect("worker of big/chain/0: it lost its connection.*14011")
    found.allow("VDDK: .*the connection is lost, error 14011")
    with copying(found, tmp_path) as copy:
        assert copy.result() == wanted
    judge(found)
    assert workers(found)[0]["errors"] >= TIMES


def test_restart_of_the_host(proxy: Proxy, tmp_path: Path) -> None:
    found, wanted = begin(proxy, "stop_host")
    found.allow("worker of big/chain/0: it (lost its connection|cannot open the disk)", "VDDK: ")
    found.restarts = None
    with copying(found, tmp_path) as copy:
        for _ in range(TIMES):
            until(lambda: stands_still(proxy.host.process.pid), what="the host to stand still")
            assert copy.goes_on
            proxy.restart(signal.SIGKILL)
        assert copy.result() == wanted
    assert total(found, "restarts") >= TIMES
    assert total(found, "resent") >= TIMES


def stands_still(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
