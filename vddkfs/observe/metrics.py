"""The mount's metrics, as they are at one moment. ``exposition`` makes text of them.

Counters begin with the mount; those of a library, and CPU seconds, with the process. What a library
did only its worker knows: one that hangs is left out of those until it answers again.
"""

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from vddkfs import __version__
from vddkfs.cache.arena import Arena
from vddkfs.disks.disk import Disk
from vddkfs.engines.base import EngineReport
from vddkfs.engines.client import WorkerClient
from vddkfs.fuse.served import Served
from vddkfs.observe import figures
from vddkfs.observe.figures import Family, families
from vddkfs.observe.processes import usage
from vddkfs.observe.redact import redact

_STATES: Final = ("serving", "starting", "not running")


class Metrics:
    """Collects the metrics of one mount. Runs on the trio thread."""

    def __init__(self, mountpoint: str, source: str, arena: Arena, disks: Sequence[Disk]) -> None:
        self._mountpoint = mountpoint
        self._source = source
        self._arena = arena
        self._disks = disks
        self._started = time.time()

    def collect(
        self, open_files: int, served: Mapping[str, Served], reports: Mapping[str, EngineReport]
    ) -> list[Family]:
        """Return everything as it is now.

        *served* is what was read, by the images' names; *reports* are the engines', by the workers'
        names.
        """
        clients = {client.name: client for disk in self._disks for client in disk.clients}
        return [
            *self._mount(),
            _gauge("open_files", "Files of the mount that are open.", open_files),
            *self._images(served),
            *self._cache(),
            *_workers(clients.values()),
            *_libraries(reports),
        ]

    def _mount(self) -> Iterator[Family]:
        version = ((__version__,), 1)
        mount = ((self._mountpoint, redact(self._source)), 1)
        text = "The version that serves the mount."
        yield Family("gauge", "build_info", text, ("version",), [version])
        text = "What is mounted, and where."
        yield Family("gauge", "mount_info", text, ("mountpoint", "source"), [mount])
        yield _gauge("start_time_seconds", "When the mount began, in Unix time.", self._started)
        used = usage(os.getpid())
        if used is not None:
            text = "Memory of the daemon, with what it uses of the cache."
            yield _gauge("daemon_resident_bytes", text, used.resident)
            text = "CPU time of the daemon."
            yield Family("counter", "daemon_cpu_seconds", text, (), [((), used.cpu)])

    def _images(self, served: Mapping[str, Served]) -> list[Family]:
        images = [
            ((disk.name, str(image.number)), image) for disk in self._disks for image in disk.images
        ]
        read = [(labels, served[image.name]) for labels, image in images if image.name in served]
        return [
            *families(figures.OF_READERS, ("disk", "image"), read),
            *families(figures.OF_IMAGES, ("disk", "image"), images),
        ]

    def _cache(self) -> list[Family]:
        arena = self._arena
        disks = [((disk.name,), disk) for disk in self._disks]
        return [
            _gauge("cache_size_bytes", "Memory that the cache has now.", arena.size),
            _gauge(
                "cache_limit_bytes",
                "Memory that the cache may have.",
                arena.limit * arena.chunk_size,
            ),
            *families(figures.OF_DISKS, ("disk",), disks),
        ]


def _gauge(name: str, text: str, value: float) -> Family:
    return Family("gauge", name, text, (), [((), value)])


def _workers(clients: Collection[WorkerClient]) -> list[Family]:
    named = [((client.name,), client) for client in clients]
    states = [
        ((client.name, state), float(client.state == state))
        for client in clients
        for state in _STATES
    ]
    processes = [
        ((client.name,), used)
        for client in clients
        if client.pid is not None and (used := usage(client.pid)) is not None
    ]
    return [
        Family("gauge", "worker_state", "1 for what it is doing.", ("worker", "state"), states),
        *families(figures.OF_WORKERS, ("worker",), named),
        *families(figures.OF_PROCESSES, ("worker",), processes),
    ]


def _libraries(reports: Mapping[str, EngineReport]) -> list[Family]:
    calls = [((name, call.name), call) for name, one in reports.items() for call in one.calls]
    return families(figures.OF_CALLS, ("worker", "function"), calls)
