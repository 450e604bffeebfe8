"""Which parts of a file are claimed twice: the arithmetic of `vddkfs check`, in bounded memory.

A file's header, tables and grains each *claim* a run of slots. A disk of 62 TiB has a thousand
million grains, so claims are never kept: each slot is one bit of a window of at most 64 MiB, and a
file that needs more is gone through in several passes, each with the claims that touch its window.
What is found claimed twice is named in one more pass, which only healthy files are spared.

A slot is a sector where places are sectors (32 bits: 2 TiB, eight passes), and a grain or a table
where places are numbers of those.

That is exact, but takes microseconds a grain where those are scattered. Files are usually regular:
behind some sector there are only grains, each at a multiple of its size from there. ``Marks`` goes
through these in one pass with a byte a grain, and tells whether all is that simple. Pure.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

WINDOW_SLOTS = 1 << 29
"""Slots of one pass: 64 MiB of bits, which are 256 GiB of sectors."""

MAX_PASSES = 64
"""Claims beyond so many windows are not compared: no file of a disk of 62 TiB is so large."""

MAX_MARKS = 1 << 26
"""Grains of a file that ``Marks`` are made for: 64 MiB, a file of 4 TiB with 64 KiB grains."""

MAX_RANGES = 1000
"""Ranges that are told apart; of a file with more of them, all behind are one."""

MAX_OWNERS = 4
"""Claims that are named for one range."""

_ONES = re.compile("1+")


class Claim(msgspec.Struct, frozen=True):
    """*pieces* things of one *kind*, the first of which is *number*, lie one behind the other.

    They take *count* slots from *start*, *size* each; the last may be cut short.
    """

    start: int
    count: int
    kind: str
    number: int = 0
    size: int = 1

    @property
    def end(self) -> int:
        """The slot behind the last."""
        return self.start + self.count


class Overlap(msgspec.Struct, frozen=True):
    """*count* slots from *start* that more than one of *owners* claims, in the order of claiming.

    *more* owners are not named.
    """

    start: int
    count: int
    owners: tuple[Claim, ...]
    more: int = 0


Claims = Callable[[], Iterable[Claim | None]]
"""Says all claims, the same whenever it is called. None among them says that time has passed."""


class Marks:
    """A byte for each grain-sized slot of a file from sector *begin* to *end*.

    *grain* is a power of two; entries below *smallest* are none. *twice* is whether two grains are
    at one place, *count* how many grains there are.
    """

    def __init__(self, begin: int, end: int, grain: int, smallest: int) -> None:
        self._begin = begin
        self._last = end - grain
        self._mask = grain - 1
        self._shift = grain.bit_length() - 1
        self._smallest = smallest
        self._marks = bytearray(max(end - begin, 0) // grain)
        self.twice = False
        self.count = 0

    def take(self, places: Sequence[int]) -> bool:
        """Mark the grains at *places*. Returns False, and marks none, if one is not on a slot."""
        smallest, begin, shift, marks = self._smallest, self._begin, self._shift, self._marks
        wanted = [place for place in places if place >= smallest]
        if not wanted:
            return True
        if min(wanted) < begin or max(wanted) > self._last:
            return False
        if set(map(self._mask.__and__, wanted)) != {begin & self._mask}:
            return False
        for place in wanted:
            slot = (place - begin) >> shift
            if marks[slot]:
                self.twice = True
            marks[slot] = 1
        self.count += len(wanted)
        return True


class Window:
    """The bits of *count* slots from *first*."""

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.end = first + count
        self._bits = bytearray((count + 7) // 8)

    def take(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Mark [*start*, *stop*), all inside the window; return what of it was marked before.

        That is a list of (start, stop).
        """
        low, high = start - self.first, stop - self.first
        first, last = low >> 3, (high + 7) >> 3
        if (low | high) & 7 == 0:
            size = last - first
            if self._bits.count(0, first, last) == size:
                self._bits[first:last] = b"\xff" * size
                return []
        # Numbers of any length: bit 0 of the first byte is the first slot.
        wanted = ((1 << high - low) - 1) << (low & 7)
        there = int.from_bytes(self._bits[first:last], "little")
        self._bits[first:last] = (there | wanted).to_bytes(last - first, "little")
        twice = there & wanted
        if not twice:
            return []
        digits = bin(twice)[:1:-1]
        at = self.first + (first << 3)
        return [(at + run.start(), at + run.end()) for run in _ONES.finditer(digits)]


class Ranges:
    """A bounded collection of ranges: what touches is joined, and so is what is too much."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, int]] = []
        self._merged: list[tuple[int, int]] = []

    def add(self, start: int, stop: int) -> None:
        """Add [*start*, *stop*)."""
        self._pending.append((start, stop))
        if len(self._pending) > MAX_RANGES:
            self._merge()

    def merged(self) -> list[tuple[int, int]]:
        """Return the ranges in order, at most ``MAX_RANGES``."""
        self._merge()
        return self._merged

    def _merge(self) -> None:
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(self._merged + self._pending):
            if merged and (start <= merged[-1][1] or len(merged) == MAX_RANGES):
                merged[-1] = merged[-1][0], max(stop, merged[-1][1])
            else:
                merged.append((start, stop))
        self._pending = []
        self._merged = merged


class Comparison:
    """What became of comparing all claims with each other; filled while ``run`` goes on.

    *taken* is the number of different slots, from *count_from* on, that are claimed; *beyond* that
    of claims that were not compared, as they lie behind the last window.
    """

    def __init__(
        self, claims: Claims, slots: int, window: int = WINDOW_SLOTS, count_from: int = 0
    ) -> None:
        """The file has *slots*, of which *window* are looked at in one pass.

        *window* is a multiple of 8. Claims lie inside the file.
        """
        self._claims = claims
        self._slots = slots
        self._window = window
        self._count_from = count_from
        self.taken = 0
        self.beyond = 0
        self.overlaps: list[Overlap] = []

    @property
    def passes(self) -> int:
        """How often all claims are asked for, if none overlap, at most."""
        return max(1, min(-(-self._slots // self._window), MAX_PASSES))

    def run(self) -> Iterator[None]:
        """Compare. Yields whenever the claims say that time has passed."""
        ranges = Ranges()
        used = bytearray(MAX_PASSES)
        for number in range(self.passes):
            # The first pass tells which windows have claims at all.
            if number == 0 or used[number]:
                yield from self._pass(number, used, ranges)
        found = ranges.merged()
        if found:
            yield from self._name(found)

    def _pass(self, number: int, used: bytearray, ranges: Ranges) -> Iterator[None]:
        first = number * self._window
        bits = Window(first, min(self._window, max(self._slots - first, 0)))
        first_pass = number == 0
        limit = MAX_PASSES * self._window
        for claim in self._claims():
            if claim is None:
                yield
                continue
            start, end = claim.start, claim.start + claim.count
            if first_pass and end > bits.end:
                self.beyond += end > limit
                for touched in range(start // self._window, -(-min(end, limit) // self._window)):
                    used[touched] = 1
            start, end = max(start, bits.first), min(end, bits.end)
            if start >= end:
                continue
            self.taken += self._counted(start, end)
            for twice in bits.take(start, end):
                self.taken -= self._counted(*twice)
                ranges.add(*twice)

    def _counted(self, start: int, stop: int) -> int:
        return max(stop - max(start, self._count_from), 0)

    def _name(self, ranges: list[tuple[int, int]]) -> Iterator[None]:
        owners: list[list[Claim]] = [[] for _ in ranges]
        more = [0] * len(ranges)
        starts = [start for start, _ in ranges]
        for claim in self._claims():
            if claim is None:
                yield
                continue
            number = max(bisect_right(starts, claim.start) - 1, 0)
            while number < len(ranges) and ranges[number][0] < claim.end:
                if claim.start < ranges[number][1]:
                    if len(owners[number]) < MAX_OWNERS:
                        owners[number].append(_cut(claim, *ranges[number]))
                    else:
                        more[number] += 1
                number += 1
        self.overlaps = [
            Overlap(start, stop - start, tuple(mine), others)
            for (start, stop), mine, others in zip(ranges, owners, more, strict=True)
        ]


def _cut(claim: Claim, start: int, stop: int) -> Claim:
    """Return those pieces of *claim* that touch [*start*, *stop*)."""
    first = max(start - claim.start, 0) // claim.size
    last = -(-(min(stop, claim.end) - claim.start) // claim.size)
    at = claim.start + first * claim.size
    return Claim(
        start=at,
        count=min(claim.start + last * claim.size, claim.end) - at,
        kind=claim.kind,
        number=claim.number + first,
        size=claim.size,
    )
