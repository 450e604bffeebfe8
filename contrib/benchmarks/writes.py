"""``contrib/benchmarks/run writes``: writes to a remote base, and overlays."""

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import writes_works
from benchmarks.command import ROOT, carry_out, look_whether_idle, present, say
from benchmarks.figures import Figures, as_json
from benchmarks.machine import REMOTE_TOOLS, describe, missing_tools
from benchmarks.material import GIB, MIB, Material, kept_in_memory, resident, warm, write_descriptor
from benchmarks.processes import BenchmarkError, descendants, end, end_all, run, supervised
from benchmarks.remote_site import Site, SiteSizes
from benchmarks.systems import Served, System
from benchmarks.works import QUICK_PACE, Pace
from benchmarks.writes_goals import goals
from benchmarks.writes_metrics import LIMIT, OVERLAY, PEERS, PLAIN, READS, STUB
from benchmarks.writes_systems import (
    PROFILE,
    TITLES,
    Places,
    WithoutOverlay,
    WithOverlay,
    WriteStub,
    writer,
)
from benchmarks.writes_works import Values

DESCRIPTION: Final = """\
Measure writes to the base of a disk of a simulated server (profile lan) against what a C client
gets, and against NBD with the same latency and bandwidth; reads through an overlay against reads
without one; and writes to an overlay against a FUSE stub that writes to a file beside it. Ratios
are those of one round, in which all take turns. README.md in this folder tells how to read them.
`run overlay-map` measures the map of an overlay.
"""
WORKS: Final = ("lan", "overlay-reads", "overlay-writes")
FULL_PACE: Final = Pace(random=3, ramp=1)
_LAN: Final = ("vddkfs", LIMIT, *PEERS)
_LIMIT_SECONDS: Final = 2.0
_SPARE: Final = 1 * GIB
"""Free space that is wanted besides the disks and what is written."""
_DISK: Final = "local"


@dataclass
class WritesBench:
    """One run. *disk* is the local disk that overlays are for."""

    site: Site
    disk: Material
    places: Places
    systems: Sequence[str]
    rounds: int
    quick: bool
    figures: Figures = field(default_factory=Figures)
    problems: list[str] = field(default_factory=list)

    @property
    def pace(self) -> Pace:
        """How long the timed pieces take."""
        return QUICK_PACE if self.quick else FULL_PACE

    def run(self, works: Sequence[str]) -> None:
        """Do the work; what fails is noted, and the rest goes on."""
        if "lan" in works:
            self._in_memory(self.site.large(), self._lan)
        if "overlay-reads" in works:
            self._in_memory(self.disk, self._overlay_reads)
        if "overlay-writes" in works:
            self._in_memory(self.disk, self._overlay_writes)

    def _in_memory(self, material: Material, work: Callable[[int], None]) -> None:
        """Do all rounds of *work*, 0 to warm up, with *material* in the page cache."""
        with kept_in_memory(material) as locked:
            if not locked:
                say("may not mlock: the disk stays in the page cache if the kernel likes")
            for number in range(1 if self.quick else 0, self.rounds + 1):
                work(number)
                cold = 1.0 - resident(material)
                if cold > 0.005:
                    self._problem(f"{material.name}: {cold:.1%} of the disk left the page cache")

    def _lan(self, number: int) -> None:
        """Let all write to the remote disk, one after the other."""
        self.site.configure(PROFILE)
        material, found = self.site.large(), dict[str, Values]()
        for name in self._turns(_LAN, number):
            with self._noting(f"{PROFILE}, {name}", number):
                if name == LIMIT:
                    seconds = _LIMIT_SECONDS / (4 if self.quick else 1)
                    found[name] = writes_works.lan_limits(self.site, material, seconds)
                else:
                    system = writer(name, self.places, self.site)
                    found[name] = self._written(system, material, writes_works.lan_writes)
        self._add("lan", found, number)
        self._ratios("lan", found, (LIMIT, *PEERS), number)

    def _overlay_reads(self, number: int) -> None:
        """Let both mounts of the local disk be read, in turn."""
        systems = self._overlays(WithoutOverlay(self.places.mounts), PLAIN)
        if len(systems) < 2:
            return
        with self._noting("reads with and without an overlay", number), contextlib.ExitStack() as s:
            warm(self.disk)
            served = [s.enter_context(system.serving(self.disk)) for system in systems]
            writes_works.scatter(served[0])
            found = writes_works.untouched_reads(served, self.pace, number)
            self._add("reads", found, number)
            for metric in READS if number else ():
                # Of throughputs: the inverse is that of times.
                time_ratio = found[PLAIN][metric] / found["vddkfs"][metric]
                self.figures.add(f"writes.reads.{metric}.time", "vddkfs", time_ratio)

    def _overlay_writes(self, number: int) -> None:
        """Let vddkfs write to an overlay, and the stub to a file."""
        found = dict[str, Values]()
        systems = self._overlays(WriteStub(self.places.mounts, self.places.overlay), STUB)
        for system in systems if number % 2 else systems[::-1]:
            with self._noting(f"writes, {system.name}", number):
                found[system.name] = self._written(system, self.disk, writes_works.overlay_writes)
        self._add("overlay", found, number)
        self._ratios("overlay", found, (STUB,), number)

    def _overlays(self, beside: System, name: str) -> list[System]:
        ours: System = WithOverlay(self.places.mounts, self.places.overlay)
        return [one for one in (ours, beside) if one.name in self.systems]

    def _turns(self, names: Sequence[str], number: int) -> list[str]:
        """Return those of *names* that take part; who is first changes with the rounds."""
        chosen = [name for name in names if name in self.systems]
        return chosen if number % 2 else chosen[::-1]

    def _written(
        self, system: System, material: Material, work: Callable[[Served, Pace], Values]
    ) -> Values:
        # What others wrote is not to be carried to the disk meanwhile. Not all file systems: who
        # knows which of them hang.
        run(["sync", "-f", self.places.overlay.parent])
        warm(material)
        with system.serving(material) as served:
            return work(served, self.pace)

    def _add(self, part: str, found: dict[str, Values], number: int) -> None:
        for system, values in found.items() if number else ():
            for metric, value in values.items():
                self.figures.add(f"writes.{part}.{metric}", system, value)

    def _ratios(
        self, part: str, found: dict[str, Values], others: Sequence[str], number: int
    ) -> None:
        """Note the ratios of this round's values to those of *others*."""
        mine = found.get("vddkfs", {})
        for other in others if number else ():
            for metric, value in found.get(other, {}).items():
                if metric in mine and (part != "overlay" or metric in OVERLAY):
                    name = f"writes.{part}.{metric}.to-{other}"
                    if not metric.startswith("cpu"):
                        self.figures.add(name, "vddkfs", mine[metric] / value)

    @contextlib.contextmanager
    def _noting(self, where: str, number: int) -> Iterator[None]:
        """Note what fails in the block, and what it leaves behind."""
        say(f"{where}: {f'round {number} of {self.rounds}' if number else 'warm-up'}")
        try:
            yield
        except (BenchmarkError, OSError) as error:
            self._problem(f"{where}: {error}")
        for left in end_all(self.places.mounts, spare=[self.site.host]):
            self._problem(f"{where}: left behind {left}")

    def _problem(self, text: str) -> None:
        say(f"PROBLEM: {text}")
        if text not in self.problems:
            self.problems.append(text)


def _make_disk(folder: Path, size: int) -> Material:
    """Make the local disk: flat, and full of noise."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    flat, leaf = folder / f"{_DISK}-flat.vmdk", folder / f"{_DISK}.vmdk"
    with flat.open("wb") as file:
        for _ in range(0, size, MIB):
            file.write(os.urandom(MIB))
    write_descriptor(leaf, "monolithicFlat", [f'RW {size // 512} FLAT "{flat.name}" 0'])
    return Material(_DISK, leaf, (flat,), size, _DISK)


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="contrib/benchmarks/run writes",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument

    def some(flag: str, known: Sequence[str], words: str) -> None:
        text = f"{words}: {' '.join(known)} (default: all)"
        add(flag, nargs="+", choices=known, default=list(known), metavar="NAME", help=text)

    work = Path("/var/tmp/vddkfs-benchmarks")
    add("--work", type=Path, default=work, metavar="DIR", help="as in run (default: %(default)s)")
    add(
        "--memory",
        type=Path,
        default=Path("/dev/shm"),
        metavar="DIR",
        help="a tmpfs, for the remote disk: flushed is what is in memory (default: %(default)s)",
    )
    some("--only", WORKS, "some of the work")
    some("--systems", list(TITLES), "what is compared")
    add("--rounds", type=int, metavar="N", help="after the warm-up (default: 5; quick: 1)")
    add(
        "--size",
        type=int,
        metavar="MIB",
        help="of the remote disk, and of the local one (default: 1024; quick: 64)",
    )
    add("--quick", action="store_true", help="to see that all of it runs, not to measure")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--markdown", action="store_true", help="print the report for README.md")
    add("--report", type=Path, metavar="FILE", help="measure nothing, report an earlier run's FILE")
    arguments = parser.parse_args(words)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
    arguments.size = arguments.size or (64 if arguments.quick else 1024)
    if arguments.rounds < 1 or arguments.size < 32 or arguments.size % 8:
        parser.error("--rounds: at least 1; --size: a multiple of 8, at least 32")
    return arguments


def _check_space(folder: Path, wanted: int, option: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise BenchmarkError(
            f"{folder}: {free / GIB:.1f} GiB free, {wanted / GIB:.1f} wanted; see {option}"
        )


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    missing = missing_tools(REMOTE_TOOLS)
    if missing:
        raise BenchmarkError(missing)
    idle = look_whether_idle()
    work, size = arguments.work.resolve(), arguments.size * MIB
    begun = time.monotonic()
    with supervised(work) as mounts, contextlib.ExitStack() as stack:
        _check_space(work, 2 * size + _SPARE, "--work")
        _check_space(arguments.memory, size + _SPARE, "--memory")
        memory = arguments.memory.resolve() / "vddkfs-benchmark-site"
        site = Site(work / "writes-site", SiteSizes(large=size, many=0), memory)
        stack.callback(site.remove)
        say("building the simulator, making its site and a local disk")
        site.make()
        stack.enter_context(site.served(work / "host.log"))
        stack.callback(shutil.rmtree, work / _DISK, ignore_errors=True)
        disk = _make_disk(work / _DISK, size)
        # Before the host goes: whoever still reads would wait for it.
        stack.callback(lambda: end([p for p in descendants(os.getpid()) if p != site.host]))
        bench = WritesBench(
            site=site,
            disk=disk,
            places=Places(mounts, work / "overlay"),
            systems=arguments.systems,
            rounds=arguments.rounds,
            quick=arguments.quick,
        )
        bench.run(arguments.only)
    return {
        "when": time.strftime("%Y-%m-%d %H:%M %Z"),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "size": f"{arguments.size} MiB",
        "rounds": bench.rounds,
        "machine": describe(ROOT),
        "before": idle,
        "systems": {name: TITLES[name] for name in TITLES if name in bench.systems},
        "figures": as_json(bench.figures),
        "goals": [vars(goal) for goal in goals(bench.figures)],
        "problems": bench.problems,
    }


def main(words: Sequence[str]) -> int:
    """Run. Returns the exit code: 0 whatever the figures are."""
    return carry_out("contrib/benchmarks/run writes", _arguments(words), _measure, present)
