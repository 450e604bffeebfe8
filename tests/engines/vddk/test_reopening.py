"""An image that is opened again has to be the same disk: no reader gets bytes of two disks."""

import msgspec
import pytest

from tests.engines.vddk.workers import LEAF, PLAIN, Worker, Workers, configured
from tests.simulator.disks import SECTORS, SIZE, noise, raw, succeed
from tests.simulator.kit import REGISTRY, Kit, until
from vddkfs.engines.config import VddkImage
from vddkfs.errors import EngineError

FROZEN = msgspec.structs.replace(PLAIN, live=False)
HELD = VddkImage(LEAF.path, "snapshot-3")
"""The leaf as a third snapshot holds it."""
SNAPSHOT = """
[snapshot snapshot-3]
vm = vm-16
disk = [ds1] web01/web01-000002.vmdk
"""
MIDDLE_SNAPSHOT = """[snapshot snapshot-2]
vm = vm-16
disk = [ds1] web01/web01-000001.vmdk
"""

NOT_COMPARED = """
from vddkfs.engines.vddk.reader import ImageReader
def adopt(self, found):
    self.identity = found
ImageReader._compare = adopt
"""
LEFT_OPEN = """
from vddkfs.engines.vddk.reader import ImageReader
ImageReader.close = lambda self: None
"""


def other_uuid(kit: Kit) -> None:
    """Put another disk in the place of the plain one."""
    descriptor = kit.disk(PLAIN.path)
    descriptor.write_text(descriptor.read_text().replace("11 22 33", "99 88 77"))


def refused(worker: Worker) -> None:
    """Take the answer to a read, which may reach nobody who has an older file open."""
    with pytest.raises(EngineError, match="it is another disk now") as caught:
        worker.answer()
    assert caught.value.retry == "reconnect"


def test_reads_of_another_disk_all_fail_until_the_worker_is_replaced(
    kit: Kit, workers: Workers
) -> None:
    worker = workers()
    worker.open(configured(kit, FROZEN, idle_close=0.2, keepalive=0.0))
    worker.read(0, 1)
    # It may have been closed, and opened again, before the read.
    until(
        lambda: len(kit.events("client-close")) == len(kit.events("client-open")),
        what="the idle disk to be closed",
    )
    other_uuid(kit)

    for _ in range(3):
        # The daemon may have sent several before it hears of the first.
        worker.begin_read(0, 1)
    for _ in range(3):
        refused(worker)


def delete_middle_snapshot(kit: Kit) -> bytes:
    """Have the host merge the middle link into the leaf, which its VM goes on to write.

    Returns what the leaf shows then.
    """
    middle, leaf = kit.disk("[ds1] web01/web01-000001.vmdk"), kit.disk(LEAF.path)
    merged, data = leaf.with_name("merged.vmdk"), leaf.with_name("merged.raw")
    content = bytearray(raw(leaf))
    for at in range(0, SIZE, 512 * 512):
        content[at : at + 512] = noise(("owner", at), 512)
    data.write_bytes(content)
    words = ("qemu-img", "create", "-q", "-f", "vmdk", "-b", "web01.vmdk", "-F", "vmdk", merged)
    succeed(*words, cwd=leaf.parent)
    succeed("qemu-io", "-f", "vmdk", "-c", f"write -s {data} 0 {SIZE}", merged)
    data.unlink()
    merged.rename(leaf)
    middle.unlink()
    kit.register((REGISTRY + SNAPSHOT).replace(MIDDLE_SNAPSHOT, ""))
    return bytes(content)


@pytest.mark.parametrize("image", [LEAF, HELD], ids=["live", "frozen"])
@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_a_middle_snapshot_is_deleted_while_the_disk_is_closed(
    guarded: bool, image: VddkImage, kit: Kit, workers: Workers
) -> None:
    kit.register(REGISTRY + SNAPSHOT)
    half = SECTORS // 2
    worker = workers("" if guarded else NOT_COMPARED)
    config = configured(kit, image, idle_close=0.2, keepalive=0.0)
    [before] = worker.open(config)
    assert before.links == 3
    old = raw(kit.disk(LEAF.path))
    first = worker.read(0, half)
    # It may have been closed, and opened again, before the read.
    until(
        lambda: len(kit.events("client-close")) == len(kit.events("client-open")),
        what="the idle disk to be closed",
    )
    new = delete_middle_snapshot(kit)

    if not guarded:
        whole = first + worker.read(half, SECTORS - half)
        assert whole not in (old, new), "a disk that never was"
        assert whole == old[: half * 512] + new[half * 512 :]
        return
    for sector in (half, half + 512, 0):
        worker.begin_read(sector, 512)
    for _ in range(3):
        refused(worker)
    with pytest.raises(EngineError, match="it had 3 links and has 2") as caught:
        worker.revalidate()
    assert caught.value.retry == "reconnect"
    assert worker.stop() == 0

    after = workers()
    [identity] = after.open(config)
    assert identity.links == 2
    assert before.change_to(identity, image.live) == "it had 3 links and has 2"
    assert after.read(0, SECTORS) == new


@pytest.mark.parametrize("ask", ["revalidate", "renew"])
@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_what_was_sent_before_the_daemon_heard_of_another_disk(
    guarded: bool, ask: str, kit: Kit, workers: Workers
) -> None:
    """Reads that other files had under way meanwhile are answered after the question."""
    worker = workers("" if guarded else LEFT_OPEN)
    [before] = worker.open(configured(kit, PLAIN))
    other_uuid(kit)
    found = worker.renew().identities if ask == "renew" else worker.revalidate()
    assert before.change_to(found[0], True)
    worker.begin_read(0, 1)
    if not guarded:
        worker.answer()
        return
    refused(worker)
    # The daemon asks again when it has told all readers.
    found = worker.renew().identities if ask == "renew" else worker.revalidate()
    assert before.change_to(found[0], True)
    worker.read(0, 1)
    assert worker.revalidate() == found


def test_a_worker_of_several_images_is_replaced_where_one_is_another_disk(
    kit: Kit, workers: Workers
) -> None:
    """Who asks first may be another disk's, whose readers need not hear of this one."""
    kit.configure("san.device = file")
    others = VddkImage("[ds1] plain/thin.vmdk", live=True)
    worker = workers()
    worker.open(configured(kit, others, PLAIN, transports=("hotadd",)))
    other_uuid(kit)
    worker.revalidate()
    worker.begin_read(0, 1, 1)
    refused(worker)
    worker.read(0, 1, 0)
    with pytest.raises(EngineError, match="it is another disk now") as caught:
        worker.revalidate()
    assert caught.value.retry == "reconnect"
