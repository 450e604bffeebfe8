"""The command line: one line and a code for what goes wrong, and help for everything."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.observe.test_summary import STATUS
from tests.test_source import make_disk
from vddkfs import __version__
from vddkfs.cli import COMMANDS, main
from vddkfs.commands import status
from vddkfs.errors import ALL_ERRORS, BadMountpoint, VddkfsError
from vddkfs.fuse import session
from vddkfs.observe.summary import human
from vddkfs.options import OPTIONS

Output = pytest.CaptureFixture[str]
Run = Callable[..., Any]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """Have ``mount`` only note its arguments."""
    calls: list[argparse.Namespace] = []

    def run(arguments: argparse.Namespace) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(COMMANDS["mount"], "run", run)
    return calls


def test_mount_may_be_said_or_not(called: list[argparse.Namespace]) -> None:
    assert main(["mount", "/vms/web", "/mnt/web", "-o", "uid=1", "-o", "gid=2", "-f"]) == 0
    assert main(["/vms/web", "/mnt/web", "-o", "uid=1", "-o", "gid=2", "-f"]) == 0
    assert called[0] == called[1]
    assert called[0].options == ["uid=1", "gid=2"]
    assert called[0].foreground


def test_it_is_called_as_mount_calls_it(
    called: list[argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vddkfs", "/vms/web", "/mnt/web", "-o", "ro,dev,suid"])
    assert main() == 0
    assert (called[0].source, called[0].mountpoint) == ("/vms/web", "/mnt/web")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["dance"],
        ["mount"],
        ["mount", "/vms/web"],
        ["mount", "a", "b", "c"],
        ["a", "b", "--dance"],
        ["info"],
        ["info", "a", "b"],
        ["umount"],
        ["status", "--json"],
        ["status", "--watch"],
        ["status", "--watch", "5"],
        ["status", "--watch", "--json", "/mnt/web"],
        ["--dance"],
    ],
)
def test_a_wrong_call_is_one_line_with_code_2(words: list[str], capsys: Output) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vddkfs: ")
    assert err.count("\n") == 1
    assert "--help" in err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_there_is_help_for_every_command(command: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    if command:
        assert "usage: vddkfs " + command in out
    else:
        assert all(name in out for name in COMMANDS)
        assert all(str(kind.exit_code) in out for kind in ALL_ERRORS)


def test_help_for_mount_tells_every_option(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["mount", "--help"])
    out = capsys.readouterr().out
    for option in OPTIONS:
        assert f"  {option.name}" in out
        assert option.meaning in out


def test_the_version_names_everything_below(capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"vddkfs {__version__} (pyfuse3 ")
    assert f"libfuse {session.libfuse_version()}" in out
    assert f"engine vmdk {__version__}" in out
    assert out.count("\n") == 1


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
def test_every_expected_error_is_one_line_and_its_code(
    kind: type[VddkfsError], monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(
        COMMANDS["info"], "run", raising(kind("/vm/caf\udce9: is\nbad", advice="do this"))
    )
    assert main(["info", "x"]) == kind.exit_code
    assert capsys.readouterr() == ("", "vddkfs: /vm/caf\\udce9: is bad; do this\n")


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(COMMANDS["info"], "run", raising(KeyError("oops")))
    assert main(["info", "x"]) == 1
    err = capsys.readouterr().err
    assert "KeyError: 'oops'" in err
    assert err.endswith("this is a bug in vddkfs; please report the lines above\n")


def test_ctrl_c_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr(COMMANDS["info"], "run", raising(KeyboardInterrupt()))
    assert main(["info", "x"]) == 130
    assert capsys.readouterr() == ("", "")


# info and status


def test_info_prints_the_document_of_the_mount(tmp_path: Path, capsys: Output) -> None:
    make_disk(tmp_path, b"web")
    (tmp_path / "bad.vmdk").write_text("bad")
    assert main(["info", "--json", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [disk["name"] for disk in found["disks"]] == ["web"]
    assert [left["path"] for left in found["left_out"]] == [str(tmp_path / "bad.vmdk")]


def test_info_prints_lines_for_other_programs(tmp_path: Path, capsys: Output) -> None:
    make_disk(tmp_path, b"web")
    (tmp_path / "bad.vmdk").write_text("bad")
    assert main(["info", str(tmp_path), "-o", "ro,_netdev"]) == 0
    heading, row, left = capsys.readouterr().out.splitlines()
    assert heading == "file\tcapacity\tallocated\tformat\tlink\tcid\tparent cid\textents"
    fields = row.split("\t")
    assert (fields[0], fields[1]) == ("web/chain/0.raw = disk.raw", "512 B")
    assert fields[3:5] == ["monolithicFlat", str(tmp_path / "web.vmdk")]
    assert fields[6:] == ["ffffffff", "FLAT"]
    assert left.startswith("left out: ")


def test_info_tells_of_hardware_tracking_and_state(tmp_path: Path, capsys: Output) -> None:
    more = (
        'changeTrackPath="web-ctk.vmdk"\nddb.adapterType = "lsi\x1blogic"\n'
        'ddb.virtualHWVersion = "14"\nddb.toolsVersion = "12352"\nddb.uuid = "60 00 c2"\n'
    )
    make_disk(tmp_path, b"web", more=more)
    assert main(["info", str(tmp_path)]) == 0
    _, _, hardware, tracking = capsys.readouterr().out.splitlines()
    assert hardware == (
        r"web: adapter lsi\x1blogic, hardware version 14, tools version 12352, uuid 60 00 c2"
    )
    assert tracking == f"{tmp_path / 'web.vmdk'}: changes are tracked in web-ctk.vmdk"


def test_info_prints_a_table_for_a_person(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_disk(tmp_path, b"web [old]")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "capacity" in out
    assert "web [old]/chain/0.raw = disk.raw" in out, "a file name is no markup"


@pytest.mark.parametrize("terminal", [False, True])
def test_info_shows_names_that_are_not_utf_8(
    terminal: bool, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_disk(tmp_path, b"caf\xe9")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["info", str(tmp_path)]) == 0
    assert "chain/0.raw" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [False, True])
def test_info_prints_names_safely(
    terminal: bool, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vm\x1b]"
    folder.mkdir()
    make_disk(folder, b"esc\x1b]0;x\x07\ttab", more='changeTrackPath="c"\nddb.uuid = "60"')
    (folder / "bad\x1b].vmdk").write_text("bad")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "900")
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "\x1b]" not in out, "which sets the terminal's title"
    assert "\x07" not in out
    assert r"esc\x1b]0;x\x07\ttab/chain/0.raw = disk.raw" in out
    assert r"vm\x1b]/esc\x1b]0;x\x07\ttab.vmdk" in out
    if not terminal:
        assert [line.count("\t") for line in out.splitlines()] == [7, 7, 0, 0, 0]
    assert main(["info", "--json", str(folder)]) == 0
    (disk,) = json.loads(capsys.readouterr().out)["disks"]
    assert disk["name"] == "esc\x1b]0;x\x07\ttab"


def test_info_counts_the_space_of_a_file_once(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "data").write_bytes(b"x" * 65536)
    lines = ['RW 8 FLAT "data" 0', "RW 8 ZERO", 'RW 64 FLAT "data" 64', 'RW 1 FLAT "other" 0']
    (tmp_path / "other").write_bytes(b"y" * 8192)
    text = "\n".join(["# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff", *lines])
    (tmp_path / "web.vmdk").write_text(text + '\ncreateType="custom"\n')
    assert main(["info", str(tmp_path / "web.vmdk")]) == 0
    told = capsys.readouterr().out.splitlines()[1].split("\t")[2]
    used = sum((tmp_path / name).stat().st_blocks * 512 for name in ("data", "other"))
    assert told == human(used)
    assert used > 65536


def test_info_tells_of_a_bad_option_before_it_looks(capsys: Output) -> None:
    assert main(["info", "/nowhere", "-o", "cachesize=4M"]) == 2
    assert "did you mean cache_size?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (200 * 1024**3, "200 GiB"),
        (62 * 1024**4, "62 TiB"),
        (5000 * 1024**4, "5000 TiB"),
    ],
)
def test_sizes_are_told_as_a_person_reads_them(count: int, expected: str) -> None:
    assert human(count) == expected


@pytest.mark.parametrize("name", ["web", "caf\udce9"])
def test_status_prints_what_the_daemon_says(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    found = json.loads(json.dumps(STATUS).replace('"web"', json.dumps(name)))
    monkeypatch.setattr(status, "ask", lambda mountpoint, command: found)
    assert main(["status", "/mnt/web"]) == 0
    out = capsys.readouterr().out
    for text in ("4 KiB of 256 MiB", "pid 77", "oldest 3.2 s", "torn grain", "careful", "1 GiB"):
        assert text in out
    assert main(["status", "--json", "/mnt/web"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_status_prints_the_metrics(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    text = '# HELP x y\nx{disk="a"} 1.0\n'
    answers = {"metrics": {"metrics": text}}
    monkeypatch.setattr(status, "ask", lambda mountpoint, command: answers[command])
    assert main(["status", "/mnt/web", "--metrics"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        (["/mnt/web", "--watch"], 1.0),
        (["--watch", "/mnt/web"], 1.0),
        (["--watch", "0.5", "/mnt/web"], 0.5),
        (["--watch=7", "/mnt/web"], 7.0),
        (["/mnt/web", "--watch", "3600"], 3600.0),
    ],
)
def test_watch_may_have_its_seconds_or_not(
    words: list[str], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, float]] = []
    monkeypatch.setattr(
        status, "watch", lambda place, every, look: called.append((place, every)) or 0
    )
    assert main(["status", *words]) == 0
    assert called == [("/mnt/web", seconds)]


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "1e9", "soon"])
def test_watch_takes_no_other_seconds(seconds: str, capsys: Output) -> None:
    assert main(["status", "/mnt/web", f"--watch={seconds}"]) == 2
    assert "0.1 to 3600 seconds" in capsys.readouterr().err


def test_status_tells_a_refusal(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr(status, "ask", lambda mountpoint, command: {"error": "an unknown command"})
    assert main(["status", "/mnt/web"]) == 30
    assert "/mnt/web: the daemon refused" in capsys.readouterr().err


def test_umount_of_what_is_no_mount_of_ours_is_refused(tmp_path: Path, capsys: Output) -> None:
    assert main(["umount", str(tmp_path)]) == 30
    assert main(["umount", "/proc"]) == 30
    assert capsys.readouterr().err.count("no vddkfs mount there") == 2


def test_mount_looks_at_options_and_mount_point_before_the_source(
    tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "x").write_text("x")
    assert main(["mount", "/nowhere", str(tmp_path), "-o", "dance"]) == 2
    assert main(["mount", "/nowhere", str(tmp_path)]) == BadMountpoint.exit_code
    assert "the folder is not empty" in capsys.readouterr().err
