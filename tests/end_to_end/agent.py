"""Touches a mount for a test, in a process that can be killed when the mount hangs.

Reads pickled (function, arguments) from stdin, each behind its length, and answers (result,
exception) on stdout. A function is one of this module, or else of ``os``. Uses the standard library
only, and imports little: every mount of a test starts one.
"""

import ctypes
import hashlib
import mmap
import os
import pickle
import random
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

MIB = 1024 * 1024


def flags(direct: bool) -> int:
    return os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)


def read(name: str, offset: int, size: int, direct: bool = False) -> bytes:
    """Open, read one range in one call, close."""
    fd = os.open(name, flags(direct))
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def content(name: str) -> bytes:
    """Return all of a file."""
    fd = os.open(name, flags(False))
    try:
        return b"".join(iter(lambda: os.read(fd, MIB), b""))
    finally:
        os.close(fd)


def sha256(name: str, direct: bool = False, chunk: int = MIB) -> str:
    """Hash a file from its beginning to its end."""
    digest = hashlib.sha256()
    fd = os.open(name, flags(direct))
    try:
        while data := os.read(fd, chunk):
            digest.update(data)
    finally:
        os.close(fd)
    return digest.hexdigest()


def put(name: str, data: bytes) -> None:
    """Write a new file, or all of an old one, and have it kept."""
    with open(name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fill(name: str, size: int, seed: int) -> str:
    """Write a file of noise, *size* bytes in whole MiB, have it kept, and return its hash."""
    chance = random.Random(seed)
    digest = hashlib.sha256()
    with open(name, "wb", buffering=0) as file:
        for _ in range(size // MIB):
            piece = chance.randbytes(MIB)
            digest.update(piece)
            file.write(piece)
        os.fsync(file.fileno())
    return digest.hexdigest()


def drop_cache(fd: int) -> None:
    """Have the kernel forget the pages of an open file."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def tree(top: str) -> list[str]:
    """Return every name below a folder, folders with a slash behind them."""
    found = []
    for folder, folders, files in os.walk(top, onerror=_raise):
        base = os.path.relpath(folder, top)
        found += [os.path.normpath(os.path.join(base, name)) + "/" for name in folders]
        found += [os.path.normpath(os.path.join(base, name)) for name in files]
    return sorted(found)


def seek_map(name: str) -> list[tuple[int, int, bool]]:
    """Return (start, end, is data) of a file as SEEK_DATA and SEEK_HOLE tell it."""
    found: list[tuple[int, int, bool]] = []
    fd = os.open(name, flags(False))
    try:
        here, end = 0, os.fstat(fd).st_size
        while here < end:
            try:
                data = os.lseek(fd, here, os.SEEK_DATA)
            except OSError:
                data = end
            if data > here:
                found.append((here, data, False))
            if data >= end:
                break
            here = os.lseek(fd, data, os.SEEK_HOLE)
            found.append((data, here, True))
    finally:
        os.close(fd)
    return found


def mapped(name: str, direct: bool, ranges: list[tuple[int, int]]) -> list[bytes]:
    """Return ranges of a file as a memory map shows them."""
    fd = os.open(name, flags(direct))
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as area:
            return [area[start : start + size] for start, size in ranges]
    finally:
        os.close(fd)


def map_write(name: str, offset: int, data: bytes) -> bytes:
    """Write through a shared memory map, have it written back; return what the map shows then."""
    fd = os.open(name, os.O_RDWR)
    try:
        with mmap.mmap(fd, 0) as area:
            area[offset : offset + len(data)] = data
            area.flush()
            return area[offset : offset + len(data)]
    finally:
        os.close(fd)


def write_at_once(name: str, places: list[int], size: int) -> float:
    """Write pieces past the page cache, each from a thread of its own; return the seconds."""
    fd = os.open(name, os.O_RDWR | os.O_DIRECT)
    begin = threading.Barrier(len(places) + 1)

    def write(place: int) -> None:
        with mmap.mmap(-1, size) as area:
            area[:] = bytes([place // size % 255 + 1]) * size
            begin.wait()
            os.pwrite(fd, area, place)

    threads = [threading.Thread(target=write, args=(place,)) for place in places]
    try:
        for thread in threads:
            thread.start()
        begin.wait()
        start = time.monotonic()
        for thread in threads:
            thread.join()
        return time.monotonic() - start
    finally:
        os.close(fd)


_held: list[tuple[int, int]] = []
"""Address and size of what ``hold_pages`` has mapped."""


def hold_pages(name: str) -> None:
    """Have the kernel keep the pages of a file or a block device, wanted elsewhere or not."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    fd = os.open(name, flags(False))
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        # Shared, or mlock() would keep copies of its own.
        area = libc.mmap(
            None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0)
        )
    finally:
        os.close(fd)
    if area in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _held.append((area, size))
    # What is missing is read now.
    if libc.mlock(ctypes.c_void_p(area), ctypes.c_size_t(size)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def release_pages() -> None:
    """End all :func:`hold_pages`."""
    while _held:
        area, size = _held.pop()
        ctypes.CDLL(None).munmap(ctypes.c_void_p(area), ctypes.c_size_t(size))


def hammer(name: str, wanted: str, seed: int, count: int) -> str:
    """Read at random in all manners, and compare with the file *wanted*; return what is wrong."""
    chance = random.Random(seed)
    fds = [os.open(name, flags(False)), os.open(name, flags(False)), os.open(name, flags(True))]
    other = os.open(wanted, flags(False))
    end = os.fstat(other).st_size
    os.posix_fadvise(fds[1], 0, 0, os.POSIX_FADV_RANDOM)
    stream = 0
    try:
        for number in range(count):
            fd = chance.choice(fds)
            size = chance.choice([512, 4096, 5000, 65536, 200_000, MIB, 3 * MIB])
            offset = stream if number % 3 else chance.randrange(end)
            found = os.pread(fd, size, offset)
            right = os.pread(other, size, offset)
            if found != right:
                pairs = enumerate(zip(found, right, strict=False))
                bad = [index for index, (one, two) in pairs if one != two]
                return (
                    f"read {number} by handle {fds.index(fd)}: {size} bytes at {offset}: "
                    f"{len(found)} of {len(right)} came, {len(bad)} are wrong"
                    + (f", from {offset + bad[0]} to {offset + bad[-1]}" if bad else "")
                )
            stream = (offset + size) % end
            if number % 50 == 0:
                drop_cache(fd)
    finally:
        for fd in (*fds, other):
            os.close(fd)
    return ""


def _raise(error: OSError) -> None:
    raise error


def _receive() -> tuple[str, tuple[Any, ...]]:
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        sys.exit(0)
    (length,) = struct.unpack("<I", head)
    name, arguments = pickle.loads(sys.stdin.buffer.read(length))
    return name, arguments


def main() -> None:
    while True:
        name, arguments = _receive()
        function: Callable[..., Any] = globals().get(name) or getattr(os, name)
        answer: tuple[Any, BaseException | None]
        try:
            answer = (function(*arguments), None)
        except Exception as error:
            answer = (None, error)
        packed = pickle.dumps(answer)
        sys.stdout.buffer.write(struct.pack("<I", len(packed)) + packed)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
