"""Recording what real readers of a mounted guest ask for: the traces of ``run eviction``."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks import guest
from benchmarks.guest import MIB, Size
from benchmarks.material import Material
from benchmarks.processes import BenchmarkError, end, guest_mounted, run, start
from benchmarks.systems import Served, Vddkfs

TITLES: Final = {
    "boot": "files of the guest at random, a few of them often",
    "dd": "`dd` of the whole disk",
    "md5sum": "`find | xargs md5sum` in the guest",
    "backup": "all files of the guest, then their metadata, then a third of the files again",
    "both": "boot, and meanwhile dd of the same disk again and again",
    "both-2-disks": "boot, and meanwhile dd of another disk, in one cache",
}
_SECONDS: Final = 300.0
"""After which a reader is taken to hang."""
_PAUSE: Final = 1.0
"""Seconds between one reading of a whole disk and the next."""
_HERE: Final = Path(__file__).parent
_NAMES: Final = ("one", "two")


class TracedVddkfs(Vddkfs):
    """vddkfs in front, its daemon writing a trace; it shows the frozen images of both disks."""

    name = "traced"

    def __init__(self, mounts: Path, trace: Path) -> None:
        super().__init__(mounts)
        self.trace = trace
        self._log = trace.with_suffix(".log")

    def file(self, mount: Path, material: Material) -> Path:
        """Return the frozen image: its content is kept however often its file is opened."""
        mount.mkdir(exist_ok=True)
        return image(mount, material.disk)

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return the mount command, in a process that records."""
        traced = (sys.executable, "-P", _HERE / "traced.py", self.trace)
        return [*traced, "mount", "-f", material.leaf.parent, mount]


def image(mount: Path, disk: str) -> Path:
    """Return the frozen image of *disk*."""
    return mount / disk / "chain" / "0.raw"


class Recorder:
    """Makes the disks in *folder*, and records one trace on each mount."""

    def __init__(self, folder: Path, mounts: Path, size: Size) -> None:
        self._folder = folder
        self._mounts = mounts
        self._size = size
        self._material: Material | None = None

    def make(self) -> None:
        """Make the disks. Raises BenchmarkError, OSError."""
        self._folder.mkdir(parents=True)
        leaves = [guest.make_disk(self._folder, self._size, name) for name in _NAMES]
        files = tuple(self._folder.glob("*.vmdk"))
        self._material = Material("guest", leaves[0], files, self._size.disk * MIB, _NAMES[0])

    def record(self, name: str) -> Path:
        """Record one of TITLES, and return the file. Raises BenchmarkError, OSError."""
        assert self._material is not None
        system = TracedVddkfs(self._mounts, self._folder / "trace.tsv")
        with system.serving(self._material) as served:
            # Finding out that the mount is there has read the first pages.
            _forget(served.file)
            _WORKS[name](self, served)
        return system.trace

    def _mounted(self, served: Served) -> contextlib.AbstractContextManager[Path]:
        return guest_mounted(served.file, self._mounts / "guest", "ro,loop", 60.0)

    def boot(self, served: Served) -> None:
        """Read files at random."""
        with self._mounted(served) as place:
            _reader("boot", place, served.file, str(self._size.reads))

    def dd(self, served: Served) -> None:
        """Read the whole disk."""
        _dd(served.file)

    def md5sum(self, served: Served) -> None:
        """Read each file once, in the order in which the file system lists them."""
        # dd without a count tells the kernel to forget the file.
        forget = 'dd if="$0" iflag=nocache count=0 status=none'
        batch = f'md5sum "$@" >/dev/null; {forget}'
        script = 'cd "$1" && find . -type f -print0 | xargs -0 -n 100 sh -c "$2" "$0"'
        with self._mounted(served) as place:
            run(["sh", "-c", script, served.file, place, batch], timeout=_SECONDS)

    def backup(self, served: Served) -> None:
        """Read all files, look at all of them, read the changed ones."""
        with self._mounted(served) as place:
            _reader("walk", place, served.file)
        _forget(served.file)
        with self._mounted(served) as place:
            run(["find", place, "-ls"], timeout=_SECONDS)
        _forget(served.file)
        with self._mounted(served) as place:
            _reader("walk", place, served.file, "changed")

    def both(self, served: Served, disk: str = _NAMES[0]) -> None:
        """Boot, and read all of *disk* again and again until that is through."""
        log = self._folder / "boot.log"
        with self._mounted(served) as place:
            boot = start(_words("boot", place, served.file, str(self._size.reads)), log)
            try:
                while boot.poll() is None:
                    _dd(image(served.mount, disk))
                    time.sleep(_PAUSE)
            finally:
                if boot.returncode is None:
                    end([boot.pid], patience=0.5)
            if boot.returncode:
                words = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
                raise BenchmarkError(f"the guest's reader failed: {' '.join(words)}")


def _words(what: str, place: Path, raw: Path, *more: str) -> list[str | Path]:
    return [sys.executable, "-P", "-m", "benchmarks.guest", what, place, raw, *more]


def _reader(what: str, place: Path, raw: Path, *more: str) -> None:
    run(_words(what, place, raw, *more), timeout=_SECONDS)


def _dd(file: Path) -> None:
    """Read all of *file*, and have the kernel forget it."""
    source = [f"if={file}", "iflag=nocache", "of=/dev/null", "bs=1M", "status=none"]
    run(["dd", *source], timeout=_SECONDS)


def _forget(file: Path) -> None:
    run(["dd", f"if={file}", "iflag=nocache", "count=0", "status=none"], timeout=60.0)


_WORKS: Final[dict[str, Callable[[Recorder, Served], None]]] = {
    "boot": Recorder.boot,
    "dd": Recorder.dd,
    "md5sum": Recorder.md5sum,
    "backup": Recorder.backup,
    "both": Recorder.both,
    "both-2-disks": lambda self, served: self.both(served, _NAMES[1]),
}
