"""What ``run formats`` measures: its disks, metrics, and tables."""

from typing import Final

from benchmarks.metric import Metric

STREAM: Final = "streamOptimized"
CONVERTED: Final = (STREAM, "monolithicSparse", "monolithicFlat")
"""What ``qemu-img convert`` makes as it is wanted here."""
SPLIT: Final = "twoGbMaxExtentSparse"
DELTAS: Final = ("vmfsSparse", "seSparse")
FORMATS: Final = (*CONVERTED, SPLIT, *DELTAS)
HUGE: Final = ("huge-seSparse", "huge-split")
CHAINS: Final = (2, 32)
TITLES: Final = {
    "formats-sequential": "Formats: sequential buffered read of the whole disk",
    "formats-random": "Formats: random reads of 4 KiB all over the disk, O_DIRECT",
    "formats-memory": "Formats: memory of all processes of the system",
    "formats-huge": "The largest disks: opening",
    "formats-chains": "Chains of the same content: a random read of 4 KiB",
}


def _disk(name: str) -> dict[str, Metric]:
    found = {
        f"{name}.sequential": Metric("formats-sequential", f"{name}: dd bs=1M", "MiB/s", True),
        f"{name}.memory": Metric("formats-memory", f"{name}: PSS after dd", "MiB"),
    }
    for depth in (1, 16):
        found |= {
            f"{name}.random-{depth}": Metric(
                "formats-random", f"{name}: depth {depth}", "IOPS", True
            ),
            f"{name}.latency99-{depth}": Metric(
                "formats-random", f"{name}: latency of that, 99 %", "us"
            ),
        }
    found[f"{name}.latency-1"] = Metric("formats-random", f"{name}: latency at depth 1, mean", "us")
    return found


def _huge(name: str) -> dict[str, Metric]:
    def metric(words: str, unit: str) -> Metric:
        return Metric("formats-huge", f"{name}: {words}", unit)

    return {
        f"{name}.ready": metric("command to first stat", "s"),
        f"{name}.first-read": metric("command to first 4 KiB read", "s"),
        f"{name}.daemon": metric("memory of the daemon after that", "MiB"),
        f"{name}.worker": metric("memory of the worker after that", "MiB"),
        f"{name}.describe": metric("engine alone, to describe it", "s"),
        f"{name}.describe-memory": metric("most memory for that", "MiB"),
        f"{name}.open": metric("engine alone, to open it", "s"),
        f"{name}.open-read": metric("first read then, at its end", "ms"),
        f"{name}.open-memory": metric("most memory for both", "MiB"),
    }


def _chain(links: int) -> dict[str, Metric]:
    return {
        f"chain-{links}.buffered": Metric(
            "formats-chains", f"{links} links: through the mount, buffered", "us"
        ),
        f"chain-{links}.engine": Metric("formats-chains", f"{links} links: engine alone", "us"),
    }


FORMATS_METRICS: Final = {
    name: metric
    for part in (*map(_disk, FORMATS), *map(_huge, HUGE), *map(_chain, CHAINS))
    for name, metric in part.items()
}
