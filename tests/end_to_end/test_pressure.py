"""Many readers, little memory, and workers that die: the right bytes all the same."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Agent, Mounts, until
from tests.end_to_end.vms import MIB, make_vmfs, noise

SIZE = 40 * MIB
READERS = 4
READS = 300


@pytest.fixture
def agents(able: None) -> Iterator[list[Agent]]:
    """Return readers that outlive the mount: a hanging one is held until that is gone."""
    with contextlib.ExitStack() as stack:
        found = [Agent() for _ in range(READERS)]
        for agent in found:
            stack.callback(agent.close)
        yield found


@pytest.mark.parametrize("kills", [0, 10])
@pytest.mark.parametrize("cache", ["4M", "64M"])
def test_random_reads(agents: list[Agent], mount: Mounts, vm: Path, cache: str, kills: int) -> None:
    for name in ("a", "b"):
        make_vmfs(vm / f"{name}.vmdk", noise(name, SIZE))
    found = mount(vm, f"cache_size={cache}")
    for number, agent in enumerate(agents):
        name = "ab"[number % 2]
        disk, flat = found.path(f"{name}/disk.raw"), str(vm / f"{name}-flat.vmdk")
        agent.send("hammer", disk, flat, number, READS)
    if kills:
        found.expect("it ended unexpectedly.*; another takes over")
    for number in range(kills):
        requests = found.worker(number % 2)["requests"]
        until(
            lambda before=requests, disk=number % 2: (
                found.worker(disk)["requests"] > before or not agents[disk].waiting(0)
            ),
            what="more requests",
        )
        pid = found.worker(number % 2)["pid"]
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.kill(pid, signal.SIGKILL)
    assert [agent.receive(60) for agent in agents] == [""] * READERS
    found.restarts = None
    if not kills:
        found.restarts = 0
    status = found.status()
    assert status["cache"]["size"] <= status["cache"]["limit"]
    assert all(disk["workers"][0]["errors"] == 0 for disk in status["disks"])


def test_disk_that_comes_late_gets_memory(agents: list[Agent], mount: Mounts, vm: Path) -> None:
    """One disk has taken nearly all memory and rests; the readers of another must not wait."""
    for name in ("a", "b"):
        make_vmfs(vm / f"{name}.vmdk", noise(name, SIZE))
    found = mount(vm, "cache_size=4M")
    agents[0].send("hammer", found.path("a/disk.raw"), str(vm / "a-flat.vmdk"), 99, 50)
    assert agents[0].receive() == ""
    for number, agent in enumerate(agents):
        agent.send("hammer", found.path("b/disk.raw"), str(vm / "b-flat.vmdk"), number, 100)
    assert [agent.receive(30) for agent in agents] == [""] * READERS


def test_memory_that_is_given_up_wakes_who_waits(mount: Mounts, vm: Path) -> None:
    """The only frame of a disk is in small pieces, and one reader, alone, wants a large one."""
    for name in ("a", "b"):
        make_vmfs(vm / f"{name}.vmdk", noise(name, SIZE))
    found = mount(vm, "cache_size=4M")
    found.ask("close", found.open("b/disk.raw"))
    assert len(found.content("a/disk.raw")) == SIZE
    fd = found.open("b/disk.raw")
    found.ask("posix_fadvise", fd, 0, 0, os.POSIX_FADV_RANDOM)
    for round_ in range(8):
        for offset, size in ((20 * MIB, 4096), (0, MIB), (30 * MIB, 4096)):
            here = offset + round_ * MIB
            data = found.ask("pread", fd, size, here, timeout=20)
            assert data == noise("b", SIZE)[here : here + size]
