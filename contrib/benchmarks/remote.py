"""``contrib/benchmarks/run remote``: disks that VDDK reads, against what their profile can give."""

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import remote_files, remote_works
from benchmarks.command import ROOT, carry_out, look_whether_idle, present, say
from benchmarks.figures import Figures, as_json, remote_goals
from benchmarks.guest import Size
from benchmarks.machine import REMOTE_TOOLS, describe, missing_tools
from benchmarks.material import GIB, MIB, Material, kept_in_memory, resident, warm
from benchmarks.processes import BenchmarkError, descendants, end, end_all, supervised
from benchmarks.remote_site import PROFILES, SESSIONS, Site, SiteSizes
from benchmarks.remote_systems import DEFAULT_LIMIT, LIMIT, PEERS, TITLES, VARIANTS, make
from benchmarks.remote_works import LIMIT_SECONDS, Remote
from benchmarks.systems import Served
from benchmarks.works import QUICK_PACE, Pace

DESCRIPTION: Final = """\
Measure mounts of a simulated server against the limit of each of its profiles, as a C client finds
it in the same round, and against NBD with the same latency and bandwidth; then, on the profile lan,
random buffered reads, four disks at once and a guest's small files; then lost workers, and many
mounts on few sessions. README.md in this folder tells how to read the figures.
"""
WORKS: Final = ("reads", "buffered", "four", "files", "kill", "many")
FULL_PACE: Final = Pace(random=4, ramp=1)
_FILES: Final = Size("files", disk=512, small=20_000, large=(), reads=0)
_QUICK_FILES: Final = Size("files", disk=64, small=1_500, large=(), reads=0)
_SPARE: Final = 1 * GIB
"""Free space that is wanted besides the disks."""
_LIMITS: Final = (LIMIT, DEFAULT_LIMIT)

Reads = Callable[[Remote, Served], None]
Limits = Callable[[Remote, str], None]


@dataclass
class RemoteBench:
    """One run."""

    site: Site
    mounts: Path
    profiles: Sequence[str]
    systems: Sequence[str]
    rounds: int
    quick: bool
    figures: Figures = field(default_factory=Figures)
    problems: list[str] = field(default_factory=list)

    def run(self, works: Sequence[str]) -> None:
        """Do the work; what fails is noted, and the rest goes on."""
        for profile in self.profiles if "reads" in works else ():
            large = self.site.large()
            self._rounds(profile, large, self.systems, remote_works.reads, remote_works.limits)
        mounted = [name for name in self.systems if name not in (*_LIMITS, "stub")]
        if "buffered" in works:
            self._rounds("lan", self.site.large(), mounted, remote_works.buffered)
        if "four" in works:
            # The peers' rate is that of one server for each disk.
            ours = [name for name in self.systems if name == LIMIT or name.startswith("vddkfs")]
            limits = remote_works.four_limits
            self._rounds("lan", self.site.four(), ours, remote_works.four, limits)
        if "files" in works:
            self._rounds("lan", self.site.files(), mounted, remote_files.files)
        if "kill" in works:
            for number in range(1, self.rounds + 1):
                say(f"killed workers, round {number} of {self.rounds}")
                self._try("killed workers", self._kills)
        if "many" in works:
            say("many mounts")
            self.site.configure("nbdssl", f"sessions.limit = {SESSIONS}")
            self._try(
                "many mounts",
                lambda: remote_works.many(self.figures, self.site, self.mounts),
            )

    def _rounds(
        self,
        profile: str,
        material: Material,
        names: Sequence[str],
        reads: Reads,
        limits: Limits | None = None,
    ) -> None:
        """Have all systems of *names* read *material* in turn, and the C client say its limits."""
        self.site.configure(profile)
        with kept_in_memory(material) as locked:
            if not locked:
                say("may not mlock: the disk stays in the page cache if the kernel likes")
            for number in range(1 if self.quick else 0, self.rounds + 1):
                for name in names:
                    self._one(profile, material, name, number, reads, limits)

    def _one(
        self,
        profile: str,
        material: Material,
        name: str,
        number: int,
        reads: Reads,
        limits: Limits | None,
    ) -> None:
        pace = QUICK_PACE if self.quick else FULL_PACE
        seconds = LIMIT_SECONDS / 4 if self.quick else LIMIT_SECONDS
        this = Remote(self.site, profile, self.figures if number else None, pace, seconds)
        if name == DEFAULT_LIMIT and not remote_works.has_own_limit(profile):
            return
        system = None if name in _LIMITS else make(name, self.mounts, self.site, profile)
        if system is None and (limits is None or name not in _LIMITS):
            return
        where = f"{profile}, {material.name}, {name}"
        say(f"{where}: {f'round {number} of {self.rounds}' if number else 'warm-up'}")
        warm(material)

        def work() -> None:
            if system is not None:
                with system.serving(material) as served:
                    reads(this, served)
            elif limits is not None:
                limits(this, name)

        self._try(where, work)
        cold = 1.0 - resident(material)
        if cold > 0.005:
            self._problem(f"{where}: {cold:.1%} of the disk left the page cache")

    def _kills(self) -> None:
        self.site.configure("instant")
        system = make("vddkfs", self.mounts, self.site, "instant")
        assert system is not None
        with system.serving(self.site.large()) as served:
            remote_works.kills(self.figures, served)

    def _try(self, where: str, work: Callable[[], None]) -> None:
        """Do *work*; note what fails, and what it leaves behind."""
        try:
            work()
        except (BenchmarkError, OSError) as error:
            self._problem(f"{where}: {error}")
        for left in end_all(self.mounts, spare=[self.site.host]):
            self._problem(f"{where}: left behind {left}")

    def _problem(self, text: str) -> None:
        say(f"PROBLEM: {text}")
        if text not in self.problems:
            self.problems.append(text)


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="contrib/benchmarks/run remote",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument

    def names(known: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            chosen = [name for name in text.split(",") if name]
            for name in chosen:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name}: known are {', '.join(known)}")
            return [name for name in known if name in chosen]

        return parse

    def some(flag: str, known: Sequence[str], words: str, unasked: Sequence[str] = ()) -> None:
        usual = [name for name in known if name not in unasked]
        words += ": " + ",".join(usual)
        if unasked:
            words += f"; only when asked for: {','.join(unasked)}"
        add(flag, type=names(known), default=usual, metavar="LIST", help=words)

    work = Path("/var/tmp/vddkfs-benchmarks")
    add("--work", type=Path, default=work, metavar="DIR", help="as in run (default: %(default)s)")
    some("--profiles", PROFILES, "of the simulator")
    some("--systems", list(TITLES), "what is compared", list(VARIANTS))
    some("--only", WORKS, "some of the work")
    add("--rounds", type=int, metavar="N", help="after the warm-up (default: 3; quick: 1)")
    add(
        "--size",
        type=int,
        metavar="MIB",
        help="of the large disk; four have a quarter of it (default: 1024; quick: 128)",
    )
    add("--quick", action="store_true", help="to see that all of it runs, not to measure")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--markdown", action="store_true", help="print the report for README.md")
    add("--report", type=Path, metavar="FILE", help="measure nothing, report an earlier run's FILE")
    arguments = parser.parse_args(words)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.size = arguments.size or (128 if arguments.quick else 1024)
    if arguments.rounds < 1 or arguments.size < 16:
        parser.error("--rounds: at least 1; --size: at least 16")
    return arguments


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    missing = missing_tools(REMOTE_TOOLS)
    if missing:
        raise BenchmarkError(missing)
    idle = look_whether_idle()
    work = arguments.work.resolve()
    sizes = SiteSizes(
        large=arguments.size * MIB,
        four=arguments.size * MIB // 4 if "four" in arguments.only else 0,
        files=(_QUICK_FILES if arguments.quick else _FILES) if "files" in arguments.only else None,
    )
    begun = time.monotonic()
    with supervised(work) as mounts, contextlib.ExitStack() as stack:
        free = shutil.disk_usage(work).free
        if free < sizes.wanted + _SPARE:
            raise BenchmarkError(f"{work}: {free / GIB:.1f} GiB free are too few; see --work")
        site = Site(work / "remote", sizes)
        stack.callback(site.remove)
        say("building the simulator, making its site")
        site.make()
        stack.enter_context(site.served(work / "host.log"))
        # Before the host goes: whoever still reads would wait for it.
        stack.callback(lambda: end([p for p in descendants(os.getpid()) if p != site.host]))
        bench = RemoteBench(
            site=site,
            mounts=mounts,
            profiles=arguments.profiles,
            systems=arguments.systems,
            rounds=arguments.rounds,
            quick=arguments.quick,
        )
        bench.run(arguments.only)
    peers = list(PEERS)
    return {
        "when": time.strftime("%Y-%m-%d %H:%M %Z"),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "size": f"{arguments.size} MiB",
        "rounds": bench.rounds,
        "machine": describe(ROOT),
        "before": idle,
        "systems": {name: TITLES[name] for name in ["vddkfs", *TITLES] if name in bench.systems},
        "figures": as_json(bench.figures),
        "goals": [vars(goal) for goal in remote_goals(bench.figures, peers)],
        "problems": bench.problems,
    }


def main(words: Sequence[str]) -> int:
    """Run. Returns the exit code: 0 whatever the figures are."""
    return carry_out("contrib/benchmarks/run remote", _arguments(words), _measure, present)
