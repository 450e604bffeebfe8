"""The status of a mount: sums over its disks, and each worker's state."""

import collections
import json
import os
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from tests.observe.fakes import MIB, make_client, make_disk, make_report, make_served, times
from vddkfs.cache.arena import Arena
from vddkfs.cache.counts import Counts
from vddkfs.engines.base import EngineReport
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.config import VmdkConfig
from vddkfs.engines.requests import Patience
from vddkfs.observe.status import StatusReport


def collect(
    *disks: Any,
    warnings: tuple[str, ...] = ("careful",),
    served: Any = None,
    reports: dict[str, EngineReport] | None = None,
) -> dict[str, Any]:
    arena = Arena(64 * MIB)
    report = StatusReport("/mnt/web", "/vms/web", arena, disks)
    recent = SimpleNamespace(lines=collections.deque(warnings))
    log: Any = SimpleNamespace(target="syslog", recent=recent)
    found = report.collect({"max_background": 512}, 3, log, served or {}, reports or {})
    arena.close()
    return found


def counted(name: str) -> int:
    """Return what an image of scale 1 has of a count."""
    return Counts.__slots__.index(name) + 1


def test_the_mount_its_source_and_its_daemon_are_named() -> None:
    found = collect(make_disk("web", 1))
    assert (found["mountpoint"], found["source"]) == ("/mnt/web", "/vms/web")
    assert found["pid"] == os.getpid()
    assert found["open_files"] == 3
    assert found["session"] == {"max_background": 512}
    assert (found["log"], found["warnings"]) == ("syslog", ["careful"])
    assert 0 <= found["uptime"] < 60
    started = datetime.strptime(found["started"], "%Y-%m-%dT%H:%M:%S%z")
    assert abs(started.timestamp() - datetime.now().timestamp()) < 60


def test_the_cache_is_the_sum_over_all_images_of_all_disks() -> None:
    cache = collect(make_disk("a", 1), make_disk("b", 10))["cache"]
    hits, misses, waits = (22 * counted(name) for name in ("hits", "misses", "coalesced"))
    ahead, used, wasted = (counted(f"ahead_{name}bytes") for name in ("", "used_", "wasted_"))
    assert cache == {
        "limit": 64 * MIB,
        "size": 0,
        "hits": hits,
        "misses": misses,
        "coalesced": waits,
        "hit_ratio": round(hits / (hits + misses + waits), 4),
        "source_bytes": 22 * counted("fetched_bytes"),
        "direct_bytes": 22 * counted("direct_bytes"),
        "zero_bytes": 22 * counted("zero_bytes"),
        "prefetched": 22 * ahead,
        "prefetched_used": round(used / ahead, 4),
        "prefetched_wasted": round(wasted / ahead, 4),
        "invalidations": 22 * counted("invalidations"),
        "evictions": 55,
    }


def test_a_share_of_nothing_is_none() -> None:
    disk = make_disk("a", 0)
    cache = collect(disk)["cache"]
    assert [cache[key] for key in ("hit_ratio", "prefetched_used", "prefetched_wasted")] == [
        None
    ] * 3
    assert collect(disk)["latency"]["fuse"] == {"count": 0, "median": None, "p99": None}


def test_each_disk_tells_of_its_worker() -> None:
    found = collect(make_disk("a", 1), make_disk("b", 10, state="not running", pid=None))["disks"]
    assert [disk["name"] for disk in found] == ["a", "b"]
    assert found[0]["cache"]["hits"] == 2 * counted("hits")
    assert found[1]["cache"]["hits"] == 20 * counted("hits")
    other = ("cache", "reads", "writes")
    assert {key: found[0][key] for key in found[0] if key not in other} == {
        "name": "a",
        "capacity": MIB,
        "links": 2,
        "cache_held": 4096,
        "workers": [
            {
                "name": "a",
                "pid": 77,
                "state": "serving",
                "requests": 100,
                "in_flight": 5,
                "queued": 6,
                "oldest_request": 1.235,
                "starts": 3,
                "restarts": 2,
                "resent": 1,
                "errors": 4,
                "last_errors": ["12:00:00 torn grain"],
            }
        ],
    }
    assert found[1]["workers"][0]["pid"] is None
    assert found[1]["workers"][0]["state"] == "not running"


def test_what_was_read_is_told_for_the_mount_and_for_each_disk() -> None:
    a, b = make_disk("a"), make_disk("b")
    found = collect(a, b, served=make_served(a))
    assert found["reads"] == {"count": 2, "bytes": 4096, "errors": 1}
    assert found["disks"][0]["reads"] == found["reads"]
    assert found["disks"][1]["reads"] == {"count": 0, "bytes": 0, "errors": 0}


def test_what_was_written_is_told_for_the_mount_and_for_each_disk() -> None:
    a, b = make_disk("a"), make_disk("b")
    base, above = a.images
    base.writable = True
    served = make_served(a)
    served[above.name].write_times = times(1e-3)
    assert collect(a, b, served=served)["writes"] == {
        **{"count": 1, "bytes": 0, "writable": [base.name], "changed": 0, "broken": {}}
    }
    base.broken = "torn grain"
    above.writable, above.layer = True, SimpleNamespace(changed_bytes=8192)
    served[above.name].written = 4096
    found = collect(a, b, served=served)
    assert found["writes"] == {
        "count": 1,
        "bytes": 4096,
        "writable": [base.name, above.name],
        "changed": 8192,
        "broken": {base.name: "torn grain"},
    }
    assert found["disks"][0]["writes"] == found["writes"]
    assert found["disks"][1]["writes"]["writable"] == []
    assert found["latency"]["writes"]["count"] == 1


def test_each_layer_tells_its_typical_times() -> None:
    disk = make_disk("a", 2)
    layers = collect(disk, served=make_served(disk), reports={"a": make_report()})["latency"]
    assert {name: times["count"] for name, times in layers.items()} == {
        "fuse": 2,
        "writes": 0,
        "cache": 2,
        "worker": 1,
        "library": 2,
    }, "of the library, its reads alone"
    assert layers["fuse"]["median"] <= 16e-6
    assert 4 <= layers["fuse"]["p99"] <= 8.5
    assert 1e-3 <= layers["library"]["median"] <= 2.1e-3


def test_a_worker_that_two_disks_share_is_counted_once() -> None:
    a, b = make_disk("a"), make_disk("b")
    a.clients = b.clients = [make_client("both")]
    found = collect(a, b)
    assert (found["in_flight"], found["queued"]) == (5, 6)
    assert found["latency"]["worker"]["count"] == 1


def test_a_library_tells_its_calls() -> None:
    worker = collect(make_disk("a"), reports={"a": make_report()})["disks"][0]["workers"][0]
    assert worker["transport"] == "nbd"
    assert worker["calls"]["VixDiskLib_ReadAsync"] == {
        "count": 2,
        "failures": 1,
        "seconds": 0.004,
        "bytes": 8192,
    }


@pytest.mark.parametrize("name", ["web", "caf\udce9", 'quote"\n'])
def test_it_is_json_whatever_the_names_are(name: str) -> None:
    found = collect(make_disk(name, 1), warnings=(name,))
    assert json.loads(json.dumps(found).encode()) == found


async def test_a_real_worker_that_never_ran_is_told_as_such() -> None:
    client = WorkerClient("web", VmdkConfig(links=()), Patience(), lambda identities: None)
    disk = make_disk("web", 1)
    disk.clients = [client]
    worker = collect(disk)["disks"][0]["workers"][0]
    assert (worker["state"], worker["pid"]) == ("not running", None)
    assert {worker[key] for key in ("requests", "in_flight", "queued", "starts")} == {0}
    assert (worker["oldest_request"], worker["last_errors"]) == (0, [])
    await trio.lowlevel.checkpoint()
