"""``contrib/benchmarks/profile-read``: where the time of one 4 KiB O_DIRECT read goes."""

import argparse
import contextlib
import os
import pstats
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from benchmarks.command import say
from benchmarks.machine import idleness, missing_tools
from benchmarks.material import FULL, QUICK, Material, Sizes, Store, kept_in_memory, warm
from benchmarks.processes import BenchmarkError, command_line, cpu_ticks, sleeps, supervised
from benchmarks.systems import SYSTEMS, Served, System, Vddkfs
from benchmarks.works import Pace, fio

DESCRIPTION: Final = """\
Reads 4 KiB at random places of a VMDK with O_DIRECT, and says where the time goes, in three ways:

1. Undisturbed: latency, CPU time and sleeps of every process, for vddkfs and its peers. The stub
   is FUSE, pyfuse3 and trio; vddkfs less the stub is our own code and the way to the worker.
2. Functions of the daemon and of the worker, by cProfile, which makes Python about twice as slow:
   compare shares, not microseconds. What waits (poll, epoll) shows as time of its own.
3. System calls for each read, by strace where it is installed; counts only, it slows all down.
"""
_HERE: Final = Path(__file__).parent
_MICRO: Final = 1e6


class ProfiledVddkfs(Vddkfs):
    """vddkfs in front, daemon and worker under cProfile; what they found goes to *folder*."""

    def __init__(self, mounts: Path, folder: Path) -> None:
        super().__init__(mounts)
        self.folder = folder

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return the mount command, under the profiler."""
        profiled = (sys.executable, "-P", _HERE / "profiled.py", "daemon", self.folder)
        return [*profiled, "mount", "-f", material.leaf, mount]


class Profile:
    """One run of the helper."""

    def __init__(self, material: Material, sizes: Sizes, pace: Pace, depth: int, top: int) -> None:
        self._material = material
        self._sizes = sizes
        self._pace = pace
        self._depth = depth
        self._top = top
        self._console = Console(highlight=False, markup=False)
        if not self._console.is_terminal:
            self._console.width = 130

    def undisturbed(self, systems: Sequence[System]) -> None:
        """Print latency, CPU time and sleeps."""
        table = Table(title="1. Undisturbed; us and sleeps for each read", title_justify="left")
        for name in ("system", "process", "latency", "user", "kernel", "sleeps"):
            table.add_column(name, justify="left" if name in ("system", "process") else "right")
        tick = _MICRO / os.sysconf("SC_CLK_TCK")
        for system in systems:
            warm(self._material)
            with system.serving(self._material) as served:
                fio(served.file, self._sizes.dense, Pace(random=1, ramp=0), self._depth)
                pids = served.pids()
                before = {pid: (*cpu_ticks(pid), sleeps(pid)) for pid in pids}
                result = fio(served.file, self._sizes.dense, self._pace, self._depth)
                name, latency = system.name, f"{result.microseconds:.1f}"
                for pid in pids:
                    after = (*cpu_ticks(pid), sleeps(pid))
                    user, kernel, slept = (
                        (now - then) / result.reads
                        for now, then in zip(after, before[pid], strict=True)
                    )
                    costs = (f"{user * tick:.1f}", f"{kernel * tick:.1f}", f"{slept:.2f}")
                    table.add_row(name, command_line(pid)[:45], latency, *costs)
                    name = latency = ""
            table.add_section()
        self._console.print(table)

    def functions(self, system: ProfiledVddkfs) -> None:
        """Print the functions of the daemon and the worker that take most of the time."""
        warm(self._material)
        with system.serving(self._material) as served:
            result = fio(served.file, self._sizes.dense, self._pace, self._depth)
        for who in ("daemon", "worker"):
            found = system.folder / f"{who}.pstats"
            if not found.exists():
                raise BenchmarkError(f"the {who} left no profile")
            title = (
                f"2. Functions of the {who}; us for each read of {result.microseconds:.0f} us in "
                "all, under cProfile"
            )
            self._console.print()
            self._console.print(self._profile_table(title, found, result.reads))

    def _profile_table(self, title: str, found: Path, reads: int) -> Table:
        table = Table(title=title, title_justify="left")
        for name in ("own us", "with callees us", "calls", "function"):
            table.add_column(name, justify="left" if name == "function" else "right")
        stats = pstats.Stats(str(found)).get_stats_profile().func_profiles
        # Called once or so: the start, the end, and what runs all the time.
        often = [
            (name, one) for name, one in stats.items() if int(one.ncalls.split("/")[0]) > reads / 20
        ]
        often.sort(key=lambda item: -item[1].tottime)
        for name, one in often[: self._top]:
            calls = int(one.ncalls.split("/")[0]) / reads
            where = Path(one.file_name).name
            place = f"{where}:{one.line_number} " if one.line_number else ""
            own, whole = (_MICRO * seconds / reads for seconds in (one.tottime, one.cumtime))
            table.add_row(f"{own:.1f}", f"{whole:.1f}", f"{calls:.2f}", place + name)
        return table

    def system_calls(self, system: System, folder: Path) -> None:
        """Print how many system calls a read takes, for the daemon and the worker."""
        warm(self._material)
        counted: dict[str, dict[str, float]] = {}
        with system.serving(self._material) as served:
            fio(served.file, self._sizes.dense, Pace(random=1, ramp=0), self._depth)
            reports = {pid: folder / f"strace-{pid}" for pid in served.pids()}
            names = {pid: "worker" if pid != served.daemon else "daemon" for pid in reports}
            with _traced(served, reports):
                result = fio(served.file, self._sizes.dense, Pace(random=2, ramp=0), self._depth)
            for pid, report in reports.items():
                for call, count in _counts(report):
                    counted.setdefault(call, {})[names[pid]] = count / result.reads
        title = "3. System calls for each read, above 0.05"
        table = Table("call", "daemon", "worker", title=title, title_justify="left")
        for call, by in sorted(counted.items(), key=lambda item: -sum(item[1].values())):
            if max(by.values()) > 0.05:
                table.add_row(call, *(f"{by.get(who, 0):.2f}" for who in ("daemon", "worker")))
        self._console.print()
        self._console.print(table)


@contextlib.contextmanager
def _traced(served: Served, reports: dict[int, Path]) -> Iterator[None]:
    """Have strace count the system calls of each process."""
    tracers = [
        subprocess.Popen(
            ["strace", "-c", "-f", "-q", "-p", str(pid), "-o", str(report)],
            stderr=subprocess.DEVNULL,
        )
        for pid, report in reports.items()
    ]
    try:
        yield
    finally:
        for tracer in tracers:
            # It lets go of the process and writes its report.
            tracer.send_signal(signal.SIGINT)
            tracer.wait()


def _counts(report: Path) -> Iterator[tuple[str, int]]:
    """Yield name and number of calls from a report of strace -c."""
    for line in report.read_text().splitlines():
        words = line.split()
        if len(words) >= 5 and words[3].isdigit() and words[-1] != "total":
            yield words[-1], int(words[3])


def main(words: Sequence[str]) -> int:
    """Run. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="contrib/benchmarks/profile-read",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    work = Path("/var/tmp/vddkfs-benchmarks")
    add("--work", type=Path, default=work, metavar="DIR", help="as in run (default: %(default)s)")
    add("--seconds", type=int, default=5, help="how long to read in each way (default: 5)")
    add("--depth", type=int, default=1, help="reads at once (default: 1)")
    add("--top", type=int, default=15, help="functions to show (default: 15)")
    add("--quick", action="store_true", help="the small material of run --quick")
    arguments = parser.parse_args(words)
    try:
        _run(arguments)
    except (BenchmarkError, OSError) as error:
        say(f"contrib/benchmarks/profile-read: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; everything that was started has been ended")
        return 130
    return 0


def _run(arguments: argparse.Namespace) -> None:
    missing = missing_tools()
    if missing:
        raise BenchmarkError(missing)
    idle = idleness()
    if not idle["idle"]:
        say(f"The machine is NOT IDLE ({idle['busy_percent']} % busy): the figures are noise.")
    sizes = QUICK if arguments.quick else FULL
    work = arguments.work.resolve()
    with supervised(work) as mounts:
        material = Store(work / sizes.name, sizes, say).base()
        pace = Pace(random=arguments.seconds, ramp=0)
        profile = Profile(material, sizes, pace, arguments.depth, arguments.top)
        folder = work / "profiles"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with kept_in_memory(material):
            names = ("vddkfs", "qsd", "nbdfuse", "stub", "stub-plain")
            profile.undisturbed([SYSTEMS[name](mounts) for name in names])
            profile.functions(ProfiledVddkfs(mounts, folder))
            if shutil.which("strace"):
                profile.system_calls(Vddkfs(mounts), folder)
            else:
                say("strace is not installed: no counts of system calls")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
