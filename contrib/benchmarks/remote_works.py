"""The pieces of work of ``run remote`` on noise: reads, lost workers, many disks, many mounts."""

import concurrent.futures
import contextlib
import hashlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.figures import MIB, REMOTE_DEPTHS, Figures
from benchmarks.processes import BenchmarkError, cpu_ticks, run
from benchmarks.remote_site import (
    FOUR,
    MANY,
    SESSIONS,
    SMALL,
    Site,
    small_disks,
    small_snapshot,
    small_vm,
)
from benchmarks.remote_systems import DEFAULT_LIMIT, mount_command, of_system, url
from benchmarks.systems import Served, vddkfs_command
from benchmarks.works import Pace, fio

GIB: Final = 1024 * MIB
LIMIT_SECONDS: Final = 2.0
"""For each workload of the C client; a quarter of that for --quick."""
KILLS: Final = 10
_MOUNTING: Final = 4
"""Mount commands at once: more are no faster on few processors."""
_MOUNT_SECONDS: Final = 120.0
_READ_SECONDS: Final = 300.0
_PROBE: Final = Path(__file__).parent / "probe.py"


@dataclass(frozen=True)
class Remote:
    """One round in one profile: where its values go, or None while it only warms up."""

    site: Site
    profile: str
    figures: Figures | None
    pace: Pace
    limit_seconds: float

    def add(self, system: str, metric: str, value: float) -> None:
        """Note a value of *system* in this profile."""
        if self.figures is not None:
            self.figures.add(f"remote.{self.profile}.{metric}", system, value)


def limits(this: Remote, name: str) -> None:
    """Have the C client say what the profile gives."""
    found = this.site.limits(this.profile, this.limit_seconds, tuned=name != DEFAULT_LIMIT)
    sequential = found["sequential read 1 MiB", 8]
    this.add(name, "sequential", sequential["bytes_per_s"] / MIB)
    for depth in REMOTE_DEPTHS:
        this.add(name, f"random-{depth}", found["random read 4 KiB", depth]["requests_per_s"])


def has_own_limit(profile: str) -> bool:
    """Say whether the library's own buffers give another limit than those of vddkfs."""
    return profile == "nbdssl"


def reads(this: Remote, served: Served) -> None:
    """Read the whole file once, buffered and cold; then 4 KiB past the kernel's page cache."""
    name = served.system.name
    serving = of_system(served)
    capacity = served.material.capacity
    before = _cpu_seconds(serving)
    begun = time.perf_counter()
    run(["dd", f"if={served.file}", "of=/dev/null", "bs=1M", "status=none"])
    this.add(name, "sequential", capacity / MIB / (time.perf_counter() - begun))
    # A worker may have started meanwhile; it began at nothing.
    this.add(name, "cpu", (_cpu_seconds(of_system(served)) - before) * GIB / capacity)
    if name == "stub":
        return
    for depth in REMOTE_DEPTHS:
        before = _cpu_seconds(of_system(served))
        result = fio(served.file, (0, capacity), this.pace, depth)
        used = _cpu_seconds(of_system(served)) - before
        this.add(name, f"random-{depth}", result.iops)
        if depth == 16:
            # The ramp's reads are not counted by fio, but took their time.
            seconds = this.pace.random + this.pace.ramp
            this.add(name, "cpu-16", 1e6 * used / (result.iops * seconds))


def buffered(this: Remote, served: Served) -> None:
    """Read 4 KiB at random places, by one reader and by several, buffered and cold."""
    part = served.material.capacity // 2
    for number, readers in enumerate((1, 16)):
        result = fio(served.file, (number * part, part), this.pace, readers, buffered=True)
        this.add(served.system.name, f"buffered-{readers}", result.iops)


def _cpu_seconds(pids: list[int]) -> float:
    return sum(map(sum, map(cpu_ticks, pids))) / os.sysconf("SC_CLK_TCK")


# Four disks at once.


def four_limits(this: Remote, name: str) -> None:
    """Have the C client read four disks of one host at once."""
    found = this.site.limits(this.profile, this.limit_seconds, material="four")
    this.add(name, "four", found["sequential read 1 MiB", 8]["bytes_per_s"] / MIB)


def four(this: Remote, served: Served) -> None:
    """Read each of four disks with a reader of its own, all at once, buffered and cold."""
    files = [served.mount / name / "disk.raw" for name in FOUR]
    for file in files:
        # Their workers start at the first read, which is not what is measured.
        run(["dd", f"if={file}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"], 60.0)
    capacity = served.material.capacity
    gate = threading.Barrier(len(files))
    begun = time.perf_counter()
    with _pool(len(files)) as pool:
        seconds = list(pool.map(lambda file: _read_all(file, gate), files))
    taken = time.perf_counter() - begun
    this.add(served.system.name, "four", len(files) * capacity / MIB / taken)
    this.add(served.system.name, "four-even", min(seconds) / max(seconds))


def _read_all(file: Path, gate: threading.Barrier) -> float:
    gate.wait(_MOUNT_SECONDS)
    begun = time.perf_counter()
    run(["dd", f"if={file}", "of=/dev/null", "bs=1M", "status=none"], timeout=_READ_SECONDS)
    return time.perf_counter() - begun


# A worker is lost.


def kills(figures: Figures, served: Served) -> None:
    """Kill the worker again and again under a reader, and see how long that reads nothing."""
    figures.add("remote.kill.start", "vddkfs", served.seconds_to_read - served.seconds_to_stat)
    stalls = []
    for _ in range(KILLS):
        worker = served.status()["disks"][0]["workers"][0]["pid"]
        if worker is None:
            raise BenchmarkError("there is no worker to kill")
        said = run([sys.executable, "-P", _PROBE, "kill", served.file, str(worker)], timeout=60.0)
        stalls.append(float(said))
    figures.add("remote.kill.direct", "vddkfs", max(stalls))
    figures.add("remote.kill.direct.median", "vddkfs", statistics.median(stalls))
    counted = served.status()["disks"][0]["workers"][0]["restarts"]
    if counted != KILLS:
        raise BenchmarkError(f"{KILLS} workers were killed, {counted} restarts counted")


# Many mounts.


def many(figures: Figures, site: Site, mounts: Path) -> None:
    """Mount MANY VMs of two disks, read all disks at once, and compare what came."""
    places = [mounts / f"many{number}" for number in range(MANY)]
    try:
        _mount_and_read(figures, site, places)
    except Exception:
        _unmount_all(places)
        raise
    # Ctrl-C does not come by here: the run ends all of them at once.
    left = _unmount_all(places)
    if left:
        raise BenchmarkError(f"{len(left)} mounts cannot be unmounted: {left[0]}")


def _mount_and_read(figures: Figures, site: Site, places: list[Path]) -> None:
    begun = time.perf_counter()
    with _pool(_MOUNTING) as pool:
        list(pool.map(lambda n: _mount(site, n, places[n]), range(MANY)))
    figures.add("remote.many.mount", "vddkfs", time.perf_counter() - begun)
    jobs = [(places[n], disk) for n in range(MANY) for disk in small_disks(n)]
    gate = threading.Barrier(len(jobs))
    begun = time.perf_counter()
    with _pool(len(jobs)) as pool:
        seconds = list(pool.map(lambda job: _read_small(site, job[0], job[1], gate), jobs))
    figures.add("remote.many.read", "vddkfs", time.perf_counter() - begun)
    figures.add("remote.many.median", "vddkfs", statistics.median(seconds))
    figures.add("remote.many.longest", "vddkfs", max(seconds))
    figures.add("remote.many.mib", "vddkfs", SMALL / MIB)


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """A pool that forgets what has not begun when the block fails."""
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _mount(site: Site, number: int, place: Path) -> None:
    place.mkdir(exist_ok=True)
    disks = [f"[ds1] {name}" for name in small_disks(number)]
    source = url(small_vm(number), small_snapshot(number), disks)
    run(mount_command(site, source, place, f"max_sessions={SESSIONS}"), timeout=_MOUNT_SECONDS)


def _read_small(site: Site, place: Path, disk: str, gate: threading.Barrier) -> float:
    """Read a small disk to its end in a process of its own; return the seconds that took."""
    name = Path(disk).stem
    gate.wait(_MOUNT_SECONDS)
    begun = time.perf_counter()
    said = run(["sha256sum", place / name / "disk.raw"], timeout=_READ_SECONDS)
    seconds = time.perf_counter() - begun
    flat = site.site / "ds1" / disk.replace(".vmdk", "-flat.vmdk")
    if said.split()[0] != hashlib.sha256(flat.read_bytes()).hexdigest():
        raise BenchmarkError(f"{place.name}/{name}: wrong bytes")
    return seconds


def _unmount_all(places: list[Path]) -> list[str]:
    """Unmount all, and return what failed."""
    with _pool(_MOUNTING) as pool:
        return [text for text in pool.map(_unmount, places) if text]


def _unmount(place: Path) -> str:
    """Unmount, and return what failed."""
    if not os.path.ismount(place):
        return ""
    try:
        run([vddkfs_command(), "umount", place], timeout=60.0)
    except BenchmarkError as error:
        return str(error)
    return ""
