"""The VMDKs that are read: made once in the work folder, used again by later runs.

Data is incompressible, no block of it is like another, and where it lies is the same in every run.
"""

import contextlib
import ctypes
import itertools
import mmap
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.processes import BenchmarkError, run

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB
WIDE: Final = 62 * TIB
"""Capacity of the disk that has nothing in it: the most that a VMDK may have."""
_WIDE_EXTENT: Final = 2 * TIB
"""ext4 has no files of 16 TiB."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
for _call in (_libc.munmap, _libc.mlock):
    _call.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_RECIPE: Final = "2"
"""Changes when the material does, so that older material is made anew."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything, in bytes. *scattered* is a fixed pattern of data in the base."""

    name: str
    base: int
    delta_changes: int
    thin: int
    thin_data: int
    thin_piece: int
    """What is copied of the thin disk by a system that would need minutes for all of it."""
    hung: int
    wide_cache: int
    """cache_size for the widest disk, where there is the memory for it."""
    ready_gib: float

    @property
    def extents(self) -> list[tuple[int, int]]:
        """Where the base has data: half of it, in four pieces; (offset, length)."""
        part = self.base // 16
        return [(0, 3 * part), (4 * part, 2 * part), (8 * part, 2 * part), (12 * part, part)]

    @property
    def dense(self) -> tuple[int, int]:
        """A range of the base without holes, for random reads: (offset, length)."""
        return self.extents[1]

    @property
    def cached(self) -> tuple[int, int]:
        """What of that is kept in a cache that has nothing else: less than cache_size."""
        offset, length = self.dense
        return offset, min(length, 128 * MIB)


FULL: Final = Sizes(
    name="full",
    base=4 * GIB,
    delta_changes=64 * MIB,
    thin=200 * GIB,
    thin_data=256 * MIB,
    thin_piece=2 * GIB,
    hung=256 * MIB,
    wide_cache=4 * GIB,
    ready_gib=6.0,
)
QUICK: Final = Sizes(
    name="quick",
    base=256 * MIB,
    delta_changes=4 * MIB,
    thin=8 * GIB,
    thin_data=16 * MIB,
    thin_piece=128 * MIB,
    hung=64 * MIB,
    wide_cache=256 * MIB,
    ready_gib=0.6,
)

LINKS: Final = 5


@dataclass(frozen=True)
class Material:
    """One disk to mount: its leaf, all files that its data comes from, and what is in it."""

    name: str
    leaf: Path
    files: tuple[Path, ...]
    capacity: int
    disk: str
    """The name of the disk's folder in a mount of vddkfs."""
    options: tuple[str, ...] = ()
    """What vddkfs is to be mounted with."""


class Store:
    """The material of one size, in *folder*."""

    def __init__(self, folder: Path, sizes: Sizes, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.sizes = sizes
        self._say = say

    @property
    def hung_folder(self) -> Path:
        """A VM folder with two disks, "one" and "two"."""
        return self.folder / "hung"

    def base(self) -> Material:
        """The monolithicSparse disk, half full."""
        folder = self._made("chain", self._make_chain)
        path = folder / "base.vmdk"
        return Material("base", path, (path,), self.sizes.base, "base")

    def chain(self) -> Material:
        """The same disk below four deltas: five links."""
        folder = self._made("chain", self._make_chain)
        links = tuple(folder / name for name in _link_names())
        return Material("chain", links[-1], links, self.sizes.base, "base")

    def thin(self) -> Material:
        """The large disk with little in it."""
        path = self._made("thin", self._make_thin) / "thin.vmdk"
        return Material("thin", path, (path,), self.sizes.thin, "thin")

    def hung(self) -> Material:
        """The two disks of ``hung_folder``, full of data; the leaf is the disk that answers."""
        folder = self._made("hung", self._make_hung)
        files = (folder / "one.vmdk", folder / "two.vmdk")
        return Material("hung", files[1], files, self.sizes.hung, "two")

    def wide(self) -> Material:
        """The widest disk: flat, without any data, so that its zeros are read like data.

        Its owner may write it at any time, so that its holes do not count as known zeros. No file
        of it is in the page cache: nothing is there that would have to be.
        """
        path = self._made("wide", self._make_wide) / "wide.vmdk"
        size = self.sizes.wide_cache
        while 2 * size > _available_memory() and size > 256 * MIB:
            size //= 2
        return Material("wide", path, (), WIDE, "wide", (f"cache_size={size // MIB}M",))

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the folder *name*, made with *make* unless it is there and whole."""
        done = self.folder / name
        stamp = done / "recipe"
        if stamp.exists() and stamp.read_text() == _RECIPE:
            return done
        free = shutil.disk_usage(self.folder.parent).free / GIB
        if free < self.sizes.ready_gib:
            raise BenchmarkError(
                f"{self.folder}: {free:.1f} GiB free, {self.sizes.ready_gib} wanted; "
                "name another folder with --work"
            )
        self._say(f"making the material: {name}")
        making = self.folder / f"{name}.making"
        for folder in (done, making):
            shutil.rmtree(folder, ignore_errors=True)
        making.mkdir(parents=True)
        make(making)
        (making / "recipe").write_text(_RECIPE)
        making.rename(done)
        os.sync()
        return done

    def _make_chain(self, folder: Path) -> None:
        sizes = self.sizes
        _convert(folder, "base", sizes.base, sizes.extents)
        dice = random.Random(2)
        names = _link_names()
        for number, (parent, name) in enumerate(itertools.pairwise(names), 1):
            create = ["qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicSparse"]
            run([*create, "-b", parent, "-F", "vmdk", folder / name])
            writes: list[str | Path] = []
            for offset, length in _changes(dice, sizes):
                writes += ["-c", f"write -q -P {0x10 + number} {offset} {length}"]
            run(["qemu-io", "-f", "vmdk", *writes, folder / name])

    def _make_thin(self, folder: Path) -> None:
        sizes = self.sizes
        places = random.Random(3).sample(range(sizes.thin // MIB), sizes.thin_data // MIB)
        _convert(folder, "thin", sizes.thin, [(place * MIB, MIB) for place in sorted(places)])

    def _make_wide(self, folder: Path) -> None:
        lines = []
        for number in range(1, WIDE // _WIDE_EXTENT + 1):
            name = f"wide-f{number:03}.vmdk"
            with (folder / name).open("wb") as file:
                file.truncate(_WIDE_EXTENT)
            lines.append(f'RW {_WIDE_EXTENT // 512} FLAT "{name}" 0')
        write_descriptor(folder / "wide.vmdk", "twoGbMaxExtentFlat", lines)

    def _make_hung(self, folder: Path) -> None:
        for name in ("one", "two"):
            _convert(folder, name, self.sizes.hung, [(0, self.sizes.hung)])


def write_descriptor(path: Path, kind: str, extents: Sequence[str]) -> None:
    """Write the descriptor of a flat disk, of the createType *kind*, with these extent lines."""
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="{kind}"\n\n' + "".join(f"{line}\n" for line in extents) + "\n"
        'ddb.adapterType = "lsilogic"\nddb.virtualHWVersion = "14"\n'
    )


def _available_memory() -> int:
    """Return the bytes of memory that are to be had without anybody's harm."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * KIB
    raise BenchmarkError("/proc/meminfo does not tell what is available")


def _link_names() -> list[str]:
    return ["base.vmdk", *(f"delta-{number}.vmdk" for number in range(1, LINKS))]


def _changes(dice: random.Random, sizes: Sizes) -> Iterator[tuple[int, int]]:
    """Where a delta changes its parent: 64 KiB to 1 MiB each, most of them where data is."""
    left = sizes.delta_changes
    while left > 0:
        length = 64 * KIB * dice.randint(1, 16)
        left -= length
        start, size = (0, sizes.base) if dice.random() < 0.2 else dice.choice(sizes.extents)
        yield start + dice.randrange((size - length) // (64 * KIB) + 1) * 64 * KIB, length


def _convert(folder: Path, name: str, size: int, extents: list[tuple[int, int]]) -> None:
    """Make *name*.vmdk, monolithicSparse, with data in *extents*."""
    raw = folder / f"{name}.raw"
    block = bytearray(os.urandom(MIB))
    with raw.open("wb") as file:
        file.truncate(size)
        for start, length in extents:
            for offset in range(start, start + length, MIB):
                for page in range(0, MIB, 4 * KIB):
                    block[page : page + 8] = (offset + page + 1).to_bytes(8, "little")
                file.seek(offset)
                file.write(block[: min(MIB, start + length - offset)])
    target = folder / f"{name}.vmdk"
    convert = ["qemu-img", "convert", "-q", "-f", "raw", "-O", "vmdk"]
    run([*convert, "-o", "subformat=monolithicSparse", raw, target])
    raw.unlink()


def warm(material: Material) -> None:
    """Read all of the source, so that its data comes from the page cache."""
    buffer = bytearray(4 * MIB)
    for path in material.files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[tuple[ctypes.c_void_p, int]]:
    """Yield address and length of a mapping of the whole file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        found = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if found == ctypes.c_void_p(-1).value:
        raise BenchmarkError(f"{path}: {os.strerror(ctypes.get_errno())}")
    address = ctypes.c_void_p(found)
    try:
        yield address, size
    finally:
        _libc.munmap(address, size)


@contextlib.contextmanager
def kept_in_memory(material: Material) -> Iterator[bool]:
    """Keep the source in the page cache (mlock); yields False where that is not permitted."""
    with contextlib.ExitStack() as stack:
        locked = True
        for path in material.files:
            address, size = stack.enter_context(_mapped(path))
            locked = locked and not _libc.mlock(address, size)
        yield locked


def resident(material: Material) -> float:
    """Return the share of the source that is in the page cache; 1.0 where that is secret."""
    there = total = 0
    for path in material.files:
        with _mapped(path) as (address, size):
            states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            if _libc.mincore(address, size, states):
                return 1.0
        there += sum(state & 1 for state in states)
        total += len(states)
    return there / total if total else 1.0
