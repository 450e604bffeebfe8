"""The VMDKs of ``run formats``: one disk in every format, two huge ones, and two chains.

qemu-img makes what it can make. It writes neither vmfsSparse nor seSparse: those are written here,
with no more in them than a reader looks at.
"""

import itertools
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.formats_metrics import CHAINS, CONVERTED, SPLIT
from benchmarks.formats_sparse import (
    PIECE,
    write_cowd,
    write_descriptor,
    write_empty_part,
    write_sesparse,
)
from benchmarks.material import MIB, TIB, WIDE, Material, Sizes, Store
from benchmarks.processes import BenchmarkError, run

"""Links of the two chains that show the same bytes."""

_SECTOR: Final = 512
_EXTENTS: Final = 4
"""Of the disk in parts: a real part has 2 GB, too much for a disk of this size to have some."""
_PART_SECTORS: Final = 4_192_256
"""Of the parts of the huge disk: what VMware's programs make."""
_BASE_CID: Final = "10000000"


@dataclass(frozen=True)
class FormatSizes(Sizes):
    """Sizes whose *base* is the capacity of one disk, with random reads all over it."""

    huge: int = WIDE
    chain: int = 256 * MIB

    @property
    def dense(self) -> tuple[int, int]:
        """All of the disk."""
        return 0, self.base


def sizes_of(disk: int, *, quick: bool) -> FormatSizes:
    """Return the sizes for disks of *disk* bytes."""
    return FormatSizes(
        name=f"formats-{disk // MIB}{'-quick' if quick else ''}",
        base=disk,
        huge=TIB if quick else WIDE,
        chain=(32 if quick else 256) * MIB,
        # For one material, with what it is made from.
        ready_gib=1.0 + 2.5 * disk / 1024**3,
        delta_changes=0,
        thin=0,
        thin_data=0,
        thin_piece=0,
        hung=0,
        wide_cache=0,
    )


class FormatStore(Store):
    """The material of one size, in *folder*."""

    def __init__(self, folder: Path, sizes: FormatSizes, say: Callable[[str], None]) -> None:
        super().__init__(folder, sizes, say)
        self._sizes = sizes

    def disk(self, name: str) -> Material:
        """Return the disk in the format *name*, one of FORMATS."""
        if name in CONVERTED:
            folder = self._made(name, lambda folder: self._make_converted(folder, name))
            leaf, files = folder / "disk.vmdk", sorted(folder.glob("*.vmdk"))
        elif name == SPLIT:
            folder = self._made(name, self._make_split)
            leaf, files = folder / "disk.vmdk", sorted(folder.glob("*.vmdk"))
        else:
            folder = self._made("vmfs", self._make_deltas)
            leaf = folder / f"{name}-2.vmdk"
            files = sorted([*folder.glob(f"{name}*.vmdk"), *folder.glob("disk*.vmdk")])
        return Material(name, leaf, tuple(files), self.sizes.base, "disk")

    def huge(self, name: str) -> Material:
        """Return the huge disk *name*, one of HUGE: 62 TiB, or 1 TiB for a quick run.

        None of its files are kept in the page cache: they are too many. A warm-up round reads what
        opening them reads.
        """
        make = self._make_huge_split if name == "huge-split" else self._make_huge_sesparse
        return Material(name, self._made(name, make) / "disk.vmdk", (), self._sizes.huge, "disk")

    def chain_of(self, links: int) -> Material:
        """Return the chain of *links*, one of CHAINS, to be mounted without a cache."""
        folder = self._made("chains", self._make_chains)
        leaf = folder / f"chain-{links}-{links - 1}.vmdk"
        files = [folder / "disk.vmdk", *sorted(folder.glob(f"chain-{links}-*.vmdk"))]
        return Material(
            f"chain-{links}",
            leaf,
            tuple(files),
            self._sizes.chain,
            "disk",
            ("cache_size=16M", "readahead=0"),
        )

    def _make_converted(self, folder: Path, name: str) -> None:
        raw = folder / "content.raw"
        with raw.open("wb") as file:
            for piece in mixed(random.Random(4), self.sizes.base):
                file.write(piece)
        _convert(raw, folder / "disk.vmdk", name)
        raw.unlink()

    def _make_split(self, folder: Path) -> None:
        part = self.sizes.base // _EXTENTS
        pieces = mixed(random.Random(4), self.sizes.base)
        raw = folder / "content.raw"
        lines = []
        for number in range(_EXTENTS):
            with raw.open("wb") as file:
                for piece in itertools.islice(pieces, part // PIECE):
                    file.write(piece)
            target = folder / f"part-{number}.vmdk"
            _convert(raw, target, SPLIT)
            target.unlink()
            lines.append(f'RW {part // _SECTOR} SPARSE "part-{number}-s001.vmdk"')
        raw.unlink()
        write_descriptor(folder / "disk.vmdk", SPLIT, lines)

    def _make_deltas(self, folder: Path) -> None:
        """Make a flat disk of VMFS, and two deltas of each kind that hold a quarter of it each."""
        sectors = self.sizes.base // _SECTOR
        with (folder / "disk-flat.vmdk").open("wb") as file:
            for piece in mixed(random.Random(4), self.sizes.base):
                file.write(piece)
        write_descriptor(
            folder / "disk.vmdk", "vmfs", [f'RW {sectors} VMFS "disk-flat.vmdk"'], cid=_BASE_CID
        )
        dice = random.Random(5)
        changes = [_runs(dice, self.sizes.base // PIECE, 4) for _ in range(2)]
        for kind, write, extent in (
            ("vmfsSparse", write_cowd, "delta"),
            ("seSparse", write_sesparse, "sesparse"),
        ):
            parent, cid = "disk.vmdk", _BASE_CID
            for number, pieces in enumerate(changes, 1):
                name, own = f"{kind}-{number}.vmdk", f"2000000{number}"
                data = mixed(random.Random(10 + number), len(pieces) * PIECE)
                write(folder / f"{kind}-{number}-{extent}.vmdk", sectors, pieces, data)
                line = f'RW {sectors} {kind.upper()} "{kind}-{number}-{extent}.vmdk"'
                write_descriptor(folder / name, kind, [line], own, cid, parent)
                parent, cid = name, own

    def _make_huge_sesparse(self, folder: Path) -> None:
        capacity = self._sizes.huge
        pieces = sorted(random.Random(6).sample(range(capacity // PIECE), 256))
        data = mixed(random.Random(7), len(pieces) * PIECE)
        write_sesparse(folder / "disk-sesparse.vmdk", capacity // _SECTOR, pieces, data)
        line = f'RW {capacity // _SECTOR} SESPARSE "disk-sesparse.vmdk"'
        write_descriptor(folder / "disk.vmdk", "seSparse", [line])

    def _make_huge_split(self, folder: Path) -> None:
        lines: list[str] = []
        left = self._sizes.huge // _SECTOR
        while left:
            sectors = min(_PART_SECTORS, left)
            left -= sectors
            name = f"disk-s{len(lines) + 1:05}.vmdk"
            write_empty_part(folder / name, sectors)
            lines.append(f'RW {sectors} SPARSE "{name}"')
        write_descriptor(folder / "disk.vmdk", SPLIT, lines)

    def _make_chains(self, folder: Path) -> None:
        """Make both chains on one base; the longer one has its changes in many deltas."""
        capacity = self._sizes.chain
        raw = folder / "content.raw"
        dice = random.Random(8)
        with raw.open("wb") as file:
            for _ in range(0, capacity, MIB):
                file.write(dice.randbytes(MIB))
        _convert(raw, folder / "disk.vmdk", "monolithicSparse")
        raw.unlink()
        dice = random.Random(9)
        changes = []
        for number in range(1, max(CHAINS)):
            places = dice.sample(range(capacity // PIECE), max(capacity // PIECE // 40, 1))
            changes.append([f"write -q -P {number} {place * PIECE} {PIECE}" for place in places])
        create = ["qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicSparse"]
        for links in CHAINS:
            parent = "disk.vmdk"
            for number in range(1, links):
                leaf = folder / f"chain-{links}-{number}.vmdk"
                run([*create, "-b", parent, "-F", "vmdk", leaf])
                # The last link of both chains has what is left to do.
                mine = changes[number - 1 : number if number < links - 1 else None]
                words = [word for change in itertools.chain(*mine) for word in ("-c", change)]
                run(["qemu-io", "-f", "vmdk", *words, leaf])
                parent = leaf.name
        leaves = [folder / f"chain-{links}-{links - 1}.vmdk" for links in CHAINS]
        # Fails unless both show the same.
        run(["qemu-img", "compare", "-f", "vmdk", "-F", "vmdk", *leaves])


def mixed(dice: random.Random, size: int) -> Iterator[bytes]:
    """Yield *size* bytes in pieces as a guest has them, no piece like another.

    Of ten pieces three do not compress, three are text, three are records with numbers and
    padding, and one is zeros. The pieces of a kind come in runs, as those of a file do.
    """
    if size % PIECE:
        raise BenchmarkError(f"{size} bytes are not pieces of {PIECE}")
    pools = (_text(dice, 4 * MIB), _records(dice, 4 * MIB))
    left = size // PIECE
    while left:
        count = min(left, dice.randrange(1, 33))
        left -= count
        kind = dice.randrange(10)
        for _ in range(count):
            if kind == 9:
                yield bytes(PIECE)
            elif kind < 3:
                yield dice.randbytes(PIECE)
            else:
                start = dice.randrange(4 * MIB - PIECE)
                yield dice.randbytes(8) + pools[kind % 2][start + 8 : start + PIECE]


def _text(dice: random.Random, size: int) -> bytes:
    letters = b"etaoinshrdlucmfwypvbgk"
    words = [bytes(dice.choices(letters, k=dice.randrange(2, 11))) for _ in range(4000)]
    # Frequent words are much more frequent, as in any language.
    weights = [1 / number for number in range(1, len(words) + 1)]
    return b" ".join(dice.choices(words, weights, k=size // 3))[:size]


def _records(dice: random.Random, size: int) -> bytes:
    record = struct.Struct("<IIQ8s8s")
    rows = (
        record.pack(number, dice.randrange(16), dice.randrange(1 << 40), b"\0" * 8, b"file")
        for number in range(-(-size // record.size))
    )
    return b"".join(rows)[:size]


def _runs(dice: random.Random, pieces: int, share: int) -> list[int]:
    """Return one in *share* of the disk's pieces, in runs of 64 KiB to 1 MiB."""
    chosen: set[int] = set()
    while len(chosen) < pieces // share:
        start = dice.randrange(pieces)
        chosen.update(range(start, min(start + dice.randrange(1, 17), pieces)))
    return sorted(chosen)


def _convert(raw: Path, target: Path, kind: str) -> None:
    convert = ["qemu-img", "convert", "-q", "-f", "raw", "-O", "vmdk"]
    run([*convert, "-o", f"subformat={kind}", raw, target])
