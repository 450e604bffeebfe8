"""``contrib/benchmarks/run formats``: all formats of VMDK, huge disks, long chains."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import formats_works, works
from benchmarks.command import ROOT, carry_out, look_whether_idle, present, say
from benchmarks.figures import Figures, as_json
from benchmarks.formats_goals import goals
from benchmarks.formats_material import FormatStore, sizes_of
from benchmarks.formats_metrics import CHAINS, FORMATS, HUGE
from benchmarks.machine import describe, missing_tools
from benchmarks.material import MIB, Material, kept_in_memory, resident, warm
from benchmarks.processes import BenchmarkError, end_all, supervised
from benchmarks.systems import SYSTEMS, System
from benchmarks.works import FULL_PACE, QUICK_PACE, Round

DESCRIPTION: Final = """\
Measure disks of every format of VMDK against qemu-storage-daemon and nbdfuse, how long the largest
disks take to open and with how much memory, and what a long chain costs. Every round goes through
all systems, one after the other; the first round only warms up. README.md in this folder tells how
to read the figures.
"""
PEERS: Final = ("vddkfs", "qsd", "nbdfuse", "nbdfuse-4")
DEFAULT_PEERS: Final = ("vddkfs", "qsd", "nbdfuse")
WORKS: Final = ("sequential", "random")
"""What is done with a disk of each format; each on a mount of its own."""
PARTS: Final = (*FORMATS, "huge", "chains")
SPLIT_MIB: Final = 16
"""A disk has to be a multiple of that, because it is cut in parts."""
_CHAIN_READS: Final = 50_000

Work = Callable[[Round], None]


@dataclass
class FormatBench:
    """One run."""

    store: FormatStore
    mounts: Path
    systems: Sequence[System]
    rounds: int
    quick: bool
    works: Sequence[str]
    figures: Figures = field(default_factory=Figures)
    problems: list[str] = field(default_factory=list)

    def run(self, parts: Sequence[str]) -> None:
        """Do the work; what fails is noted, and the rest goes on."""
        for part in parts:
            if part == "huge":
                self._huge()
            elif part == "chains":
                self._chains()
            else:
                self._format(part)

    def _format(self, name: str) -> None:
        known: dict[str, Work] = {"sequential": works.sequential, "random": works.random_reads}
        material = self.store.disk(name)
        with self._in_memory(material):
            for number in self._numbers():
                for system in self.systems:
                    for work in self.works:
                        self._mounted(system, material, number, known[work])

    def _huge(self) -> None:
        ours = [system for system in self.systems if system.name == "vddkfs"]
        for name in HUGE if ours else ():
            material = self.store.huge(name)
            for number in self._numbers():
                to = self.figures if number else None
                for system in ours:
                    self._mounted(system, material, number, formats_works.huge_mount)
                with self._noting(f"engine, {name}", number):
                    formats_works.huge_engine(material, to)

    def _chains(self) -> None:
        materials = [self.store.chain_of(links) for links in CHAINS]
        reads = _CHAIN_READS // 10 if self.quick else _CHAIN_READS
        with contextlib.ExitStack() as stack:
            for material in materials:
                stack.enter_context(self._in_memory(material))
            for number in self._numbers():
                to = self.figures if number else None
                for system in self.systems:
                    for material in materials:
                        self._mounted(system, material, number, formats_works.chain_mount)
                for material in materials:
                    with self._noting(f"engine, {material.name}", number):
                        formats_works.chain_engine(material, to, reads)

    def _numbers(self) -> range:
        """Return the numbers of the rounds; 0 only warms up."""
        return range(1 if self.quick else 0, self.rounds + 1)

    def _mounted(self, system: System, material: Material, number: int, work: Work) -> None:
        """Do *work* on a fresh mount."""
        with self._noting(f"{system.name}, {material.name}, {work.__name__}", number):
            warm(material)
            with system.serving(material) as served:
                work(
                    Round(
                        served,
                        self.figures if number else None,
                        self.store.sizes,
                        QUICK_PACE if self.quick else FULL_PACE,
                        self.store.folder,
                    )
                )
            cold = 1.0 - resident(material)
            if cold > 0.005:
                raise BenchmarkError(f"{cold:.1%} of the source left the page cache")

    @contextlib.contextmanager
    def _noting(self, where: str, number: int) -> Iterator[None]:
        """Note what fails in the block, and what it leaves behind."""
        say(f"{where}: {f'round {number} of {self.rounds}' if number else 'warm-up'}")
        try:
            yield
        except (BenchmarkError, OSError) as error:
            self._problem(f"{where}: {error}")
        for left in end_all(self.mounts):
            self._problem(f"{where}: left behind {left}")

    @contextlib.contextmanager
    def _in_memory(self, material: Material) -> Iterator[None]:
        with kept_in_memory(material) as locked:
            if not locked:
                say("may not mlock: the source stays in the page cache if the kernel likes")
            yield

    def _problem(self, text: str) -> None:
        say(f"PROBLEM: {text}")
        if text not in self.problems:
            self.problems.append(text)


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="contrib/benchmarks/run formats",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument

    def some(flag: str, known: Sequence[str], words: str, usual: Sequence[str] = ()) -> None:
        usual = usual or known
        text = f"{words}: {' '.join(known)} (default: {' '.join(usual)})"
        add(flag, nargs="+", choices=known, default=list(usual), metavar="NAME", help=text)

    work = Path("/var/tmp/vddkfs-benchmarks")
    add("--work", type=Path, default=work, metavar="DIR", help="as in run (default: %(default)s)")
    some("--only", PARTS, "some of the parts")
    some("--works", WORKS, "what is done with the disk of a format")
    some("--systems", PEERS, "what is compared", DEFAULT_PEERS)
    add("--rounds", type=int, metavar="N", help="after the warm-up (default: 3; quick: 1)")
    add("--size", type=int, metavar="MIB", help="of a disk (default: 1024; quick: 64)")
    add("--quick", action="store_true", help="to see that all of it runs, not to measure")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--markdown", action="store_true", help="print the report for README.md")
    add("--report", type=Path, metavar="FILE", help="measure nothing, report an earlier run's FILE")
    arguments = parser.parse_args(words)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.size = arguments.size or (64 if arguments.quick else 1024)
    if arguments.rounds < 1 or arguments.size < 1 or arguments.size % SPLIT_MIB:
        parser.error(f"--rounds: at least 1; --size: a multiple of {SPLIT_MIB}")
    return arguments


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    missing = missing_tools()
    if missing:
        raise BenchmarkError(missing)
    idle = look_whether_idle()
    work = arguments.work.resolve()
    sizes = sizes_of(arguments.size * MIB, quick=arguments.quick)
    begun = time.monotonic()
    with supervised(work) as mounts:
        bench = FormatBench(
            store=FormatStore(work / sizes.name, sizes, say),
            mounts=mounts,
            systems=[SYSTEMS[name](mounts) for name in arguments.systems],
            rounds=arguments.rounds,
            quick=arguments.quick,
            works=arguments.works,
        )
        bench.run(arguments.only)
    return {
        "when": time.strftime("%Y-%m-%d %H:%M %Z"),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "size": sizes.name,
        "rounds": bench.rounds,
        "machine": describe(ROOT),
        "before": idle,
        "systems": {system.name: system.title for system in bench.systems},
        "figures": as_json(bench.figures),
        "goals": [vars(goal) for goal in goals(bench.figures)],
        "problems": bench.problems,
    }


def main(words: Sequence[str]) -> int:
    """Run. Returns the exit code: 0 whatever the figures are."""
    return carry_out("contrib/benchmarks/run formats", _arguments(words), _measure, present)
