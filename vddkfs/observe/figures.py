"""Which metrics there are: of images, disks, workers and libraries, and where each value is.

Names are without ``vddkfs_`` and, for a counter, without ``_total``.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, Generic, Literal, NamedTuple, TypeVar

from vddkfs.disks.disk import Disk
from vddkfs.disks.image import Image
from vddkfs.engines.base import CallCount
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.histogram import Histogram, merged
from vddkfs.fuse.served import Served
from vddkfs.observe.processes import Usage

T = TypeVar("T")
Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]
Value = float | Histogram
"""A Histogram of its own: what is made text later must not change meanwhile."""


class Family(NamedTuple):
    """A metric at one moment. *samples* are its values, each with the values of *labels*."""

    kind: Kind
    name: str
    help: str
    labels: Labels
    samples: Sequence[tuple[Labels, Value]]


class Figure(NamedTuple, Generic[T]):
    """A metric that every T has."""

    kind: Kind
    name: str
    help: str
    value: Callable[[T], Value]


def families(
    figures: Iterable[Figure[T]], labels: Labels, items: Sequence[tuple[Labels, T]]
) -> list[Family]:
    """Return *figures* of each of *items*, which come with the values of *labels*."""
    return [
        Family(kind, name, text, labels, [(labelled, value(item)) for labelled, item in items])
        for kind, name, text, value in figures
    ]


OF_IMAGES: Final[tuple[Figure[Image], ...]] = (
    Figure(
        "counter",
        "cache_hits",
        "Reads that the cache answered at once.",
        lambda image: image.cache.counts.hits,
    ),
    Figure(
        "counter",
        "cache_misses",
        "Reads that had something fetched.",
        lambda image: image.cache.counts.misses,
    ),
    Figure(
        "counter",
        "cache_coalesced_waits",
        "Reads that waited for what another had asked for.",
        lambda image: image.cache.counts.coalesced,
    ),
    Figure(
        "counter",
        "cache_invalidations",
        "How often old content was dropped on purpose.",
        lambda image: image.cache.counts.invalidations,
    ),
    Figure(
        "counter",
        "source_bytes",
        "Bytes that were fetched from the source, for whatever reason.",
        lambda image: image.cache.counts.fetched_bytes,
    ),
    Figure(
        "counter",
        "direct_bytes",
        "Bytes that were fetched past the cache, for direct reads.",
        lambda image: image.cache.counts.direct_bytes,
    ),
    Figure(
        "counter",
        "zero_bytes",
        "Bytes that the allocation map answered.",
        lambda image: image.cache.counts.zero_bytes,
    ),
    Figure(
        "counter",
        "readahead_bytes",
        "Bytes that were fetched before anybody asked.",
        lambda image: image.cache.counts.ahead_bytes,
    ),
    Figure(
        "counter",
        "readahead_used_bytes",
        "Bytes that were fetched ahead and read.",
        lambda image: image.cache.counts.ahead_used_bytes,
    ),
    Figure(
        "counter",
        "readahead_wasted_bytes",
        "Bytes that were fetched ahead and went unread.",
        lambda image: image.cache.counts.ahead_wasted_bytes,
    ),
)
OF_READERS: Final[tuple[Figure[Served], ...]] = (
    Figure("counter", "read_bytes", "Bytes that readers were answered.", lambda one: one.bytes),
    Figure("counter", "read_errors", "Reads that failed.", lambda one: one.errors),
    Figure(
        "histogram",
        "read_seconds",
        "Reads of files, from the kernel's request to the answer.",
        lambda one: merged([one.times]),
    ),
    Figure("counter", "written_bytes", "Bytes that writers wrote.", lambda one: one.written),
    Figure(
        "histogram",
        "write_seconds",
        "Writes to files, from the kernel's request to the answer.",
        lambda one: merged([one.write_times]),
    ),
)
OF_DISKS: Final[tuple[Figure[Disk], ...]] = (
    Figure(
        "gauge",
        "cache_held_bytes",
        "Memory of the cache that the disk has.",
        lambda disk: sum(cache.bytes_held for cache in disk.caches),
    ),
    Figure(
        "counter",
        "cache_evictions",
        "What left the cache for want of memory.",
        lambda disk: sum(cache.evictions for cache in disk.caches),
    ),
    Figure(
        "histogram",
        "cache_wait_seconds",
        "How long readers waited for what was not in the cache.",
        lambda disk: merged(cache.waits for cache in disk.caches),
    ),
)
OF_WORKERS: Final[tuple[Figure[WorkerClient], ...]] = (
    Figure(
        "gauge",
        "worker_requests_in_flight",
        "Requests that the process has and has not answered.",
        lambda client: client.in_flight,
    ),
    Figure(
        "gauge",
        "worker_requests_queued",
        "Requests that wait to be sent.",
        lambda client: client.queued,
    ),
    Figure(
        "gauge",
        "worker_oldest_request_seconds",
        "Age of the oldest unanswered request.",
        lambda client: client.oldest_age(),
    ),
    Figure(
        "counter",
        "worker_requests",
        "Requests that were sent.",
        lambda client: client.counters.requests,
    ),
    Figure(
        "counter",
        "worker_resent_requests",
        "Requests that a lost process had, and another got.",
        lambda client: client.counters.resent,
    ),
    Figure(
        "counter",
        "worker_errors",
        "Requests that were answered with an error.",
        lambda client: client.counters.errors,
    ),
    Figure(
        "counter",
        "worker_starts",
        "Processes that were started.",
        lambda client: client.counters.starts,
    ),
    Figure(
        "counter",
        "worker_restarts",
        "Processes that were lost and replaced.",
        lambda client: client.counters.restarts,
    ),
    Figure(
        "histogram",
        "worker_read_seconds",
        "Reads, from being sent to the process to its answer.",
        lambda client: merged([client.counters.reads]),
    ),
)
OF_PROCESSES: Final[tuple[Figure[Usage], ...]] = (
    Figure(
        "gauge",
        "worker_resident_bytes",
        "Memory of the process, with what it uses of the cache.",
        lambda used: used.resident,
    ),
    Figure("counter", "worker_cpu_seconds", "CPU time of the process.", lambda used: used.cpu),
)
OF_CALLS: Final[tuple[Figure[CallCount], ...]] = (
    Figure(
        "histogram",
        "library_call_seconds",
        "Calls of VMware's library, asynchronous ones until they are complete.",
        lambda call: Histogram(call.buckets, call.seconds),
    ),
    Figure("counter", "library_failures", "Calls that gave an error.", lambda call: call.failures),
    Figure("counter", "library_bytes", "Bytes that calls moved.", lambda call: call.bytes),
)
