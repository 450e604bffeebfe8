"""What readers of a mount do, each in a process of its own, because it may hang.

    probe.py readers FILE KIND COUNT               COUNT readers at once, all over the file
    probe.py sample FOLDER FILE STATUS COUNT       how long reads, ls and status.json take
    probe.py kill FILE PID                         how long reads stall after kill -9 of PID
    probe.py cached FILE OFFSET LENGTH             reads/s of what only vddkfs has in its cache
    probe.py longest FILE                          the longest time that reading FILE took

Of "sample", FILE is read past the page cache, no block twice, FOLDER is listed and everything in it
looked at. It prints one line a sample, "KIND SECONDS", at once.

KIND of "readers" is buffered or direct: they open the file, say "open", wait for a line on stdin,
and read; or it is opening: they open the file only then. In the end it says how many failed.

"cached" does all of it with one open file, because a file that its owner may write is read anew at
each open. "longest" reads until its stdin ends.
"""

import mmap
import os
import random
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

_BLOCK = 4096
_LARGE = 64 * 1024


def _read(fd: int, offset: int, buffer: mmap.mmap) -> None:
    if os.preadv(fd, [buffer], offset) != len(buffer):
        raise OSError("a short read")


def readers(path: str, kind: str, count: int) -> None:
    """Read at *count* places at the same time."""
    failed: list[str] = []
    flags = os.O_RDONLY | (os.O_DIRECT if kind == "direct" else 0)
    step = os.stat(path).st_size // count // _BLOCK * _BLOCK

    def read(fd: int, number: int) -> None:
        try:
            _read(
                os.open(path, flags) if fd < 0 else fd,
                number * step,
                mmap.mmap(-1, _LARGE),
            )
        except OSError as error:
            failed.append(str(error))

    files = [-1 if kind == "opening" else os.open(path, flags) for _ in range(count)]
    print("open", flush=True)
    sys.stdin.readline()
    threads = [threading.Thread(target=read, args=(fd, n)) for n, fd in enumerate(files)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(len(failed), *failed[:1])


def sample(folder: str, path: str, status: str, count: int) -> None:
    """Time reads, listings and the status, in turn."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, _BLOCK)
    places = iter(random.SystemRandom().sample(range(os.fstat(fd).st_size // _BLOCK), count))

    def look() -> None:
        for entry in os.listdir(folder):
            os.stat(os.path.join(folder, entry))

    def tell() -> None:
        with open(status, "rb") as file:
            file.read()

    kinds: dict[str, Callable[[], None]] = {
        "read": lambda: _read(fd, next(places) * _BLOCK, buffer),
        "list": look,
        "status": tell,
    }
    for _ in range(count):
        for kind, work in kinds.items():
            begun = time.perf_counter()
            work()
            print(kind, time.perf_counter() - begun, flush=True)


def kill(path: str, pid: int) -> None:
    """Read one block after the other; print the seconds from the kill to the end of its stall.

    That is the longest read of the second that follows: the process may answer one more request
    before the signal reaches it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, _BLOCK)
    blocks = os.fstat(fd).st_size // _BLOCK
    dice = random.Random(pid)
    for _ in range(100):
        _read(fd, dice.randrange(blocks) * _BLOCK, buffer)
    os.kill(pid, signal.SIGKILL)
    killed = begun = time.perf_counter()
    longest = stalled = 0.0
    while begun - killed < 1.0:
        _read(fd, dice.randrange(blocks) * _BLOCK, buffer)
        ended = time.perf_counter()
        if ended - begun > longest:
            longest, stalled = ended - begun, ended - killed
        begun = ended
    print(stalled)


def cached(path: str, offset: int, length: int) -> None:
    """Read all of a range at random, have the kernel forget it, and time 4 KiB reads of it.

    No block is read twice, so that the kernel cannot answer in place of the file system.
    """
    fd = os.open(path, os.O_RDONLY)
    # Else the kernel would read more than it is asked for.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    dice = random.Random(1)

    def places(size: int) -> list[int]:
        return dice.sample(range(offset, offset + length, size), length // size)

    buffer = mmap.mmap(-1, _LARGE)
    for place in places(_LARGE):
        _read(fd, place, buffer)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    small = places(_BLOCK)
    buffer = mmap.mmap(-1, _BLOCK)
    begun = time.perf_counter()
    for place in small:
        _read(fd, place, buffer)
    print(len(small) / (time.perf_counter() - begun))


def longest(path: str) -> None:
    """Read a file again and again; print the longest of the seconds that this took."""
    found = 0.0
    print("reading", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        begun = time.perf_counter()
        with open(path, "rb") as file:
            file.read()
        found = max(found, time.perf_counter() - begun)
    print(found)


if __name__ == "__main__":
    if sys.argv[1] == "readers":
        readers(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1] == "kill":
        kill(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "cached":
        cached(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1] == "longest":
        longest(sys.argv[2])
    else:
        sample(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
