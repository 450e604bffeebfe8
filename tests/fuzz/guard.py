"""The promises that hold for whatever a file contains, watched while a target runs.

Within ``watched(folder)``: nothing outside the folder is opened, nothing is opened for writing, no
read is larger than ``MAX_READ``, the address space grows by no more than ``MAX_GROWTH``, the CPU
seconds stay below ``MAX_SECONDS``, and afterwards as many files are open as before. Within
``reads_inside`` no byte outside a member of an archive is read. A breach is a ``Finding``; the only
exception let through without one is a VddkfsError of one printable line.
"""

import ctypes
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vddkfs.errors import VddkfsError

MAX_READ = 4 << 20
"""Bytes of one read: the largest that the engine asks for is a grain of 2 MiB."""

MAX_GROWTH = 48 << 20
"""Bytes of address space: the caches of tables and grains (24 MiB), and what is under way."""

MAX_SECONDS = 5.0
"""CPU seconds of one input; ordinary ones take milliseconds."""

MAX_LINE = 20_000
"""Characters of an error: a path may have 4096 bytes, of four characters each when escaped."""

_M_MMAP_THRESHOLD = -3
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LIBRARY = os.path.dirname(os.__file__)


class Finding(AssertionError):
    """A promise was broken."""


class _Watch:
    """What the audit hook, which cannot be removed, looks at. Idle while *folder* is empty."""

    def __init__(self) -> None:
        self.folder = ""
        self.breach = ""
        self.hooked = False
        self.places: Sequence[tuple[int, int]] = ()

    def hook(self) -> None:
        if not self.hooked:
            self.hooked = True
            sys.addaudithook(self._audit)
            # Large blocks come from the kernel and go back to it, or some would be free already
            # when the bound is set.
            if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
                mallopt(_M_MMAP_THRESHOLD, 1 << 18)

    def begin(self, folder: str) -> None:
        self.breach = ""
        self.folder = folder

    def end(self) -> None:
        self.folder = ""
        self.places = ()
        if self.breach:
            raise Finding(self.breach)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or event != "open":
            return
        # Remembered, not only raised: the code under test may catch what is raised here.
        path, _, flags = arguments
        if isinstance(path, int):
            return
        path = os.path.abspath(os.fsdecode(path))
        if path.startswith(_LIBRARY):
            return  # a codec that is imported when a file names it
        if path != self.folder and not path.startswith(self.folder + "/"):
            self.breach = f"opened {path!r}, outside the folder"
        elif flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            self.breach = f"opened {path!r} with flags {flags:#o}"


_watch = _Watch()
_pread, _preadv = os.pread, os.preadv


def _checked_pread(fd: int, size: int, offset: int) -> bytes:
    _check_read(size, offset)
    return _pread(fd, size, offset)


def _checked_preadv(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
    _check_read(sum(len(memoryview(buffer).cast("B")) for buffer in buffers), offset)
    # A tmpfs knows no RWF_NOWAIT, but never waits either.
    return _preadv(fd, buffers, offset, flags & ~os.RWF_NOWAIT)


def _check_read(size: int, offset: int) -> None:
    if not 0 <= size <= MAX_READ:
        _watch.breach = f"a read of {size} bytes at {offset}"
        raise Finding(_watch.breach)
    places = _watch.places
    if places and not any(begin <= offset and offset + size <= end for begin, end in places):
        _watch.breach = f"a read of {size} bytes at {offset}, outside {places}"


@contextmanager
def reads_inside(places: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Let reads only be of *places*, from one byte to another, unless there are none."""
    _watch.places = places
    try:
        yield
    finally:
        _watch.places = ()


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def _bounded_memory(growth: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as file:
        limit = int(file.read().split()[0]) * _PAGE + growth
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def watched(folder: str = "/nowhere", growth: int = MAX_GROWTH) -> Iterator[None]:
    """Watch the block; swallow an expected error. Raises what the promises forbid."""
    _watch.hook()
    before = _open_files()
    began = time.process_time()
    with _bounded_memory(growth):
        _watch.begin(folder)
        os.pread, os.preadv = _checked_pread, _checked_preadv  # type: ignore[assignment]
        try:
            yield
        except VddkfsError as error:
            check_error(error)
        finally:
            os.pread, os.preadv = _pread, _preadv
            _watch.end()
    after = _open_files()
    if after != before:
        raise Finding(f"{after} files are open, where {before} were before")
    seconds = time.process_time() - began
    if seconds > MAX_SECONDS:
        raise Finding(f"took {seconds:.1f} s")


def check_error(error: VddkfsError) -> None:
    """Raise Finding unless *error* is one printable line that says something."""
    line = str(error)
    line.encode()
    if not line or not line.isprintable() or len(line) > MAX_LINE:
        raise Finding(f"an error of {len(line)} characters: {ascii(line)[:500]}")
