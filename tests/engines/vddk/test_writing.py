"""Writing through the library: what arrives, how it is split, what is flushed, what is refused."""

import errno
from collections.abc import Callable, Iterator

import pytest

from tests.engines.vddk.workers import PLAIN, SCSI, configured
from tests.engines.vddk.writers import (
    NO_FLUSH,
    SYNCHRONOUS,
    THIN,
    WRITTEN,
    Writer,
    pieces,
)
from tests.simulator.disks import SECTORS, make_vmfs, noise, raw
from tests.simulator.kit import Kit, until
from vddkfs.engines.base import SECTOR
from vddkfs.engines.config import VddkImage
from vddkfs.engines.protocol import Op
from vddkfs.errors import AccessDenied, EngineError

FILES = "san.device = file"
Writers = Callable[..., Writer]


@pytest.fixture
def writers(kit: Kit) -> Iterator[Writers]:
    """Return a function that starts a worker that can be asked to write; it ends with the test."""
    made: list[Writer] = []

    def make(patch: str = "") -> Writer:
        made.append(Writer(kit, patch))
        return made[-1]

    yield make
    for writer in made:
        writer.finish()


def closed(kit: Kit) -> int:
    """Return how many handles were closed so far."""
    return len(kit.events("client-close"))


@pytest.mark.parametrize("patch", ["", SYNCHRONOUS], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("transport", ["nbdssl", "nbd", "san", "hotadd"])
def test_what_is_written_is_read_and_is_on_the_disk(
    transport: str, patch: str, kit: Kit, writers: Writers, contents: Callable[[str], bytes]
) -> None:
    kit.configure(FILES, "unavailable = fail")
    expected = bytearray(contents(WRITTEN.path))
    writer = writers(SCSI + patch)
    writer.open(configured(kit, WRITTEN, transports=(transport,)))
    for number, (sector, size) in enumerate([(0, 1), (1, 7), (300, 128), (SECTORS - 3, 3)]):
        data = noise(number, size * SECTOR)
        writer.write(sector, data)
        expected[sector * SECTOR :][: len(data)] = b""
        expected[sector * SECTOR : sector * SECTOR + len(data)] = data
    assert writer.read(0, SECTORS) == expected
    writer.flush()
    assert writer.stop() == 0
    assert raw(kit.disk(WRITTEN.path)) == expected
    [opened] = kit.events("client-open")
    assert opened.fields["transport"] == transport
    assert opened.fields["read_only"] == "no"


@pytest.mark.parametrize("transport", ["nbdssl", "san"])
def test_a_hole_is_filled(transport: str, kit: Kit, writers: Writers) -> None:
    kit.configure(FILES)
    before = raw(kit.disk(THIN.path))
    hole = before.index(bytes(65536)) // SECTOR + 9
    writer = writers(SCSI)
    writer.open(configured(kit, THIN, transports=(transport,)))
    writer.write(hole, noise("hole", 3 * SECTOR))
    expected = before[: hole * SECTOR] + noise("hole", 3 * SECTOR)
    assert writer.read(0, SECTORS) == expected + before[len(expected) :]


def test_a_file_of_this_machine_is_written(kit: Kit, writers: Writers) -> None:
    path = make_vmfs(kit.path / "own.vmdk", noise("own", 1 << 20))
    writer = writers()
    image = VddkImage(str(path), live=True, writable=True)
    config = configured(kit, image, server="", vmx_spec="", transports=())
    writer.open(config)
    writer.write(7, noise("new", 4096))
    assert writer.read(7, 8) == noise("new", 4096)
    second = writers()
    with pytest.raises(AccessDenied, match="another process has it open for writing"):
        second.open(config)
    assert writer.stop() == 0
    assert raw(path)[7 * SECTOR :][:4096] == noise("new", 4096)


def test_a_completion_inside_the_call_is_one(kit: Kit, writers: Writers) -> None:
    kit.configure("fault = WriteAsync inline")
    writer = writers()
    writer.open(configured(kit, WRITTEN))
    writer.write(64, noise("inside", 8192))
    assert writer.read(64, 16) == noise("inside", 8192)


def test_a_large_write_goes_in_pieces_many_at_once(kit: Kit, writers: Writers) -> None:
    data = noise("large", 4 * 1024 * 1024)
    writer = writers()
    writer.open(configured(kit, WRITTEN))
    before = writer.calls("WriteAsync")
    writer.write(0, data)
    assert writer.calls("WriteAsync") - before == 2
    assert writer.read(0, len(data) // SECTOR) == data


def test_many_writes_are_under_way_at_once(kit: Kit, writers: Writers) -> None:
    """One after another sixteen would take 3.2 s."""
    writer = writers()
    writer.open(configured(kit, WRITTEN))
    writer.read(0, 1)
    kit.configure("net.latency_us = 200000", "net.jitter = 0")
    written = pieces("many", 16)
    began = {writer.begin_write(8 * n, data, 4096 * n) for n, data in enumerate(written)}
    waited = {writer.answered() for _ in began}
    assert waited == began
    [took] = [c for c in writer.report().calls if c.name == "VixDiskLib_WriteAsync"]
    assert took.count == 16
    kit.configure()
    assert writer.read(0, 8 * 16) == b"".join(written)
    # The time in the library, summed up, is far more than what has passed.
    assert took.seconds > 16 * 0.2 * 0.9


@pytest.mark.parametrize("transport", ["san", "nbdssl"])
def test_reads_and_writes_run_beside_one_another(
    transport: str, kit: Kit, writers: Writers, contents: Callable[[str], bytes]
) -> None:
    kit.configure(FILES)
    expected = bytearray(contents(WRITTEN.path))
    writer = writers(SCSI)
    writer.open(configured(kit, WRITTEN, transports=(transport,)))
    for turn in range(8):
        begun = 0
        for number, data in enumerate(pieces(turn, 8)):
            sector = 2048 + 8 * (8 * turn + number)
            writer.begin_write(sector, data, 1 << 20 | 4096 * number)
            writer.begin_read(0, 64)
            expected[sector * SECTOR : sector * SECTOR + 4096] = data
            begun += 2
        writer.ask(12)
        for _ in range(begun + 1):
            writer.answer()
    assert writer.read(0, SECTORS) == expected
    assert writer.calls("Flush") == 8
    assert writer.report().reads_in_c > 8, "the loop in C hands on what is not a read"


def test_refused_memory_makes_writes_smaller(kit: Kit, writers: Writers) -> None:
    writer = writers()
    writer.open(configured(kit, WRITTEN))
    kit.configure("sessions.memory_bytes = 300000")
    data = noise("refused", 2 * 1024 * 1024)
    writer.write(0, data)
    kit.configure()
    assert writer.read(0, len(data) // SECTOR) == data
    assert writer.says("asking again", "not enough memory")


def test_an_unaligned_copy_is_made_for_unbuffered_writes(kit: Kit, writers: Writers) -> None:
    """What is written again comes in the request, wherever that lies in memory."""
    kit.configure(FILES)
    for transport in ("san", "hotadd", "nbdssl"):
        writer = writers(SCSI)
        writer.open(configured(kit, WRITTEN, transports=(transport,)))
        for number in range(5):
            data = noise((transport, number), 1536)
            writer.write_again(64 + 3 * number, data)
            assert writer.read(64 + 3 * number, 3) == data
        assert writer.stop() == 0


# Flushing.


def test_a_flush_has_the_handle_to_itself(kit: Kit, writers: Writers) -> None:
    """The simulator aborts on calls beside one another; slow requests are under way all the time.

    What is asked after the flush begins after it.
    """
    writer = writers()
    writer.open(configured(kit, WRITTEN))
    writer.read(0, 1)
    kit.configure("net.latency_us = 100000", "net.jitter = 0.9")
    first = [writer.begin_write(8 * n, data, 4096 * n) for n, data in enumerate(pieces(0, 4))]
    writer.begin_read(512, 8)
    first.append(writer.last_id)
    writer.ask(12)
    flushed = writer.last_id
    after = [writer.begin_write(80, noise("after", 4096), 65536)]
    writer.begin_read(600, 8)
    after.append(writer.last_id)
    order = [writer.answered() for _ in range(len(first) + 1 + len(after))]
    assert set(order[: len(first)]) == set(first)
    assert order[len(first)] == flushed
    assert set(order[len(first) + 1 :]) == set(after)


def test_a_flush_that_fails_is_told(kit: Kit, writers: Writers) -> None:
    writer = writers()
    writer.open(configured(kit, WRITTEN))
    writer.write(0, noise("lost", 4096))
    kit.configure("fault = Flush count=1 error=8")
    with pytest.raises(EngineError, match="the datastore is full") as caught:
        writer.flush()
    assert caught.value.errno == errno.ENOSPC
    assert not caught.value.retry
    kit.configure("fault = Flush error=14011")
    with pytest.raises(EngineError, match="the connection was lost") as caught:
        writer.flush()
    assert caught.value.retry == "reconnect"


def test_without_the_function_closing_and_opening_again_flushes(kit: Kit, writers: Writers) -> None:
    writer = writers(NO_FLUSH)
    writer.open(configured(kit, WRITTEN))
    writer.flush()
    assert not closed(kit), "there was nothing to flush"
    writer.write(0, noise("kept", 4096))
    writer.flush()
    writer.flush()
    assert closed(kit) == 1
    assert writer.calls("Flush") == 0
    assert len(kit.events("lock-granted")) == 2
    assert writer.read(0, 8) == noise("kept", 4096)

    writer.write(0, noise("lost", 4096))
    kit.configure("fault = Close count=1 error=7")
    with pytest.raises(EngineError):
        writer.flush()
    with pytest.raises(EngineError, match="writes may be lost") as caught:
        writer.flush()
    assert caught.value.retry == "reconnect"


def test_what_waits_for_a_flush_that_cannot_open_the_disk_again_is_for_another_worker(
    kit: Kit, writers: Writers
) -> None:
    writer = writers(NO_FLUSH)
    writer.open(configured(kit, WRITTEN))
    writer.write(0, noise("kept", 4096))
    kit.configure("fault = WriteAsync count=1 delay_ms=300", "fault = Open error=14011")
    writer.begin_write(8, noise("before", 4096))
    writer.ask(Op.FLUSH)
    writer.begin_write(16, noise("behind", 4096), at=8192)
    writer.answer()
    writer.answer()
    with pytest.raises(EngineError, match="is closed") as caught:
        writer.answer()
    assert caught.value.retry == "reconnect"


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_flushes_and_says_what_is_lost(fails: bool, kit: Kit, writers: Writers) -> None:
    writer = writers()
    writer.open(configured(kit, WRITTEN))
    writer.write(0, noise("end", 4096))
    kit.configure("fault = Flush error=7" if fails else "fault = Flush delay_ms=1")
    assert writer.stop() == 0
    assert writer.says("closed, and writes may be lost", "VixDiskLib_Flush") == fails
    assert len(kit.events("lock-released")) == 1


# How long it is open.


def test_a_disk_that_is_written_is_not_closed_for_idleness(kit: Kit, writers: Writers) -> None:
    """Another would get its lock."""
    reader = writers()
    reader.open(configured(kit, PLAIN, idle_close=0.1, tmp_directory=str(kit.path / "other")))
    writer = writers()
    writer.open(configured(kit, WRITTEN, idle_close=0.1, max_sessions=2))
    writer.write(0, noise("idle", 4096))
    until(lambda: closed(kit), what="the idle reader to be closed")
    assert not kit.events("lock-released")
    writer.write(8, noise("idle", 4096))
    assert writer.calls("Open") == 1


def test_what_is_asked_at_every_open_keeps_the_lock(kit: Kit, writers: Writers) -> None:
    writer = writers()
    [before] = writer.open(configured(kit, WRITTEN))
    writer.write(0, noise("before", 4096))
    [after] = writer.revalidate()
    assert not before.change_to(after, True)
    assert writer.calls("Open") == 1
    assert writer.calls("Flush") == 1
    writer.write(8, noise("after", 4096))
    [step] = writer.renew().steps
    assert "opened it again" in step.told
    assert writer.calls("Flush") == 2
    assert len(kit.events("lock-granted")) == 2
    assert writer.read(0, 16) == noise("before", 4096) + noise("after", 4096)


def test_a_lost_flush_is_told_to_who_asks_what_the_disk_is(kit: Kit, writers: Writers) -> None:
    writer = writers()
    writer.open(configured(kit, WRITTEN))
    writer.write(0, noise("before", 4096))
    kit.configure("fault = Flush error=14011")
    with pytest.raises(EngineError) as caught:
        writer.renew()
    assert caught.value.retry == "reconnect"


# What is refused.


def test_an_image_that_is_read_is_not_written(kit: Kit, writers: Writers) -> None:
    writer = writers()
    writer.open(configured(kit, PLAIN))
    for ask in (lambda: writer.write(0, bytes(512)), writer.flush):
        with pytest.raises(EngineError) as caught:
            ask()
        assert caught.value.errno == errno.EROFS


def test_a_description_opens_nothing_to_be_written(kit: Kit, writers: Writers) -> None:
    writers().describe(configured(kit, WRITTEN))
    [opened] = kit.events("client-open")
    assert opened.fields["read_only"] == "yes"
    assert not kit.events("lock-granted")


@pytest.mark.parametrize(
    ("fault", "number", "retry"),
    [
        ("error=8", errno.ENOSPC, ""),
        ("callback_error=8", errno.ENOSPC, ""),
        ("callback_error=11", errno.EROFS, ""),
        ("callback_error=14011", errno.EIO, "reconnect"),
        ("error=16002", errno.EIO, "reconnect"),
        ("lose", errno.EIO, "reconnect"),
    ],
)
def test_a_write_that_fails_says_what_it_needs(
    fault: str, number: int, retry: str, kit: Kit, writers: Writers
) -> None:
    writer = writers()
    writer.open(configured(kit, WRITTEN))
    writer.read(0, 1)
    kit.configure(f"fault = WriteAsync at=100 {fault}")
    with pytest.raises(EngineError) as caught:
        writer.write(96, noise("failed", 4096))
    assert caught.value.errno == number
    assert caught.value.retry == retry
    assert caught.value.sector == 96


def test_a_connection_lost_in_the_middle_fails_all_that_was_under_way(
    kit: Kit, writers: Writers
) -> None:
    writer = writers()
    writer.open(configured(kit, WRITTEN))
    writer.read(0, 1)
    kit.configure("net.latency_us = 60000000", "fault = WriteAsync after=7 lose")
    for number, data in enumerate(pieces("lost", 8)):
        writer.begin_write(8 * number, data, 4096 * number)
    for _ in range(8):
        with pytest.raises(EngineError) as caught:
            writer.answer()
        assert caught.value.retry == "reconnect"
