"""What VDDK is known to leave to its client: hot-added disks, and calls that never end.

Rows K09, K22 (where a worker opens again) and K24: the trap first, then the guard.
"""

import logging
import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from tests.engines.vddk.workers import (
    BASE,
    CHUNK,
    MIDDLE,
    PLAIN,
    Died,
    Worker,
    Workers,
    configured,
    credentials,
    entries,
)
from tests.simulator.kit import Kit, until
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.config import VddkConfig
from vddkfs.engines.requests import Moved, Patience, ReadRequest
from vddkfs.errors import EngineError, SourceMissing, VddkfsError

FILES = "san.device = file"
LOSES = "fault = ReadAsync transport=hotadd lose error=14011"

# K24: hot-added disks stay attached.

NO_CLEANUP = """
from vddkfs.engines.vddk.library import Cleaned, Library
Library.cleanup = lambda self, spec: Cleaned(0, 0)
"""
NOBODY_ELSE = """
from vddkfs.engines.vddk.slots import VmLock
VmLock.alone = lambda self: True
"""
CLEANED = "hot-added disks cleaned up: 1, remaining: 0"


def attached(kit: Kit) -> int:
    """Return how many disks are attached to this machine."""
    file = kit.site / ".sim" / "attachments"
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(line.startswith("disk\t") for line in lines)


def hot(kit: Kit, *images: Any, name: str = "worker") -> VddkConfig:
    """Return the configuration of a worker over hotadd."""
    folder = str(kit.path / name)
    return configured(
        kit, *(images or (BASE,)), transports=("hotadd", "nbdssl"), tmp_directory=folder
    )


def loses(kit: Kit, worker: Worker) -> None:
    """Have a worker lose the connection of its hot-added disk."""
    kit.configure(FILES, LOSES)
    worker.open(hot(kit))
    with pytest.raises(EngineError) as caught:
        worker.read(0, 1)
    assert caught.value.retry == "reconnect"
    until(lambda: kit.events("attachment-left"), what="the host to see the connection lost")


def killed(kit: Kit, worker: Worker) -> None:
    """Have a worker attach a disk, and kill it."""
    left = len(kit.events("attachment-left"))
    worker.open(hot(kit))
    worker.kill()
    until(lambda: len(kit.events("attachment-left")) > left, what="the host to see it dead")


def test_k24_a_worker_that_ends_badly_cleans_up(kit: Kit, workers: Workers) -> None:
    trap = workers(NO_CLEANUP)
    loses(kit, trap)
    assert trap.stop() == 0
    assert attached(kit) == 1

    worker = workers()
    loses(kit, worker)
    assert attached(kit) == 2
    assert worker.stop() == 0
    assert attached(kit) == 0
    assert worker.says("hot-added disks cleaned up: 2, remaining: 0", level=logging.WARNING)
    assert not (kit.path / "worker").exists()


def test_k24_a_failed_open_leaves_nothing_attached(kit: Kit, workers: Workers) -> None:
    fault = "fault = GetInfo transport=hotadd count=1 lose error=16002"
    kit.configure(FILES, fault)
    trap = workers(NO_CLEANUP)
    trap.open(hot(kit))
    assert trap.says("transport hotadd does not serve it")
    assert trap.says("open over nbdssl")
    trap.stop()
    assert attached(kit) == 1

    kit.configure(FILES, fault.replace("16002", "16065"))
    worker = workers()
    worker.open(hot(kit))
    assert worker.says("open over nbdssl")
    assert attached(kit) == 2
    worker.stop()
    assert attached(kit) == 0
    assert worker.says("hot-added disks cleaned up: 2, remaining: 0", level=logging.WARNING)


def test_k24_the_next_worker_cleans_up_after_a_killed_one(kit: Kit, workers: Workers) -> None:
    kit.configure(FILES)
    killed(kit, workers())
    trap = workers(NO_CLEANUP)
    trap.open(hot(kit))
    assert attached(kit) == 2
    trap.kill()
    until(lambda: len(kit.events("attachment-left")) == 2, what="the host to see it dead")

    worker = workers()
    worker.open(hot(kit))
    assert attached(kit) == 1, "its own"
    assert worker.says("hot-added disks cleaned up: 2, remaining: 0", level=logging.WARNING)
    assert worker.says("the next changed-block query of this VM may be full")
    assert worker.stop() == 0
    assert attached(kit) == 0
    assert not (kit.path / "worker").exists()


@pytest.mark.parametrize("others", [("nbdssl",), ("hotadd",)])
def test_k24_nothing_is_cleaned_up_while_another_worker_of_the_vm_lives(
    others: tuple[str, ...], kit: Kit, workers: Workers
) -> None:
    kit.configure(FILES)
    other = workers()
    other.open(configured(kit, MIDDLE, transports=others, tmp_directory=str(kit.path / "other")))
    killed(kit, workers())
    trap = workers(NOBODY_ELSE)
    trap.open(hot(kit))
    assert kit.events("cleanup"), "with disks of the VM in use"
    trap.stop()

    killed(kit, workers())
    cleanups, before = len(kit.events("cleanup")), attached(kit)
    worker = workers()
    worker.open(hot(kit))
    assert worker.says("no cleanup: another worker of this VM lives", level=logging.WARNING)
    assert attached(kit) == before + 1
    assert len(kit.events("cleanup")) == cleanups
    assert worker.read(0, 8)
    other.stop()
    assert worker.stop() == 0
    assert attached(kit) == 0, "the last one puts out the light"
    assert worker.says(CLEANED, level=logging.WARNING)


def test_k24_what_cannot_be_cleaned_up_yet_is_left_for_the_next(kit: Kit, workers: Workers) -> None:
    kit.configure(FILES)
    other = workers()
    other.open(configured(kit, MIDDLE, tmp_directory=str(kit.path / "other")))
    killed(kit, workers())
    worker = workers()
    worker.open(hot(kit))
    worker.stop()
    assert attached(kit) == 1, "another worker of the VM lives"
    assert entries(kit.path / "worker"), "by which the library knows the disk"
    other.stop()
    last = workers()
    last.open(hot(kit))
    assert last.says(CLEANED, level=logging.WARNING)
    last.stop()
    assert attached(kit) == 0
    assert not (kit.path / "worker").exists()


def test_k24_where_all_went_well_nothing_is_kept(kit: Kit, workers: Workers) -> None:
    kit.configure(FILES)
    for name in ("other", "worker"):
        one = workers()
        one.open(hot(kit, name=name))
    assert one.stop() == 0
    assert not (kit.path / "worker").exists()
    assert not one.says("cleanup")
    assert attached(kit) == 1, "the other one's"


def test_k24_a_cleanup_that_fails_is_told_and_made_again(kit: Kit, workers: Workers) -> None:
    kit.configure(FILES)
    killed(kit, workers())
    kit.configure(FILES, "fault = Cleanup error=14011")
    worker = workers()
    worker.open(hot(kit))
    worker.stop()
    said = [text for _, text in worker.said if "could not be cleaned up" in text]
    assert len(said) == 2, "when it begins and when it ends"
    assert attached(kit) == 1
    kit.configure(FILES)
    last = workers()
    last.open(hot(kit))
    assert last.says(CLEANED)


def test_k24_another_vm_is_no_hindrance(kit: Kit, workers: Workers) -> None:
    kit.configure(FILES)
    other = workers()
    other.open(configured(kit, PLAIN, tmp_directory=str(kit.path / "other")))
    killed(kit, workers())
    worker = workers()
    worker.open(hot(kit))
    assert worker.says(CLEANED, level=logging.WARNING)
    assert attached(kit) == 1


# K09: calls that never end.


class Slot:
    chunk_number = 0
    offset = 0


class Reader:
    """A supervised worker, and the memory that it reads into."""

    def __init__(self, client: WorkerClient, area: mmap.mmap) -> None:
        self.client = client
        self._area = area

    async def read(self, sector: int, count: int) -> bytes:
        """Return *count* sectors. Raises VddkfsError."""
        over = trio.Event()
        errors: list[VddkfsError] = []

        def done(error: VddkfsError | None) -> None:
            errors.extend([error] if error is not None else [])
            over.set()

        def moved() -> Moved:
            return Slot(), lambda: None

        self.client.submit_read(ReadRequest(0, sector, count, Slot(), done, moved))
        await over.wait()
        if errors:
            raise errors[0]
        return self._area[: count * 512]


@contextmanager
def reader(config: VddkConfig, patience: Patience) -> Iterator[Reader]:
    secret, fd = credentials(), os.memfd_create("chunk")
    os.ftruncate(fd, CHUNK)
    with mmap.mmap(fd, CHUNK) as area:
        client = WorkerClient("plain", config, patience, lambda found: None, secret=secret)
        client.lend(0, fd, CHUNK)
        yield Reader(client, area)
    os.close(fd)
    os.close(secret)


@pytest.mark.parametrize("what", ["hang", "drop"])
async def test_k09_a_read_that_hangs_ends_with_its_worker(
    what: str, kit: Kit, contents: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kit.configure(f"fault = ReadAsync trigger=once {what}")
    (kit.site / "once").touch()
    with reader(configured(kit, PLAIN), Patience(op_timeout=1e9, retry_budget=1e9)) as trap:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trap.client.run)
            nursery.start_soon(trap.read, 0, 64)
            await trio.to_thread.run_sync(until, lambda: not (kit.site / "once").exists())
            await trio.sleep(1.0)
            assert trap.client.in_flight == 1, "it hangs for as long as one looks"
            assert trap.client.state == "serving"
            nursery.cancel_scope.cancel()

    (kit.site / "once").touch()
    with reader(configured(kit, PLAIN), Patience(op_timeout=0.5)) as guarded:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guarded.client.run)
            with trio.fail_after(30):
                assert await guarded.read(0, 64) == contents(PLAIN.path)[: 64 * 512]
            assert guarded.client.counters.restarts >= 1
            assert guarded.client.counters.resent >= 1
            guarded.client.stop()
            nursery.cancel_scope.cancel()
    assert "did not answer within 0.5 s; another takes over" in caplog.text


async def test_k09_an_open_that_hangs_ends_with_its_worker(kit: Kit, contents: Any) -> None:
    (kit.site / "once").touch()
    kit.configure("fault = Open trigger=once hang")
    with reader(configured(kit, PLAIN), Patience(open_timeout=2.0)) as guarded:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guarded.client.run)
            with trio.fail_after(30):
                assert await guarded.read(0, 8) == contents(PLAIN.path)[:4096]
            assert guarded.client.counters.restarts >= 1
            guarded.client.stop()
            nursery.cancel_scope.cancel()


async def test_k09_a_hanging_worker_with_hot_added_disks_leaves_nothing(kit: Kit) -> None:
    (kit.site / "once").touch()
    kit.configure(FILES, "fault = ReadAsync trigger=once hang")
    with reader(hot(kit), Patience(op_timeout=1.0)) as guarded:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guarded.client.run)
            with trio.fail_after(30):
                await guarded.read(0, 64)
            assert len(kit.events("attachment-left")) == 1
            assert attached(kit) == 1, "that of the second worker"
            guarded.client.stop()
            nursery.cancel_scope.cancel()
    until(lambda: attached(kit) == 0)


NOT_MERGED = """
from vddkfs.engines.vddk import configuration
configuration.read_operators = lambda path: ""
"""


def test_k09_the_operators_configuration_counts(kit: Kit, workers: Workers) -> None:
    kit.configure("chatter.log = yes")
    own = kit.path / "own.conf"
    own.write_text(
        "# of the operator\nvixDiskLib.transport.LogLevel=6\n"
        f"vixDiskLib.nfc.ReadTimeoutMs=1234\ntmpDirectory={kit.path / 'theirs'}\n"
    )
    config = configured(kit, PLAIN, vddk_config=str(own))
    trap = workers(NOT_MERGED)
    trap.open(config)
    trap.stop()
    assert not trap.says("level 6")

    worker = workers()
    worker.open(config)
    text = (kit.path / "worker" / "vddk.conf").read_text()
    assert "vixDiskLib.nfc.ReadTimeoutMs=1234\n" in text
    assert "vixDiskLib.nfc.ReadTimeoutMs=60000" not in text
    assert "vixDiskLib.nfc.RequestTimeoutMs=180000\n" in text
    assert worker.says("level 6"), "the library goes by it"
    assert worker.says("tmpDirectory is left out, every worker has its own")
    assert not entries(kit.path / "theirs")
    worker.stop()
    with pytest.raises(SourceMissing, match="does not exist"):
        workers().open(configured(kit, PLAIN, vddk_config=str(kit.path / "nothing")))


# K22: the library begins once in a process.


async def test_k22_a_disk_that_became_another_is_opened_by_the_same_process(
    kit: Kit, workers: Workers
) -> None:
    trap = workers()
    trap.open(configured(kit, PLAIN))
    with pytest.raises(Died) as died:
        trap.open(configured(kit, PLAIN))
    assert died.value.code == -signal.SIGABRT, "InitEx a second time"

    with reader(configured(kit, PLAIN), Patience(retry_budget=10)) as guarded:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guarded.client.run)
            with trio.fail_after(30):
                await guarded.read(0, 8)
                [identity] = await guarded.client.reopen()
                assert identity.path == PLAIN.path
                await guarded.read(0, 8)
            assert guarded.client.counters.starts == 1
            guarded.client.stop()
            nursery.cancel_scope.cancel()
    assert len(kit.events("client-open")) == 3
