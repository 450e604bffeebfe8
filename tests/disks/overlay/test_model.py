"""A fork against a bytearray, in steps that hypothesis chooses, with crashes at any call."""

import random
from collections.abc import Callable
from itertools import pairwise

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.disks.overlay.crashing import CAPACITY, Host, content, read_below
from tests.disks.overlay.memory import Killed, MemoryDisk
from vddkfs.disks.overlay import BELOW, BLOCK
from vddkfs.errors import OverlayError

SIZES = st.sampled_from((0, 1, 511, 512, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 17 * BLOCK + 3))
PLACES = st.floats(0, 1)


class Forks(RuleBasedStateMachine):
    """A process, its disk, and what it must show."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Host(MemoryDisk())
        self.full = False

    def range(self, place: float, size: int, aligned: bool) -> tuple[int, int]:
        offset = int(place * (CAPACITY - size))
        return (offset - offset % BLOCK if aligned else offset), size

    def attempt(self, do: Callable[[], None]) -> None:
        """Do it; on a full disk it may fail, and then each block is old or new."""
        try:
            do()
        except OverlayError:
            assert self.full
            self.settle()

    def settle(self) -> None:
        image = content(self.host.fork)
        assert self.host.expected.wrong(image) == []
        for number, versions in enumerate(self.host.expected.versions):
            block = image[number * BLOCK :][:BLOCK]
            # What it was before the flush may still come back, in a crash.
            versions.append(block)
        self.host.expected.now = bytearray(image)

    @rule(place=PLACES, size=SIZES, aligned=st.booleans(), seed=st.integers(0, 1000))
    def write(self, place: float, size: int, aligned: bool, seed: int) -> None:
        offset, size = self.range(place, size, aligned)
        data = random.Random(seed).randbytes(size)
        self.attempt(lambda: self.host.write(offset, data))

    @rule(place=PLACES, size=SIZES, some=st.integers(1, 3 * BLOCK))
    def write_with_holes(self, place: float, size: int, some: int) -> None:
        offset, size = self.range(place, size, True)
        data = bytearray(size)
        data[::some] = b"h" * len(data[::some])
        self.attempt(lambda: self.host.write(offset, bytes(data)))

    @rule(place=PLACES, size=SIZES, aligned=st.booleans())
    def zero(self, place: float, size: int, aligned: bool) -> None:
        offset, size = self.range(place, size, aligned)
        self.attempt(lambda: self.host.zero(offset, size))

    @rule()
    def flush(self) -> None:
        self.host.flush()

    @rule()
    def reopen(self) -> None:
        self.host.close()
        self.host.open()

    @rule(space=st.integers(0, 12))
    def fill(self, space: int) -> None:
        self.host.disk.space = self.host.disk.used() + space
        self.full = True

    @rule()
    def free(self) -> None:
        self.host.disk.space = 1 << 30
        self.full = False

    @rule(
        left=st.integers(0, 30),
        part=PLACES,
        power=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def crash(self, left: int, part: float, power: bool, seed: int) -> None:
        """Do some random things, be killed or lose power, and go on."""
        host, draw = self.host, random.Random(seed)
        host.disk.left, host.disk.part = left, part
        try:
            while True:
                host.random_step(draw)
        except Killed:
            pass
        except OverlayError:
            assert self.full
        host.disk.left = -1
        disk = host.disk
        host.disk = disk.after_power_loss(draw) if power else disk.after_kill()
        host.open()
        image = content(host.fork)
        assert host.expected.wrong(image) == []
        host.expected.take(image)
        if self.full and host.disk.space < host.disk.used():
            host.disk.space = host.disk.used()

    @rule(place=PLACES, size=SIZES, aligned=st.booleans())
    def read(self, place: float, size: int, aligned: bool) -> None:
        offset, size = self.range(place, size, aligned)
        fork, found = self.host.fork, bytearray(b"\x5a" * size)
        gaps = fork.read_into(offset, memoryview(found))
        below = 0
        for gap in gaps:
            at = gap.offset - offset
            found[at : at + gap.size] = read_below(gap.offset, gap.size)
            below += gap.size
        assert found == self.host.expected.now[offset : offset + size]
        runs = fork.locate(offset, size)
        assert fork.touched(offset, size) == any(run.place != BELOW for run in runs)
        assert (below == size) == (not fork.touched(offset, size))

    @invariant()
    def all_of_it(self) -> None:
        assert content(self.host.fork) == self.host.expected.now

    @invariant()
    def changed(self) -> None:
        fork = self.host.fork
        extents = list(fork.extents())
        assert sum(extent.size for extent in extents) == fork.changed_bytes
        assert all(one.offset + one.size <= two.offset for one, two in pairwise(extents))
        for extent in extents:
            part = self.host.expected.now[extent.offset : extent.offset + extent.size]
            assert not extent.zero or part == bytes(extent.size)


def test_against_a_model() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Forks,
        settings=settings(
            max_examples=150,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        ),
    )
