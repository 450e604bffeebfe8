"""The host process of the simulator, built for the tests of this folder."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulator.fixtures import able, bare, contents, datastores, kit, kits
from tests.simulator.host_client import Host, serving
from tests.simulator.host_site import can_make_loops, compile_host, detach_loops, make_site

__all__ = ["able", "bare", "contents", "datastores", "kit", "kits"]


@pytest.fixture(scope="session")
def host_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host alone, with sanitizers: every test also finds leaks and wild accesses."""
    if shutil.which("cc") is None:
        pytest.skip("absent: a C compiler")
    folder = tmp_path_factory.mktemp("host")
    return compile_host(folder)


@pytest.fixture(scope="session")
def site_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("qemu-img") is None:
        pytest.skip("absent: qemu-img")
    site = tmp_path_factory.mktemp("template")
    make_site(site)
    return site


@pytest.fixture
def site(site_template: Path, tmp_path: Path) -> Iterator[Path]:
    site = tmp_path / "site"
    shutil.copytree(site_template, site)
    yield site
    detach_loops(site)


@pytest.fixture
def host(host_program: Path, site: Path) -> Iterator[Host]:
    with serving(host_program, site) as host:
        yield host


@pytest.fixture
def loops() -> None:
    if not can_make_loops():
        pytest.skip("absent: loop devices, or the right to make them")
