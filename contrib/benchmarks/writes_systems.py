"""What ``run writes`` compares: vddkfs writing to a base or to an overlay, peers, and a stub."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.material import Material
from benchmarks.remote_site import HELD, Site
from benchmarks.remote_systems import NbdfusePeer, QsdPeer, mount_command, url
from benchmarks.systems import Served, Stub, System, Vddkfs, vddkfs_command
from benchmarks.writes_metrics import LIMIT, PLAIN, STUB

PROFILE: Final = "lan"
_STUB: Final = Path(__file__).parent / "stub.py"


class BaseWriter(Vddkfs):
    """The product on the simulated server, with the base to be written."""

    title = "`vddkfs mount vddk://... -o rw,assume=powered-off`; in overlays: `-o overlay=DIR`"

    def __init__(self, mounts: Path, site: Site) -> None:
        super().__init__(mounts)
        self._site = site

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return the mount command."""
        held = HELD[material.name]
        source = url(held.moref, "", held.disks)
        return mount_command(self._site, source, mount, "rw", "assume=powered-off")


class WithoutOverlay(Vddkfs):
    """The product on a local disk, to be read only."""

    name = PLAIN
    title = "`vddkfs mount SOURCE MOUNTPOINT`, read only, of the disk that an overlay is for"


class WithOverlay(Vddkfs):
    """The product on a local disk, with an overlay in *folder*, which is new for each mount.

    The owner of the disk may write it, as of any that is no link below a snapshot: so force.
    """

    def __init__(self, mounts: Path, folder: Path) -> None:
        super().__init__(mounts)
        self._folder = folder

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return the mount command."""
        options = f"overlay={self._folder},overlay_force=yes"
        return [vddkfs_command(), "mount", material.leaf, mount, "-o", options]

    @contextlib.contextmanager
    def serving(self, material: Material) -> Iterator[Served]:
        """Show *material* with an overlay that has nothing in it, and is gone afterwards."""
        with _new_folder(self._folder), super().serving(material) as served:
            yield served


class WriteStub(Stub):
    """The same FUSE stack, with nothing but a file behind it."""

    name = STUB
    title = (
        "a pyfuse3 handler, in a session as that of vddkfs, that answers each write by a pwrite "
        "in a thread, to a file of the file system where the overlay is; close is fdatasync"
    )

    def __init__(self, mounts: Path, folder: Path) -> None:
        super().__init__(mounts)
        self._folder = folder

    def can(self, material: Material) -> bool:
        """Stand beside every disk."""
        return True

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return the stub's command; its file is new, and has no blocks yet."""
        file = self._folder / "file"
        with file.open("wb") as made:
            made.truncate(material.capacity)
        return [
            *(sys.executable, "-P", _STUB, mount, str(material.capacity), "session"),
            file,
        ]

    @contextlib.contextmanager
    def serving(self, material: Material) -> Iterator[Served]:
        """Show a file that is gone afterwards."""
        with _new_folder(self._folder), super().serving(material) as served:
            yield served


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Places:
    """Where a run has what: its mountpoints, and what is written on the disk of this machine."""

    mounts: Path
    overlay: Path


def writer(name: str, places: Places, site: Site) -> System:
    """Return the system *name* with the remote disk to be written."""
    if name == "vddkfs":
        return BaseWriter(places.mounts, site)
    peer = {"nbdfuse": NbdfusePeer, "qsd": QsdPeer}[name]
    return peer(places.mounts, PROFILE, read_ahead=False, writable=True)


TITLES: Final = {
    "vddkfs": BaseWriter.title,
    LIMIT: "`vixsim-limits --write`, a C client that does nothing else, with the configuration of "
    "vddkfs: one WriteAsync of 1 MiB after the other, 1 MiB eight deep, 4 KiB sixteen deep",
    "nbdfuse": "`nbdkit --filter=delay --filter=rate file FILE`, `nbdfuse DIR/disk.raw URI`",
    "qsd": "the same nbdkit, `qemu-storage-daemon --export type=fuse,writable=on`",
    PLAIN: WithoutOverlay.title,
    STUB: WriteStub.title,
}
