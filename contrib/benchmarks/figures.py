"""What is measured: the metrics, the values of each round, and the issue's goals."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.formats_metrics import FORMATS_METRICS
from benchmarks.metric import Metric
from benchmarks.writes_metrics import WRITES_METRICS

MIB: Final = 1024 * 1024
REMOTE_DEPTHS: Final = (1, 16, 64)
"""Reads at once of a remote disk."""


def _metrics(disk: str, words: str) -> dict[str, Metric]:
    return {
        f"{disk}.ready": Metric("ready", f"{words}: command to first stat", "s"),
        f"{disk}.first-read": Metric("ready", f"{words}: command to first 4 KiB read", "s"),
        f"{disk}.sequential": Metric("sequential", f"{words}: dd bs=1M", "MiB/s", True),
        f"{disk}.random-1": Metric("random", f"{words}: 4 KiB O_DIRECT, depth 1", "IOPS", True),
        f"{disk}.latency-1": Metric("random", f"{words}: latency of that, mean", "us"),
        f"{disk}.latency99-1": Metric("random", f"{words}: latency of that, 99 %", "us"),
        f"{disk}.random-16": Metric("random", f"{words}: 4 KiB O_DIRECT, depth 16", "IOPS", True),
        f"{disk}.latency99-16": Metric("random", f"{words}: latency of that, 99 %", "us"),
        f"{disk}.memory": Metric("memory", f"{words}: PSS after dd", "MiB"),
        f"{disk}.memory-full": Metric("memory", f"{words}: PSS after scattered reads", "MiB"),
        f"{disk}.memory-goal": Metric("memory", f"{words}: the goal for both", "MiB"),
    }


def _hung(load: str) -> dict[str, Metric]:
    found = {}
    for kind, words in (
        ("read", "4 KiB O_DIRECT read"),
        ("list", "ls and stat"),
        ("status", "status.json"),
    ):
        title = f"{words}, {load}"
        found[f"hung.{load}.{kind}.max"] = Metric("hung", f"{title}: longest", "ms", combine=max)
        found[f"hung.{load}.{kind}.median"] = Metric("hung", f"{title}: median", "ms")
    title = f"requests that hung in the worker, {load}"
    found[f"hung.{load}.in-flight"] = Metric("hung", title, "", combine=min)
    return found


def _remote(profile: str) -> dict[str, Metric]:
    random = {
        f"remote.{profile}.random-{depth}": Metric(
            "remote", f"{profile}: 4 KiB O_DIRECT, depth {depth}", "IOPS", True
        )
        for depth in REMOTE_DEPTHS
    }
    return {
        f"remote.{profile}.sequential": Metric("remote", f"{profile}: dd bs=1M", "MiB/s", True),
        **random,
        f"remote.{profile}.cpu": Metric("remote-cpu", f"{profile}: of dd", "s/GiB"),
        f"remote.{profile}.cpu-16": Metric(
            "remote-cpu", f"{profile}: of a 4 KiB read, depth 16", "us"
        ),
    }


METRICS: Final = {
    **FORMATS_METRICS,
    **_metrics("base", "base"),
    "base.cached": Metric("cached", "base: 4 KiB buffered, each block once", "IOPS", True),
    **_metrics("chain", "chain of five"),
    **_metrics("thin", "thin disk"),
    "thin.copy": Metric("copy", "cp --sparse=auto of the thin disk", "s"),
    **_hung("nothing hung"),
    **_hung("buffered"),
    **_hung("direct"),
    **_hung("opening"),
    "wide.cache": Metric("invalidate", "invalidate: steps cache and tables", "ms", combine=max),
    "wide.daemon": Metric("invalidate", "invalidate: all steps", "ms", combine=max),
    "wide.command": Metric("invalidate", "invalidate: the whole command", "ms"),
    "wide.status": Metric("invalidate", "status.json beside it: longest", "ms", combine=max),
    **_remote("lan"),
    **_remote("nbdssl"),
    **_remote("nbdssl-tuned"),
    **_remote("san"),
    "remote.lan.buffered-1": Metric(
        "remote-buffered", "lan: 4 KiB buffered, one reader", "IOPS", True
    ),
    "remote.lan.buffered-16": Metric(
        "remote-buffered", "lan: 4 KiB buffered, sixteen readers", "IOPS", True
    ),
    "remote.lan.four": Metric("remote-four", "lan: four disks together", "MiB/s", True),
    "remote.lan.four-even": Metric(
        "remote-four", "lan: slowest to fastest of four readers, worst round", "", True, combine=min
    ),
    "remote.lan.files": Metric("remote-files", "lan: find and md5sum of small files", "s"),
    "remote.lan.files-fetched": Metric("remote-files", "lan: read of the source for that", "MiB"),
    "remote.kill.direct": Metric(
        "remote-loss", "kill -9 to the next 4 KiB O_DIRECT read: longest", "s", combine=max
    ),
    "remote.kill.direct.median": Metric("remote-loss", "the same: median", "s"),
    "remote.kill.start": Metric("remote-loss", "a worker's first start, beside it", "s"),
    "remote.many.mount": Metric("remote-many", "until all are mounted", "s"),
    "remote.many.read": Metric("remote-many", "until all 80 disks are read, at once", "s"),
    "remote.many.median": Metric("remote-many", "one disk, from open to end: median", "s"),
    "remote.many.longest": Metric("remote-many", "the same: longest", "s", combine=max),
    "remote.many.mib": Metric("remote-many", "size of a disk", "MiB"),
    **WRITES_METRICS,
}


@dataclass
class Figures:
    """The values of a run: by metric, by system, one a round. *notes* mark a figure."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    notes: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, metric: str, system: str, value: float, note: str = "") -> None:
        """Note one round's value."""
        self.values.setdefault(metric, {}).setdefault(system, []).append(value)
        if note:
            self.notes.setdefault(metric, {})[system] = note

    def get(self, metric: str, system: str) -> float | None:
        """Return the figure of all rounds, or None where there is none."""
        rounds = self.values.get(metric, {}).get(system)
        return METRICS[metric].combine(rounds) if rounds else None

    def ratio(self, metric: str, system: str, peer: str) -> float | None:
        """Return how many times better *system* is than *peer* (below 1: worse)."""
        mine, theirs = self.get(metric, system), self.get(metric, peer)
        if not mine or not theirs:
            return None
        return mine / theirs if METRICS[metric].more_is_better else theirs / mine


@dataclass(frozen=True)
class Goal:
    """A goal of the issue, what was reached, and whether that meets it (None: not measured)."""

    title: str
    reached: str
    met: bool | None


def goals(figures: Figures) -> list[Goal]:
    """Return all goals."""
    found = []
    for disk in ("base", "chain"):
        for metric, peer, least in (
            ("sequential", "qsd", 1.2),
            ("sequential", "nbdfuse", 2.0),
            ("random-1", "nbdfuse", 1.0),
            ("random-16", "nbdfuse", 1.0),
        ):
            found.append(_ratio_goal(figures, f"{disk}.{metric}", peer, least))
    found.append(_ratio_goal(figures, "base.cached", "stub", 0.9))
    found.append(_ratio_goal(figures, "thin.copy", "qsd", 0.5))
    for disk in ("base", "chain", "thin"):
        found.append(_limit_goal(figures, f"{disk}.ready", 1.0))
    for disk in ("base", "chain"):
        limit = figures.get(f"{disk}.memory-goal", "vddkfs")
        found.append(_limit_goal(figures, f"{disk}.memory", limit))
        found.append(_limit_goal(figures, f"{disk}.memory-full", limit))
    for load in ("buffered", "direct"):
        for kind in ("read", "list", "status"):
            found.append(_limit_goal(figures, f"hung.{load}.{kind}.max", 100.0))
    found.append(_limit_goal(figures, "wide.cache", 100.0))
    return found


def remote_goals(figures: Figures, peers: Sequence[str]) -> list[Goal]:
    """Return the goals of ``run remote``."""
    found = []
    for profile in ("lan", "nbdssl", "nbdssl-tuned", "san"):
        of_limit, of_stub = (0.9, 0.95) if profile == "lan" else (0.85, 0.9)
        metric = f"remote.{profile}.sequential"
        found.append(_sequential_goal(figures, metric, of_limit, of_stub))
        compared = [metric]
        # Nothing but lan lets as many requests be under way as nbdkit does: see README.md.
        if profile == "lan":
            found.append(_ratio_goal(figures, "remote.lan.random-1", "limit", 0.85))
            found.append(_ratio_goal(figures, "remote.lan.random-16", "limit", 0.65))
            compared += [f"remote.lan.random-{depth}" for depth in REMOTE_DEPTHS]
        for metric in compared:
            best = _best(figures, metric, peers)
            if best:
                # Where the rate alone decides, all are equal but for what nbdkit lets through.
                found.append(_ratio_goal(figures, metric, best, 1.0 if profile == "lan" else 0.98))
    found.append(_ratio_goal(figures, "remote.lan.four", "limit", 0.9))
    found.append(_least_goal(figures, "remote.lan.four-even", 0.7))
    best = _best(figures, "remote.lan.files", peers) or "the best peer"
    found.append(_ratio_goal(figures, "remote.lan.files", best, 2.0))
    found.append(_limit_goal(figures, "remote.kill.direct", 0.5))
    return found


def _best(figures: Figures, metric: str, peers: Sequence[str]) -> str:
    """Return the best of *peers*; "" if none was measured."""
    found = {peer: value for peer in peers if (value := figures.get(metric, peer))}
    if not found:
        return ""
    return (max if METRICS[metric].more_is_better else min)(found, key=lambda peer: found[peer])


def _sequential_goal(figures: Figures, metric: str, of_limit: float, of_stub: float) -> Goal:
    """*of_limit* of the limit, or *of_stub* of the stub where that is lower."""
    limit, stub = (figures.get(metric, name) for name in ("limit", "stub"))
    if limit and stub and of_stub * stub < of_limit * limit:
        return _ratio_goal(figures, metric, "stub", of_stub)
    return _ratio_goal(figures, metric, "limit", of_limit)


def _ratio_goal(figures: Figures, metric: str, peer: str, least: float) -> Goal:
    title = f"{METRICS[metric].title}: at least {least:g} times {peer}"
    if not METRICS[metric].more_is_better:
        title = f"{METRICS[metric].title}: at most {1 / least:g} times the time of {peer}"
    ratio = figures.ratio(metric, "vddkfs", peer)
    if ratio is None:
        return Goal(title, "not measured", None)
    if METRICS[metric].more_is_better:
        return Goal(title, f"{ratio:.2f} times", ratio >= least)
    return Goal(title, f"{1 / ratio:.2f} times", ratio >= least)


def _limit_goal(figures: Figures, metric: str, limit: float | None) -> Goal:
    described = METRICS[metric]
    value = figures.get(metric, "vddkfs")
    shown = f"{limit:g}" if limit is not None else "?"
    title = f"{described.title}: at most {shown} {described.unit}"
    if value is None or limit is None:
        return Goal(title, "not measured", None)
    return Goal(title, f"{value:.3g} {described.unit}", value <= limit)


def _least_goal(figures: Figures, metric: str, least: float) -> Goal:
    described = METRICS[metric]
    value = figures.get(metric, "vddkfs")
    title = f"{described.title}: at least {least:g} {described.unit}".rstrip()
    if value is None:
        return Goal(title, "not measured", None)
    return Goal(title, f"{value:.3g} {described.unit}".rstrip(), value >= least)


def as_json(figures: Figures) -> dict[str, Any]:
    """Return the figures as JSON has them, medians and ratios included."""
    found: dict[str, Any] = {}
    for metric, by_system in figures.values.items():
        found[metric] = {
            "title": METRICS[metric].title,
            "unit": METRICS[metric].unit,
            "systems": {
                system: {
                    "figure": figures.get(metric, system),
                    "rounds": rounds,
                    "note": figures.notes.get(metric, {}).get(system, ""),
                    "vddkfs_is_better_by": figures.ratio(metric, "vddkfs", system),
                }
                for system, rounds in by_system.items()
            },
        }
    return found


def from_json(found: dict[str, Any]) -> Figures:
    """Return the figures of ``as_json``."""
    figures = Figures()
    for metric, described in found.items():
        for system, one in described["systems"].items():
            for value in one["rounds"]:
                figures.add(metric, system, value, one["note"])
    return figures
