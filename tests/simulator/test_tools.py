"""The simulator's scripts and clients: build, demo, limits, probe."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.simulator.disks import SIZE
from tests.simulator.kit import SIMULATOR, Kit, built, replace, until

DISK = "[ds1] web01/web01.vmdk"


def run(*words: str | Path, status: int = 0, **environment: str) -> str:
    """Run a command; return its output."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def processes_of(folder: Path) -> list[str]:
    """Return the command lines that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.fixture
def build(able: None, tmp_path: Path) -> Path:
    """Copy a built kit, to be built again."""
    folder = tmp_path / "kit"
    shutil.copytree(built(), folder, symlinks=True)
    shutil.rmtree(folder / "sites")
    return folder


@pytest.mark.parametrize("script", ["build", "demo", "limits", "probe"])
def test_help(able: None, script: str) -> None:
    assert run(SIMULATOR / script, "--help").startswith(f"usage: contrib/simulator/{script}")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("build", ["--release", "5.5"]),
        ("build", ["--sanitize", "hands"]),
        ("build", ["--release"]),
        ("demo", ["--wrong"]),
        ("limits", ["--disks", "many"]),
        ("limits", ["--wrong"]),
    ],
)
def test_wrong_argument(able: None, script: str, words: list[str]) -> None:
    assert run(SIMULATOR / script, *words, status=1).startswith(f"contrib/simulator/{script}: ")


def test_build_again_does_nothing(build: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in build.rglob("*.[os]*")}
    assert run(SIMULATOR / "build", build) == ""
    assert {path: path.stat().st_mtime_ns for path in build.rglob("*.[os]*")} == before


def test_build_makes_what_is_missing_or_old(build: Path) -> None:
    (build / "bin/vixsim-probe").unlink()
    old = build / ".objects/common-wire.o"
    os.utime(old, (0, 0))
    os.utime(build / ".objects/done", (0, 0))
    library = build / "lib64/libvixDiskLib.so.8.0.0"
    before = library.stat()
    run(SIMULATOR / "build", build)
    assert old.stat().st_mtime > 0
    assert (build / "bin/vixsim-probe").exists()
    # Another file: a client that has the old one mapped keeps it.
    assert library.stat().st_ino != before.st_ino


def test_build_of_another_release_leaves_nothing_of_the_first(build: Path, tmp_path: Path) -> None:
    (build / "sites").mkdir()
    (build / "sites/mine").touch()
    quick = tmp_path / "cc"  # for the names of the files
    quick.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n: >"$2"\n')
    quick.chmod(0o755)
    run(SIMULATOR / "build", "--release", "6.5", build, CC=str(quick))
    names = {path.name for path in (build / "lib64").iterdir() if "vixDiskLib" in path.name}
    assert names == {"libvixDiskLib.so", "libvixDiskLib.so.6", "libvixDiskLib.so.6.5.0"}
    assert (build / "sites/mine").exists()


@pytest.mark.parametrize(("release", "absent"), [("6.5", 3), ("6.7", 0), ("8.0", 0)])
def test_build_imitates_a_release(able: None, release: str, absent: int) -> None:
    answer = probe(built(release), "--only", "symbols")["symbols"]["answer"]
    assert answer["release"] == int(release.replace(".", ""))
    assert len(answer["absent"].split()) == absent


def test_build_tells_what_failed(build: Path) -> None:
    (build / ".objects/done").unlink()
    (build / ".objects/flags").unlink()
    message = run(SIMULATOR / "build", build, status=1, CC="/bin/false")
    assert "build: not all of it could be built" in message


@pytest.mark.parametrize("name", ["libssl.so.3", "libcrypto.so.3", "libz.so.1", "libexpat.so.1"])
def test_decoys_break_a_client_that_lets_them_in(able: None, name: str) -> None:
    """The decoys are what the linker takes, and they have nothing in them."""
    code = f"import ctypes; ctypes.CDLL('{name}'); print(open('/proc/self/maps').read())"
    maps = run(sys.executable, "-I", "-S", "-c", code, LD_LIBRARY_PATH=str(built() / "lib64"))
    assert str(built() / "lib64" / name) in maps
    assert run("nm", "-D", "--defined-only", built() / "lib64" / name) == ""


# ---- vixsim-probe


def probe(folder: Path, *words: str | Path) -> dict[str, Any]:
    """Ask a library; return the answers by question."""
    text = run(
        folder / "bin/vixsim-probe" if (folder / "bin").exists() else built() / "bin/vixsim-probe",
        "--libdir",
        folder,
        *words,
        LD_LIBRARY_PATH=str(folder / "lib64"),
    )
    return {answer["question"]: answer for answer in json.loads(text)}


@pytest.fixture
def words(kit: Kit) -> list[str | Path]:
    """Return what leads the probe to a disk."""
    kit.configure("user = me", "password = pass word/1", "thumbprint = AA:BB")
    (kit.path / "password").write_text("pass word/1\n")
    return [
        *("--server", "vcenter", "--user", "me", "--password-file", kit.path / "password"),
        *("--thumbprint", "AA:BB", "--moref", "vm-16", "--snapshot", "snapshot-1", "--disk", DISK),
    ]


def test_probe_without_a_server_asks_the_library(bare: Kit) -> None:
    answers = probe(bare.path)
    assert answers["symbols"]["answer"]["absent"] == ""
    assert answers["init-version-6.5"]["answer"]["init"] == 0
    assert answers["usual"]["answer"] is None
    assert "--server" in answers["usual"]["why"]


def test_probe_answers_every_question(kit: Kit, words: list[str | Path]) -> None:
    settings = (kit.site / "sim.conf").read_text()
    replace(kit.site / "sim.conf", settings + "profile = lan\nexit_ms = 0\n")
    content = kit.disk(DISK).read_bytes()
    answers = probe(kit.path, *words)
    assert "pass" not in json.dumps([answer["answer"] for answer in answers.values()]).replace(
        "password_is_there", ""
    )
    assert not [name for name, answer in answers.items() if answer["answer"] is None]
    assert answers["usual"]["answer"]["transport"] == "nbdssl"
    assert answers["wrong-password"]["answer"]["connect"] == 35
    assert answers["wrong-thumbprint"]["answer"]["open"] == 1
    assert answers["read-async"]["answer"]["returned"] == 25000
    assert answers["wait"]["answer"]["called_after"] == 16
    assert answers["metadata-read-ddb"]["answer"]["required_counts_the_nul"] is True
    assert answers["transport-hotadd"]["answer"]["not_asked"]
    # A crash is an answer; what was told before it is there.
    assert answers["close-outstanding"]["ended"] == "signal 6"
    assert "called_before" in answers["close-outstanding"]["answer"]
    assert answers["close-outstanding"]["stderr_bytes"] > 0
    assert kit.disk(DISK).read_bytes() == content
    assert not kit.events("attach")


def test_probe_tells_secrets_in_the_log(kit: Kit, words: list[str | Path]) -> None:
    kit.configure("user = me", "password = pass word/1", "chatter.secrets = yes")
    kit.configure_kit("chatter.secrets = yes")
    answer = probe(kit.path, *words, "--only", "log-secrets")["log-secrets"]["answer"]
    assert answer["in_log"] or answer["in_warn"]


def test_probe_ends_what_hangs(kit: Kit, words: list[str | Path]) -> None:
    kit.configure("fault = Read hang")
    answer = probe(kit.path, *words, "--only", "read-2m", "--seconds", "0.5")["read-2m"]
    assert answer["ended"] == "time-out"
    assert "answered" not in answer["answer"]


def test_probe_does_not_hot_add_by_accident(bare: Kit) -> None:
    message = run(
        *(built() / "bin/vixsim-probe", "--libdir", bare.path, "--transports", "san:hotadd"),
        status=2,
        LD_LIBRARY_PATH=str(bare.path / "lib64"),
    )
    assert "--allow-hotadd" in message


def test_probe_script_takes_any_kit(bare: Kit) -> None:
    text = run(SIMULATOR / "probe", "--libdir", bare.path, "--only", "transports")
    assert json.loads(text)[0]["answer"]["transports"] == "file:san:hotadd:nbdssl:nbd"
    assert "no lib64" in run(SIMULATOR / "probe", "--libdir", "/nonexistent", status=2)


# ---- vixsim-limits


def limits(kit: Kit, *words: str) -> dict[str, Any]:
    (kit.path / "password").write_text("any\n")
    text = run(
        *(built() / "bin/vixsim-limits", "--libdir", kit.path, "--server", "vcenter"),
        *("--user", "me", "--password-file", kit.path / "password", "--moref", "vm-17"),
        *("--transports", "nbdssl", "--seconds", "0.05", "--json", *words),
        LD_LIBRARY_PATH=str(kit.path / "lib64"),
    )
    outcome: dict[str, Any] = json.loads(text)
    return outcome


def test_limits_follow_the_profile(kit: Kit) -> None:
    """A millisecond and 16 at a time are less than 16,000 a second."""
    kit.configure("net.jitter = 0", profile="lan")
    rows = limits(kit, "[ds1] plain/plain.vmdk", "[ds1] plain/thin.vmdk")["workloads"]
    assert [row["depth"] for row in rows] == [1, 8, 1, 16, 64]
    one, sixteen = rows[2], rows[3]
    assert 100 < one["requests_per_s"] < 2000  # of two disks together
    assert 1000 < sixteen["requests_per_s"] < 32000
    assert one["median_ms"] >= 1


def test_limits_write_only_when_told(kit: Kit) -> None:
    path = "[ds1] plain/plain.vmdk"
    flat = kit.disk("[ds1] plain/plain-flat.vmdk")
    content = flat.read_bytes()
    assert len(limits(kit, path)["workloads"]) == 5
    assert flat.read_bytes() == content
    assert len(limits(kit, path, "--write")["workloads"]) == 8
    assert flat.read_bytes() != content


def test_limits_of_some_workloads_only(kit: Kit) -> None:
    path = "[ds1] plain/plain.vmdk"
    rows = limits(kit, path, "--write", "--only", "write")["workloads"]
    assert [(row["name"], row["depth"]) for row in rows] == [
        ("sequential write 1 MiB", 1),
        ("sequential write 1 MiB", 8),
        ("random write 4 KiB", 16),
    ]
    assert limits(kit, path, "--only", "write")["workloads"] == []


def test_limits_warm_up_reads_each_disk_once(kit: Kit) -> None:
    kit.configure("net.latency_us = 60000")  # no workload comes far
    limits(kit, "[ds1] plain/plain.vmdk")
    limits(kit, "[ds1] plain/plain.vmdk", "--warm-up")
    cold, warm = (int(event.fields["read_bytes"]) for event in kit.events("client-close"))
    assert warm - cold > SIZE / 2


def test_limits_script_prints_a_table(able: None, tmp_path: Path) -> None:
    words = ("--seconds", "0.1", "--size", "8", "nbdssl", "instant")
    table = run(SIMULATOR / "limits", *words, TMPDIR=str(tmp_path)).splitlines()
    assert table[0].split() == ["nbdssl", "instant"]
    assert len(table) == 6
    assert all(float(line.split()[-1]) > float(line.split()[-2]) > 0 for line in table[1:])
    assert not list(tmp_path.iterdir())


def test_limits_script_leaves_nothing_when_interrupted(able: None, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [SIMULATOR / "limits", "--seconds", "30", "--size", "8", "instant"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    try:
        until(lambda: any("vixsim-limits --" in line for line in processes_of(tmp_path)))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.communicate()
    assert not list(tmp_path.iterdir())
    assert not processes_of(tmp_path)


# ---- the demonstration


@pytest.fixture
def demo(build: Path) -> Iterator[Path]:
    for tool in ("mkfs.ext4", "debugfs", "sfdisk"):
        if shutil.which(tool, path="/bin:/usr/bin:/sbin:/usr/sbin") is None:
            pytest.skip(f"absent: {tool}")
    yield build
    subprocess.run([SIMULATOR / "demo", "--stop", build], capture_output=True, timeout=30)


def test_demo_serves_a_guest_at_three_points(demo: Path, tmp_path: Path) -> None:
    message = run(SIMULATOR / "demo", "--daemon", demo)
    site = demo / "sites/vc.example.com"
    password = (site / "password").read_text().strip()
    assert password not in message
    assert f"demo --stop '{demo}' ends it" in message
    assert (site / "password").stat().st_mode & 0o077 == 0
    assert "runs already" in run(SIMULATOR / "demo", demo, status=1)
    thumbprint = next(line for line in message.splitlines() if "thumbprint" in line).split()[1]
    answers = probe(
        demo,
        *("--server", "vc.example.com", "--user", "backup@vsphere.local"),
        *("--password-file", site / "password", "--thumbprint", thumbprint, "--moref", "vm-16"),
        *("--snapshot", "snapshot-2", "--disk", "[ds1] web01/web01-000001.vmdk"),
        *("--only", "usual", "--only", "info"),
    )
    assert answers["usual"]["answer"]["open"] == 0
    assert answers["info"]["answer"]["links"] == 2
    for suffix, motd in (("", "version 1"), ("-000001", "version 2"), ("-000002", "version 3")):
        raw, disk = tmp_path / "disk.raw", f"ds1/web01/web01{suffix}.vmdk"
        with raw.open("wb") as file:
            subprocess.run(
                [demo / "bin/vixsim-vmdk", "read", site / disk, "0", "131072"],
                stdout=file,
                check=True,
                timeout=20,
            )
        found = run("/sbin/debugfs", "-R", "cat /etc/motd", f"{raw}?offset=1048576")
        assert found.startswith(motd)
    assert "ended" in run(SIMULATOR / "demo", "--stop", demo)
    assert not processes_of(demo)
    assert "does not run" in run(SIMULATOR / "demo", "--stop", demo, status=1)


def test_demo_ends_with_an_interrupt(demo: Path) -> None:
    process = subprocess.Popen(
        [SIMULATOR / "demo", demo], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        while "Ctrl-C" not in process.stdout.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.communicate()
    assert not processes_of(demo)
