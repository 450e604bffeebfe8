"""What is evicted when memory is wanted: S3-FIFO, which a scan does not flush.

What is new queues in a *small* part, a tenth of the whole. If it was not used again until its turn
comes, it goes, and its key is remembered for a while as a *ghost*. If it was, or if it comes back
while its ghost is there, it queues in the *main* part, where each use is worth one more round. So
what is read once passes through the small part and leaves the rest alone. A hit costs no more than
its counting: nothing moves until memory is wanted. (Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues
are all you need for cache eviction", SOSP 2023.)

Chosen among others by measurement: contrib/benchmarks/README.md, "Eviction".
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, Protocol, TypeVar

from cachetools import Cache

MOST_USES: Final = 3
"""Where the count of an item's uses stops, and so how many rounds they are worth."""
_PARTS: Final = 10
"""One of so many parts is the small part, the rest the main one."""
_ROUNDS: Final = 256
"""Used items that one eviction may send for another round: readers wait for it. Where it meets more
in a row, one is as good as the other."""


class Item(Protocol):
    """What is kept.

    ``uses`` says how often it was used since it was inserted or last looked at by the policy.
    Readers count it themselves, up to MOST_USES: it is in the way of every hit. ``weight`` is what
    the item takes of the cache, in blocks, at least 1; it does not change.
    """

    uses: int

    @property
    def weight(self) -> int:
        """Blocks."""


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Item)


class _Queue(Generic[K, V]):
    """Items in the order in which their turns come, and what they weigh."""

    __slots__ = ("items", "weight")

    def __init__(self) -> None:
        self.items: OrderedDict[K, V] = OrderedDict()
        self.weight = 0

    def append(self, key: K, item: V) -> None:
        """Have *item* queue at the end."""
        self.items[key] = item
        self.weight += item.weight

    def next(self) -> tuple[K, V]:
        """Take out the item whose turn it is. Raises KeyError without one."""
        key, item = self.items.popitem(last=False)
        self.weight -= item.weight
        return key, item

    def take(self, key: K) -> V | None:
        """Take out *key* wherever it is, and return its item; None if it is not in this queue."""
        item = self.items.pop(key, None)
        if item is not None:
            self.weight -= item.weight
        return item

    def clear(self) -> None:
        """Take out everything."""
        self.items.clear()
        self.weight = 0


class EvictionCache(Cache[K, V]):
    """Items by key. There is no largest size: whoever wants memory calls ``evict``.

    Taking an item out by ``pop`` or ``del`` says that its content was dropped on purpose: it leaves
    no ghost. Inserting one and evicting one take a few microseconds, however many there are.
    """

    def __init__(self) -> None:
        super().__init__(math.inf, getsizeof=_weight)
        self._small: _Queue[K, V] = _Queue()
        self._main: _Queue[K, V] = _Queue()
        self._demoted: _Queue[K, V] = _Queue()
        self._ghosts: OrderedDict[K, int] = OrderedDict()
        self._ghosts_weight = 0

    @property
    def currsize(self) -> int:
        """The weight of all items, in blocks."""
        return int(super().currsize)

    @property
    def ghosts_weight(self) -> int:
        """What the evicted items weighed, in blocks, whose keys are remembered."""
        return self._ghosts_weight

    def __setitem__(self, key: K, item: V) -> None:
        """Insert *item*, whose uses count from now on; one that is there is replaced."""
        if key in self:
            del self[key]
        item.uses = 0
        super().__setitem__(key, item)
        ghost = self._ghosts.pop(key, 0)
        self._ghosts_weight -= ghost
        (self._main if ghost else self._small).append(key, item)

    def __delitem__(self, key: K) -> None:
        super().__delitem__(key)
        for queue in (self._small, self._main, self._demoted):
            if queue.take(key) is not None:
                break

    def demote(self, key: K) -> None:
        """Have *key* go next unless it is used again: a sequential reader is through with it.

        A key that is not there is no error: it has gone already.
        """
        for queue in (self._small, self._main, self._demoted):
            item = queue.take(key)
            if item is not None:
                item.uses = 0
                self._demoted.append(key, item)
                break

    def evict(self, may: Callable[[V], bool]) -> V | None:
        """Choose the item that goes, take it out and return it; None if none may go.

        An item for which *may* says no is in use: it is kept, and its turn comes again when that of
        all others in its queue has come.
        """
        aside: list[tuple[_Queue[K, V], K, V]] = []
        chosen = self._choose(may, aside)
        for queue, key, item in aside:
            queue.append(key, item)
        if chosen is None:
            return None
        key, item = chosen
        super().__delitem__(key)
        return item

    def _choose(
        self, may: Callable[[V], bool], aside: list[tuple[_Queue[K, V], K, V]]
    ) -> tuple[K, V] | None:
        """Take the item that goes out of its queue, and those that may not go *aside*."""
        small, main, demoted = self._small, self._main, self._demoted
        largest_small = self.currsize / _PARTS
        rounds = _ROUNDS
        while True:
            if demoted.items:
                queue = demoted
            elif small.items and (small.weight > largest_small or not main.items):
                queue = small
            elif main.items:
                queue = main
            else:
                return None
            key, item = queue.next()
            if item.uses and rounds:
                rounds -= 1
                item.uses = item.uses - 1 if queue is main else 0
                main.append(key, item)
            elif not may(item):
                aside.append((queue, key, item))
            else:
                if queue is small:
                    self._remember(key, item)
                return key, item

    def _remember(self, key: K, item: V) -> None:
        """Leave a ghost: as many weigh at most what the main part may weigh."""
        self._ghosts[key] = item.weight
        self._ghosts_weight += item.weight
        while self._ghosts_weight > self.currsize * (_PARTS - 1) / _PARTS:
            self._ghosts_weight -= self._ghosts.popitem(last=False)[1]

    def clear(self) -> None:
        """Forget all items and ghosts. Takes time for each of them, but little."""
        super().clear()
        for queue in (self._small, self._main, self._demoted):
            queue.clear()
        self._ghosts.clear()
        self._ghosts_weight = 0


def _weight(item: Item) -> int:
    return item.weight
