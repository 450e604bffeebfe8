"""Opening to write: access is proved, locks are waited for, and late writes of the dead fenced.

Rows K04, K18, K20 and K27, as far as they are of writing.
"""

import errno
from collections.abc import Callable, Iterator

import msgspec
import pytest

from tests.engines.vddk.workers import LEAF, MIDDLE, SCSI, configured
from tests.engines.vddk.writers import WRITTEN, WRITTEN_BASE, WRITTEN_LOCAL, Writer, pieces
from tests.simulator.disks import SECTORS, noise, raw, write_behind
from tests.simulator.kit import Kit, until
from vddkfs.engines.base import SECTOR
from vddkfs.errors import EngineError

FILES = "san.device = file"
NO_PROOF = """
from vddkfs.engines.vddk.session import OpenDisk
OpenDisk.prove = OpenDisk.prove_writing = lambda self, *_: None
"""
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


def transports(kit: Kit) -> list[str]:
    """Return what the library really opened disks over, in order."""
    return [event.fields["transport"] for event in kit.events("client-open")]


# The proof.


@pytest.mark.parametrize("transport", ["nbdssl", "san", "hotadd"])
def test_the_proof_writes_one_sector_and_changes_no_byte(
    transport: str, kit: Kit, writers: Writers, contents: Callable[[str], bytes]
) -> None:
    kit.configure(FILES)
    writer = writers(SCSI)
    writer.open(configured(kit, WRITTEN, transports=(transport,)))
    assert writer.calls("Write") == 1
    assert writer.stop() == 0
    [closed] = kit.events("client-close")
    assert closed.fields["writes"] == "1"
    assert closed.fields["write_bytes"] == "512"
    assert raw(kit.disk(WRITTEN.path)) == contents(WRITTEN.path)


@pytest.mark.parametrize("code", [11, 13, 16002, 16013])
@pytest.mark.parametrize("transport", ["san", "hotadd"])
def test_k04_a_medium_that_is_write_protected_is_found_out_at_the_open(
    transport: str, code: int, kit: Kit, writers: Writers
) -> None:
    refuses = [f"fault = {call} transport={transport} error={code}" for call in CALLS]
    kit.configure(FILES, *refuses)
    config = configured(kit, WRITTEN, transports=(transport, "nbdssl"))
    trap = writers(SCSI + NO_PROOF)
    trap.open(config)
    with pytest.raises(EngineError):
        trap.write(0, noise("late", 512))
    assert trap.stop() == 0

    writer = writers(SCSI)
    writer.open(config)
    assert transports(kit)[-2:] == [transport, "nbdssl"]
    assert writer.says(f"transport {transport} does not serve it", "cannot be written over")
    writer.write(0, noise("kept", 4096))
    assert writer.read(0, 8) == noise("kept", 4096)


CALLS = ("Write", "WriteAsync")


@pytest.mark.parametrize("order", [("san",), ("nbdssl", "san"), ("san", "nbdssl", "nbd")])
def test_k04_where_no_transport_writes_the_open_says_why(
    order: tuple[str, ...], kit: Kit, writers: Writers
) -> None:
    kit.configure(FILES, "fault = Write error=11")
    writer = writers(SCSI)
    with pytest.raises(EngineError) as caught:
        writer.open(configured(kit, WRITTEN, transports=order))
    assert caught.value.errno == errno.EROFS
    assert not caught.value.retry
    for word in (WRITTEN.path, order[-1], "VIX_E_FILE_READ_ONLY (11)", "can only be read"):
        assert word in str(caught.value)
    for transport in order:
        assert writer.says(f"transport {transport} does not serve it")
    assert transports(kit) == list(order)
    assert len(kit.events("lock-released")) == len(order)


@pytest.mark.parametrize(("code", "number"), [(16002, errno.EROFS), (14011, errno.EIO)])
def test_what_may_have_been_the_connection_is_tried_again(
    code: int, number: int, kit: Kit, writers: Writers
) -> None:
    kit.configure(f"fault = Write error={code}")
    with pytest.raises(EngineError) as caught:
        writers().open(configured(kit, WRITTEN))
    assert caught.value.errno == number
    assert caught.value.retry == "reconnect"


def test_k18_a_volume_that_refuses_even_reads_once_it_is_to_be_written(
    kit: Kit, writers: Writers
) -> None:
    kit.configure(FILES, "fault = Read transport=hotadd error=16002")
    with pytest.raises(EngineError) as caught:
        writers().open(configured(kit, WRITTEN, transports=("hotadd",)))
    assert caught.value.errno == errno.EROFS
    assert "hotadd" in str(caught.value)
    assert "VIX_E_DISK_NOIO" in caught.value.cause
    writers().open(configured(kit, WRITTEN, transports=("hotadd", "nbdssl")))


def test_k27_a_disk_on_local_storage_is_not_written_over_san(kit: Kit, writers: Writers) -> None:
    kit.configure(FILES)
    config = configured(kit, WRITTEN_LOCAL, transports=("san", "nbdssl"))
    trap = writers(SCSI + NO_PROOF)
    trap.open(config)
    with pytest.raises(EngineError):
        trap.write(0, bytes(512))
    assert trap.stop() == 0
    writer = writers(SCSI)
    writer.open(config)
    writer.write(0, noise("local", 512))
    assert transports(kit)[-1] == "nbdssl"


def test_k20_a_redo_log_is_not_written_over_san(kit: Kit, writers: Writers) -> None:
    """The daemon plans it for no transport; the library refuses this one."""
    kit.configure(FILES)
    image = msgspec.structs.replace(LEAF, writable=True)
    with pytest.raises(EngineError) as caught:
        writers(SCSI).open(configured(kit, image, transports=("san",)))
    assert caught.value.errno == errno.EROFS
    assert "16013" in caught.value.cause


def test_a_running_vm_is_not_written(kit: Kit, writers: Writers) -> None:
    registry = (kit.site / "registry.conf").read_text()
    kit.register(registry.replace("name = plain\nhost = esx1\npower = off", RUNS))
    with pytest.raises(EngineError) as caught:
        writers().open(configured(kit, WRITTEN))
    assert caught.value.errno == errno.EROFS
    assert "a VM that runs" in str(caught.value) or "running VM" in str(caught.value)


RUNS = "name = plain\nhost = esx1\npower = on"


def test_the_base_of_a_snapshot_is_opened_without_it(
    kit: Kit, writers: Writers, contents: Callable[[str], bytes]
) -> None:
    """With the reference the library would open it to be read only."""
    writer = writers()
    [identity] = writer.open(configured(kit, WRITTEN_BASE))
    assert identity.snapshot == WRITTEN_BASE.snapshot, "what it was described as"
    assert kit.events("open")[-1].fields["snapshot"] == "-"
    before = contents(WRITTEN_BASE.path)
    writer.write(9, noise("base", 4096))
    expected = before[: 9 * SECTOR] + noise("base", 4096)
    assert writer.read(0, SECTORS) == expected + before[len(expected) :]


def test_a_disk_is_proved_again_when_it_is_opened_again(kit: Kit, writers: Writers) -> None:
    kit.configure(FILES)
    writer = writers(SCSI)
    writer.open(configured(kit, WRITTEN, transports=("san",)))
    writer.renew()
    assert writer.calls("Write") == 2
    kit.configure(FILES, "fault = Write error=11")
    with pytest.raises(EngineError) as caught:
        writer.renew()
    assert caught.value.errno == errno.EROFS
    assert caught.value.retry == "reconnect", "a new worker tries the other transports"


# Locks, and the writes of the dead.


@pytest.mark.parametrize("transports", [("nbdssl",), ("san", "nbdssl"), ("hotadd", "nbd")])
def test_a_lock_that_another_holds_is_waited_for(
    transports: tuple[str, ...], kit: Kit, writers: Writers
) -> None:
    kit.configure(FILES)
    config = configured(kit, WRITTEN, transports=transports)
    holder = writers(SCSI)
    holder.open(msgspec.structs.replace(config, tmp_directory=str(kit.path / "holder")))
    with pytest.raises(EngineError, match="another program holds the file's lock") as caught:
        writers(SCSI).open(config)
    assert caught.value.retry == "reconnect"
    assert caught.value.errno == errno.EBUSY
    assert len(kit.events("lock-refused")) == 1, "no other transport is tried"
    assert holder.stop() == 0
    writers(SCSI).open(config)


def begun(kit: Kit, writers: Writers, *lines: str) -> Writer:
    """Return a worker whose sixteen writes the host has, and does not carry out."""
    writer = writers()
    writer.open(configured(kit, WRITTEN))
    writer.read(0, 1)
    kit.configure("net.latency_us = 60000000", "net.jitter = 0", *lines)
    for number, data in enumerate(pieces("old", 16)):
        writer.begin_write(128 + 8 * number, data, 4096 * number)
    writer.ask(9)  # the writes were begun when this is answered
    writer.answer()
    return writer


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_late_write_of_the_dead_is_fenced_by_the_lock(
    seed: int, kit: Kit, writers: Writers
) -> None:
    lines = ("late_write_ms = 300", f"seed = {seed}")
    begun(kit, writers, *lines).kill()
    kit.configure(*lines)
    new = pieces("new", 16)
    # The host has not heard yet, perhaps, that its client is dead.
    writer = until(lambda: _opened(writers, kit), what="the lock")
    assert len(settled(kit)) == 16, "each has landed or never will"
    for number, data in enumerate(new):
        writer.write(128 + 8 * number, data)
    granted = kit.events("lock-granted")[-1]
    assert all(event.time <= granted.time for event in settled(kit))
    assert writer.read(128, 128) == b"".join(new)
    assert writer.stop() == 0
    assert raw(kit.disk(WRITTEN.path))[128 * SECTOR :][: 16 * 4096] == b"".join(new)


def test_without_the_lock_a_late_write_lands_on_a_newer_one(kit: Kit, writers: Writers) -> None:
    """The trap: the newer ones are written past the host that has the lock to give."""
    lines = ("late_write_ms = 300",)
    begun(kit, writers, *lines).kill()
    until(lambda: kit.events("lock-released"), what="the host to hear that its client is dead")
    flat = kit.disk(WRITTEN.path).with_name("plain-flat.vmdk")
    write_behind(flat, 128 * SECTOR, b"".join(pieces("new", 16)))
    until(lambda: len(kit.events("late-write-landed")) == 16, what="the late writes")
    assert raw(kit.disk(WRITTEN.path))[128 * SECTOR :][: 16 * 4096] != b"".join(pieces("new", 16))


def _opened(writers: Writers, kit: Kit) -> Writer | None:
    """Return a worker that has the disk open, None where the lock is another's."""
    writer = writers()
    try:
        writer.open(configured(kit, WRITTEN))
    except EngineError as error:
        if error.retry != "reconnect":
            raise
        return None
    return writer


def settled(kit: Kit) -> list[object]:
    """Return the events of late writes that have landed or were dropped."""
    found = kit.events("late-write-landed") + kit.events("late-write-dropped")
    return list(found)


def test_a_lock_that_lingers_is_waited_for(kit: Kit, writers: Writers) -> None:
    lines = ("late_write_ms = 100", "lock_linger_ms = 4000")
    begun(kit, writers, *lines).kill()
    kit.configure(*lines)
    until(lambda: kit.events("lock-lingers"), what="the host to hear that its client is dead")
    assert _opened(writers, kit) is None
    writer = until(lambda: _opened(writers, kit), what="the lock")
    writer.write(128, noise("new", 4096))
    assert writer.read(128, 8) == noise("new", 4096)


# A restore: the base is written below links that are read.


@pytest.mark.parametrize("transport", ["san", "hotadd"])
def test_the_base_is_written_below_links_that_another_worker_reads(
    transport: str, kit: Kit, writers: Writers, contents: Callable[[str], bytes]
) -> None:
    kit.configure(FILES, "unavailable = fail")
    used = {"transports": (transport,)}
    other = {"tmp_directory": str(kit.path / "other")}
    above = writers(SCSI)
    above.open(configured(kit, MIDDLE, LEAF, **used, **other))
    base = contents(WRITTEN_BASE.path)
    middle = contents(MIDDLE.path)
    same = [n for n in range(SECTORS) if _sector(base, n) == _sector(middle, n)]
    hole = next(n for n in same if not any(_sector(base, n)))
    data = next(n for n in same if any(_sector(base, n)))
    above.read(0, SECTORS)

    writer = writers(SCSI)
    writer.open(configured(kit, WRITTEN_BASE, **used))
    for sector in (hole, data):
        writer.write(sector, noise(sector, SECTOR))
    writer.flush()
    above.renew()
    for sector in (hole, data):
        assert above.read(sector, 1) == noise(sector, SECTOR)
    assert writer.stop() == 0
    assert above.stop() == 0
    assert not kit.events("attach") or len(kit.events("detach")) == len(kit.events("attach"))


def test_over_the_network_the_links_above_do_not_fit_any_more(kit: Kit, writers: Writers) -> None:
    """The host gives the base another content id at the first write, as to any disk."""
    above = writers()
    above.open(configured(kit, MIDDLE, tmp_directory=str(kit.path / "other")))
    writer = writers()
    writer.open(configured(kit, WRITTEN_BASE))
    writer.write(0, noise("base", SECTOR))
    above.read(0, 1)
    with pytest.raises(EngineError, match="parent and child do not fit"):
        above.renew()


def _sector(content: bytes, number: int) -> bytes:
    return content[number * SECTOR : (number + 1) * SECTOR]
