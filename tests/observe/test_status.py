"""The status of a mount: sums over its disks, and each worker's state."""

import collections
import json
import os
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from vddkfs.cache.arena import Arena
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.config import VmdkConfig
from vddkfs.engines.requests import Patience
from vddkfs.observe.status import StatusReport

MIB = 1024 * 1024


def make_disk(name: str, scale: int, **worker: Any) -> Any:
    """Return what the report reads of a disk with two images."""
    counters = SimpleNamespace(starts=3, restarts=2, requests=scale * 100, resent=1, errors=4)
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
    for key, value in worker.items():
        setattr(client, key, value)
    cache = SimpleNamespace(hits=scale, misses=2 * scale, coalesced=3 * scale, prefetched=4 * scale)
    image = SimpleNamespace(cache=cache)
    return SimpleNamespace(
        name=name,
        capacity=scale * MIB,
        links=(None,) * 2,
        images=(image, image),
        caches=[SimpleNamespace(bytes_held=scale * 4096, evictions=scale * 5)],
        clients=[client],
    )


def collect(*disks: Any, **more: Any) -> dict[str, Any]:
    arena = Arena(64 * MIB)
    report = StatusReport("/mnt/web", "/vms/web", arena, disks)
    recent = SimpleNamespace(lines=collections.deque(more.get("warnings", ["careful"])))
    log: Any = SimpleNamespace(target="syslog", recent=recent)
    found = report.collect({"max_background": 512}, 3, log)
    arena.close()
    return found


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
    assert cache == {
        "limit": 64 * MIB,
        "size": 0,
        "hits": 22,
        "misses": 44,
        "coalesced": 66,
        "prefetched": 88,
        "evictions": 55,
    }


def test_each_disk_tells_of_its_worker() -> None:
    found = collect(make_disk("a", 1), make_disk("b", 10, state="not running", pid=None))["disks"]
    assert [disk["name"] for disk in found] == ["a", "b"]
    assert found[0] == {
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


@pytest.mark.parametrize("name", ["web", "caf\udce9", 'quote"\n'])
def test_it_is_json_whatever_the_names_are(name: str) -> None:
    found = collect(make_disk(name, 1), warnings=[name])
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
