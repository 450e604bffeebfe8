"""What a file shows when its source changes under the mount.

A frozen link that changes makes old handles stale and shows anew when opened; a live link is seen
as it was at the open or later, and past the cache as it is at the read.
"""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mount, Mounts, sha256, until
from tests.end_to_end.vms import (
    KIB,
    MIB,
    make_delta,
    make_empty,
    make_vmdk,
    make_vmfs,
    noise,
    raw,
    raw_sha256,
    write,
)

SIZE = 4 * MIB
BASE, TOP = "web/chain/0.raw", "web/disk.raw"
STALE = r"read at offset \d+ failed: .* the source changed after the file was opened"
CHANGED = r"disk web: link 0 \(.*web.vmdk\) changed under the mount: "


@pytest.fixture
def chain(vm: Path) -> tuple[Path, Path]:
    """A flat base, which can be written at known places, and a delta."""
    base = make_vmfs(vm / "web.vmdk", noise("base", SIZE))
    delta = make_delta(vm / "web-1.vmdk", "web.vmdk")
    write(delta, MIB, noise("delta", 64 * KIB))
    return base, delta


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def append(flat: Path) -> None:
    with open(flat, "ab") as file:
        file.write(bytes(512))


def modify(flat: Path) -> None:
    overwrite(flat, 2 * MIB, noise("changed", 8192))


def replace(flat: Path) -> None:
    new = flat.with_name("new")
    new.write_bytes(noise("another", SIZE))
    new.rename(flat)


def replace_by_a_copy(flat: Path) -> None:
    """The same bytes in another file: a restore, say. Nobody can know that without reading it."""
    new = flat.with_name("new")
    shutil.copy2(flat, new)
    new.rename(flat)


CHANGES = {
    append: r"web-flat.vmdk was modified",
    modify: r"web-flat.vmdk was modified",
    replace: r"web-flat.vmdk was replaced by another file",
    replace_by_a_copy: r"web-flat.vmdk was replaced by another file",
}


def is_stale(mount: Mount, fd: int, offset: int) -> bool:
    return mount.attempt(errno.ESTALE, "pread", fd, 4096, offset) is None


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_frozen_link_changes(
    mount: Mounts, vm: Path, chain: tuple[Path, Path], change: Callable[[Path], None]
) -> None:
    base, delta = chain
    found = mount(vm)
    handles = {name: (found.open(name), found.open(name, direct=True)) for name in (BASE, TOP)}
    before = {name: found.sha256(name) for name in (BASE, TOP)}
    assert before == {BASE: raw_sha256(base), TOP: raw_sha256(delta)}
    assert not any(is_stale(found, fd, 0) for pair in handles.values() for fd in pair)

    change(vm / "web-flat.vmdk")
    found.expect(CHANGED + ".*" + CHANGES[change])
    # The next open finds out, and shows what is there now, buffered and past the cache.
    assert found.sha256(BASE) == raw_sha256(base)
    assert found.sha256(TOP) == raw_sha256(delta)
    assert found.sha256(BASE, True) == raw_sha256(base)
    assert found.sha256(TOP, True) == raw_sha256(delta)
    # Said once, not at every open.
    assert len(found.loud()) == 1

    found.expect(STALE)
    for buffered, direct in handles.values():
        assert is_stale(found, direct, 0)
        found.ask("drop_cache", buffered)
        assert is_stale(found, buffered, 0)


def test_other_images_of_the_changed_link_are_stale_too(
    mount: Mounts, vm: Path, chain: tuple[Path, Path]
) -> None:
    """The disk is read to its end before, so that only the kernel's cache could answer."""
    found = mount(vm)
    fd = found.open(TOP)
    assert found.sha256(TOP) == raw_sha256(chain[1])
    assert not is_stale(found, fd, 3 * MIB)
    modify(vm / "web-flat.vmdk")
    found.expect(CHANGED, STALE)
    found.open(BASE)
    until(lambda: is_stale(found, fd, 3 * MIB), what="the kernel to forget")
    assert is_stale(found, fd, 0)


def test_frozen_link_is_kept_across_opens(
    mount: Mounts, vm: Path, chain: tuple[Path, Path]
) -> None:
    """Without a change nothing is read again: the kernel answers."""
    found = mount(vm)
    assert found.sha256(BASE) == raw_sha256(chain[0])
    cache = found.status()["cache"]
    assert found.sha256(BASE) == raw_sha256(chain[0])
    after = found.status()["cache"]
    assert (after["misses"], after["hits"]) == (cache["misses"], cache["hits"])


def test_sparse_base_modified_by_qemu(mount: Mounts, vm: Path) -> None:
    """qemu-io changes the content id as well; the data shows what the files have now."""
    base = make_vmdk(vm / "web.vmdk", noise("base", SIZE))
    make_delta(vm / "web-1.vmdk", "web.vmdk")
    found = mount(vm)
    fd = found.open(BASE, direct=True)
    assert found.sha256(BASE) == raw_sha256(base)
    write(base, 0, noise("written", 64 * KIB))
    found.expect(CHANGED, STALE)
    assert found.sha256(BASE) == raw_sha256(base)
    assert found.sha256(TOP) == raw_sha256(base)
    assert is_stale(found, fd, MIB)


def test_change_while_the_worker_is_away(mount: Mounts, vm: Path, chain: tuple[Path, Path]) -> None:
    found = mount(vm, "idle_timeout=0.3")
    buffered, direct = found.open(BASE), found.open(BASE, direct=True)
    found.ask("pread", buffered, 4096, 0)
    found.map_known("web")
    until(lambda: found.worker()["pid"] is None, what="the idle worker to end")
    modify(vm / "web-flat.vmdk")
    found.expect(CHANGED)
    found.allow(r"read at offset \d+ failed: .*changed")
    # The handle's own read brings the worker back, which must not answer for another disk.
    assert is_stale(found, direct, 2 * MIB)
    found.ask("drop_cache", buffered)
    assert is_stale(found, buffered, 2 * MIB)
    assert found.sha256(BASE) == raw_sha256(chain[0])


def test_change_seen_by_a_new_worker_after_a_kill(
    mount: Mounts, vm: Path, chain: tuple[Path, Path]
) -> None:
    found = mount(vm)
    fd = found.open(TOP, direct=True)
    found.ask("pread", fd, 4096, 0)
    pid = found.worker()["pid"]
    replace(vm / "web-flat.vmdk")
    os.kill(pid, signal.SIGKILL)
    until(lambda: found.worker()["pid"] != pid, what="the loss to be noticed")
    found.restarts = 1
    found.expect("worker of web: it ended unexpectedly", CHANGED)
    found.allow(r"read at offset \d+ failed: .*changed")
    assert is_stale(found, fd, 0)
    assert found.sha256(TOP) == raw_sha256(chain[1])


def test_capacity_changes(mount: Mounts, vm: Path, chain: tuple[Path, Path]) -> None:
    found = mount(vm)
    fd = found.open(BASE, direct=True)
    make_vmfs(vm / "web.vmdk", noise("larger", SIZE + MIB))
    found.expect(CHANGED)
    found.allow("cannot be opened: .*capacity", STALE)
    with pytest.raises(OSError, match=r"[Ss]tale") as caught:
        found.open(BASE)
    assert caught.value.errno == errno.ESTALE
    assert is_stale(found, fd, 0)
    assert any("mount again" in line for line in found.loud())


# The live link.


@pytest.fixture
def live(vm: Path) -> Path:
    path = make_empty(vm / "live.vmdk", SIZE)
    write(path, 0, noise("first", 64 * KIB))
    return path


LIVE = "live/disk.raw"
PLACES = {"a grain that was there": 4096, "a grain that was not": 2 * MIB + 4096}


@pytest.mark.parametrize("place", PLACES)
def test_live_link_written_between_two_opens(
    mount: Mounts, vm: Path, live: Path, place: str
) -> None:
    offset = PLACES[place]
    found = mount(vm)
    found.map_known("live")
    held = found.open(LIVE)
    old = raw(live)
    assert found.read(LIVE, offset, 8192, True) == old[offset:][:8192]
    assert found.sha256(LIVE) == sha256(old)
    assert found.ask("pread", held, 8192, offset) == old[offset:][:8192]

    write(live, offset, noise("new", 8192))
    # The trap: what was read before is still there in the kernel, and shows through a held file.
    assert found.ask("pread", held, 8192, offset) == old[offset:][:8192]
    # The guard: an open begins with nothing that is older.
    assert found.read(LIVE, offset, 8192) == noise("new", 8192)
    assert found.sha256(LIVE) == raw_sha256(live)
    assert found.read(LIVE, offset, 8192, True) == noise("new", 8192)


@pytest.mark.parametrize("place", PLACES)
def test_live_link_past_the_cache_on_an_open_handle(
    mount: Mounts, vm: Path, live: Path, place: str
) -> None:
    offset = PLACES[place]
    found = mount(vm)
    found.map_known("live")
    direct = found.open(LIVE, direct=True)
    assert found.ask("pread", direct, 8192, offset) == raw(live)[offset:][:8192]
    for round_ in range(3):
        write(live, offset, noise(round_, 8192))
        assert found.ask("pread", direct, 8192, offset) == noise(round_, 8192)


def test_live_leaf_of_a_chain(mount: Mounts, vm: Path) -> None:
    make_vmdk(vm / "web.vmdk", noise("base", SIZE))
    leaf = make_delta(vm / "web-1.vmdk", "web.vmdk")
    found = mount(vm)
    assert found.sha256(TOP) == found.sha256(BASE)
    write(leaf, 3 * MIB, noise("new", 100 * KIB))
    direct = found.open(TOP, direct=True)
    assert found.sha256(TOP) == raw_sha256(leaf) == found.sha256(TOP, True)
    assert found.sha256(BASE) == raw_sha256(vm / "web.vmdk")
    write(leaf, MIB, noise("newer", 100 * KIB))
    data = found.ask("pread", direct, 100 * KIB, MIB)
    assert data == noise("newer", 100 * KIB)


def test_live_flat_disk(mount: Mounts, vm: Path) -> None:
    make_vmfs(vm / "live.vmdk", noise("flat", SIZE))
    found = mount(vm)
    direct = found.open(LIVE, direct=True)
    assert found.sha256(LIVE) == sha256(noise("flat", SIZE))
    overwrite(vm / "live-flat.vmdk", MIB, noise("new", 4096))
    assert found.ask("pread", direct, 4096, MIB) == noise("new", 4096)
    assert found.read(LIVE, MIB, 4096) == noise("new", 4096)


def test_live_link_time_and_map_follow(mount: Mounts, vm: Path, live: Path) -> None:
    os.utime(live, ns=(10**18, 10**18))
    found = mount(vm)
    assert found.stat(LIVE).st_mtime_ns == 10**18
    found.map_known("live")
    blocks = found.stat(LIVE).st_blocks
    write(live, 2 * MIB, noise("new", 64 * KIB))
    found.ask("close", found.open(LIVE))
    assert found.stat(LIVE).st_mtime_ns == live.stat().st_mtime_ns
    found.map_known("live")
    assert found.stat(LIVE).st_blocks == blocks + 64 * KIB // 512
    seen = found.ask("seek_map", found.path(LIVE))
    assert (2 * MIB, 2 * MIB + 64 * KIB, True) in seen


def test_live_link_replaced(mount: Mounts, vm: Path, live: Path) -> None:
    """A revert: the leaf is another file now."""
    found = mount(vm)
    handles = found.open(LIVE), found.open(LIVE, direct=True)
    found.sha256(LIVE)
    new = make_vmdk(vm / "new", noise("another", SIZE))
    new.rename(live)
    found.expect(r"disk live: link 0 .*live.vmdk was replaced by another file", STALE)
    assert found.sha256(LIVE) == raw_sha256(live) == sha256(noise("another", SIZE))
    found.ask("drop_cache", handles[0])
    assert all(is_stale(found, fd, 0) for fd in handles)
