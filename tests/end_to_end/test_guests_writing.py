"""Guests that write through loop devices: with little memory, and while the daemon is told to end.

Each on an overlay's file, and on a base that may be written.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.groups import Group, may_flush, memory_group
from tests.end_to_end.guests import (
    AFTER,
    BASE,
    DISK,
    EXT4,
    KEPT,
    device_of,
    guest,
    guest_of,
    hashes,
    leave,
    loop_device,
)
from tests.end_to_end.mounting import (
    Mount,
    Mounts,
    alive,
    children,
    mounted,
    state_files,
    succeed,
    until,
)
from tests.end_to_end.vms import MIB, SECTOR, descriptor, raw_sha256

SIZE = 224 * MIB
FILE = 160 * MIB
WRITER = 48 * MIB
DAEMON = 80 * MIB
"""Bytes of memory for the writer, and for the daemon with its worker: less than is written."""
SECONDS = 45.0
"""After this long it counts as a stall; it takes three to ten."""
WAITS = "told to stop"
STILL_HERE = "still here: a guest may be mounted on"
HOW = pytest.mark.parametrize("how", ["overlay", "writable"])


@pytest.fixture
def little_memory(able: None) -> Iterator[Group]:
    with memory_group() as group:
        yield group


@pytest.fixture
def flat(vm: Path, loops: None) -> Path:
    """Return a VM with one flat disk that is an empty ext4."""
    EXT4.need()
    image = vm / "disk-flat.vmdk"
    with open(image, "wb") as file:
        file.truncate(SIZE)
    succeed(*EXT4.make, "-F", image)
    line = f'RW {SIZE // SECTOR} VMFS "{image.name}"'
    (vm / "disk.vmdk").write_text(descriptor([line], kind="vmfs"))
    return vm


def options(how: str, folder: Path) -> str:
    return f"overlay={folder / 'overlay'}" if how == "overlay" else how


def name_of(how: str) -> str:
    return DISK if how == "overlay" else BASE


@HOW
def test_little_memory(
    little_memory: Group, mount: Mounts, flat: Path, tmp_path: Path, how: str
) -> None:
    source = hashes(flat)
    found = mount(flat, "cache_size=16M", options(how, tmp_path))
    found.read(DISK, 0, SECTOR)
    little_memory.add(found.agent.pid)
    if may_flush() or not little_memory.waits:
        little_memory.add(found.pid, *children(found.pid))
        little_memory.limit(WRITER + DAEMON)
    else:
        little_memory.limit(WRITER)
    name = name_of(how)
    with guest_of(found, EXT4, name, 0, tmp_path / "guest") as place:
        wanted = found.ask("fill", str(place / "file"), FILE, 7, timeout=SECONDS)
    # Mounted again, the guest has none of it in the page cache of its own.
    with guest_of(found, EXT4, name, 0, tmp_path / "guest") as place:
        assert found.ask("sha256", str(place / "file"), False, timeout=SECONDS) == wanted
    assert little_memory.reached()
    with device_of(found, name, 0) as device:
        EXT4.assert_clean(device)
    if how == "overlay":
        assert hashes(flat) == source
    else:
        content = found.sha256(BASE)
        leave(found)
        assert raw_sha256(flat / "disk.vmdk") == content


def told_to_stop(found: Mount) -> None:
    """Send SIGTERM, and wait until the daemon has said what keeps it."""
    found.expect(WAITS)
    os.kill(found.pid, signal.SIGTERM)
    until(lambda: any(WAITS in line for line in found.loud()), what="the log")


@HOW
def test_sigterm_aborts_no_journal(mount: Mounts, flat: Path, tmp_path: Path, how: str) -> None:
    words = options(how, tmp_path)
    found = mount(flat, "stop_timeout=60", words)
    processes = (found.pid, *children(found.pid))
    with guest_of(found, EXT4, name_of(how), 0, tmp_path / "guest") as place:
        found.ask("put", str(place / "kept"), KEPT)
        told_to_stop(found)
        # The daemon serves on: what the guest writes now arrives, and its journal is whole.
        found.ask("put", str(place / "after"), AFTER)
        found.ask("sync")
        assert alive(found.pid)
        shown = succeed("findmnt", "-n", "-o", "OPTIONS", place).stdout.split(",")
        assert shown[0] == "rw"
        found.close_agent()
    # Then it ends by itself.
    until(lambda: not any(map(alive, processes)), what="the end of the daemon")
    assert not mounted(found.place)
    assert state_files(found.place) == []

    again = mount(flat, words)
    with device_of(again, name_of(how), 0) as device:
        EXT4.assert_clean(device)
        with guest(EXT4, device, tmp_path / "guest", "ro", again.abort) as place:
            assert again.content(str(place / "kept")) == KEPT
            assert again.content(str(place / "after")) == AFTER


@HOW
def test_stop_timeout_does_not_end_a_writer(
    mount: Mounts, flat: Path, tmp_path: Path, how: str
) -> None:
    """Only a second signal does; without one the daemon ends when the guest is unmounted."""
    found = mount(flat, "stop_timeout=0.2", options(how, tmp_path))
    found.expect(STILL_HERE)
    with guest_of(found, EXT4, name_of(how), 0, tmp_path / "guest") as place:
        told_to_stop(found)
        until(lambda: any(STILL_HERE in line for line in found.loud()), what="the log")
        found.ask("put", str(place / "after"), AFTER)
        assert alive(found.pid)
        found.close_agent()
    until(lambda: not alive(found.pid), what="the end of the daemon")
    assert not mounted(found.place)


@HOW
def test_second_signal_loses_nothing_synced(
    mount: Mounts, flat: Path, tmp_path: Path, how: str
) -> None:
    """The guest loses its disk then, but no file that it was promised."""
    words = options(how, tmp_path)
    found = mount(flat, "stop_timeout=60", words)
    found.expect("is let go with files open")
    with (
        loop_device(found.path(name_of(how)), rescue=found.abort) as device,
        guest(EXT4, device, tmp_path / "guest", "rw", found.abort) as place,
    ):
        found.ask("put", str(place / "kept"), KEPT)
        told_to_stop(found)
        assert alive(found.pid)
        os.kill(found.pid, signal.SIGTERM)
        until(lambda: not alive(found.pid), what="the end of the daemon")
        found.close_agent()
    assert not mounted(found.place)

    again = mount(flat, words)
    with guest_of(again, EXT4, name_of(how), 0, tmp_path / "guest") as place:
        assert again.content(str(place / "kept")) == KEPT
    with device_of(again, name_of(how), 0) as device:
        EXT4.assert_clean(device)
