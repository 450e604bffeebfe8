"""Fixtures of the library's tests: a real library, a real host process, clients in processes.

``conftest.py`` hands them on.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.simulator.disks import (
    SIZE,
    make_chain,
    make_vmdk,
    make_vmfs,
    noise,
    raw,
    sparse_noise,
    succeed,
)
from tests.simulator.kit import Kit, Kits, built

__all__ = ["able", "bare", "contents", "datastores", "kit", "kits"]


@pytest.fixture(scope="session")
def able() -> None:
    """Skip where the simulator cannot be built or its disks made, and say why."""
    tools = ("cc", "c++", "qemu-img", "qemu-io", "nm", "readelf")
    absent = [f"the tool {tool}" for tool in tools if shutil.which(tool) is None]
    if absent:
        pytest.skip(f"absent: {', '.join(absent)}")


@pytest.fixture(scope="session")
def datastores(able: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the disks of the registry, once."""
    top = tmp_path_factory.mktemp("datastores")
    for folder in ("ds1/web01", "ds1/plain", "ds2", "local1/local"):
        (top / folder).mkdir(parents=True)
    make_chain(top / "ds1/web01", "web01", sparse_noise("web01", SIZE))
    make_vmfs(top / "ds1/plain/plain.vmdk", noise("plain", SIZE))
    make_vmfs(top / "ds1/plain/thin.vmdk", sparse_noise("thin", SIZE), thin=True)
    make_vmdk(top / "ds1/plain/sparse.vmdk", sparse_noise("sparse", SIZE))
    make_vmfs(top / "local1/local/local.vmdk", noise("local", SIZE))
    return top


@pytest.fixture(scope="session")
def contents(datastores: Path) -> Callable[[str], bytes]:
    """Tell what qemu-img reads from a disk as it was made."""
    known: dict[str, bytes] = {}

    def content(path: str) -> bytes:
        store, _, rest = path[1:].partition("] ")
        if path not in known:
            known[path] = raw(datastores / store / rest)
        return known[path]

    return content


@pytest.fixture
def kits(datastores: Path, tmp_path: Path) -> Iterator[Kits]:
    """Make kits; what runs in them ends with the test."""
    made: list[Kit] = []

    def make(release: str = "8.0", sanitize: str = "", *, host: bool = True) -> Kit:
        kit = Kit(tmp_path / f"kit{len(made)}", built(release, sanitize))
        made.append(kit)
        stores = sorted(datastores.iterdir())
        succeed("cp", "-a", "--sparse=auto", *stores, kit.site)
        if host:
            kit.start()
        return kit

    yield make
    with ExitStack() as stack:
        for kit in made:
            stack.callback(kit.finish)
    for disk in tmp_path.rglob("*.vmdk"):
        disk.unlink()  # hundreds of them would fill the disk; the logs stay


@pytest.fixture
def kit(kits: Kits) -> Kit:
    """Return a kit of the newest release, its host running."""
    return kits()


@pytest.fixture
def bare(kits: Kits) -> Kit:
    """Return a kit of the newest release; no host runs."""
    return kits(host=False)
