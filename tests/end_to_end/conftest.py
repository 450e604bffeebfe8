"""Real mounts through the installed command. They need root, /dev/fuse and qemu-img."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.mounting import COMMAND, Mounts
from tests.end_to_end.remote import contents, datastores, kits, proxies, proxy, scsi_disk

__all__ = ["contents", "datastores", "kits", "proxies", "proxy", "scsi_disk"]


def _absent() -> str:
    """Say what a mount needs and is not there."""
    absent = []
    if not COMMAND.exists():
        absent.append(f"the installed command {COMMAND.name} (run contrib/setup)")
    if os.geteuid() != 0:
        absent.append("root (these tests mount, kill and change users)")
    if not os.path.exists("/dev/fuse"):
        absent.append("/dev/fuse")
    tools = ("qemu-img", "qemu-io", "sfdisk", "setpriv", "unshare", "dd", "cp")
    absent += [f"the tool {tool}" for tool in tools if shutil.which(tool) is None]
    return ", ".join(absent)


@pytest.fixture(scope="session")
def able() -> None:
    """Skip where no mount can be made, and say why."""
    absent = _absent()
    if absent:
        pytest.skip(f"absent: {absent}")


@pytest.fixture(scope="session")
def loops(able: None) -> None:
    """Skip where no loop device can be had."""
    done = subprocess.run(["losetup", "--find"], capture_output=True, text=True, timeout=20)
    if done.returncode or not os.path.exists(done.stdout.strip()):
        pytest.skip(f"absent: a free loop device ({done.stderr.strip() or 'no device node'})")


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


def _making(request: pytest.FixtureRequest, folder: Path) -> Iterator[Mounts]:
    mounts = Mounts(folder)
    yield mounts
    failed = request.node.stash.get(FAILED, False)
    if failed:
        for mount in mounts.made:
            lines = mount.log.read_text().splitlines() if mount.log.exists() else ["none"]
            print(f"log of the daemon at {mount.place}:", *lines[-20:], sep="\n")
    mounts.finish(judge=not failed)


@pytest.fixture
def mount(request: pytest.FixtureRequest, able: None, tmp_path: Path) -> Iterator[Mounts]:
    """Make mounts; they are taken down and judged at the end."""
    yield from _making(request, tmp_path)


@pytest.fixture
def vm(able: None, tmp_path: Path) -> Path:
    """Return an empty folder for a VM."""
    folder = tmp_path / "vm"
    folder.mkdir()
    return folder


@pytest.fixture
def public() -> Iterator[Path]:
    """Return a folder that every user may look into, as pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="vddkfs-test.") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture
def public_mount(request: pytest.FixtureRequest, able: None, public: Path) -> Iterator[Mounts]:
    """Make mounts that other users can reach."""
    yield from _making(request, public)
