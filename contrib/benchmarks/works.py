"""The pieces of work on one served disk. Each takes one round and returns values by metric."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.figures import MIB, Figures
from benchmarks.material import Sizes
from benchmarks.processes import BenchmarkError, pss, run
from benchmarks.systems import Served

DAEMON_MIB: Final = 60
WORKER_MIB: Final = 30
"""What the issue allows besides cache_size, for the daemon and for each worker."""
PROBE: Final = Path(__file__).parent / "probe.py"


@dataclass(frozen=True)
class Pace:
    """How long the timed pieces take, in seconds."""

    random: int
    ramp: int


FULL_PACE: Final = Pace(random=8, ramp=2)
QUICK_PACE: Final = Pace(random=1, ramp=0)


@dataclass(frozen=True)
class Round:
    """One round of one system: where its values go, or None while it only warms up."""

    served: Served
    figures: Figures | None
    sizes: Sizes
    pace: Pace
    scratch: Path

    def add(self, metric: str, value: float, note: str = "") -> None:
        """Note a value of the served disk's *metric*."""
        if self.figures is not None:
            name = f"{self.served.material.name}.{metric}"
            self.figures.add(name, self.served.system.name, value, note)


def ready(this: Round) -> None:
    """Time from the command until the file is there, and until it gives data."""
    this.add("ready", this.served.seconds_to_stat)
    this.add("first-read", this.served.seconds_to_read)


def sequential(this: Round) -> None:
    """Read the whole file once, buffered; then see how much memory that took."""
    begun = time.perf_counter()
    run(["dd", f"if={this.served.file}", "of=/dev/null", "bs=1M", "status=none"])
    this.add("sequential", this.served.material.capacity / MIB / (time.perf_counter() - begun))
    this.add("memory", pss(this.served.pids()) / MIB)


def random_reads(this: Round) -> None:
    """4 KiB reads past the kernel's page cache, in a range without holes."""
    for depth in (1, 16):
        result = fio(this.served.file, this.sizes.dense, this.pace, depth)
        this.add(f"random-{depth}", result.iops)
        this.add(f"latency99-{depth}", result.microseconds_99)
        if depth == 1:
            this.add("latency-1", result.microseconds)


@dataclass(frozen=True)
class FioResult:
    """What fio found, without its ramp."""

    reads: int
    iops: float
    microseconds: float
    microseconds_99: float


def fio(
    file: Path, where: tuple[int, int], pace: Pace, depth: int, buffered: bool = False
) -> FioResult:
    """Read 4 KiB at random places of *where* (offset, length) for the time of *pace*.

    *buffered*: through the kernel's page cache, by *depth* readers with a part of *where* each,
    none of which reads a block twice, so that the kernel cannot answer in place of the file system.
    """
    offset, size = where
    if buffered:
        part = size // depth
        how = ["--ioengine=psync", f"--numjobs={depth}", "--fadvise_hint=random"]
        how += ["--group_reporting", f"--size={part}", f"--offset_increment={part}"]
    else:
        how = ["--direct=1", "--ioengine=libaio", f"--iodepth={depth}"]
        how += [f"--size={size}", "--norandommap"]
    output = run(
        [
            *("fio", "--name=random", f"--filename={file}", "--readonly", "--thread"),
            *("--rw=randread", "--bs=4k", *how, f"--offset={offset}", "--allow_file_create=0"),
            *("--time_based", f"--runtime={pace.random}", f"--ramp_time={pace.ramp}"),
            "--output-format=json",
        ],
        timeout=60.0 + pace.random + pace.ramp,
    )
    # Warnings may come before the document.
    read = json.loads(output[output.index("{") :])["jobs"][0]["read"]
    if not read["iops"]:
        raise BenchmarkError("fio read nothing")
    latency = read["clat_ns"]
    return FioResult(
        reads=read["total_ios"],
        iops=read["iops"],
        microseconds=latency["mean"] / 1000,
        microseconds_99=latency["percentile"]["99.000000"] / 1000,
    )


def cached(this: Round) -> None:
    """Buffered 4 KiB reads of what vddkfs has in its cache, and the kernel has no more."""
    served = this.served
    offset, length = this.sizes.cached
    ours = served.system.name == "vddkfs"
    before = served.status() if ours else {}
    said = run([sys.executable, "-P", PROBE, "cached", served.file, str(offset), str(length)])
    if ours:
        after = served.status()
        if after["reads"]["count"] - before["reads"]["count"] < length // 4096:
            raise BenchmarkError("the kernel answered reads that it should have forgotten")
        # Blocks that lie together are fetched with what is between them, some of them twice.
        if after["cache"]["source_bytes"] - before["cache"]["source_bytes"] > 1.2 * length:
            raise BenchmarkError("what was read was not kept in the cache")
    this.add("cached", float(said))


def memory(this: Round) -> None:
    """Memory of all processes that serve when their caches are full.

    What fills them is 64 KiB reads all over the dense range, each block once, through the kernel's
    cache: a reader that goes straight through a file leaves little behind in vddkfs.
    """
    offset, size = this.sizes.dense
    run(
        [
            *("fio", "--name=fill", f"--filename={this.served.file}", "--readonly", "--thread"),
            *("--rw=randread", "--bs=64k", "--ioengine=psync", "--fadvise_hint=random"),
            *(f"--offset={offset}", f"--size={size}", "--allow_file_create=0"),
        ],
        timeout=120.0,
    )
    this.add("memory-full", pss(this.served.pids()) / MIB)
    if this.served.system.name == "vddkfs":
        status = this.served.status()
        workers = sum(disk["workers"][0]["pid"] is not None for disk in status["disks"])
        cache = status["cache"]["limit"] / MIB
        this.add("memory-goal", cache + DAEMON_MIB + WORKER_MIB * workers)


def copy(this: Round) -> None:
    """Copy the thin disk, as an operator would. A system without holes copies a piece of it."""
    served, target = this.served, this.scratch / "copy.raw"
    with _removed(target):
        if served.system.knows_holes:
            begun = time.perf_counter()
            run(["cp", "--sparse=auto", served.file, target])
            this.add("copy", time.perf_counter() - begun)
            _check_copy(served, target, this.sizes)
            return
        piece = this.sizes.thin_piece
        begun = time.perf_counter()
        dd = ["dd", f"if={served.file}", f"of={target}", "bs=1M", f"count={piece // MIB}"]
        run([*dd, "conv=sparse", "status=none"])
        seconds = time.perf_counter() - begun
        note = f"extrapolated from {piece // MIB} MiB"
        this.add("copy", seconds * served.material.capacity / piece, note)


def _check_copy(served: Served, target: Path, sizes: Sizes) -> None:
    status = target.stat()
    allocated = status.st_blocks * 512
    if status.st_size != served.material.capacity or allocated < sizes.thin_data:
        raise BenchmarkError(f"{served.system.name}: the copy of the thin disk is not whole")
    if allocated > 2 * sizes.thin_data + 64 * MIB:
        raise BenchmarkError(f"{served.system.name}: the copy of the thin disk is not sparse")


@contextlib.contextmanager
def _removed(path: Path) -> Iterator[None]:
    """Have no file at *path* before and after."""
    path.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
