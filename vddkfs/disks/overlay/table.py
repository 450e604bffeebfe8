"""Which blocks of an image a fork has, and where: ten million scattered ones in some 130 MiB.

A *block* is 4 KiB of the image, a *place* 4 KiB of the segment files. The map holds runs: blocks
that follow one another, in places that do, or that are all zeros and have no place.

Runs are kept in leaves, one for each 32,768 blocks of the image that have any: a sorted array of
where runs begin, two bytes each, and one of what they are, eight bytes each. Measured
(``contrib/benchmarks/run overlay-map``): larger leaves save little memory and make each write move
more of it; smaller ones cost more memory where writes are scattered wider. A dict of the blocks
takes ten times the memory.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Final, NamedTuple

BLOCK: Final = 4096
"""Bytes of a block, and of a place."""
ZERO: Final = (1 << 48) - 1
"""Instead of a place: the blocks are zeros."""
BELOW: Final = -1
"""Instead of a place: the blocks are not in the fork."""

_BITS: Final = 15
_LENGTH: Final = 16
"""Bits of a value that hold the number of blocks, less one; the place is above them."""
_COUNT: Final = (1 << _LENGTH) - 1
_LEAF: Final = 1 << _BITS
_MASK: Final = _LEAF - 1


class Run(NamedTuple):
    """*blocks* blocks from *block*, in as many places from *place*, or all ZERO, or all BELOW."""

    block: int
    blocks: int
    place: int


class BlockMap:
    """A map without any runs. Not for several threads at once.

    *entries* is how many runs it holds, *zero_entries* how many of them are zeros; *data_blocks*
    is how many blocks have a place, *zero_blocks* how many are zeros.
    """

    def __init__(self) -> None:
        self._leaves: dict[int, tuple[array[int], array[int]]] = {}
        self.entries = 0
        self.zero_entries = 0
        self.data_blocks = 0
        self.zero_blocks = 0

    def set(self, block: int, count: int, place: int) -> list[tuple[int, int]]:
        """Let *count* blocks from *block* be in the places from *place* on, or be ZERO.

        Returns the places that they had, as (first, count).
        """
        left: list[tuple[int, int]] = []
        end = block + count
        while block < end:
            stop = min(end, (block | _MASK) + 1)
            self._set(block >> _BITS, block & _MASK, stop - block, place, left)
            if place != ZERO:
                place += stop - block
            block = stop
        return left

    def _set(
        self, number: int, begin: int, count: int, place: int, left: list[tuple[int, int]]
    ) -> None:
        leaf = self._leaves.get(number)
        if leaf is None:
            leaf = self._leaves[number] = (array("H"), array("Q"))
        starts, values = leaf
        end = begin + count
        first = bisect_right(starts, begin)
        # The run before may reach into the range, or be one that this goes on.
        if first and starts[first - 1] + (values[first - 1] & _COUNT) + 1 >= begin:
            first -= 1
        last = bisect_right(starts, end, first) if end < _LEAF else len(starts)
        new = [(begin, count, place)]
        if first < last:
            new = self._merged(starts, values, first, last, (begin, end, place), left)
        if place == ZERO:
            self.zero_blocks += count
        else:
            self.data_blocks += count
        self.zero_entries += sum(run[2] == ZERO for run in new)
        self.entries += len(new) - (last - first)
        if len(new) == last - first == 1:
            starts[first], values[first] = new[0][0], new[0][2] << _LENGTH | new[0][1] - 1
        elif first == last:
            starts.insert(first, begin)
            values.insert(first, place << _LENGTH | count - 1)
        else:
            starts[first:last] = array("H", [run[0] for run in new])
            values[first:last] = array("Q", [run[2] << _LENGTH | run[1] - 1 for run in new])

    def _merged(
        self,
        starts: "array[int]",
        values: "array[int]",
        first: int,
        last: int,
        into: tuple[int, int, int],
        left: list[tuple[int, int]],
    ) -> list[tuple[int, int, int]]:
        """Return what the runs *first* to *last*, which touch the range *into*, become with it."""
        begin, end, place = into
        head: list[tuple[int, int, int]] = []
        tail: list[tuple[int, int, int]] = []
        for index in range(first, last):
            start, value = starts[index], values[index]
            at, stop = value >> _LENGTH, start + (value & _COUNT) + 1
            if start < begin:
                head.append((start, min(stop, begin) - start, at))
            if stop > end:
                skipped = max(0, end - start)
                tail.append((start + skipped, stop - start - skipped, _after(at, skipped)))
            self.zero_entries -= at == ZERO
            inside = min(stop, end) - max(start, begin)
            if inside > 0:
                if at == ZERO:
                    self.zero_blocks -= inside
                else:
                    self.data_blocks -= inside
                    left.append((at + max(0, begin - start), inside))
        if head:
            start, before, at = head[-1]
            if start + before == begin and _after(at, before) == place:
                begin, place = start, at
                head.pop()
        if tail and tail[0][0] == end and _after(place, end - begin) == tail[0][2]:
            end += tail.pop(0)[1]
        return [*head, (begin, end - begin, place), *tail]

    @property
    def bound(self) -> int:
        """How many runs there are at most, however the blocks that have places are rewritten."""
        return self.data_blocks + self.zero_entries

    def touched(self, block: int, count: int) -> bool:
        """Say whether any of *count* blocks from *block* is in the fork."""
        end = block + count
        while block < end:
            stop = min(end, (block | _MASK) + 1)
            leaf = self._leaves.get(block >> _BITS)
            if leaf is not None:
                starts, values = leaf
                begin = block & _MASK
                index = bisect_left(starts, begin + stop - block)
                if index and starts[index - 1] + (values[index - 1] & _COUNT) >= begin:
                    return True
            block = stop
        return False

    def runs(self, block: int, count: int) -> list[Run]:
        """Return what *count* blocks from *block* are, in order and without a gap."""
        found: list[Run] = []
        end = block + count
        while block < end:
            stop = min(end, (block | _MASK) + 1)
            leaf = self._leaves.get(block >> _BITS)
            if leaf is not None:
                block = _cut(leaf, block, stop, found)
            if block < stop:
                found.append(Run(block, stop - block, BELOW))
                block = stop
        return found

    def changed(self, first: int = 0) -> Iterator[list[Run]]:
        """Yield the runs that are in the fork, from block *first* of a leaf on, a leaf at a time.

        The map may change between two of them: each leaf is as it is when its turn comes. Runs end
        where leaves end.
        """
        for number in sorted(self._leaves):
            starts, values = self._leaves[number]
            base = number << _BITS
            if base >= first:
                yield [
                    Run(base + start, (value & _COUNT) + 1, value >> _LENGTH)
                    for start, value in zip(starts, values, strict=True)
                ]


def _cut(leaf: tuple["array[int]", "array[int]"], block: int, stop: int, found: list[Run]) -> int:
    """Append to *found* what [*block*, *stop*), in *leaf*, is; return where its last run ends."""
    starts, values = leaf
    base = block & ~_MASK
    index = max(0, bisect_right(starts, block - base) - 1)
    while index < len(starts):
        start, value = base + starts[index], values[index]
        if start >= stop:
            break
        end = start + (value & _COUNT) + 1
        if end > block:
            if start > block:
                found.append(Run(block, start - block, BELOW))
                block = start
            until = min(end, stop)
            found.append(Run(block, until - block, _after(value >> _LENGTH, block - start)))
            block = until
        index += 1
    return block


def _after(place: int, count: int) -> int:
    """Return the place *count* behind *place*; of zeros there is no other."""
    return ZERO if place == ZERO else place + count
