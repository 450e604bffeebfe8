"""Eviction policies that ``run eviction`` compares, the product's own among them.

LRU and LFU are those of cachetools. 2Q is that of Johnson and Shasha (VLDB 1994) with the sizes
that they recommend. Belady's knows the future; for units of two sizes, as here, it is not quite the
optimum, but far above what can be reached without that knowledge.
"""

import bisect
import heapq
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import cachetools

from vddkfs.cache.eviction import MOST_USES, EvictionCache

BLOCK: Final = 64 * 1024
"""Bytes that a scattered read fetches; the unit of weights and of the size of a cache."""
_NEVER: Final = 1 << 62

Key = tuple[int, int, int]


class Request(NamedTuple):
    """One read of [*start*, *end*) of *image*, in bytes; *sequential*: by one who goes forward."""

    image: int
    start: int
    end: int
    sequential: bool

    @property
    def blocks(self) -> range:
        """The blocks that it touches."""
        return range(self.start // BLOCK, -(-self.end // BLOCK))


class Unit:
    """What is fetched at once and kept: *weight* blocks of *image* from the block *first* on."""

    __slots__ = ("end", "first", "image", "key", "reach", "uses", "weight")

    def __init__(self, image: int, first: int, weight: int) -> None:
        self.key: Key = (image, first, weight)
        self.image = image
        self.first = first
        self.weight = weight
        self.end = (first + weight) * BLOCK
        self.reach = first * BLOCK
        self.uses = 0

    def read(self, start: int, end: int) -> None:
        """Note a read of a part of it. Going forward through it is no use, but the first one."""
        if start >= self.reach:
            self.reach = end
        elif self.uses < MOST_USES:
            self.uses += 1


class Policy(ABC):
    """What decides which unit goes."""

    @abstractmethod
    def begin(self, number: int) -> None:
        """Hear that request *number* comes now."""

    @abstractmethod
    def insert(self, unit: Unit) -> None:
        """Hear that *unit* is kept from now on."""

    @abstractmethod
    def read(self, unit: Unit) -> None:
        """Hear that a unit that is kept is read."""

    @abstractmethod
    def demote(self, unit: Unit) -> None:
        """Hear that a sequential reader is through with *unit*."""

    @abstractmethod
    def evict(self) -> Unit:
        """Choose one, and forget it."""


class Product(Policy):
    """The policy of the product."""

    def __init__(self) -> None:
        self._cache: EvictionCache[Key, Unit] = EvictionCache()

    def begin(self, number: int) -> None:
        """Need no time."""

    def insert(self, unit: Unit) -> None:
        """Insert it."""
        self._cache[unit.key] = unit

    def read(self, unit: Unit) -> None:
        """Need not hear of it: the unit counts."""

    def demote(self, unit: Unit) -> None:
        """Pass it on."""
        self._cache.demote(unit.key)

    def evict(self) -> Unit:
        """Have it choose; nothing is pinned here."""
        unit = self._cache.evict(_any)
        assert unit is not None
        return unit


def _any(_unit: Unit) -> bool:
    return True


class Demoting(Policy):
    """A policy that knows nothing of demotion: what is demoted, and not read again, goes before."""

    def __init__(self) -> None:
        self._demoted: OrderedDict[Unit, None] = OrderedDict()

    def begin(self, number: int) -> None:
        """Need no time."""

    def demote(self, unit: Unit) -> None:
        """Note it; the one that was demoted first goes first."""
        self._demoted[unit] = None
        self._demoted.move_to_end(unit)

    def read(self, unit: Unit) -> None:
        """Note that it is not through yet."""
        self._demoted.pop(unit, None)
        self.touch(unit)

    def evict(self) -> Unit:
        """Take a demoted one, or choose."""
        if self._demoted:
            unit, _ = self._demoted.popitem(last=False)
            self.take(unit)
            return unit
        return self.choose()

    @abstractmethod
    def touch(self, unit: Unit) -> None:
        """Hear that a unit that is kept is read."""

    @abstractmethod
    def take(self, unit: Unit) -> None:
        """Forget *unit*."""

    @abstractmethod
    def choose(self) -> Unit:
        """Choose one, and forget it."""


class Cachetools(Demoting):
    """A policy of cachetools."""

    def __init__(self, cache: cachetools.Cache[Key, Unit]) -> None:
        super().__init__()
        self._cache = cache

    def insert(self, unit: Unit) -> None:
        """Insert it."""
        self._cache[unit.key] = unit

    def touch(self, unit: Unit) -> None:
        """Look it up: that is a use."""
        self._cache.get(unit.key)

    def take(self, unit: Unit) -> None:
        """Remove it."""
        del self._cache[unit.key]

    def choose(self) -> Unit:
        """Have it choose."""
        return self._cache.popitem()[1]


class TwoQueues(Demoting):
    """2Q in a cache of *capacity* blocks.

    What is new passes through a FIFO of a quarter of the cache, however often it is used there. If
    it comes back while its key is remembered, it is in the other part, which is an LRU.
    """

    _IN: Final = 0.25
    _REMEMBERED: Final = 0.5

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._new: OrderedDict[Key, Unit] = OrderedDict()
        self._main: OrderedDict[Key, Unit] = OrderedDict()
        self._gone: OrderedDict[Key, int] = OrderedDict()
        self._new_weight = 0
        self._gone_weight = 0

    def insert(self, unit: Unit) -> None:
        """Insert it where it belongs."""
        weight = self._gone.pop(unit.key, 0)
        self._gone_weight -= weight
        if weight:
            self._main[unit.key] = unit
        else:
            self._new[unit.key] = unit
            self._new_weight += unit.weight

    def touch(self, unit: Unit) -> None:
        """Note it in the main part only."""
        if unit.key in self._main:
            self._main.move_to_end(unit.key)

    def take(self, unit: Unit) -> None:
        """Remove it, and do not remember it."""
        if self._main.pop(unit.key, None) is None:
            del self._new[unit.key]
            self._new_weight -= unit.weight

    def choose(self) -> Unit:
        """Keep the FIFO at its size."""
        if self._main and self._new_weight <= self._IN * self._capacity:
            return self._main.popitem(last=False)[1]
        key, unit = self._new.popitem(last=False)
        self._new_weight -= unit.weight
        self._gone[key] = unit.weight
        self._gone_weight += unit.weight
        while self._gone_weight > self._REMEMBERED * self._capacity:
            self._gone_weight -= self._gone.popitem(last=False)[1]
        return unit


class Belady(Policy):
    """It knows *requests*, and evicts what holds the most memory until the next read of it:
    the largest product of weight and distance.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self._now = 0
        self._reads: dict[tuple[int, int], list[int]] = {}
        for number, request in enumerate(requests):
            for block in request.blocks:
                self._reads.setdefault((request.image, block), []).append(number)
        self._next: dict[Unit, int] = {}
        self._single: set[tuple[int, int]] = set()
        self._heaps: dict[int, list[tuple[int, Key, Unit]]] = {}

    def begin(self, number: int) -> None:
        """Note the time."""
        self._now = number

    def insert(self, unit: Unit) -> None:
        """Look when it will be read next."""
        if unit.weight == 1:
            self._single.add((unit.image, unit.first))
        self.read(unit)

    def read(self, unit: Unit) -> None:
        """Look when it will be read next."""
        number = self._next_read(unit)
        if self._next.get(unit) != number:
            self._next[unit] = number
            heap = self._heaps.setdefault(unit.weight, [])
            heapq.heappush(heap, (-number, unit.key, unit))

    def demote(self, unit: Unit) -> None:
        """Know better."""

    def evict(self) -> Unit:
        """Take the worst of the last ones of each weight."""
        last = [unit for heap in self._heaps.values() if (unit := self._last(heap)) is not None]
        worst = max(last, key=lambda unit: (self._next[unit] - self._now) * unit.weight)
        heapq.heappop(self._heaps[worst.weight])
        del self._next[worst]
        if worst.weight == 1:
            self._single.discard((worst.image, worst.first))
        return worst

    def _last(self, heap: list[tuple[int, Key, Unit]]) -> Unit | None:
        """Return the unit of *heap* that will be read last; what is out of date leaves it."""
        while heap:
            number, _, unit = heap[0]
            current = self._next.get(unit) == -number
            if current and -number > self._now:
                return unit
            heapq.heappop(heap)
            if current:
                # Another unit has answered that read.
                del self._next[unit]
                self.read(unit)
        return None

    def _next_read(self, unit: Unit) -> int:
        first = _NEVER
        for block in range(unit.first, unit.first + unit.weight):
            place = (unit.image, block)
            reads = self._reads.get(place)
            # What is kept as a block as well is read there.
            if reads and (unit.weight == 1 or place not in self._single):
                following = bisect.bisect_right(reads, self._now)
                if following < len(reads):
                    first = min(first, reads[following])
        return first


POLICIES: Final[dict[str, Callable[[Sequence[Request], int], Policy]]] = {
    "LRU": lambda _requests, _capacity: Cachetools(cachetools.LRUCache(math.inf)),
    "LFU": lambda _requests, _capacity: Cachetools(cachetools.LFUCache(math.inf)),
    "2Q": lambda _requests, capacity: TwoQueues(capacity),
    "S3-FIFO": lambda _requests, _capacity: Product(),
    "Belady": lambda requests, _capacity: Belady(requests),
}
"""Makes each of them for the requests to come and the blocks of the cache; S3-FIFO is the
product's."""
