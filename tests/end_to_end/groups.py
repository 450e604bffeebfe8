"""A control group that has little memory, of version 1 or 2, for the time of a test."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.mounting import until

_TOP = Path("/sys/fs/cgroup")
_CAP_SYS_RESOURCE = 24


class Group:
    """A control group at *place*.

    *waits*: who needs memory in it waits until its own pages are written (version 1), a daemon
    that has to write them too, unless the kernel lets it be an exception (PR_SET_IO_FLUSHER).
    """

    def __init__(self, place: Path, waits: bool) -> None:
        self.place = place
        self.waits = waits

    def add(self, *pids: int) -> None:
        """Take processes in; what they use from now on counts, and so do their children."""
        for pid in pids:
            (self.place / "cgroup.procs").write_text(str(pid))

    def limit(self, size: int) -> None:
        """Let its processes have *size* bytes of memory."""
        name = "memory.limit_in_bytes" if self.waits else "memory.max"
        (self.place / name).write_text(str(size))

    def processes(self) -> list[str]:
        return (self.place / "cgroup.procs").read_text().split()

    def reached(self) -> int:
        """Say how often the limit was met: no reading back without it means anything."""
        for name, word in (("memory.events", "max"), ("memory.failcnt", "")):
            with contextlib.suppress(FileNotFoundError):
                lines = (self.place / name).read_text().splitlines()
                return sum(int(line.split()[-1]) for line in lines if line.startswith(word))
        raise AssertionError("the group does not tell")


def may_flush() -> bool:
    """Say whether the kernel lets this user's processes be such an exception."""
    found = re.search(r"^CapEff:\s+(\w+)$", Path("/proc/self/status").read_text(), re.M)
    return found is not None and bool(int(found[1], 16) >> _CAP_SYS_RESOURCE & 1)


@contextlib.contextmanager
def memory_group() -> Iterator[Group]:
    """Have a group whose memory can be limited; skips where there are none.

    Its processes must have ended before it is left.
    """
    version1 = _TOP / "memory/memory.limit_in_bytes"
    version2 = _TOP / "cgroup.subtree_control"
    if version1.exists():
        top = _TOP / "memory"
    elif version2.exists() and "memory" in version2.read_text().split():
        top = _TOP
    else:
        pytest.skip("absent: control groups with a limit of memory")
    group = Group(top / f"vddkfs-test-{os.getpid()}", waits=top != _TOP)
    try:
        group.place.mkdir()
    except OSError as error:
        pytest.skip(f"absent: a control group of one's own ({error})")
    try:
        yield group
        until(lambda: not group.processes(), what="the end of the group's processes")
    finally:
        with contextlib.suppress(OSError):
            group.place.rmdir()
