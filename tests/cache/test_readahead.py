"""Read-ahead is pure arithmetic: what it names is ahead, inside the file, aligned, and new."""

import random
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vddkfs.cache.readahead import BLOCK, Stream, Streams
from vddkfs.cache.worth import Worth

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
CREDIT = Worth().allowance

Read = tuple[int, int]


def forward(start: int, total: int, size: int = 128 * KIB) -> Iterator[Read]:
    for offset in range(start, start + total, size):
        yield offset, min(offset + size, start + total)


def strided(step: int, size: int, count: int, start: int = 0) -> Iterator[Read]:
    for number in range(count):
        yield start + number * step, start + number * step + size


def scattered(chooser: random.Random, area: int, size: int, count: int) -> Iterator[Read]:
    for _ in range(count):
        start = chooser.randrange(area // size) * size
        yield start, start + size


def in_turn(*readers: Iterator[Read]) -> Iterator[Read]:
    waiting = list(readers)
    while waiting:
        for reader in list(waiting):
            read = next(reader, None)
            if read is None:
                waiting.remove(reader)
            else:
                yield read


def delayed(reads: Iterable[Read], places: int, chooser: random.Random) -> list[Read]:
    """Return *reads* out of order: each comes up to *places* later than it should."""
    return [
        read for _, read in sorted((n + chooser.random() * places, r) for n, r in enumerate(reads))
    ]


class File:
    """An open file whose frames come at once, and are never lost. Counts in frames."""

    def __init__(self, capacity: int, limit: int = 16 * MIB, waits: bool = False) -> None:
        self.worth = Worth()
        self.streams = Streams(capacity, limit, self.worth)
        self.waits = waits
        self.named: set[int] = set()
        self.touched: set[int] = set()
        self.in_time = 0
        self.sequential = 0

    def read(self, start: int, end: int) -> Stream:
        stream = self.streams.access(start, end)
        self.sequential += stream.sequential
        first, last = stream.ahead
        fresh = set(range(first // BLOCK, -(-last // BLOCK))) - self.named
        self.worth.issued(len(fresh) * BLOCK)
        for frame in set(range(start // BLOCK, -(-end // BLOCK))) - self.touched:
            self.touched.add(frame)
            if frame in self.named:
                self.in_time += 1
                self.worth.used(BLOCK)
        self.named |= fresh
        if self.waits:
            stream.waited()
        return stream

    def play(self, reads: Iterable[Read]) -> "File":
        for start, end in reads:
            self.read(start, end)
        return self

    @property
    def wasted(self) -> int:
        return len(self.named - self.touched)


def test_a_proved_stream_begins_with_two_mebibytes() -> None:
    streams = Streams(GIB, 16 * MIB, Worth())
    first = streams.access(0, 128 * KIB)
    assert (first.sequential, first.ahead) == (False, (0, 0))
    second = streams.access(128 * KIB, 256 * KIB)
    assert second is first
    assert second.sequential
    assert second.ahead == (MIB, 3 * MIB)


def test_one_read_alone_proves_nothing_however_long() -> None:
    streams = Streams(GIB, 16 * MIB, Worth())
    assert not streams.access(0, 2 * MIB).sequential
    assert streams.access(2 * MIB, 2 * MIB + 128 * KIB).sequential


def test_the_window_doubles_with_the_waits_up_to_the_limit() -> None:
    streams = Streams(GIB, 16 * MIB, Worth())
    windows = []
    for start, end in forward(0, 8 * MIB, MIB):
        stream = streams.access(start, end)
        stream.waited()
        windows.append(stream.window // MIB)
    assert windows == [0, 2, 4, 8, 16, 16, 16, 16]


def test_all_who_wait_for_one_frame_are_one_wait() -> None:
    file = File(GIB).play(forward(0, MIB))
    for start, end in forward(MIB, 512 * KIB):
        stream = file.read(start, end)
        stream.waited()
        stream.waited()
    assert stream.window == 4 * MIB


def test_a_wait_before_anything_was_fetched_ahead_tells_nothing() -> None:
    file = File(GIB)
    for start, end in forward(0, MIB):
        file.read(start, end).waited()
    assert file.read(MIB, MIB + 4096).window == 2 * MIB


def test_a_reader_who_no_longer_waits_gets_a_smaller_window() -> None:
    file = File(8 * GIB, waits=True).play(forward(0, 8 * MIB))
    file.waits = False
    windows = [file.read(start, end).window // MIB for start, end in forward(8 * MIB, 2 * GIB, MIB)]
    assert list(dict.fromkeys(windows)) == [16, 8, 4, 2]
    assert file.in_time == len(file.touched) - 1


@pytest.mark.parametrize(("waits", "window"), [(False, 2 * MIB), (True, 16 * MIB)])
def test_a_long_stream_is_always_a_window_ahead(waits: bool, window: int) -> None:
    file = File(GIB, waits=waits)
    for start, end in forward(0, 512 * MIB):
        file.read(start, end)
        if start > 32 * MIB:
            assert max(file.named) * BLOCK + BLOCK - end >= window
    assert file.wasted * BLOCK <= window


@pytest.mark.parametrize("limit", [0, 64 * KIB, MIB, 3 * MIB, GIB])
def test_the_limit_is_kept(limit: int) -> None:
    file = File(4 * GIB, limit, waits=True)
    for start, end in forward(0, 64 * MIB):
        file.read(start, end)
        assert all(frame * BLOCK < end + limit + BLOCK for frame in file.named)
    assert file.read(64 * MIB, 65 * MIB).sequential
    assert bool(file.named) == bool(limit)


def test_what_could_not_be_fetched_is_named_again() -> None:
    streams = Streams(GIB, 16 * MIB, Worth())
    reads = forward(0, 64 * MIB, MIB)
    streams.access(*next(reads))
    stream = streams.access(*next(reads))
    assert stream.ahead == (2 * MIB, 4 * MIB)
    stream.took(3 * MIB)
    assert streams.access(*next(reads)).ahead == (3 * MIB, 5 * MIB)
    stream.took(3 * MIB)
    assert streams.access(*next(reads)).ahead == (4 * MIB, 6 * MIB)


def test_a_jump_begins_another_stream_and_the_first_one_goes_on() -> None:
    streams = Streams(GIB, 16 * MIB, Worth())
    for read in forward(0, 8 * MIB):
        first = streams.access(*read)
    second = streams.access(700 * MIB, 700 * MIB + 4096)
    assert (second.sequential, second.ahead) == (False, (0, 0))
    assert streams.access(8 * MIB, 8 * MIB + 4096) is first
    assert first.sequential


def test_who_goes_on_within_a_window_keeps_its_size() -> None:
    file = File(GIB, waits=True).play(forward(0, 16 * MIB))
    file.waits = False
    for read in forward(24 * MIB, 256 * KIB):
        stream = file.read(*read)
    assert stream.window == 16 * MIB
    for read in forward(500 * MIB, 256 * KIB):
        stream = file.read(*read)
    assert stream.window == 2 * MIB


@pytest.mark.parametrize("readers", [2, 8, 16])
def test_interleaved_readers_are_told_apart(readers: int) -> None:
    file = File(64 * GIB).play(in_turn(*(forward(n * GIB, 64 * MIB) for n in range(readers))))
    assert file.in_time == len(file.touched) - readers
    assert file.wasted == 2 * readers


@pytest.mark.parametrize("waits", [False, True])
def test_neighbouring_readers_have_each_its_own_window(waits: bool) -> None:
    reads = in_turn(*(forward(n * 8 * MIB, 64 * MIB) for n in range(8)))
    file = File(64 * GIB, waits=waits).play(reads)
    assert file.in_time == len(file.touched) - 8
    assert file.wasted <= 16


@pytest.mark.parametrize("size", [4 * KIB, 128 * KIB])
@pytest.mark.parametrize("distance", [256, 512, 1024, 1536, 3072])
def test_two_readers_in_one_place_both_work(distance: int, size: int) -> None:
    for starts in ((0, distance * KIB), (distance * KIB, 0)):
        file = File(GIB).play(in_turn(*(forward(start, 64 * MIB, size) for start in starts)))
        assert file.in_time >= len(file.touched) - 4
        assert file.wasted == 2


@pytest.mark.parametrize(("size", "places"), [(128, 2), (128, 8), (128, 16), (1024, 2), (1024, 4)])
def test_requests_out_of_order_are_one_stream(size: int, places: int) -> None:
    reads = delayed(forward(0, 256 * MIB, size * KIB), places, random.Random(places))
    file = File(GIB, waits=True).play(reads)
    assert file.sequential >= len(reads) - 8
    assert file.in_time >= len(file.touched) - 8
    assert file.wasted <= 16


def test_a_stream_proves_among_many_random_reads() -> None:
    chooser = random.Random(7)
    file = File(64 * GIB)
    for start, end in forward(0, 64 * MIB):
        file.read(start, end)
        file.play(scattered(chooser, 64 * GIB, 4096, 20))
    assert file.in_time >= 50
    assert file.wasted <= 8


def test_small_holes_do_not_end_the_sequence() -> None:
    chooser = random.Random(11)
    reads = []
    start = 0
    while start < 128 * MIB:
        reads.append((start, start + 128 * KIB))
        start += 128 * KIB + chooser.choice((0, 0, 4 * KIB, 16 * KIB, 64 * KIB))
    file = File(GIB).play(reads)
    assert file.in_time == len(file.touched) - 1


@given(
    start=st.integers(512 * MIB, GIB),
    steps=st.lists(st.tuples(st.integers(1, MIB), st.integers(0, 2 * MIB)), max_size=200),
)
def test_a_backward_reader_gets_nothing_ahead(start: int, steps: list[tuple[int, int]]) -> None:
    file = File(GIB)
    for size, gap in steps:
        file.read(start - size, start)
        start -= size + gap
    assert not file.named
    assert not file.sequential


@given(
    step=st.integers(128 * KIB, 8 * MIB),
    size=st.integers(1, 64 * KIB),
    start=st.integers(0, GIB),
)
def test_a_strided_reader_gets_nothing_ahead(step: int, size: int, start: int) -> None:
    file = File(64 * GIB).play(strided(step, size, 500, start))
    assert not file.named
    assert not file.sequential


@given(seed=st.integers(0, 2**32), area=st.sampled_from([64 * KIB, MIB, 16 * MIB, GIB, 64 * GIB]))
def test_a_random_reader_gets_nothing_ahead(seed: int, area: int) -> None:
    file = File(area).play(scattered(random.Random(seed), area, 4096, 1000))
    assert not file.named
    assert not file.sequential


@pytest.mark.parametrize("step", [128 * KIB, MIB, 3 * MIB, 6 * MIB])
def test_a_stream_that_turns_into_strides_names_no_more(step: int) -> None:
    file = File(64 * GIB).play(forward(0, 64 * MIB))
    before = len(file.named)
    file.play(strided(step, 4096, 1000, 64 * MIB))
    assert len(file.named) <= before + 2
    assert not file.read(*next(strided(step, 4096, 1, 64 * MIB + 1000 * step))).sequential


def test_without_an_allowance_only_who_goes_on_gets_the_next_frame() -> None:
    worth = Worth()
    worth.issued(CREDIT)
    streams = Streams(GIB, 16 * MIB, worth)
    named = [streams.access(*read).ahead for read in forward(0, 8 * MIB)]
    assert not any(first < last for first, last in named[: 2 * MIB // (128 * KIB)])
    ranges = [(first, last) for first, last in named if first < last]
    assert ranges == [(n * MIB, (n + 1) * MIB) for n in range(3, 9)]


def test_a_stream_earns_its_window_back() -> None:
    file = File(GIB, waits=True)
    file.worth.issued(CREDIT)
    file.play(forward(0, 128 * MIB))
    assert max(file.named) - 127 == 16


def test_short_sequences_waste_little_more_than_the_credit() -> None:
    chooser = random.Random(5)
    file = File(64 * GIB)
    for _ in range(2000):
        file.play(forward(chooser.randrange(60 * KIB) * MIB, 512 * KIB))
    assert file.wasted < 40


@given(
    capacity=st.integers(1, 200).map(lambda n: n * 512 * 1000),
    limit=st.sampled_from([0, 64 * KIB, MIB, 5 * MIB, 16 * MIB, 64 * MIB]),
    steps=st.lists(
        st.tuples(
            st.integers(0, 100 * MIB),
            st.integers(1, MIB),
            st.sampled_from(["goes on", "goes on", "goes on", "jumps", "is late", "skips"]),
            st.integers(0, 3),
            st.sampled_from(["", "", "takes less", "waits", "wastes", "uses"]),
        ),
        max_size=100,
    ),
)
def test_what_is_named_is_aligned_inside_new_and_allowed(
    capacity: int, limit: int, steps: list[tuple[int, int, str, int, str]]
) -> None:
    worth = Worth()
    streams = Streams(capacity, limit, worth)
    named: dict[Stream, set[int]] = {}
    positions = [0] * 4
    for offset, length, how, reader, what in steps:
        here = positions[reader]
        start = {
            "goes on": here,
            "jumps": offset,
            "is late": max(0, here - offset % MIB),
            "skips": here + offset % MIB,
        }[how]
        start = min(start, capacity - 1)
        end = min(start + length, capacity)
        positions[reader] = end
        stream = streams.access(start, end)
        first, last = stream.ahead
        if first < last:
            assert stream.sequential
            assert first % BLOCK == 0
            assert first >= end
            assert last <= capacity
            assert last % BLOCK == 0 or last == capacity
            assert last - first <= max(worth.allowance, BLOCK)
            assert last <= stream.position + limit + BLOCK
            frames = set(range(first // BLOCK, -(-last // BLOCK)))
            already = named.setdefault(stream, set())
            assert not frames & already
            already |= frames
            worth.issued(last - first)
            if what == "takes less":
                stopped = first + (last - first) // 2 // BLOCK * BLOCK
                stream.took(stopped)
                already -= set(range(stopped // BLOCK, -(-last // BLOCK)))
        if what == "waits":
            stream.waited()
        elif what == "wastes":
            worth.issued(offset)
        elif what == "uses":
            worth.used(length)
