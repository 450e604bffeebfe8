"""``status --watch``: each look is shown, and it ends well however it ends."""

import copy
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.observe.test_summary import STATUS, WORKER, later
from vddkfs.commands import watch as module
from vddkfs.commands.watch import watch
from vddkfs.errors import NotMounted

Output = pytest.CaptureFixture[str]
Looks = list[dict[str, Any] | BaseException]


def looking(*looks: dict[str, Any] | BaseException) -> Callable[[], dict[str, Any]]:
    """Return a look at each of *looks* in turn; what is an error is raised."""
    iterator: Iterator[dict[str, Any] | BaseException] = iter(looks)

    def look() -> dict[str, Any]:
        found = next(iterator)
        if isinstance(found, BaseException):
            raise found
        return found

    return look


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have the time between two looks pass at once; return the sleeps."""
    sleeps: list[float] = []
    now = 1000.0

    def sleep(seconds: float) -> None:
        nonlocal now
        sleeps.append(seconds)
        now += seconds

    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    return sleeps


def test_lines_for_other_programs(no_sleep: list[float], capsys: Output) -> None:
    now = later()
    now["warnings"] = ["careful", "12:00:01 WARNING more"]
    looks = looking(STATUS, now, now, KeyboardInterrupt())
    assert watch("/mnt/web", 2.0, looks) == 0
    assert no_sleep == [2.0] * 3
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    busy = "25 reads/s, 1 MiB/s, 80 % hits, 512 KiB/s from the source, 1 in flight, 2 queued"
    idle = "0 reads/s, 0 B/s, - hits, 0 B/s from the source, 1 in flight, 2 queued"
    assert [line[9:] for line in lines] == [
        "/vms/web at /mnt/web (pid 70, vddkfs 1.0)",
        f"all: {busy}",
        f"web: {busy}",
        "12:00:01 WARNING more",
        f"all: {idle}",
        f"web: {idle}",
    ]


def test_another_daemon_is_another_beginning(no_sleep: list[float], capsys: Output) -> None:
    looks = looking(later(), {**STATUS, "pid": 71}, KeyboardInterrupt())
    assert watch("/mnt/web", 1.0, looks) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "pid 70" in first
    assert "pid 71" in second


def test_no_mount_is_told_as_ever(capsys: Output) -> None:
    with pytest.raises(NotMounted, match="no mount"):
        watch("/mnt/web", 1.0, looking(NotMounted("/mnt/web: no mount")))
    assert capsys.readouterr().out == ""


def test_a_mount_that_goes_away_is_one_clear_line(
    no_sleep: list[float], tmp_path: Path, capsys: Output
) -> None:
    looks = looking(STATUS, NotMounted("it does not answer", cause="Connection reset"))
    with pytest.raises(NotMounted) as caught:
        watch(str(tmp_path), 1.0, looks)
    assert str(caught.value) == f"{tmp_path}: it is not mounted any more"


def test_a_daemon_that_missed_one_look_is_looked_at_again(
    no_sleep: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    (tmp_path / "sock").touch()
    monkeypatch.setattr(module, "socket_path", lambda mountpoint: tmp_path / "sock")
    looks = looking(STATUS, NotMounted("busy"), later(), NotMounted("busy"), NotMounted("dead"))
    with pytest.raises(NotMounted, match="dead"):
        watch("/mnt/web", 1.0, looks)
    assert "25 reads/s" not in capsys.readouterr().out, "it took longer than a second"


CHILD = """
import sys
from tests.test_watch import child
sys.exit(child())
"""


def child() -> int:
    """Watch a mount that counts on, in a process of its own."""
    found = copy.deepcopy(STATUS)
    disk = copy.deepcopy(found["disks"][0])
    disk["name"] = "big [red]\\x1b[2J"
    disk["workers"] = [{**WORKER, "name": f"{disk['name']}/chain/{n}"} for n in range(2)]
    found["disks"].append(disk)

    def look() -> dict[str, Any]:
        found["reads"]["count"] += 7
        found["disks"][1]["reads"]["count"] += 7
        return copy.deepcopy(found)

    return watch("/mnt/web", 0.1, look)


@pytest.fixture
def command() -> list[str]:
    root = str(Path(__file__).resolve().parents[1])
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{CHILD}"]


def read_until(fd: int, wanted: Callable[[str], bool], seconds: float = 30.0) -> str:
    """Return what was read when it is as *wanted*."""
    end, text = time.monotonic() + seconds, ""
    while not wanted(text):
        assert time.monotonic() < end, text
        if select.select([fd], [], [], 0.2)[0]:
            text += os.read(fd, 65536).decode()
    return text


def test_a_table_for_a_person_is_drawn_again_until_ctrl_c(command: list[str]) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "140", "LINES": "40"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment
    )
    os.close(theirs)
    try:
        text = read_until(ours, lambda text: text.count("reads/s, ") >= 4)
        process.send_signal(signal.SIGINT)
        text += read_until(ours, lambda rest: "\x1b[?25h" in rest)
        assert process.stderr is not None
        assert (process.wait(20), process.stderr.read()) == (0, b"")
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
    for wanted in ("/vms/web at /mnt/web", "disk, worker", "big [red]", "  chain/1", "careful"):
        assert wanted in text
    assert "\x1b[2J" not in text, "a name cannot clear the screen"
    assert "\x1b[1A" in text or "\x1b[2K" in text, "each is drawn in the place of the one before"


def test_lines_come_at_once_and_ctrl_c_ends_them_well(command: list[str]) -> None:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), lambda text: text.count("all: ") >= 3)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=20)
        assert (process.returncode, told) == (0, b"")
    finally:
        process.kill()
        process.communicate()
