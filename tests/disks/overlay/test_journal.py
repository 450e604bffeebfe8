"""What an attempt to compact has left in ``map.next`` is never taken for the map."""

import errno
from array import array
from collections.abc import Iterator

import pytest

from tests.disks.overlay.memory import MemoryDisk
from vddkfs.disks.overlay import journal
from vddkfs.disks.overlay.journal import Journal
from vddkfs.disks.overlay.records import enter
from vddkfs.disks.overlay.table import BLOCK, ZERO, Run

FORK = b"f" * 16
CAPACITY = 100_000 * BLOCK
PART = 250
"""Entries of a transaction here: in one page, as all others are."""


class Reader:
    """The map as it is read."""

    def __init__(self, disk: MemoryDisk) -> None:
        self.places: dict[int, int] = {}
        self.journal = Journal(disk, "/", FORK, CAPACITY, 1 << 20)
        self.journal.open(self._apply)

    def _apply(self, block: int, count: int, place: int) -> None:
        for number in range(count):
            self.places[block + number] = place + number


def scattered(count: int, place: int) -> Iterator[list[Run]]:
    """Return *count* runs, a transaction of them at a time."""
    for first in range(0, count, PART):
        yield [Run(2 * n, 1, place + n) for n in range(first, min(first + PART, count))]


def appended(made: Journal, block: int, place: int) -> None:
    entries = array("Q")
    enter(entries, block, 1, place, ZERO)
    made.append(entries)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> MemoryDisk:
    monkeypatch.setattr(journal, "MOST_ENTRIES", PART)
    disk = MemoryDisk()
    made = Journal(disk, "/", FORK, CAPACITY, 1 << 20)
    made.create()
    made.close_files()
    return disk


@pytest.mark.parametrize("later", [0, 1, 3])
def test_a_process_that_died_while_it_compacted(disk: MemoryDisk, later: int) -> None:
    first = Reader(disk).journal
    disk.fail["rename"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        first.compact(scattered(5 * PART, 5000), lambda: None)
    left = disk.after_kill()
    second = Reader(left).journal
    # Fewer runs than before: what was scattered was written anew, one after another.
    second.compact(scattered(2 * PART, 0), lambda: None)
    for number in range(later):
        appended(second, 2 * number, 20_000 + number)
    wanted = {2 * n: n for n in range(2 * PART)} | {2 * n: 20_000 + n for n in range(later)}
    assert Reader(left.after_kill()).places == wanted


def test_an_attempt_that_failed_and_the_next(disk: MemoryDisk) -> None:
    made = Reader(disk).journal
    disk.fail["link"] = errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
        made.compact(scattered(5 * PART, 5000), lambda: None)
    del disk.fail["link"]
    made.compact(scattered(2 * PART, 0), lambda: None)
    assert Reader(disk.after_kill()).places == {2 * n: n for n in range(2 * PART)}
