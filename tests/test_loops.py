"""Who keeps copies above our files: loop devices, what is stacked on them, guests; a fake /sys."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_mountinfo import line, table
from vddkfs import loops
from vddkfs.engines.base import Step
from vddkfs.loops import Flushed, Guest, Range, Reader, readers, steps
from vddkfs.mountinfo import Table

OURS = "0:50"
MIB = 1024 * 1024
WHOLE = [Range("web/disk.raw", 0, 64 * MIB), Range("web/partitions/1.raw", 0, 8 * MIB)]


class Sys:
    """A folder like /sys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blocks = 0

    def put(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(text))

    def block(self, name: str, number: str, *holders: str, whole: str = "") -> None:
        """Add a block device; a partition of *whole* if there is one."""
        where = f"devices/{whole}/{name}" if whole else f"devices/{name}"
        self.put(f"{where}/dev", f"{number}\n")
        if whole:
            self.put(f"{where}/partition", "1\n")
        (self.folder / where / "holders").mkdir()
        for holder in holders:
            (self.folder / where / "holders" / holder).symlink_to(f"../../{holder}")
        for folder in ("class/block", *([] if whole else ["block"])):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
            (self.folder / folder / name).symlink_to(self.folder / where)

    def loop(
        self, number: int, file: str, *holders: str, offset: int = 0, sizelimit: int = 0
    ) -> None:
        """Add a loop device on a file."""
        self.block(f"loop{number}", f"7:{number}", *holders)
        for name, text in (("backing_file", file), ("offset", offset), ("sizelimit", sizelimit)):
            self.put(f"devices/loop{number}/loop/{name}", f"{text}\n")


@pytest.fixture
def sys_(tmp_path: Path) -> Sys:
    return Sys(tmp_path)


def mounts(*lines: str) -> Table:
    return table(line(8, 1, "/mnt/web", device=OURS), *lines)


def found(sys_: Sys, *lines: str, ranges: list[Range] | None = None) -> list[Reader]:
    return readers(OURS, WHOLE if ranges is None else ranges, mounts(*lines), sys_.folder)


def test_without_loop_devices_there_is_nothing(sys_: Sys) -> None:
    assert found(sys_) == []
    sys_.block("loop0", "7:0")
    sys_.block("sda", "8:0")
    assert found(sys_) == []


def test_only_loop_devices_on_files_concerned_are_found(sys_: Sys) -> None:
    sys_.loop(0, "/mnt/web/web/disk.raw")
    sys_.loop(1, "/mnt/web/web/chain/0.raw")
    sys_.loop(2, "/mnt/website/web/disk.raw")
    sys_.loop(3, "/other/web/disk.raw")
    sys_.loop(10, "/mnt/web/web/partitions/1.raw")
    sys_.loop(4, "(unreachable)/mnt/web/web/disk.raw")
    devices = [(one.device, one.file) for one in found(sys_)]
    assert devices == [
        ("/dev/loop0", "/mnt/web/web/disk.raw"),
        ("/dev/loop10", "/mnt/web/web/partitions/1.raw"),
    ]


def test_a_file_whose_name_the_kernel_was_told_to_forget_is_known_all_the_same(
    sys_: Sys,
) -> None:
    sys_.loop(0, "/mnt/web/web/disk.raw (deleted)")
    assert [one.file for one in found(sys_)] == ["/mnt/web/web/disk.raw"]


def test_a_file_reached_through_a_bind_mount_is_the_same_file(sys_: Sys) -> None:
    sys_.loop(0, "/srv/disk/disk.raw")
    bound = line(9, 1, "/srv/disk", device=OURS, root="/web")
    assert [one.device for one in found(sys_, bound)] == ["/dev/loop0"]
    sys_.loop(1, "/mnt/web/web/disk.raw")
    over = line(10, 8, "/mnt/web/web", "tmpfs")
    assert [one.device for one in found(sys_, bound, over)] == ["/dev/loop0"], "another file"


def test_names_that_are_not_utf_8(sys_: Sys) -> None:
    sys_.loop(0, "/mnt/web/caf\udce9\n/disk.raw")
    ranges = [Range("caf\udce9\n/disk.raw", 0, 1)]
    assert [one.file for one in found(sys_, ranges=ranges)] == ["/mnt/web/caf\udce9\n/disk.raw"]


@pytest.mark.parametrize(
    ("offset", "sizelimit", "start", "end", "wanted"),
    [
        (0, 0, 0, 1, True),
        (MIB, 0, 0, MIB, False),
        (MIB, 0, 0, MIB + 1, True),
        (MIB, MIB, 2 * MIB, 3 * MIB, False),
        (MIB, MIB, 2 * MIB - 1, 3 * MIB, True),
        (0, MIB, MIB, 2 * MIB, False),
        (0, 0, 63 * MIB, 64 * MIB, True),
    ],
)
def test_a_part_of_a_file_is_compared_with_the_range(
    offset: int, sizelimit: int, start: int, end: int, wanted: bool, sys_: Sys
) -> None:
    sys_.loop(0, "/mnt/web/web/disk.raw", offset=offset, sizelimit=sizelimit)
    ranges = [Range("web/disk.raw", start, end), Range("web/chain/0.raw", 0, 99 * MIB)]
    assert bool(found(sys_, ranges=ranges)) == wanted


def test_one_of_several_ranges_is_enough(sys_: Sys) -> None:
    sys_.loop(0, "/mnt/web/web/disk.raw", offset=MIB)
    ranges = [Range("web/disk.raw", 0, 5), Range("web/disk.raw", 2 * MIB, 2 * MIB + 5)]
    assert len(found(sys_, ranges=ranges)) == 1


def test_guests_are_found_on_all_that_is_stacked_on_a_loop_device(sys_: Sys) -> None:
    sys_.loop(0, "/mnt/web/web/disk.raw", "md127")
    sys_.block("loop0p1", "259:0", "dm-0", "dm-1", whole="loop0")
    sys_.block("md127", "9:127")
    sys_.block("md127p1", "259:7", whole="md127")
    sys_.block("dm-0", "253:0", "dm-2")
    sys_.block("dm-1", "253:1", "dm-2")
    sys_.block("dm-2", "253:2")
    sys_.put("devices/dm-2/dm/name", "vg-root\n")
    sys_.block("cciss!c0d0", "104:0")
    sys_.loop(1, "/elsewhere")
    [one] = found(
        sys_,
        line(20, 1, "/guest/a", "ext4", device="259:0", source="/dev/loop0p1"),
        line(21, 1, "/guest/b c", "xfs", device="253:2", source="/dev/mapper/vg-root"),
        line(22, 1, "/guest/bound", "xfs", device="253:2", root="/x", source="/dev/mapper/vg-root"),
        line(23, 1, "/guest/md", "ext4", device="259:7", source="/dev/md127p1"),
        line(24, 1, "/guest/other", "ext4", device="7:1", source="/dev/loop1"),
    )
    stacked = ("loop0p1", "md127", "dm-0", "dm-1", "md127p1", "dm-2")
    assert one.device == "/dev/loop0"
    assert one.stacked == tuple(f"/dev/{name}" for name in stacked)
    assert one.devices == ("/dev/loop0", *one.stacked)
    assert one.guests == (
        Guest("/guest/a", "ext4", "/dev/loop0p1"),
        Guest("/guest/b c", "xfs", "/dev/dm-2"),
        Guest("/guest/bound", "xfs", "/dev/dm-2"),
        Guest("/guest/md", "ext4", "/dev/md127p1"),
    )


def test_a_btrfs_has_a_number_of_its_own_and_may_be_listed_by_another_of_its_devices(
    sys_: Sys,
) -> None:
    sys_.loop(0, "/mnt/web/web/disk.raw")
    sys_.loop(1, "/elsewhere")
    sys_.loop(2, "/elsewhere")
    for number, uuid in ((0, "one"), (1, "one"), (2, "two")):
        (sys_.folder / f"fs/btrfs/{uuid}/devices").mkdir(parents=True, exist_ok=True)
        link = sys_.folder / f"fs/btrfs/{uuid}/devices/loop{number}"
        link.symlink_to(sys_.folder / f"devices/loop{number}")
    (sys_.folder / "fs/btrfs/features").mkdir()
    [one] = found(
        sys_,
        line(20, 1, "/guest/a", "btrfs", device="0:77", source="/dev/loop1"),
        line(21, 1, "/guest/b", "btrfs", device="0:78", root="/sub", source="/dev/loop0"),
        line(22, 1, "/guest/c", "btrfs", device="0:79", source="/dev/loop2"),
    )
    assert [guest.mountpoint for guest in one.guests] == ["/guest/a", "/guest/b"]


def test_a_file_system_that_reads_the_file_by_itself_is_found(sys_: Sys) -> None:
    """As ntfs-3g does."""
    file = "/mnt/web/web/partitions/1.raw"
    ntfs = line(20, 1, "/guest/c", "fuse.ntfs-3g", source=file)
    [one] = found(sys_, ntfs)
    assert one == Reader("", file, (), (Guest("/guest/c", "fuse.ntfs-3g", file),))
    assert one.devices == ()
    assert found(sys_, ntfs, ranges=WHOLE[:1]) == []


# What is told


LOOP = Reader(
    "/dev/loop0",
    "/mnt/web/web/disk.raw",
    ("/dev/loop0p1",),
    (Guest("/guest", "ext4", "/dev/loop0p1"),),
)


def test_what_was_not_flushed_may_be_old(sys_: Sys) -> None:
    told = steps([LOOP])
    assert [(step.place, step.subject, step.done) for step in told] == [
        ("loop", "/dev/loop0", False),
        ("loop", "/dev/loop0p1", False),
        ("loop", "/guest", False),
    ]
    assert "/mnt/web/web/disk.raw" in told[0].told
    assert "above /dev/loop0" in told[1].told


def test_a_guest_may_be_old_even_if_its_device_was_flushed() -> None:
    ended = {"/dev/loop0": Flushed("", 0.5), "/dev/loop0p1": Flushed("that needs root", 0.1)}
    whole, part, guest = steps([LOOP], ended)
    assert whole == Step(
        "loop", "/dev/loop0", "loop device on /mnt/web/web/disk.raw: flushed", 0.5, True
    )
    assert (part.done, part.told) == (False, "above /dev/loop0: that needs root")
    assert not guest.done
    assert "ext4 on /dev/loop0p1" in guest.told
    assert "unmount" in guest.told


# Flushing: by processes, as the command has no threads


def flushed(device: Path, seconds: float, setup: str = "") -> list[str]:
    """Flush in a process as the command does, and return what it prints of the end."""
    script = (
        "import sys, time, os\nfrom vddkfs import loops\n"
        f"{setup}\n"
        f"[(device, end)] = loops.flush([sys.argv[1]] * 2, {seconds}).items()\n"
        "print(device, end.failure, end.seconds < 5, sep='\\n')\n"
    )
    command = [sys.executable, "-c", script, str(device)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_device_that_cannot_be_flushed_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert flushed(file, 5) == [str(file), "No such file or directory", "True"]
    file.write_text("x")
    assert flushed(file, 5) == [str(file), "Inappropriate ioctl for device", "True"]
    code = "raise PermissionError(13, 'no')"
    setup = f"def refuse(*_):\n    {code}\nloops.fcntl.ioctl = refuse"
    assert flushed(file, 5, setup) == [str(file), "that needs root", "True"]


def test_a_flush_that_hangs_is_left_behind_and_holds_nobodys_output(tmp_path: Path) -> None:
    file = tmp_path / "file"
    setup = "loops._drop_pages = lambda device: time.sleep(4) or 0"
    began = time.monotonic()
    assert flushed(file, 0.3, setup) == [str(file), "no answer within 0.3 s", "True"]
    assert time.monotonic() - began < 3


def test_nothing_to_flush_is_done_at_once() -> None:
    assert loops.flush([]) == {}
