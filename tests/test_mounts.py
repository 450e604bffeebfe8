"""The kernel's list of mounts, what may be a mount point, unmounting, and who is in the way."""

import ctypes
import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vddkfs import mounts
from vddkfs.errors import AccessDenied, BadMountpoint, FuseUnavailable, MountBusy, NotMounted
from vddkfs.mounts import check_fuse, check_mountpoint, holders, mounted_at, unmount

Table = Callable[..., None]


def line(place: str, kind: str = "ext4", device: str = "0:42") -> str:
    """Return a line of mountinfo; *place* is escaped as the kernel does."""
    for letter in "\\ \t\n":
        place = place.replace(letter, f"\\{ord(letter):03o}")
    return f"36 25 {device} / {place} rw,noatime master:1 - {kind} /dev/sda1 rw\n"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """Have other mounts in /proc/self/mountinfo."""
    fake = tmp_path / "mountinfo"
    real: Any = open

    def opened(file: Any, *arguments: Any, **keys: Any) -> Any:
        wanted = fake if str(file) == "/proc/self/mountinfo" else file
        return real(wanted, *arguments, **keys)

    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr("io.open", opened)  # what Path uses

    def put(*lines: str) -> None:
        fake.write_bytes(os.fsencode("".join(lines)))

    return put


def test_the_root_is_mounted_and_a_new_folder_is_not(tmp_path: Path) -> None:
    found = mounted_at("/")
    assert found is not None
    assert found.place == "/"
    assert mounted_at(str(tmp_path)) is None


@pytest.mark.parametrize(
    "place",
    [
        "/mnt/a b",
        "/mnt/tab\there",
        "/mnt/new\nline",
        "/mnt/back\\slash",
        "/mnt/\\040",
        "/mnt/\\134040",
        "/mnt/\\\\",
        "/mnt/\udce9",
        "/mnt/ü - x",
    ],
)
def test_places_are_found_whatever_their_names_are(place: str, table: Table) -> None:
    table(line("/"), line(place, "fuse.vddkfs", "0:77"), line("/mnt/other"))
    assert mounted_at(place) == ("0:77", place, "fuse.vddkfs")
    assert mounted_at(place + "x") is None


@pytest.mark.parametrize("odd", ["\r", "\x0c", "\u2028"])
def test_a_name_with_an_odd_kind_of_line_end_hides_nothing(odd: str, table: Table) -> None:
    """The kernel escapes only space, tab, newline and backslash."""
    table(line(f"/mnt/x{odd}y", "xfs"), line("/mnt/web", "fuse.vddkfs"))
    assert mounted_at("/mnt/web") == ("0:42", "/mnt/web", "fuse.vddkfs")
    assert mounted_at(f"/mnt/x{odd}y") == ("0:42", f"/mnt/x{odd}y", "xfs")


def test_the_topmost_of_several_mounts_counts(table: Table) -> None:
    table(line("/mnt/a", "ext4", "8:1"), line("/mnt/a", "xfs", "8:2"), line("/mnt/ab", "nfs"))
    found = mounted_at("/mnt/a")
    assert found is not None
    assert (found.device, found.kind) == ("8:2", "xfs")


# What may be a mount point


def test_an_empty_folder_is_a_mount_point(tmp_path: Path) -> None:
    check_mountpoint(str(tmp_path))


def test_bad_mount_points_are_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cases = {
        str(tmp_path / "none"): ("no such folder", f"mkdir -p {tmp_path}/none"),
        str(tmp_path / "file"): ("not a folder", "name an empty folder"),
        str(tmp_path): ("not empty", "empty folder"),
    }
    for place, (what, advice) in cases.items():
        with pytest.raises(BadMountpoint) as caught:
            check_mountpoint(place)
        assert caught.value.message.startswith(f"{place}: ")
        assert what in caught.value.message
        assert advice in caught.value.advice


@pytest.mark.parametrize("name", ["x" * 300, "loop/x"], ids=["long", "loop"])
def test_a_path_that_cannot_be_followed_is_a_bad_mount_point(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    place = str(tmp_path / name)
    with pytest.raises(BadMountpoint) as caught:
        check_mountpoint(place)
    assert place in caught.value.message


def test_a_folder_that_may_not_be_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(place: str) -> list[str]:
        raise PermissionError(errno.EACCES, "no", place)

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(AccessDenied, match="may not look"):
        check_mountpoint(str(tmp_path))


def test_a_user_mounts_only_on_a_folder_that_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    check_mountpoint(str(tmp_path))
    monkeypatch.setattr(os, "access", lambda place, mode: mode != os.W_OK)
    with pytest.raises(AccessDenied, match="may not write"):
        check_mountpoint(str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_mountpoint(str(tmp_path))


def test_a_place_that_is_taken_is_not_looked_into(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "listdir", None)  # a hung mount would not answer
    table(line("/mnt/web", "fuse.vddkfs"), line("/mnt/nfs", "nfs4"))
    with pytest.raises(BadMountpoint, match="a vddkfs mount is there already") as caught:
        check_mountpoint("/mnt/web")
    assert "vddkfs umount /mnt/web" in caught.value.advice
    with pytest.raises(BadMountpoint, match="nfs4 is mounted there"):
        check_mountpoint("/mnt/nfs")


def test_a_machine_without_fuse_is_told_what_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "FUSE_DEVICE", tmp_path / "fuse")
    with pytest.raises(FuseUnavailable, match="modprobe fuse"):
        check_fuse()
    (tmp_path / "fuse").write_text("")
    check_fuse()
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(FuseUnavailable, match="cannot be opened"):
        check_fuse()


# Unmounting


class FakeLibc:
    """Answers umount2 with a code."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.calls: list[tuple[bytes, int]] = []

    def umount2(self, place: bytes, flags: int) -> int:
        self.calls.append((place, flags))
        ctypes.set_errno(self.code)
        return -1 if self.code else 0


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> FakeLibc:
    fake = FakeLibc(0)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: fake)
    return fake


def test_root_unmounts_without_a_helper(libc: FakeLibc) -> None:
    unmount("/mnt/caf\udce9")
    unmount("/mnt/web", lazy=True)
    assert libc.calls == [(b"/mnt/caf\xe9", 0), (b"/mnt/web", 2)]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EBUSY, MountBusy),
        (errno.EINVAL, NotMounted),
        (errno.EPERM, AccessDenied),
        (errno.EACCES, AccessDenied),
    ],
)
def test_what_the_kernel_says_becomes_an_error(
    code: int, kind: type[Exception], libc: FakeLibc
) -> None:
    libc.code = code
    with pytest.raises(kind, match="/mnt/web"):
        unmount("/mnt/web")


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Be a user, with a fusermount3 that runs a given shell script."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def put(script: str) -> None:
        (tmp_path / "fusermount3").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "fusermount3").chmod(0o755)

    return put


def test_a_user_unmounts_with_the_helper(helper: Any, tmp_path: Path) -> None:
    helper(f'printf "%s\\n" "$*" >> {tmp_path}/log')
    unmount("/mnt/web")
    unmount("-x", lazy=True)
    assert (tmp_path / "log").read_text().splitlines() == ["-u -- /mnt/web", "-u -z -- -x"]
    helper("echo 'fusermount3: failed to unmount /mnt/web: Device or resource busy' >&2; exit 1")
    with pytest.raises(MountBusy):
        unmount("/mnt/web")
    helper("echo 'fusermount3: something else' >&2; exit 1")
    with pytest.raises(AccessDenied):
        unmount("/mnt/web")


def test_a_missing_helper_is_an_error_for_a_person(
    helper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises((AccessDenied, FuseUnavailable), match="fusermount3"):
        unmount("/mnt/web")


# Who is in the way


def test_holders_are_named_with_what_they_have_open(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "website").write_text("x")
    place = str(tmp_path / "web")
    assert holders(place) == []
    with open(tmp_path / "website"):
        assert holders(place) == [], "a longer name is another place"
    (tmp_path / "web" / "disk.raw").write_text("x")
    with open(tmp_path / "web" / "disk.raw"):
        [found] = holders(place)
    name = Path("/proc/self/comm").read_text().strip()
    assert found == f"{name} (pid {os.getpid()}) has {place}/disk.raw"
    command = ["cat"]
    with subprocess.Popen(command, cwd=place, stdin=subprocess.PIPE) as process:
        assert holders(place) == [f"cat (pid {process.pid}) has {place}"]
        process.communicate()


def test_a_holder_whose_name_is_not_utf_8_is_named_too(tmp_path: Path) -> None:
    comm = Path(f"/proc/self/task/{os.getpid()}/comm")
    before = comm.read_bytes()
    (tmp_path / "disk.raw").write_text("x")
    try:
        comm.write_bytes(b"caf\xe9")
        with open(tmp_path / "disk.raw"):
            [found] = holders(str(tmp_path))
    finally:
        comm.write_bytes(before.rstrip(b"\n"))
    assert f"(pid {os.getpid()}) has {tmp_path}/disk.raw" in found


def test_no_more_than_ten_holders_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (3, 25):
        loops = [(f"/dev/loop{n}", f"{tmp_path}/{n}.raw") for n in range(count)]
        monkeypatch.setattr(mounts, "_loops", lambda place, loops=loops: list(loops))
        found = holders(str(tmp_path))
        assert found == [f"{device} is a loop device on {name}" for device, name in loops][:10]


def test_loop_devices_on_files_of_the_mount_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backing = {
        "loop0": "/mnt/web/a/b.raw",
        "loop1": "/mnt/website/x",
        "loop7": "/mnt/web/\udce9",
    }
    for name, file in backing.items():
        (tmp_path / name / "loop").mkdir(parents=True)
        (tmp_path / name / "loop" / "backing_file").write_bytes(os.fsencode(file) + b"\n")
    monkeypatch.setattr(
        mounts, "Path", lambda path: tmp_path if path == "/sys/block" else Path(path)
    )
    assert sorted(mounts._loops("/mnt/web")) == [
        ("/dev/loop0", "/mnt/web/a/b.raw"),
        ("/dev/loop7", "/mnt/web/\udce9"),
    ]
