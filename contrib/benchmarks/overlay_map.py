"""``contrib/benchmarks/run overlay-map``: memory and time of the map of an overlay.

Blocks of 4 KiB are written all over an image, each to its own place; then some are looked up, most
of them at places that were never written. In a process of its own, because memory is what counts.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.command import ROOT, carry_out
from benchmarks.machine import describe
from vddkfs.disks.overlay.table import BLOCK, BlockMap

DESCRIPTION: Final = """\
Fill the map of an overlay with scattered blocks, and tell its memory and how long looking takes.
The goals, for ten million blocks over 2 TiB: lookups under 5 us, memory under 200 MiB.
"""
TIB: Final = 1024**4
MIB: Final = 1024**2
_LOOKUPS: Final = 200_000
_ROUNDS: Final = 5


def measure(writes: int, span: int) -> dict[str, Any]:
    """Return the figures for *writes* blocks anywhere in *span* bytes."""
    blocks = span // BLOCK
    draw = random.Random(1).randrange
    found = BlockMap()
    before = _resident()
    begun = time.perf_counter()
    for _ in range(writes):
        draw(blocks)
    drawing = time.perf_counter() - begun
    draw = random.Random(1).randrange
    begun = time.perf_counter()
    for place in range(writes):
        found.set(draw(blocks), 1, place)
    filling = time.perf_counter() - begun - drawing
    memory = _resident() - before
    draw = random.Random(2).randrange
    anywhere = [draw(blocks) for _ in range(_LOOKUPS)]
    written = random.Random(1).randrange
    there = [written(blocks) for _ in range(min(writes, _LOOKUPS))]
    return {
        "writes": writes,
        "runs": found.entries,
        "span": span,
        "memory": memory,
        "set_us": 1e6 * filling / writes,
        "lookup_us": _lookup(found.runs, anywhere),
        "lookup_there_us": _lookup(found.runs, there),
        "touched_us": _lookup(found.touched, anywhere),
    }


def _lookup(look: Callable[[int, int], object], blocks: list[int]) -> float:
    """Return the microseconds of a lookup: the median of some rounds."""
    times = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        for block in blocks:
            look(block, 1)
        times.append(1e6 * (time.perf_counter() - begun) / len(blocks))
    return sorted(times)[_ROUNDS // 2]


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="contrib/benchmarks/run overlay-map",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--writes", type=int, default=10_000_000, metavar="N", help="blocks (default: %(default)s)")
    add("--span", type=float, default=2, metavar="TIB", help="over so much (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--markdown", action="store_true", help="print the report for README.md")
    add("--report", type=Path, metavar="FILE", help="measure nothing, report an earlier run's FILE")
    add("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    words = ["--inside", f"--writes={arguments.writes}", f"--span={arguments.span}"]
    command = [sys.executable, "-m", "benchmarks", "overlay-map", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return {
        "when": time.strftime("%Y-%m-%d %H:%M %Z"),
        "machine": describe(ROOT),
        "figures": json.loads(done.stdout),
    }


def present(result: dict[str, Any], *, as_markdown: bool) -> None:
    """Print the figures of *result*; they are Markdown anyway."""
    figures = result["figures"]
    goal = figures["writes"] == 10_000_000 and figures["span"] == 2 * TIB
    memory, lookup = figures["memory"] / MIB, max(figures["lookup_us"], figures["lookup_there_us"])
    rows = [
        ("memory", f"{memory:.0f} MiB", "200 MiB", memory < 200),
        ("lookup, longest of the kinds", f"{lookup:.2f} us", "5 us", lookup < 5),
        ("is anything there", f"{figures['touched_us']:.2f} us", "", True),
        ("write", f"{figures['set_us']:.2f} us", "", True),
    ]
    print(
        f"{result['when']}, Linux {result['machine']['kernel']}: {figures['writes']:,} writes over "
        f"{figures['span'] / TIB:g} TiB, {figures['runs']:,} runs\n"
    )
    print("| | measured | goal | |\n| --- | --: | --: | --- |")
    for name, measured, wanted, met in rows:
        verdict = ("met" if met else "MISSED") if goal and wanted else ""
        print(f"| {name} | {measured} | {wanted if goal else ''} | {verdict} |")


def main(words: Sequence[str]) -> int:
    """Run. Returns the exit code: 0 whatever the figures are."""
    arguments = _arguments(words)
    if arguments.inside:
        print(json.dumps(measure(arguments.writes, int(arguments.span * TIB))))
        return 0
    return carry_out("contrib/benchmarks/run overlay-map", arguments, _measure, present)
