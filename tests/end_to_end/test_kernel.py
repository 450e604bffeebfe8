"""What is agreed with the kernel when the mount begins: how much it asks for, and how far ahead."""

from pathlib import Path

from tests.end_to_end.mounting import Mounts
from tests.end_to_end.vms import MIB, make_vmfs, noise
from vddkfs.fuse.session import MAX_BACKGROUND, READ_AHEAD_KIB, has_hooks
from vddkfs.mounts import mounted_at

SIZE = 16 * MIB


def test_the_kernel_reads_ahead_in_large_requests(mount: Mounts, vm: Path) -> None:
    """The kernel sets its own, small, value when the mount begins: ours has to come after that."""
    make_vmfs(vm / "disk.vmdk", noise("disk", SIZE))
    found = mount(vm)
    place = mounted_at(str(found.place))
    assert place is not None
    setting = Path(f"/sys/class/bdi/{place.device}/read_ahead_kb")
    assert int(setting.read_text()) == READ_AHEAD_KIB
    assert found.content("disk/disk.raw") == noise("disk", SIZE)
    assert found.worker()["requests"] < 2 * SIZE // MIB + 20, "not in pieces of 128 KiB"


def test_the_queue_is_long_enough_for_a_disk_that_hangs(mount: Mounts, vm: Path) -> None:
    assert has_hooks(), "the C module is a part of set-up"
    make_vmfs(vm / "disk.vmdk", noise("disk", MIB))
    found = mount(vm)
    assert found.status()["session"]["max_background"] == MAX_BACKGROUND
