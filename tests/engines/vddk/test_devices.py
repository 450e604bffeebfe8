"""Which block devices a worker has open, and what is said of flushing them: on made-up trees."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.base import Step
from vddkfs.engines.vddk import devices
from vddkfs.engines.vddk.devices import (
    Descriptor,
    Device,
    Flush,
    Luns,
    devices_of,
    drop_all,
    flush,
    open_descriptors,
)

SDB, SDC, DM = os.makedev(8, 16), os.makedev(8, 32), os.makedev(253, 3)
DIRECT, PLAIN = os.O_RDONLY | os.O_DIRECT, os.O_RDONLY | os.O_CLOEXEC


class Tree:
    """A /proc and a /sys, and nodes of devices that nobody opens."""

    def __init__(self, top: Path) -> None:
        self.proc, self.sys, self.dev = top / "proc", top / "sys", top / "dev"
        (self.proc / "self" / "fd").mkdir(parents=True)
        (self.proc / "self" / "fdinfo").mkdir()
        (self.sys / "dev" / "block").mkdir(parents=True)
        self.dev.mkdir()

    def node(self, name: str, number: int) -> Path:
        path = self.dev / name
        try:
            os.mknod(path, stat.S_IFBLK | 0o600, number)
        except PermissionError:
            pytest.skip("absent: the right to make device nodes")
        return path

    def opened(self, fd: int, path: Path, flags: int) -> None:
        (self.proc / "self" / "fd" / str(fd)).symlink_to(path)
        info = f"pos:\t0\nflags:\t0{flags:o}\nmnt_id:\t24\nino:\t95\n"
        (self.proc / "self" / "fdinfo" / str(fd)).write_text(info)

    def device(self, name: str, number: int, *below: tuple[str, int]) -> None:
        folder = self.sys / "devices" / name
        (folder / "slaves").mkdir(parents=True)
        entry = f"{os.major(number)}:{os.minor(number)}"
        (self.sys / "dev" / "block" / entry).symlink_to(f"../../devices/{name}")
        for part, its in below:
            (folder / "slaves" / part).mkdir()
            (folder / "slaves" / part / "dev").write_text(f"{os.major(its)}:{os.minor(its)}\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_descriptors_of_block_devices_are_found_with_their_flags(tree: Tree) -> None:
    node, regular = tree.node("sdb", SDB), tree.dev / "file"
    regular.touch()
    tree.opened(0, Path("/dev/null"), PLAIN)
    tree.opened(5, regular, PLAIN)
    tree.opened(12, node, DIRECT)
    tree.opened(9, node, PLAIN)
    tree.opened(3, Path("socket:[4711]"), PLAIN)
    tree.opened(10, tree.dev / "closed-meanwhile", PLAIN)
    assert open_descriptors(tree.proc) == [
        Descriptor(9, SDB, str(node), False),
        Descriptor(12, SDB, str(node), True),
    ]


def test_a_descriptor_that_is_closed_between_two_looks_is_left_out(tree: Tree) -> None:
    tree.opened(4, tree.node("sdb", SDB), PLAIN)
    (tree.proc / "self" / "fdinfo" / "4").unlink()
    assert open_descriptors(tree.proc) == []


def test_this_process_has_none() -> None:
    assert open_descriptors() == []


def test_a_device_is_direct_if_all_its_descriptors_are(tree: Tree) -> None:
    tree.device("sdb", SDB)
    tree.device("sdc", SDC)
    one = Descriptor(3, SDB, "/dev/disk/by-id/x", True)
    assert devices_of([one], tree.sys) == (
        Device("/dev/sdb", ("/dev/sdb", "/dev/disk/by-id/x"), SDB, False),
    )
    found = devices_of([one, one._replace(fd=4, direct=False), one._replace(fd=5)], tree.sys)
    assert [device.buffered for device in found] == [True]
    found = devices_of([one, one._replace(number=SDC, direct=False)], tree.sys)
    assert [(device.name, device.buffered) for device in found] == [
        ("/dev/sdb", False),
        ("/dev/sdc", True),
    ]


def test_a_device_that_sysfs_does_not_know_has_its_number(tree: Tree) -> None:
    [found] = devices_of([Descriptor(3, SDB, "/tmp/node", False)], tree.sys)
    assert found.name == "/dev/block/8:16"
    assert found.paths == ("/dev/block/8:16", "/tmp/node")


def test_a_slash_in_a_kernel_name(tree: Tree) -> None:
    tree.device("cciss!c0d0", SDB)
    [found] = devices_of([Descriptor(3, SDB, "/dev/x", False)], tree.sys)
    assert found.name == "/dev/cciss/c0d0"


def test_the_paths_of_a_multipath_map_are_flushed_too(tree: Tree) -> None:
    top = os.makedev(253, 4)
    tree.device("dm-4", top, ("dm-3", DM))
    tree.device("dm-3", DM, ("sdb", SDB), ("sdc", SDC))
    tree.device("sdb", SDB)
    tree.device("sdc", SDC)
    (tree.sys / "devices" / "dm-3" / "slaves" / "going").mkdir()
    found = devices_of([Descriptor(3, top, "/dev/mapper/mpatha-part1", False)], tree.sys)
    assert [(device.name, device.above, device.buffered) for device in found] == [
        ("/dev/dm-4", "", True),
        ("/dev/dm-3", "/dev/dm-4", False),
        ("/dev/sdb", "/dev/dm-4", False),
        ("/dev/sdc", "/dev/dm-4", False),
    ]
    both = [Descriptor(3, DM, "/dev/dm-3", True), Descriptor(4, SDC, "/dev/sdc", False)]
    found = devices_of(both, tree.sys)
    assert [(device.name, device.above, device.buffered) for device in found] == [
        ("/dev/dm-3", "", False),
        ("/dev/sdc", "", True),
        ("/dev/sdb", "/dev/dm-3", False),
    ]


def test_devices_below_themselves_end(tree: Tree) -> None:
    tree.device("dm-3", DM, ("dm-3", DM))
    assert len(devices_of([Descriptor(3, DM, "/dev/dm-3", True)], tree.sys)) == 1


# Flushing.


def test_what_is_not_the_device_is_not_opened(tree: Tree) -> None:
    fifo = tree.dev / "fifo"
    os.mkfifo(fifo)
    step = flush(Device(str(fifo), (str(fifo),)))
    assert not step.done
    assert step.told == ("its pages are not dropped: Block device required; correct san_devices=")
    node = tree.node("sdb", SDC)
    step = flush(Device("/dev/sdb", (str(node),), SDB))
    assert not step.done
    assert "No such file or directory" in step.told, "another one has its name"
    assert "look for its LUNs again" in step.told


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any device can be opened."""
    monkeypatch.setattr(devices, "_opened", lambda device: os.open("/dev/null", os.O_RDONLY))


Refuses = Callable[[str, int], None]


@pytest.fixture
def refuses(opens: None, monkeypatch: pytest.MonkeyPatch) -> Refuses:
    """Have one of the two ways, ``ioctl`` or ``posix_fadvise``, fail with an errno."""
    modules = {"ioctl": fcntl, "posix_fadvise": os}
    for name, module in modules.items():
        monkeypatch.setattr(module, name, lambda *_: 0)

    def refuse(name: str, number: int) -> None:
        def fail(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(modules[name], name, fail)

    return refuse


SOME = Device("/dev/sdb", ("/dev/sdb",), SDB, buffered=True)


def test_the_way_that_was_used_is_told(refuses: Refuses) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert flush(SOME).told == "its pages are dropped (BLKFLSBUF)"
    for number in (errno.EACCES, errno.EPERM):
        refuses("ioctl", number)
        step = flush(SOME)
        assert step.done
        assert step.told == "its pages are dropped (posix_fadvise: BLKFLSBUF needs CAP_SYS_ADMIN)"
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("number", [errno.EIO, errno.ENXIO])
@pytest.mark.parametrize("what", ["ioctl", "posix_fadvise"])
def test_what_failed_is_told(what: str, number: int, refuses: Refuses) -> None:
    if what == "posix_fadvise":
        refuses("ioctl", errno.EACCES)
    refuses(what, number)
    step = flush(SOME)
    assert not step.done
    assert os.strerror(number) in step.told
    assert ("look for its LUNs again" in step.told) == (number == errno.ENXIO)


def test_a_device_that_may_not_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: Device) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(devices, "_opened", refuse)
    step = flush(SOME)
    assert not step.done
    assert "mount as root" in step.told


# Occasions.


class Seen(Luns):
    """Devices that are open, as the test has it."""

    def __init__(self, *found: Device, named: tuple[str, ...] = ()) -> None:
        super().__init__(named)
        self._found = found


HEEDS = SOME._replace(buffered=False)
BELOW = Device("/dev/sdc", ("/dev/sdc",), SDC, above="/dev/dm-3")


@pytest.mark.parametrize(
    ("luns", "direct", "buffered"),
    [
        (Seen(), False, False),
        (Seen(HEEDS), True, False),
        (Seen(SOME), False, True),
        (Seen(HEEDS, SOME), False, True),
        (Seen(HEEDS, BELOW), True, False),
        (Seen(named=("/dev/x",)), False, True),
        (Seen(HEEDS, named=("/dev/x",)), True, False),
        (Seen(SOME, named=("/dev/x",)), False, True),
    ],
)
def test_whether_reads_may_come_from_pages(luns: Luns, direct: bool, buffered: bool) -> None:
    assert (luns.direct, luns.buffered) == (direct, buffered)


def test_the_kernel_does_not_read_ahead_where_that_could_survive_a_flush(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [Descriptor(3, SDB, "/dev/sdb", True), Descriptor(4, SDC, "/dev/sdc", False)]
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr(devices, "open_descriptors", lambda: found)
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: told.append(words))
    luns = Luns()
    luns.look()
    assert told == [(4, 0, 0, os.POSIX_FADV_RANDOM)]
    assert luns.buffered


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the names of the devices that cannot be flushed."""
    names: set[str] = set()

    def attempt(device: Device) -> Step:
        told = "not possible" if device.name in names else "dropped"
        return Step("device", device.name, told, 0.1, device.name not in names)

    monkeypatch.setattr(devices, "flush", attempt)
    return names


def test_each_device_is_flushed_once_on_one_occasion(failing: set[str]) -> None:
    occasion = Flush()
    assert [step.subject for step in occasion.of(Seen(SOME), "a")] == ["/dev/sdb"]
    assert occasion.of(Seen(SOME), "b") == []
    assert [step.subject for step in occasion.of(Seen(SOME, BELOW), "b")] == ["/dev/sdc"]
    assert [step.subject for step in occasion.steps] == ["/dev/sdb", "/dev/sdc"]
    [step] = occasion.of(Seen(), "[ds1] a.vmdk")
    assert (step.subject, step.done) == ("[ds1] a.vmdk", False)
    assert step.told.endswith("name it in san_devices=, or mount with drop_caches=yes")
    assert occasion.of(Seen(), "[ds1] a.vmdk") == []


def test_a_failure_does_no_harm_where_the_pages_are_not_read(failing: set[str]) -> None:
    failing.update(("/dev/sdb", "/dev/sdc"))
    [step] = Flush().of(Seen(HEEDS), "a")
    assert (step.done, step.told) == (True, "not possible; VDDK reads past them (O_DIRECT)")
    first, second = Flush().of(Seen(SOME, BELOW), "a")
    assert (first.done, second.done) == (False, True)
    assert first.told == "not possible, or mount with drop_caches=yes"


def test_the_last_resort_is_taken_once_and_only_where_it_is_needed(
    failing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = [True]
    monkeypatch.setattr(devices, "drop_all", lambda: Step("device", "all", "all", 0.1, outcome[0]))
    assert [step.subject for step in Flush(True).of(Seen(SOME), "a")] == ["/dev/sdb"]
    failing.add("/dev/sdb")
    steps = Flush(True).of(Seen(SOME), "a")
    assert [(step.subject, step.done) for step in steps] == [("/dev/sdb", True), ("all", True)]
    assert steps[0].told == "not possible; see drop_caches"
    outcome[0] = False
    steps = Flush(True).of(Seen(SOME), "a")
    assert [(step.subject, step.done) for step in steps] == [("/dev/sdb", False), ("all", False)]
    assert len(Flush(True).of(Seen(), "a")) == 2


def test_all_pages_of_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "drop_caches"
    file.write_bytes(b"")
    step = drop_all(file)
    assert step.done
    assert file.read_bytes() == b"1"
    step = drop_all(tmp_path / "nowhere" / "drop_caches")
    assert not step.done
    assert "drop_caches=yes needs root" in step.told
