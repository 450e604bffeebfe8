"""Goes on touching a file of a mount while something happens to it; a process that can be killed.

``touching.py Reads FILE OLD``: reads a part of FILE that the kernel has, and after the first line
on stdin anything, also past the page cache. ``touching.py Maps FILE``: reads a shared map of FILE,
and dirties the pages of a private one. Says "ready", and for each line on stdin, as JSON, what was
seen how often since the one before: reads that were as the file OLD, were stale, or were neither;
rounds through the maps. Ends at the end of stdin.
"""

import errno
import json
import mmap
import os
import random
import select
import sys
from collections import Counter

PIECE = 64 * 1024
CACHED = 1024 * 1024
MINE = b"my bytes"


class Reads:
    def __init__(self, name: str, old: str) -> None:
        self.chance = random.Random(name)
        self.buffered = os.open(name, os.O_RDONLY)
        self.direct = os.open(name, os.O_RDONLY | os.O_DIRECT)
        with open(old, "rb") as file:
            self.old = file.read()
        for at in range(0, CACHED, PIECE):
            self.read(self.buffered, at)

    def read(self, fd: int, at: int) -> str:
        try:
            data = os.pread(fd, PIECE, at)
        except OSError as error:
            return "stale" if error.errno == errno.ESTALE else str(error)
        return "old" if data == self.old[at : at + PIECE] else f"another disk at {at}"

    def touch(self, anywhere: bool) -> str:
        if not anywhere:
            return self.read(self.buffered, self.chance.randrange(0, CACHED, PIECE))
        fd = self.chance.choice((self.buffered, self.direct))
        return self.read(fd, self.chance.randrange(0, len(self.old), PIECE))


class Maps:
    def __init__(self, name: str) -> None:
        self.chance = random.Random(name)
        fd = os.open(name, os.O_RDONLY)
        self.shared = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self.private = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        self.pages = range(0, len(self.shared), mmap.PAGESIZE)
        self.dirty = self.pages[::2]
        for at in self.dirty:
            self.private[at : at + len(MINE)] = MINE

    def touch(self, _anywhere: bool) -> str:
        for at in self.chance.sample(self.pages, 64):
            self.shared[at : at + 4096]
            self.private[at : at + 4096]
        at = self.chance.choice(self.dirty)
        return "round" if self.private[at : at + len(MINE)] == MINE else f"lost at {at}"


def main(kind: str, *names: str) -> None:
    os.nice(10)  # it never waits, and others have to do with two processors
    toucher: Reads | Maps = {"Reads": Reads, "Maps": Maps}[kind](*names)
    print("ready", flush=True)
    seen: Counter[str] = Counter()
    asked = 0
    while True:
        seen[toucher.touch(asked > 0)] += 1
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                return
            asked += 1
            print(json.dumps(seen), flush=True)
            seen.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
