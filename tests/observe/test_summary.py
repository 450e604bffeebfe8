"""What is said of a status.json: numbers as a person reads them, and names that spoil nothing."""

import copy
from typing import Any

import pytest

from vddkfs.observe import summary
from vddkfs.observe.summary import Pace

UNWRITTEN: dict[str, Any] = {"count": 0, "bytes": 0, "writable": [], "changed": 0, "broken": {}}
NOTHING = {"count": 0, "median": None, "p99": None}
CACHE = {
    "hits": 75,
    "misses": 20,
    "coalesced": 5,
    "hit_ratio": 0.75,
    "source_bytes": 3 * 2**20,
    "prefetched": 2**20,
    "prefetched_used": 0.9,
    "prefetched_wasted": 0.05,
}
WORKER = {
    "name": "web",
    "pid": 77,
    "state": "serving",
    "requests": 10,
    "in_flight": 1,
    "queued": 2,
    "oldest_request": 3.21,
    "restarts": 4,
    "resent": 5,
    "errors": 6,
    "last_errors": ["12:00:00 torn grain"],
}
DISK = {
    "name": "web",
    "capacity": 2**30,
    "links": 2,
    "cache_held": 2**20,
    "reads": {"count": 100, "bytes": 2**22, "errors": 1},
    "writes": UNWRITTEN,
    "cache": CACHE,
    "workers": [WORKER],
}
STATUS: dict[str, Any] = {
    "vddkfs": "1.0",
    "pid": 70,
    "source": "/vms/web",
    "mountpoint": "/mnt/web",
    "started": "2026-01-01T00:00:00+0000",
    "uptime": 12.3,
    "open_files": 2,
    "in_flight": 1,
    "queued": 2,
    "overlay": "",
    "reads": {"count": 100, "bytes": 2**22, "errors": 1},
    "writes": UNWRITTEN,
    "latency": {
        "fuse": {"count": 100, "median": 12e-6, "p99": 3.1e-3},
        "writes": NOTHING,
        "cache": {"count": 25, "median": 0.002, "p99": 1.5},
        "worker": {"count": 20, "median": 0.0009997, "p99": 70.0},
        "library": NOTHING,
    },
    "cache": {"size": 4096, "limit": 2**28, **CACHE},
    "disks": [DISK],
    "log": "/var/log/vddkfs",
    "warnings": ["careful"],
}
"""A status.json as the daemon makes it; what the summary does not need is left out."""


def later(**disk: Any) -> dict[str, Any]:
    """Return a look after STATUS: 50 reads more, 40 of them hits, 2 MiB answered and 1 fetched."""
    found = copy.deepcopy(STATUS)
    for part in (found, found["disks"][0]):
        part["reads"]["count"] += 50
        part["reads"]["bytes"] += 2 * 2**20
        part["cache"]["hits"] += 40
        part["cache"]["misses"] += 10
        part["cache"]["source_bytes"] += 2**20
    found["disks"][0] |= disk
    return found


def test_everything_is_said() -> None:
    assert list(summary.report(STATUS)) == [
        "/vms/web at /mnt/web (pid 70, vddkfs 1.0)",
        "up 12 s, 2 files open, requests: 1 in flight, 2 queued",
        "reads: 100, 4 MiB, 1 failed",
        "cache 4 KiB of 256 MiB: 75 hits, 20 misses, 5 waits for another's; 75 % hits",
        "from the source 3 MiB; read ahead 1 MiB: 90 % used, 5 % wasted",
        "latency (median, 99 %): reads 12 us, 3.1 ms; waits for the cache 2 ms, 1.5 s; "
        "reads by workers 1 ms, 70 s",
        "web: 1 GiB, 2 links, 1 MiB of the cache, 75 % hits",
        "  worker web: serving, pid 77, 10 requests, 1 in flight, 2 queued, oldest 3.2 s; "
        "4 restarts, 5 sent again, 6 errors",
        "    12:00:00 torn grain",
        "log: /var/log/vddkfs",
        "careful",
    ]


def test_writes_are_told_of_a_mount_that_can_be_written() -> None:
    writes = {**UNWRITTEN, "count": 7, "bytes": 2**20, "writable": ["web/disk.raw"]}
    assert "writes: 7, 1 MiB" in summary.report({**STATUS, "writes": writes})
    writes |= {"changed": 2**21, "broken": {"web/disk.raw": "torn\ngrain"}}
    lines = list(summary.report({**STATUS, "writes": writes, "overlay": "/over\nlay"}))
    assert "writes: 7, 1 MiB; overlay /over\\nlay has 2 MiB" in lines
    assert "web/disk.raw is written no more: torn\\ngrain" in lines


def test_a_mount_that_nobody_has_read_has_no_times() -> None:
    fresh = {**STATUS, "latency": dict.fromkeys(STATUS["latency"], NOTHING)}
    assert not [line for line in summary.report(fresh) if "latency" in line]
    assert summary.latency(fresh).endswith("nothing was read yet")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "-"),
        (0.0, "0 us"),
        (1.23e-6, "1.2 us"),
        (999.4e-6, "999 us"),
        (999.6e-6, "1 ms"),
        (9.96e-3, "10 ms"),
        (0.5, "500 ms"),
        (1.0, "1 s"),
        (67.1, "67 s"),
    ],
)
def test_times_are_told_as_a_person_reads_them(seconds: float | None, said: str) -> None:
    assert summary.duration(seconds) == said


@pytest.mark.parametrize(
    ("share", "said"), [(None, "-"), (0.0, "0 %"), (0.831, "83 %"), (1, "100 %")]
)
def test_shares(share: float | None, said: str) -> None:
    assert summary.percent(share) == said


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2Jgone", "caf\udce9", "tab\t", "bell\a"])
def test_names_spoil_no_line_and_no_terminal(name: str) -> None:
    found = later(name=name)
    found["source"] = found["mountpoint"] = found["log"] = name
    found["warnings"] = [name]
    found["disks"][0]["workers"] = [{**WORKER, "name": name, "last_errors": [name]}]
    before = copy.deepcopy(found)
    before["warnings"] = []
    for line in [*summary.report(found), *summary.interval(before, found, 1.0)]:
        assert line.isprintable(), line
        line.encode()


def test_the_pace_is_what_went_on_since() -> None:
    wanted = Pace(reads=25.0, bytes=2**20, source_bytes=2**19, hit_ratio=0.8)
    assert summary.pace(STATUS, later(), 2.0) == wanted
    assert summary.pace(DISK, later()["disks"][0], 2.0) == wanted
    assert summary.pace(STATUS, STATUS, 2.0) == Pace(0, 0, 0, None)


def test_another_daemon_at_the_same_place_is_noticed() -> None:
    assert summary.same_mount(STATUS, later())
    assert not summary.same_mount(STATUS, {**STATUS, "pid": 71})
    assert not summary.same_mount(STATUS, {**STATUS, "started": "2026-01-01T00:00:01+0000"})


def test_lines_of_what_went_on() -> None:
    now = later()
    now["warnings"] = ["careful", "12:00:01 WARNING more"]
    paced = "25 reads/s, 1 MiB/s, 80 % hits, 512 KiB/s from the source, 1 in flight, 2 queued"
    assert list(summary.interval(STATUS, now, 2.0)) == [
        f"all: {paced}",
        f"web: {paced}",
        "12:00:01 WARNING more",
    ]


def test_an_idle_disk_needs_no_line() -> None:
    idle = copy.deepcopy(STATUS)
    idle["disks"][0]["workers"] = [{**WORKER, "in_flight": 0, "queued": 0}]
    assert len(list(summary.interval(idle, idle, 1.0))) == 1
