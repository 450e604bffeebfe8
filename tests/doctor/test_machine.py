"""The machine: each finding both ways."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vddkfs import mounts
from vddkfs.doctor import machine
from vddkfs.doctor.machine import Machine, builtin, can_mount, judge
from vddkfs.doctor.rows import Row
from vddkfs.errors import AccessDenied
from vddkfs.options import MountOptions

GIB = 1024**3
GOOD = Machine(
    kernel="6.1.0-28-amd64",
    architecture="x86_64",
    root=True,
    fuse_problem="",
    fuse_remedy="",
    fusermount="/usr/bin/fusermount3",
    fusermount_version="3.14.0",
    fusermount_setuid=True,
    pyfuse3="3.4.2",
    libfuse="3.14.0",
    hooks=True,
    binding_problem="",
    memory=16 * GIB,
    memory_available=12 * GIB,
    syslog=True,
    state="/run/vddkfs",
    state_problem="",
    allow_other=False,
    charset="utf-8",
    worker_locale=True,
)


def judged(options: MountOptions | None = None, **changes: Any) -> dict[str, Row]:
    rows = judge(msgspec.structs.replace(GOOD, **changes), options or MountOptions())
    assert all(row.remedy or row.level == "ok" for row in rows)
    return {row.what: row for row in rows}


def test_a_good_machine_is_ok() -> None:
    assert {row.level for row in judged().values()} == {"ok"}


@pytest.mark.parametrize(
    ("what", "level", "finding", "changes"),
    [
        ("kernel", "failure", "5.2", {"kernel": "5.2.0"}),
        ("kernel", "ok", "5.3", {"kernel": "5.3.0"}),
        ("/dev/fuse", "failure", "gone", {"fuse_problem": "gone"}),
        ("fusermount3", "warning", "missing", {"fusermount": ""}),
        ("fusermount3", "failure", "missing", {"fusermount": "", "root": False}),
        ("fusermount3", "failure", "not setuid", {"fusermount_setuid": False, "root": False}),
        ("fusermount3", "ok", "3.14", {"fusermount_setuid": False}),
        ("pyfuse3", "failure", "no libfuse3.so", {"binding_problem": "no libfuse3.so"}),
        ("C module", "warning", "SEEK_HOLE", {"hooks": False}),
        ("permissions", "warning", "not root", {"root": False}),
        ("memory", "failure", "256 MiB", {"memory": 1, "memory_available": 1}),
        ("memory", "warning", "256 MiB", {"memory_available": 1}),
        ("log", "ok", "/run/vddkfs", {"syslog": False}),
        ("log", "ok", "syslog", {}),
        ("state folder", "failure", "not yours", {"state_problem": "not yours"}),
        ("locale", "warning", "ISO-8859-1", {"charset": "ISO-8859-1"}),
        ("locale", "ok", "UTF-8", {"charset": "UTF8"}),
        ("locale", "warning", "C.UTF-8", {"worker_locale": False}),
    ],
)
def test_findings(what: str, level: str, finding: str, changes: dict[str, Any]) -> None:
    options = MountOptions(cache_size=256 * 1024**2)
    row = judged(options, **changes)[what]
    assert row.level == level
    assert finding in row.finding


def test_findings_about_options() -> None:
    assert judged(MountOptions(log="syslog"), syslog=False)["log"].level == "failure"
    assert judged(MountOptions(log="/var/log/x"))["log"].finding == "goes to /var/log/x"
    other = MountOptions(allow_other=True)
    assert judged(other, root=False)["allow_other"].level == "failure"
    assert "allow_other" not in judged(other, root=False, allow_other=True)
    assert "allow_other" not in judged(other)


def test_the_builtin_engine_always_works() -> None:
    good = judge(GOOD, MountOptions())
    assert can_mount(good)
    assert "local VMDKs can be mounted now" in builtin(True).finding
    bad = judge(msgspec.structs.replace(GOOD, fuse_problem="gone"), MountOptions())
    assert not can_mount(bad)
    assert builtin(False).level == "warning"


def test_looking_at_this_machine() -> None:
    seen = machine.look()
    assert seen.kernel == os.uname().release
    assert seen.memory >= seen.memory_available > 0
    assert seen.pyfuse3
    assert seen.root == (os.geteuid() == 0)


def test_fuse_is_opened_and_not_only_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (mounts, machine):
        monkeypatch.setattr(module, "FUSE_DEVICE", tmp_path / "fuse")
    assert "missing" in machine._fuse()[0]
    (tmp_path / "fuse").mkdir()
    problem, remedy = machine._fuse()
    assert os.strerror(errno.EISDIR) in problem
    assert "modprobe fuse" in remedy
    (tmp_path / "fuse").rmdir()
    (tmp_path / "fuse").touch()
    assert machine._fuse() == ("", "")


def test_tools_and_files_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "fusermount3"
    tool.write_text("#!/bin/sh\necho fusermount3 version: 3.9.9\n")
    tool.chmod(0o755 | stat.S_ISUID)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    seen = machine.look()
    assert (seen.fusermount, seen.fusermount_version) == (str(tool), "3.9.9")
    assert seen.fusermount_setuid
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert machine.look().fusermount_version == ""
    conf = tmp_path / "fuse.conf"
    monkeypatch.setattr(machine, "_FUSE_CONF", conf)
    assert not machine.look().allow_other
    conf.write_text("# user_allow_other\n")
    assert not machine.look().allow_other
    conf.write_text("user_allow_other\n")
    assert machine.look().allow_other


def test_a_state_folder_of_others_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise AccessDenied("not yours alone", advice="chmod it")

    monkeypatch.setattr(machine, "state_folder", refuse)
    assert "not yours alone" in machine.look().state_problem


def test_a_locale_is_had_or_not() -> None:
    assert machine._has_locale("C")
    assert not machine._has_locale("xx_XX.NOWHERE")
