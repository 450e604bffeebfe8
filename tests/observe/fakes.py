"""What status and metrics read of a mount, without a mount."""

import collections
from types import SimpleNamespace
from typing import Any

from vddkfs.cache.counts import Counts
from vddkfs.engines.base import CallCount, EngineReport
from vddkfs.engines.histogram import Histogram
from vddkfs.engines.requests import Counters
from vddkfs.fuse.served import Served

MIB = 1024 * 1024


def times(*seconds: float) -> Histogram:
    found = Histogram()
    for one in seconds:
        found.observe(one)
    return found


def make_counts(scale: int) -> Counts:
    """Return counts that are all different: *scale* times 1, 2, 3 in the order of the names."""
    found = Counts()
    for number, name in enumerate(Counts.__slots__, 1):
        setattr(found, name, number * scale)
    return found


def make_client(name: str, scale: int = 1, **more: Any) -> Any:
    counters = Counters()
    counters.starts, counters.restarts, counters.requests = 3, 2, scale * 100
    counters.resent, counters.errors = 1, 4
    counters.reads = times(1e-3)
    client = SimpleNamespace(
        name=name,
        counters=counters,
        pid=77,
        state="serving",
        in_flight=5,
        queued=6,
        oldest_age=lambda: 1.23456,
        last_errors=collections.deque(["12:00:00 torn grain"]),
    )
    for key, value in more.items():
        setattr(client, key, value)
    return client


def make_disk(name: str, scale: int = 1, **worker: Any) -> Any:
    """Return a disk with two images and one worker; what there is to count goes with *scale*."""
    images = tuple(
        SimpleNamespace(
            number=number,
            name=f"{name}/chain/{number}.raw",
            cache=SimpleNamespace(counts=make_counts(scale)),
            writable=False,
            layer=None,
            broken="",
        )
        for number in range(2)
    )
    cache = SimpleNamespace(
        bytes_held=scale * 4096, evictions=scale * 5, waits=times(*[3e-3] * scale)
    )
    return SimpleNamespace(
        name=name,
        capacity=scale * MIB,
        links=(None,) * 2,
        images=images,
        caches=[cache],
        clients=[make_client(name, scale, **worker)],
    )


def make_served(*disks: Any) -> dict[str, Served]:
    """Return that the top image of each disk was read twice, the last time in vain."""
    found = {}
    for disk in disks:
        served = found[disk.images[-1].name] = Served()
        served.bytes, served.errors, served.times = 4096, 1, times(10e-6, 5.0)
    return found


def make_report() -> EngineReport:
    reads = times(2e-3, 2e-3)
    return EngineReport(
        transports=("nbd",),
        calls=(
            CallCount("VixDiskLib_Open", 1, 0, 1.5, 0, tuple(times(1.5).buckets)),
            CallCount("VixDiskLib_ReadAsync", 2, 1, reads.seconds, 8192, tuple(reads.buckets)),
        ),
    )
