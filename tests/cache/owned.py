"""Disks whose owner writes to them, and workers that read them, hang, die and scribble.

``Content`` is the model: it knows what each sector held, and since when the cache may not know it.
"""

import mmap
import struct
from array import array
from collections.abc import Callable
from functools import cache
from operator import ge
from typing import Final, Protocol

from tests.cache.stepped import Gate
from vddkfs.cache.arena import FRAME
from vddkfs.engines.base import SECTOR, MapExtent, MapSlice
from vddkfs.engines.protocol import MapQuery
from vddkfs.engines.requests import ReadRequest
from vddkfs.errors import VddkfsError, WorkerFailed

_WORDS: Final = SECTOR // 8
_STAMPED: Final = (0, 21, 42, 63)
"""The words of a sector that have the version in them; all have the image and the sector."""
_VERSION: Final = 32
_BEFORE: Final = memoryview(b"\xee" * FRAME)
_WILD: Final = memoryview(b"\xdd" * FRAME)


@cache
def _unwritten(image: int, sectors: int) -> bytes:
    return b"".join(struct.pack("<Q", image << 48 | n) * _WORDS for n in range(sectors))


class Content:
    """What there is of *image* in its source: version 0 of every sector, until somebody writes."""

    def __init__(self, image: int, capacity: int) -> None:
        self.image = image
        self.capacity = capacity
        sectors = capacity // SECTOR
        self.bytes = bytearray(_unwritten(image, sectors))
        self._writes: list[tuple[int, int]] = [(0, sectors)]
        self._versions = array("I", bytes(4 * sectors))
        self._oldest = array("I", bytes(4 * sectors))

    def write(self, start: int, end: int) -> None:
        """Write the sectors of [*start*, *end*), as their owner does."""
        first, last = start // SECTOR, -(-end // SECTOR)
        version = len(self._writes)
        self._writes.append((first, last))
        self._versions[first:last] = array("I", [version]) * (last - first)
        base = self.image << 48 | version << _VERSION
        _stamp(memoryview(self.bytes), array("Q", range(base + first, base + last)), first)

    def forget(self, start: int, end: int) -> None:
        """Note that whoever reads [*start*, *end*) from now on sees nothing older than now."""
        first, last = start // SECTOR, -(-end // SECTOR)
        self._oldest[first:last] = self._versions[first:last]

    def promise(self, since: "array[int]") -> None:
        """Note that whoever reads from now on sees nothing older than these versions."""
        self._oldest = array("I", map(max, self._oldest, since))

    def oldest(self, start: int, end: int, fresh: bool) -> "array[int]":
        """Return the oldest version of each sector that a reader may see who begins now.

        *fresh* is for one who goes past the cache.
        """
        bounds = self._versions if fresh else self._oldest
        return bounds[start // SECTOR : -(-end // SECTOR)]

    def check(self, found: memoryview | bytes, start: int, end: int, oldest: "array[int]") -> None:
        """See every byte of what a reader of [*start*, *end*) has got."""
        assert len(found) == end - start, f"{len(found)} bytes for [{start}, {end})"
        # As bytes: views are compared one by one, which takes twenty times as long.
        if bytes(found) == self.bytes[start:end]:
            return
        data = memoryview(found)
        head = min(-start % SECTOR, end - start)
        body = (end - start - head) // SECTOR * SECTOR
        if head:
            self._check_part(data[:head], start, oldest[0])
        if head + body < end - start:
            self._check_part(data[head + body :], start + head + body, oldest[-1])
        if body:
            first = -(-start // SECTOR)
            self._check_sectors(data[head : head + body], first, oldest[bool(head) :])

    def _check_sectors(self, data: memoryview, first: int, oldest: "array[int]") -> None:
        """Check whole sectors, from *first* on. In steps that take each a line of C."""
        versions = data.cast("H")[2 :: SECTOR // 2].tolist()
        base = self.image << 48
        words = [base | version << _VERSION | n for n, version in enumerate(versions, first)]
        blank = memoryview(_unwritten(self.image, self.capacity // SECTOR))
        told = bytearray(blank[first * SECTOR : first * SECTOR + len(data)])
        _stamp(memoryview(told), array("Q", words), 0)
        place = f"{len(versions)} sectors from {first} of image {self.image}"
        assert data.tobytes() == told, f"{place}: of somewhere else, or torn"
        if not all(map(ge, versions, oldest)):
            for n, (version, least) in enumerate(zip(versions, oldest, strict=True), first):
                assert version >= least, f"sector {n} of image {self.image}: {version} < {least}"
        for version in set(versions):
            last = len(versions) - 1 - versions[::-1].index(version)
            for n in (versions.index(version), last):
                assert self._had(first + n, version), f"{place}: it never had {version}"

    def _check_part(self, part: memoryview, start: int, oldest: int) -> None:
        """Check less than a sector: one of the versions of it must be this."""
        sector, skip = divmod(start, SECTOR)
        for version in range(len(self._writes) - 1, oldest - 1, -1):
            if self._had(sector, version):
                whole = bytearray(struct.pack("<Q", self.image << 48 | sector) * _WORDS)
                word = self.image << 48 | version << _VERSION | sector
                _stamp(memoryview(whole), array("Q", [word]), 0)
                if part == whole[skip : skip + len(part)]:
                    return
        raise AssertionError(
            f"sector {sector} of image {self.image} never was {part.tobytes().hex()[:99]} since "
            f"version {oldest}"
        )

    def _had(self, sector: int, version: int) -> bool:
        if version >= len(self._writes):
            return False
        first, last = self._writes[version]
        return first <= sector < last


def _stamp(place: memoryview, words: "array[int]", first: int) -> None:
    target = place.cast("Q")
    stamps = memoryview(words)
    for word in _STAMPED:
        target[first * _WORDS + word : (first + len(words)) * _WORDS : _WORDS] = stamps


class Place(Protocol):
    """A slot, as far as a worker knows it."""

    chunk_number: int
    offset: int


class Lost:
    """A process that was given up and is not gone: it may write to *places* until ``gone``."""

    def __init__(self) -> None:
        self.places: list[tuple[Place, int]] = []
        self.frees: list[Callable[[], None]] = []


class Worker:
    """Stands for a worker that reads *contents*, by number. What it is asked waits until
    ``perform`` reads and ``answer`` tells.
    """

    def __init__(self, contents: dict[int, Content], gate: Gate) -> None:
        self.contents = contents
        self.gate = gate
        self.waiting: list[ReadRequest] = []
        self.performed: list[ReadRequest] = []
        self.lost: list[Lost] = []
        self.late = Lost()
        """What the process that serves may write to although it has answered."""
        self.areas: dict[int, mmap.mmap] = {}
        self.moving: int | None = None
        """The chunk that is being taken back."""
        self.failures = 0

    @property
    def under_way(self) -> list[ReadRequest]:
        """What was asked and is not answered."""
        return [*self.waiting, *self.performed]

    # What the cache asks.

    def submit_read(self, request: ReadRequest) -> None:
        self._send(request)

    def poll(self) -> None:
        """Answers come when the test says so."""

    def lend(self, number: int, fd: int, size: int) -> None:
        assert number not in self.areas, "a chunk is lent once"
        self.areas[number] = mmap.mmap(fd, size)

    async def take_back(self, number: int) -> bool:
        if self.lost:
            return False
        self.moving = number
        try:
            good = await self.gate.passed()
        finally:
            self.moving = None
        if not good or self.lost:
            return False
        self.areas.pop(number).close()
        return True

    async def map(self, image: int, sector: int, query: MapQuery) -> MapSlice:
        """All is data: holes are another test's business."""
        end = sector + query.count
        return MapSlice((MapExtent(sector, query.count, True),), end)

    # What happens to it.

    def perform(self, request: ReadRequest) -> None:
        """Write what the source has now into the request's slot."""
        self.waiting.remove(request)
        start = request.sector * SECTOR
        content = memoryview(self.contents[request.image].bytes)
        self._put(request.target, content[start : start + request.count * SECTOR])
        self.performed.append(request)

    def answer(self, request: ReadRequest) -> None:
        """Tell that a performed request is done."""
        self.performed.remove(request)
        request.done(None)

    def perform_all(self) -> None:
        """Read all that was asked for."""
        for request in list(self.waiting):
            self.perform(request)

    def work(self, most: int = 99) -> None:
        """Do what was asked first."""
        for request in [*self.performed, *self.waiting][:most]:
            if request in self.waiting:
                self.perform(request)
            self.answer(request)

    def fail(self, request: ReadRequest, error: VddkfsError, late: bool) -> None:
        """Tell that a request cannot be done. It may be written to all the same, if *late*."""
        self._drop(request)
        self.failures += 1
        if late:
            self._move(request, self.late)
        request.done(error)

    def die(self) -> None:
        """Lose the process: the next one is asked for the same, the oldest first."""
        self._free(self.late)
        self.late = Lost()
        again = self.under_way
        self.waiting, self.performed = [], []
        for request in again:
            self._send(request)

    def hang(self) -> None:
        """Lose the process, which may still write to its slots."""
        lost, self.late = self.late, Lost()
        self.lost.append(lost)
        again = self.under_way
        self.waiting, self.performed = [], []
        for request in again:
            if self._move(request, lost):
                self._send(request)
            else:
                self.failures += 1
                request.done(WorkerFailed("the worker was lost"))

    def scribble(self) -> None:
        """Have everybody write who still may write to what nobody should look at."""
        for lost in [*self.lost, self.late]:
            for place, size in lost.places:
                self._put(place, _WILD[:size])

    def gone(self, number: int) -> None:
        """Have a hanging process end: until then it could write."""
        self.scribble()
        self._free(self.lost.pop(number % len(self.lost)))

    def close(self) -> None:
        for area in self.areas.values():
            area.close()

    def _drop(self, request: ReadRequest) -> None:
        (self.waiting if request in self.waiting else self.performed).remove(request)

    def _move(self, request: ReadRequest, lost: Lost) -> bool:
        lost.places.append((request.target, request.count * SECTOR))
        movable, free = request.move()
        lost.frees.append(free)
        return movable

    def _send(self, request: ReadRequest) -> None:
        # A real worker may write from now on: whoever still reads there reads this.
        self._put(request.target, _BEFORE[: request.count * SECTOR])
        self.waiting.append(request)

    def _put(self, place: Place, data: memoryview) -> None:
        offset = place.offset
        self.areas[place.chunk_number][offset : offset + len(data)] = data

    @staticmethod
    def _free(lost: Lost) -> None:
        lost.places.clear()
        for free in lost.frees:
            free()
