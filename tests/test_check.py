"""The command ``vddkfs check``: what it prints, and how it ends."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vmdk.conftest import Maker
from vddkfs.cli import main
from vddkfs.engines.vmdk import check as walk
from vddkfs.engines.vmdk.check import Event, Finding, Progress

Output = pytest.CaptureFixture[str]

CAPACITY = 512 * 128


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A sound disk of one link."""
    return Path(Maker(tmp_path).sparse("web[1].vmdk", CAPACITY, {0: b"x" * 65536}))


def damage(disk: Path, number: int = 9) -> None:
    with open(disk, "r+b") as file:
        file.seek(22 * 512 + number * 4)
        file.write(struct.pack("<I", 7))


def run(capsys: Output, *words: str | Path) -> tuple[int, str, str]:
    code = main(["check", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_sound_disk(disk: Path, capsys: Output) -> None:
    assert run(capsys, disk) == (0, "web[1]: 1 link, 0 damage, 0 warnings\n", "")
    assert run(capsys, disk.parent) == (0, "web[1]: 1 link, 0 damage, 0 warnings\n", "")


def test_damage_is_a_line_and_a_code(disk: Path, capsys: Output) -> None:
    damage(disk)
    code, out, err = run(capsys, disk)
    assert code == 43
    finding, summary = out.splitlines()
    assert finding.split("\t") == [
        "damage",
        str(disk),
        str(disk),
        "1152-1279",
        "the grain is said to be at sector 7, where the file's header is",
    ]
    assert summary == "web[1]: 1 link, 1 damage, 0 warnings"
    assert err.startswith("vddkfs: damage was found: 1 finding; ")
    assert err.count("\n") == 1


def test_a_warning_is_no_damage(disk: Path, capsys: Output) -> None:
    with open(disk, "ab") as file:
        file.write(b"x" * 99999)
    code, out, err = run(capsys, disk)
    assert (code, err) == (0, "")
    assert out.startswith(f"warning\t{disk}\t{disk}\t\t")
    assert out.endswith("web[1]: 1 link, 0 damage, 1 warning\n")


def test_what_was_not_checked_is_no_success(tmp_path: Path, capsys: Output) -> None:
    path = Maker(tmp_path).flat("a", b"x" * 4096, more='encryption.keySafe = "vmware:key"')
    code, out, err = run(capsys, path)
    assert code == 12
    assert out.startswith("unchecked\t")
    assert out.endswith("a: 1 link, 0 damage, 0 warnings, 1 not checked\n")
    assert "was not checked: the disk is encrypted" in err
    Maker(tmp_path).text("b.vmdk", ['RW 8 FLAT "b-flat.vmdk"'])
    assert run(capsys, tmp_path)[0] == 43


def test_options_say_what_is_trusted(disk: Path, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "sub").mkdir()
    hint = f"../{disk.name}"
    child = Maker(tmp_path / "sub").sparse("b.vmdk", CAPACITY, {}, parent="12345678", hint=hint)
    code, _, err = run(capsys, child)
    assert code == 14
    assert "outside its folder" in err
    assert run(capsys, child, "-o", "follow_parents=any")[0] == 0


@pytest.mark.parametrize(
    ("source", "code"),
    [("none", 10), ("vddk://vc/?moref=vm-1", 12), ("https://x/y.vmdk", 12), ("text.vmdk", 11)],
)
def test_what_cannot_be_checked(source: str, code: int, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "text.vmdk").write_text("no disk\n")
    found, out, err = run(capsys, source if ":" in source else tmp_path / source)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert ";" in err, "with advice"


def test_json(disk: Path, capsys: Output) -> None:
    damage(disk)
    (disk.parent / "stray-flat.vmdk").write_bytes(b"x" * 512)
    code, out, _ = run(capsys, "--json", disk.parent)
    assert code == 43
    found = json.loads(out)
    assert found["source"] == str(disk.parent)
    assert found["result"] == "damage"
    (chain,) = found["chains"]
    assert {key: chain[key] for key in ("name", "links", "damage", "warnings", "unchecked")} == {
        "name": "web[1]",
        "links": 1,
        "damage": 1,
        "warnings": 0,
        "unchecked": 0,
    }
    assert chain["findings"] == [
        {
            "level": "damage",
            "code": "grain-place",
            "link": str(disk),
            "file": str(disk),
            "what": "the grain is said to be at sector 7, where the file's header is",
            "sector": 1152,
            "sectors": 128,
        }
    ]
    (other,) = found["other_findings"]
    assert (other["level"], other["code"]) == ("warning", "stray")
    assert "sector" not in other


@pytest.mark.parametrize(
    ("levels", "result", "code"),
    [
        ([], "ok", 0),
        (["warning"], "warning", 0),
        (["warning", "unchecked"], "unchecked", 12),
        (["unchecked", "damage", "warning"], "damage", 43),
    ],
)
def test_the_result_is_the_worst(
    levels: list[Any], result: str, code: int, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked(*_: object) -> Iterator[Event]:
        for level in levels:
            yield Finding(level, "x", "a", "a", "bad", exit_code=12 * (level == "unchecked"))

    monkeypatch.setattr(walk, "check_source", checked)
    found, out, _ = run(capsys, "--json", "/a")
    assert (found, json.loads(out)["result"]) == (code, result)


def test_names_from_anywhere_are_safe(tmp_path: Path, capsys: Output) -> None:
    Maker(tmp_path).sparse("a\x1b[31m\n.vmdk", CAPACITY, {0: 7})
    _, out, _ = run(capsys, tmp_path)
    assert out.count("\n") == 2
    assert "\x1b" not in out
    assert json.loads(run(capsys, "--json", tmp_path)[1])["chains"][0]["name"] == "a\\x1b[31m\\n"


def test_ctrl_c(disk: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[Event]:
        yield Progress("a", "a", 1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(walk, "check_source", interrupted)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(capsys, disk)[0] == 130


def on_terminal(*words: str | Path) -> tuple[int, str, str]:
    """Run the command with a terminal as stdout and another as stderr; return what these got."""
    masters, slaves = zip(os.openpty(), os.openpty(), strict=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "vddkfs", "check", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=slaves[0],
        stderr=slaves[1],
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200", "NO_COLOR": ""},
    )
    code = process.wait(60)
    texts = []
    for master, slave in zip(masters, slaves, strict=True):
        os.close(slave)
        texts.append(_drained(master))
        os.close(master)
    return code, texts[0], texts[1]


def _drained(master: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts).decode()


def test_on_a_terminal(disk: Path) -> None:
    """Findings are for people there; a bar is on stderr, unless --quiet."""
    damage(disk)
    code, out, err = on_terminal(disk)
    assert code == 43
    assert "web[1].vmdk, sectors 1152 to 1279 of the image: the grain is said" in out
    assert "\t" not in out
    assert "\x1b[31mdamage" in out
    assert "web[1].vmdk" in err.split("vddkfs: ")[0]
    code, _, err = on_terminal("--quiet", disk)
    assert code == 43
    assert err.startswith("vddkfs: ")
