"""Raw devices: read as they are now, whatever pages Linux has kept of them.

The file behind a loop device is written, as another host writes to a LUN: nobody tells the device,
and the pages that Linux has of it stay what they were.
"""

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.vmdk import VmdkEngine, device, files
from vddkfs.engines.vmdk.device import DeviceExtent
from vddkfs.engines.vmdk.extents import PACKED, UNSURE, Extent, FlatExtent, WouldWait
from vddkfs.engines.vmdk.files import OpenFile, open_device
from vddkfs.errors import EngineError, StaleImage

SECTORS = 4096 + 5
"""Not a multiple of 4096 bytes: the device ends inside what is read at once."""
SIZE = SECTORS * 512
PLACES = [(0, 1), (0, 8), (7, 2), (1000, 2048), (3, 3000), (SECTORS - 1, 1), (SECTORS - 9, 9)]


def noise(word: bytes) -> bytes:
    return b"".join(b"%b%09d" % (word, number) * 32 for number in range(SECTORS))


OLD, NEW = noise(b"old-56 "), noise(b"new-56 ")


class Lun:
    """A block device that is written behind this machine's back."""

    def __init__(self, path: str, backing: Path) -> None:
        self.path = path
        self._backing = backing

    def write_behind(self, content: bytes) -> None:
        """Replace the whole content by *content*, past all pages that are kept of the device."""
        fd = os.open(self._backing, os.O_WRONLY)
        try:
            assert os.pwrite(fd, content, 0) == len(content) == SIZE
            os.fsync(fd)
        finally:
            os.close(fd)


@pytest.fixture
def lun(tmp_path: Path) -> Iterator[Lun]:
    """A loop device of SECTORS sectors, which has OLD."""
    backing = tmp_path / "lun"
    backing.write_bytes(OLD)
    command = ["losetup", "--find", "--show", "--direct-io=off", str(backing)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("absent: the tool losetup")
    path = done.stdout.strip()
    if done.returncode or not os.path.exists(path):
        pytest.skip(f"absent: a free loop device ({done.stderr.strip() or 'no device node'})")
    yield Lun(path, backing)
    subprocess.run(["losetup", "--detach", path], check=True, timeout=20)


@pytest.fixture
def held(lun: Lun) -> Iterator[None]:
    """Have somebody else hold the device open, so that its pages stay when we close it."""
    fd = os.open(lun.path, os.O_RDONLY)
    yield
    os.close(fd)


@pytest.fixture
def opened(lun: Lun) -> Iterator[OpenFile]:
    file = open_device(lun.path)
    yield file
    file.close()


def through(extent: Extent, sector: int, count: int, fresh: bool) -> bytes:
    """Return what a reader of *extent* gets."""
    into = bytearray(b"\xa5") * (count * 512)
    (piece,) = extent.pieces(sector, count, fresh, 0)
    assert (piece.sector, piece.count) == (sector, count)
    if piece.kind == PACKED:
        extent.unpack(piece, memoryview(into), fresh, 0)
    else:
        assert os.preadv(piece.fd, [into], piece.offset) == len(into)
    return bytes(into)


def outdate(lun: Lun, reader: Callable[[], bytes]) -> None:
    """Have Linux keep the pages with OLD, which *reader* reads, of a device that has NEW.

    Another process may have the page cache dropped, so it is tried more than once.
    """
    for _ in range(5):
        lun.write_behind(OLD)
        open_device(lun.path).close()
        assert reader() == OLD
        lun.write_behind(NEW)
        if reader() == OLD:
            return
    raise AssertionError("no trap: this machine keeps no pages of the device")


def part(content: bytes, sector: int, count: int) -> bytes:
    return content[sector * 512 :][: count * 512]


@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_fresh_reads_are_of_now(lun: Lun, opened: OpenFile, guarded: bool) -> None:
    kind = DeviceExtent if guarded else FlatExtent
    extent = kind(opened, 0, SECTORS, 0)
    outdate(lun, lambda: through(extent, 0, SECTORS, False))
    assert through(extent, 0, SECTORS, True) == (NEW if guarded else OLD)


@pytest.mark.parametrize(("sector", "count"), PLACES)
@pytest.mark.parametrize("offset", [0, 1, 100])
def test_every_place(opened: OpenFile, sector: int, count: int, offset: int) -> None:
    """Whatever does not begin or end where O_DIRECT wants it, up to the device's last sector."""
    start = 10
    extent = DeviceExtent(opened, start, SECTORS - offset, offset)
    sector, count = max(sector - offset, 0), min(count, SECTORS - offset)
    wanted = part(OLD, sector + offset, count)
    for fresh in (False, True):
        assert through(extent, start + sector, count, fresh) == wanted


def test_in_small_steps(opened: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernel returns of what was asked for, and in several bounces."""
    extent = DeviceExtent(opened, 0, SECTORS, 0)
    plain = os.preadv
    asked: list[int] = []

    def short(fd: int, into: Any, at: int, flags: int = 0) -> int:
        asked.append(len(into[0]))
        return plain(fd, [into[0][:8192]], at, flags)

    monkeypatch.setattr(os, "preadv", short)
    monkeypatch.setattr(device, "_BOUNCE_BYTES", 64 << 10)
    (piece,) = extent.pieces(3, 1000, True, 0)
    into = bytearray(1000 * 512)
    extent.unpack(piece, memoryview(into), True, 0)
    assert into == part(OLD, 3, 1000)
    assert len(asked) > 60
    assert max(asked) <= (64 << 10) + 2 * 4096


def test_larger_blocks(opened: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_block_bytes", lambda fd: 16384)
    places: list[int] = []
    plain = os.preadv

    def noted(fd: int, into: Any, at: int, flags: int = 0) -> int:
        places.append(at)
        return plain(fd, into, at, flags)

    extent = DeviceExtent(opened, 0, SECTORS, 0)
    (piece,) = extent.pieces(63, 3, True, 0)
    into = bytearray(3 * 512)
    monkeypatch.setattr(os, "preadv", noted)
    extent.unpack(piece, memoryview(into), True, 0)
    assert into == part(OLD, 63, 3)
    assert places == [16384]


def test_locate(opened: OpenFile) -> None:
    extent = DeviceExtent(opened, 5, 100, 7)
    assert extent.locate(6, 4, False, 0) == (1 + 7) * 512
    assert extent.locate(6, 4, True, 0) == UNSURE
    assert extent.locate(100, 6, False, 0) == UNSURE


def test_a_fresh_read_always_waits(opened: OpenFile) -> None:
    extent = DeviceExtent(opened, 0, SECTORS, 0)
    (piece,) = extent.pieces(0, 8, True, os.RWF_NOWAIT)
    with pytest.raises(WouldWait):
        extent.unpack(piece, memoryview(bytearray(4096)), True, os.RWF_NOWAIT)


@pytest.mark.parametrize(
    ("answer", "why"), [(0, "the device ends there"), (OSError(5, "I/O error"), "I/O error")]
)
def test_failures_have_their_place(
    opened: OpenFile, answer: int | OSError, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extent = DeviceExtent(opened, 10, 2000, 3, "/vm/d.vmdk")
    (piece,) = extent.pieces(11, 1000, True, 0)
    plain = os.preadv

    def failing(fd: int, into: Any, at: int, flags: int = 0) -> int:
        if at >= fails_at:
            if isinstance(answer, OSError):
                raise answer
            return answer
        return plain(fd, [into[0][: fails_at - at]], at, flags)

    monkeypatch.setattr(os, "preadv", failing)
    # Sector 11 is the device's sector 4; what is read begins with its sector 0.
    for fails_at, sector in ((0, 11), (4096, 15), (102400, 207)):
        with pytest.raises(EngineError) as caught:
            extent.unpack(piece, memoryview(bytearray(1000 * 512)), True, 0)
        told = caught.value
        assert (told.link, told.sector) == ("/vm/d.vmdk", sector)
        assert str(told) == f"{opened.path}: reading byte {fails_at} with O_DIRECT failed: {why}"


def test_nothing_is_read_ahead(lun: Lun, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way while pages are dropped would stay."""
    plain = os.posix_fadvise
    advice: list[int] = []

    def noted(fd: int, at: int, size: int, what: int) -> None:
        advice.append(what)
        plain(fd, at, size, what)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    open_device(lun.path).close()
    assert advice == [os.POSIX_FADV_RANDOM, os.POSIX_FADV_DONTNEED]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_stays_open(lun: Lun, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    file = open_device(lun.path)
    assert descriptors() == before + 2
    assert fcntl.fcntl(file.direct_fd, fcntl.F_GETFL) & os.O_DIRECT
    assert not fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT
    file.close()
    assert descriptors() == before
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    with pytest.raises(StaleImage, match="replaced while"):
        open_device(lun.path)
    assert descriptors() == before


@pytest.mark.usefixtures("held")
class TestEngine:
    @pytest.fixture
    def engine(self, lun: Lun, make: Any) -> Iterator[VmdkEngine]:
        path = make.text("d.vmdk", [f'RW {SECTORS} FLAT "{lun.path}" 0'], kind="fullDevice")
        engine = VmdkEngine([path], raw_devices=True)
        yield engine
        engine.close()

    @pytest.mark.parametrize("by", ["revalidate", "renew"])
    @pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
    def test_opened_again(
        self,
        lun: Lun,
        engine: VmdkEngine,
        read: Callable[..., bytes],
        by: str,
        guarded: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        outdate(lun, lambda: read(engine, 0, SECTORS))
        before = engine.identities()
        if not guarded:
            monkeypatch.setattr(files, "_forget_pages", lambda fd: None)
        getattr(engine, by)()
        assert read(engine, 0, SECTORS) == (NEW if guarded else OLD)
        assert engine.identities() == before, "which prove nothing about what a device holds"

    @pytest.mark.parametrize("permitted", [False, True])
    def test_without_privileges(
        self,
        lun: Lun,
        engine: VmdkEngine,
        read: Callable[..., bytes],
        permitted: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Each of the two ways to drop pages is enough."""
        plain = fcntl.ioctl

        def refused(fd: int, request: int, *more: Any) -> Any:
            if request == files._BLKFLSBUF:
                raise PermissionError(1, "Operation not permitted")
            return plain(fd, request, *more)

        outdate(lun, lambda: read(engine, 0, SECTORS))
        if permitted:
            monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
        else:
            monkeypatch.setattr(fcntl, "ioctl", refused)
        engine.revalidate()
        assert read(engine, 0, SECTORS) == NEW

    @pytest.mark.parametrize("place", PLACES)
    def test_direct(
        self, lun: Lun, engine: VmdkEngine, read: Callable[..., bytes], place: tuple[int, int]
    ) -> None:
        outdate(lun, lambda: read(engine, 0, SECTORS))
        assert read(engine, *place, direct=True) == part(NEW, *place)
        into = memoryview(bytearray(512))
        assert not engine.read_nowait(0, 0, 1, into, True), "it would wait for the device"

    def test_a_new_engine_begins_with_now(
        self, lun: Lun, engine: VmdkEngine, read: Callable[..., bytes]
    ) -> None:
        outdate(lun, lambda: read(engine, 0, SECTORS))
        (path,) = (link.path for link in engine.identities())
        other = VmdkEngine([path], raw_devices=True)
        assert read(other, 0, SECTORS) == NEW
        other.close()
