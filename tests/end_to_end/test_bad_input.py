"""Bad input: one line that names the file, the documented exit code, and nothing mounted."""

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.mounting import (
    COMMAND,
    Done,
    Mounts,
    mounted,
    run,
    state_files,
    succeed,
    vddkfs,
)
from tests.end_to_end.users import NOBODY, script_as_nobody, vddkfs_as_nobody
from tests.end_to_end.vms import (
    MIB,
    SECTOR,
    descriptor,
    make_chain,
    make_delta,
    make_vmdk,
    make_vmfs,
    noise,
    raw_sha256,
)
from vddkfs import errors


def judge(done: Done, kind: type[errors.VddkfsError], *words: str | Path) -> str:
    """Check that a command was refused as it should be; return its one line."""
    assert done.returncode == kind.exit_code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    (line,) = lines
    assert line.startswith("vddkfs: ")
    assert line.isprintable()
    for word in words:
        assert str(word) in line
    return line


@pytest.fixture
def refused(able: None, tmp_path: Path) -> Callable[..., str]:
    """Mount a source that is bad, and judge the refusal; the same with `info`."""
    place = tmp_path / "place"
    place.mkdir()

    def refusing(
        source: Path, kind: type[errors.VddkfsError], *words: str | Path, options: str = "uid=0"
    ) -> str:
        line = judge(vddkfs("mount", source, place, "-o", options), kind, *words)
        assert not mounted(place)
        assert state_files(place) == []
        assert judge(vddkfs("info", source, "-o", options), kind, *words) == line
        return line

    return refusing


def patch(path: Path, offset: int, form: str, *values: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, *values))


Refused = Callable[..., str]


def test_missing_file(refused: Refused, vm: Path) -> None:
    refused(vm / "gone.vmdk", errors.SourceMissing, vm / "gone.vmdk", "no such file")
    refused(vm / "gone", errors.SourceMissing, vm / "gone")
    refused(vm / "gone.vmx", errors.SourceMissing, vm / "gone.vmx")


def test_not_a_vmdk(refused: Refused, vm: Path) -> None:
    for name, content in {
        "noise.vmdk": noise("x", 9000),
        "empty.vmdk": b"",
        "x.iso": b"CD",
    }.items():
        (vm / name).write_bytes(content)
        refused(vm / name, errors.NotAVmdk, vm / name)
    os.mkfifo(vm / "pipe.vmdk")
    refused(vm / "pipe.vmdk", errors.NotAVmdk, vm / "pipe.vmdk")
    refused(Path("/dev/zero"), errors.NotAVmdk, "/dev/zero")


def test_truncated_header(refused: Refused, vm: Path) -> None:
    path = make_vmdk(vm / "d.vmdk", noise("d", MIB))
    os.truncate(path, 300)
    refused(path, errors.DamagedSource, path, "truncated header")


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentFlat"])
def test_truncated_extent(refused: Refused, vm: Path, subformat: str) -> None:
    path = make_vmdk(vm / "d.vmdk", noise("d", MIB), subformat)
    (extent,) = set(vm.glob("d-*.vmdk"))
    os.truncate(extent, MIB - 1)
    refused(path, errors.DamagedSource, extent, "truncated extent", MIB - 1)


def test_truncated_sparse_file(refused: Refused, vm: Path) -> None:
    path = make_vmdk(vm / "d.vmdk", noise("d", MIB))
    os.truncate(path, 21 * SECTOR)
    refused(path, errors.DamagedSource, path)


def test_missing_extent(refused: Refused, vm: Path) -> None:
    path = make_vmfs(vm / "d.vmdk", noise("d", MIB))
    (vm / "d-flat.vmdk").unlink()
    refused(path, errors.SourceMissing, vm / "d-flat.vmdk", "d.vmdk")


def test_parent_missing(refused: Refused, vm: Path) -> None:
    links = make_chain(vm, links=3, size=MIB)
    links[0].unlink()
    refused(links[2], errors.BrokenChain, links[0], links[1], "missing")


def test_cid_mismatch(refused: Refused, vm: Path) -> None:
    base = make_vmfs(vm / "d.vmdk", noise("d", MIB), cid="aaaaaaaa")
    delta = make_delta(vm / "d-1.vmdk", "d.vmdk")
    base.write_text(base.read_text().replace("CID=aaaaaaaa", "CID=bbbbbbbb", 1))
    refused(delta, errors.BrokenChain, base, delta, "bbbbbbbb", "aaaaaaaa")


@pytest.mark.parametrize("links", [1, 3])
def test_loop_in_the_chain(refused: Refused, vm: Path, links: int) -> None:
    for number in range(links):
        hint = f"d{(number + 1) % links}.vmdk"
        path = vm / f"d{number}.vmdk"
        make_vmfs(path, noise(number, MIB), cid="12345678", parent="12345678", hint=hint)
    refused(vm / "d0.vmdk", errors.BrokenChain, vm / "d0.vmdk", "loop")
    refused(vm, errors.BrokenChain, "loop")


@pytest.mark.parametrize("sectors", [1 << 40, (1 << 63) - 1, (1 << 64) - 1, (1 << 64) + 8])
def test_capacity_overflows(refused: Refused, vm: Path, sectors: int) -> None:
    (vm / "d-flat.vmdk").write_bytes(noise("d", MIB))
    path = vm / "d.vmdk"
    path.write_text(descriptor([f'RW {sectors} FLAT "d-flat.vmdk" 0'], kind="monolithicFlat"))
    refused(path, errors.DamagedSource, path)


def test_capacity_overflows_in_the_sum(refused: Refused, vm: Path) -> None:
    path = vm / "d.vmdk"
    path.write_text(descriptor([f"RW {1 << 36} ZERO"] * 2, kind="monolithicFlat"))
    refused(path, errors.DamagedSource, path)


def test_header_capacity_overflows(refused: Refused, vm: Path) -> None:
    path = make_vmdk(vm / "d.vmdk", noise("d", MIB))
    patch(path, 12, "<Q", (1 << 64) - 1)
    refused(path, errors.DamagedSource, path, "capacity")


@pytest.mark.parametrize("grain", [0, 1, 100, 1 << 20, (1 << 64) - 1])
def test_absurd_grain_size(refused: Refused, vm: Path, grain: int) -> None:
    path = make_vmdk(vm / "d.vmdk", noise("d", MIB))
    patch(path, 20, "<Q", grain)
    refused(path, errors.DamagedSource, path, "grain size", grain)


@pytest.mark.parametrize("how", ["absolute", "dots"])
def test_parent_outside(refused: Refused, mount: Mounts, vm: Path, how: str) -> None:
    other = vm / "other"
    other.mkdir()
    base = make_vmdk(other / "base.vmdk", noise("base", MIB))
    folder = vm / "sub"
    folder.mkdir()
    hint = str(base) if how == "absolute" else "../other/base.vmdk"
    path = make_delta(folder / "delta.vmdk", hint)
    refused(path, errors.BrokenChain, path, hint, "outside", "follow_parents=any")
    found = mount(path, "follow_parents=any")
    assert found.sha256("base/disk.raw") == raw_sha256(base)


@pytest.mark.parametrize("how", ["absolute", "dots"])
def test_extent_outside(refused: Refused, mount: Mounts, vm: Path, how: str) -> None:
    folder = vm / "sub"
    folder.mkdir()
    (vm / "data.bin").write_bytes(noise("d", MIB))
    name = str(vm / "data.bin") if how == "absolute" else "../data.bin"
    path = folder / "d.vmdk"
    lines = [f'RW {MIB // SECTOR} FLAT "{name}" 0']
    path.write_text(descriptor(lines, kind="monolithicFlat"))
    refused(path, errors.BrokenChain, path, name, "outside", "follow_parents=any")
    found = mount(path, "follow_parents=any")
    assert found.content("d/disk.raw") == noise("d", MIB)


@pytest.fixture
def nobody(able: None, public: Path) -> Iterator[Path]:
    """Return a folder for what another user tries."""
    done = vddkfs_as_nobody("--version")
    assert done.returncode == 0, done.stderr
    state = Path(f"/tmp/vddkfs-{NOBODY}")
    had = state.exists()
    yield public
    if not had:
        shutil.rmtree(state, ignore_errors=True)


def test_unreadable_file(nobody: Path) -> None:
    path = make_vmdk(nobody / "d.vmdk", noise("d", MIB))
    path.chmod(0o600)
    place = nobody / "place"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    judge(vddkfs_as_nobody("mount", path, place), errors.AccessDenied, path, "Permission denied")
    judge(vddkfs_as_nobody("mount", nobody, place), errors.AccessDenied, path, "Permission denied")
    nobody.chmod(0o711)
    judge(vddkfs_as_nobody("info", nobody), errors.AccessDenied, nobody)


def test_mountpoint_of_another_user(nobody: Path) -> None:
    make_vmdk(nobody / "d.vmdk", noise("d", MIB)).chmod(0o644)
    place = nobody / "place"
    place.mkdir()
    judge(vddkfs_as_nobody("mount", nobody, place), errors.AccessDenied, place)
    place.chmod(0o700)
    judge(vddkfs_as_nobody("mount", nobody, place), errors.AccessDenied, place)


def test_fuse_device_of_root_only(nobody: Path) -> None:
    make_vmdk(nobody / "d.vmdk", noise("d", MIB)).chmod(0o644)
    place = nobody / "place"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    # The device with the modes that some systems give it, and no fusermount3 to help.
    script = 'exec "$vddkfs" mount "$1" "$2"'
    done = script_as_nobody(script, nobody, place, device_mode="600")
    judge(done, errors.FuseUnavailable, "/dev/fuse", "Permission denied")


def test_mount_by_another_user(nobody: Path) -> None:
    """A user without rights mounts in a place of their own, where fusermount3 allows it."""
    path = make_vmdk(nobody / "d.vmdk", noise("d", MIB))
    path.chmod(0o644)
    place = nobody / "place"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    script = """
        set -e
        "$vddkfs" mount "$1" "$2"
        sha256sum "$2/d/disk.raw" || true
        "$vddkfs" umount "$2"
    """
    done = script_as_nobody(script, path, place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:1] == [raw_sha256(path)]


# Where to mount.


@pytest.fixture
def disk(vm: Path) -> Path:
    return make_vmdk(vm / "d.vmdk", noise("d", MIB))


def test_mountpoint_missing(disk: Path, tmp_path: Path) -> None:
    place = tmp_path / "gone"
    judge(vddkfs("mount", disk, place), errors.BadMountpoint, place, "no such folder", "mkdir")


def test_mountpoint_is_a_file(disk: Path) -> None:
    judge(vddkfs("mount", disk, disk), errors.BadMountpoint, disk, "not a folder")


def test_mountpoint_is_not_empty(disk: Path, vm: Path) -> None:
    judge(vddkfs("mount", disk, vm), errors.BadMountpoint, vm, "not empty")


def test_mountpoint_is_a_mount_already(mount: Mounts, disk: Path, tmp_path: Path) -> None:
    found = mount(disk)
    done = vddkfs("mount", disk, found.place)
    judge(done, errors.BadMountpoint, found.place, "already", f"vddkfs umount {found.place}")
    assert found.sha256("d/disk.raw") == raw_sha256(disk)
    place = tmp_path / "other"
    place.mkdir()
    succeed("mount", "-t", "tmpfs", "none", place)
    try:
        judge(vddkfs("mount", disk, place), errors.BadMountpoint, place, "tmpfs", "already")
    finally:
        succeed("umount", place)


def test_fuse_device_missing(disk: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    bare_dev = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9"
    script = f'{bare_dev} && exec "$@"'
    done = run("unshare", "-m", "sh", "-c", script, "sh", COMMAND, "mount", disk, place)
    judge(done, errors.FuseUnavailable, "/dev/fuse", "missing", "modprobe fuse")
