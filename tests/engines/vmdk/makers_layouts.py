"""Random layouts of VMDKs, for hypothesis: grains, extents, links, chains. See ``makers``."""

import random
from collections.abc import Sequence

from hypothesis import strategies as st

from tests.engines.vmdk.makers import (
    SECTOR,
    Extent,
    Flat,
    Grain,
    Grains,
    Hosted,
    Mark,
    Zero,
)
from tests.engines.vmdk.makers_chain import Link
from tests.engines.vmdk.makers_esx import Cowd, SeSparse
from tests.engines.vmdk.makers_stream import Stream

SMALL_SECTORS = 8192
"""The capacity of most layouts, at most: 4 MiB."""

MOST_DATA = 2 << 20
"""Bytes of data of one extent: what makes a layout dear is what is written and compared."""

FAR = (5000, (1 << 31) - 3, (1 << 32) - (1 << 22))
"""Gaps in sectors: over the bounds of what fits 31 bits, and nearly out of 32."""

FAR_GRAINS = (4093, 70000, 1 << 28)
"""Gaps in grains: over what twelve bits hold, and a file of a terabyte."""

SPARSE = ["monolithicSparse", "twoGbMaxExtentSparse", "streamOptimized", "vmfsSparse", "seSparse"]
FLAT = ["monolithicFlat", "twoGbMaxExtentFlat", "vmfs"]
MIXED = "custom"


RANDOM, REPEATED, ZEROED = "random", "repeated", "zeroed"


@st.composite
def grains(
    draw: st.DrawFn,
    salt: int,
    capacity: int,
    size: int,
    marks: Sequence[Mark],
    far: Sequence[int] = FAR,
) -> Grains:
    """Runs of grains, laid over each other, in any order in the file.

    *far* are gaps of which one may be before any grain. No two extents of a chain have the same
    *salt*: what they are filled with differs, and a grain of the wrong link shows.
    """
    count = -(-capacity // size)
    kinds: list[str | Mark] = [RANDOM, RANDOM, REPEATED, ZEROED, Mark.ABSENT, *marks, *marks]
    fillings = st.sampled_from(kinds)
    lengths = st.sampled_from([1000, 100, 10, 3, 2, 1, 1])
    first = st.one_of(st.integers(0, count - 1), st.just(count - 1))
    runs = draw(st.lists(st.tuples(first, lengths, fillings), min_size=1, max_size=8))
    source = random.Random(draw(st.integers(0, 1 << 16)) << 8 | salt)
    content: dict[int, Grain] = {}
    room = MOST_DATA // (size * SECTOR)
    for begin, length, filling in runs:
        for number in range(begin, min(count, begin + length, begin + room)):
            sectors = min(size, capacity - number * size)
            content[number] = filled(source, filling, sectors * SECTOR)
        room -= length if not isinstance(filling, Mark) else 0
        if room <= 0:
            break
    order = sorted(number for number, what in content.items() if isinstance(what, bytes))
    way = draw(st.sampled_from(["ascending", "descending", "shuffled", "shuffled"]))
    if way == "descending":
        order.reverse()
    elif way == "shuffled":
        source.shuffle(order)
    most = draw(st.sampled_from([0, 0, 1, 3]))
    places = [(number, source.randint(0, most)) for number in order]
    if places and (gap := draw(st.sampled_from([*far, 0, 0, 0, 0, 0, 0]))):
        jump = source.randrange(len(places))
        places[jump] = (places[jump][0], gap)
    return Grains(capacity, size, content, tuple(places), cut=draw(st.booleans()))


def filled(source: random.Random, filling: str | Mark, length: int) -> Grain:
    if isinstance(filling, Mark):
        return filling
    if filling == RANDOM:
        return source.randbytes(length)
    return bytes([source.randint(1, 255) if filling == REPEATED else 0]) * length


@st.composite
def extents(draw: st.DrawFn, kind: str, capacity: int, salt: int) -> Extent:
    """One extent of *kind*, a keyword of a descriptor or PACKED."""
    none: tuple[Mark, ...] = ()
    zeros = (Mark.ZERO,)
    if kind in ("FLAT", "VMFS"):
        source = random.Random(draw(st.integers(0, 1 << 16)) << 8 | salt)
        empty = capacity // 8
        content = source.randbytes((capacity - empty) * SECTOR) + bytes(empty * SECTOR)
        offset = draw(st.sampled_from([0, 0, 1, 77]))
        access = draw(st.sampled_from(["RW", "RW", "RW", "RDONLY"]))
        return Flat(content, offset, kind, draw(st.sampled_from([0, 9])), access)
    if kind == "ZERO":
        return Zero(capacity)
    if kind == "VMFSSPARSE":
        size = draw(st.sampled_from([1, 1, 1, 2, 8, 16, 128]))
        layout = draw(grains(salt, capacity, size, none))
        return Cowd(layout, draw(st.booleans()), draw(st.booleans()))
    if kind == "SESPARSE":
        layout = draw(grains(salt, capacity, 8, (Mark.ZERO, Mark.UNMAPPED), FAR_GRAINS))
        return SeSparse(layout, draw(st.booleans()), draw(st.booleans()))
    size = draw(st.sampled_from([8, 8, 16, 64, 128, 128, 512]))
    version = draw(st.sampled_from([1, 2, 3]))
    layout = draw(grains(salt, capacity, size, zeros if version > 1 else none))
    some, other, third = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    if kind == "PACKED":
        prefix = draw(st.sampled_from(["marker"] * 5 + ["nothing"]))
        return Stream(layout, version, some, other and not some, third, prefix)
    return Hosted(layout, version, redundant=some, all_tables=other)


@st.composite
def capacities(draw: st.DrawFn, most: int = 1 << 20) -> int:
    """Mostly up to 4 MiB; at times more than one table, or one sector of a directory, has."""
    bound = draw(st.sampled_from([100, 2000, 8192, 8192, 8192, 8192, 131072, 655360]))
    capacity = draw(st.integers(1, min(bound, most)))
    return capacity if draw(st.booleans()) else -(-capacity // 128) * 128


@st.composite
def links(draw: st.DrawFn, kind: str, capacity: int, salt: int) -> Link:
    """One link of createType *kind* and about *capacity* sectors."""
    if kind == "monolithicSparse":
        return Link(kind, (draw(extents("SPARSE", capacity, salt)),), embedded=True)
    if kind == "streamOptimized":
        return Link(kind, (draw(extents("PACKED", capacity, salt)),), embedded=True)
    keywords = {
        "twoGbMaxExtentSparse": ["SPARSE"],
        "monolithicFlat": ["FLAT"],
        "twoGbMaxExtentFlat": ["FLAT"],
        "vmfs": ["VMFS"],
        "vmfsSparse": ["VMFSSPARSE"],
        "seSparse": ["SESPARSE"],
        MIXED: ["FLAT", "VMFS", "ZERO", "SPARSE", "VMFSSPARSE", "SESPARSE", "PACKED"],
    }[kind]
    pieces = 1
    if kind.startswith("twoGb") or kind == MIXED:
        pieces = draw(st.integers(1, 5))  # fewer than there are salts between two links
    found: list[Extent] = []
    left = capacity
    for number in range(pieces):
        keyword = draw(st.sampled_from(keywords))
        sectors = left if number == pieces - 1 else draw(st.integers(1, max(1, left)))
        if keyword in ("FLAT", "VMFS", "ZERO"):
            sectors = min(sectors, SMALL_SECTORS)
        elif number < pieces - 1 and draw(st.sampled_from([True, True, True, False])):
            sectors = -(-sectors // 512) * 512  # see qemu_trouble
        found.append(draw(extents(keyword, max(1, sectors), salt + number)))
        left = max(1, left - sectors)
    if kind == "twoGbMaxExtentSparse" and draw(st.sampled_from([False] * 9 + [True])):
        last = found[-1]
        assert isinstance(last, Hosted)
        found[-1] = Hosted(last.grains, last.version, last.redundant, last.all_tables, True)
    return Link(kind, tuple(found), qemu_kind="vmfs" if kind == MIXED else "")


@st.composite
def chains(draw: st.DrawFn, kind: str) -> list[Link]:
    """A chain of up to eight links: *kind* is its base if it is flat, else its leaf."""
    length = draw(st.sampled_from([1, 1, 2, 2, 2, 3, 5, 8]))
    capacity = draw(capacities(SMALL_SECTORS if kind in FLAT or length > 3 else 1 << 20))
    kinds = [kind]
    if kind in FLAT:
        kinds += draw(st.lists(st.sampled_from(SPARSE), min_size=length - 1, max_size=length - 1))
    elif length > 1:
        middle = st.lists(st.sampled_from(SPARSE), min_size=length - 2, max_size=length - 2)
        kinds = [draw(st.sampled_from([*FLAT, *FLAT, *SPARSE, MIXED])), *draw(middle), kind]
    found = []
    for number, one in enumerate(kinds):
        sectors = min(capacity, SMALL_SECTORS) if one in FLAT else capacity
        found.append(draw(links(one, sectors, 8 * number)))
        # Disks are enlarged between snapshots; nothing says that a child is no smaller.
        change = draw(st.sampled_from([0, 0, 0, 0, 1, 1000, -500]))
        capacity = max(1, capacity + change)
    return found
