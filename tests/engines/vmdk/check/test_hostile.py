"""`vddkfs check` on anything: it never fails, and misses nothing that a reader meets."""

import os
import random
import struct
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engines.vmdk.check.checking import HEALTHY, SECTOR, TABLE, events, patch, write
from tests.engines.vmdk.makers_chain import Link, write_chain
from tests.engines.vmdk.makers_layouts import FLAT, MIXED, SPARSE, chains
from vddkfs.engines.vmdk import VmdkEngine, discover
from vddkfs.engines.vmdk.check import notes as notes_module
from vddkfs.engines.vmdk.check import overlap
from vddkfs.engines.vmdk.check.notes import Notes
from vddkfs.errors import EngineError, VddkfsError

NAMES = [name for name in HEALTHY if not name.startswith(("flat", "zero")) and "empty" not in name]


def problem(folder: Path) -> VddkfsError | None:
    """Return what keeps the built-in engine from reading all of a disk, None if nothing does."""
    try:
        (chain,) = discover(str(folder / "0.vmdk")).chains
        engine = VmdkEngine(chain.paths)
    except VddkfsError as error:
        return error
    try:
        capacity = engine.identities()[0].capacity
        for sector in range(0, capacity, 4096):
            count = min(4096, capacity - sector)
            engine.read(0, sector, count, memoryview(bytearray(count * SECTOR)), False)
    except EngineError as error:
        return error
    finally:
        engine.close()
    return None


def spoiled(raw: bytes, chance: random.Random) -> bytes:
    """Return *raw* with some of its structures changed, or its end missing."""
    changed = bytearray(raw)
    for _ in range(chance.choice([1, 1, 2, 5])):
        here = chance.randrange(0, min(len(changed), chance.choice([128, 8192, 1 << 30])), 4)
        value = chance.choice(
            [0, 1, 2, 7, 21, 128, 1 << 28, 3 << 28, chance.randrange(1 << 32), len(raw) // SECTOR]
        )
        changed[here : here + 4] = struct.pack("<I", value)
    if chance.random() < 0.2:
        del changed[chance.randrange(len(changed)) :]
    return bytes(changed)


@pytest.mark.parametrize("name", NAMES)
def test_what_readers_meet_is_told(name: str, tmp_path: Path) -> None:
    chance = random.Random(name)
    extent = write(tmp_path, name, HEALTHY[name]).parent / "0-s001.vmdk"
    whole = extent.read_bytes()
    met = 0
    for _ in range(25):
        extent.write_bytes(spoiled(whole, chance))
        findings, (chain,) = events(tmp_path / "0.vmdk")
        assert chain.damage == sum(one.level == "damage" for one in findings)
        error = problem(tmp_path)
        if error is None:
            continue
        met += 1
        assert chain.damage or chain.unchecked, error
        if isinstance(error, EngineError):
            spans = [
                range(one.sector, one.sector + one.sectors)
                for one in findings
                if one.level == "damage"
            ]
            assert any(error.sector in span for span in spans), (error, findings)
    assert met > 3


@pytest.mark.parametrize("kind", [*SPARSE, *FLAT, MIXED])
def test_no_layout_that_makes_sense_is_damage(kind: str) -> None:
    """Gaps are told as what belongs to nothing, or no marker leads over, and as nothing worse."""

    @settings(deadline=None, max_examples=12)
    @given(chains(kind))
    def check(layout: list[Link]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            leaf = write_chain(Path(folder), layout)[-1]
            findings, (chain,) = events(leaf)
        assert {one.code for one in findings} <= {"unreferenced", "too-long", "markers"}, findings
        assert (chain.links, chain.damage, chain.unchecked) == (len(layout), 0, 0)

    check()


PLACES = st.one_of(
    st.just(0),
    st.integers(0, 300),
    st.integers(0, 20).map(lambda number: 64 + 8 * number),
    st.sampled_from([1, 63, 1 << 31]),
)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(places=st.lists(PLACES, min_size=1, max_size=24), flag=st.booleans())
def test_tables_against_a_model(places: list[int], flag: bool, make: Any) -> None:
    """Exactly the grains that lie wrong, or share a sector with something, are told."""
    path = make.sparse("a.vmdk", 24 * 8, {0: 0}, grain=8, zero_flag=flag, tail=300 * SECTOR)
    patch(path, TABLE * SECTOR, struct.pack(f"<{len(places)}I", *places))
    fixed = set(range(TABLE + 4))
    owners = Counter(fixed)
    grains = {}
    wrong = set()
    for number, place in enumerate(places):
        if place == 0 or (place == 1 and flag):
            continue
        if place < 21 or place + 8 > 300:
            wrong.add(number)
            continue
        grains[number] = range(place, place + 8)
        owners.update(grains[number])
    wrong |= {number for number, used in grains.items() if any(owners[at] > 1 for at in used)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(overlap, "MAX_OWNERS", 100)
        findings, _ = events(path)
    told = {
        number
        for one in findings
        if one.level == "damage"
        and one.sectors <= 24 * 8
        and "the grain table" not in one.what[:20]
        for number in range(one.sector // 8, (one.sector + one.sectors) // 8)
    }
    assert told == wrong
    unused = 300 - len({at for at in range(32, 300) if owners[at]}) - 32
    warned = [one.what for one in findings if one.level == "warning"]
    assert warned == (
        [f"{unused * 512} bytes of the file belong to nothing, as a crash leaves them"]
        if unused >= 128
        else []
    )


@pytest.mark.parametrize("count", [1, 7, 100, 300])
def test_findings_are_bounded(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes_module, "MAX_FINDINGS", 5)
    notes = Notes("a.vmdk", "b.vmdk")
    told = []
    for number in range(count):
        notes.damage("x", f"number {number}", number * 10, 1)
        notes.warning("y", "odd")
        told += notes.ready()
    told += notes.rest()
    shown = min(count, 5)
    assert [one.what for one in told if one.code == "x"][:shown] == [
        f"number {number}" for number in range(shown)
    ]
    assert len(told) == 2 * shown + (2 if count > 5 else 0)
    if count > 5:
        assert [one.what for one in told[-2:]] == [f"and {count - 5} more of this kind"] * 2
        assert {one.level for one in told[-2:]} == {"damage", "warning"}
    assert notes.rest() == []


def test_neighbours_are_one_finding() -> None:
    notes = Notes("a.vmdk", "b.vmdk")
    for sector in (0, 8, 16, 32, 40):
        notes.damage("x", f"at {sector}", sector, 8)
    notes.damage("y", "other", 48, 8)
    notes.damage("overlap", "one", 56, 8)
    notes.damage("overlap", "two", 64, 8)
    assert [(one.code, one.what, one.sector, one.sectors) for one in notes.rest()] == [
        ("x", "at 0 (the 2 that follow are damaged likewise)", 0, 24),
        ("x", "at 32 (the next is damaged likewise)", 32, 16),
        ("y", "other", 48, 8),
        ("overlap", "one", 56, 8),
        ("overlap", "two", 64, 8),
    ]


@pytest.mark.parametrize("name", ["hosted", "cowd", "sesparse"])
def test_every_entry_is_damaged(name: str, tmp_path: Path) -> None:
    """However much is wrong, what is told stays short."""
    extent = write(tmp_path, name, HEALTHY[name]).parent / "0-s001.vmdk"
    raw = extent.read_bytes()
    noise = random.Random(1).randbytes(len(raw) - 4096)
    extent.write_bytes(raw[:4096] + noise)
    findings, _ = events(tmp_path)
    assert 1 <= len(findings) < 1500


def test_a_large_empty_disk_takes_little(make: Any) -> None:
    """62 TiB: a directory of 8 MiB, all of it a hole."""
    tables = (62 << 40) // SECTOR // 128 // 512
    path = make.sparse("a.vmdk", tables * 512 * 128, {0: b"x" * 65536})
    tracemalloc.start()
    findings, _ = events(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert findings == []
    assert peak < 8 << 20


@pytest.mark.parametrize("size", [1 << 40, (1 << 43) + 512])
def test_a_file_that_claims_to_be_huge(size: int, tmp_path: Path) -> None:
    """Sparse files cost nothing to make: neither memory nor passes may follow their size."""
    extent = write(tmp_path, "sesparse", HEALTHY["sesparse"]).parent / "0-s001.vmdk"
    try:
        os.truncate(extent, size)
    except OSError:
        pytest.skip("the file system has no files of that size")
    tracemalloc.start()
    findings, _ = events(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert findings == []
    assert peak < 80 << 20
