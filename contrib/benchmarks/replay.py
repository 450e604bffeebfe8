"""Traces through a cache of a given size and policy: what would have been there, and what not.

The units are those of the sector cache: a scattered read fetches a block of 64 KiB, one of a
stream, or of more than a block, a frame of 1 MiB, unless what it wants is there. Streams are told
apart as the product does. It is simpler in this: nothing is fetched ahead or clustered, so that the
first read of a unit is a miss; nothing is under way for a while; a block in a frame is kept beside
it until it goes by itself; and all disks share one cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.policies import BLOCK, Policy, Request, Unit
from benchmarks.traced import Read
from vddkfs.cache.readahead import Streams
from vddkfs.cache.worth import Worth

FRAME: Final = 16
"""Blocks that one fetches who goes forward."""


@dataclass
class Outcome:
    """What became of a trace. A hit is a request all of whose bytes were there."""

    requests: int = 0
    hits: int = 0
    bytes: int = 0
    hit_bytes: int = 0
    fetched_bytes: int = 0


def requests_of(reads: Sequence[Read]) -> list[Request]:
    """Return the reads that the cache has to answer, and whether they belong to a stream."""
    capacity = max((read.offset + read.size for read in reads), default=0)
    files: dict[int, Streams] = {}
    images: dict[tuple[str, int], int] = {}
    found = []
    for read in reads:
        if read.how == "direct":
            continue
        if read.handle not in files:
            files[read.handle] = Streams(capacity, 0, Worth())
        end = read.offset + read.size
        sequential = files[read.handle].access(read.offset, end).sequential
        if read.how != "hole":
            image = images.setdefault((read.disk, read.image), len(images))
            found.append(Request(image, read.offset, end, sequential))
    return found


def footprint(requests: Sequence[Request]) -> int:
    """Return how many blocks *requests* touch."""
    return len({(request.image, block) for request in requests for block in request.blocks})


class Replay:
    """A cache of *capacity* blocks. *demoting*: the policy hears what streams are through with."""

    def __init__(self, policy: Policy, capacity: int, demoting: bool = True) -> None:
        self._policy = policy
        self._capacity = capacity
        self._demoting = demoting
        self._size = 0
        self._blocks: dict[tuple[int, int], Unit] = {}
        self._frames: dict[tuple[int, int], Unit] = {}

    def run(self, requests: Sequence[Request]) -> Outcome:
        """Read it all."""
        outcome = Outcome(requests=len(requests))
        for number, request in enumerate(requests):
            self._policy.begin(number)
            outcome.bytes += request.end - request.start
            outcome.hits += self._read(request, outcome)
        return outcome

    def _read(self, request: Request, outcome: Outcome) -> bool:
        """Read one; say whether all of it was there."""
        image, position, end, sequential = request
        hit = True
        while position < end:
            block = position // BLOCK
            unit = self._blocks.get((image, block)) or self._frames.get((image, block // FRAME))
            if unit is None:
                hit = False
                large = sequential or end - position > BLOCK
                unit = self._fetch(image, block, FRAME if large else 1)
                outcome.fetched_bytes += unit.weight * BLOCK
                until = min(end, unit.end)
                unit.reach = until
            else:
                until = min(end, unit.end)
                unit.read(position, until)
                self._policy.read(unit)
                outcome.hit_bytes += until - position
            if self._demoting and sequential and unit.weight == FRAME and until == unit.end:
                self._policy.demote(unit)
            position = until
        return hit

    def _fetch(self, image: int, block: int, weight: int) -> Unit:
        while self._size + weight > self._capacity:
            gone = self._policy.evict()
            self._size -= gone.weight
            if gone.weight == FRAME:
                del self._frames[gone.image, gone.first // FRAME]
            else:
                del self._blocks[gone.image, gone.first]
        unit = Unit(image, block - block % weight, weight)
        if weight == FRAME:
            self._frames[image, block // FRAME] = unit
        else:
            self._blocks[image, block] = unit
        self._size += weight
        self._policy.insert(unit)
        return unit
