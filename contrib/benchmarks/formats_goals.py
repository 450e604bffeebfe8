"""The goals of ``run formats``."""

from typing import Final

from benchmarks.figures import METRICS, Figures, Goal
from benchmarks.formats_metrics import CHAINS, HUGE, STREAM

OPEN_SECONDS: Final = 1.0
OPEN_MIB: Final = 200.0
STREAM_TIMES: Final = 1.5
"""How many times faster than qemu-storage-daemon streamOptimized is to be read."""
CHAIN_TIMES: Final = 1.5
"""How many times longer a read of the long chain may take than one of the short."""


def goals(figures: Figures) -> list[Goal]:
    """Return the goals of ``run formats``."""
    found = [_times_goal(figures, f"{STREAM}.sequential", STREAM_TIMES)]
    for name in HUGE:
        for metric in ("ready", "describe", "open"):
            found.append(_most_goal(figures, f"{name}.{metric}", OPEN_SECONDS))
        for metric in ("daemon", "worker"):
            found.append(_most_goal(figures, f"{name}.{metric}", OPEN_MIB))
    short, long = CHAINS
    for metric in ("buffered", "engine"):
        title = f"{METRICS[f'chain-{long}.{metric}'].title}: at most {CHAIN_TIMES:g} times"
        title += f" that of {short} links"
        less, more = (figures.get(f"chain-{links}.{metric}", "vddkfs") for links in CHAINS)
        if less and more:
            found.append(Goal(title, f"{more / less:.2f} times", more <= CHAIN_TIMES * less))
        else:
            found.append(Goal(title, "not measured", None))
    return found


def _times_goal(figures: Figures, metric: str, least: float) -> Goal:
    """At least *least* times the throughput of qemu-storage-daemon."""
    title = f"{METRICS[metric].title}: at least {least:g} times qsd"
    ratio = figures.ratio(metric, "vddkfs", "qsd")
    if ratio is None:
        return Goal(title, "not measured", None)
    return Goal(title, f"{ratio:.2f} times", ratio >= least)


def _most_goal(figures: Figures, metric: str, limit: float) -> Goal:
    described = METRICS[metric]
    title = f"{described.title}: at most {limit:g} {described.unit}"
    value = figures.get(metric, "vddkfs")
    if value is None:
        return Goal(title, "not measured", None)
    return Goal(title, f"{value:.3g} {described.unit}", value <= limit)
