"""``contrib/benchmarks/run``: check, make the material, measure in turn, report."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import hung, invalidate, works
from benchmarks.figures import Figures, as_json, from_json, goals
from benchmarks.machine import describe, idleness, missing_tools
from benchmarks.material import FULL, QUICK, Material, Sizes, Store, kept_in_memory, resident, warm
from benchmarks.processes import BenchmarkError, end_all, supervised
from benchmarks.report import markdown, show
from benchmarks.systems import DEFAULT_SYSTEMS, SYSTEMS, System
from benchmarks.works import FULL_PACE, QUICK_PACE, Pace, Round

Work = Callable[[Round], None]

_READING: Final[dict[str, Work]] = {
    "ready": works.ready,
    "sequential": works.sequential,
    "random": works.random_reads,
    "memory": works.memory,
}
WORKS: Final[dict[str, dict[str, Work]]] = {
    "base": {**_READING, "cached": works.cached},
    "chain": _READING,
    "thin": {"ready": works.ready, "copy": works.copy},
    "hung": {"hung": hung.hung},
    "wide": {"invalidate": invalidate.invalidate},
}
"""What is done, by disk and name; what is done on one disk is done on one mount, in this order."""
_OWN: Final = ("hung", "wide")
"""Disks for work that nobody but vddkfs does."""

DESCRIPTION: Final = """\
Measure vddkfs against qemu-storage-daemon, nbdfuse and a stub, and hold the figures against the
goals. Every round goes through all systems, one after the other; the first round only warms up.
README.md in this folder tells how to read the figures. `run formats` measures all formats,
`run remote` disks of a server, `run writes` writing; each tells more with --help.
"""
ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass
class Bench:
    """One run."""

    sizes: Sizes
    pace: Pace
    rounds: int
    warm_up: bool
    store: Store
    mounts: Path
    only: frozenset[str]
    systems: list[System]
    figures: Figures = field(default_factory=Figures)
    problems: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Do all work; what fails is noted, and the rest goes on."""
        makers = {"base": self.store.base, "chain": self.store.chain, "thin": self.store.thin}
        makers |= {"hung": self.store.hung, "wide": self.store.wide}
        for disk, named in WORKS.items():
            chosen = [
                work
                for name, work in named.items()
                if not self.only or {name, disk, f"{disk}.{name}"} & self.only
            ]
            if chosen:
                material = makers[disk]()
                with kept_in_memory(material) as locked:
                    if not locked:
                        say("may not mlock: the source stays in the page cache if the kernel likes")
                    self._run_disk(material, chosen)

    def _run_disk(self, material: Material, chosen: list[Work]) -> None:
        systems = [system for system in self.systems if system.can(material)]
        if material.name in _OWN:
            systems = [system for system in systems if system.name == "vddkfs"]
        for number in range(0 if self.warm_up else 1, self.rounds + 1):
            for system in systems:
                say(
                    f"{material.name}, "
                    f"{f'round {number} of {self.rounds}' if number else 'warm-up'}: {system.name}"
                )
                self._one(system, material, chosen, self.figures if number else None)

    def _one(
        self, system: System, material: Material, chosen: list[Work], figures: Figures | None
    ) -> None:
        where = f"{system.name}, {material.name}"
        warm(material)
        try:
            with system.serving(material) as served:
                this = Round(served, figures, self.sizes, self.pace, self.store.folder)
                for work in chosen:
                    try:
                        work(this)
                    except (BenchmarkError, OSError) as error:
                        self._problem(f"{where}, {work.__name__}: {error}")
                cold = 1.0 - resident(material)
                if cold > 0.005:
                    self._problem(f"{where}: {cold:.1%} of the source left the page cache")
        except (BenchmarkError, OSError) as error:
            self._problem(f"{where}: {error}")
        for left in end_all(self.mounts):
            self._problem(f"{where}: left behind {left}")

    def _problem(self, text: str) -> None:
        say(f"PROBLEM: {text}")
        if text not in self.problems:
            self.problems.append(text)


def say(text: str) -> None:
    """Tell what is going on; the figures alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


def look_whether_idle() -> dict[str, Any]:
    """Return what ``idleness`` finds, and say so if the machine is not idle."""
    idle = idleness()
    if not idle["idle"]:
        say(f"The machine is NOT IDLE ({idle['busy_percent']} % busy): the figures are noise.")
        for one in idle["busiest"]:
            say(f"  {one['percent_of_a_cpu']:3} % of a CPU: {one['command']}")
    return idle


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    names = sorted({name for named in WORKS.values() for name in named} | set(WORKS))
    parser = argparse.ArgumentParser(
        prog="contrib/benchmarks/run",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--work",
        type=Path,
        default=Path("/var/tmp/vddkfs-benchmarks"),
        metavar="DIR",
        help="for the material, which is kept, and the mounts (default: %(default)s)",
    )
    add("--rounds", type=int, metavar="N", help="after the warm-up (default: 3; quick: 1)")
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"some of the work: {', '.join(names)}, or one work on one disk, as base.random",
    )
    add(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=list(DEFAULT_SYSTEMS),
        metavar="NAME",
        help=f"of {', '.join(SYSTEMS)} (default: {' '.join(DEFAULT_SYSTEMS)})",
    )
    add(
        "--quick",
        action="store_true",
        help="small disks, a short round, no warm-up: to see that all of it runs, not to measure",
    )
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--markdown", action="store_true", help="print the report for README.md")
    add("--report", type=Path, metavar="FILE", help="measure nothing, report an earlier run's FILE")
    arguments = parser.parse_args(words)
    known = {f"{disk}.{name}" for disk, named in WORKS.items() for name in named} | set(names)
    for name in arguments.only:
        if name not in known:
            parser.error(f"--only {name}: known are {', '.join(sorted(known))}")
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    return arguments


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    missing = missing_tools()
    if missing:
        raise BenchmarkError(missing)
    idle = look_whether_idle()
    sizes, pace = (QUICK, QUICK_PACE) if arguments.quick else (FULL, FULL_PACE)
    work = arguments.work.resolve()
    begun = time.monotonic()
    with supervised(work) as mounts:
        bench = Bench(
            sizes=sizes,
            pace=pace,
            rounds=arguments.rounds,
            warm_up=not arguments.quick,
            store=Store(work / sizes.name, sizes, say),
            mounts=mounts,
            only=frozenset(arguments.only),
            systems=[SYSTEMS[name](mounts) for name in arguments.systems],
        )
        bench.run()
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
    return carry_out("contrib/benchmarks/run", _arguments(words), _measure, present)


def present(result: dict[str, Any], *, as_markdown: bool) -> None:
    """Print the figures of *result*."""
    (markdown if as_markdown else show)(result, from_json(result["figures"]))


def carry_out(
    name: str,
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    present: Callable[..., None],
) -> int:
    """Measure, or take an earlier result, and *present* it; return the exit code of *name*.

    The exit code is 0 whatever the figures are. *arguments* say where the result is from
    (``report``) and where it goes (``json``, ``markdown``).
    """
    try:
        if arguments.report:
            result = json.loads(arguments.report.read_text())
        else:
            result = measure(arguments)
    except (BenchmarkError, OSError) as error:
        say(f"{name}: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; everything that was started has been ended")
        return 130
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    with contextlib.suppress(BrokenPipeError):
        present(result, as_markdown=arguments.markdown)
    return 0
