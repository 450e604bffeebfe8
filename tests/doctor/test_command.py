"""``vddkfs doctor`` as a whole."""

import json
import socket
from pathlib import Path

import pytest

from tests.doctor.conftest import WriteCredentials
from tests.simulator.kit import Kit
from tests.test_source import make_disk
from vddkfs.cli import main
from vddkfs.doctor import examination, library, machine
from vddkfs.engines.vddk import kit as kits
from vddkfs.errors import ChecksFailed

Output = pytest.CaptureFixture[str]
LEVELS = {"ok", "warning", "failure"}
SECRET = "S3cr3t-probe"
pytestmark = pytest.mark.usefixtures("state")


@pytest.fixture
def no_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kits, "PLACES", (str(tmp_path / "none"),))


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that can mount, whatever this one can."""
    monkeypatch.setattr(machine, "_fuse", lambda: ("", ""))


def lines(out: str) -> dict[str, tuple[str, str, str]]:
    rows = [line.split("\t") for line in out.splitlines()]
    assert all(len(row) == 4 and row[0] in LEVELS for row in rows)
    assert all(row[3] or row[0] == "ok" for row in rows)
    return {row[1]: (row[0], row[2], row[3]) for row in rows}


@pytest.mark.usefixtures("no_kit", "fuse")
def test_without_vddk_it_says_what_to_get_and_what_works(capsys: Output, state: Path) -> None:
    assert main(["doctor"]) == 0
    rows = lines(capsys.readouterr().out)
    assert rows["VDDK"][0] == "warning"
    assert "libdir=" in rows["VDDK"][2]
    assert "local VMDKs can be mounted now" in rows["built-in engine"][1]
    assert list((state / "vddk").iterdir()) == []


@pytest.mark.usefixtures("no_kit", "fuse")
@pytest.mark.parametrize("words", [["vddk:///none.vmdk"], ["-o", "libdir=/none"]])
def test_without_vddk_what_needs_it_fails(words: list[str], capsys: Output) -> None:
    assert main(["doctor", *words]) == ChecksFailed.exit_code
    out, err = capsys.readouterr()
    assert lines(out)["VDDK"][0] == "failure"
    assert err.startswith("vddkfs: failed: VDDK")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_kit", "fuse")
def test_a_local_source(tmp_path: Path, capsys: Output) -> None:
    make_disk(tmp_path, b"web")
    assert main(["doctor", str(tmp_path)]) == 0
    assert lines(capsys.readouterr().out)["SOURCE"][0] == "ok"
    assert main(["doctor", str(tmp_path / "none")]) == ChecksFailed.exit_code
    assert lines(capsys.readouterr().out)["SOURCE"][0] == "failure"


@pytest.mark.usefixtures("no_kit", "fuse")
def test_json(capsys: Output) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["result"] == "warning"
    assert {"level", "what", "finding", "remedy"} == set(found["checks"][0])
    assert "probe" not in found


@pytest.mark.usefixtures("no_kit", "fuse")
def test_on_a_terminal_it_is_a_table(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "remedy" in out
    assert "\t" not in out


def test_a_machine_that_cannot_mount(
    no_kit: None, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_fuse", lambda: ("/dev/fuse is missing", "load it"))
    assert main(["doctor"]) == ChecksFailed.exit_code
    rows = lines(capsys.readouterr().out)
    assert rows["/dev/fuse"] == ("failure", "/dev/fuse is missing", "load it")
    assert rows["built-in engine"][0] == "warning"


@pytest.mark.usefixtures("no_kit")
def test_no_check_ends_the_command(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(machine, "look", break_down)
    monkeypatch.setattr(library, "look", break_down)
    monkeypatch.setattr(examination.transports, "look", break_down)
    assert main(["doctor"]) == 0
    rows = lines(capsys.readouterr().out)
    for what in ("machine", "VDDK", "transports"):
        assert rows[what][0] == "warning"
        assert "odd" in rows[what][1]


def test_a_server_and_the_probe(
    kit: Kit,
    credentials: WriteCredentials,
    capsys: Output,
    monkeypatch: pytest.MonkeyPatch,
    state: Path,
) -> None:
    monkeypatch.setattr(machine, "_fuse", lambda: ("", ""))
    kit.configure("chatter.secrets = yes", "chatter.log = yes", "chatter.stdout = yes")

    def resolve(name: str, *_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    source = "vddk://vcenter:1/?moref=vm-16&disk=[ds1] web01/web01.vmdk@snapshot-1"
    # Port 1 takes no connections: the simulator has no network.
    words = ["-o", f"libdir={kit.path},nfc_port=1", "-o", f"credentials={credentials(SECRET)}"]
    assert main(["doctor", source, *words, "--probe", "--json"]) == ChecksFailed.exit_code
    out, err = capsys.readouterr()
    found = json.loads(out)
    rows = {row["what"]: row["level"] for row in found["checks"]}
    assert rows["DNS"] == rows["credentials"] == rows["VDDK"] == rows["SOURCE"] == "ok"
    answers = {one["question"]: one for one in found["probe"]}
    assert answers["open"]["answers"]["transport"] == "nbdssl"
    assert "certificate" in err
    assert SECRET not in out + err
    assert not [one for one in (state / "vddk").iterdir() if one.name.startswith("doctor")]


def test_the_probe_needs_a_library(no_kit: None, fuse: None, capsys: Output) -> None:
    assert main(["doctor", "--probe"]) == 0
    assert lines(capsys.readouterr().out)["probe"][0] == "warning"
