"""What ``run writes`` measures: its metrics and tables.

A metric that ends in ``.to-NAME`` is that before it as a ratio to what NAME had in the same round.
"""

from typing import Final

from benchmarks.metric import Metric

LAN: Final = {
    "one": ("dd bs=1M oflag=direct", "MiB/s"),
    "four": ("four writers, 1 MiB O_DIRECT", "MiB/s"),
    "random-16": ("4 KiB O_DIRECT random, depth 16", "IOPS"),
}
READS: Final = {
    "sequential": ("dd bs=1M", "MiB/s"),
    "random-1": ("4 KiB O_DIRECT random, depth 1", "IOPS"),
    "random-16": ("4 KiB O_DIRECT random, depth 16", "IOPS"),
}
OVERLAY: Final = {name: LAN[name] for name in ("one", "four")}
TITLES: Final = {
    "writes": "Writes to the base of a remote disk, profile lan",
    "writes-cpu": "Writes to the base of a remote disk, profile lan: CPU time of what serves",
    "overlay-reads": "Overlay: reads of ranges that were never written",
    "overlay-writes": "Overlay: writes to ranges that it does not have yet",
}
LIMIT: Final = "limit"
PLAIN: Final = "no-overlay"
STUB: Final = "write-stub"
PEERS: Final = ("nbdfuse", "qsd")


def _lan() -> dict[str, Metric]:
    found = {}
    for name, (title, unit) in LAN.items():
        title = f"lan: {title}"
        found[f"lan.{name}"] = Metric("writes", title, unit, True)
        for other in (LIMIT, *PEERS):
            found[f"lan.{name}.to-{other}"] = _times("writes", title, other)
    found["lan.source"] = Metric("writes", "dd: reading its source alone", "MiB/s", True)
    found["lan.cpu"] = Metric("writes-cpu", "lan: of dd", "s/GiB")
    found["lan.cpu-16"] = Metric("writes-cpu", "lan: of a 4 KiB write, depth 16", "us")
    return found


def _reads() -> dict[str, Metric]:
    found = {}
    for name, (title, unit) in READS.items():
        found[f"reads.{name}"] = Metric("overlay-reads", title, unit, True)
        found[f"reads.{name}.time"] = Metric(
            "overlay-reads", f"{title}: time to that without", "times", always_spread=True
        )
    return found


def _writes() -> dict[str, Metric]:
    found = {}
    for name, (title, unit) in OVERLAY.items():
        found[f"overlay.{name}"] = Metric("overlay-writes", title, unit, True)
        found[f"overlay.{name}.to-{STUB}"] = _times("overlay-writes", title, STUB)
    found["overlay.cpu"] = Metric("overlay-writes", "CPU time of what serves, of dd", "s/GiB")
    return found


def _times(work: str, title: str, other: str) -> Metric:
    return Metric(work, f"{title}: to {other}", "times", True, always_spread=True)


WRITES_METRICS: Final = {
    f"writes.{name}": metric
    for part in (_lan(), _reads(), _writes())
    for name, metric in part.items()
}
