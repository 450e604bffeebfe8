"""What status.json and ``vddkfs status`` tell of the mount, its cache and each of its workers."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vddkfs import __version__
from vddkfs.cache.arena import Arena
from vddkfs.disks.disk import Disk
from vddkfs.engines.base import EngineReport
from vddkfs.engines.client import WorkerClient
from vddkfs.observe.logs import Log


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
        reports: Mapping[str, EngineReport] | None = None,
    ) -> dict[str, Any]:
        """Return the report; *reports* are the engines', by the workers' names."""
        return {
            "vddkfs": __version__,
            "pid": os.getpid(),
            "mountpoint": self._mountpoint,
            "source": self._source,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._started)),
            "uptime": round(time.monotonic() - self._since, 1),
            "open_files": open_files,
            "session": session,
            "cache": {
                "limit": self._arena.limit * self._arena.chunk_size,
                "size": self._arena.size,
                "hits": sum(i.cache.hits for d in self._disks for i in d.images),
                "misses": sum(i.cache.misses for d in self._disks for i in d.images),
                "coalesced": sum(i.cache.coalesced for d in self._disks for i in d.images),
                "prefetched": sum(i.cache.prefetched for d in self._disks for i in d.images),
                "evictions": sum(c.evictions for d in self._disks for c in d.caches),
            },
            "disks": [_disk(disk, reports or {}) for disk in self._disks],
            "log": log.target,
            "warnings": list(log.recent.lines),
        }


def _disk(disk: Disk, reports: Mapping[str, EngineReport]) -> dict[str, Any]:
    return {
        "name": disk.name,
        "capacity": disk.capacity,
        "links": len(disk.links),
        "cache_held": sum(cache.bytes_held for cache in disk.caches),
        "workers": [
            {**_worker(client), **_engine(reports.get(client.name))} for client in disk.clients
        ],
    }


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
