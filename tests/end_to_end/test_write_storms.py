"""Written bytes survive: fio verifies them while workers are killed, and qemu reads them after."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end import storms
from tests.end_to_end.mounting import Mount, Mounts, succeed, until
from tests.end_to_end.remote import BIG, MIB, Proxy, RemoteMount, total
from tests.end_to_end.storms import LARGE, SMALL, Killer, Reader, storm
from tests.end_to_end.vms import make_empty, make_vmdk, make_vmfs, noise, raw_sha256

pytestmark = storms.MARKS
SIZE = (64 if storms.THOROUGH else 10) * MIB
REST = MIB
BASE = "disk/chain/0.raw"
TOP = "disk/disk.raw"


@pytest.fixture(autouse=True)
def with_fio(able: None) -> None:
    storms.need_fio()


def hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of all files of a folder."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sparse(folder: Path) -> Path:
    return make_vmdk(folder / "disk.vmdk", noise("sparse", SIZE // 2) + bytes(SIZE // 2))


def split(folder: Path) -> Path:
    return make_empty(folder / "disk.vmdk", SIZE, "twoGbMaxExtentSparse")


def vmfs(folder: Path) -> Path:
    return make_vmfs(folder / "disk.vmdk", noise("vmfs", SIZE))


def seen(mount: Mount, name: str) -> str:
    """Return the hash of a file, which is the same however it is read."""
    found = {mount.sha256(name), mount.sha256(name, True)}
    assert len(found) == 1
    return found.pop()


def end(mount: Mount) -> None:
    """Take a mount down and judge it before the files below it are looked at."""
    mount.finish()
    mount.pid = 0


def check(path: Path) -> None:
    done = succeed("qemu-img", "check", "-f", "vmdk", path)
    assert "No errors were found" in done.stdout


WAYS = [(True, SMALL), (False, LARGE)]
BASES = [
    (make, *way)
    for number, make in enumerate((sparse, split, vmfs))
    for way in (WAYS if storms.THOROUGH else WAYS[number % 2 :][:1])
]
REMOTE_BASES = [
    (profile, *way)
    for number, profile in enumerate(("lan", "nbdssl"))
    for way in (WAYS if storms.THOROUGH else WAYS[number:][:1])
]
"""What is tried each time; a thorough run tries all of both."""


@pytest.mark.parametrize(("make", "direct", "sizes"), BASES)
def test_base(
    make: Callable[[Path], Path], direct: bool, sizes: str, mount: Mounts, vm: Path
) -> None:
    path = make(vm)
    found = mount(vm, "rw")
    with Killer(found) as killer:
        storm(found.path(BASE), SIZE, killer, direct=direct, sizes=sizes)
    wanted = seen(found, BASE)
    end(found)
    check(path)
    assert raw_sha256(path) == wanted


@pytest.mark.parametrize(("direct", "sizes"), WAYS[: None if storms.THOROUGH else 1])
def test_overlay(direct: bool, sizes: str, mount: Mounts, vm: Path, tmp_path: Path) -> None:
    data = noise("below", SIZE + REST)
    path = make_vmfs(vm / "disk.vmdk", data)
    before = hashes(vm)
    found = mount(vm, f"overlay={tmp_path / 'overlay'}")
    with Reader(found, TOP, SIZE, data[SIZE:]), Killer(found) as killer:
        storm(found.path(TOP), SIZE, killer, direct=direct, sizes=sizes)
    wanted = seen(found, TOP)
    end(found)
    assert hashes(vm) == before
    again = mount(vm, f"overlay={tmp_path / 'overlay'}")
    assert seen(again, TOP) == wanted
    assert wanted != raw_sha256(path)
    target = tmp_path / "merged.raw"
    target.write_bytes(again.content(TOP))
    assert hashlib.sha256(target.read_bytes()).hexdigest() == wanted


@pytest.mark.parametrize(("profile", "direct", "sizes"), REMOTE_BASES)
def test_remote_base(direct: bool, sizes: str, profile: str, proxy: Proxy) -> None:
    path = proxy.make_big(noise("remote", SIZE))
    proxy.kit.configure(*storms.settings_of_a_bad_day(profile))
    found = remote(proxy, BIG.partition("@")[0], "rw", "assume=powered-off")
    with Killer(found) as killer:
        storm(found.path("big/chain/0.raw"), SIZE, killer, direct=direct, sizes=sizes)
    until(lambda: total(found, "restarts") == killer.count, what="the last loss to be noticed")
    wanted = seen(found, "big/chain/0.raw")
    end(found)
    assert raw_sha256(path) == wanted


@pytest.mark.parametrize(("direct", "sizes"), WAYS[: None if storms.THOROUGH else 1])
def test_remote_overlay(direct: bool, sizes: str, proxy: Proxy, tmp_path: Path) -> None:
    data = noise("remote", SIZE + REST)
    path = proxy.make_big(data)
    before = hashes(path.parent)
    proxy.kit.configure(*storms.settings_of_a_bad_day("lan"))
    folder = f"overlay={tmp_path / 'overlay'}"
    found = remote(proxy, BIG, folder)
    name = "big/disk.raw"
    with Reader(found, name, SIZE, data[SIZE:]), Killer(found) as killer:
        storm(found.path(name), SIZE, killer, direct=direct, sizes=sizes)
    wanted = seen(found, name)
    end(found)
    assert hashes(path.parent) == before
    assert seen(remote(proxy, BIG, folder), name) == wanted


def remote(proxy: Proxy, disk: str, *options: str) -> RemoteMount:
    return proxy.mount(disk, moref="vm-20", options=("transports=nbd", *options))
