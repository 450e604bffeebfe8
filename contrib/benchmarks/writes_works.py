"""The pieces of work of ``run writes``. Each takes one round and returns values by metric."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.figures import MIB
from benchmarks.material import Material
from benchmarks.processes import cpu_ticks, run
from benchmarks.remote_site import Site
from benchmarks.remote_systems import of_system
from benchmarks.systems import Served
from benchmarks.works import Pace, fio
from benchmarks.writes_metrics import READS
from benchmarks.writes_systems import PROFILE

Values = dict[str, float]
"""By metric, without the work it belongs to."""

GIB: Final = 1024 * MIB
WRITERS: Final = 4
_SCATTERED: Final = 4000
"""Blocks that an overlay has beside the ranges that are read."""


def lan_limits(site: Site, material: Material, seconds: float) -> Values:
    """Have the C client say what the profile gives, and dd how fast its source is."""
    found = site.limits(PROFILE, seconds, writes=True)
    begun = time.perf_counter()
    half = material.capacity // 2
    run(["dd", f"if={material.files[0]}", "of=/dev/null", "bs=1M", f"skip={half // MIB}"])
    source = time.perf_counter() - begun
    return {
        "one": found["sequential write 1 MiB", 1]["bytes_per_s"] / MIB,
        "four": found["sequential write 1 MiB", 8]["bytes_per_s"] / MIB,
        "random-16": found["random write 4 KiB", 16]["requests_per_s"],
        "source": half / MIB / source,
    }


def lan_writes(served: Served, pace: Pace) -> Values:
    """Write the first half by dd, all of it by four writers, and 4 KiB at random places."""
    half = served.material.capacity // 2
    values = {}
    used = _cpu_used(served)
    values["one"] = dd_write(served, half)
    values["cpu"] = used() * GIB / half
    flat = served.material.files[0]
    _compare(flat, flat, half)
    values["four"] = _fio_write(served.file, _four(0, served.material.capacity, pace), pace)[0]
    used = _cpu_used(served)
    random = ["--rw=randwrite", "--bs=4k", "--ioengine=libaio", "--iodepth=16", "--norandommap"]
    random += [f"--size={served.material.capacity}", *_timed(pace)]
    values["random-16"] = _fio_write(served.file, random, pace)[1]
    # The ramp's writes are not counted by fio, but took their time.
    values["cpu-16"] = 1e6 * used() / (values["random-16"] * (pace.random + pace.ramp))
    return values


def overlay_writes(served: Served, pace: Pace) -> Values:
    """Write each half once: the first by dd, the second by four writers."""
    half = served.material.capacity // 2
    used = _cpu_used(served)
    values = {"one": dd_write(served, half)}
    values["cpu"] = used() * GIB / half
    if served.system.name == "vddkfs":
        _compare(served.file, served.material.files[0], half)
    values["four"] = _fio_write(served.file, _four(half, half), pace)[0]
    return values


def scatter(served: Served) -> None:
    """Write blocks all over the second half, so that the overlay has a map to look at."""
    half = served.material.capacity // 2
    words = ["--rw=randwrite", "--bs=4k", "--ioengine=libaio", "--iodepth=16"]
    words += [f"--offset={half}", f"--size={half}", f"--number_ios={_SCATTERED}"]
    _fio_write(served.file, words, Pace(0, 0))


def untouched_reads(served: list[Served], pace: Pace, turn: int) -> dict[str, Values]:
    """Read the first half of each in turn, whoever is first changing with each piece of work.

    Returns the values by system. Files are opened anew for each piece, which forgets what the
    kernel and vddkfs have of a disk that its owner may write.
    """
    half = served[0].material.capacity // 2
    values: dict[str, Values] = {one.system.name: {} for one in served}
    works: dict[str, Callable[[Path], float]] = {
        "sequential": lambda file: _dd_read(file, half),
        "random-1": lambda file: fio(file, (0, half), pace, 1).iops,
        "random-16": lambda file: fio(file, (0, half), pace, 16).iops,
    }
    for number, name in enumerate(READS):
        for one in served if (turn + number) % 2 else served[::-1]:
            values[one.system.name][name] = works[name](one.file)
    return values


def dd_write(served: Served, length: int) -> float:
    """Write the second half of the disk's flat file to the first of what is served; MiB/s.

    dd closes the file in that time, so that what was written is flushed.
    """
    command: list[str | Path] = ["dd", f"if={served.material.files[0]}"]
    command += [f"of={served.file}", "bs=1M", f"skip={length // MIB}", f"count={length // MIB}"]
    begun = time.perf_counter()
    run([*command, "oflag=direct", "conv=notrunc,nocreat", "status=none"])
    return length / MIB / (time.perf_counter() - begun)


def _dd_read(file: Path, length: int) -> float:
    begun = time.perf_counter()
    run(["dd", f"if={file}", "of=/dev/null", "bs=1M", f"count={length // MIB}", "status=none"])
    return length / MIB / (time.perf_counter() - begun)


def _compare(written: Path, source: Path, half: int) -> None:
    """Raise BenchmarkError unless the first half of *written* is the second of *source*."""
    run(["cmp", f"--bytes={half}", f"--ignore-initial=0:{half}", written, source])


def _four(offset: int, length: int, pace: Pace | None = None) -> list[str]:
    """Return fio's words for four writers of 1 MiB with a part each; *pace*: again and again."""
    part = length // WRITERS // MIB * MIB
    words = ["--rw=write", "--bs=1M", "--ioengine=psync", f"--numjobs={WRITERS}"]
    words += [f"--offset={offset}", f"--size={part}", f"--offset_increment={part}"]
    return words + (_timed(pace) if pace else [])


def _timed(pace: Pace) -> list[str]:
    return ["--time_based", f"--runtime={pace.random}", f"--ramp_time={pace.ramp}"]


def _fio_write(file: Path, how: list[str], pace: Pace) -> tuple[float, float]:
    """Have fio write past the kernel's pages; return MiB/s and writes/s until the last answer."""
    output = run(
        [
            *("fio", "--name=write", f"--filename={file}", "--thread", "--group_reporting"),
            *("--direct=1", *how, "--allow_file_create=0", "--fallocate=none"),
            "--output-format=json",
        ],
        timeout=120.0 + pace.random + pace.ramp,
    )
    # Warnings may come before the document.
    written = json.loads(output[output.index("{") :])["jobs"][0]["write"]
    return written["bw_bytes"] / MIB, written["iops"]


def _cpu_used(served: Served) -> Callable[[], float]:
    """Return what tells the CPU seconds of what serves since now."""

    def seconds() -> float:
        ticks = sum(map(sum, map(cpu_ticks, of_system(served))))
        return ticks / os.sysconf("SC_CLK_TCK")

    before = seconds()
    return lambda: seconds() - before
