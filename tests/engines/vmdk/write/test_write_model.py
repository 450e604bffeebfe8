"""Writing against a bytearray, in steps that hypothesis chooses, on disks of every writable layout.

Some of the disks are as only other writers make them: grains that are not aligned, tables that are
missing, a last grain that the file cuts short, capacities that only the descriptor tells exactly.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from tests.engines.vmdk.makers import Extent, Flat, Grains, Hosted, Mark
from tests.engines.vmdk.makers_chain import Link, paint_chain, write_chain
from tests.engines.vmdk.write.writers import Disk
from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.engines.vmdk.write import BaseWriter

CAPACITIES = (1, 7, 8, 9, 130, 511 * 8, 512 * 8 + 3, 1030 * 8 + 5)
SIZES = (1, 1, 2, 7, 8, 9, 64, 100, 700)
GRAIN_SIZES = (8, 8, 16, 128)


@st.composite
def grains(draw: Callable[..., Any]) -> Grains:
    """Grains of a sparse extent: few are there, anywhere in the file."""
    capacity, size = draw(st.sampled_from(CAPACITIES)), draw(st.sampled_from(GRAIN_SIZES))
    count = -(-capacity // size)
    content: dict[int, bytes | Mark] = {}
    numbers = draw(st.lists(st.integers(0, count - 1), max_size=6, unique=True))
    for number in numbers:
        sectors = min(size, capacity - number * size)
        kind = draw(st.sampled_from((Mark.ZERO, Mark.ABSENT, b"d", b"e", b"f")))
        content[number] = kind * (512 * sectors) if isinstance(kind, bytes) else kind
    with_data = [number for number, kind in content.items() if isinstance(kind, bytes)]
    gaps = draw(st.sampled_from((0, 0, 3, size)))
    order = tuple((number, gaps) for number in with_data)
    return Grains(capacity, size, content, order, draw(st.booleans()))


SPARSE = st.builds(Hosted, grains(), st.just(1), st.booleans(), st.booleans(), st.booleans())
FLAT = st.builds(
    lambda sectors, offset, after: Flat(b"x" * (sectors * 512), offset, "FLAT", after),
    st.sampled_from((1, 50, 777)),
    st.integers(0, 3),
    st.integers(0, 3),
)


def link(kind: str, extents: list[Extent]) -> Link:
    return Link(kind, tuple(extents), kind == "monolithicSparse")


LINKS = st.one_of(
    st.builds(link, st.just("monolithicSparse"), st.lists(SPARSE, min_size=1, max_size=1)),
    st.builds(link, st.just("twoGbMaxExtentSparse"), st.lists(SPARSE, min_size=1, max_size=3)),
    st.builds(link, st.just("twoGbMaxExtentFlat"), st.lists(FLAT, min_size=1, max_size=3)),
)


class Writing(RuleBasedStateMachine):
    """A base, its writer, a reader with cached tables, and what must be there."""

    @initialize(link=LINKS)
    def make(self, link: Link) -> None:
        self.folder = tempfile.TemporaryDirectory()
        (self.path,) = write_chain(Path(self.folder.name), [link])
        raw = Path(self.folder.name) / "raw"
        paint_chain(raw, [link])
        self.model = bytearray(raw.read_bytes())
        self.open()

    def open(self) -> None:
        self.engine = VmdkEngine([str(self.path)])
        self.writer = BaseWriter(self.engine._links[0])

    def look(self, sector: int, count: int, direct: bool) -> None:
        buffer = bytearray(b"\xa5" * count * 512)
        self.engine.read(0, sector, count, memoryview(buffer), direct)
        assert buffer == self.model[sector * 512 : (sector + count) * 512]

    def range(self, place: float, size: int) -> tuple[int, int]:
        capacity = len(self.model) // 512
        count = min(size, capacity)
        return int(place * (capacity - count)), count

    @rule(place=st.floats(0, 1), size=st.sampled_from(SIZES), seed=st.integers(0, 1000))
    def write(self, place: float, size: int, seed: int) -> None:
        sector, count = self.range(place, size)
        self.put(sector, Random(seed).randbytes(count * 512))

    @rule(place=st.floats(0, 1), size=st.sampled_from(SIZES))
    def write_zeros(self, place: float, size: int) -> None:
        sector, count = self.range(place, size)
        before = self.structures()
        self.put(sector, bytes(count * 512))
        assert self.structures() == before, "zeros allocate nothing"

    @rule(place=st.floats(0, 1), size=st.sampled_from(SIZES), some=st.integers(1, 4))
    def write_with_holes(self, place: float, size: int, some: int) -> None:
        sector, count = self.range(place, size)
        data = bytearray(count * 512)
        for at in range(0, count, some * 8):
            data[at * 512 : at * 512 + 512] = b"h" * 512
        self.put(sector, bytes(data))

    def put(self, sector: int, data: bytes) -> None:
        self.writer.write(sector, memoryview(data))
        self.model[sector * 512 : sector * 512 + len(data)] = data
        self.look(sector, len(data) // 512, direct=False)

    @rule(place=st.floats(0, 1), size=st.sampled_from(SIZES), direct=st.booleans())
    def read(self, place: float, size: int, direct: bool) -> None:
        self.look(*self.range(place, size), direct)

    @rule()
    def flush(self) -> None:
        self.writer.flush()

    @rule()
    def read_all(self) -> None:
        self.look(0, len(self.model) // 512, direct=False)

    @rule(clean=st.booleans())
    def reopen(self, clean: bool) -> None:
        """Go on with a new writer; the old one may have died, with all it wrote in its files."""
        if clean:
            self.writer.close()
        else:
            self.writer._close_files()
        self.engine.close()
        self.open()
        self.read_all()

    def structures(self) -> list[list[int]]:
        """Return the entries of all sparse files, whose directories must be in step."""
        found = []
        for extent in self.engine._links[0].info.extents:
            if extent.kind == "SPARSE":
                found.append(Disk(extent.path).check(aligned=False))
        return found

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.reopen(True)
            self.structures()
            self.writer.close()
            self.engine.close()
            self.folder.cleanup()


def test_against_a_model() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Writing,
        settings=settings(
            max_examples=120,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        ),
    )
