"""A source of sectors that answers when the test says so."""

import mmap
import random
import struct
from collections.abc import Iterator

import pytest

from vddkfs.engines.base import SECTOR
from vddkfs.engines.requests import ReadRequest
from vddkfs.errors import VddkfsError

_STAMP = struct.Struct("<QQQQ")


def stamp(image: int, sector: int, version: int) -> bytes:
    """Return one sector that tells where and when it is from."""
    return _STAMP.pack(image, sector, version, ~sector & (2**64 - 1)) * (SECTOR // _STAMP.size)


class FakeSource:
    """Stands for a worker: requests wait until ``perform`` reads and ``answer`` tells."""

    def __init__(self) -> None:
        self.version = 0
        self.waiting: list[ReadRequest] = []
        self.performed: list[ReadRequest] = []
        self.requests: list[tuple[int, int, int, bool]] = []
        self.maps: dict[int, mmap.mmap] = {}
        self.eager = False
        self.polls = 0

    def submit_read(self, request: ReadRequest) -> None:
        self.requests.append((request.image, request.sector, request.count, request.direct))
        self.waiting.append(request)
        # A real worker may write from now on: whoever still reads there reads this.
        area = self.maps[request.target.chunk_number]
        start = request.target.offset
        area[start : start + request.count * SECTOR] = b"\xee" * (request.count * SECTOR)
        if self.eager:
            self.answer_all()

    def poll(self) -> None:
        self.polls += 1

    def lend(self, number: int, fd: int, size: int) -> None:
        assert number not in self.maps, "a chunk is lent once"
        self.maps[number] = mmap.mmap(fd, size)

    async def take_back(self, number: int) -> bool:
        self.maps.pop(number).close()
        return True

    def perform(self, request: ReadRequest) -> None:
        """Write what the source has now into the request's slot."""
        self.waiting.remove(request)
        area = self.maps[request.target.chunk_number]
        data = b"".join(
            stamp(request.image, request.sector + n, self.version) for n in range(request.count)
        )
        area[request.target.offset : request.target.offset + len(data)] = data
        self.performed.append(request)

    def answer(self, request: ReadRequest, error: VddkfsError | None = None) -> None:
        """Tell that a performed request is done."""
        self.performed.remove(request)
        request.done(error)

    def answer_all(self) -> None:
        """Perform and answer everything."""
        for request in list(self.waiting):
            self.perform(request)
        for request in list(self.performed):
            self.answer(request)

    def step(self, chooser: random.Random) -> None:
        """Perform or answer one request, chosen at random."""
        choices = [*self.waiting, *self.performed]
        if choices:
            chosen = chooser.choice(choices)
            if chosen in self.waiting:
                self.perform(chosen)
            else:
                self.answer(chosen)


@pytest.fixture
def source() -> Iterator[FakeSource]:
    fake = FakeSource()
    yield fake
    for area in fake.maps.values():
        area.close()


@pytest.fixture
def make_stamp() -> object:
    return stamp
