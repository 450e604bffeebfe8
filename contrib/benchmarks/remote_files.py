"""The files of a guest on a remote disk, through a loop device: ``run remote --only files``."""

import time

from benchmarks.figures import MIB
from benchmarks.processes import BenchmarkError, guest_mounted
from benchmarks.remote_site import checksum, sums_of_files
from benchmarks.remote_works import Remote
from benchmarks.systems import Served, Vddkfs


def files(this: Remote, served: Served) -> None:
    """Read each file of the guest once, and compare what came with what was written.

    All is cold: the mount, the loop device and the guest's file system are new, and the kernel
    keeps nothing of any of these when it goes.
    """
    # Beside the mountpoints of the systems: what is there is taken away however the run ends.
    place = served.mount.parent / "guest"
    with guest_mounted(served.file, place, "loop,ro,noload", 120.0):
        begun = time.perf_counter()
        sums = sums_of_files(place)
        seconds = time.perf_counter() - begun
    if checksum(sums) != this.site.checksum:
        raise BenchmarkError("the files of the guest are not what was written")
    this.add(served.system.name, "files", seconds)
    if isinstance(served.system, Vddkfs):
        fetched = served.status()["cache"]["source_bytes"]
        this.add(served.system.name, "files-fetched", fetched / MIB)
