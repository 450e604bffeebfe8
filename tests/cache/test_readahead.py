"""Read-ahead is pure arithmetic: what it names is ahead, inside the file, aligned, and new."""

from hypothesis import given
from hypothesis import strategies as st

from vddkfs.cache.readahead import BLOCK, ReadAhead

MIB = 1024 * 1024


def test_opens_its_window_as_the_stream_goes_on_up_to_the_limit() -> None:
    stream = ReadAhead(1024 * MIB, 16 * MIB)
    ahead = []
    for start in range(0, 64 * MIB, MIB):
        stream.access(start, start + MIB)
        ahead.append(stream.window)
    assert ahead[:5] == [MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB]
    assert set(ahead[4:]) == {16 * MIB}


def test_a_long_stream_is_always_at_least_eight_mebibytes_ahead() -> None:
    stream = ReadAhead(1024 * MIB, 16 * MIB)
    fetched = 0
    for start in range(0, 512 * MIB, 128 * 1024):
        _, last = stream.access(start, start + 128 * 1024)
        fetched = max(fetched, last)
        if start > 32 * MIB:
            assert fetched - start >= 8 * MIB


def test_scattered_reads_fetch_nothing_ahead() -> None:
    stream = ReadAhead(1024 * MIB, 16 * MIB)
    for start in (0, 500 * MIB, 100 * MIB, 900 * MIB, 300 * MIB):
        assert stream.access(start, start + 4096) == (0, 0)
    assert not stream.sequential


def test_a_jump_ends_the_stream() -> None:
    stream = ReadAhead(1024 * MIB, 16 * MIB)
    for start in range(0, 8 * MIB, MIB):
        stream.access(start, start + MIB)
    assert stream.sequential
    assert stream.access(700 * MIB, 700 * MIB + 4096) == (0, 0)
    assert not stream.sequential
    assert stream.window == 0


def test_what_could_not_be_fetched_is_named_again() -> None:
    stream = ReadAhead(1024 * MIB, 16 * MIB)
    position = 0
    for _ in range(4):
        first, last = stream.access(position, position + MIB)
        position += MIB
    assert last - first > BLOCK
    stream.took(first + BLOCK)
    again, _ = stream.access(position, position + MIB)
    assert again == first + BLOCK


@given(
    capacity=st.integers(1, 200).map(lambda n: n * 512 * 1000),
    reads=st.lists(
        st.tuples(st.integers(0, 100 * MIB), st.integers(1, MIB), st.booleans()), max_size=60
    ),
)
def test_ranges_are_aligned_inside_and_never_named_twice_in_a_stream(
    capacity: int, reads: list[tuple[int, int, bool]]
) -> None:
    stream = ReadAhead(capacity, 16 * MIB)
    named: set[int] = set()
    position = 0
    for jump, length, forward in reads:
        start = min(position if forward else jump, capacity)
        end = min(start + length, capacity)
        first, last = stream.access(start, end)
        if not stream.window:
            named.clear()
        assert first == last == 0 or (first % BLOCK == 0 and first < last <= capacity)
        assert last % BLOCK == 0 or last == capacity
        blocks = set(range(first // BLOCK, -(-last // BLOCK)))
        assert not blocks & named
        named |= blocks
        position = end
