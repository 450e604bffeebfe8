"""The promises of vddkfs-semantics(7), each held by a test of its name: every read, and the images
that nobody should write.

The other parts of the page are in test_semantics_live.py and test_semantics_invalidation.py.
"""

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.end_to_end.freshness import LEAF, PIECE, overwrite, promise
from tests.end_to_end.mounting import Mount, Mounts, sha256, stopped, succeed, until
from tests.end_to_end.remote import CHAIN, PLAIN, Proxy
from tests.end_to_end.vms import (
    KIB,
    MIB,
    SECTOR,
    make_chain,
    make_delta,
    make_empty,
    make_vmdk,
    make_vmfs,
    noise,
    raw,
    sparse_noise,
    write,
)

SIZE = 4 * MIB
OLD, NEW = noise("old", SIZE), noise("new", SIZE)
BASE, TOP = "web/chain/0.raw", "web/disk.raw"
STALE = "the source changed after the file was opened"
CHANGED = r"disk web: link 0 \(.*/web.vmdk\) changed under the mount: .*web-flat.vmdk was modified"


@pytest.fixture
def flat(vm: Path) -> Path:
    """Make a disk that is frozen up to its first link; return the file with that one's content."""
    make_vmfs(vm / "web.vmdk", OLD)
    make_delta(vm / "web-1.vmdk", "web.vmdk")
    return vm / "web-flat.vmdk"


def is_stale(mount: Mount, fd: int, offset: int = 0) -> bool:
    return mount.attempt(errno.ESTALE, "pread", fd, 4096, offset) is None


def extents(mount: Mount, name: str) -> list[tuple[int, int, bool]]:
    """Return (start, end, is data) of an image as map.json has it."""
    found = mount.json(os.path.join(os.path.dirname(name), "map.json"))
    return [(one["start"], one["start"] + one["length"], one["data"]) for one in found]


# Every read


@promise(
    "whole",
    "A read returns every byte that was asked for, up to the end of the file, or it fails; "
    "without O_DIRECT it may end before the first page that cannot be read.",
)
def test_whole(mount: Mounts, vm: Path) -> None:
    make_vmfs(vm / "web.vmdk", OLD)
    found = mount(vm)
    for fd in (found.open(TOP), found.open(TOP, direct=True)):
        for offset, size in ((0, 1), (511, 1025), (MIB - 3, 3 * MIB), (SIZE - 5000, MIB)):
            assert found.ask("pread", fd, size, offset) == OLD[offset : offset + size]
        assert found.ask("pread", fd, 4096, SIZE) == b""

    cut = 2 * MIB + 5 * SECTOR
    os.truncate(vm / "web-flat.vmdk", cut)
    found.expect("truncated extent", "read at offset .* failed")
    buffered, direct = found.open(TOP), found.open(TOP, direct=True)
    assert found.attempt(errno.EIO, "pread", direct, MIB, cut - 512 * KIB) is None
    start = cut - 100_000
    assert found.ask("pread", buffered, MIB, start) == OLD[start : 2 * MIB]
    assert found.attempt(errno.EIO, "pread", buffered, MIB, 2 * MIB) is None


@promise(
    "error",
    "What cannot be read fails with EIO, and what can be read beside it does not: sector by "
    "sector with O_DIRECT, page by page without.",
)
def test_error(mount: Mounts, vm: Path) -> None:
    make_vmfs(vm / "web.vmdk", OLD)
    found = mount(vm)
    buffered, direct = found.open(TOP), found.open(TOP, direct=True)
    page, cut = 2 * MIB, 2 * MIB + 5 * SECTOR
    os.truncate(vm / "web-flat.vmdk", cut)
    found.expect("read at offset .* failed")
    assert found.ask("pread", buffered, 4096, page - 4096) == OLD[page - 4096 : page]
    assert found.attempt(errno.EIO, "pread", buffered, SECTOR, page) is None
    assert found.ask("pread", direct, 5 * SECTOR, page) == OLD[page:cut]
    assert found.attempt(errno.EIO, "pread", direct, SECTOR, cut) is None


@promise(
    "size",
    "The size of an image's file is the capacity of the disk at that point of its chain, and "
    "does not change while it is mounted.",
)
def test_size(mount: Mounts, vm: Path) -> None:
    make_vmfs(vm / "web.vmdk", OLD)
    words = ("-f", "vmdk", "-b", "web.vmdk", "-F", "vmdk", "web-1.vmdk", str(SIZE + MIB))
    succeed("qemu-img", "create", "-q", *words, cwd=vm)
    found = mount(vm)
    files = {BASE: SIZE, TOP: SIZE + MIB}
    assert {name: found.stat(name).st_size for name in files} == files
    fd = found.open(BASE, direct=True)
    make_vmfs(vm / "web.vmdk", noise("larger", SIZE + 2 * MIB))
    found.expect(r"link 0 .* changed under the mount", "cannot be opened: .*capacity", STALE)
    assert found.attempt(errno.ESTALE, "open", found.path(BASE), os.O_RDONLY) is None
    assert is_stale(found, fd)
    assert {name: found.stat(name).st_size for name in files} == files


@promise(
    "one-file",
    "disk.raw and the last image of chain/ are one file with one inode, and the files in "
    "partitions/ show bytes of it.",
)
def test_one_file(mount: Mounts, vm: Path, flat: Path) -> None:
    table = "label: dos\nstart=2048, size=2048, type=83\nstart=4096, type=83\n"
    succeed("sfdisk", "-q", flat, input=table, stdin=None)
    found = mount(vm)
    last = "web/chain/1.raw"
    assert os.path.samestat(found.stat(TOP), found.stat(last))
    assert not os.path.samestat(found.stat(TOP), found.stat(BASE))
    content = flat.read_bytes()
    assert found.content(last) == content
    assert found.content("web/partitions/1.raw") == content[MIB : 2 * MIB]
    assert found.content("web/partitions/2.raw") == content[2 * MIB :]


@promise(
    "worker",
    "A worker that crashes, hangs or loses its connection costs time, and changes no byte of "
    "any answer.",
)
def test_worker(proxy: Proxy) -> None:
    found = proxy.mount(PLAIN, moref="vm-17", options=("transports=nbd", "op_timeout=1"))
    data = proxy.raw(PLAIN)
    fd = found.open("plain/disk.raw", direct=True)
    found.map_known("plain")
    for number, how in enumerate(("crashes", "hangs", "is disconnected")):
        at = number * MIB
        if how == "is disconnected":
            proxy.kit.configure("fault = ReadAsync count=1 callback_error=14011")
            assert found.ask("pread", fd, MIB, at) == data[at : at + MIB]
            continue
        pid = found.worker()["pid"]
        with stopped(pid):
            found.agent.send("pread", fd, MIB, at)
            until(lambda: found.worker()["in_flight"], what="the read under way")
            if how == "hangs":
                until(lambda pid=pid: found.worker()["pid"] != pid, what="patience to end")
            else:
                os.kill(pid, signal.SIGSEGV)
        assert found.agent.receive() == data[at : at + MIB]
    assert found.sha256("plain/disk.raw") == sha256(data)
    found.restarts = 3
    found.expect("it ended unexpectedly", "did not answer within 1 s", "it lost its connection")


@promise(
    "holes",
    "SEEK_HOLE and map.json never tell of a hole where the source holds data other than zeros, "
    "and a file with data never has no blocks.",
)
def test_holes(mount: Mounts, vm: Path) -> None:
    """On a chain of which every link has data and holes of its own."""
    links = make_chain(vm, size=SIZE)
    found = mount(vm)
    told = [found.ask("seek_map", found.path(TOP)), extents(found, TOP)]
    found.map_known("web")
    told.append(found.ask("seek_map", found.path(TOP)))
    content = raw(links[-1])
    for one in told:
        assert one[-1][1] == SIZE
        gaps = [(start, end) for start, end, data in one if not data]
        assert gaps
        assert not any(any(content[start:end]) for start, end in gaps)
    data = sum(any(content[at : at + SECTOR]) for at in range(0, SIZE, SECTOR))
    assert data <= found.stat(TOP).st_blocks < SIZE // SECTOR


@promise(
    "holes",
    "SEEK_HOLE and map.json never tell of a hole where the source holds data other than zeros, "
    "and a file with data never has no blocks.",
)
def test_holes_of_a_live_image(mount: Mounts, vm: Path) -> None:
    """Its VM allocates a block, and nobody opens the image's file after that."""
    live = make_empty(vm / "live.vmdk", SIZE)
    write(live, 0, noise("first", PIECE))
    found = mount(vm)
    name = "live/disk.raw"
    fd = found.open(name)
    found.map_known("live")
    assert extents(found, name) == [(0, PIECE, True), (PIECE, SIZE, False)]
    write(live, 2 * MIB, noise("allocated", PIECE))
    told = {
        "map.json": (2 * MIB, 2 * MIB + PIECE, True) in extents(found, name),
        "SEEK_DATA": found.attempt(errno.ENXIO, "lseek", fd, MIB, os.SEEK_DATA) == 2 * MIB,
        "st_blocks": found.stat(name).st_blocks > 0,
    }
    assert told == {"map.json": True, "SEEK_DATA": True, "st_blocks": True}


@pytest.mark.parametrize("disk", [LEAF, CHAIN[2]], ids=["live", "frozen"])
@promise(
    "holes",
    "SEEK_HOLE and map.json never tell of a hole where the source holds data other than zeros, "
    "and a file with data never has no blocks.",
)
def test_holes_until_the_map_is_known(proxy: Proxy, disk: str) -> None:
    """A file of no blocks is one hole, for GNU tar --sparse: its archive would have no data.

    Of a live image the map is not known after any open.
    """
    found = proxy.mount(disk, options=("transports=nbd",))
    name = "web01-000002/disk.raw"
    if disk == LEAF:
        found.map_known("web01-000002")
    proxy.kit.configure("fault = QueryAllocatedBlocks count=1 delay_ms=300")
    if disk == LEAF:
        found.open(name)
    content = proxy.raw(disk)
    assert any(content)
    assert found.stat(name).st_blocks > 0


@promise(
    "read-only",
    "Opening a file of the mount for writing fails with EROFS, but for those that rw or an "
    "overlay makes writable.",
)
def test_read_only(mount: Mounts, vm: Path, flat: Path) -> None:
    found = mount(vm)
    files = [name for name in found.ask("tree", str(found.place)) if not name.endswith("/")]
    assert {TOP, BASE, "vm.json", ".vddkfs/metrics"} <= set(files)
    wanted = (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_DIRECT, os.O_WRONLY | os.O_TRUNC)
    for name in (*files, "web/new"):
        for flags in wanted:
            made = os.O_CREAT if name == "web/new" else 0
            assert found.attempt(errno.EROFS, "open", found.path(name), flags | made) is None


# Frozen images


@promise(
    "frozen-kept",
    "What was read of a frozen image may be answered from memory for as long as its identity "
    "holds, also after its file was closed.",
)
def test_frozen_kept(mount: Mounts, vm: Path, flat: Path) -> None:
    found = mount(vm)
    assert found.sha256(BASE) == sha256(OLD)
    before = found.status()["cache"]
    assert before["source_bytes"] == SIZE
    for forget in (False, True):
        fd = found.open(BASE)
        if forget:  # then from our own memory
            found.ask("drop_cache", fd)
        assert found.ask("pread", fd, SIZE, 0) == OLD
        found.ask("close", fd)
    after = found.status()["cache"]
    assert after["source_bytes"] == SIZE
    assert after["hits"] > before["hits"]


@promise(
    "frozen-checked",
    "The identity of a frozen image is compared each time that its file is opened and each time "
    "that its disk is opened again.",
)
@pytest.mark.parametrize("opened", ["file", "disk"])
def test_frozen_checked(mount: Mounts, vm: Path, flat: Path, opened: str) -> None:
    found = mount(vm, "idle_timeout=0.3" if opened == "disk" else "readahead=0")
    fd = found.open(BASE, direct=True)
    found.map_known("web")
    for number in (1, 2):
        if opened == "disk":
            until(lambda: found.worker()["pid"] is None, what="the idle worker to end")
        if number == 2:
            overwrite(flat, 0, NEW)
            found.expect(CHANGED, STALE)
        if opened == "file":
            found.ask("close", found.open(BASE))
        assert is_stale(found, fd) == (number == 2)


@promise(
    "frozen-stale",
    "When a frozen image is found to have become another disk, files that were open fail with "
    "ESTALE, files that are opened later show the new disk, and from then on no file shows "
    "bytes of both.",
)
def test_frozen_stale(mount: Mounts, vm: Path, flat: Path) -> None:
    found = mount(vm)
    files = [found.open(name, direct) for name in (BASE, TOP) for direct in (False, True)]
    for fd in files:
        assert found.ask("pread", fd, SIZE // 2, 0) == OLD[: SIZE // 2]
    overwrite(flat, 0, NEW)
    found.expect(CHANGED, STALE)
    assert found.content(BASE) == NEW
    for fd in files:
        until(lambda fd=fd: is_stale(found, fd), what="the kernel to forget the old disk")
        assert all(is_stale(found, fd, at) for at in range(0, SIZE, 256 * KIB))
    for name in (BASE, TOP):
        assert found.content(name) == NEW
        assert found.sha256(name, direct=True) == sha256(NEW)


@promise("frozen-said", "The log says which link changed, and what of it.")
def test_frozen_said(mount: Mounts, vm: Path, flat: Path) -> None:
    found = mount(vm)
    overwrite(flat, 0, NEW)
    found.expect(CHANGED)
    found.ask("close", found.open(TOP))
    [line] = found.loud()
    assert f"link 0 ({vm}/web.vmdk)" in line
    assert f"{flat} was modified" in line


@promise(
    "frozen-zeros",
    "Known holes of a frozen image are answered with zeros without asking the source.",
)
def test_frozen_zeros(mount: Mounts, vm: Path) -> None:
    content = sparse_noise("base", SIZE)
    make_vmdk(vm / "web.vmdk", content)
    make_delta(vm / "web-1.vmdk", "web.vmdk")
    found = mount(vm)
    fd = found.open(BASE)
    found.ask("lseek", fd, 0, os.SEEK_HOLE)
    until(lambda: found.stat(BASE).st_blocks == SIZE // 2 // SECTOR, what="the map")
    hole, data = 256 * KIB, 3 * MIB
    assert not any(content[hole : hole + PIECE])
    with stopped(found.worker()["pid"]):
        assert found.ask("pread", fd, PIECE, hole, timeout=10) == bytes(PIECE)
        found.agent.send("pread", fd, PIECE, data)
        assert found.agent.waiting(0.3), "the source is asked, and does not answer"
    assert found.agent.receive() == content[data : data + PIECE]
