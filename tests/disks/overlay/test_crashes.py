"""A crash between any two system calls leaves each block old or new, and what was flushed new."""

import random

import pytest

from tests.disks.overlay.crashing import (
    BELOW,
    CAPACITY,
    Expected,
    Host,
    content,
    lived,
    open_overlay,
)
from tests.disks.overlay.memory import MemoryDisk
from vddkfs.disks.overlay.store import Store
from vddkfs.errors import OverlayError

STEPS = 60


def look(disk: MemoryDisk, host: Host | None) -> list[int | str]:
    """Open what a crash left; return what is wrong with it, and write on it a little."""
    expected = Expected() if host is None else host.expected
    try:
        overlay = open_overlay(disk)
        fork = overlay.fork("disk/0", CAPACITY)
        image = content(fork)
    except OverlayError as error:
        return [str(error)]
    found: list[int | str] = [*expected.wrong(image)]
    if not found:
        data = random.Random(1).randbytes(5 * 4096)
        fork.write(4096 * 3 + 7, data, lambda offset, size: BELOW[offset : offset + size])
        overlay.close()
        again = content(open_overlay(disk).fork("disk/0", CAPACITY))
        assert again == image[: 4096 * 3 + 7] + data + image[4096 * 8 + 7 :]
    return found


def calls(seed: int) -> int:
    disk = MemoryDisk()
    host = lived(disk, seed, STEPS)
    assert host is not None
    assert host.fork._store._journal._generation, "the map was compacted"
    return disk.calls


@pytest.mark.parametrize("seed", range(3))
def test_killed_between_any_two_calls(seed: int) -> None:
    total = calls(seed)
    assert total > 150
    for left in range(total):
        disk = MemoryDisk()
        disk.left, disk.part = left, random.Random(left).random()
        host = lived(disk, seed, STEPS)
        assert look(disk.after_kill(), host) == [], f"killed at call {left}"


def test_killed_again_while_it_recovers() -> None:
    disk = MemoryDisk()
    disk.left = calls(5) * 2 // 3
    host = lived(disk, 5, STEPS)
    for left in range(60):
        disk = disk.after_kill()
        disk.left = left
        lived(disk, 0, 0)
    assert look(disk.after_kill(), host) == []


def cut(seed: int, every: int, draws: int) -> tuple[int, list[int | str]]:
    """Cut the power at every so many calls; return how often, and what was wrong."""
    problems: list[int | str] = []
    cuts = 0
    for left in range(seed % every, calls(seed), every):
        for number in range(draws):
            disk = MemoryDisk()
            disk.left, disk.part = left, 1
            host = lived(disk, seed, STEPS)
            problems += look(disk.after_power_loss(random.Random(left * 100 + number)), host)
            cuts += 1
    return cuts, problems


@pytest.mark.parametrize("seed", range(4))
def test_power_lost_between_any_two_calls(seed: int) -> None:
    cuts, problems = cut(seed, 2, 3)
    assert cuts > 200
    assert problems == []


def test_power_lost_after_a_kill() -> None:
    """What was shown once after a kill stays, though nobody flushed it before."""
    for left in range(calls(6)):
        disk = MemoryDisk()
        disk.left, disk.part = left, 1
        lived(disk, 6, STEPS)
        disk = disk.after_kill()
        shown = content(open_overlay(disk).fork("disk/0", CAPACITY))
        disk = disk.after_power_loss(random.Random(left))
        assert content(open_overlay(disk).fork("disk/0", CAPACITY)) == shown, f"at call {left}"


def test_power_lost_without_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: the same, but nothing is flushed before the map leads there."""
    plain = Store._record

    def record(self: Store, *arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(self._segments, "sync", lambda numbers=None: None)
            plain(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "_record", record)
    _, problems = cut(1, 4, 2)
    assert len(problems) > 50


def test_places_freed_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: a place is used again before the map on the disk has let it go."""

    def retire(self: Store, places: list[tuple[int, int]]) -> None:
        self._free.add(places)

    monkeypatch.setattr(Store, "_retire", retire)
    _, problems = cut(1, 2, 1)
    assert problems
