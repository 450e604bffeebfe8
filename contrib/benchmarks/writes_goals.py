"""The goals of ``run writes``. What counts is the ratio of each round, and of those the median."""

from typing import Final

from benchmarks.figures import METRICS, Figures, Goal
from benchmarks.writes_metrics import LIMIT, PEERS, READS, STUB

MOST_TIME: Final = 1.05
"""How much time a read may take with an overlay, to that without."""


def goals(figures: Figures) -> list[Goal]:
    """Return the goals of ``run writes``."""
    found = [
        _ratio_goal(figures, f"writes.lan.four.to-{LIMIT}", 0.8),
        _ratio_goal(figures, f"writes.lan.one.to-{LIMIT}", 0.8),
        _best_goal(figures, "writes.lan.one"),
        _ratio_goal(figures, f"writes.lan.random-16.to-{LIMIT}", 0.5),
        _best_goal(figures, "writes.lan.random-16"),
    ]
    found += [_time_goal(figures, f"writes.reads.{name}.time") for name in READS]
    found += [
        _ratio_goal(figures, f"writes.overlay.{name}.to-{STUB}", 0.8) for name in ("one", "four")
    ]
    return found


def _ratio_goal(figures: Figures, metric: str, least: float) -> Goal:
    title = f"{METRICS[metric].title}: at least {least:g}"
    value = figures.get(metric, "vddkfs")
    return Goal(title, _shown(figures, metric), None if value is None else value >= least)


def _best_goal(figures: Figures, metric: str) -> Goal:
    """No slower than the best peer."""
    ratios = {peer: figures.get(f"{metric}.to-{peer}", "vddkfs") for peer in PEERS}
    measured = {peer: ratio for peer, ratio in ratios.items() if ratio is not None}
    if not measured:
        title = f"{METRICS[metric].title}: at least the best peer's"
        return Goal(title, "not measured", None)
    best = min(measured, key=lambda peer: measured[peer])
    return _ratio_goal(figures, f"{metric}.to-{best}", 1.0)


def _time_goal(figures: Figures, metric: str) -> Goal:
    value = figures.get(metric, "vddkfs")
    title = f"{METRICS[metric].title}: at most {MOST_TIME:g}"
    return Goal(title, _shown(figures, metric), None if value is None else value <= MOST_TIME)


def _shown(figures: Figures, metric: str) -> str:
    value = figures.get(metric, "vddkfs")
    if value is None:
        return "not measured"
    rounds = figures.values[metric]["vddkfs"]
    return f"{value:.3f} times ({min(rounds):.3f} to {max(rounds):.3f})"
