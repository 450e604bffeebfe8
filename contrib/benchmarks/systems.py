"""What is compared: each shows one disk as one raw file while its ``serving`` block lasts."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.material import Material
from benchmarks.processes import (
    BenchmarkError,
    descendants,
    detach,
    end,
    is_alive,
    mounts_below,
    run,
    start,
    until,
)

START_SECONDS: Final = 60.0
END_SECONDS: Final = 10.0
_HERE: Final = Path(__file__).parent


@dataclass(frozen=True)
class Served:
    """A disk that a system shows."""

    system: "System"
    material: Material
    mount: Path
    """The mountpoint; of a system that mounts on a file, the same as *file*."""
    file: Path
    """The raw file to read."""
    seconds_to_stat: float
    """From the command to the first stat that shows the file."""
    seconds_to_read: float
    """From the command to the first 4 KiB read."""
    daemon: int
    """The process that serves, and whose children do."""

    def pids(self) -> list[int]:
        """Return the processes that serve."""
        return [self.daemon, *descendants(self.daemon)]

    def status(self) -> dict[str, Any]:
        """Return what the mount of vddkfs tells of itself."""
        # Through another process, which can be ended if the mount does not answer.
        text = run(["cat", self.mount / ".vddkfs" / "status.json"], timeout=END_SECONDS)
        status: dict[str, Any] = json.loads(text)
        return status


class System(ABC):
    """One way to show a disk. *name* is what tables call it."""

    name = ""
    title = ""
    knows_holes = True

    def __init__(self, mounts: Path) -> None:
        self._mounts = mounts
        self._log = mounts.parent / f"{self.name}.log"
        self._refused = ""

    def can(self, material: Material) -> bool:
        """Say whether the system can show that."""
        return True

    def file(self, mount: Path, material: Material) -> Path:
        """Return where the raw file will be, and make what the mount needs."""
        mount.mkdir(exist_ok=True)
        return mount / "disk.raw"

    @abstractmethod
    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return the command that mounts; it serves in front, unless ``served`` knows better."""

    def unmount(self, served: Served) -> None:
        """Unmount in good order, as the manual of the system says."""
        run(["fusermount3", "-u", served.mount], timeout=END_SECONDS)

    def served(self, given: Served) -> Served:
        """Return *given*, amended by what is known only once it serves."""
        return given

    @contextlib.contextmanager
    def serving(self, material: Material) -> Iterator[Served]:
        """Show *material*; end the system, by force if need be, when the block ends."""
        mount = self._mounts / self.name
        file = self.file(mount, material)
        self._log.unlink(missing_ok=True)
        command = self.command(mount, material)
        begun = time.perf_counter()
        process = start(command, self._log)
        served = None
        # A mount that never answers would hold this process; without its daemon it fails.
        watchdog = threading.Timer(START_SECONDS, lambda: end(descendants(os.getpid()), 0.1))
        watchdog.start()
        try:
            to_stat = self._until_there(process, file, material.capacity, begun)
            with file.open("rb", buffering=0) as opened:
                opened.read(4096)
            to_read = time.perf_counter() - begun
            served = self.served(Served(self, material, mount, file, to_stat, to_read, process.pid))
            watchdog.cancel()
            yield served
            pids = served.pids()
            if not until(lambda: self._unmounted(served), END_SECONDS, pause=0.2):
                words = self._last_words() or self._refused
                raise BenchmarkError(f"{self.name}: cannot be unmounted: {words}")
            if not until(lambda: not any(map(is_alive, pids)), END_SECONDS):
                raise BenchmarkError(f"{self.name}: does not end")
        finally:
            watchdog.cancel()
            pids = [process.pid, *descendants(process.pid)]
            end(pids + (served.pids() if served else []), patience=2.0)
            process.wait()
            # Others may be mounted beside it.
            for place in mounts_below(self._mounts):
                if Path(place).is_relative_to(mount):
                    detach(place)

    def _unmounted(self, served: Served) -> bool:
        """Try; a mount that was read a moment ago may still be busy."""
        try:
            self.unmount(served)
        except BenchmarkError as error:
            self._refused = str(error)
            return False
        return True

    def _until_there(
        self, process: subprocess.Popen[bytes], file: Path, size: int, begun: float
    ) -> float:
        while True:
            now = time.perf_counter()
            with contextlib.suppress(OSError):
                if file.stat().st_size == size:
                    return time.perf_counter() - begun
            if now - begun > START_SECONDS or process.poll():
                raise BenchmarkError(f"{self.name}: does not serve: {self._last_words()}")
            time.sleep(0.002)

    def _last_words(self) -> str:
        text = self._log.read_text("utf-8", "replace") if self._log.exists() else ""
        return " / ".join(text.strip().splitlines()[-3:])


class Vddkfs(System):
    """The product, as an operator calls it: in the background, default options."""

    name = "vddkfs"
    title = "`vddkfs mount SOURCE MOUNTPOINT`, default options"

    def file(self, mount: Path, material: Material) -> Path:
        """Return the disk.raw of the material's disk."""
        mount.mkdir(exist_ok=True)
        return mount / material.disk / "disk.raw"

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return the mount command; it ends when the mount answers."""
        source = material.leaf.parent if material.name == "hung" else material.leaf
        options = ["-o", ",".join(material.options)] if material.options else []
        return [vddkfs_command(), "mount", source, mount, *options]

    def served(self, given: Served) -> Served:
        """Return the mount with its daemon in place of the command."""
        return replace(given, daemon=int(given.status()["pid"]))

    def unmount(self, served: Served) -> None:
        """Unmount with the product's own command, which waits for the daemon's end."""
        run([vddkfs_command(), "umount", served.mount], timeout=END_SECONDS)


class QemuStorageDaemon(System):
    """qemu-storage-daemon's own FUSE export; it mounts on a file."""

    name = "qsd"
    title = "`qemu-storage-daemon --export type=fuse`"

    def file(self, mount: Path, material: Material) -> Path:
        """Return the file that it mounts on."""
        mount.touch()
        return mount

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return the daemon's command; it finds the parents of a delta by itself."""
        protocol = {"driver": "file", "node-name": "file", "filename": str(material.leaf)}
        format_ = {"driver": "vmdk", "node-name": "disk", "file": "file"}
        read_only = {"read-only": True}
        export = {"type": "fuse", "id": "export", "node-name": "disk", "writable": False}
        return [
            "qemu-storage-daemon",
            *("--blockdev", json.dumps(protocol | read_only)),
            *("--blockdev", json.dumps(format_ | read_only)),
            *("--export", json.dumps(export | {"mountpoint": str(mount)})),
        ]

    def unmount(self, served: Served) -> None:
        """End the daemon, which unmounts: without its mount it would spin on."""
        end([served.daemon], patience=END_SECONDS)


class Nbdfuse(System):
    """nbdfuse over a qemu-nbd that it starts itself, as its manual shows: one connection."""

    name = "nbdfuse"
    title = "`nbdfuse DIR/disk.raw [ qemu-nbd -r -f vmdk FILE ]`"
    knows_holes = False

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return the command in its form with socket activation."""
        server: list[str | Path] = ["qemu-nbd", "-r", "-f", "vmdk", material.leaf]
        return ["nbdfuse", "-r", mount / "disk.raw", "[", *server, "]"]


class NbdfuseFour(Nbdfuse):
    """nbdfuse with its four connections to a qemu-nbd on a socket."""

    name = "nbdfuse-4"
    title = "`qemu-nbd -r -f vmdk -t -e 4 -k SOCKET FILE`, `nbdfuse DIR/disk.raw nbd+unix:...`"

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return a shell that runs both, so that they begin and end together."""
        script = (
            'qemu-nbd -r -f vmdk -t -e 4 -k "$1" "$2" & '
            'while [ ! -S "$1" ]; do sleep 0.005; done; '
            'nbdfuse -r "$3" "nbd+unix:///?socket=$1"; kill $!; wait'
        )
        socket = mount.parent.parent / "nbd.sock"
        socket.unlink(missing_ok=True)
        return ["sh", "-c", script, "sh", socket, material.leaf, mount / "disk.raw"]


class Stub(System):
    """The limit of the stack: the session of vddkfs with nothing behind it."""

    name = "stub"
    title = "a pyfuse3 handler, in a session as that of vddkfs, that answers from one hot buffer"
    how = "session"

    def can(self, material: Material) -> bool:
        """One disk is like the other without any data: only one is worth a look."""
        return material.name == "base"

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return the stub's command."""
        return [sys.executable, "-P", _HERE / "stub.py", mount, str(material.capacity), self.how]


class StubPlain(Stub):
    """The same without what vddkfs changes in how pyfuse3 waits for requests."""

    name = "stub-plain"
    title = "the same, in pyfuse3's own main loop"
    how = "plain"


def vddkfs_command() -> Path:
    """Return the vddkfs command of the Python that runs this."""
    return Path(sys.executable).parent / "vddkfs"


SYSTEMS: Final[dict[str, type[System]]] = {
    system.name: system
    for system in (Vddkfs, QemuStorageDaemon, Nbdfuse, NbdfuseFour, Stub, StubPlain)
}
DEFAULT_SYSTEMS: Final = ("vddkfs", "qsd", "nbdfuse", "stub")
