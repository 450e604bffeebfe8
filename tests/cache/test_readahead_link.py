"""Read-ahead over a link: the window is what the link needs, and no more."""

import pytest

from vddkfs.cache.readahead import BLOCK, Streams
from vddkfs.cache.worth import Worth

KIB = 1024
MIB = 1024 * KIB


def over_a_link(
    source: float, reader: float, size: int, latency: float = 1e-3
) -> tuple[float, list[int]]:
    """Return the bytes per second of a stream of 512 MiB, and the window after each request.

    *source* and *reader*: the most that each of them can do; *size*: bytes of a request, of which
    the reader has four under way. *latency*: seconds from a request to the answer's first byte.
    """
    total = 512 * MIB
    streams = Streams(total, 16 * MIB, Worth())
    arrival: dict[int, float] = {}
    sent_all = 0.0
    windows = []
    read = [0.0] * 4
    for start in range(0, total, size):
        now = read[-4]
        stream = streams.access(start, start + size)
        frame = start // BLOCK
        first, last = stream.ahead
        for number in (frame, *range(first // BLOCK, -(-last // BLOCK))):
            if number not in arrival:
                sent_all = max(now, sent_all) + BLOCK / source
                arrival[number] = sent_all + latency
        if arrival[frame] > now:
            stream.waited()
        windows.append(stream.window)
        read.append(max(arrival[frame], read[-1]) + size / reader)
    return total / read[-1], windows


@pytest.mark.parametrize("size", [128 * KIB, MIB])
def test_a_fast_link_with_a_millisecond_of_latency_is_kept_busy(size: int) -> None:
    rate, windows = over_a_link(source=1.2e9, reader=3e9, size=size)
    assert rate > 0.99 * 1.2e9
    assert windows[8 * MIB // size] == 16 * MIB


def test_a_long_link_is_kept_busy() -> None:
    rate, _ = over_a_link(source=1e8, reader=3e9, size=128 * KIB, latency=0.03)
    assert rate > 0.98 * 1e8


def test_a_source_faster_than_its_reader_is_read_ahead_no_further_than_needed() -> None:
    rate, windows = over_a_link(source=5e9, reader=1e9, size=128 * KIB, latency=2e-4)
    assert rate > 0.99 * 1e9
    assert max(windows) == 2 * MIB
