"""Guest file systems on loop devices, and images of disks whose power went away.

A crash is made by the means that the file system has itself: ext4 and XFS are shut down without
writing their log any further, the others are copied while they are mounted and idle.
"""

import contextlib
import fcntl
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.mounting import PROMPT, Mount, mounted, run, sha256, succeed, until
from tests.end_to_end.ntfs import leave_unclean, log_is_empty
from tests.end_to_end.vms import KIB, MIB, SECTOR, descriptor, noise

START = MIB
"""Where the partition of a disk with a table begins, in bytes."""
OLD = b"written long before the crash\n"
KEPT = noise("a file that was synced", 300 * KIB)
AFTER = noise("a file that was written through an overlay", 200 * KIB)
DISK = "disk/disk.raw"
BASE = "disk/chain/0.raw"
_STEP = 64 * KIB
_SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN: _IOR('X', 125, __u32)."""
_NO_LOG_FLUSH = 2


@dataclass(frozen=True)
class Kind:
    """A guest's file system. *size* is in bytes; *busy* are the options while the power goes."""

    name: str
    size: int
    make: tuple[str, ...]
    plain: str
    """Mount options that read what is there without a look at the journal."""
    check: tuple[str, ...]
    """What ends with 0 when the file system on a device is clean and right, and changes nothing."""
    dirty: tuple[str, ...]
    """What tells of the file system on a device, with a word like *mark* before its replay."""
    mark: str
    package: str
    busy: str = "rw"
    mount: tuple[str, ...] = ("mount",)
    """What mounts it: with -o OPTIONS DEVICE PLACE behind."""

    def need(self) -> None:
        """Skip the test where the kernel or the machine does not have it."""
        for tool in (self.make[0], self.check[0], self.dirty[0], self.mount[0]):
            if shutil.which(tool) is None:
                pytest.skip(f"absent: {tool} (package {self.package})")
        if self.mount == ("mount",) and not _in_kernel(self.name):
            pytest.skip(f"absent: {self.name} in this kernel")

    def needs_replay(self, device: str) -> bool:
        """Say whether the journal has what the file system has not."""
        if self.name == "ntfs":
            volume = succeed(*self.dirty, f"if={device}", text=False).stdout
            return not log_is_empty(volume)
        return re.search(self.mark, succeed(*self.dirty, device).stdout) is not None

    def assert_clean(self, device: str) -> None:
        """Assert that nothing is left to repair or to replay."""
        succeed(*self.check, device)
        assert not self.needs_replay(device)


EXT4 = Kind(
    "ext4",
    24 * MIB,
    ("mkfs.ext4", "-q"),
    "noload",
    ("e2fsck", "-fn"),
    ("dumpe2fs", "-h"),
    "needs_recovery",
    "e2fsprogs",
)
XFS = Kind(
    "xfs",
    304 * MIB,
    ("mkfs.xfs", "-q"),
    "norecovery",
    ("xfs_repair", "-n"),
    ("xfs_logprint", "-t"),
    "state: <DIRTY>",
    "xfsprogs",
)
BTRFS = Kind(
    "btrfs",
    112 * MIB,
    ("mkfs.btrfs", "-q"),
    "rescue=nologreplay",
    ("btrfs", "check", "--readonly"),
    ("btrfs", "inspect-internal", "dump-super"),
    r"log_root\s+[1-9]",
    "btrfs-progs",
    # Nothing but the log tree of the fsync may be on the disk when the power goes.
    busy="rw,commit=300",
)
NTFS = Kind(
    "ntfs",
    24 * MIB,
    ("mkntfs", "-q", "-F", "-p", "0", "-S", "63", "-H", "16"),
    "ro",
    ("ntfsfix", "-n"),
    ("dd", "status=none"),
    "",
    "ntfs-3g",
    mount=("ntfs-3g",),
)
KINDS = (EXT4, XFS, BTRFS, NTFS)


def _in_kernel(name: str) -> bool:
    def known() -> bool:
        return f"\t{name}\n" in Path("/proc/filesystems").read_text()

    return known() or (run("modprobe", name).returncode == 0 and known())


def _ended(*command: str, rescue: Callable[[], None]) -> None:
    """Run a command that must work; where it hangs, *rescue* comes before the failure."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        code = process.wait(2 * PROMPT)
    except subprocess.TimeoutExpired:
        rescue()
        process.wait(2 * PROMPT)
        raise
    assert code == 0, f"{command} ended with {code}"


def _nothing() -> None:
    """No rescue is needed for a file that no daemon serves."""


@contextlib.contextmanager
def loop_device(
    file: str | Path,
    *,
    start: int = 0,
    size: int = 0,
    read_only: bool = False,
    rescue: Callable[[], None] = _nothing,
) -> Iterator[str]:
    """Have a loop device show *size* bytes of a file from *start* (all that follow, if 0)."""
    words = ["--offset", str(start), "--sizelimit", str(size)]
    words += ["--read-only"] if read_only else []
    device = succeed("losetup", "--find", "--show", *words, file).stdout.strip()
    try:
        yield device
    finally:
        _ended("losetup", "--detach", device, rescue=rescue)
        # It is let go of only when the last who had it open has gone.
        backing = Path("/sys/block") / Path(device).name / "loop/backing_file"
        until(lambda: not backing.exists(), what=f"the end of {device}")


@contextlib.contextmanager
def guest(
    kind: Kind, device: str, place: Path, options: str, rescue: Callable[[], None] = _nothing
) -> Iterator[Path]:
    """Mount a guest's file system."""
    place.mkdir(exist_ok=True)
    succeed(*kind.mount, "-o", options, device, place)
    try:
        yield place
    finally:
        if mounted(place):
            _ended("umount", str(place), rescue=rescue)


@contextlib.contextmanager
def guest_of(
    found: Mount, kind: Kind, name: str, start: int, place: Path, options: str = "rw"
) -> Iterator[Path]:
    """Mount the guest in a file of a mount, through a loop device that is its alone."""
    device = loop_device(found.path(name), start=start, rescue=found.abort)
    with device as node, guest(kind, node, place, options, found.abort):
        yield place


@contextlib.contextmanager
def device_of(found: Mount, name: str, start: int) -> Iterator[str]:
    """Show a file of a mount as a read-only block device."""
    with loop_device(found.path(name), start=start, read_only=True, rescue=found.abort) as device:
        yield device


def hashes(vm: Path) -> dict[str, tuple[str, int]]:
    """Return hash and time of all files of a source."""
    return {
        path.name: (sha256(path.read_bytes()), path.stat().st_mtime_ns)
        for path in sorted(vm.iterdir())
    }


def leave(found: Mount) -> None:
    """Unmount: nobody may have anything open."""
    found.close_agent()
    done = found.umount()
    assert done.returncode == 0, done.stderr


def put(path: Path, data: bytes) -> None:
    """Write a new file, and have the file system promise that it will be there after a crash."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Crashed:
    """A disk at two moments: after a clean end with OLD on it, and after the power went away.

    KEPT was synced before the second. *start* is where the file system is, in bytes.
    """

    clean: Path
    dirty: Path
    start: int


def crash(kind: Kind, folder: Path, start: int) -> Crashed:
    """Make a guest file system, and take the power away while it is in use."""
    running, clean, dirty = (folder / f"{name}.raw" for name in ("running", "clean", "dirty"))
    with open(running, "wb") as file:
        file.truncate(start + kind.size)
    if start:
        table = f"label: dos\nstart={start // SECTOR}, type=83\n"
        succeed("sfdisk", "-q", running, input=table, stdin=None)
    place = folder / "making"
    with loop_device(running, start=start) as device:
        succeed(*kind.make, device)
        with guest(kind, device, place, "rw"):
            put(place / "old", OLD)
        kind.assert_clean(device)
    _copy(running, clean)
    with loop_device(running, start=start) as device, guest(kind, device, place, kind.busy):
        put(place / "kept", KEPT)
        if kind in (EXT4, XFS):
            _shut_down(place)
        # Not after the umount: that writes metadata which a crash leaves to the journal.
        _copy(running, dirty)
    running.unlink()
    if kind is NTFS:
        leave_unclean(dirty, start)
    return Crashed(clean, dirty, start)


def _copy(source: Path, target: Path) -> None:
    succeed("cp", "--sparse=always", source, target)


def _shut_down(place: Path) -> None:
    fd = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
    finally:
        os.close(fd)


def as_flat(disk: Crashed, vm: Path) -> None:
    """Make vm/disk.vmdk, flat as ESXi does it, of the disk after the crash."""
    size = disk.dirty.stat().st_size
    _copy(disk.dirty, vm / "disk-flat.vmdk")
    line = f'RW {size // SECTOR} VMFS "disk-flat.vmdk"'
    (vm / "disk.vmdk").write_text(descriptor([line], kind="vmfs"))


def as_chain(disk: Crashed, vm: Path) -> None:
    """Make vm/disk.vmdk of the clean disk, and vm/delta.vmdk of what came until the crash."""
    base, delta = vm / "disk.vmdk", vm / "delta.vmdk"
    succeed("qemu-img", "convert", "-f", "raw", "-O", "vmdk", disk.clean, base)
    words = ("-q", "-f", "vmdk", "-b", base.name, "-F", "vmdk", delta.name)
    succeed("qemu-img", "create", *words, cwd=vm)
    pieces: list[str] = []
    with contextlib.ExitStack() as stack:
        old, new = (stack.enter_context(open(file, "rb")) for file in (disk.clean, disk.dirty))
        for number, piece in enumerate(iter(lambda: new.read(_STEP), b"")):
            if piece != old.read(_STEP):
                part = vm.parent / f"piece{number}"
                stack.callback(part.unlink)
                part.write_bytes(piece)
                pieces += ["-c", f"write -q -s {part} {number * _STEP} {len(piece)}"]
        succeed("qemu-io", "-f", "vmdk", *pieces, delta)
