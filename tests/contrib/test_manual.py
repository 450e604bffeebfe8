"""The manual page, the README and the package tell the same."""

import ast
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
        "WRITING",
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
    # What is between backquotes is bold in the page.
    meaning = meaning.replace("`", "")
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


def promises() -> dict[str, str]:
    """Return the promises of the page on semantics: names, and what they say."""
    page = (MAN / "vddkfs-semantics.7").read_text("utf-8")
    found = re.findall(r"^\.TP\n\.B (\S+)\n(.*?)(?=^\.TP|^\.S[SH]|\Z)", page, re.M | re.S)
    assert len(found) == page.count("\n.TP\n")
    assert len(found) == len({name for name, _ in found})
    return {plain(name): " ".join(plain(text).split()) for name, text in found}


def test_promises_have_a_name_and_are_one_sentence_each() -> None:
    assert len(promises()) > 20
    for name, text in promises().items():
        assert text.endswith("."), name
        assert not re.search(r"\. [A-Z]", text), name


def pinned(module: str) -> set[tuple[str, str]]:
    """Return the promises that tests of *module* hold: the arguments of ``@promise`` above them."""
    found = set()
    for test in ast.parse(module).body:
        for mark in test.decorator_list if isinstance(test, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "promise":
                name, sentence = (ast.literal_eval(argument) for argument in mark.args)
                assert f"{test.name}_".startswith(f"test_{name.replace('-', '_')}_")
                found.add((name, sentence))
    return found


def test_promises_are_those_that_tests_hold() -> None:
    modules = sorted((ROOT / "tests" / "end_to_end").glob("test_semantics*.py"))
    held = set().union(*(pinned(module.read_text("utf-8")) for module in modules))
    assert held == set(promises().items())


def test_a_promise_is_only_held_by_a_test_of_its_name() -> None:
    module = '@promise("one-file", "It is " "one.")\ndef test_one_file_there() -> None: ...\n'
    assert pinned(module) == {("one-file", "It is one.")}
    with pytest.raises(AssertionError):
        pinned(module.replace("test_one", "test_a"))


def test_readme_names_files_that_exist() -> None:
    named = set(re.findall(r"`?((?:contrib|\.ci|tests)/[\w./-]+\w)", README))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    rooms = set(re.findall(r"`((?:commands|fuse|disks|cache|engines|observe)/[\w./]*)`", README))
    assert rooms
    assert [name for name in sorted(rooms) if not (ROOT / "vddkfs" / name).exists()] == []
