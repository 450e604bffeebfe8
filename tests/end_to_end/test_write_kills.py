"""kill -9 of the daemon in the middle of writes: what fsync has answered is there afterwards.

What it had not answered is there or not: wholly, in pieces of 4 KiB of an overlay, and of a sector
of a base.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end import logging_writer, storms
from tests.end_to_end.logging_writer import ranges
from tests.end_to_end.mounting import Mount, Mounts, alive, children, sha256, succeed, until
from tests.end_to_end.vms import MIB, SECTOR, make_vmdk, make_vmfs, sparse_noise

pytestmark = storms.MARKS
SIZE = 8 * MIB
PARTS = 2
ROUNDS = 5
FILE = "disk/disk.raw"


class Writer:
    """A process that writes one *part* of the disk, and what it has said."""

    def __init__(self, part: int) -> None:
        self.start, self.size = part * SIZE // PARTS, SIZE // PARTS
        self.begun = self.synced = 0
        self.lasting: dict[int, int] = {}
        """The turn that each sector has at least, by its number."""
        self._at = 0
        self._process: subprocess.Popen[str] | None = None

    def begin(self, mount: Mount, how: str) -> None:
        """Go on with the next turn."""
        self._at = self.begun
        script = Path(logging_writer.__file__)
        words = [mount.path(FILE), self.start, self.size, self.begun + 1, how]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script), *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def hear(self, turns: int) -> None:
        """Listen until so many more turns are synced."""
        wanted = self.synced + turns
        assert self._process is not None
        assert self._process.stdout is not None
        while self.synced < wanted:
            line = self._process.stdout.readline()
            assert line, self._process.communicate()
            self._take(line)

    def end(self) -> None:
        """Hear the rest; it must have ended because the mount did."""
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        # Not communicate(), which forgets what readline() has read ahead.
        with self._process:
            for line in self._process.stdout:
                self._take(line)
            why = self._process.stderr.read()
        assert why.startswith("ended: "), why
        for turn in range(self._at + 1, self.synced + 1):
            self._count(turn, self.lasting)

    def _take(self, line: str) -> None:
        what, turn = line.split()
        setattr(self, what, int(turn))

    def _count(self, turn: int, into: dict[int, int]) -> None:
        for offset, length in ranges(turn, self.start, self.size):
            for sector in range(offset // SECTOR, (offset + length) // SECTOR):
                into[sector] = turn

    def judge(self, content: bytes, before: bytes, unit: int) -> None:
        """Compare what is there with what may be there; it is what lasts from now on."""
        allowed = {sector: {turn} for sector, turn in self.lasting.items()}
        for turn in range(self.synced + 1, self.begun + 1):
            newer: dict[int, int] = {}
            self._count(turn, newer)
            for sector in newer:
                allowed.setdefault(sector, {0}).add(turn)
        for at in range(self.start, self.start + self.size, unit):
            piece, turns = content[at : at + unit], allowed.get(at // SECTOR, {0})
            right = {
                turn: logging_writer.filled(turn, unit) if turn else before[at : at + unit]
                for turn in turns
            }
            found = [turn for turn, data in right.items() if data == piece]
            assert found, f"{unit} bytes at {at} are {piece[:8]!r}, of none of {sorted(turns)}"
            if found[0]:
                self.lasting.update(
                    dict.fromkeys(range(at // SECTOR, (at + unit) // SECTOR), found[0])
                )
        self.synced = self.begun


def kill(mount: Mount) -> None:
    """Kill the daemon alone; its workers end by themselves, and let go of the disk."""
    processes = (mount.pid, *children(mount.pid))
    os.kill(mount.pid, signal.SIGKILL)
    until(lambda: not any(map(alive, processes)), what="the end of the daemon and its workers")
    mount.destroy()


def kill_again_and_again(
    begin: Callable[[], Mount], before: bytes, unit: int, look: Callable[[], None]
) -> Mount:
    """Kill the daemon while it is written to, mount again, and judge; return the last mount."""
    writers = [Writer(part) for part in range(PARTS)]
    end = time.monotonic() + storms.SECONDS
    mount, number = begin(), 0
    while number < ROUNDS or time.monotonic() < end:
        for writer in writers:
            writer.begin(mount, ("direct", "buffered")[number % 2])
        writers[0].hear(1 + number % 4)
        kill(mount)
        for writer in writers:
            writer.end()
        look()
        mount = begin()
        content = mount.content(FILE)
        assert sha256(content) == mount.sha256(FILE, True)
        for writer in writers:
            writer.judge(content, before, unit)
        number += 1
    assert sum(writer.begun for writer in writers) > ROUNDS
    return mount


def test_overlay(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    data = sparse_noise("below", SIZE)
    path = make_vmdk(vm / "disk.vmdk", data)
    stored = path.read_bytes()
    folder = f"overlay={tmp_path / 'overlay'}"
    kill_again_and_again(lambda: mount(vm, folder), data, 4096, lambda: None)
    assert path.read_bytes() == stored


@pytest.mark.parametrize("flat", [False, True], ids=["sparse", "flat"])
def test_base(mount: Mounts, vm: Path, flat: bool) -> None:
    data = sparse_noise("base", SIZE)
    path = (make_vmfs if flat else make_vmdk)(vm / "disk.vmdk", data)

    def look() -> None:
        succeed("qemu-img", "check", "-f", "vmdk", path)

    kill_again_and_again(lambda: mount(vm, "rw"), data, SECTOR, look)
