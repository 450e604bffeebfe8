"""What VDDK and its hosts do wrong while a disk is read: right bytes come, or EIO."""

import errno
import os
import re
import signal
from pathlib import Path

import pytest

from tests.end_to_end.mounting import children, sha256, stopped, until
from tests.end_to_end.remote import MIB, Proxy, RemoteMount, dd, total

SIZE = 8 * MIB + 37 * 512
DISK = "big/disk.raw"
LOST = "worker of big/chain/0: it lost its connection"


def begin(proxy: Proxy, *lines: str, options: tuple[str, ...] = ()) -> tuple[RemoteMount, bytes]:
    """Mount a disk, and then have the simulator do what *lines* tell."""
    mount, data = proxy.big(SIZE, *options)
    mount.map_known("big")
    proxy.kit.configure(*lines)
    return mount, data


def judge(mount: RemoteMount, data: bytes) -> None:
    """Read the disk in both ways, twice, and compare."""
    for _ in range(2):
        assert dd(mount.path(DISK), direct=True) == data
        assert dd(mount.path(DISK), direct=False) == data


@pytest.mark.parametrize("action", ["late_ms=10", "inline", "delay_ms=10"])
def test_callbacks_early_and_late(proxy: Proxy, action: str) -> None:
    found, data = begin(proxy, f"fault = ReadAsync {action}")
    judge(found, data)
    assert total(found, "resent") == 0


def test_callback_that_never_comes(proxy: Proxy) -> None:
    found, data = begin(proxy, "fault = ReadAsync after=2 count=2 drop", options=("op_timeout=1",))
    found.expect("worker of big/chain/0: it did not answer within 1 s")
    found.restarts = None
    judge(found, data)
    assert 1 <= total(found, "restarts") <= 2


def test_host_that_stands_still(proxy: Proxy) -> None:
    found, data = begin(proxy)
    fd = found.open(DISK, direct=True)
    with stopped(proxy.host.process.pid):
        found.agent.send("pread", fd, MIB, 2 * MIB)
        assert found.agent.waiting(0.3)
        assert found.worker()["in_flight"] >= 1
    assert found.agent.receive() == data[2 * MIB : 3 * MIB]
    judge(found, data)


def test_status_of_a_worker_that_hangs(proxy: Proxy) -> None:
    """However often it is asked for, it answers, and is no burden on the worker."""
    found, data = begin(proxy, "fault = ReadAsync count=1 hang", options=("op_timeout=2",))
    found.expect("worker of big/chain/0: it did not answer within 2 s")
    found.restarts = 1
    fd = found.open(DISK, direct=True)
    found.agent.send("pread", fd, 4096, 65536)
    until(lambda: found.worker()["in_flight"], what="the read under way")
    seen = [found.worker()["in_flight"] for _ in range(5)]
    assert found.agent.receive() == data[65536:][:4096]
    # One more may be the question for the statistics.
    assert max(seen) <= 2
    assert total(found, "resent") <= 2


@pytest.mark.parametrize("how", ["error", "callback_error"])
def test_lost_and_busy_are_asked_again(proxy: Proxy, how: str) -> None:
    """Each is told once, by ReadAsync or to its callback; the read is sent to another worker."""
    codes = (1, 5, 7, 13, 15, 1000, 3047, 14009, 14011, 16002, 18000, 4242)
    found, data = begin(proxy)
    fd = found.open(DISK, direct=True)
    for number, code in enumerate(codes):
        found.expect(rf"{LOST}.*\b{code}\b")
        proxy.kit.configure(f"fault = ReadAsync count=1 {how}={code}")
        piece = found.ask("pread", fd, 65536, number * 65536)
        assert piece == data[number * 65536 :][:65536]
    found.restarts = len(codes)
    assert total(found, "resent") == len(codes)
    assert total(found, "errors") == len(codes)
    judge(found, data)


@pytest.mark.parametrize("how", ["error", "callback_error"])
def test_final_is_told_at_once(proxy: Proxy, how: str) -> None:
    found, data = begin(proxy, f"fault = ReadAsync count=1 {how}=16007")
    found.restarts = None
    found.expect("read at offset 65536 failed.*16007")
    with pytest.raises(OSError, match=r"Input/output|Invalid") as caught:
        found.read(DISK, 65536, 4096, True)
    assert caught.value.errno in (errno.EIO, errno.EINVAL)
    judge(found, data)


def test_upper_bits_of_errors(proxy: Proxy) -> None:
    found, data = begin(
        proxy, "errors.upper_bits = yes", "fault = ReadAsync after=1 count=1 callback_error=14011"
    )
    found.expect(f"{LOST}.*14011")
    found.restarts = 1
    judge(found, data)


def test_host_without_memory(proxy: Proxy) -> None:
    """The refused are asked for in smaller pieces, and fewer at once; no worker is lost for it."""
    found, data = begin(proxy, "sessions.memory_bytes = 400000")
    found.expect("VDDK: .*Failed to allocate the requested")
    judge(found, data)
    assert proxy.kit.events("memory-refused")
    assert total(found, "errors") == 0
    refused = len(proxy.kit.events("memory-refused"))
    judge(found, data)
    assert len(proxy.kit.events("memory-refused")) <= 2 * refused


def test_heap_that_was_scribbled_on(proxy: Proxy) -> None:
    found, data = begin(proxy, "fault = ReadAsync after=1 count=6 scribble")
    found.allow("worker of big/chain/0: it ended unexpectedly", "worker of .* says: ")
    found.restarts = None
    judge(found, data)


@pytest.mark.parametrize("code", [14011, 15, 16007])
def test_store_after_an_error(proxy: Proxy, code: int) -> None:
    """The library writes into a buffer that it has given back: nobody may see that."""
    lines = [
        f"fault = ReadAsync after={1 + 3 * number} count=1 callback_error={code} late_store_ms=150"
        for number in range(3)
    ]
    found, data = begin(proxy, *lines, options=("readahead=0",))
    found.allow(LOST, "asking again", "failed.*16007")
    found.restarts = None
    fd = found.open(DISK)
    for offset in range(0, 8 * MIB, MIB):
        got = found.attempt(errno.EIO if code != 16007 else errno.EINVAL, "pread", fd, MIB, offset)
        assert got in (None, data[offset : offset + MIB])
    seen = found.status()["uptime"]
    until(lambda: found.status()["uptime"] > seen + 0.3, what="the last store")
    assert dd(found.path(DISK), direct=False) == data
    found.ask("posix_fadvise", fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert dd(found.path(DISK), direct=False) == data


def test_chatter(proxy: Proxy) -> None:
    keys = ("log", "stdout", "stderr", "split")
    proxy.kit.configure_kit("chatter.phone_home = yes")
    proxy.kit.configure("chatter.phone_home = yes", *(f"chatter.{key} = yes" for key in keys))
    found, data = proxy.big(SIZE)
    found.allow("says: VDDK: ")
    judge(found, data)
    text = found.log.read_text()
    assert "100.0% done" in text
    assert "CEIP" not in text
    for where in ("stdout", "stderr"):
        lines = [line for line in text.splitlines() if f"says: {where}: VixDiskLib: " in line]
        assert len(lines) > 10
        # Nothing is cut in two, and no two lines are one.
        assert all(re.search(r": \w+ is call \d+ of process \d+$", line) for line in lines)


def test_end_that_hangs(proxy: Proxy) -> None:
    """What hangs at the end of a worker does not hold up the umount."""
    found, data = begin(proxy)
    proxy.kit.configure("fault = Close hang")
    assert found.read(DISK, 4096, 4096, True) == data[4096:8192]


def test_crash_while_opening(proxy: Proxy) -> None:
    found, data = begin(proxy)
    fd = found.open(DISK, direct=True)
    proxy.kit.configure("fault = Open count=2 segv")
    os.kill(found.worker()["pid"], signal.SIGKILL)
    found.expect("ended unexpectedly", "did not open the chain")
    found.restarts = 3
    assert found.ask("pread", fd, 4096, 65536) == data[65536:][:4096]
    assert sha256(dd(found.path(DISK), direct=True)) == sha256(data)


def test_decoys_in_the_kit_do_no_harm(proxy: Proxy) -> None:
    """The kit brings libraries of its own, which nothing but VDDK may meet."""
    found, _ = begin(proxy)
    assert found.read(DISK, 0, 4096)
    worker = found.worker()["pid"]
    maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (found.pid, worker)}
    assert str(proxy.kit.path) not in maps[found.pid]
    assert str(proxy.kit.path) in maps[worker]
    for pid in (found.pid, *children(found.pid)):
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"LD_LIBRARY_PATH" not in environ or pid == worker


def test_maintenance_that_ends(proxy: Proxy) -> None:
    """One host after the other enters it, and leaves it: the reader waits, and the bytes come."""
    found, data = begin(proxy)
    fd = found.open(DISK, direct=True)
    found.expect("maintenance")
    found.allow("VDDK: ")
    found.restarts = None
    proxy.kit.configure("host.esx1 = shutdown", "host.esx2 = shutdown")
    found.agent.send("pread", fd, MIB, MIB)
    until(lambda: total(found, "restarts"), what="the worker to notice")
    proxy.kit.configure("host.esx1 = maintenance", "host.esx2 = maintenance")
    assert found.agent.waiting(0.5)
    proxy.kit.configure()
    assert found.agent.receive() == data[MIB : 2 * MIB]
    assert dd(found.path(DISK), direct=True) == data
