"""All that the fuzzer begins with and all that it ever found, through its targets without it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.cases import Case, unpack
from tests.fuzz.folders import MAKERS
from tests.fuzz.guard import MAX_GROWTH, MAX_READ, Finding, watched
from tests.fuzz.mutate import mutate
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS, clean_up
from vddkfs.errors import DamagedSource

MAX = 1 << 16
FINDINGS = Path(__file__).with_name("findings")


@pytest.fixture(autouse=True, scope="module")
def _scratch() -> Iterator[None]:
    yield
    clean_up()


@pytest.mark.parametrize("target", TARGETS)
def test_seeds(target: str) -> None:
    for _, raw in seeds(target):
        TARGETS[target](raw)


@pytest.mark.parametrize("path", sorted(FINDINGS.glob("*.bin")), ids=lambda path: path.stem)
def test_findings(path: Path) -> None:
    TARGETS[path.name.split("-")[0]](path.read_bytes())


@pytest.mark.parametrize("number", range(20))
def test_changed_cases_stay_cases(number: int) -> None:
    """What the mutations make of a seed packs and unpacks to the same, and is no longer."""
    random = Random(number)
    for _, raw in seeds("folder"):
        changed = mutate(raw, MAX, random, lambda data, size: data[:size])
        assert len(changed) <= MAX
        assert unpack(unpack(changed).pack()) == unpack(changed)


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_a_little_fuzzing(maker: Callable[[Random], Case]) -> None:
    for number in range(40):
        random = Random(number)
        raw = mutate(maker(random).pack(), MAX, random, lambda data, size: data[:size])
        TARGETS["folder"](raw)


def _reads_outside() -> None:
    with open("/etc/passwd", "rb"):
        pass


def _reads_much() -> None:
    os.preadv(0, [bytearray(MAX_READ + 1)], 0)


def _says_what_no_terminal_should_get() -> None:
    raise DamagedSource("d.vmdk: \x1b[31m")


@pytest.mark.parametrize("wrong", [_reads_outside, _reads_much, _says_what_no_terminal_should_get])
def test_what_is_a_finding(wrong: Callable[[], None]) -> None:
    with pytest.raises(Finding), watched():
        wrong()


def test_so_is_a_file_left_open() -> None:
    opened: list[int] = []
    with pytest.raises(Finding, match="open"), watched():
        opened.append(os.dup(0))
    os.close(opened[0])


def test_and_memory_beyond_the_bound() -> None:
    with pytest.raises(MemoryError), watched():
        bytearray(4 * MAX_GROWTH)


def test_but_not_an_error_of_one_line() -> None:
    with watched():
        raise DamagedSource("d.vmdk: damaged", advice="copy it again")
