"""Workers that are killed, stand still, rest, or cannot come back."""

import contextlib
import errno
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mount, Mounts, alive, children, stopped, until
from tests.end_to_end.vms import KIB, MIB, make_vmfs, noise, raw_sha256

DISK = "disk/disk.raw"
ENDED = "worker of disk: it ended unexpectedly"


def make_disk(vm: Path, size: int) -> Path:
    return make_vmfs(vm / "disk.vmdk", noise("disk", size))


def worker_pid(mount: Mount) -> int:
    """Return the process id of the worker, when it serves."""

    def serving() -> int | None:
        worker = mount.worker()
        pid: int | None = worker["pid"]
        return pid if worker["state"] == "serving" else None

    pid: int = until(serving, what="a worker that serves")
    return pid


def kill_during(mount: Mount, function: str, *arguments: object) -> bytes:
    """Kill the worker while it has requests of a call of the agent; return the call's result."""
    pid = worker_pid(mount)
    with stopped(pid):
        mount.agent.send(function, *arguments)
        until(lambda: mount.worker()["in_flight"] >= 1, what="a request in flight")
        os.kill(pid, signal.SIGKILL)
    data: bytes = mount.agent.receive()
    return data


def read_with_kills(mount: Mount, size: int, kills: int, direct: bool) -> str:
    """Hash a disk from beginning to end, with one kill of the worker in each of *kills* slices."""
    digest = hashlib.sha256()
    fd = mount.open(DISK, direct)
    # The kernel reads nothing ahead, so that each slice is asked for when it is read.
    mount.ask("posix_fadvise", fd, 0, 0, os.POSIX_FADV_RANDOM)
    slice_ = -(-size // kills // MIB) * MIB
    for offset in range(0, size, slice_):
        # The first piece of each slice comes with the worker well, the next without it.
        digest.update(mount.ask("pread", fd, 64 * KIB, offset))
        rest = kill_during(mount, "pread", fd, slice_ - 64 * KIB, offset + 64 * KIB)
        while len(rest) < min(slice_, size - offset) - 64 * KIB:
            here = offset + 64 * KIB + len(rest)
            part = mount.ask("pread", fd, offset + slice_ - here, here)
            assert part
            rest += part
        digest.update(rest)
    mount.ask("close", fd)
    return digest.hexdigest()


def test_twenty_kills_in_direct_reads(mount: Mounts, vm: Path) -> None:
    path = make_disk(vm, 60 * MIB)
    found = mount(vm)
    found.expect(ENDED)
    found.restarts = 20
    assert read_with_kills(found, 60 * MIB, 20, direct=True) == raw_sha256(path)
    worker = found.worker()
    assert worker["restarts"] == 20
    assert worker["resent"] >= 20
    assert worker["starts"] == 21
    assert worker["errors"] == 0


def test_kills_in_buffered_reads(mount: Mounts, vm: Path) -> None:
    path = make_disk(vm, 60 * MIB)
    found = mount(vm, "readahead=1M")
    found.expect(ENDED)
    found.restarts = 5
    assert read_with_kills(found, 60 * MIB, 5, direct=False) == raw_sha256(path)
    assert found.worker()["restarts"] == 5
    assert found.worker()["resent"] >= 5


def test_kill_of_an_idle_worker(mount: Mounts, vm: Path) -> None:
    make_disk(vm, MIB)
    found = mount(vm)
    found.read(DISK, 0, 4096)
    pid = worker_pid(found)
    os.kill(pid, signal.SIGKILL)
    until(lambda: found.worker()["pid"] != pid, what="the loss to be noticed")
    assert found.read(DISK, MIB // 2, 4096, True) == noise("disk", MIB)[MIB // 2 :][:4096]
    found.expect(ENDED)
    found.restarts = 1
    assert found.worker()["resent"] == 0


def test_worker_keeps_its_pid(mount: Mounts, vm: Path) -> None:
    make_disk(vm, 4 * MIB)
    found = mount(vm)
    found.read(DISK, 0, 4096)
    pid = worker_pid(found)
    for offset in range(0, 4 * MIB, 512 * KIB):
        found.read(DISK, offset, 64 * KIB, True)
        found.sha256("disk/chain/0.raw")
        assert found.worker()["pid"] == pid
    # Longer than the looks at the idle time are apart, several times over.
    requests = found.worker()["requests"]
    uptime = found.status()["uptime"]
    until(lambda: found.status()["uptime"] >= uptime + 2, what="two seconds to pass")
    assert found.worker()["pid"] == pid
    assert found.worker()["requests"] == requests
    assert found.worker()["starts"] == 1


def test_idle_worker_ends_and_comes_back(mount: Mounts, vm: Path) -> None:
    make_disk(vm, MIB)
    found = mount(vm, "idle_timeout=0.3")
    found.map_known("disk")
    for round_ in range(1, 4):
        assert found.read(DISK, round_ * 4096, 4096, True)
        until(lambda: found.worker()["pid"] is None, what="the idle worker to end")
    assert found.worker()["state"] == "not running"
    assert found.worker()["starts"] >= 3
    assert found.worker()["restarts"] == 0


def test_no_worker_before_the_first_look(mount: Mounts, vm: Path) -> None:
    make_disk(vm, MIB)
    found = mount(vm)
    assert found.worker()["starts"] == 0
    assert children(found.pid) == []


def test_worker_that_stands_still_is_replaced(mount: Mounts, vm: Path) -> None:
    make_disk(vm, MIB)
    found = mount(vm, "op_timeout=1")
    found.read(DISK, 0, 4096)
    pid = worker_pid(found)
    with stopped(pid):
        data = found.ask("read", found.path(DISK), 65536, 65536, True, timeout=20)
        assert data == noise("disk", MIB)[65536:131072]
        until(lambda: not alive(pid), what="the end of the stopped worker")
    found.expect("worker of disk: it did not answer within 1 s")
    found.restarts = 1
    assert found.worker()["resent"] >= 1


def test_buffered_reader_of_a_worker_that_stands_still(mount: Mounts, vm: Path) -> None:
    path = make_disk(vm, 8 * MIB)
    found = mount(vm, "op_timeout=1")
    fd = found.open(DISK)
    found.ask("pread", fd, 4096, 0)
    with stopped(worker_pid(found)):
        assert found.sha256("disk/chain/0.raw") == raw_sha256(path)
    found.expect("did not answer within 1 s")
    found.restarts = 1


@contextlib.contextmanager
def every_worker(mount: Mount, gets: signal.Signals) -> Iterator[None]:
    """Kill the worker, and send a signal to every other one as soon as it appears."""
    lost = worker_pid(mount)
    os.kill(lost, signal.SIGKILL)
    enough = threading.Event()

    def killing() -> None:
        while not enough.wait(0.005):
            for pid in children(mount.pid):
                # Before its exec the daemon itself waits for a child.
                with contextlib.suppress(OSError):
                    if b"engines.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, gets)

    killer = threading.Thread(target=killing)
    killer.start()
    try:
        until(lambda: not alive(lost), what="the end of the worker")
        yield
    finally:
        enough.set()
        killer.join()
        for pid in children(mount.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_retry_budget_ends_with_eio_and_heals(mount: Mounts, vm: Path) -> None:
    make_disk(vm, MIB)
    found = mount(vm, "retry_budget=2")
    fd = found.open(DISK, direct=True)
    found.ask("pread", fd, 4096, 0)
    found.restarts = None
    found.expect(ENDED, "disk: no answer within 2 s", "disk.*read at offset 65536 failed")
    found.allow("worker of disk: it did not open the chain")
    with every_worker(found, signal.SIGKILL):
        with pytest.raises(OSError, match="Input/output error") as caught:
            found.ask("pread", fd, 4096, 65536, timeout=30)
        assert caught.value.errno == errno.EIO
        assert found.status()["warnings"]
    assert found.ask("pread", fd, 4096, 65536) == noise("disk", MIB)[65536:][:4096]


def test_retry_budget_counts_while_a_worker_starts(mount: Mounts, vm: Path) -> None:
    """A new worker that hangs before it has opened the chain uses up the same budget."""
    make_disk(vm, MIB)
    found = mount(vm, "op_timeout=1", "retry_budget=2")
    fd = found.open(DISK, direct=True)
    found.ask("pread", fd, 4096, 0)
    found.restarts = None
    found.expect(ENDED)
    found.allow("worker of disk: it did not", "no answer within 2 s", "read at offset .* failed")
    with every_worker(found, signal.SIGSTOP):
        found.agent.send("pread", fd, 4096, 65536)
        answered = not found.agent.waiting(15)
    # Whatever came of it, the worker goes on now, and so does the reader.
    if not answered:
        found.agent.receive()
    assert answered, "a reader waited 15 s with a retry_budget of 2 s"
    with pytest.raises(OSError, match="Input/output error"):
        found.agent.receive()
    assert found.ask("pread", fd, 4096, 65536) == noise("disk", MIB)[65536:][:4096]


def test_source_gone_when_the_worker_comes_back(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    make_disk(vm, MIB)
    found = mount(vm, "retry_budget=2")
    fd = found.open(DISK, direct=True)
    found.ask("pread", fd, 4096, 0)
    pid = worker_pid(found)
    flat, away = vm / "disk-flat.vmdk", tmp_path / "away"
    flat.rename(away)
    found.expect(ENDED, "disk-flat.vmdk")
    found.restarts = None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"error|[Ss]tale") as caught:
        found.ask("pread", fd, 4096, 65536, timeout=30)
    assert caught.value.errno in (errno.EIO, errno.ESTALE)
    with pytest.raises(OSError, match=r"error|[Ss]tale") as caught:
        found.open(DISK)
    assert caught.value.errno in (errno.EIO, errno.ESTALE)
    # The daemon lives, and the mount heals when the file is back.
    away.rename(flat)
    assert found.read(DISK, 65536, 4096) == noise("disk", MIB)[65536:][:4096]
    assert found.read(DISK, 65536, 4096, True) == noise("disk", MIB)[65536:][:4096]
