"""Nothing of the mount can be changed, and nobody but the owner sees it unless let in."""

import errno
import os
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mount, Mounts, sha256
from tests.end_to_end.users import NOBODY, as_nobody
from tests.end_to_end.vms import KIB, MIB, make_chain, make_vmdk, noise, raw


@pytest.fixture
def web(mount: Mounts, vm: Path) -> Mount:
    make_chain(vm, links=2, size=MIB)
    return mount(vm)


DISK = "web/disk.raw"
CHANGES = {
    "open for writing": ("open", DISK, os.O_WRONLY),
    "open for both": ("open", DISK, os.O_RDWR),
    "open for writing past the cache": ("open", DISK, os.O_RDWR | os.O_DIRECT),
    "open to truncate": ("open", DISK, os.O_RDWR | os.O_TRUNC),
    "open the base": ("open", "web/chain/0.raw", os.O_RDWR),
    "open a document": ("open", "vm.json", os.O_RDWR),
    "create": ("open", "web/new", os.O_CREAT | os.O_WRONLY),
    "create in the root": ("open", "new", os.O_CREAT | os.O_EXCL | os.O_RDWR),
    "truncate": ("truncate", DISK, 0),
    "truncate to its size": ("truncate", DISK, MIB),
    "chmod": ("chmod", DISK, 0o644),
    "chmod the root": ("chmod", "", 0o755),
    "chown": ("chown", DISK, 1, 1),
    "utime": ("utime", DISK, (1, 1)),
    "mkdir": ("mkdir", "web/new"),
    "mknod": ("mknod", "web/new"),
    "mkfifo": ("mkfifo", "new"),
    "unlink": ("unlink", DISK),
    "unlink a document": ("unlink", "vm.json"),
    "rmdir": ("rmdir", "web/partitions"),
    "symlink": ("symlink", "/etc/passwd", "web/new"),
    "rename": ("rename", DISK, "web/new.raw"),
    "rename a folder": ("rename", "web", "www"),
    "link": ("link", DISK, "web/new.raw"),
    "setxattr": ("setxattr", DISK, "user.vddkfs.capacity", b"1"),
    "setxattr of another": ("setxattr", DISK, "user.other", b"1"),
    "removexattr": ("removexattr", DISK, "user.vddkfs.capacity"),
}


def test_nothing_can_be_changed(web: Mount) -> None:
    found = {}
    for asked, (function, *words) in CHANGES.items():
        arguments = [
            web.path(word)
            if isinstance(word, str) and not word.startswith(("/", "user."))
            else word
            for word in words
        ]
        try:
            web.ask(function, *arguments)
        except OSError as error:
            found[asked] = errno.errorcode[error.errno]
        else:
            found[asked] = "no error"
    assert found == dict.fromkeys(CHANGES, "EROFS")


def test_writable_is_denied_to_who_asks(web: Mount) -> None:
    assert web.ask("access", web.path(DISK), os.R_OK)
    assert not web.ask("access", web.path(DISK), os.W_OK)


def test_attributes(web: Mount) -> None:
    def attribute(name: str, key: str) -> str:
        value: bytes = web.ask("getxattr", web.path(name), f"user.vddkfs.{key}")
        return value.decode()

    assert attribute(DISK, "capacity") == str(MIB)
    assert attribute(DISK, "policy") == "close-to-open"
    assert attribute("web/chain/0.raw", "policy") == "immutable"
    assert attribute(DISK, "transport") == "file"
    assert attribute("web/chain/0.raw", "link").endswith("/web.vmdk")
    for name in (DISK, "web/chain/0.raw", "vm.json", "web", ""):
        assert web.ask("listxattr", web.path(name)) == []
    for key in ("user.vddkfs.nothing", "user.other", "security.capability"):
        with pytest.raises(OSError, match="No data") as caught:
            web.ask("getxattr", web.path(DISK), key)
        assert caught.value.errno == errno.ENODATA


def test_others_are_refused(public_mount: Mounts, vm: Path) -> None:
    make_vmdk(vm / "a.vmdk", noise("a", MIB))
    # Modes that would let others in are not enough: the mount itself keeps them out.
    found = public_mount(vm, "umask=022")
    for command in (
        ("ls", found.place),
        ("cat", found.path("a/disk.raw")),
        ("cat", found.path("vm.json")),
        ("stat", found.path("a")),
    ):
        done = as_nobody(*command)
        assert done.returncode != 0
        assert "Permission denied" in done.stderr


def test_others_are_let_in(public_mount: Mounts, vm: Path, public: Path) -> None:
    path = make_vmdk(vm / "a.vmdk", noise("a", MIB))
    found = public_mount(vm, "allow_other", "umask=022")
    assert as_nobody("ls", found.path("a/chain")).stdout.split() == ["0.raw"]
    done = as_nobody("sha256sum", found.path("a/disk.raw"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == sha256(raw(path))
    dd = ("dd", f"if={found.path('a/disk.raw')}", f"bs={64 * KIB}", "iflag=direct", "of=/dev/null")
    assert as_nobody(*dd).returncode == 0


def test_modes_count_for_others_who_are_let_in(public_mount: Mounts, vm: Path) -> None:
    make_vmdk(vm / "a.vmdk", noise("a", MIB))
    found = public_mount(vm, "allow_other", "umask=077")
    for command in (("ls", found.place), ("cat", found.path("a/disk.raw"))):
        done = as_nobody(*command)
        assert done.returncode != 0
        assert "Permission denied" in done.stderr


def test_owner_by_option_may_read(public_mount: Mounts, vm: Path) -> None:
    path = make_vmdk(vm / "a.vmdk", noise("a", MIB))
    found = public_mount(vm, "allow_other", f"uid={NOBODY}", f"gid={NOBODY}")
    done = as_nobody("sha256sum", found.path("a/disk.raw"))
    assert done.stdout.split()[0] == sha256(raw(path))
