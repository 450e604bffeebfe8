"""The manual page, the README and the package tell the same."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vddkfs.cli import COMMANDS
from vddkfs.errors import ALL_ERRORS
from vddkfs.options import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
MAN = ROOT / "contrib" / "man"
PAGE = MAN / "vddkfs.8"
GENERATE = [sys.executable, str(MAN / "generate")]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"LC_ALL": "C.UTF-8", "MANWIDTH": "100", "MANPAGER": "cat"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def need(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")


def plain(page: str) -> str:
    """Return the page's text without font changes and the escapes that the generator uses."""
    page = re.sub(r"\\f[BIR]|\\&", "", page)
    return page.replace(r"\-", "-").replace(r"\e", "\\")


def section(name: str) -> str:
    found = re.search(rf"^\.SH {name}$(.*?)(?=^\.SH |\Z)", PAGE.read_text("utf-8"), re.M | re.S)
    assert found, name
    return found[1]


def test_page_is_up_to_date() -> None:
    checked = run(*GENERATE, "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def copied(folder: Path) -> Path:
    """Copy the generator and what it reads and writes, to be changed by a test."""
    for name in ("generate", "vddkfs.8.in", "vddkfs.8"):
        shutil.copy(MAN / name, folder)
    return folder / "vddkfs.8.in"


def test_check_notices_a_change(tmp_path: Path) -> None:
    template = copied(tmp_path)
    template.write_text(template.read_text("utf-8").replace("FUSE file system", "file system"))
    checked = run(sys.executable, tmp_path / "generate", "--check", cwd=tmp_path)
    assert checked.returncode == 1
    assert "out of date" in checked.stdout
    assert (tmp_path / "vddkfs.8").read_bytes() == PAGE.read_bytes()
    assert run(sys.executable, tmp_path / "generate", cwd=tmp_path).returncode == 0
    assert run(sys.executable, tmp_path / "generate", "--check", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("@COMMAND status@", "", "has no line @COMMAND status@"),
        ("@COMMAND status@", "@COMMAND stat@", "@COMMAND stat"),
        ("@OPTIONS@", "@OPTION@", "unknown: @OPTION@"),
    ],
)
def test_template_must_fit_the_package(tmp_path: Path, old: str, new: str, told: str) -> None:
    template = copied(tmp_path)
    template.write_text(template.read_text("utf-8").replace(old, new))
    made = run(sys.executable, tmp_path / "generate", cwd=tmp_path)
    assert made.returncode == 1
    assert told in made.stderr
    assert (tmp_path / "vddkfs.8").read_bytes() == PAGE.read_bytes()


@pytest.mark.parametrize("width", ["60", "80", "120"])
def test_groff_has_nothing_to_say(width: str) -> None:
    need("groff")
    made = run("groff", "-man", "-Tutf8", "-P-cbou", "-ww", f"-rLL={width}n", PAGE)
    assert (made.returncode, made.stderr) == (0, "")
    assert "SEMANTICS" in made.stdout


def test_man_has_nothing_to_say() -> None:
    need("man")
    if run("man", "--version").returncode != 0:
        pytest.skip("this man shows no pages")
    made = run("man", "--warnings", "-l", PAGE)
    assert (made.returncode, made.stderr) == (0, "")


def test_link_page() -> None:
    assert (MAN / "mount.vddkfs.8").read_text("utf-8") == ".so man8/vddkfs.8\n"


def test_sections() -> None:
    found = re.findall(r"^\.SH (.*)$", PAGE.read_text("utf-8"), re.M)
    assert found == [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "COMMANDS",
        "MOUNT OPTIONS",
        "TREE",
        "SEMANTICS",
        "REMOTE DISKS",
        "WORKERS AND FAILURES",
        "SIGNALS",
        "FILES",
        "EXIT STATUS",
        "EXAMPLES",
        "LIMITS",
        "SEE ALSO",
    ]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option(option: object) -> None:
    name, metavar, meaning = (getattr(option, key) for key in ("name", "metavar", "meaning"))
    head = f"{name}={metavar}" if metavar else name
    assert f".TP\n{head}\n{meaning}\n" in plain(section("MOUNT OPTIONS"))


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
def test_every_exit_code(kind: type[Exception]) -> None:
    code, text = getattr(kind, "exit_code", 0), str(kind.__doc__)
    text_there = plain(section("EXIT STATUS"))
    assert f".TP\n{code}\n{text[:1].upper()}{text[1:]}.\n" in text_there
    assert f"| {code} | {text} |\n" in README


def test_readme_has_no_other_exit_codes() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.M)}
    assert listed == {0, 1} | {kind.exit_code for kind in ALL_ERRORS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command(name: str) -> None:
    assert f".SS {name}\nvddkfs {name} " in plain(section("COMMANDS"))
    assert f"vddkfs {name} " in plain(section("SYNOPSIS"))
    assert f"vddkfs {name} " in README


def test_promises_have_a_name_and_are_one_sentence_each() -> None:
    page = (MAN / "vddkfs-semantics.7").read_text("utf-8")
    promises = re.findall(r"^\.TP\n\.B (\S+)\n(.*?)(?=^\.TP|^\.S[SH]|\Z)", page, re.M | re.S)
    names = [plain(name) for name, _ in promises]
    assert len(names) > 20
    assert len(names) == len(set(names)) == page.count("\n.TP\n")
    for name, text in promises:
        words = plain(text).strip()
        assert words.endswith("."), name
        assert not re.search(r"\.\n[A-Z]|\. [A-Z]", words), name


def test_readme_names_files_that_exist() -> None:
    named = set(re.findall(r"`?((?:contrib|\.ci|tests)/[\w./-]+\w)", README))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    rooms = set(re.findall(r"`((?:commands|fuse|disks|cache|engines|observe)/[\w./]*)`", README))
    assert rooms
    assert [name for name in sorted(rooms) if not (ROOT / "vddkfs" / name).exists()] == []
