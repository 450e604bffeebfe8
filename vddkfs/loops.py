"""What keeps copies of our files above us: loop devices, what is stacked on them, and guests.

They are not ours: they are found in /sys and in the table of mounts, named, and their pages are
dropped on request. A mounted file system keeps more than the pages of its device (its own files and
metadata), which nothing but an unmount drops for certain. Nothing here touches a vddkfs mount.
"""

import errno
import fcntl
import os
import select
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from vddkfs.engines.base import Step
from vddkfs.mountinfo import FILE_SYSTEM, Entry, Table

FLUSH_SECONDS: Final = 10.0
"""How long devices are waited for: one whose file hangs does not end."""
_BLKFLSBUF: Final = 0x1261
_DELETED: Final = " (deleted)"
"""What the kernel adds to the path of an open file when the mount has it forget the name."""


class Range(msgspec.Struct, frozen=True):
    """The bytes [*start*, *end*) of the file that its file system calls *name*."""

    name: str
    start: int
    end: int


class Guest(msgspec.Struct, frozen=True):
    """A file system of *type* that is mounted at *mountpoint* from *device*."""

    mountpoint: str
    type: str
    device: str


class Reader(msgspec.Struct, frozen=True):
    """What reads a *file* (as the kernel shows its path) and keeps copies of it.

    *device* is a loop device, or "" where a file system reads the file by itself. *stacked* are the
    block devices above it, its partitions among them, and *guests* are mounted from any of these.
    """

    device: str
    file: str
    stacked: tuple[str, ...]
    guests: tuple[Guest, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """The block devices that keep pages."""
        return (self.device, *self.stacked) if self.device else ()


class Flushed(NamedTuple):
    """How the flush of a device ended, after *seconds*; *failure* is "" where it worked."""

    failure: str
    seconds: float


class _Block(NamedTuple):
    """A block device by its *name* in /sys; *number* is ``major:minor``."""

    name: str
    number: str

    @property
    def path(self) -> str:
        return "/dev/" + self.name.replace("!", "/")


def readers(
    device: str, ranges: Iterable[Range], table: Table, sys: Path = Path("/sys")
) -> list[Reader]:
    """Return what reads any of *ranges* of the vddkfs mount that has the number *device*."""
    known: dict[str, list[Range]] = {}
    for one in ranges:
        known.setdefault(one.name, []).append(one)

    def read(path: str) -> list[Range]:
        entry = table.at(path) if path.startswith("/") else None
        return known.get(entry.name(path), []) if entry and entry.device == device else []

    found = []
    for loop in sorted(sys.glob("block/loop*/loop"), key=lambda path: (len(str(path)), str(path))):
        file = _text(loop / "backing_file").removesuffix(_DELETED)
        if any(_overlaps(loop, one) for one in read(file)):
            blocks = list(_stacked(sys, loop.parent.name))
            above = tuple(block.path for block in blocks[1:])
            guests = tuple(_guests(sys, blocks, table.entries))
            found.append(Reader(blocks[0].path, file, above, guests))
    for entry in table.entries:
        if entry.kind != FILE_SYSTEM and read(entry.source):
            guest = Guest(entry.place, entry.kind, entry.source)
            found.append(Reader("", entry.source, (), (guest,)))
    return found


def _text(path: Path) -> str:
    """Return what a file of /sys holds, "" if it has gone."""
    try:
        return os.fsdecode(path.read_bytes()).removesuffix("\n")
    except OSError:
        return ""


def _listed(folder: Path) -> list[str]:
    """Return the names in a folder of /sys, none if it has gone."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _overlaps(loop: Path, wanted: Range) -> bool:
    """Say whether the part of the file that a loop device shows has any byte of *wanted*."""
    offset = int(_text(loop / "offset") or 0)
    limit = int(_text(loop / "sizelimit") or 0)
    return offset < wanted.end and (not limit or offset + limit > wanted.start)


def _stacked(sys: Path, name: str) -> Iterator[_Block]:
    """Yield the block device *name*, its partitions, and what LVM, dm-crypt, md... put on them."""
    waiting, met = [name], {name}
    while waiting:
        here = sys / "class/block" / waiting.pop(0)
        yield _Block(here.name, _text(here / "dev"))
        parts = [name for name in _listed(here) if (here / name / "partition").exists()]
        above = [each for each in parts + _listed(here / "holders") if each not in met]
        met.update(above)
        waiting += above


def _guests(sys: Path, blocks: Sequence[_Block], entries: Iterable[Entry]) -> Iterator[Guest]:
    """Yield what is mounted from any of *blocks*."""
    numbers = {block.number: block for block in blocks}
    sources = {name: block for block in blocks for name in _names(sys, block)}
    # A btrfs has a device number of its own, and is listed by one device of several.
    for members in sys.glob("fs/btrfs/*/devices"):
        held = [_Block(name, _text(members / name / "dev")) for name in _listed(members)]
        known = next((block for block in held if block.number in numbers), None)
        if known is not None:
            sources |= {name: known for block in held for name in _names(sys, block)}
    for entry in entries:
        block = numbers.get(entry.device) or sources.get(entry.source)
        if block is not None:
            yield Guest(entry.place, entry.kind, block.path)


def _names(sys: Path, block: _Block) -> list[str]:
    """Return by which paths the table of mounts may know a device."""
    mapped = _text(sys / "class/block" / block.name / "dm/name")
    return [block.path, f"/dev/mapper/{mapped}"] if mapped else [block.path]


def flush(devices: Iterable[str], seconds: float = FLUSH_SECONDS) -> dict[str, Flushed]:
    """Drop the pages of block devices; return how that ended for each of *devices*.

    Each is flushed by a process of its own, which is left behind when *seconds* have passed: it
    waits in the kernel then, for a file that hangs, and cannot be ended.
    """
    began = time.monotonic()
    poll = select.poll()
    waiting: dict[int, tuple[int, str]] = {}
    for device in dict.fromkeys(devices):
        pid = _start(device)
        fd = os.pidfd_open(pid)
        waiting[fd] = pid, device
        poll.register(fd, select.POLLIN)
    told = {}
    while waiting and (ended := poll.poll(max(0.0, began + seconds - time.monotonic()) * 1000)):
        for fd, _ in ended:
            pid, device = waiting.pop(fd)
            poll.unregister(fd)
            os.close(fd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            told[device] = Flushed(_reason(code), time.monotonic() - began)
    for fd, (_, device) in waiting.items():
        os.close(fd)
        told[device] = Flushed(f"no answer within {seconds:g} s", seconds)
    return told


def _reason(code: int) -> str:
    if code in (errno.EACCES, errno.EPERM):
        return "that needs root"
    return os.strerror(code) if code else ""


def _start(device: str) -> int:
    """Have a process flush *device*; return its number."""
    pid = os.fork()
    if pid == 0:
        code = errno.EIO
        try:
            # Nobody who reads our output must wait for a process that hangs.
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            code = _drop_pages(device)
        finally:
            os._exit(code)
    return pid


def _drop_pages(device: str) -> int:
    """Return 0, or an errno."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, _BLKFLSBUF, 0)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def steps(found: Iterable[Reader], flushed: Mapping[str, Flushed] | None = None) -> list[Step]:
    """Say what is to be known of each reader, and of its guests.

    *flushed* is what ``flush`` told, None if it was not asked. A guest is never done.
    """
    told: list[Step] = []
    for reader in found:
        told += _device_steps(reader, flushed)
        for guest in reader.guests:
            what = f"{guest.type} on {guest.device} may show old files: unmount it, and mount again"
            told.append(Step("loop", guest.mountpoint, what, 0.0, done=False))
    return told


def _device_steps(reader: Reader, flushed: Mapping[str, Flushed] | None) -> Iterator[Step]:
    for device in reader.devices:
        above = device != reader.device
        where = f"above {reader.device}" if above else f"loop device on {reader.file}"
        if flushed is None:
            yield Step("loop", device, f"{where}: it may hold old pages", 0.0, done=False)
            continue
        failure, seconds = flushed[device]
        yield Step("loop", device, f"{where}: {failure or 'flushed'}", seconds, done=not failure)
