"""vddkfs whose daemon notes each read that comes to an image, for ``run eviction``.

    traced.py FILE ARGUMENTS OF VDDKFS...

FILE is a trace: a line for each read, in the order in which they came, of seven words: time in ns,
disk, number of the image, offset, size, number of the open file, and a word that is ``direct`` for
a read past the cache, ``hole`` for one that the allocation map answers, and ``-`` for all others.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from vddkfs.disks.image import Handle, Image


@dataclass(frozen=True, slots=True)
class Read:
    """One line of a trace. Offset and size in bytes."""

    nanoseconds: int
    disk: str
    image: int
    offset: int
    size: int
    handle: int
    how: str


def load(path: Path) -> list[Read]:
    """Return what was recorded."""
    found = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            when, disk, image, offset, size, handle, how = line.rstrip("\n").split("\t")
            found.append(
                Read(int(when), disk, int(image), int(offset), int(size), int(handle), how)
            )
    return found


def daemon(file: str, words: list[str]) -> int:
    """Run vddkfs in this process, and write the trace to *file*."""
    from vddkfs.cli import main

    read = Image.read
    # By the handle itself: its id may be that of another one later.
    handles: dict[Handle, int] = {}
    with open(file, "w", encoding="utf-8") as trace:
        note = trace.write

        async def noted(self: Image, handle: Handle, start: int, size: int) -> memoryview | bytes:
            number = handles.setdefault(handle, len(handles))
            end = min(start + size, self.capacity)
            how = "direct" if handle.direct else "hole" if self.is_hole(start, end) else "-"
            disk = self.name.partition("/")[0]
            note(
                f"{time.monotonic_ns()}\t{disk}\t{self.number}\t{start}\t{end - start}\t"
                f"{number}\t{how}\n"
            )
            return await read(self, handle, start, size)

        Image.read = noted  # type: ignore[method-assign]
        sys.argv = ["vddkfs", *words]
        return int(main() or 0)


if __name__ == "__main__":
    sys.exit(daemon(sys.argv[1], sys.argv[2:]))
