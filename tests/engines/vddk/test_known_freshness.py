"""Old content in Linux's pages of a LUN, and in what VDDK knew at its open: trap, then guard.

Row K26: a library that does not heed UNBUFFERED reads through the pages of the block device, and
another program holds that open, so that they outlive every handle.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.engines.vddk.workers import LEAF, PLAIN, SCSI, Worker, Workers, configured
from tests.simulator.disks import SECTORS, noise, raw, succeed, write_behind
from tests.simulator.host_site import can_make_loops
from tests.simulator.kit import Kit, until
from vddkfs.engines.base import Step
from vddkfs.engines.config import VddkConfig, VddkImage
from vddkfs.errors import EngineError

FROZEN = msgspec.structs.replace(PLAIN, live=False)
BUFFERED = ("san.cache = buffered", "san.keep_open = yes")
AT, COUNT = 64, 8
"""The sectors that change under the disk."""

NO_FLUSH = """
from vddkfs.engines.vddk.devices import Flush
Flush.of = lambda self, luns, about: []
"""
NOT_PAST_PAGES = """
from vddkfs.engines.vddk.reader import ImageReader
ImageReader._pass_pages = lambda self: None
"""
NO_DRAIN = """
from vddkfs.engines.vddk.reader import ImageReader
ImageReader.drain = lambda self: None
"""
NOT_ANEW = """
from vddkfs.engines.vddk.session import OpenDisk
OpenDisk.renew = lambda self: None
"""
LISTED = """
from vddkfs.engines.vddk import devices
flush = devices.flush
def listed(device):
    print(f"flushed {device.name}.", flush=True)
    return flush(device)
devices.flush = listed
"""
"""Not a guard taken out: each flush shows in what the worker says."""
NO_ADMIN = """
import ctypes
libc = ctypes.CDLL(None)
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
sets = (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
for number in (0, 1, 2):
    sets[number] &= ~(1 << 21)
assert libc.capset(header, sets) == 0
"""
"""Without CAP_SYS_ADMIN."""


@pytest.fixture
def loops() -> None:
    if not can_make_loops():
        pytest.skip("absent: loop devices, or the right to make them")


@pytest.fixture
def old(contents: Callable[[str], bytes]) -> bytes:
    return contents(PLAIN.path)[AT * 512 : (AT + COUNT) * 512]


NEW = noise("new", COUNT * 512)


def over_san(kit: Kit, image: VddkImage = PLAIN, **more: object) -> VddkConfig:
    return configured(kit, image, transports=("san",), **more)


def write_under(kit: Kit) -> None:
    """Do what an ESXi host does: the LUN changes, and Linux is not told."""
    write_behind(kit.disk(PLAIN.path).with_name("plain-flat.vmdk"), AT * 512, NEW)


def outdated(kit: Kit, worker: Worker, config: VddkConfig, old: bytes) -> None:
    """Have Linux keep old pages of the disk that *worker* reads."""
    worker.open(config)
    assert worker.read(AT, COUNT) == old
    write_under(kit)
    assert worker.read(AT, COUNT) == old, "the trap: these are the device's pages"


def device(kit: Kit) -> str:
    """Return the device that the disk is read of."""
    return kit.events("device-open")[-1].fields["device"]


def placed(steps: tuple[Step, ...]) -> list[tuple[str, str, bool]]:
    return [(step.place, step.subject, step.done) for step in steps]


guarding = pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])


@pytest.mark.usefixtures("loops")
class TestPages:
    """Place 4: the page cache of the block device."""

    @guarding
    @pytest.mark.parametrize("image", [PLAIN, FROZEN], ids=["live", "frozen"])
    def test_k26_renew(
        self, guarded: bool, image: VddkImage, kit: Kit, workers: Workers, old: bytes
    ) -> None:
        kit.configure(*BUFFERED)
        worker = workers(SCSI if guarded else SCSI + NO_FLUSH)
        outdated(kit, worker, over_san(kit, image), old)
        before = worker.revalidate()
        found = worker.renew()
        assert found.identities == before
        assert found.steps[-1].told == "VDDK closed it, and opened it again over san"
        if not guarded:
            assert worker.read(AT, COUNT) == old, "the handle is new, and the pages are not"
            return
        assert worker.read(AT, COUNT) == NEW
        assert placed(found.steps) == [
            ("device", device(kit), True),
            ("library", PLAIN.path, True),
        ]
        assert found.steps[0].told == "its pages are dropped (BLKFLSBUF)"
        assert all(step.seconds > 0 for step in found.steps)

    @guarding
    def test_k26_revalidate(self, guarded: bool, kit: Kit, workers: Workers, old: bytes) -> None:
        kit.configure(*BUFFERED)
        worker = workers(SCSI if guarded else SCSI + NO_FLUSH)
        outdated(kit, worker, over_san(kit), old)
        worker.revalidate()
        assert worker.read(AT, COUNT) == (NEW if guarded else old)

    def test_k26_a_frozen_image_is_not_flushed_at_each_open_of_its_file(
        self, kit: Kit, workers: Workers, old: bytes
    ) -> None:
        kit.configure(*BUFFERED)
        worker = workers(SCSI + LISTED)
        outdated(kit, worker, over_san(kit, FROZEN), old)
        flushed = worker.text.count("flushed")
        worker.revalidate()
        assert worker.text.count("flushed") == flushed
        assert worker.read(AT, COUNT) == old

    @guarding
    def test_k26_a_direct_read(self, guarded: bool, kit: Kit, workers: Workers, old: bytes) -> None:
        kit.configure(*BUFFERED)
        worker = workers(SCSI if guarded else SCSI + NOT_PAST_PAGES)
        outdated(kit, worker, over_san(kit), old)
        assert worker.read(AT, COUNT, direct=True) == (NEW if guarded else old)
        assert worker.says(f"VDDK reads {device(kit)} through the page cache")

    def test_k26_direct_reads_of_a_library_that_heeds_unbuffered_cost_nothing(
        self, kit: Kit, workers: Workers, old: bytes
    ) -> None:
        kit.configure(BUFFERED[1])
        worker = workers(SCSI + LISTED)
        worker.open(over_san(kit))
        assert worker.read(AT, COUNT) == old
        write_under(kit)
        assert worker.read(AT, COUNT, direct=True) == NEW
        assert not worker.says("flushed")
        assert worker.says(f"VDDK reads {device(kit)} past the page cache")
        worker.renew()
        assert worker.says(f"flushed {device(kit)}.")

    @guarding
    def test_k26_a_direct_read_waits_for_those_that_may_fill_pages(
        self, guarded: bool, kit: Kit, workers: Workers
    ) -> None:
        kit.configure(*BUFFERED, "fault = ReadAsync count=1 late_ms=1500")
        worker = workers(SCSI if guarded else SCSI + NO_DRAIN)
        worker.open(over_san(kit))
        worker.begin_read(0, 1)
        worker.begin_read(AT, COUNT, direct=True)
        second = worker.last_id
        order = [worker.answered(), worker.answered()]
        assert order == ([second - 1, second] if guarded else [second, second - 1])

    def test_k26_the_first_open_of_a_lun_that_others_hold(
        self, kit: Kit, workers: Workers, old: bytes
    ) -> None:
        kit.configure(*BUFFERED)
        first = workers(SCSI)
        outdated(kit, first, over_san(kit, FROZEN), old)
        trap = workers(SCSI + NO_FLUSH)
        trap.open(over_san(kit, FROZEN))
        assert trap.read(AT, COUNT) == old

        worker = workers(SCSI)
        worker.open(over_san(kit, FROZEN))
        assert worker.read(AT, COUNT) == NEW

    def test_k26_an_idle_disk_is_opened_to_be_renewed(
        self, kit: Kit, workers: Workers, old: bytes
    ) -> None:
        kit.configure(*BUFFERED)
        worker = workers(SCSI)
        outdated(kit, worker, over_san(kit, FROZEN, idle_close=0.2), old)
        until(
            lambda: len(kit.events("client-close")) == len(kit.events("client-open")),
            what="the idle disk to be closed",
        )
        found = worker.renew()
        assert placed(found.steps) == [
            ("device", device(kit), True),
            ("library", PLAIN.path, True),
        ]
        told = "VDDK had it closed, so it knew nothing; opened over san"
        assert found.steps[1].told == told
        assert worker.read(AT, COUNT) == NEW

    def test_k26_without_the_right_to_flush(self, kit: Kit, workers: Workers, old: bytes) -> None:
        kit.configure(*BUFFERED)
        worker = workers(SCSI + NO_ADMIN)
        outdated(kit, worker, over_san(kit, FROZEN), old)
        assert "posix_fadvise" in worker.renew().steps[0].told
        assert worker.read(AT, COUNT) == NEW
        assert not worker.says("", level=logging.WARNING)

    def test_k26_a_device_that_cannot_be_flushed(
        self, kit: Kit, workers: Workers, old: bytes, tmp_path: Path
    ) -> None:
        kit.configure(*BUFFERED)
        named = {"san_devices": ("/dev/no-such-lun",)}
        worker = workers(SCSI)
        outdated(kit, worker, over_san(kit, **named), old)
        [step, _] = worker.renew().steps
        assert placed((step,)) == [("device", "/dev/no-such-lun", False)]
        assert "No such file or directory" in step.told
        assert "san_devices=" in step.told
        assert "drop_caches=yes" in step.told
        assert worker.says("/dev/no-such-lun: its pages are not dropped", level=logging.WARNING)
        with pytest.raises(EngineError, match="may be old and cannot be dropped") as caught:
            worker.read(AT, COUNT, direct=True)
        assert not caught.value.retry
        assert worker.read(AT, COUNT) == old, "others are served with what there is"
        worker.stop()

        (tmp_path / "drop_caches").write_bytes(b"")
        last = workers(SCSI + DROPPED.replace("PATH", str(tmp_path / "drop_caches")))
        last.open(over_san(kit, **named, drop_caches=True))
        steps = last.renew().steps
        assert [step.done for step in steps] == [True, True, True]
        assert steps[0].told.endswith("; see drop_caches")
        assert "all pages of this machine are dropped" in steps[1].told
        assert (tmp_path / "drop_caches").read_bytes() == b"1"
        last.read(AT, COUNT, direct=True)

    def test_k26_named_devices_take_the_place_of_what_is_found(
        self, kit: Kit, workers: Workers, old: bytes
    ) -> None:
        kit.configure(*BUFFERED)
        first = workers(SCSI)
        outdated(kit, first, over_san(kit), old)
        named = device(kit)
        first.stop()
        worker = workers(SCSI + LISTED)
        worker.open(over_san(kit, san_devices=(named,)))
        [step, _] = worker.renew().steps
        assert placed((step,)) == [("device", named, True)]
        assert worker.read(AT, COUNT) == NEW
        assert "flushed" in worker.text


DROPPED = """
from pathlib import Path
from vddkfs.engines.vddk import devices
drop_all = devices.drop_all
devices.drop_all = lambda: drop_all(Path("PATH"))
"""


def test_k26_over_san_without_devices_that_is_said(kit: Kit, workers: Workers) -> None:
    kit.configure("san.device = file")
    worker = workers(SCSI)
    worker.open(over_san(kit))
    [step, _] = worker.renew().steps
    assert placed((step,)) == [("device", PLAIN.path, False)]
    assert "no block device open" in step.told
    assert "san_devices=" in step.told
    assert worker.read(AT, COUNT, direct=True)


@pytest.mark.parametrize("transport", ["nbdssl", "hotadd", "file"])
def test_k26_other_transports_have_no_device(transport: str, kit: Kit, workers: Workers) -> None:
    kit.configure("san.device = file")
    worker = workers(SCSI + LISTED)
    image = PLAIN
    config = configured(kit, image, transports=(transport,))
    if transport == "file":
        image = VddkImage(str(kit.disk(PLAIN.path)), live=True)
        config = configured(kit, image, transports=(), server="", vmx_spec="")
    worker.open(config)
    found = worker.renew()
    assert placed(found.steps) == [("library", image.path, True)]
    assert worker.read(AT, COUNT, direct=True)
    assert not worker.says("flushed")


# Place 3: over SAN the library knows where the disk was when it opened it, and no later.


def write_leaf(kit: Kit, old: bytes) -> bytes:
    """Have the owner write where the leaf has nothing yet; return what the leaf is then."""
    path = kit.disk(LEAF.path)
    hole = next(at for at in range(0, len(old) - 65536, 65536) if not any(old[at : at + 65536]))
    pattern = path.with_suffix(".pattern")
    pattern.write_bytes(noise("owner", 65536))
    succeed("qemu-io", "-f", "vmdk", "-c", f"write -s {pattern} {hole} 65536", path)
    found = raw(path)
    assert found != old
    return found


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("live", [True, False], ids=["live", "frozen"])
def test_k26_what_the_library_knew_at_its_open(
    live: bool, kit: Kit, workers: Workers, contents: Callable[[str], bytes]
) -> None:
    image = msgspec.structs.replace(LEAF, live=live)
    old = contents(LEAF.path)
    trap, worker = workers(SCSI + NOT_ANEW), workers(SCSI)
    for one in (trap, worker):
        one.open(over_san(kit, image))
        assert one.read(0, SECTORS) == old
    new = write_leaf(kit, old)
    trap.renew()
    assert trap.read(0, SECTORS) == old
    assert trap.read(0, SECTORS, direct=True) == old, "the layout is not in any cache of Linux"

    worker.revalidate()
    assert worker.read(0, SECTORS) == (new if live else old)
    worker.renew()
    assert worker.read(0, SECTORS) == new
