"""The metrics of a mount: Prometheus can read them, and every figure is there, once."""

import os
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.observe.fakes import MIB, make_client, make_disk, make_report, make_served
from vddkfs import __version__
from vddkfs.cache.arena import Arena
from vddkfs.cache.counts import Counts
from vddkfs.engines.base import EngineReport
from vddkfs.engines.histogram import BOUNDS
from vddkfs.fuse.served import Served
from vddkfs.observe.exposition import render
from vddkfs.observe.metrics import Metrics
from vddkfs.observe.processes import usage

Samples = dict[tuple[str, ...], float]


def text(
    *disks: Any,
    served: dict[str, Served] | None = None,
    reports: dict[str, EngineReport] | None = None,
    mountpoint: str = "/mnt/web",
    source: str = "/vms/web",
) -> str:
    arena = Arena(64 * MIB)
    metrics = Metrics(mountpoint, source, arena, disks)
    families = metrics.collect(3, served or {}, reports or {})
    arena.close()
    return render(families).decode()


def parsed(content: str) -> dict[str, Metric]:
    found = list(text_string_to_metric_families(content))
    names = [metric.name for metric in found]
    assert len(set(names)) == len(names), "each metric comes once"
    return {metric.name: metric for metric in found}


def values(metric: Metric, *labels: str) -> Samples:
    """Return the samples by their values of *labels*."""
    return {tuple(s.labels[label] for label in labels): s.value for s in metric.samples}


def buckets(metric: Metric, **labels: str) -> list[float]:
    return [
        sample.value
        for sample in metric.samples
        if sample.name.endswith("_bucket") and labels.items() <= sample.labels.items()
    ]


def everything() -> dict[str, Metric]:
    a, b = make_disk("a"), make_disk("b", 10, state="starting", pid=None, in_flight=0)
    return parsed(text(a, b, served=make_served(a, b), reports={"a": make_report()}))


def test_the_mount_and_its_daemon_are_told() -> None:
    found = everything()
    assert values(found["vddkfs_build_info"], "version") == {(__version__,): 1}
    assert values(found["vddkfs_mount_info"], "mountpoint", "source") == {
        ("/mnt/web", "/vms/web"): 1
    }
    assert found["vddkfs_open_files"].samples[0].value == 3
    assert found["vddkfs_start_time_seconds"].samples[0].value > 1.6e9
    assert found["vddkfs_daemon_resident_bytes"].samples[0].value > MIB
    assert found["vddkfs_daemon_cpu_seconds"].samples[0].value > 0
    assert found["vddkfs_cache_limit_bytes"].samples[0].value == 64 * MIB
    assert found["vddkfs_cache_size_bytes"].samples[0].value == 0


def test_there_is_nothing_but_ours() -> None:
    assert all(name.startswith("vddkfs_") for name in everything())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cache_hits", "hits"),
        ("cache_misses", "misses"),
        ("cache_coalesced_waits", "coalesced"),
        ("cache_invalidations", "invalidations"),
        ("source_bytes", "fetched_bytes"),
        ("direct_bytes", "direct_bytes"),
        ("zero_bytes", "zero_bytes"),
        ("readahead_bytes", "ahead_bytes"),
        ("readahead_used_bytes", "ahead_used_bytes"),
        ("readahead_wasted_bytes", "ahead_wasted_bytes"),
    ],
)
def test_every_count_of_the_cache_is_a_counter_of_each_image(name: str, count: str) -> None:
    metric = everything()[f"vddkfs_{name}"]
    assert metric.type == "counter"
    assert {sample.name for sample in metric.samples} == {f"vddkfs_{name}_total"}
    one = Counts.__slots__.index(count) + 1
    assert values(metric, "disk", "image") == {
        (disk, image): one * scale for disk, scale in (("a", 1), ("b", 10)) for image in ("0", "1")
    }


def test_no_count_of_the_cache_is_forgotten() -> None:
    """Each has another value; see the fakes."""
    found = everything()
    told = {s.value for metric in found.values() for s in metric.samples if "image" in s.labels}
    assert told >= {float(number) for number in range(1, len(Counts.__slots__) + 1)}


def test_what_was_read_is_told_of_images_that_were_opened() -> None:
    found = everything()
    assert values(found["vddkfs_read_bytes"], "disk", "image") == {
        ("a", "1"): 4096,
        ("b", "1"): 4096,
    }
    assert values(found["vddkfs_read_errors"], "disk", "image")[("a", "1")] == 1
    times = found["vddkfs_read_seconds"]
    assert times.type == "histogram"
    told = buckets(times, disk="a", image="1")
    assert len(told) == len(BOUNDS) + 1
    assert (told[0], told[1], told[-2], told[-1]) == (0, 1, 2, 2)
    sums = {s.labels["disk"]: s.value for s in times.samples if s.name.endswith("_sum")}
    assert sums["a"] == pytest.approx(5.00001)


def test_each_disk_tells_what_it_holds_and_how_long_readers_waited() -> None:
    found = everything()
    assert values(found["vddkfs_cache_held_bytes"], "disk") == {("a",): 4096, ("b",): 40960}
    assert values(found["vddkfs_cache_evictions"], "disk") == {("a",): 5, ("b",): 50}
    assert buckets(found["vddkfs_cache_wait_seconds"], disk="b")[-1] == 10


def test_each_worker_tells_what_it_is_doing() -> None:
    found = everything()
    assert values(found["vddkfs_worker_state"], "worker", "state") == {
        ("a", "serving"): 1,
        ("a", "starting"): 0,
        ("a", "not running"): 0,
        ("b", "serving"): 0,
        ("b", "starting"): 1,
        ("b", "not running"): 0,
    }
    for name, value in {
        "requests_in_flight": 5,
        "requests_queued": 6,
        "oldest_request_seconds": 1.23456,
        "requests": 100,
        "resent_requests": 1,
        "errors": 4,
        "starts": 3,
        "restarts": 2,
    }.items():
        assert values(found[f"vddkfs_worker_{name}"], "worker")[("a",)] == value
    assert buckets(found["vddkfs_worker_read_seconds"], worker="a")[-1] == 1


def test_a_worker_without_a_process_uses_nothing() -> None:
    disk = make_disk("a", pid=os.getpid())
    disk.clients.append(make_client("gone", pid=2**22 + 1))
    disk.clients.append(make_client("none", pid=None))
    found = parsed(text(disk))
    for name in ("resident_bytes", "cpu_seconds"):
        assert values(found[f"vddkfs_worker_{name}"], "worker").keys() == {("a",)}


def test_a_worker_that_two_disks_share_comes_once() -> None:
    a, b = make_disk("a"), make_disk("b")
    a.clients = b.clients = [make_client("both")]
    samples = parsed(text(a, b))["vddkfs_worker_requests"].samples
    assert [sample.labels["worker"] for sample in samples] == ["both"]


def test_a_library_tells_each_of_its_calls() -> None:
    found = everything()
    failures = values(found["vddkfs_library_failures"], "worker", "function")
    assert failures == {("a", "VixDiskLib_Open"): 0, ("a", "VixDiskLib_ReadAsync"): 1}
    moved = values(found["vddkfs_library_bytes"], "worker", "function")
    assert moved[("a", "VixDiskLib_ReadAsync")] == 8192
    calls = found["vddkfs_library_call_seconds"]
    assert buckets(calls, function="VixDiskLib_ReadAsync")[-1] == 2
    sums = {s.labels["function"]: s.value for s in calls.samples if s.name.endswith("_sum")}
    assert sums == {
        "VixDiskLib_Open": pytest.approx(1.5),
        "VixDiskLib_ReadAsync": pytest.approx(4e-3),
    }


def test_a_mount_without_disks_or_reports_has_metrics() -> None:
    assert parsed(text())["vddkfs_open_files"].samples[0].value == 3


@pytest.mark.parametrize(
    "name",
    ['quote"', "back\\slash", "line\nbreak", "both\\n", "tab\t", '{a="b"} 1', "日本", " ", "a,b"],
)
def test_any_name_can_be_a_label(name: str) -> None:
    disk = make_disk(name)
    found = parsed(text(disk, served=make_served(disk), reports={name: make_report()}))
    for metric, label in {
        "cache_hits": "disk",
        "read_seconds": "disk",
        "worker_state": "worker",
        "library_failures": "worker",
    }.items():
        assert {sample.labels[label] for sample in found[f"vddkfs_{metric}"].samples} == {name}


def test_names_in_other_encodings_are_escaped() -> None:
    found = parsed(text(make_disk("caf\udce9"), mountpoint="/mnt/\udcff"))
    assert {s.labels["disk"] for s in found["vddkfs_cache_hits"].samples} == {"caf\\udce9"}
    assert found["vddkfs_mount_info"].samples[0].labels["mountpoint"] == "/mnt/\\udcff"


def test_no_secret_is_told() -> None:
    content = text(source="vddk://operator:S3cr3t@vc.example.com/?moref=vm-1&password=S3cr3t")
    assert "S3cr3t" not in content
    assert "vc.example.com" in content


def test_a_figure_does_not_change_after_it_was_collected() -> None:
    disk = make_disk("a")
    served = make_served(disk)
    arena = Arena(64 * MIB)
    families = Metrics("/mnt", "/vms", arena, [disk]).collect(1, served, {})
    arena.close()
    before = render(families)
    served[disk.images[-1].name].times.observe(1.0)
    disk.caches[0].waits.observe(1.0)
    disk.clients[0].counters.reads.observe(1.0)
    assert render(families) == before


def test_what_a_process_uses() -> None:
    used = usage(os.getpid())
    assert used is not None
    assert used.cpu == pytest.approx(sum(os.times()[:2]), abs=1)
    assert used.resident > MIB
    assert usage(2**22 + 1) is None
