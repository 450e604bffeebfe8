"""The command line: help, versions, the form that mount(8) uses, and its options."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.mounting import COMMAND, SECONDS, Mounts, mounted, run, vddkfs
from tests.end_to_end.vms import KIB, MIB, make_chain, make_vmdk, noise, raw_sha256

COMMANDS = ["mount", "umount", "info", "status"]
HELPER = Path(__file__).parents[2] / "contrib/mount.vddkfs"


@pytest.fixture
def command() -> None:
    if not COMMAND.exists():
        pytest.skip(f"absent: the installed command {COMMAND.name} (run contrib/setup)")


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help(command: None, words: list[str]) -> None:
    done = vddkfs(*words, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "usage: vddkfs" in done.stdout
    for name in COMMANDS if not words else ():
        assert name in done.stdout


def test_help_tells_options_and_exit_codes(command: None) -> None:
    said = vddkfs("mount", "--help").stdout
    for option in ("uid=", "umask=", "allow_other", "follow_parents=", "retry_budget=", "log="):
        assert option in said
    assert "exit codes" in vddkfs("--help").stdout


def test_version_names_all_parts(command: None) -> None:
    done = vddkfs("--version")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    for word in ("vddkfs ", "pyfuse3 ", "libfuse 3", "engine vmdk "):
        assert word in done.stdout
    assert "without the C module" not in done.stdout


@pytest.mark.parametrize(
    "words",
    [[], ["frobnicate"], ["mount"], ["mount", "/nowhere"], ["status"], ["info", "--nope", "/x"]],
    ids=" ".join,
)
def test_wrong_usage(command: None, words: list[str]) -> None:
    done = vddkfs(*words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("vddkfs: ")
    assert "--help" in line


def test_output_to_nobody(command: None, vm: Path) -> None:
    make_chain(vm, links=3, size=MIB)
    with subprocess.Popen([COMMAND, "info", "--json", vm], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(SECONDS) in (0, 141)


def test_info_lists_what_would_be_mounted(command: None, vm: Path) -> None:
    links = make_chain(vm, links=3, size=MIB)
    packed = make_vmdk(vm / "odd.vmdk", noise("packed", MIB), "streamOptimized")
    packed.write_bytes(packed.read_bytes()[:KIB])
    done = vddkfs("info", vm)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    for number, link in enumerate(links):
        (row,) = [row for row in rows if row.startswith(f"web/chain/{number}.raw")]
        assert str(link) in row
        assert ("disk.raw" in row) == (number == 2)
    assert any(row.startswith("left out: ") and "odd.vmdk" in row for row in rows)
    document = json.loads(vddkfs("info", "--json", vm).stdout)
    assert [disk["name"] for disk in document["disks"]] == ["web"]


def test_form_of_mount8(mount: Mounts, vm: Path) -> None:
    """`SOURCE MOUNTPOINT -o ...`, with what fstab and mount(8) put among the options.

    They say rw wherever ro is not said: nothing is written for that.
    """
    path = make_vmdk(vm / "disk.vmdk", noise("disk", MIB))
    found = mount.prepare(path)
    options = (
        "rw,_netdev,nofail,noauto,user,nosuid,nodev,noexec,relatime,x-systemd.automount,"
        "x-systemd.mount-timeout=30,X-mount.mkdir,comment=a backup,defaults,umask=027,uid=77"
    )
    done = vddkfs(path, found.place, "-o", options, "-o", f"log={found.log}")
    assert done.returncode == 0, done.stderr
    found.pid = found.status()["pid"]
    assert found.sha256("disk/disk.raw") == raw_sha256(path)
    status = found.stat("disk/disk.raw")
    assert (status.st_mode & 0o777, status.st_uid) == (0o440, 77)


def test_helper_of_mount8(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    """What mount(8) runs for `mount -t vddkfs`, beside the command as `contrib/setup` puts it."""
    if not HELPER.exists():
        pytest.skip("absent: contrib/mount.vddkfs")
    folder = tmp_path / "sbin"
    folder.mkdir()
    shutil.copy(HELPER, folder)
    (folder / "vddkfs").symlink_to(COMMAND)
    path = make_vmdk(vm / "disk.vmdk", noise("disk", MIB))
    found = mount.prepare(path)
    options = f"ro,user,umask=077,log={found.log}"
    # As mount(8) calls it: SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS], and with a poor environment.
    done = run(
        folder / HELPER.name, path, found.place, "-n", "-o", options, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    found.pid = found.status()["pid"]
    assert found.sha256("disk/disk.raw") == raw_sha256(path)
    again = run(folder / HELPER.name, path, found.place)
    assert again.returncode == 32
    assert "a vddkfs mount is there already" in again.stderr
    wrong = run(folder / HELPER.name, path, found.place, "-o", "umsk=077")
    assert wrong.returncode == 1


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("alow_other", "allow_other"),
        ("umsk=022", "umask"),
        ("cachesize=1M", "cache_size"),
        ("retry-budget=3", "retry_budget"),
        ("follow_parent=any", "follow_parents"),
    ],
)
def test_unknown_option_names_the_nearest(
    command: None, tmp_path: Path, wrong: str, nearest: str
) -> None:
    for words in (["mount"], []):
        done = vddkfs(*words, tmp_path, tmp_path, "-o", f"uid=1,{wrong}")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"vddkfs: unknown option {wrong.partition('=')[0]}; ")
        assert f"did you mean {nearest}?" in line


def test_unknown_option_without_a_near_one(command: None, tmp_path: Path) -> None:
    done = vddkfs("mount", tmp_path, tmp_path, "-o", "qqqqqq")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "known are" in line


BAD_VALUES = [
    "uid=root",
    "uid=-1",
    "gid=4294967295",
    "umask=888",
    "umask=1777",
    "umask=",
    "umask",
    "allow_other=yes",
    "follow_parents=all",
    "cache_size=1K",
    "cache_size=lots",
    "readahead=-1",
    "readahead=2G",
    "op_timeout=0",
    "op_timeout=nan",
    "op_timeout=soon",
    "retry_budget=-5",
    "idle_timeout=1e99",
    "log=relative/path",
    "log_level=loud",
]


@pytest.mark.parametrize("option", BAD_VALUES)
def test_bad_value(command: None, tmp_path: Path, option: str) -> None:
    done = vddkfs("mount", tmp_path, tmp_path, "-o", option)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vddkfs: option {option}")
    assert "; write " in line


def test_log_that_cannot_be_written(mount: Mounts, vm: Path) -> None:
    make_vmdk(vm / "disk.vmdk", noise("disk", MIB))
    found = mount.prepare(vm)
    done = vddkfs("mount", vm, found.place, "-o", f"log={vm}/no/such/folder/log")
    assert not mounted(found.place)
    assert done.returncode not in (0, 1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("vddkfs: ")
    assert f"{vm}/no/such/folder/log" in line


def test_commands_on_what_is_no_mount(command: None, tmp_path: Path) -> None:
    for name in ("umount", "status"):
        for place in (tmp_path, tmp_path / "missing"):
            done = vddkfs(name, place)
            assert done.returncode == 30
            (line,) = done.stderr.splitlines()
            assert line == f"vddkfs: {place}: no vddkfs mount there"


def test_relative_names(mount: Mounts, vm: Path) -> None:
    path = make_vmdk(vm / "disk.vmdk", noise("disk", MIB))
    found = mount.prepare(path)
    (vm / "alias").symlink_to(found.place)
    done = vddkfs("mount", "disk.vmdk", "alias", "-o", f"log={found.log}", cwd=vm)
    assert done.returncode == 0, done.stderr
    found.pid = found.status()["pid"]
    assert found.sha256("disk/disk.raw") == raw_sha256(path)
    assert vddkfs("status", "alias", cwd=vm).returncode == 0
    found.close_agent()
    assert vddkfs("umount", "alias", cwd=vm).returncode == 0
    assert not mounted(found.place)


def test_started_as_a_module(command: None) -> None:
    done = run(sys.executable, "-m", "vddkfs", "--version", cwd=os.sep)
    assert done.returncode == 0
    assert done.stdout == vddkfs("--version").stdout
