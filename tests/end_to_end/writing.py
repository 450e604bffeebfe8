"""What tests of writing share: opening for writing, refusals, and a look at content ids."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.mounting import Mount, Mounts, mounted, succeed, vddkfs


def opened(mount: Mount, name: str, flags: int = os.O_RDWR) -> int:
    """Open a file of the mount in its agent."""
    fd: int = mount.ask("open", mount.path(name), flags)
    return fd


def refused(mount: Mount, wanted: int, function: str, *arguments: Any) -> None:
    """See to it that a call fails with an errno."""
    with pytest.raises(OSError, match=r".") as caught:
        mount.ask(function, *arguments)
    assert caught.value.errno == wanted, caught.value


def not_writable(mount: Mount, *names: str) -> None:
    """See to it that files of the mount cannot be opened for writing, in any way."""
    for name in names:
        assert not mount.stat(name).st_mode & 0o222
        for flags in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_DIRECT):
            refused(mount, errno.EROFS, "open", mount.path(name), flags)


def put(mount: Mount, name: str, offset: int, data: bytes, flags: int = os.O_RDWR) -> None:
    """Open, write, close."""
    fd = opened(mount, name, flags)
    assert mount.ask("pwrite", fd, data, offset) == len(data)
    mount.ask("close", fd)


def no_mount(mounts: Mounts, source: Path | str, *options: str) -> tuple[int, str]:
    """Try to mount, which must fail in one line; return the exit code and that line."""
    place = mounts.folder / "refused"
    place.mkdir(exist_ok=True)
    done = vddkfs("mount", source, place, "-o", ",".join(options))
    assert done.returncode, "it is mounted"
    assert not mounted(place)
    [line] = done.stderr.splitlines()
    return done.returncode, line


def content_id(path: Path) -> str:
    """Return the content id in the descriptor of a VMDK."""
    found = re.search(rb"^CID=(\w+)", path.read_bytes()[:8192], re.M)
    assert found
    return found[1].decode()


@contextlib.contextmanager
def small_disk(place: Path, mib: int) -> Iterator[Path]:
    """Have a file system of so many MiB at *place*."""
    place.mkdir()
    succeed("mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", place)
    try:
        yield place
    finally:
        succeed("umount", place)
