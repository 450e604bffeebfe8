"""The pieces of work of ``run formats``. Each takes one round and adds values by metric."""

import json
import sys
from pathlib import Path
from typing import Final

from benchmarks.figures import MIB, Figures
from benchmarks.material import Material
from benchmarks.processes import BenchmarkError, run
from benchmarks.works import PROBE, Round

_OWN_PROBE: Final = Path(__file__).parent / "formats_probe.py"
_BLOCK: Final = 4096


def huge_mount(this: Round) -> None:
    """Time from the command to serving, and the memory of daemon and worker after one read."""
    served = this.served
    this.add("ready", served.seconds_to_stat)
    this.add("first-read", served.seconds_to_read)
    status = served.status()
    worker = status["disks"][0]["workers"][0]["pid"]
    if worker is None:
        raise BenchmarkError("no worker has started")
    this.add("daemon", _resident(int(status["pid"])) / MIB)
    this.add("worker", _resident(int(worker)) / MIB)


def huge_engine(material: Material, figures: Figures | None) -> None:
    """Describe the chain of *material*, and open it, without a mount."""
    described, opened = (_probe(what, material.leaf) for what in ("describe", "open"))
    if figures is not None:
        for metric, value in (
            ("describe", described["seconds"]),
            ("describe-memory", described["bytes"] / MIB),
            ("open", opened["seconds"]),
            ("open-memory", opened["bytes"] / MIB),
            ("open-read", 1000 * opened["read_seconds"]),
        ):
            figures.add(f"{material.name}.{metric}", "vddkfs", value)


def chain_mount(this: Round) -> None:
    """Buffered 4 KiB reads of a whole disk at random, each block once; microseconds of one.

    The disk was read before in blocks of 64 KiB, and the kernel made to forget it. What vddkfs was
    mounted with keeps a small part of the disk only, so that nearly each read reaches its engine,
    whose tables are warm; the counters are checked.
    """
    served = this.served
    length = served.material.capacity
    ours = served.system.name == "vddkfs"
    before = served.status() if ours else {}
    said = run([sys.executable, "-P", PROBE, "cached", served.file, "0", str(length)])
    if ours:
        after = served.status()
        if after["reads"]["count"] - before["reads"]["count"] < length // _BLOCK:
            raise BenchmarkError("the kernel answered reads that it should have forgotten")
        if after["cache"]["source_bytes"] - before["cache"]["source_bytes"] < 2 * length:
            raise BenchmarkError("the cache answered reads that the engine should have answered")
    this.add("buffered", 1e6 / float(said))


def chain_engine(material: Material, figures: Figures | None, reads: int) -> None:
    """4 KiB reads at random places of the whole disk, without a mount; microseconds of one."""
    found = _probe("reads", material.leaf, str(reads))
    if figures is not None:
        figures.add(f"{material.name}.engine", "vddkfs", found["microseconds"])


def _probe(what: str, leaf: Path, *rest: str) -> dict[str, float]:
    said = run([sys.executable, "-P", _OWN_PROBE, what, leaf, *rest], timeout=300.0)
    found: dict[str, float] = json.loads(said)
    return found


def _resident(pid: int) -> int:
    """Return the bytes of memory of the process, with what it shares."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"process {pid} has no memory")
