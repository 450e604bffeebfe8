"""A control group that has little memory, of version 1 or 2, for the time of a test."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.mounting import until

_TOP = Path("/sys/fs/cgroup")


class Group:
    """A control group at *place*."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def add(self, *pids: int) -> None:
        """Take processes in; what they use from now on counts, and so do their children."""
        for pid in pids:
            (self.place / "cgroup.procs").write_text(str(pid))

    def processes(self) -> list[str]:
        return (self.place / "cgroup.procs").read_text().split()

    def reached(self) -> int:
        """Say how often the limit was met: no reading back without it means anything."""
        for name, word in (("memory.events", "max"), ("memory.failcnt", "")):
            with contextlib.suppress(FileNotFoundError):
                lines = (self.place / name).read_text().splitlines()
                return sum(int(line.split()[-1]) for line in lines if line.startswith(word))
        raise AssertionError("the group does not tell")


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Group]:
    """Have a group that may use *limit* bytes of memory; skips where there are none.

    Its processes must have ended before it is left.
    """
    version1 = _TOP / "memory/memory.limit_in_bytes"
    version2 = _TOP / "cgroup.subtree_control"
    if version1.exists():
        top, name = _TOP / "memory", version1.name
    elif version2.exists() and "memory" in version2.read_text().split():
        top, name = _TOP, "memory.max"
    else:
        pytest.skip("absent: control groups with a limit of memory")
    group = Group(top / f"vddkfs-test-{os.getpid()}")
    try:
        group.place.mkdir()
    except OSError as error:
        pytest.skip(f"absent: a control group of one's own ({error})")
    try:
        (group.place / name).write_text(str(limit))
        yield group
        until(lambda: not group.processes(), what="the end of the group's processes")
    finally:
        with contextlib.suppress(OSError):
            group.place.rmdir()
