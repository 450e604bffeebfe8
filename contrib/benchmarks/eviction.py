"""``contrib/benchmarks/run eviction``: hit ratios of eviction policies, on recorded traces."""

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.command import ROOT, carry_out, say
from benchmarks.guest import FULL, QUICK
from benchmarks.machine import TOOLS, describe, missing_tools
from benchmarks.material import GIB, MIB
from benchmarks.policies import BLOCK, POLICIES
from benchmarks.processes import BenchmarkError, end_all, supervised
from benchmarks.replay import FRAME, Outcome, Replay, footprint, requests_of
from benchmarks.traced import Read, load
from benchmarks.traces import TITLES, Recorder

DESCRIPTION: Final = """\
Record what readers of a mounted guest ask for, then replay it through caches of several sizes with
several eviction policies. README.md in this folder tells how to read the figures. Wants root, for
loop devices; it does not want an idle machine.
"""
PRODUCT: Final = "S3-FIFO"
UNDEMOTED: Final = "S3-FIFO, no hints"
PERCENTS: Final = (5, 10, 25, 50)
"""Sizes of the caches, of what a trace touches."""
_TOOLS: Final = {
    **{tool: TOOLS[tool] for tool in ("qemu-img", "fusermount3")},
    "mkfs.ext4": ("e2fsprogs", "e2fsprogs"),
    "losetup": ("util-linux", "util-linux"),
}
_LEGEND: Final = (
    f"S3-FIFO is the product's; it and the first three are told what streams are through with, "
    f'"{UNDEMOTED}" is not. A hit is a request all of whose bytes were in the cache.'
)

Rows = list[list[str]]


def replay(reads: Sequence[Read]) -> dict[str, Any]:
    """Return what a trace is, and what becomes of it with each policy in caches of each size."""
    requests = requests_of(reads)
    blocks = footprint(requests)
    caches = []
    for percent in PERCENTS:
        capacity = max(blocks * percent // 100, 2 * FRAME)
        outcomes: dict[str, Outcome] = {}
        for name, make in POLICIES.items():
            outcomes[name] = Replay(make(requests, capacity), capacity).run(requests)
            if name == PRODUCT:
                alone = Replay(make(requests, capacity), capacity, demoting=False)
                outcomes[UNDEMOTED] = alone.run(requests)
        caches.append(
            {
                "percent": percent,
                "bytes": capacity * BLOCK,
                "outcomes": {name: asdict(outcome) for name, outcome in outcomes.items()},
            }
        )
    return {
        "requests": len(requests),
        "sequential": sum(request.sequential for request in requests),
        "bytes": sum(request.end - request.start for request in requests),
        "footprint": blocks * BLOCK,
        "caches": caches,
    }


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="contrib/benchmarks/run eviction",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    work = Path("/var/tmp/vddkfs-benchmarks")
    add("--work", type=Path, default=work, metavar="DIR", help="as in run (default: %(default)s)")
    add("--quick", action="store_true", help="a small disk: to see that all of it runs")
    add("--keep-traces", type=Path, metavar="DIR", help="write the traces there, one file each")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--markdown", action="store_true", help="print the report for README.md")
    add("--report", type=Path, metavar="FILE", help="record nothing, report an earlier run's FILE")
    return parser.parse_args(words)


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    missing = missing_tools(_TOOLS)
    if missing:
        raise BenchmarkError(missing)
    if os.geteuid():
        raise BenchmarkError("wants root, to mount the guest's file system")
    size = QUICK if arguments.quick else FULL
    work = arguments.work.resolve()
    if arguments.keep_traces:
        arguments.keep_traces.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    traces: dict[str, Any] = {}
    problems = []
    with supervised(work) as mounts, contextlib.ExitStack() as stack:
        wanted = 4 * size.disk * MIB
        free = shutil.disk_usage(work).free
        if free < wanted:
            raise BenchmarkError(
                f"{work}: {free / GIB:.1f} GiB free, {wanted / GIB:.1f} wanted; see --work"
            )
        folder = work / "eviction"
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        recorder = Recorder(folder, mounts, size)
        say("making the guest's disks")
        recorder.make()
        for name in TITLES:
            say(f"recording: {name}")
            try:
                file = recorder.record(name)
                reads = load(file)
                if arguments.keep_traces:
                    shutil.copyfile(file, arguments.keep_traces / f"{name}.tsv")
                say(f"replaying: {name}")
                traces[name] = {"title": TITLES[name], **replay(reads)}
            except (BenchmarkError, OSError) as error:
                problems.append(f"{name}: {error}")
                say(f"PROBLEM: {name}: {error}")
            for left in end_all(mounts):
                problems.append(f"{name}: left behind {left}")
                say(f"PROBLEM: {name}: left behind {left}")
    return {
        "when": time.strftime("%Y-%m-%d %H:%M %Z"),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "size": size.name,
        "machine": describe(ROOT),
        "traces": traces,
        "problems": problems,
    }


def _rows(result: dict[str, Any]) -> tuple[Rows, Rows]:
    """Return the tables: hits by requests and by bytes, and what was fetched; headers first."""
    names = [*list(POLICIES)[:-1], UNDEMOTED, list(POLICIES)[-1]]
    hits, fetched = [["trace", "cache", *names]], [["trace", "cache", *names]]
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for trace, found in result["traces"].items():
        for cache in found["caches"]:
            size = f"{cache['percent']} %, {cache['bytes'] / MIB:.0f} MiB"
            outcomes = [cache["outcomes"][name] for name in names]
            for name, outcome in zip(names, outcomes, strict=True):
                by_requests = 100 * outcome["hits"] / max(outcome["requests"], 1)
                by_bytes = 100 * outcome["hit_bytes"] / max(outcome["bytes"], 1)
                ratios[name].append((by_requests, by_bytes))
            hits.append([trace, size, *(_pair(*ratios[name][-1]) for name in names)])
            megabytes = (f"{outcome['fetched_bytes'] / MIB:,.0f}" for outcome in outcomes)
            fetched.append([trace, size, *megabytes])
    if len(hits) > 1:
        means = (
            [sum(column) / len(column) for column in zip(*ratios[n], strict=True)] for n in names
        )
        hits.append(["mean", "", *(_pair(*mean) for mean in means)])
    return hits, fetched


def _pair(by_requests: float, by_bytes: float) -> str:
    return f"{by_requests:.1f} / {by_bytes:.1f}"


def _facts(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    facts = [
        f"{result['when']}, {result['size']} size, {result['minutes']} minutes; vddkfs "
        f"{machine['vddkfs']}, Linux {machine['kernel']}, {machine['memory_gib']} GiB of memory"
    ]
    for name, found in result["traces"].items():
        facts.append(
            f"{name}: {found['title']}; {found['requests']:,} requests "
            f"({found['sequential']:,} of streams) of {found['bytes'] / MIB:,.0f} MiB, "
            f"in {found['footprint'] / MIB:,.0f} MiB"
        )
    return facts


_TITLES: Final = (
    "Hits by requests / by bytes, %",
    "Fetched from the source, MiB",
)


def show(result: dict[str, Any]) -> None:
    """Print the report for a person at a terminal."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    for fact in _facts(result):
        console.print(fact)
    for title, rows in zip(_TITLES, _rows(result), strict=True):
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(rows[0]):
            table.add_column(name, justify="left" if number < 2 else "right")
        for row in rows[1:]:
            table.add_row(*row)
        console.print()
        console.print(table)
    console.print(_LEGEND)
    for problem in result["problems"]:
        console.print(f"PROBLEM: {problem}")


def markdown(result: dict[str, Any]) -> None:
    """Print the report as Markdown."""
    lines = [f"- {fact}" for fact in _facts(result)]
    lines += [f"- problem: {problem}" for problem in result["problems"]]
    lines += ["", _LEGEND]
    for title, rows in zip(_TITLES, _rows(result), strict=True):
        rule = ["---"] * 2 + ["--:"] * (len(rows[0]) - 2)
        lines += ["", f"{title}:", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    print("\n".join(lines))


def present(result: dict[str, Any], *, as_markdown: bool) -> None:
    """Print the report of *result*."""
    (markdown if as_markdown else show)(result)


def main(words: Sequence[str]) -> int:
    """Run. Returns the exit code: 0 whatever the figures are."""
    return carry_out("contrib/benchmarks/run eviction", _arguments(words), _measure, present)
