"""Random layouts of every subformat, and what the engine, qemu-img and the model say of them.

The makers write a chain from a random layout; qemu-img converts its leaf; the engine must give the
same, whole and in pieces, buffered and direct, without waiting where it answers; what its map calls
a hole must be zeros. The model (``paint_chain``) must agree as well, and is the judge alone where
qemu-img refuses a legal layout or misreads it: see ``qemu_trouble``.

There are 25 layouts a subformat, always the same. With VDDKFS_THOROUGH set in the environment there
are 500, new ones in every run:

    VDDKFS_THOROUGH=1 .venv/bin/python -m pytest tests/engines/vmdk/test_differential.py

A failure prints the layout; a thorough run reduces it first, which may take minutes more.
"""

import mmap
import os
import random
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.engines.vmdk import oracles
from tests.engines.vmdk.makers import (
    SECTOR,
    Flat,
    Grains,
    Hosted,
    Mark,
    Zero,
)
from tests.engines.vmdk.makers_chain import Link, paint_chain, write_chain, write_twin
from tests.engines.vmdk.makers_esx import Cowd, SeSparse
from tests.engines.vmdk.makers_layouts import FLAT, MIXED, SPARSE, chains, links
from tests.engines.vmdk.makers_stream import Stream, write_ova
from vddkfs.engines.vmdk import VmdkEngine, discover
from vddkfs.engines.vmdk.tables import DEFAULT_CACHE_BYTES

THOROUGH = bool(os.environ.get("VDDKFS_THOROUGH"))
WHOLE_SECTORS = 8192
PIECES, NEAR_EDGES = 16, 7

settings.register_profile(
    "layouts",
    max_examples=500 if THOROUGH else 25,
    derandomize=not THOROUGH,
    database=None,
    deadline=None,
    print_blob=True,
    # Without shrinking, which takes minutes: the same 25 fail again, and tell themselves shortly.
    phases=[Phase.generate, Phase.shrink] if THOROUGH else [Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

pytestmark = [
    pytest.mark.skipif(not oracles.have_qemu(), reason="qemu-img is not installed"),
    pytest.mark.timeout(900 if THOROUGH else 200),
]


def qemu_trouble(chain: Sequence[Link]) -> str:
    """Say why qemu-img does not read *chain* as it is meant; "" if it does."""
    for link in chain:
        for number, extent in enumerate(link.extents):
            if isinstance(extent, Flat | Zero):
                continue
            assert isinstance(extent, Hosted | Cowd | SeSparse | Stream)
            partial = extent.sectors % extent.grains.size != 0
            if partial and number < len(link.extents) - 1:
                return "it reads on in the last grain of an extent, past its end"
            if isinstance(extent, Hosted) and extent.rounded and partial:
                return "it takes the capacity from the header, not from the descriptor"
            if isinstance(extent, Stream) and extent.footer and not link.embedded:
                return "it looks for the footer in the descriptor"
            longest = (
                extent.longest() if isinstance(extent, Stream) and extent.prefix == "nothing" else 0
            )
            if longest > extent.grains.size * SECTOR:
                return "it reads no more than a grain's length of a stream without a marker"
    return ""


@pytest.mark.parametrize("kind", [*SPARSE, *FLAT, MIXED])
def test_layouts(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    base = tmp_path_factory.mktemp(kind)

    @settings.get_profile("layouts")
    @given(chain=chains(kind), seed=st.integers(0, 1 << 16))
    def layouts(chain: list[Link], seed: int) -> None:
        with tempfile.TemporaryDirectory(dir=base) as folder:
            compare(Path(folder), chain, seed)

    layouts()


@pytest.mark.parametrize("kind", ["monolithicSparse", "streamOptimized"])
def test_archives(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    """A disk in an archive, of each form of tar, is what it is in a file of its own."""
    base = tmp_path_factory.mktemp(kind)
    forms = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])

    @settings.get_profile("layouts")
    @given(link=links(kind, 3001, 0), form=forms, seed=st.integers(0, 1 << 16))
    def archives(link: Link, form: int, seed: int) -> None:
        with tempfile.TemporaryDirectory(dir=base) as name:
            folder = Path(name)
            paint_chain(folder / "model", [link])
            (path,) = write_chain(folder, [link])
            if path.stat().st_size > 1 << 24:
                return  # terabytes of holes, which tar would write out
            other = Hosted(Grains(100, 8, {0: b"other" * 819 + b"!"}))
            other.write(folder / "other", b"")
            files: dict[str, bytes | Path] = {
                "a.vmdk": folder / "other",
                "b.vmdk": path,
                "x.ovf": b"<Envelope/>",
            }
            write_ova(folder / "x.ova", files, form=form)
            (found,) = discover(str(folder / "x.ova" / "b.vmdk")).chains
            engine = VmdkEngine(found.paths)
            try:
                compare_image(engine, 0, folder / "model", edges([link]), random.Random(seed))
            finally:
                engine.close()

    archives()


def compare(folder: Path, chain: Sequence[Link], seed: int) -> None:
    """Write *chain* and compare what the model, qemu-img and the engine read of it."""
    disk, twin, model = folder / "disk", folder / "twin", folder / "model"
    disk.mkdir()
    twin.mkdir()
    paint_chain(model, chain)
    leaf = write_chain(disk, chain)[-1]
    if not qemu_trouble(chain):
        oracles.qemu_raw(write_twin(disk, twin, chain)[-1], folder / "raw")
        assert oracles.first_difference(model, folder / "raw") is None, "qemu-img and the model"
    (found,) = discover(str(leaf)).chains
    few = SECTOR if seed % 4 == 0 else DEFAULT_CACHE_BYTES
    engine = VmdkEngine(found.paths, table_cache_bytes=few)
    try:
        assert len(engine.identities()) == len(chain)
        last = len(chain) - 1
        compare_image(engine, last, model, edges(chain), random.Random(seed))
        below = seed % len(chain)
        if below < last:
            paint_chain(folder / "below", chain[: below + 1])
            compare_image(engine, below, folder / "below", edges(chain), random.Random(seed))
    finally:
        engine.close()


def edges(chain: Sequence[Link]) -> tuple[list[int], list[int]]:
    """Return the sectors where extents end, and those where runs of grains of a kind begin."""
    ends, runs = [0], [0]
    for link in chain:
        start = 0
        for extent in link.extents:
            if not isinstance(extent, Flat | Zero):
                assert isinstance(extent, Hosted | Cowd | SeSparse | Stream)
                runs += [start + sector for sector in run_starts(extent.grains)]
            start += extent.sectors
            ends.append(start)
    return ends, runs


def run_starts(layout: Grains) -> list[int]:
    """Return the sectors where runs of grains of a kind begin, those with data in any order."""
    found = []
    before: tuple[int, object] = (-2, None)
    for number in sorted(layout.content):
        what = layout.content[number]
        here = number, what if isinstance(what, Mark) else bytes
        if here != (before[0] + 1, before[1]):
            found.append(number * layout.size)
        before = here
    return found


def compare_image(
    engine: VmdkEngine,
    image: int,
    model: Path,
    edges: tuple[list[int], list[int]],
    draw: random.Random,
) -> None:
    """Compare one image with the raw file *model*: whole, in pieces, and its map.

    Of *edges* some are read across, and some from.
    """
    capacity = engine.identities()[image].capacity
    assert capacity * SECTOR == model.stat().st_size
    with open(model, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as raw:
        for sector in range(0, capacity, WHOLE_SECTORS):
            count = min(WHOLE_SECTORS, capacity - sector)
            compare_piece(engine, image, sector, count, raw, direct=True)
            compare_piece(engine, image, sector, count, raw, direct=False)
        for _ in range(PIECES):
            sector = draw.randrange(capacity)
            most = draw.choice([1, 2, 4, 9, 130, 1000, WHOLE_SECTORS])
            count = draw.randint(1, min(most, capacity - sector))
            compare_piece(engine, image, sector, count, raw, direct=draw.random() < 0.5)
        for some in edges:
            for edge in draw.sample(some, min(len(some), NEAR_EDGES)):
                direct = draw.random() < 0.3
                for sector in (edge - 1, edge):
                    count = 1 + edge - sector
                    if sector >= 0 and sector + count <= capacity:
                        compare_piece(engine, image, sector, count, raw, direct=direct)
        compare_map(engine, image, capacity, raw)


def compare_piece(
    engine: VmdkEngine, image: int, sector: int, count: int, raw: mmap.mmap, *, direct: bool
) -> None:
    wanted = raw[sector * SECTOR : (sector + count) * SECTOR]
    where = f"image {image}, sectors {sector}+{count}, direct {direct}"
    buffer = bytearray(b"\xa5") * (count * SECTOR)
    if engine.read_nowait(image, sector, count, memoryview(buffer), direct):
        assert buffer == wanted, f"{where}, without waiting: {wrong(buffer, wanted)}"
    buffer = bytearray(b"\xa5") * (count * SECTOR)
    engine.read(image, sector, count, memoryview(buffer), direct)
    assert buffer == wanted, f"{where}: {wrong(buffer, wanted)}"


def wrong(found: bytes | bytearray, wanted: bytes) -> str:
    """Say where *found* is first wrong: a difference of megabytes is no help."""
    for sector in range(len(wanted) // SECTOR):
        begin, end = sector * SECTOR, (sector + 1) * SECTOR
        if found[begin:end] != wanted[begin:end]:
            head = found[begin : begin + 8].hex(), wanted[begin : begin + 8].hex()
            return f"from sector {sector} of it, {head[0]} instead of {head[1]}"
    return "equal"


def compare_map(engine: VmdkEngine, image: int, capacity: int, raw: mmap.mmap) -> None:
    """Walk the whole map: it has no gaps, and its holes are zeros."""
    here = 0
    while here < capacity:
        part = engine.map(image, here, capacity - here, 100, 60)
        for extent in part.extents:
            assert extent.sector == here
            assert extent.count > 0
            here += extent.count
            if not extent.data:
                begin = extent.sector * SECTOR
                for chunk in range(begin, here * SECTOR, 4 << 20):
                    hole = raw[chunk : min(chunk + (4 << 20), here * SECTOR)]
                    assert not hole.strip(b"\0"), f"hole at {extent.sector}+{extent.count}"
        assert here == part.next_sector
    assert here == capacity
