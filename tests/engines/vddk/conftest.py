"""A stub of libvixDiskLib, compiled for these tests from stub.c, and kits made of it.

And workers on the simulator, for the tests of what VDDK is known to do.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.vddk.workers import Worker, Workers
from tests.simulator.fixtures import able, bare, contents, datastores, kits
from tests.simulator.kit import Kit as Simulator
from tests.simulator.kit import Kits
from vddkfs.engines.vddk.connection import Connection
from vddkfs.engines.vddk.handle import Handle
from vddkfs.engines.vddk.kit import Kit, find_kit
from vddkfs.engines.vddk.layouts import OpenFlag
from vddkfs.engines.vddk.library import Library
from vddkfs.engines.vddk.params import ConnectSpec

__all__ = ["able", "bare", "contents", "datastores", "kits"]

SOURCE = Path(__file__).with_name("stub.c")

Compile = Callable[..., Path]
MakeKit = Callable[..., Kit]


def compile_c(source: Path, target: Path, *flags: str) -> Path:
    """Compile one shared library."""
    command = ["cc", "-std=gnu11", "-O1", "-shared", "-fPIC", "-o", str(target), str(source)]
    subprocess.run([*command, *flags], check=True, capture_output=True, timeout=60)
    return target


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Return a function that compiles the stub, each variant once."""
    folder = tmp_path_factory.mktemp("stubs")
    done: dict[tuple[str, ...], Path] = {}

    def compile_stub(*flags: str) -> Path:
        if flags not in done:
            target = folder / f"{len(done)}.so"
            done[flags] = compile_c(SOURCE, target, *flags, "-pthread")
        return done[flags]

    return compile_stub


@pytest.fixture
def make_kit(tmp_path: Path, compiled: Compile) -> MakeKit:
    """Return a function that makes a kit with a file of its own, so that each test loads anew."""

    def make(release: str = "7.0.3", *flags: str) -> Kit:
        numbers = (release + ".0.0").split(".")
        stub = compiled(f"-DRELEASE={numbers[0]}{numbers[1]}{numbers[2]}", *flags)
        folder = tmp_path / f"kit-{len(list(tmp_path.iterdir()))}" / "lib64"
        folder.mkdir(parents=True)
        real = folder / f"libvixDiskLib.so.{release}"
        shutil.copy(stub, real)
        if real.name != f"libvixDiskLib.so.{numbers[0]}":
            (folder / f"libvixDiskLib.so.{numbers[0]}").symlink_to(real.name)
        return find_kit(str(folder.parent))

    return make


class Bench:
    """A library in use: what it logs, and what it was traced to do."""

    def __init__(self, kit: Kit) -> None:
        self.lines: list[tuple[str, str]] = []
        self.traced: list[tuple[str, int, int]] = []
        self.library = Library(
            kit,
            log=lambda level, text: self.lines.append((level, text)),
            trace=lambda name, _, moved, result: self.traced.append((name, moved, result)),
        )

    def start(self) -> "Bench":
        self.library.init()
        return self

    def connect(self, spec: ConnectSpec | None = None) -> Connection:
        return Connection(self.library, spec or ConnectSpec())

    def open(self, path: str, flags: OpenFlag = OpenFlag.READ_ONLY) -> Handle:
        return Handle(self.connect(), path, flags)

    def said(self, beginning: str) -> list[str]:
        return [text for _, text in self.lines if text.startswith(beginning)]


@pytest.fixture
def bench(make_kit: MakeKit) -> Iterator[Bench]:
    """An initialised stub of release 7.0.3."""
    made = Bench(make_kit()).start()
    yield made
    made.library.exit()


@pytest.fixture
def kit(kits: Kits) -> Simulator:
    """Return the simulator with its host running, and files of its own.

    vddkfs loads the real file of the library, which looks for the sites beside itself.
    """
    made = kits()
    (made.path / "lib64").unlink()
    shutil.copytree(made.build / "lib64", made.path / "lib64", symlinks=True)
    return made


@pytest.fixture
def workers(kit: Simulator) -> Iterator[Workers]:
    """Return a function that starts a worker for the kit; it ends with the test."""
    made: list[Worker] = []

    def make(patch: str = "", login: str = "") -> Worker:
        made.append(Worker(kit, patch, login))
        return made[-1]

    yield make
    for worker in made:
        worker.finish()
