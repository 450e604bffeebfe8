"""A guest's disk with many files, and readers of it, for ``run eviction``.

    guest.py boot FOLDER RAW COUNT      read COUNT times a file of FOLDER at random
    guest.py walk FOLDER RAW            read all files of FOLDER in order
    guest.py walk FOLDER RAW changed    read a third of them

FOLDER is where the guest's file system is mounted, RAW the disk that it is on. The readers run in a
process of their own, which can be ended if a mount does not answer. A kernel with memory to spare
would keep all of such a disk, and nothing would be read twice: the readers have it forget what it
has every now and then, as it would if its memory were wanted for other things.
"""

import itertools
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.processes import run

KIB: Final = 1024
MIB: Final = 1024 * KIB
_PIECE: Final = 256 * KIB
"""What is read at once of a large file at boot."""
_HOT_SHARE: Final = 0.1
_HOT_READS: Final = 0.6
"""At boot this share of the reads is of that share of the files, the first of them most of all."""
_FORGET_FILES: Final = 100
"""Files after which the kernel is told to forget the disk."""


@dataclass(frozen=True)
class Size:
    """How much is in the guest. *disk* in MiB, *large* too; *reads* at boot."""

    name: str
    disk: int
    small: int
    large: Sequence[int]
    reads: int


FULL: Final = Size("full", disk=1024, small=30_000, large=(4, 8, 16, 24, 32, 64) * 2, reads=40_000)
QUICK: Final = Size("quick", disk=64, small=1_500, large=(2, 4, 8), reads=800)


def make_files(folder: Path, size: Size) -> None:
    """Make the guest's files: small ones of 512 bytes to 64 KiB in folders of 100, and large ones.

    What is in them is random, the sizes are the same in every run.
    """
    dice = random.Random(5)
    for number in range(size.small):
        place = folder / f"usr/{number // 100 % 10}/{number // 1000}"
        if number % 100 == 0:
            place.mkdir(parents=True)
        (place / f"file-{number}").write_bytes(os.urandom(int(512 * 2 ** dice.uniform(0, 7))))
    (folder / "var").mkdir()
    for number, mib in enumerate(size.large):
        with (folder / f"var/large-{number}").open("wb") as file:
            for _ in range(mib):
                file.write(os.urandom(MIB))


def make_disk(folder: Path, size: Size, name: str) -> Path:
    """Make *name*.vmdk with an ext4 in it, and an empty delta, which freezes it; return that."""
    files, raw, base = folder / "files", folder / "guest.raw", folder / f"{name}.vmdk"
    if not raw.exists():
        make_files(files, size)
        with raw.open("wb") as file:
            file.truncate(size.disk * MIB)
        run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", files, raw])
        run(["rm", "-r", files])
    sparse = ["-o", "subformat=monolithicSparse"]
    run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "vmdk", *sparse, raw, base])
    delta = folder / f"{name}-1.vmdk"
    backing = ["-b", base.name, "-F", "vmdk"]
    run(["qemu-img", "create", "-q", "-f", "vmdk", *sparse, *backing, delta])
    return delta


def files_below(folder: Path) -> list[Path]:
    """Return all files of the guest, in the order of their names."""
    return sorted(Path(place) / name for place, _, names in os.walk(folder) for name in names)


def boot_order(files: Sequence[Path], count: int) -> Iterator[Path]:
    """Yield *count* files at random, a few of them often; the same ones in every run."""
    dice = random.Random(6)
    shuffled = list(files)
    dice.shuffle(shuffled)
    hot = shuffled[: max(1, int(len(shuffled) * _HOT_SHARE))]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(hot) + 1)))
    for _ in range(count):
        if dice.random() < _HOT_READS:
            yield dice.choices(hot, cum_weights=weights)[0]
        else:
            yield dice.choice(shuffled)


def looks_changed(number: int) -> bool:
    """Say whether a backup reads file *number* of the walk again: about a third of them."""
    return random.Random(number).random() < 1 / 3


def forget(descriptor: int) -> None:
    """Have the kernel drop what it has of an open file."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def boot(folder: Path, raw: int, count: int) -> None:
    """Read files at random: small ones as a whole, of large ones a piece somewhere."""
    dice = random.Random(7)
    for number, path in enumerate(boot_order(files_below(folder), count)):
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _PIECE:
                file.seek(dice.randrange(size - _PIECE))
            file.read(_PIECE)
            forget(file.fileno())
        if number % 20 == 0:
            forget(raw)


def walk(folder: Path, raw: int, changed: bool) -> None:
    """Read all files in order, a MiB at a time, or only those that look *changed*."""
    for number, path in enumerate(files_below(folder)):
        path.stat()
        if not changed or looks_changed(number):
            with path.open("rb", buffering=0) as file:
                while file.read(MIB):
                    pass
        if number % _FORGET_FILES == 0:
            forget(raw)


def main(words: Sequence[str]) -> None:
    """Run one reader."""
    what, folder, name, *rest = words
    raw = os.open(name, os.O_RDONLY)
    if what == "boot":
        boot(Path(folder), raw, int(rest[0]))
    else:
        walk(Path(folder), raw, bool(rest))


if __name__ == "__main__":
    main(sys.argv[1:])
