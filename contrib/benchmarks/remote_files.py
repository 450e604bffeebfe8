"""The files of a guest on a remote disk, through a loop device: ``run remote --only files``."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import MIB
from benchmarks.processes import BenchmarkError, detach, run
from benchmarks.remote_site import checksum, sums_of_files
from benchmarks.remote_works import Remote
from benchmarks.systems import Served, Vddkfs


def files(this: Remote, served: Served) -> None:
    """Read each file of the guest once, and compare what came with what was written.

    All is cold: the mount, the loop device and the guest's file system are new, and the kernel
    keeps nothing of any of these when it goes.
    """
    with guest(served) as place:
        begun = time.perf_counter()
        sums = sums_of_files(place)
        seconds = time.perf_counter() - begun
    if checksum(sums) != this.site.checksum:
        raise BenchmarkError("the files of the guest are not what was written")
    this.add(served.system.name, "files", seconds)
    if isinstance(served.system, Vddkfs):
        fetched = served.status()["cache"]["source_bytes"]
        this.add(served.system.name, "files-fetched", fetched / MIB)


@contextlib.contextmanager
def guest(served: Served) -> Iterator[Path]:
    """Mount the file system of a served disk, read-only, while the block lasts."""
    # Beside the mountpoints of the systems: what is there is taken away however the run ends.
    place = served.mount.parent / "guest"
    place.mkdir(exist_ok=True)
    run(["mount", "-t", "ext4", "-o", "loop,ro,noload", served.file, place], timeout=120.0)
    try:
        yield place
        run(["umount", place], timeout=120.0)
    finally:
        with contextlib.suppress(OSError, BenchmarkError):
            if place.is_mount():
                detach(str(place))
