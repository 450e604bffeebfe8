"""What status.json and ``vddkfs status`` tell of the mount, its cache and each of its workers."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from vddkfs import __version__
from vddkfs.cache.arena import Arena
from vddkfs.cache.counts import Counts
from vddkfs.disks.disk import Disk
from vddkfs.disks.image import Image
from vddkfs.engines.base import EngineReport
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.histogram import Histogram, merged
from vddkfs.fuse.served import Served
from vddkfs.observe.logs import Log

_READS: Final = ("VixDiskLib_Read", "VixDiskLib_ReadAsync")
"""The library's calls that readers wait for: the time that a login takes is another matter."""


class StatusReport:
    """Collects the facts of one mount. Sizes in bytes, times in seconds."""

    def __init__(self, mountpoint: str, source: str, arena: Arena, disks: Sequence[Disk]) -> None:
        self._mountpoint = mountpoint
        self._source = source
        self._arena = arena
        self._disks = disks
        self._started = time.time()
        self._since = time.monotonic()

    def collect(
        self,
        session: dict[str, int],
        open_files: int,
        log: Log,
        served: Mapping[str, Served],
        reports: Mapping[str, EngineReport],
        overlay: str = "",
    ) -> dict[str, Any]:
        """Return the report.

        *served* is what was read, by the images' names; *reports* are the engines', by the workers'
        names. *overlay* is the folder that takes the writes, or empty.
        """
        clients = {client.name: client for disk in self._disks for client in disk.clients}
        images = [image for disk in self._disks for image in disk.images]
        return {
            "vddkfs": __version__,
            "pid": os.getpid(),
            "mountpoint": self._mountpoint,
            "source": self._source,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._started)),
            "uptime": round(time.monotonic() - self._since, 1),
            "open_files": open_files,
            "in_flight": sum(client.in_flight for client in clients.values()),
            "queued": sum(client.queued for client in clients.values()),
            "session": session,
            "overlay": overlay,
            "reads": _reads(images, served),
            "writes": _writes(images, served),
            "latency": {
                "fuse": _latency(one.times for one in served.values()),
                "writes": _latency(one.write_times for one in served.values()),
                "cache": _latency(cache.waits for disk in self._disks for cache in disk.caches),
                "worker": _latency(client.counters.reads for client in clients.values()),
                "library": _latency(_library_reads(reports)),
            },
            "cache": {
                "limit": self._arena.limit * self._arena.chunk_size,
                "size": self._arena.size,
                **_cached(images),
                "evictions": sum(c.evictions for d in self._disks for c in d.caches),
            },
            "disks": [_disk(disk, served, reports) for disk in self._disks],
            "log": log.target,
            "warnings": list(log.recent.lines),
        }


def total(images: Iterable[Image]) -> Counts:
    """Return what the caches of *images* did together."""
    found = Counts()
    for image in images:
        for name in Counts.__slots__:
            setattr(found, name, getattr(found, name) + getattr(image.cache.counts, name))
    return found


def _disk(
    disk: Disk, served: Mapping[str, Served], reports: Mapping[str, EngineReport]
) -> dict[str, Any]:
    return {
        "name": disk.name,
        "capacity": disk.capacity,
        "links": len(disk.links),
        "cache_held": sum(cache.bytes_held for cache in disk.caches),
        "reads": _reads(disk.images, served),
        "writes": _writes(disk.images, served),
        "cache": _cached(disk.images),
        "workers": [
            {**_worker(client), **_engine(reports.get(client.name))} for client in disk.clients
        ],
    }


def _reads(images: Iterable[Image], served: Mapping[str, Served]) -> dict[str, int]:
    """Return what was read of the files of *images*."""
    found = [served[image.name] for image in images if image.name in served]
    return {
        "count": sum(one.times.count for one in found),
        "bytes": sum(one.bytes for one in found),
        "errors": sum(one.errors for one in found),
    }


def _writes(images: Iterable[Image], served: Mapping[str, Served]) -> dict[str, Any]:
    """Return what was written to the files of *images*, and why some are written no more."""
    known = list(images)
    found = [served[image.name] for image in known if image.name in served]
    written = [image for image in known if image.writable]
    return {
        "count": sum(one.write_times.count for one in found),
        "bytes": sum(one.written for one in found),
        "writable": [image.name for image in written],
        "changed": sum(image.layer.changed_bytes for image in written if image.layer is not None),
        "broken": {image.name: image.broken for image in written if image.broken},
    }


def _cached(images: Iterable[Image]) -> dict[str, Any]:
    """Return what the caches of *images* did. A share of nothing is None."""
    found = total(images)
    reads = found.hits + found.misses + found.coalesced
    return {
        "hits": found.hits,
        "misses": found.misses,
        "coalesced": found.coalesced,
        "hit_ratio": _share(found.hits, reads),
        "source_bytes": found.fetched_bytes,
        "direct_bytes": found.direct_bytes,
        "zero_bytes": found.zero_bytes,
        "prefetched": found.ahead_bytes,
        "prefetched_used": _share(found.ahead_used_bytes, found.ahead_bytes),
        "prefetched_wasted": _share(found.ahead_wasted_bytes, found.ahead_bytes),
        "invalidations": found.invalidations,
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _latency(histograms: Iterable[Histogram]) -> dict[str, Any]:
    """Return what is typical of the times; None where there are none."""
    times = merged(histograms)
    median, p99 = times.quantile(0.5), times.quantile(0.99)
    return {
        "count": times.count,
        "median": None if median is None else round(median, 6),
        "p99": None if p99 is None else round(p99, 6),
    }


def _library_reads(reports: Mapping[str, EngineReport]) -> Iterable[Histogram]:
    calls = [call for report in reports.values() for call in report.calls]
    return [Histogram(call.buckets, call.seconds) for call in calls if call.name in _READS]


def _engine(report: EngineReport | None) -> dict[str, Any]:
    """Return what an engine with a library told, as entries of its worker's report."""
    if report is None or not report.calls:
        return {}
    return {
        "transport": ", ".join(report.transports),
        "calls": {
            call.name: {
                "count": call.count,
                "failures": call.failures,
                "seconds": round(call.seconds, 6),
                "bytes": call.bytes,
            }
            for call in report.calls
        },
    }


def _worker(client: WorkerClient) -> dict[str, Any]:
    counters = client.counters
    return {
        "name": client.name,
        "pid": client.pid,
        "state": client.state,
        "requests": counters.requests,
        "in_flight": client.in_flight,
        "queued": client.queued,
        "oldest_request": round(client.oldest_age(), 3),
        "starts": counters.starts,
        "restarts": counters.restarts,
        "resent": counters.resent,
        "errors": counters.errors,
        "last_errors": list(client.last_errors),
    }
