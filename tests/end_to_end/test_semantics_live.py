"""The promises of vddkfs-semantics(7), each held by a test of its name: live images, O_DIRECT, and
the cache option.
"""

import contextlib
import errno
import os
from pathlib import Path

import pytest

from tests.end_to_end.freshness import (
    BUFFERED,
    HEEDFUL,
    LEAF,
    PIECE,
    Gate,
    extent,
    leaf,
    over_san,
    overwrite,
    promise,
    start,
)
from tests.end_to_end.mounting import Agent, Mounts, sha256, until
from tests.end_to_end.remote import Proxy
from tests.end_to_end.vms import MIB, make_delta, make_empty, make_vmfs, noise, write

SIZE = 4 * MIB
FIRST, OLD, NEW = (noise(name, SIZE) for name in ("first", "old", "new"))
DISK = "live/disk.raw"
PLACES = {"where data was": 4096, "where a hole was": 2 * MIB}

ASKED = """
import logging
from vddkfs.disks.image import Image
opened = Image.open
async def open(self, direct, write=False):
    logging.getLogger("vddkfs").info("an open came")
    return await opened(self, direct, write)
Image.open = open
"""
LOOKS = """
from vddkfs.engines.vmdk.engine import VmdkEngine
look = VmdkEngine.revalidate
def revalidate(self):
    print("it looks", flush=True)
    return look(self)
VmdkEngine.revalidate = revalidate
"""


@pytest.fixture
def flat(vm: Path) -> Path:
    """Make a live disk; return the file that has its content."""
    make_vmfs(vm / "live.vmdk", OLD)
    return vm / "live-flat.vmdk"


@pytest.fixture
def sparse(vm: Path) -> Path:
    """Make a live disk that has one piece of data, and holes."""
    path = make_empty(vm / "live.vmdk", SIZE)
    write(path, 0, noise("first", PIECE))
    return path


# Live images


@promise(
    "live-open",
    "After an open of a live image's file, nothing is read through it that was old when it was "
    "opened.",
)
def test_live_open(mount: Mounts, vm: Path, flat: Path) -> None:
    found = mount(vm)
    held = found.open(DISK)
    assert found.ask("pread", held, SIZE, 0) == OLD
    for content in (NEW, FIRST):
        before = found.ask("pread", held, SIZE, 0)
        overwrite(flat, 0, content)
        assert found.ask("pread", held, SIZE, 0) == before, "it is kept"
        assert found.ask("pread", found.open(DISK), SIZE, 0) == content


@promise(
    "live-shared",
    "Opens at the same time may share one look at the source, which begins after the last of them "
    "came.",
)
def test_live_shared(mount: Mounts, vm: Path, flat: Path, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    found = start(mount.prepare(vm), ASKED, gate.of("revalidate") + LOOKS)
    found.expect("it looks")
    path = found.path(DISK)

    def said(text: str) -> int:
        return found.log.read_text().count(text)

    agents = [Agent() for _ in range(8)]
    with contextlib.ExitStack() as stack:
        for agent in agents:
            stack.callback(agent.close)
        gate.close()
        agents[0].send("open", path, os.O_RDONLY)
        gate.wait()
        # It has looked, and has not told yet: those who come now are not served by that look.
        for agent in agents[1:]:
            agent.send("open", path, os.O_RDONLY)
        until(lambda: said("an open came") == len(agents), what="all to come")
        overwrite(flat, 0, NEW)
        assert said("it looks") == 1
        gate.open()
        fds = [agent.receive() for agent in agents]
        # What a worker says takes a way of its own to the log.
        until(lambda: said("it looks") >= 2, what="the second look")
        assert said("it looks") == 2
        for agent, fd in zip(agents, fds, strict=True):
            agent.send("pread", fd, SIZE, 0)
            assert agent.receive() == NEW


@promise(
    "live-between",
    "While a live image's file stays open, a read may return any content that the source had since "
    "the last open of that file.",
)
def test_live_between(mount: Mounts, vm: Path, flat: Path) -> None:
    """But none of before, whoever else has read that."""
    overwrite(flat, 0, FIRST)
    found = mount(vm)
    assert found.ask("pread", found.open(DISK), SIZE, 0) == FIRST
    overwrite(flat, 0, OLD)
    fd = found.open(DISK)
    places = range(0, SIZE, PIECE)
    for at in places[::3]:
        found.ask("pread", fd, 4096, at)
    overwrite(flat, 0, NEW)
    for at in places:
        data = found.ask("pread", fd, 4096, at)
        assert data in (OLD[at : at + 4096], NEW[at : at + 4096])


@promise(
    "live-zeros",
    "What a live image's allocation map calls a hole is read from the source all the same.",
)
def test_live_zeros(mount: Mounts, vm: Path, sparse: Path) -> None:
    found = mount(vm)
    fd = found.open(DISK)
    found.map_known("live")
    assert found.ask("lseek", fd, 0, os.SEEK_HOLE) == PIECE
    assert found.attempt(errno.ENXIO, "lseek", fd, PIECE, os.SEEK_DATA) is None
    write(sparse, 2 * MIB, noise("allocated", PIECE))
    assert found.ask("pread", fd, PIECE, 2 * MIB) == noise("allocated", PIECE)


# O_DIRECT


@promise(
    "direct",
    "A read of a file that was opened with O_DIRECT is answered with what the source holds, and "
    "from no cache of this machine; a VMDK on this machine is read as its file system shows it.",
)
@pytest.mark.parametrize("which", ["live", "frozen"])
def test_direct(mount: Mounts, vm: Path, sparse: Path, which: str) -> None:
    """Also of an image that nobody should write: who wants to know it asks with O_DIRECT."""
    if which == "frozen":
        make_delta(vm / "live-1.vmdk", "live.vmdk")
    found = mount(vm)
    name = "live/chain/0.raw"
    found.map_known("live")
    held, fd = found.open(name), found.open(name, direct=True)
    old = found.ask("pread", held, SIZE, 0)
    assert found.ask("pread", fd, SIZE, 0) == old
    fresh = {}
    for where, at in PLACES.items():
        write(sparse, at, noise(at, 4096))
        fresh[where] = found.ask("pread", fd, 4096, at) == noise(at, 4096)
    assert found.ask("pread", held, SIZE, 0) == old, "the caches are left alone"
    assert fresh == dict.fromkeys(PLACES, True)


@promise(
    "direct-san",
    "Over SAN such a read passes the page cache of the LUN by, also where VDDK does not.",
)
@pytest.mark.parametrize("settings", [HEEDFUL, BUFFERED], ids=["heedful", "buffered"])
def test_direct_san(proxy: Proxy, loops: None, settings: tuple[str, ...]) -> None:
    proxy.kit.configure(*settings)
    found = over_san(proxy, "[ds1] plain/plain.vmdk")
    source = extent(proxy, "plain")
    held, fd = found.open(source.file), found.open(source.file, direct=True)
    for at in source.places:
        assert found.ask("pread", held, PIECE, at) == source.content[at : at + PIECE]
        source.change(at, noise(at, PIECE))
        assert found.ask("pread", fd, PIECE, at) == noise(at, PIECE)


@promise(
    "direct-layout",
    "What VDDK itself knew when it opened the disk is as old as that, for O_DIRECT too; an open of "
    "a live image's file opens the disk again.",
)
def test_direct_layout(proxy: Proxy, loops: None) -> None:
    proxy.kit.configure(*HEEDFUL)
    found = over_san(proxy, LEAF)
    source = leaf(proxy)
    fd = found.open(source.file, direct=True)
    for at in source.places[:2]:
        source.change(at, noise(at, PIECE))
        assert found.ask("pread", fd, PIECE, at) == bytes(PIECE)
        found.ask("close", found.open(source.file))
        assert found.ask("pread", fd, PIECE, at) == noise(at, PIECE)


# The cache option


@promise(
    "strict",
    "With cache=strict frozen images are kept no longer than live ones: nothing is kept from one "
    "open to the next.",
)
def test_strict(mount: Mounts, vm: Path, flat: Path) -> None:
    make_delta(vm / "live-1.vmdk", "live.vmdk")
    found = mount(vm, "cache=strict")
    for count in (1, 2, 3):
        fd = found.open("live/chain/0.raw")
        assert found.ask("pread", fd, SIZE, 0) == OLD
        assert found.ask("pread", fd, SIZE, 0) == OLD
        assert found.status()["cache"]["source_bytes"] == count * SIZE
    assert found.ask("getxattr", found.path("live/chain/0.raw"), "user.vddkfs.policy") == (
        b"close-to-open"
    )


@promise("none", "With cache=none every read is answered as one with O_DIRECT is.")
def test_none(mount: Mounts, vm: Path, flat: Path) -> None:
    found = mount(vm, "cache=none")
    fd = found.open(DISK)
    for content in (OLD, NEW, FIRST):
        overwrite(flat, 0, content)
        assert found.ask("pread", fd, SIZE, 0) == content
        assert found.sha256(DISK) == sha256(content)


@promise("none", "With cache=none every read is answered as one with O_DIRECT is.")
def test_none_of_a_frozen_link(mount: Mounts, vm: Path, sparse: Path) -> None:
    make_delta(vm / "live-1.vmdk", "live.vmdk")
    found = mount(vm, "cache=none")
    fd = found.open(DISK)
    found.ask("pread", fd, SIZE, 0)
    fresh = {}
    for where, at in PLACES.items():
        write(sparse, at, noise(at, 4096))
        fresh[where] = found.ask("pread", fd, 4096, at) == noise(at, 4096)
    assert fresh == dict.fromkeys(PLACES, True)


@promise("none", "With cache=none every read is answered as one with O_DIRECT is.")
def test_none_over_san(proxy: Proxy, loops: None) -> None:
    """Past the pages of the LUN, but not past what VDDK knew."""
    proxy.kit.configure(*BUFFERED)
    found = over_san(proxy, LEAF, options=("cache=none",))
    source = leaf(proxy)
    fd = found.open(source.file)
    for at in source.places[:2]:
        source.change(at, noise(at, PIECE))
        assert found.ask("pread", fd, PIECE, at) == bytes(PIECE)
        found.ask("close", found.open(source.file))
        assert found.ask("pread", fd, PIECE, at) == noise(at, PIECE)
        source.change(at, noise("again", PIECE))
        assert found.ask("pread", fd, PIECE, at) == noise("again", PIECE)
