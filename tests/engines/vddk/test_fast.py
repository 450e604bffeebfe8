"""Reads that a worker serves without Python: the same bytes and the same answers as with it."""

import select
import shutil

import pytest

from tests.engines.vddk.chunked import WITHOUT, Contents, in_c, opened, random_reads, read_calls
from tests.engines.vddk.workers import (
    BASE,
    LEAF,
    MIDDLE,
    PLAIN,
    SCSI,
    SECONDS,
    Worker,
    Workers,
)
from tests.simulator.disks import SECTORS
from tests.simulator.kit import Kit, Kits
from vddkfs.engines import protocol
from vddkfs.engines.base import SECTOR
from vddkfs.engines.config import VddkImage
from vddkfs.engines.protocol import Op

pytest.importorskip("vddkfs.engines.vddk._reads", reason="the C module is not built")

TIGHT = "from vddkfs.engines.vddk import flow; flow.LARGEST_WINDOW = 192 * 1024\n"
"""A window that a few reads fill, so that some wait in Python for others that are in C."""


@pytest.mark.parametrize("transport", ["nbd", "nbdssl"])
@pytest.mark.parametrize("release", ["6.5", "6.7", "7.0", "8.0"])
def test_the_same_bytes_with_and_without(
    release: str, transport: str, kits: Kits, contents: Contents
) -> None:
    kit = kits(release)
    (kit.path / "lib64").unlink()
    shutil.copytree(kit.build / "lib64", kit.path / "lib64", symlinks=True)
    for patch, expected in (("", -(-SECTORS // 500)), (WITHOUT, 0)):
        worker = Worker(kit, patch)
        try:
            reader = opened(worker, kit, transports=(transport,))
            assert reader.whole() == contents(PLAIN.path)
            assert in_c(worker) == expected
            assert worker.stop() == 0
        finally:
            worker.finish()


@pytest.mark.parametrize("how", ["san", "hotadd", "file", "inline"])
@pytest.mark.parametrize("direct", [0, protocol.DIRECT])
def test_completions_inside_the_call(
    how: str, direct: int, kit: Kit, workers: Workers, contents: Contents
) -> None:
    kit.configure("san.device = file", "fault = ReadAsync transport=nbdssl inline")
    worker = workers(SCSI)
    image, more = PLAIN, {}
    if how == "file":
        image = VddkImage(str(kit.disk(PLAIN.path)), live=True)
        more = {"server": "", "transports": ()}
    elif how != "inline":
        more = {"transports": (how,)}
    reader = opened(worker, kit, image, **more)
    assert reader.read(3, 500, flags=direct) == contents(PLAIN.path)[3 * SECTOR : 503 * SECTOR]
    assert reader.whole() == contents(PLAIN.path)
    assert in_c(worker) >= SECTORS // 500


FAILURES = ("error=2", "error=14011", "error=3", "error=7", "error=25001")
FAILURES += tuple(f"callback_{failure}" for failure in FAILURES)


@pytest.mark.parametrize("upper", ["no", "yes"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_answered_as_python_does(
    failure: str, upper: str, kit: Kit, workers: Workers
) -> None:
    """Also what is tried again: when the host had no memory."""
    packets, figures = [], []
    for patch, path in (("", "*plain*"), (WITHOUT, "*plain.vmdk")):
        kit.configure(
            f"errors.upper_bits = {upper}", f"fault = ReadAsync path={path} count=1 {failure}"
        )
        worker = workers(patch)
        reader = opened(worker, kit)
        found = []
        for sector in (5, 6):
            reader.ask(sector, 8)
            found.append(reader.packet())
        packets.append(found)
        calls = read_calls(worker)
        figures.append((calls.count, calls.failures, calls.bytes, sum(calls.buckets)))
        assert worker.says("asking again") == failure.endswith("error=2")
        # A third read: the window has room for all of it again.
        reader.read(0, 8)
        assert bool(in_c(worker)) == (patch == "")
    assert packets[0] == packets[1]
    assert figures[0] == figures[1]
    assert figures[0][1] == 1


@pytest.mark.parametrize("patch", ["", WITHOUT])
def test_every_failure_of_many_is_tried_again(
    patch: str, kit: Kit, workers: Workers, contents: Contents
) -> None:
    kit.configure("fault = ReadAsync probability=0.05 callback_error=2", profile="lan")
    worker = workers(patch)
    random_reads(opened(worker, kit), [contents(PLAIN.path)], 1000)
    assert worker.says("asking again")


@pytest.mark.parametrize("profile", ["instant", "lan", "nbdssl"])
def test_ten_thousand_reads_of_several_images(
    profile: str, kit: Kit, workers: Workers, contents: Contents
) -> None:
    total = 10_000 if profile != "nbdssl" else 1000
    kit.configure("san.device = file", profile=profile)
    images = (BASE, MIDDLE, LEAF)
    for image in images:
        contents(image.path)
    worker = workers()
    reader = opened(worker, kit, *images)
    random_reads(reader, [contents(image.path) for image in images], total)
    assert in_c(worker) == total
    calls = read_calls(worker)
    assert (calls.count, calls.failures) == (total, 0)
    assert sum(calls.buckets) == total


@pytest.mark.parametrize("profile", ["instant", "lan"])
def test_reads_with_and_without_python_share_one_window(
    profile: str, kit: Kit, workers: Workers, contents: Contents
) -> None:
    kit.configure(profile=profile)
    worker = workers(TIGHT)
    random_reads(opened(worker, kit), [contents(PLAIN.path)], 3000)
    assert 0 < in_c(worker) < 3000


def test_others_are_served_between_the_reads(
    kit: Kit, workers: Workers, contents: Contents
) -> None:
    kit.configure(profile="lan")
    worker = workers()
    reader = opened(worker, kit)
    for _ in range(20):
        random_reads(reader, [contents(PLAIN.path)], 40)
        reader.ask(1, 1)
        worker.ask(Op.REVALIDATE)
        reader.ask(2, 1, 1)
        worker.ask(Op.RENEW)
        reader.ask(3, 1, 2)
        for _ in range(5):
            worker.answer()
        for place in range(3):
            start = place * reader.region
            sector = (place + 1) * SECTOR
            expected = contents(PLAIN.path)[sector : sector + SECTOR]
            assert reader.area[start : start + SECTOR] == expected
    assert in_c(worker) >= 20 * 40


@pytest.mark.parametrize("profile", ["instant", "lan"])
@pytest.mark.parametrize("patch", ["", WITHOUT])
def test_a_full_socket_is_waited_for(
    patch: str, profile: str, kit: Kit, workers: Workers, contents: Contents
) -> None:
    """The daemon that does not listen for a while loses no answer."""
    kit.configure(profile=profile)
    worker = workers(patch)
    reader = opened(worker, kit)
    sent = set()
    worker.sock.setblocking(False)
    while select.select([], [worker.sock], [], 0.5)[1]:
        sent.add(reader.ask(len(sent) % 1000, 1, len(sent) % 32))
    worker.sock.setblocking(True)
    worker.sock.settimeout(SECONDS)
    assert len(sent) > 300
    assert sorted(worker.answered() for _ in sent) == sorted(sent)
    assert reader.whole() == contents(PLAIN.path)
