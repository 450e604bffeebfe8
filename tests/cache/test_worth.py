"""The account bounds the waste, whatever the readers do; clustering pays where reads lie close."""

import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vddkfs.cache.readahead import Streams
from vddkfs.cache.worth import BLOCK, Clusters, Worth

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
SMALL = 64 * KIB
CREDIT = Worth().allowance
LARGE_DISK = 64 * GIB


def test_guesses_begin_with_a_credit_that_waste_uses_up() -> None:
    worth = Worth()
    assert worth.allowance == 32 * MIB
    worth.issued(20 * MIB)
    worth.wasted(20 * MIB)
    assert worth.allowance == 12 * MIB
    worth.issued(20 * MIB)
    assert worth.allowance == 0


def test_use_earns_more_than_it_cost_up_to_a_cap() -> None:
    worth = Worth()
    worth.issued(MIB)
    worth.used(MIB)
    assert worth.allowance == 33 * MIB
    worth.used(GIB)
    assert worth.allowance == 64 * MIB


def test_misses_earn_another_try_in_the_end() -> None:
    worth = Worth()
    worth.issued(CREDIT)
    for _ in range(20_000):
        worth.missed()
    assert MIB <= worth.allowance <= 2 * MIB


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["issue", "use", "waste", "miss"]), st.integers(0, 40 * MIB)),
        max_size=200,
    )
)
def test_waste_is_never_more_than_the_credit_and_what_was_used_and_a_trickle(
    steps: list[tuple[str, int]],
) -> None:
    worth = Worth()
    issued = used = wasted = misses = 0
    for what, size in steps:
        if what == "issue":
            size = min(size, worth.allowance)
            worth.issued(size)
            issued += size
        elif what == "miss":
            worth.missed()
            misses += 1
        else:
            size = min(size, issued - used - wasted)
            if what == "use":
                worth.used(size)
                used += size
            else:
                worth.wasted(size)
                wasted += size
        assert 0 <= worth.allowance <= 64 * MIB
        assert issued - used <= CREDIT + used + 64 * misses


def test_the_second_missed_block_of_a_frame_names_it() -> None:
    clusters = Clusters(GIB, Worth())
    assert clusters.miss(5 * MIB + SMALL, SMALL) == (5 * MIB, 5 * MIB)
    assert clusters.miss(7 * MIB, SMALL) == (7 * MIB, 7 * MIB)
    assert clusters.miss(5 * MIB + SMALL, SMALL) == (5 * MIB, 5 * MIB)
    assert clusters.miss(6 * MIB - SMALL, SMALL) == (5 * MIB, 6 * MIB)
    assert clusters.miss(5 * MIB, SMALL) == (5 * MIB, 5 * MIB)


def test_the_last_frame_ends_with_the_image() -> None:
    clusters = Clusters(10 * MIB + 512, Worth())
    clusters.miss(9 * MIB, SMALL)
    assert clusters.miss(9 * MIB + SMALL, SMALL) == (9 * MIB, 10 * MIB)
    first, last = clusters.miss(10 * MIB, SMALL)
    assert first == last


@pytest.mark.parametrize(("others", "named"), [(63, True), (64, False)])
def test_a_miss_is_remembered_for_the_next_64_frames(others: int, named: bool) -> None:
    clusters = Clusters(GIB, Worth())
    clusters.miss(0, SMALL)
    for frame in range(1, others + 1):
        clusters.miss(frame * MIB, SMALL)
    assert clusters.miss(SMALL, SMALL) == ((0, MIB) if named else (0, 0))


def cluster(clusters: Clusters, worth: Worth, frame: int, used: int) -> None:
    """Have a frame named, and of its other 14 blocks *used* read."""
    clusters.miss(frame * MIB, SMALL)
    first, last = clusters.miss(frame * MIB + SMALL, SMALL)
    if first < last:
        worth.issued(14 * SMALL)
        worth.used(used * SMALL)
        worth.wasted((14 - used) * SMALL)


@pytest.mark.parametrize(("used", "eager"), [(14, True), (12, True), (10, False), (0, False)])
def test_clustering_that_proves_right_begins_with_the_first_miss(used: int, eager: bool) -> None:
    worth = Worth()
    clusters = Clusters(GIB, worth)
    for frame in range(20):
        cluster(clusters, worth, frame, used)
    first, last = clusters.miss(500 * MIB, SMALL)
    assert (first < last) == eager


def test_eagerness_ends_when_it_proves_wrong() -> None:
    worth = Worth()
    clusters = Clusters(GIB, worth)
    for frame in range(40):
        cluster(clusters, worth, frame, 14)
    wrong = 0
    for frame in range(500, 600):
        first, last = clusters.miss(frame * MIB, SMALL)
        if first < last:
            wrong += 1
            worth.issued(15 * SMALL)
    assert 0 < wrong <= 16


def test_without_an_allowance_nothing_is_named() -> None:
    worth = Worth()
    clusters = Clusters(GIB, worth)
    worth.issued(CREDIT - MIB + 1)
    clusters.miss(0, SMALL)
    assert clusters.miss(SMALL, SMALL) == (0, 0)


def test_frames_that_should_have_been_clustered_earn_an_allowance() -> None:
    worth = Worth()
    clusters = Clusters(GIB, worth)
    worth.issued(CREDIT)
    for frame in range(4):
        for block in range(16):
            first, last = clusters.miss(frame * MIB + block * SMALL, SMALL)
            if first < last:
                return
    pytest.fail("four frames were read block by block, and nothing was learned")


class Memory:
    """A cache of *blocks* blocks, the least recently used goes, and what was guessed for it."""

    def __init__(self, capacity: int, blocks: int) -> None:
        self.streams = Streams(capacity, 16 * MIB, Worth())
        self.worth = Worth()
        self.clusters = Clusters(capacity, self.worth)
        self.blocks = blocks
        self.unread: OrderedDict[int, bool] = OrderedDict()
        self.issued = 0
        self.used = 0
        self.misses = 0

    def read(self, start: int, end: int) -> None:
        """Read [*start*, *end*), which is inside one block."""
        assert self.streams.access(start, end).ahead == (0, 0)
        block = start // SMALL
        if block not in self.unread:
            self.misses += 1
            self.worth.missed()
            self._put(block, False)
            first, last = self.clusters.miss(block * SMALL, SMALL)
            assert last - first <= self.worth.allowance
            fresh = [n for n in range(first // SMALL, last // SMALL) if n not in self.unread]
            self.issued += len(fresh) * SMALL
            self.worth.issued(len(fresh) * SMALL)
            for number in fresh:
                self._put(number, True)
        elif self.unread[block]:
            self.used += SMALL
            self.worth.used(SMALL)
            self.unread[block] = False
        self.unread.move_to_end(block)

    def _put(self, block: int, unread: bool) -> None:
        self.unread[block] = unread
        if len(self.unread) > self.blocks and self.unread.popitem(last=False)[1]:
            self.worth.wasted(SMALL)

    def play(self, reads: Iterable[int]) -> "Memory":
        for start in reads:
            self.read(start, start + 4 * KIB)
        return self

    @property
    def in_vain(self) -> int:
        return self.issued - self.used


def uniform(area: int, count: int, seed: int = 1) -> Iterator[int]:
    chooser = random.Random(seed)
    for _ in range(count):
        yield chooser.randrange(area // (4 * KIB)) * 4 * KIB


def close_together(active: int, blocks: int, count: int, seed: int = 1) -> Iterator[int]:
    """Read *blocks* of the 16 blocks of each frame, in a random order, in *active* frames at a
    time; then go on to others.
    """
    chooser = random.Random(seed)
    frames = chooser.sample(range(LARGE_DISK // BLOCK), count)
    places: list[list[int]] = []
    for _ in range(count):
        while len(places) < active:
            frame = frames.pop()
            places.append([frame * BLOCK + n * SMALL for n in chooser.sample(range(16), blocks)])
        place = chooser.choice(places)
        yield place.pop()
        if not place:
            places.remove(place)


def test_random_reads_of_a_large_disk_waste_the_credit_and_a_trickle() -> None:
    memory = Memory(LARGE_DISK, 4096).play(uniform(LARGE_DISK, 100_000))
    assert memory.in_vain <= 40 * MIB


@pytest.mark.parametrize("blocks", [1024, 2048])
def test_random_reads_of_a_small_disk_waste_little_beside_what_they_fetch(blocks: int) -> None:
    memory = Memory(512 * MIB, blocks).play(uniform(512 * MIB, 100_000))
    assert memory.in_vain <= 48 * MIB + memory.used
    assert memory.in_vain <= memory.misses * SMALL / 50


def test_random_reads_of_what_fits_into_memory_gain_by_clustering() -> None:
    memory = Memory(512 * MIB, 16 * 1024).play(uniform(512 * MIB, 100_000))
    assert memory.misses <= 5000
    assert memory.in_vain <= MIB


@pytest.mark.parametrize("active", [16, 48])
def test_reads_that_lie_close_together_wait_for_a_tenth(active: int) -> None:
    memory = Memory(LARGE_DISK, 4096).play(close_together(active, 16, 40_000))
    assert memory.misses <= 4000
    assert memory.in_vain <= 64 * MIB


def test_a_reader_of_a_quarter_of_each_frame_is_not_clustered_for_long() -> None:
    memory = Memory(LARGE_DISK, 4096).play(close_together(16, 4, 20_000))
    assert memory.in_vain <= 48 * MIB


def test_a_wrong_judgement_heals() -> None:
    memory = Memory(LARGE_DISK, 4096).play(uniform(LARGE_DISK, 50_000))
    assert memory.worth.allowance < 2 * MIB
    before = memory.misses
    memory.play(close_together(16, 16, 40_000))
    assert memory.misses - before <= 4000


@given(
    capacity=st.integers(1, 200).map(lambda n: n * 512 * 1000),
    steps=st.lists(
        st.tuples(st.integers(0, 100 * MIB), st.sampled_from(["", "", "uses", "wastes"])),
        max_size=200,
    ),
    block=st.sampled_from([16 * KIB, 64 * KIB, 256 * KIB, MIB]),
)
def test_what_is_named_is_the_frame_of_the_miss_and_allowed(
    capacity: int, steps: list[tuple[int, str]], block: int
) -> None:
    worth = Worth()
    clusters = Clusters(capacity, worth)
    for offset, what in steps:
        start = min(offset, capacity - 1) // block * block
        first, last = clusters.miss(start, block)
        assert first % BLOCK == 0
        assert first <= start
        if first < last:
            assert start < last == min(first + BLOCK, capacity)
            assert last - first <= worth.allowance
            worth.issued(last - first)
            if what == "uses":
                worth.used(last - first)
            elif what == "wastes":
                worth.wasted(last - first)
