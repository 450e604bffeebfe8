"""The simulator's kits, and a state folder of the test's own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.vddk.conftest import compiled
from tests.simulator.fixtures import able, datastores
from tests.simulator.fixtures import kits as linked_kits
from tests.simulator.kit import Kit, Kits
from vddkfs.doctor import examination

__all__ = ["able", "compiled", "datastores", "linked_kits"]

WriteCredentials = Callable[[str], str]


@pytest.fixture
def kits(linked_kits: Kits) -> Kits:
    """Make kits with libraries of their own, because the simulator looks where its library is."""

    def make(release: str = "8.0", sanitize: str = "", *, host: bool = True) -> Kit:
        kit = linked_kits(release, sanitize, host=host)
        (kit.path / "lib64").unlink()
        shutil.copytree(kit.build / "lib64", kit.path / "lib64", symlinks=True)
        return kit

    return make


@pytest.fixture
def kit(kits: Kits) -> Kit:
    """Return a kit of the newest release, its host running."""
    return kits()


@pytest.fixture
def bare(kits: Kits) -> Kit:
    """Return a kit of the newest release; no host runs."""
    return kits(host=False)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(examination, "state_folder", lambda create=False: folder)
    return folder


@pytest.fixture
def credentials(tmp_path: Path) -> WriteCredentials:
    """Write a credentials file, and return its path."""

    def write(password: str) -> str:
        path = tmp_path / "credentials"
        path.touch(mode=0o600)
        path.write_text(f"user=backup\npassword={password}\n")
        return str(path)

    return write
