"""The report of a run: tables on the terminal, or Markdown for README.md."""

from collections.abc import Iterator
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.figures import METRICS, Figures
from benchmarks.formats_metrics import TITLES as FORMATS_TITLES
from benchmarks.writes_metrics import TITLES as WRITES_TITLES

TITLES: Final = {
    "sequential": "Sequential buffered read of the whole file",
    "random": "Random reads of 4 KiB, O_DIRECT",
    "cached": "Random buffered reads of what vddkfs has cached and the kernel has not",
    "copy": "Sparse copy",
    "ready": "From the command to serving",
    "memory": "Memory of all processes of the system",
    "hung": "One disk hung, 200 reads on it: how the rest answers",
    "invalidate": "vddkfs invalidate of a disk of 62 TiB, its cache full",
    "remote": "Remote disk: reads",
    "remote-cpu": "Remote disk: CPU time of what serves",
    "remote-buffered": "Remote disk: random buffered reads, profile lan",
    "remote-four": "Four disks of one VM read at once, profile lan",
    "remote-files": "Small files of a guest on a remote disk, profile lan",
    "remote-loss": "Remote disk: a worker is killed, profile instant",
    "remote-many": "40 mounts of 2 disks, 50 sessions",
    **FORMATS_TITLES,
    **WRITES_TITLES,
}
_NOISY: Final = 0.1
"""A spread of the rounds above this share of the figure is shown."""
_LEGEND: Final = (
    "Median of the rounds (longest of all: maximum). In brackets: how many times better vddkfs is "
    "than that peer, below 1 worse. ± is half the spread of the rounds, where it is above 10 %."
)

Rows = list[list[str]]


def _tables(figures: Figures, systems: list[str]) -> Iterator[tuple[str, Rows]]:
    """Yield title and rows, the header first, of every table that has something in it."""
    for work, title in TITLES.items():
        metrics = [m for m in figures.values if METRICS[m].work == work]
        metrics.sort(key=list(METRICS).index)
        there = [s for s in systems if any(s in figures.values[m] for m in metrics)]
        if metrics:
            rows = [["", "unit", *there]]
            for metric in metrics:
                described = METRICS[metric]
                cells = [_cell(figures, metric, system) for system in there]
                rows.append([described.title, described.unit, *cells])
            yield title, rows


def _cell(figures: Figures, metric: str, system: str) -> str:
    value = figures.get(metric, system)
    if value is None:
        return ""
    rounds = figures.values[metric][system]
    words = [_number(value)]
    spread = (max(rounds) - min(rounds)) / 2
    if value and (spread / value > _NOISY or METRICS[metric].always_spread):
        words.append(f"±{100 * spread / value:.0f} %")
    ratio = figures.ratio(metric, "vddkfs", system)
    if system != "vddkfs" and ratio is not None:
        words.append(f"({ratio:.2f})")
    note = figures.notes.get(metric, {}).get(system)
    if note:
        words.append(f"[{note}]")
    return " ".join(words)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _goal_rows(result: dict[str, Any]) -> Rows:
    rows = [["goal", "reached", "met"]]
    for goal in result["goals"]:
        met = {True: "yes", False: "NO", None: "?"}[goal["met"]]
        rows.append([goal["title"], goal["reached"], met])
    return rows


def _facts(result: dict[str, Any]) -> list[str]:
    machine, before = result["machine"], result["before"]
    load = " ".join(map(str, before["load_average"]))
    idle = "idle" if before["idle"] else "NOT IDLE, so the figures are noise"
    versions = ["python", "pyfuse3", "trio", "libfuse", "qemu", "libnbd", "fio"]
    plain = ["qemu", "libnbd", "fio", "nbdkit"]
    versions += ["nbdkit"] if machine.get("nbdkit") else []
    facts = [
        f"{result['when']}, {result['size']} size, {result['rounds']} rounds, "
        f"{result['minutes']} minutes",
        f"vddkfs {machine['vddkfs']}",
        f"{machine['cpus']} CPUs ({machine['cpu']}), {machine['memory_gib']} GiB of memory, "
        f"Linux {machine['kernel']}",
        ", ".join(
            machine[name] if name in plain else f"{name} {machine[name]}" for name in versions
        ),
        f"before: {idle} ({before['busy_percent']} % busy, load {load})",
    ]
    if not before["idle"]:
        busiest = (f"{b['command']} ({b['percent_of_a_cpu']} %)" for b in before["busiest"])
        facts.append(f"busiest before: {', '.join(busiest)}")
    facts += [f"{name}: {title}" for name, title in result["systems"].items()]
    return facts


def show(result: dict[str, Any], figures: Figures) -> None:
    """Print the report for a person at a terminal."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    for fact in _facts(result):
        console.print(fact)
    for title, rows in [*_tables(figures, list(result["systems"])), ("Goals", _goal_rows(result))]:
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(rows[0]):
            text = title == "Goals" or number < 2
            table.add_column(name, justify="left" if text else "right")
        for row in rows[1:]:
            table.add_row(*row)
        console.print()
        console.print(table)
    console.print(_LEGEND)
    for problem in result["problems"]:
        console.print(f"PROBLEM: {problem}")


def markdown(result: dict[str, Any], figures: Figures) -> None:
    """Print the report as Markdown."""
    lines = [f"- {fact}" for fact in _facts(result)]
    lines += [f"- problem: {problem}" for problem in result["problems"]]
    lines += ["", _LEGEND]
    for title, rows in [*_tables(figures, list(result["systems"])), ("Goals", _goal_rows(result))]:
        text = 3 if title == "Goals" else 2
        rule = ["---"] * text + ["--:"] * (len(rows[0]) - text)
        lines += ["", f"### {title}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    print("\n".join(lines))
