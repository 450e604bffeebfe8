"""Writes turns to a file until it cannot, and says what is on the disk: ``begun N``, ``synced N``.

    python logging_writer.py FILE START SIZE FIRST-TURN direct|buffered

Turn N writes what ``ranges`` says, with N in every eight bytes; those who read it use that as well.
Uses the standard library only.
"""

import mmap
import os
import random
import struct
import sys

UNIT = 4096
RANGES = 6
MOST_UNITS = 48


def ranges(turn: int, start: int, size: int) -> list[tuple[int, int]]:
    """Return (offset, length) of the writes of a turn, within *size* bytes from *start*."""
    draw = random.Random(f"{turn} {start}")
    found = []
    for _ in range(RANGES):
        units = draw.randint(1, MOST_UNITS)
        first = draw.randrange(size // UNIT - units + 1)
        found.append((start + first * UNIT, units * UNIT))
    return found


def filled(turn: int, length: int) -> bytes:
    return struct.pack("<Q", turn) * (length // 8)


def main() -> None:
    name, how = sys.argv[1], sys.argv[5]
    start, size, turn = (int(word) for word in sys.argv[2:5])
    fd = os.open(name, os.O_RDWR | (os.O_DIRECT if how == "direct" else 0))
    memory = mmap.mmap(-1, MOST_UNITS * UNIT)
    while True:
        print("begun", turn, flush=True)
        for offset, length in ranges(turn, start, size):
            memory[:length] = filled(turn, length)
            with memoryview(memory)[:length] as data:
                if os.pwrite(fd, data, offset) != length:
                    sys.exit("a short write")
        os.fsync(fd)
        print("synced", turn, flush=True)
        turn += 1


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"ended: {error}")
