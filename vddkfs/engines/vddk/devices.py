"""The block devices that SAN reads, and having Linux forget the pages that it keeps of them.

Over SAN the library reads a LUN by itself, as a block device of this machine. What an ESXi host
writes there nobody tells Linux: a page that it has kept of the LUN stays what it was, for as long
as anything here holds the device open (multipathd does, and every other mount). A library that
heeds UNBUFFERED reads past these pages (O_DIRECT); one that does not answers from them (K26).

The devices are those that this process has open, because nothing else in a worker opens any. Those
below a device-mapper device (the paths of a multipath map) have pages of their own, which are
dropped too. ``san_devices`` names others in their place.

The order is what makes this worth anything. A page that is just being filled is locked, and a flush
passes it by: it would stay, with what the disk had before. So nothing may be under way while pages
are dropped, neither reads of the library (the caller waits for their end first) nor read-ahead of
the kernel (which is switched off on the library's descriptors: ``Luns.look``). And pages are
dropped before the disk is opened anew or read, or that would be done from old ones. What is read
between the flush and that is no older than the flush. What cannot be had is that other programs
do not read the device meanwhile.

Everything here is for the worker's main thread.
"""

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from vddkfs.engines.base import Step

PROC: Final = Path("/proc")
SYS: Final = Path("/sys")
DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")
BLKFLSBUF: Final = 0x1261
_GONE: Final = (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM)


class Descriptor(NamedTuple):
    """A descriptor of this process on the block device *number* (as in st_rdev), opened by *path*.

    *direct*: reads through it go past the device's pages.
    """

    fd: int
    number: int
    path: str
    direct: bool


class Device(NamedTuple):
    """A block device, known by *name* and to be found at one of *paths*.

    *number* is what has to be there (as in st_rdev), or -1 for whatever is. *buffered*: this
    process reads it through its pages. *above* is the device-mapper device that it is a part of, ""
    for one that is read by itself.
    """

    name: str
    paths: tuple[str, ...]
    number: int = -1
    buffered: bool = False
    above: str = ""


# What is open.


def open_descriptors(proc: Path = PROC) -> list[Descriptor]:
    """Return this process's descriptors of block devices."""
    found = []
    folder = proc / "self" / "fd"
    for name in sorted(os.listdir(folder), key=int):
        try:
            status = (folder / name).stat()
            if stat.S_ISBLK(status.st_mode):
                direct = bool(_flags(proc / "self" / "fdinfo" / name) & os.O_DIRECT)
                path = os.readlink(folder / name)
                found.append(Descriptor(int(name), status.st_rdev, path, direct))
        except OSError:
            continue  # a thread of the library has closed it
    return found


def _flags(path: Path) -> int:
    """Return the flags of open(2) that a file of fdinfo tells."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "flags":
            return int(value, 8)
    return 0


def devices_of(descriptors: Iterable[Descriptor], sys: Path = SYS) -> tuple[Device, ...]:
    """Return the devices that *descriptors* are of, each once, and those below them."""
    found: dict[int, Device] = {}
    for one in descriptors:
        before = found.get(one.number)
        buffered = not one.direct or (before is not None and before.buffered)
        name = _name(one.number, sys)
        paths = tuple(dict.fromkeys((name, one.path)))
        found[one.number] = Device(name, paths, one.number, buffered)
    for device in list(found.values()):
        for number in _below(device.number, sys):
            name = _name(number, sys)
            found.setdefault(number, Device(name, (name,), number, above=device.name))
    return tuple(found.values())


def _entry(number: int, sys: Path) -> Path:
    return sys / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"


def _name(number: int, sys: Path) -> str:
    """Return the path of the device *number*, by the kernel's own name for it."""
    entry = _entry(number, sys)
    try:
        name = os.path.basename(os.readlink(entry))
    except OSError:
        return f"/dev/block/{entry.name}"
    # A slash in a name is an exclamation mark there.
    return "/dev/" + name.replace("!", "/")


def _below(number: int, sys: Path, depth: int = 8) -> Iterator[int]:
    """Yield the numbers of what a device is made of, at any *depth*."""
    try:
        parts = sorted((_entry(number, sys) / "slaves").iterdir())
    except OSError:
        return
    for part in parts if depth else ():
        try:
            major, _, minor = (part / "dev").read_text().partition(":")
            below = os.makedev(int(major), int(minor))
        except (OSError, ValueError):
            continue  # it has gone away
        yield below
        yield from _below(below, sys, depth - 1)


# Forgetting.


def flush(device: Device) -> Step:
    """Have Linux forget the pages that it keeps of *device*."""
    began = time.perf_counter()
    try:
        told, done = _forget(device), True
    except OSError as error:
        told, done = _why(device, error), False
    return Step("device", device.name, told, time.perf_counter() - began, done)


def _forget(device: Device) -> str:
    """Return how the pages of *device* were dropped. Raises OSError."""
    fd = _opened(device)
    try:
        try:
            fcntl.ioctl(fd, BLKFLSBUF, 0)
        except PermissionError:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return "its pages are dropped (posix_fadvise: BLKFLSBUF needs CAP_SYS_ADMIN)"
        return "its pages are dropped (BLKFLSBUF)"
    finally:
        os.close(fd)


def _opened(device: Device) -> int:
    """Return a descriptor of our own. Raises OSError."""
    failure = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for path in device.paths:
        try:
            # Looked at first: opening anything else may wait, or do something.
            status = os.stat(path)
            if not stat.S_ISBLK(status.st_mode):
                raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK))
            if device.number in (-1, status.st_rdev):
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            failure = error
    raise failure


def _why(device: Device, error: OSError) -> str:
    """Say why the pages of *device* are not dropped, and what can be done about it."""
    if device.above:
        return f"its pages are not dropped ({error.strerror}), but only {device.above} is read"
    advice = ""
    if error.errno in _GONE:
        advice = "; have this machine look for its LUNs again, or correct san_devices="
    elif error.errno == errno.ENOTBLK:
        advice = "; correct san_devices="
    elif isinstance(error, PermissionError):
        advice = "; mount as root, or as one who may read the device"
    return f"its pages are not dropped: {error.strerror}{advice}"


def drop_all(path: Path = DROP_CACHES) -> Step:
    """Have Linux forget all clean pages of all files and devices of this machine."""
    began = time.perf_counter()
    told, done = "all pages of this machine are dropped (drop_caches=yes)", True
    try:
        path.write_bytes(b"1")
    except OSError as error:
        told = f"not all pages of this machine could be dropped: {error.strerror}"
        told += "; drop_caches=yes needs root"
        done = False
    return Step("device", str(path), told, time.perf_counter() - began, done)


# Of one image.


class Luns:
    """The devices under one image that is read over SAN: *named* ones, or those that are open."""

    def __init__(self, named: tuple[str, ...] = ()) -> None:
        self._named = tuple(Device(path, (path,)) for path in named)
        self._found: tuple[Device, ...] = ()

    def look(self) -> None:
        """Find out what is open, now that the library has opened the disk and read of it.

        Where it reads through pages, the kernel is told not to read ahead: UNBUFFERED asked for no
        less, and what it reads ahead could be under way during a flush.
        """
        descriptors = open_descriptors()
        self._found = devices_of(descriptors)
        for one in descriptors:
            if not one.direct:
                with contextlib.suppress(OSError):
                    os.posix_fadvise(one.fd, 0, 0, os.POSIX_FADV_RANDOM)

    @property
    def devices(self) -> tuple[Device, ...]:
        """What is flushed."""
        return self._named or self._found

    @property
    def direct(self) -> bool:
        """Whether the library is known to read past all pages."""
        return bool(self._found) and not any(device.buffered for device in self._found)

    @property
    def buffered(self) -> bool:
        """Whether the library reads, or may read, from pages that can be dropped."""
        return bool(self.devices) and not self.direct


class Flush:
    """One occasion at which pages are dropped, those of each device once. *steps* tells of it.

    *last_resort* (the mount option ``drop_caches``) has all pages of this machine dropped where
    those of one device cannot be.
    """

    def __init__(self, last_resort: bool = False) -> None:
        self.steps: list[Step] = []
        self._last_resort = last_resort
        self._seen: set[str] = set()

    def of(self, luns: Luns, about: str) -> list[Step]:
        """Drop the pages of *luns*, under the image *about*; return what was done just now."""
        devices = [device for device in luns.devices if device.name not in self._seen]
        steps = []
        for device in devices:
            step = flush(device)
            if luns.direct:
                step = _excused(step, "; VDDK reads past them (O_DIRECT)")
            elif device.above:
                step = _excused(step, "")
            steps.append(step)
        if not luns.devices and about not in self._seen:
            devices = [Device(about, ())]
            told = "over SAN, but VDDK has no block device open whose pages could be dropped"
            steps = [Step("device", about, f"{told}; name it in san_devices=", 0.0, done=False)]
        self._seen.update(device.name for device in devices)
        if not all(step.done for step in steps):
            steps = self._resort(steps)
        self.steps += steps
        return steps

    def _resort(self, steps: list[Step]) -> list[Step]:
        """Do about *steps* that are not done what the operator allows."""
        if not self._last_resort:
            return [_with(step, "or mount with drop_caches=yes") for step in steps]
        everything = drop_all()
        if everything.done:
            steps = [_excused(step, "; see drop_caches") for step in steps]
        return [*steps, everything]


def _excused(step: Step, why: str) -> Step:
    """Return *step* as one that leaves nothing old, for a reason that is told if it failed."""
    return step if step.done else msgspec.structs.replace(step, told=step.told + why, done=True)


def _with(step: Step, advice: str) -> Step:
    return step if step.done else msgspec.structs.replace(step, told=f"{step.told}, {advice}")
