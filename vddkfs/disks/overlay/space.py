"""The segment files of a fork, and which of their places are free.

Place ``n`` is 4 KiB of segment ``n // places of a segment``. Segments grow in steps, each allocated
before any of it is used, so that a full disk is met there and not by a write.
"""

import errno
import os
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

import msgspec

from vddkfs.disks.overlay.files import FULL, Files, read_all, told, write_all
from vddkfs.disks.overlay.table import BLOCK
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import OverlayError

MIB: Final = 1024 * 1024
_COUNT_BITS: Final = 24
_MOST: Final = 1 << _COUNT_BITS
Places = tuple[int, int]
"""The first of some places that follow one another, and their number."""


class Limits(msgspec.Struct, frozen=True):
    """How much an overlay takes at once. *reserve*, *log_room* and *segment_bytes* are in bytes,
    the rest in blocks, *pending* in runs.

    *reserve* stays free on the file system. *grow* is a step of a segment. *spare* places are never
    given to blocks that have none: blocks that have one are rewritten by way of them, so several
    pieces of a write must find room there. A commit is due when *pending* runs were changed since
    the last, or *retired* places became unused.
    """

    reserve: int = 64 * MIB
    grow: int = 16_384
    spare: int = 1024
    piece: int = 256
    segment_bytes: int = 1024 * 1024 * MIB
    log_room: int = 4 * MIB
    pending: int = 32_768
    retired: int = 65_536


class FreePlaces:
    """Places that nothing refers to. *count* is how many. Not for several threads at once."""

    def __init__(self) -> None:
        self._runs = array("Q")
        self.count = 0

    def add(self, places: Iterable[Places]) -> None:
        """Add *places*, joined where they follow one another."""
        runs = self._runs
        first = total = 0
        for place, count in sorted(places):
            self.count += count
            if total and place == first + total:
                total += count
                continue
            self._put(runs, first, total)
            first, total = place, count
        self._put(runs, first, total)

    def _put(self, runs: "array[int]", first: int, total: int) -> None:
        while total:
            count = min(total, _MOST)
            runs.append(first << _COUNT_BITS | count - 1)
            first, total = first + count, total - count

    def take(self, count: int) -> list[Places]:
        """Return *count* places, at most as many as there are."""
        self.count -= count
        taken = []
        while count:
            run = self._runs.pop()
            first, there = run >> _COUNT_BITS, (run & _MOST - 1) + 1
            used = min(there, count)
            if there > used:
                self._runs.append(first + used << _COUNT_BITS | there - used - 1)
            taken.append((first, used))
            count -= used
        return taken


class Segments:
    """The segment files in *folder*. *size* is how many places there are in all.

    ``open`` comes first, ``close`` last. ``grow`` is called by one thread at a time; reading and
    writing places that exist by any.
    """

    def __init__(self, files: Files, folder: str, limits: Limits) -> None:
        self._files = files
        self._folder = folder
        self._limits = limits
        self._each = limits.segment_bytes // BLOCK
        self._fds: list[int] = []
        self._dirty: set[int] = set()
        self.size = 0

    def open(self, *, read_only: bool = False) -> None:
        """Open the segments that are there. Raises OverlayError."""
        with told(self._folder, "reading"):
            count = sum(name.startswith("segment-") for name in self._files.names(self._folder))
        for number in range(count):
            with told(self._name(number), "opening"):
                self._fds.append(self._files.open(self._name(number), read_only=read_only))
                size = min(self._files.size(self._fds[-1]) // BLOCK, self._each)
            self.size = number * self._each + size
        if not read_only:
            # A killed process may have made them longer just before.
            self._dirty.update(range(count))

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self._fds:
            with suppress(OSError):
                self._files.close(fd)
        self._fds = []

    def grow(self, least: int) -> Places:
        """Allocate *least* places, or as many as the segment can still have; return them.

        Raises OverlayError with errno ENOSPC if that leaves less free than the reserve.
        """
        number, used = divmod(self.size, self._each)
        at = self._name(number)
        free = self._files_free() - self._limits.reserve
        count = min(self._limits.grow, self._each - used, max(0, free) // BLOCK)
        if count < min(least, self._each - used):
            raise self._full(least * BLOCK)
        try:
            if number == len(self._fds):
                self._fds.append(self._files.open(at, create=True))
                self._files.sync_folder(self._folder)
            self._files.allocate(self._fds[number], used * BLOCK, count * BLOCK)
            # A commit makes the spare places last too.
            self._dirty.add(number)
        except OSError as error:
            if error.errno in FULL:
                raise self._full(least * BLOCK) from error
            with told(at, "growing"):
                raise
        first, self.size = self.size, self.size + count
        return first, count

    def check_free(self, size: int) -> None:
        """Raise OverlayError, ENOSPC, if *size* bytes would leave less free than the reserve."""
        if self._files_free() < size + self._limits.reserve:
            raise self._full(size)

    def _files_free(self) -> int:
        with told(self._folder, "asking for its free space"):
            return self._files.free(self._folder)

    def _full(self, size: int) -> OverlayError:
        free = self._files_free()
        return OverlayError(
            f"{printable(self._folder)}: no space for more changed blocks: {size // 1024} KiB are "
            f"needed, {free // 1024} KiB are free there and {self._limits.reserve // 1024} KiB of "
            "them are kept free",
            advice="free space there; what is in the overlay stays readable and writable",
            errno=errno.ENOSPC,
        )

    def write(self, data: memoryview, place: int) -> None:
        """Write *data*, whole blocks, to the places from *place* on. Raises OverlayError."""
        for number, at, begin, end in self._split(place, len(data)):
            with told(self._name(number), f"writing at byte {at}"):
                write_all(self._files, self._fds[number], data[begin:end], at)
                # Not before: who takes the number then would flush without this write.
                self._dirty.add(number)

    def read(self, into: memoryview, place: int, skip: int = 0) -> None:
        """Fill *into* from byte *skip* of *place* on. Raises OverlayError."""
        for number, at, begin, end in self._split(place, len(into), skip):
            with told(self._name(number), f"reading at byte {at}"):
                read_all(self._files, self._fds[number], into[begin:end], at)

    def _split(self, place: int, size: int, skip: int = 0) -> Iterator[tuple[int, int, int, int]]:
        """Yield (segment, offset there, begin, end) of *size* bytes."""
        begin, each = 0, self._each * BLOCK
        start = place * BLOCK + skip
        while begin < size:
            number, at = divmod(start + begin, each)
            end = min(size, begin + each - at)
            yield number, at, begin, end
            begin = end

    def take_dirty(self) -> set[int]:
        """Return the segments that were written since the last call."""
        # It stays the same set: who is about to put a number into it may have found it already.
        dirty = set(self._dirty)
        self._dirty -= dirty
        return dirty

    def put_back(self, dirty: set[int]) -> None:
        """Let *dirty*, which could not be flushed yet, be returned by ``take_dirty`` again."""
        self._dirty |= dirty

    def sync(self, numbers: Iterable[int] | None = None) -> None:
        """Return when what was written to the segments *numbers*, or to any, is on the disk.

        Raises OverlayError.
        """
        for number in sorted(range(len(self._fds)) if numbers is None else numbers):
            with told(self._name(number), "flushing"):
                self._files.sync(self._fds[number])

    def _name(self, number: int) -> str:
        return os.path.join(self._folder, f"segment-{number:04}")


def unused(size: int, used: Iterable[Places]) -> tuple[list[Places], Places | None]:
    """Return what of *size* places is not in *used*, and the first of those that overlap or lie
    outside, or None if all is well."""
    taken = bytearray(size)
    for place, count in used:
        if place + count > size or taken.count(1, place, place + count):
            return [], (place, count)
        taken[place : place + count] = b"\1" * count
    free, at = [], taken.find(0)
    while at >= 0:
        end = taken.find(1, at)
        end = size if end < 0 else end
        free.append((at, end - at))
        at = taken.find(0, end)
    return free, None
