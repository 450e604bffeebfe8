"""Bytes of an image, and the blocks that they are. Pure functions."""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from vddkfs.disks.overlay.table import BLOCK, ZERO, BlockMap, Run

_ZEROS: Final = bytes(BLOCK)


class Extent(NamedTuple):
    """*size* bytes from *offset*. *zero*: they are known to be zeros."""

    offset: int
    size: int
    zero: bool


def merged(leaves: Iterable[list[Run]], capacity: int) -> Iterator[Extent]:
    """Yield what *leaves* have of an image of *capacity* bytes, neighbours merged."""
    begin = end = 0
    zero = False
    for leaf in leaves:
        for run in leaf:
            here, kind = run.block * BLOCK, run.place == ZERO
            if here != end or kind != zero or begin == end:
                if end > begin:
                    yield Extent(begin, end - begin, zero)
                begin = here
            end, zero = min((run.block + run.blocks) * BLOCK, capacity), kind
    if end > begin:
        yield Extent(begin, end - begin, zero)


def changed_bytes(found: BlockMap, capacity: int) -> int:
    """Return how many bytes of an image of *capacity* are in *found*."""
    changed = (found.data_blocks + found.zero_blocks) * BLOCK
    beyond = -capacity % BLOCK
    return changed - beyond if beyond and found.touched(capacity // BLOCK, 1) else changed


def blocks_of(offset: int, size: int) -> tuple[int, int]:
    """Return the first block of a range of bytes, and how many it touches."""
    first = offset // BLOCK
    if not size:
        return first, 0
    return first, -(-(offset + size) // BLOCK) - first


def kinds(data: memoryview) -> Iterator[tuple[int, int, memoryview | None]]:
    """Yield (block, count, content) of runs in *data*, whole blocks; content None for zeros."""
    heads = data.cast("Q")[:: BLOCK // 8].tolist()
    if 0 not in heads:
        yield 0, len(heads), data
        return
    begin = 0
    zeros = [
        not head and data[at * BLOCK :][:BLOCK].tobytes() == _ZEROS for at, head in enumerate(heads)
    ]
    for end in range(1, len(zeros) + 1):
        if end == len(zeros) or zeros[end] != zeros[begin]:
            content = None if zeros[begin] else data[begin * BLOCK : end * BLOCK]
            yield begin, end - begin, content
            begin = end
