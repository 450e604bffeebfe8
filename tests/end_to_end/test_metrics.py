"""Metrics and status of a real mount: reading moves the counters, and a hung worker stops none."""

import os
import signal
import subprocess
import time
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.end_to_end.mounting import (
    COMMAND,
    PROMPT,
    SECONDS,
    Mount,
    Mounts,
    stopped,
    succeed,
    until,
    vddkfs,
)
from tests.end_to_end.remote import Proxy
from tests.end_to_end.vms import MIB, make_vmfs, noise
from vddkfs.control import ask
from vddkfs.errors import NotMounted

PROMPTLY = 2.0
"""Seconds in which metrics have to be there, on a machine that is busy."""
FILE = ".vddkfs/metrics"


def parsed(text: str) -> dict[str, Metric]:
    return {metric.name: metric for metric in text_string_to_metric_families(text)}


def metrics(mount: Mount) -> dict[str, Metric]:
    return parsed(mount.content(FILE).decode())


def total(found: dict[str, Metric], name: str, suffix: str = "_total") -> float:
    """Return a metric summed over everything that has it."""
    samples = found[f"vddkfs_{name}"].samples
    return sum(sample.value for sample in samples if sample.name.endswith(suffix))


def test_reading_moves_the_counters(mount: Mounts, vm: Path) -> None:
    make_vmfs(vm / 'a "disk" {x="y"}.vmdk', noise("metrics", 8 * MIB))
    found = mount(vm)
    name = 'a "disk" {x="y"}/disk.raw'
    before = metrics(found)
    assert total(before, "read_bytes") == 0
    assert total(before, "source_bytes") == 0
    found.sha256(name)
    found.read(name, 0, 65536, True)
    after = metrics(found)
    assert total(after, "read_bytes") >= 8 * MIB
    assert 8 * MIB <= total(after, "source_bytes") < 16 * MIB
    assert total(after, "direct_bytes") == 65536
    assert total(after, "cache_hits") + total(after, "cache_misses") > 0
    assert total(after, "readahead_bytes") > 0
    assert total(after, "cache_held_bytes", "") >= 8 * MIB
    for layer in ("read_seconds", "cache_wait_seconds", "worker_read_seconds"):
        assert total(after, layer, "_count") > 0, layer
        assert 0 < total(after, layer, "_sum") < SECONDS
    assert total(after, "worker_resident_bytes", "") > MIB
    labels = {sample.labels["disk"] for sample in after["vddkfs_cache_hits"].samples}
    assert labels == {'a "disk" {x="y"}'}
    status = found.status()
    assert status["reads"]["bytes"] >= 8 * MIB
    assert status["cache"]["source_bytes"] == total(after, "source_bytes")
    assert 0 <= status["cache"]["hit_ratio"] <= 1
    assert status["latency"]["fuse"]["count"] == status["reads"]["count"]


def test_file_socket_and_command_tell_the_same(mount: Mounts, vm: Path) -> None:
    make_vmfs(vm / "disk.vmdk", noise("same", MIB))
    found = mount(vm)
    names = set(metrics(found))
    assert set(parsed(ask(str(found.place), "metrics")["metrics"])) == names
    done = vddkfs("status", "--metrics", found.place)
    assert done.returncode == 0
    assert set(parsed(done.stdout)) == names
    # It has the size of what is in it, for programs that ask first.
    copied = succeed("cp", found.path(FILE), vm.parent / "copy")
    assert copied.returncode == 0
    assert set(parsed((vm.parent / "copy").read_text())) == names


def test_metrics_come_while_a_worker_stands_still(mount: Mounts, vm: Path) -> None:
    make_vmfs(vm / "disk.vmdk", noise("stopped", 4 * MIB))
    found = mount(vm)
    found.map_known("disk")
    fd = found.open("disk/disk.raw")
    with stopped(found.worker()["pid"]):
        found.agent.send("pread", fd, 4096, MIB)
        until(lambda: found.worker()["in_flight"], what="a read under way")
        began = time.monotonic()
        told = parsed(succeed("cat", found.path(FILE)).stdout)
        assert time.monotonic() - began < PROMPTLY
        assert total(told, "worker_requests_in_flight", "") >= 1
        assert total(told, "worker_oldest_request_seconds", "") > 0
    assert found.agent.receive() == noise("stopped", 4 * MIB)[MIB : MIB + 4096]


def test_metrics_of_a_library(proxy: Proxy) -> None:
    found, data = proxy.big(4 * MIB)
    assert found.read("big/disk.raw", 0, MIB) == data[:MIB]
    before = metrics(found)
    calls = before["vddkfs_library_call_seconds"].samples
    counts = {
        sample.labels["function"]: sample.value
        for sample in calls
        if sample.name.endswith("_count")
    }
    assert counts["VixDiskLib_InitEx"] == 1
    assert counts["VixDiskLib_ReadAsync"] >= 1
    assert total(before, "library_bytes") >= MIB
    assert {sample.labels["worker"] for sample in calls} == {"big/chain/0"}
    with stopped(found.worker()["pid"]):
        began = time.monotonic()
        told = metrics(found)
        assert time.monotonic() - began < PROMPTLY
        assert told["vddkfs_library_call_seconds"].samples == []
        assert total(told, "worker_requests") >= total(before, "worker_requests")
    again = until(
        lambda: total(metrics(found), "library_bytes") >= MIB, what="what the library did"
    )
    assert again


def test_watch_tells_what_goes_on_until_the_mount_goes(mount: Mounts, vm: Path) -> None:
    make_vmfs(vm / "disk.vmdk", noise("watched", 4 * MIB))
    found = mount(vm)
    found.map_known("disk")
    with subprocess.Popen(
        [COMMAND, "status", "--watch", "0.2", found.place],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert str(vm) in process.stdout.readline()
            found.sha256("disk/disk.raw")
            told = process.stdout.readline()
            while "disk: " not in told:
                assert "all: " in told
                told = process.stdout.readline()
            assert " reads/s, " in told
            found.close_agent()
            assert found.umount().returncode == 0
            _, error = process.communicate(timeout=PROMPT)
            assert process.returncode == NotMounted.exit_code
            assert error == f"vddkfs: {found.place}: it is not mounted any more\n"
        finally:
            process.kill()


def test_watch_ends_well_when_it_is_interrupted(mount: Mounts, vm: Path) -> None:
    make_vmfs(vm / "disk.vmdk", noise("interrupted", MIB))
    found = mount(vm)
    command = [COMMAND, "status", "--watch", found.place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert os.fsencode(vm) in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=PROMPT)
            assert (process.returncode, error) == (0, b"")
        finally:
            process.kill()
