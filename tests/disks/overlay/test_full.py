"""A full disk: what is in the fork can be rewritten for ever, the rest fails and says so."""

import errno
import random

import pytest

from tests.disks.overlay.crashing import BELOW, CAPACITY, SOURCE, Host, blocks, content
from tests.disks.overlay.memory import MemoryDisk
from vddkfs.disks.overlay import BLOCK, Limits, Overlay
from vddkfs.disks.overlay.journal import Journal
from vddkfs.errors import OverlayError


def filled(host: Host) -> None:
    """Write blocks 0 to 9, and let somebody else take all space that is left."""
    host.write(0, random.Random(1).randbytes(10 * BLOCK))
    host.flush()
    host.disk.fill()


def overflow(host: Host) -> OverlayError:
    """Write blocks that are not there yet until the places that were allocated are used up."""
    for number in range(10, 40):
        try:
            host.write(number * BLOCK, b"n" * BLOCK)
        except OverlayError as error:
            host.expected.take(bytes(host.expected.now[: number * BLOCK]) + BELOW[number * BLOCK :])
            return error
    raise AssertionError("it never was full")


def test_new_blocks_fail_and_say_so() -> None:
    host = Host(MemoryDisk())
    filled(host)
    error = overflow(host)
    assert error.errno == errno.ENOSPC
    assert "/overlay/forks/0000" in str(error)
    assert "0 KiB are free" in str(error)
    assert "free space there" in error.advice
    assert content(host.fork) == host.expected.now


def test_what_is_there_is_rewritten_for_ever() -> None:
    host = Host(MemoryDisk())
    filled(host)
    overflow(host)
    draw = random.Random(2)
    compactions = host.fork._store._journal.compactions
    for turn in range(400):
        first = draw.randrange(10)
        host.write(first * BLOCK, draw.randbytes(draw.randint(1, 10 - first) * BLOCK))
        if turn % 10 == 0:
            host.flush()
    host.write(5, b"part of a block")
    assert content(host.fork) == host.expected.now
    assert host.fork._store._journal.compactions > compactions + 5, "the map was compacted too"
    host.close()
    host.open()
    assert content(host.fork) == host.expected.now
    host.write(0, b"r" * 10 * BLOCK)
    host.flush()


def test_zeros_free_places_for_others() -> None:
    host = Host(MemoryDisk())
    filled(host)
    overflow(host)
    host.zero(0, 5 * BLOCK)
    host.write(39 * BLOCK, b"z" * BLOCK)
    assert content(host.fork) == host.expected.now


def test_it_goes_on_when_there_is_space_again() -> None:
    host = Host(MemoryDisk())
    filled(host)
    overflow(host)
    host.disk.space += 200
    host.write(10 * BLOCK, b"m" * 30 * BLOCK)
    host.flush()
    assert content(host.fork) == host.expected.now


def test_power_lost_while_it_is_full() -> None:
    for left in range(0, 120, 3):
        host = Host(MemoryDisk())
        filled(host)
        overflow(host)
        host.flush()
        host.disk.left = left
        try:
            for number in range(30):
                host.write(number % 9 * BLOCK, bytes([number + 1]) * 2 * BLOCK)
            host.flush()
        except BaseException as end:
            if type(end).__name__ != "Killed":
                raise
        disk = host.disk.after_power_loss(random.Random(left))
        disk.fill()
        host.disk = disk
        host.open()
        image = content(host.fork)
        assert host.expected.wrong(image) == [], f"at call {left}"
        host.expected.take(image)
        host.write(0, b"o" * 10 * BLOCK)
        host.flush()
        assert content(host.fork) == host.expected.now


def test_a_write_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system breaks its word: the space that it allocated is not there."""
    host = Host(MemoryDisk())
    host.write(0, b"o" * 8 * BLOCK)
    host.disk.fail["write"] = errno.ENOSPC
    with pytest.raises(OverlayError, match="segment-0000: writing at byte") as caught:
        host.fork.write(0, b"n" * 4 * BLOCK, lambda offset, size: b"")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OverlayError, match="map: writing failed"):
        host.fork.flush()
    assert content(host.fork) == host.expected.now
    host.disk.fail.clear()
    host.write(BLOCK, b"p" * 4 * BLOCK)
    host.flush()
    host.close()
    host.open()
    assert content(host.fork) == host.expected.now


def test_the_map_fails_to_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(MemoryDisk())
    host.write(0, b"o" * 8 * BLOCK)

    def reserve(self: Journal, runs: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "missing", lambda self, runs: BLOCK)
    monkeypatch.setattr(Journal, "reserve", reserve)
    with pytest.raises(OverlayError, match="map: growing failed") as caught:
        host.fork.write(20 * BLOCK, b"n" * BLOCK, lambda offset, size: b"")
    assert caught.value.errno == errno.ENOSPC
    host.write(0, b"p" * 8 * BLOCK)
    host.flush()
    assert content(host.fork) == host.expected.now


def test_a_reserve_is_left_to_others() -> None:
    disk = MemoryDisk(space=2000)
    limits = Limits(reserve=500 * BLOCK, grow=64, spare=8, piece=4, log_room=8 * BLOCK)
    overlay = Overlay.open("/overlay", SOURCE, files=disk, limits=limits)
    fork = overlay.fork("big", 10_000 * BLOCK)
    with pytest.raises(OverlayError, match="2000 KiB of them are kept free"):
        fork.write(0, b"b" * 4000 * BLOCK, lambda offset, size: b"")
    assert 500 <= disk.space - disk.used() < 600


def test_no_space_to_begin() -> None:
    with pytest.raises(OverlayError, match="no space") as caught:
        Overlay.open("/overlay", SOURCE, files=MemoryDisk(space=3), limits=Limits())
    assert caught.value.errno == errno.ENOSPC


def test_no_space_for_a_fork() -> None:
    disk = MemoryDisk()
    overlay = Overlay.open("/overlay", SOURCE, files=disk, limits=Limits(reserve=0))
    space, disk.space = disk.space, disk.used() + 5
    for _ in range(2):
        with pytest.raises(OverlayError, match="making it failed") as caught:
            overlay.fork("disk/0", CAPACITY)
        assert caught.value.errno == errno.ENOSPC
    disk.space = space
    overlay.fork("disk/0", CAPACITY).write(0, b"x" * BLOCK, lambda offset, size: b"")
    overlay.close()


def test_no_hard_links() -> None:
    """Said when the fork is made, and not by a write when its map is full."""
    disk = MemoryDisk()
    overlay = Overlay.open("/overlay", SOURCE, files=disk, limits=Limits(reserve=0))
    disk.fail["link"] = errno.EPERM
    with pytest.raises(OverlayError, match="map: making it failed"):
        overlay.fork("disk/0", CAPACITY)
    overlay.close()


@pytest.mark.parametrize("call", ["link", "rename"])
def test_the_maps_cannot_be_exchanged(call: str) -> None:
    """For a while: nothing is lost, and it goes on when they can."""
    host = Host(MemoryDisk())
    host.write(0, b"a" * 4 * BLOCK)
    host.flush()
    host.disk.fail[call] = errno.EACCES
    with pytest.raises(OverlayError, match="map: writing failed"):
        write_and_flush(host)
    shown = content(host.fork)
    host.disk.fail.clear()
    host.fork.flush()
    assert content(host.fork) == shown
    write_and_flush(host)
    shown = content(host.fork)
    host.disk = host.disk.after_power_loss(random.Random(1))
    host.open()
    assert content(host.fork) == shown


def test_the_name_of_the_next_map_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(MemoryDisk())
    plain = host.disk.rename

    def rename(old: str, new: str) -> None:
        if new.endswith("map.next"):
            raise OSError(errno.EIO, "no")
        plain(old, new)

    monkeypatch.setattr(host.disk, "rename", rename)
    before = host.fork._store._journal.compactions
    with pytest.raises(OverlayError, match="map: writing failed"):
        write_and_flush(host)
    assert host.fork._store._journal.compactions == before + 1, "once it went without the name"
    monkeypatch.undo()
    write_and_flush(host)
    assert content(host.fork)[: 4 * BLOCK] == b"".join(bytes([n]) * BLOCK for n in range(96, 100))


@pytest.mark.parametrize("call", ["sync", "sync_folder"])
def test_a_failed_flush_is_not_forgotten(call: str) -> None:
    host = Host(MemoryDisk())
    host.write(0, b"a" * 4 * BLOCK)
    host.flush()
    before = content(host.fork)
    host.disk.fail[call] = errno.EIO
    with pytest.raises(OverlayError, match="flushing"):
        write_and_flush(host)
    host.disk.fail.clear()
    for _ in range(2):
        with pytest.raises(OverlayError, match="nothing is written any more"):
            host.fork.flush()
        with pytest.raises(OverlayError, match="nothing is written any more"):
            host.fork.write(0, b"x", lambda offset, size: bytes(size))
    assert blocks(content(host.fork))[4:] == blocks(before)[4:]
    with pytest.raises(OverlayError, match="nothing is written any more"):
        host.overlay.close()
    assert len(content_after(host)) == CAPACITY


def write_and_flush(host: Host) -> None:
    """Write so often that the map is compacted."""
    for number in range(100):
        host.fork.write(number % 4 * BLOCK, bytes([number]) * BLOCK, lambda offset, size: b"")
        host.fork.flush()


def content_after(host: Host) -> bytes:
    host.disk = host.disk.after_kill()
    host.open()
    return content(host.fork)
