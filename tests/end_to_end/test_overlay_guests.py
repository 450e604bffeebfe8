"""Guests that lost their power: an overlay takes what the replay of their journals writes.

A reader without an overlay meets the trap that each test shows first: the file system refuses,
or shows what was true before the last writes that it had promised to keep.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.end_to_end.guests import (
    AFTER,
    BASE,
    BTRFS,
    DISK,
    EXT4,
    KEPT,
    KINDS,
    NTFS,
    OLD,
    START,
    XFS,
    Crashed,
    Kind,
    as_chain,
    as_flat,
    crash,
    device_of,
    guest,
    guest_of,
    hashes,
    leave,
    loop_device,
)
from tests.end_to_end.mounting import Mount, Mounts, run, succeed

Layout = Callable[[Crashed, Path], None]


def show_the_trap(found: Mount, kind: Kind, start: int, place: Path) -> None:
    """Without an overlay the journal cannot be replayed, and KEPT is not to be had that way."""
    with device_of(found, DISK, start) as device:
        assert kind.needs_replay(device)
        place.mkdir()
        done = run(*kind.mount, "-o", "rw", device, place)
        if kind is NTFS:
            # It falls back to reading, past the log that it could not empty.
            try:
                assert done.returncode == 0
                assert "unclean file system" in done.stderr
                assert run("touch", place / "new").returncode != 0
            finally:
                succeed("umount", place)
        else:
            assert done.returncode != 0
            assert run(*kind.mount, "-o", "ro", device, place).returncode != 0
            with guest(kind, device, place, f"ro,{kind.plain}", found.abort):
                assert found.content(str(place / "old")) == OLD
                assert "kept" not in found.ask("listdir", str(place))
        assert kind.needs_replay(device)


@pytest.mark.parametrize(
    ("layout", "start"),
    [(as_chain, START), (as_flat, 0)],
    ids=["partition of a chain", "whole flat disk"],
)
@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_replay_into_an_overlay(
    mount: Mounts, vm: Path, tmp_path: Path, loops: None, kind: Kind, layout: Layout, start: int
) -> None:
    kind.need()
    layout(crash(kind, tmp_path, start), vm)
    source = hashes(vm)

    found = mount(vm)
    show_the_trap(found, kind, start, tmp_path / "trap")
    leave(found)

    overlay = f"overlay={tmp_path / 'overlay'}"
    found = mount(vm, overlay)
    with guest_of(found, kind, DISK, start, tmp_path / "guest") as place:
        assert found.content(str(place / "old")) == OLD
        assert found.content(str(place / "kept")) == KEPT
        found.ask("put", str(place / "after"), AFTER)
    with device_of(found, DISK, start) as device:
        kind.assert_clean(device)
    if start:
        # A partition of its own cannot be written, and shows what disk.raw has.
        with device_of(found, "disk/partitions/1.raw", 0) as device:
            kind.assert_clean(device)
    assert hashes(vm) == source
    leave(found)

    # The next mount goes on where this one ended.
    found = mount(vm, overlay)
    with device_of(found, DISK, start) as device:
        kind.assert_clean(device)
        with guest(kind, device, tmp_path / "guest", "ro", found.abort) as place:
            assert found.content(str(place / "kept")) == KEPT
            assert found.content(str(place / "after")) == AFTER
    leave(found)
    assert hashes(vm) == source


class Twins:
    """Two moments of one disk, with one file system and one UUID, mounted side by side."""

    def __init__(self, found: Mount, kind: Kind, folder: Path, stack: ExitStack) -> None:
        self._found = found
        self._kind = kind
        self._folder = folder
        self._stack = stack

    def device(self, name: str) -> str:
        path = self._found.path(name)
        return self._stack.enter_context(loop_device(path, start=START, rescue=self._found.abort))

    def mount(self, device: str, name: str, options: str) -> Path:
        place = self._folder / name
        mounting = guest(self._kind, device, place, options, self._found.abort)
        return self._stack.enter_context(mounting)

    def replay(self, device: str) -> None:
        with guest(self._kind, device, self._folder / "replay", "rw", self._found.abort):
            pass

    def refused(self, device: str, options: str) -> bool:
        place = self._folder / "refused"
        place.mkdir(exist_ok=True)
        done = run("mount", "-o", options, device, place)
        if done.returncode == 0:
            succeed("umount", place)
        return done.returncode != 0

    def check(self, base: Path, disk: Path) -> None:
        """Assert that each shows what was true at its moment, and takes writes of its own."""
        for place in (base, disk):
            assert self._found.content(str(place / "old")) == OLD
        assert self._found.content(str(disk / "kept")) == KEPT
        assert "kept" not in self._found.ask("listdir", str(base))
        self._found.ask("put", str(base / "kept"), OLD)
        assert self._found.content(str(disk / "kept")) == KEPT


@pytest.fixture
def twins(
    mount: Mounts, vm: Path, tmp_path: Path, loops: None, request: pytest.FixtureRequest
) -> Iterator[Twins]:
    """Return the images of a chain whose base and whose top have the file system *param*."""
    kind: Kind = request.param
    kind.need()
    as_chain(crash(kind, tmp_path, START), vm)
    source = hashes(vm)
    found = mount(vm, f"overlay={tmp_path / 'overlay'}")
    with ExitStack() as stack:
        yield Twins(found, kind, tmp_path, stack)
    for name in (BASE, DISK):
        with device_of(found, name, START) as device:
            kind.assert_clean(device)
    leave(found)
    assert hashes(vm) == source


@pytest.mark.parametrize("twins", [EXT4], indirect=True, ids=["ext4"])
def test_two_ext4_of_one_uuid(twins: Twins) -> None:
    base = twins.mount(twins.device(BASE), "base", "rw")
    twins.check(base, twins.mount(twins.device(DISK), "top", "rw"))


@pytest.mark.parametrize("twins", [XFS], indirect=True, ids=["xfs"])
def test_two_xfs_of_one_uuid(twins: Twins) -> None:
    base = twins.mount(twins.device(BASE), "base", "rw")
    disk = twins.device(DISK)
    assert twins.refused(disk, "rw")
    twins.check(base, twins.mount(disk, "top", "rw,nouuid"))


@pytest.mark.parametrize("twins", [BTRFS], indirect=True, ids=["btrfs"])
def test_two_btrfs_of_one_uuid(twins: Twins) -> None:
    """One gets another UUID, which kernels before 6.7 insist on; only after its replay.

    (btrfstune makes a file system with a dirty log unreadable.)
    """
    disk = twins.device(DISK)
    twins.replay(disk)
    succeed("btrfstune", "-f", "-m", disk)
    base = twins.mount(twins.device(BASE), "base", "rw")
    twins.check(base, twins.mount(disk, "top", "rw"))


@pytest.mark.parametrize("twins", [BTRFS], indirect=True, ids=["btrfs"])
def test_two_btrfs_as_they_are(twins: Twins) -> None:
    """Newer kernels give the second one a UUID for as long as it is mounted."""
    release = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))
    if release < (6, 7):
        pytest.skip("absent: UUIDs for the time of a mount, in btrfs of Linux 6.7 and newer")
    base = twins.mount(twins.device(BASE), "base", "rw")
    twins.check(base, twins.mount(twins.device(DISK), "top", "rw"))
