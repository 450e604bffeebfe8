"""The command ``vddkfs invalidate``: whom it asks, what it prints, and how it ends."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_mountinfo import ROOT, line
from vddkfs.cli import main
from vddkfs.commands import invalidate
from vddkfs.commands.invalidate import Result, parse_range, verdict
from vddkfs.engines.base import Step
from vddkfs.errors import NotMounted, OldAbove, OldContentLeft, UsageError
from vddkfs.loops import Flushed, Guest, Range, Reader
from vddkfs.mountinfo import entries

Output = pytest.CaptureFixture[str]
Answer = dict[str, Any] | bytes | None

STEPS = [
    {"place": "library", "subject": "web", "told": "opened again", "seconds": 1.25, "done": True},
    {"place": "kernel", "subject": "web/a.raw", "told": "dropped", "seconds": 0.1, "done": True},
]
DONE: dict[str, Any] = {
    "steps": STEPS,
    "ranges": [{"name": "web/disk.raw", "start": 0, "end": 512}],
}
UNDONE = {**DONE, "steps": [STEPS[0] | {"done": False, "told": "it hangs"}, STEPS[1]]}


class Daemon:
    """Answers on the socket of one mount: as the test says, after the test says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {"invalidate": DONE, "invalidating": {"waiting": []}}
        self.asked: list[dict[str, Any]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(8)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection.makefile("rb") as file:
                request = json.loads(file.readline() or b"{}")
            if not request:
                connection.close()
                return
            self._threads.append(threading.Thread(target=self._serve, args=(connection, request)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket, request: dict[str, Any]) -> None:
        with connection, contextlib.suppress(BrokenPipeError):
            self.asked.append(request)
            if request["command"] == "invalidate":
                self.may_answer.wait(20)
            answer = self.answers[request["command"]]
            if isinstance(answer, dict):
                answer = json.dumps(answer).encode() + b"\n"
            if answer is not None:
                connection.sendall(answer)

    def close(self) -> None:
        """End as a daemon does that is killed: its socket stays there."""
        if self._server.fileno() < 0:
            return
        self.may_answer.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(self.path))
        for thread in self._threads:
            thread.join(20)
        self._server.close()


Daemons = Callable[[str], Daemon]


@pytest.fixture
def daemons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemons]:
    """Make mounts: folders of the test's, with a daemon for each."""
    made: list[Daemon] = []
    lines = [ROOT]

    def path(place: str) -> Path:
        return tmp_path / f"{Path(place).name}.sock"

    def make(name: str) -> Daemon:
        lines.append(line(len(lines) + 1, 1, f"{tmp_path}/{name}"))
        made.append(Daemon(path(name)))
        return made[-1]

    def fake() -> Any:
        return entries(os.fsencode("".join(lines)))

    monkeypatch.setattr("vddkfs.control.socket_path", path)
    monkeypatch.setattr(invalidate, "socket_path", path)
    monkeypatch.setattr(invalidate, "entries", fake)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(invalidate, "readers", lambda *_: [])
    yield make
    for daemon in made:
        daemon.close()


GUEST = Guest("/mnt/guest", "ext4", "/dev/loop0")
LOOP = Reader("/dev/loop0", "/mnt/web/web/disk.raw", ("/dev/loop0p1",), ())
MOUNTED = Reader("/dev/loop0", "/mnt/web/web/disk.raw", (), (GUEST,))


# Whom it asks


def test_names_go_to_the_daemon_without_a_look_at_the_mount(
    daemons: Daemons, tmp_path: Path, capsys: Output
) -> None:
    """The mounts are not even there as folders."""
    daemon = daemons("web")
    place = f"{tmp_path}/web"
    (tmp_path / "link").symlink_to("web/disk")
    words = ["web/disk/disk.raw", "link/chain/../chain/0.raw", f"{place}/", "web/caf\udce9"]
    assert main(["invalidate", *words]) == 0
    names = ["disk/disk.raw", "disk/chain/0.raw", "", "caf\udce9"]
    assert daemon.asked == [{"command": "invalidate", "names": names, "start": 0, "length": None}]
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "library  web         1.2 s  opened again",
        "kernel   web/a.raw  100 ms  dropped",
    ]


def test_several_mounts_are_asked_at_once(daemons: Daemons, capsys: Output) -> None:
    first, second = daemons("one"), daemons("two")
    first.may_answer.clear()
    second.answers["invalidate"] = UNDONE

    def after_second() -> None:
        while not second.asked:
            time.sleep(0.01)
        first.may_answer.set()

    thread = threading.Thread(target=after_second)
    thread.start()
    assert main(["invalidate", "two/a", "one/b", "two/c", "--range", "1M:512"]) == 42
    thread.join()
    [asked] = second.asked
    assert (asked["names"], asked["start"], asked["length"]) == (["a", "c"], 1024 * 1024, 512)
    assert first.asked[0]["names"] == ["b"]
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert err == (
        "vddkfs: web: old content may be left (it hangs); steps not done: 1; do it again when that "
        "is put right\n"
    )


def test_a_bind_mount_is_served_by_the_daemon_of_the_whole(
    daemons: Daemons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = daemons("web")
    table = line(7, 1, f"{tmp_path}/bound", device="0:2", root="/web/chain")
    table += line(8, 1, f"{tmp_path}/again", device="0:2")
    table += line(9, 1, f"{tmp_path}/web", device="0:2")
    monkeypatch.setattr(invalidate, "entries", lambda: entries(os.fsencode(ROOT + table)))
    assert main(["invalidate", "bound/0.raw", "again/web"]) == 0
    assert [asked["names"] for asked in daemon.asked] == [["web/chain/0.raw", "web"]]


@pytest.mark.parametrize("path", ["/", ".", "file", "nowhere/web/disk.raw"])
def test_a_path_in_no_mount_is_told_and_nobody_is_asked(
    path: str, daemons: Daemons, tmp_path: Path, capsys: Output
) -> None:
    daemon = daemons("web")
    (tmp_path / "file").write_text("x")
    assert main(["invalidate", "web", path]) == 30
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"vddkfs: {path}: ")
    assert daemon.asked == []


def test_a_mount_without_a_daemon_is_told(daemons: Daemons, tmp_path: Path, capsys: Output) -> None:
    daemon = daemons("web")
    daemons("dead").close()
    assert main(["invalidate", "dead", "web"]) == 30
    out, err = capsys.readouterr()
    assert "opened again" in out, "the other mount is done all the same"
    assert f"{tmp_path}/dead: the daemon of that mount does not answer" in err
    assert len(daemon.asked) == 1


def test_too_many_names_for_one_command(daemons: Daemons, capsys: Output) -> None:
    daemon = daemons("web")
    assert main(["invalidate", *[f"web/{'x' * 200}{n}" for n in range(400)]]) == 2
    assert "name their folder" in capsys.readouterr().err
    assert daemon.asked == []


# Waiting


def test_a_long_wait_is_told_and_has_no_end_of_its_own(
    daemons: Daemons, monkeypatch: pytest.MonkeyPatch, capsys: Output, tmp_path: Path
) -> None:
    monkeypatch.setattr("vddkfs.control._SECONDS", 0.2)
    monkeypatch.setattr(invalidate, "_FIRST_WORD", 0.05)
    monkeypatch.setattr(invalidate, "_NEXT_WORD", 0.1)
    daemon = daemons("web")
    daemon.may_answer.clear()
    waiting = {"waiting": [{"what": "web: the source is asked anew", "seconds": 12.3}]}
    daemon.answers["invalidating"] = waiting
    threading.Timer(1.0, daemon.may_answer.set).start()
    assert main(["invalidate", "web", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["mounts"]
    told = err.splitlines()
    assert 2 <= len(told) < 15
    what = "waiting for web: the source is asked anew, 12.3 s"
    assert set(told) == {f"vddkfs: {tmp_path}/web: {what}"}
    assert [asked["command"] for asked in daemon.asked].count("invalidate") == 1


def test_a_daemon_that_answers_nothing_any_more_is_given_up(
    daemons: Daemons, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(invalidate, "_FIRST_WORD", 0.05)
    hung, well = daemons("hung"), daemons("well")
    hung.may_answer.clear()
    hung.answers["invalidating"] = None
    assert main(["invalidate", "hung", "well"]) == 30
    out, err = capsys.readouterr()
    assert "opened again" in out
    assert "does not answer" in err
    assert well.asked


def test_what_is_waited_for_may_be_over_already(
    daemons: Daemons, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(invalidate, "_FIRST_WORD", 0.05)
    daemon = daemons("web")
    daemon.may_answer.clear()
    threading.Timer(0.5, daemon.may_answer.set).start()
    assert main(["invalidate", "web"]) == 0
    assert "waiting for the answer" in capsys.readouterr().err


# What the daemon says


@pytest.mark.parametrize(
    ("answer", "code", "text"),
    [
        ({"error": "web/x: no such file in the mount", "exit_code": 2}, 2, "/web: web/x: no such"),
        ({"error": "web: torn", "exit_code": 35}, 35, "/web: web: torn"),
        ({"error": "a bug in vddkfs: KeyError()"}, 30, "/web: a bug in vddkfs"),
        ({"error": "an unknown command"}, 30, "/web: an unknown command"),
        (b"", 30, "does not answer"),
        (b"no JSON\n", 30, "does not answer"),
    ],
)
def test_what_the_daemon_refuses_is_told_with_its_code(
    answer: Answer, code: int, text: str, daemons: Daemons, capsys: Output
) -> None:
    daemon = daemons("web")
    daemon.answers["invalidate"] = answer
    assert main(["invalidate", "web/x"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert err.count("\n") == 1
    assert err.count("does not answer") <= 1


# Loop devices and guests


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have devices flushed by nobody; note which."""
    devices: list[str] = []

    def flush(wanted: Iterator[str]) -> dict[str, Flushed]:
        devices.extend(wanted)
        return {device: Flushed("", 0.1) for device in devices}

    monkeypatch.setattr(invalidate, "flush", flush)
    return devices


def test_loop_devices_are_looked_for_behind_the_daemon_and_named(
    daemons: Daemons, flushed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    daemon = daemons("web")

    def readers(device: str, ranges: Any, table: Any) -> list[Reader]:
        assert daemon.asked
        assert (device, ranges) == ("0:2", (Range("web/disk.raw", 0, 512),))
        return [LOOP]

    monkeypatch.setattr(invalidate, "readers", readers)
    assert main(["invalidate", "web"]) == 3
    out, err = capsys.readouterr()
    assert "/dev/loop0 " in out
    assert "/dev/loop0p1 " in out
    assert err.startswith("vddkfs: /dev/loop0, /dev/loop0p1: may still show old content; ")
    assert "--loops" in err
    assert flushed == []

    assert main(["invalidate", "web", "--loops"]) == 0
    out, err = capsys.readouterr()
    assert flushed == ["/dev/loop0", "/dev/loop0p1"]
    assert out.count(": flushed") == 2
    assert err == ""


def test_a_guest_may_be_old_with_and_without_a_flush(
    daemons: Daemons, flushed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    daemons("web")
    monkeypatch.setattr(invalidate, "readers", lambda *_: [MOUNTED])
    for words, names in ([], "/dev/loop0, /mnt/guest"), (["--loops"], "/mnt/guest"):
        assert main(["invalidate", "web", *words]) == 3
        err = capsys.readouterr().err
        assert err == (
            f"vddkfs: {names}: may still show old content; unmount guests and mount them again\n"
        )


def test_json_has_all_of_it(
    daemons: Daemons, flushed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    daemons("web")
    daemons("bad").answers["invalidate"] = {"error": "no", "exit_code": 2}
    monkeypatch.setattr(invalidate, "readers", lambda *_: [MOUNTED])
    assert main(["invalidate", "web", "bad", "--json", "--loops"]) == 2
    web, bad = json.loads(capsys.readouterr().out)["mounts"]
    assert web["steps"][:2] == STEPS
    assert [step["done"] for step in web["steps"]] == [True, True, True, False]
    assert web["readers"] == [
        {
            "device": "/dev/loop0",
            "file": "/mnt/web/web/disk.raw",
            "stacked": [],
            "guests": [{"mountpoint": "/mnt/guest", "type": "ext4", "device": "/dev/loop0"}],
        }
    ]
    assert (bad["error"], bad["exit_code"], bad["steps"]) == ("no", 2, [])


# The end of it


def test_the_worst_decides() -> None:
    def step(place: str, done: bool) -> Step:
        return Step(place, "x", "y", 0.0, done=done)

    good = Result("/a", (step("cache", True), step("loop", True)))
    above = Result("/b", (step("loop", False),))
    left = Result("/c", (step("kernel", False),))
    bad = Result("/d", error="no", exit_code=2)
    assert verdict([good]) is None
    assert verdict([]) is None
    assert isinstance(verdict([good, above]), OldAbove)
    assert isinstance(verdict([above, left, good]), OldContentLeft)
    assert isinstance(verdict([above, left, bad]), UsageError)
    assert isinstance(verdict([Result("/e", error="/e: gone", exit_code=30)]), NotMounted)
    assert str(verdict([Result("/e", error="/e: gone", exit_code=30)])) == "/e: gone"


# Ranges


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, None)),
        ("0:512", (0, 512)),
        ("1M:64K", (1024 * 1024, 65536)),
        ("10G:1", (10 * 1024**3, 1)),
    ],
)
def test_a_range_is_where_and_how_long(text: str, expected: tuple[int, int | None]) -> None:
    assert parse_range(text) == expected


@pytest.mark.parametrize(
    "text", ["1", ":", "1:", ":1", "0:0", "-1:5", "1:-5", "a:b", "1:2:3", "1-2"]
)
def test_what_is_no_range_is_refused(text: str, capsys: Output) -> None:
    assert main(["invalidate", "/mnt/web", f"--range={text}"]) == 2
    err = capsys.readouterr().err
    assert f"--range {text}: not a range" in err
    assert err.count("\n") == 1


def test_paths_are_needed(capsys: Output) -> None:
    assert main(["invalidate"]) == 2
    assert "PATH" in capsys.readouterr().err
