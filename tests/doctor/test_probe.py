"""The probe: what the simulator answers, and what becomes of a library that crashes or hangs."""

import json
import os
from pathlib import Path

import pytest

from tests.doctor.conftest import WriteCredentials
from tests.simulator.kit import Kit, Kits
from vddkfs.doctor import probe
from vddkfs.doctor.probe import Answer, ask, ask_all, configure, judge
from vddkfs.doctor.questions import QUESTIONS
from vddkfs.engines.vddk.layouts import VIX_ASYNC
from vddkfs.options import MountOptions
from vddkfs.remote import Remote, parse_remote

CHAIN = "disk=[ds1] web01/web01.vmdk@snapshot-1"
SECRET = "S3cr3t-probe"


def remote(disk: str = CHAIN) -> Remote:
    return parse_remote(f"vddk://vcenter/?moref=vm-16&{disk}")


def by_name(answers: list[Answer]) -> dict[str, Answer]:
    return {answer.question: answer for answer in answers}


def test_the_library_alone(bare: Kit, tmp_path: Path) -> None:
    rows, answers = ask_all(MountOptions(libdir=str(bare.path)), None, tmp_path, -1)
    found = by_name(answers)
    assert set(found) == {name for name, one in QUESTIONS.items() if not one.needs_disk}
    assert {row.level for row in rows} == {"ok"}
    assert {answer.ended for answer in answers} == {"exit 0"}
    functions = found["functions"].answers
    assert (functions["absent"], functions["info_bytes"]) == ([], 64)
    assert found["init-9.0"].answers["init"] != 0
    assert found["init-8.0"].answers == {"init": 0}
    assert "nbdssl" in found["transports"].answers["transports"]
    assert found["transports"].answers["build"] == "20000080"
    assert found["texts"].answers["0"]
    assert list(tmp_path.glob("tmp*")) == []


def test_an_older_library(kits: Kits, tmp_path: Path) -> None:
    kit = kits("6.5", host=False)
    config = configure(MountOptions(libdir=str(kit.path)), None)
    answer = ask("functions", QUESTIONS["functions"], config, tmp_path, -1)
    assert "QueryAllocatedBlocks" in answer.answers["absent"]
    assert answer.answers["connect_params_bytes"] == 80
    assert answer.answers["info_bytes"] == 56


def test_a_disk_of_a_server(kit: Kit, tmp_path: Path, credentials: WriteCredentials) -> None:
    options = MountOptions(libdir=str(kit.path), transports=("hotadd", "nbdssl"))
    with open(credentials(SECRET), "rb") as secret:
        rows, answers = ask_all(options, remote(), tmp_path, secret.fileno())
    assert {row.level for row in rows} == {"ok"}, [row for row in rows if row.level != "ok"]
    found = by_name(answers)
    assert set(found) == set(QUESTIONS)
    opened = found["open"].answers
    assert (opened["transport"], opened["links"], opened["read_first_sector"]) == ("nbdssl", 1, 0)
    assert opened["metadata_keys"]
    assert found["read-async"].answers["returned"] == VIX_ASYNC
    assert found["read-async"].answers["inside_the_call"] is False
    assert found["past-the-end"].answers["last_sector"] == 0
    assert found["past-the-end"].answers["at_the_end"] == 16007
    assert found["allocated"].answers["unaligned_start"] == 3
    assert not kit.events("attach")


def test_a_local_file(bare: Kit, tmp_path: Path) -> None:
    path = bare.disk("[ds1] web01/web01.vmdk")
    options = MountOptions(libdir=str(bare.path))
    rows, answers = ask_all(options, parse_remote(f"vddk://{path}"), tmp_path, -1)
    assert {row.level for row in rows} == {"ok"}, [row for row in rows if row.level != "ok"]
    assert by_name(answers)["read-async"].answers["inside_the_call"] is True


@pytest.mark.parametrize(("fault", "ended"), [("segv", "signal 11"), ("hang", "time-out")])
def test_a_crash_or_a_hang_is_an_answer(bare: Kit, tmp_path: Path, fault: str, ended: str) -> None:
    bare.configure_kit(f"fault = Close {fault}")
    remote = parse_remote(f"vddk://{bare.disk('[ds1] web01/web01.vmdk')}")
    config = configure(MountOptions(libdir=str(bare.path)), remote)
    answer = ask("past-the-end", QUESTIONS["past-the-end"], config, tmp_path, -1, seconds=3)
    assert answer.ended == ended
    # What was answered before is not lost.
    assert answer.answers["at_the_end"] == 16007
    row = judge(answer)
    assert row.level == "warning"
    assert ended in row.finding
    assert "at_the_end=16007" in row.finding
    assert row.remedy


def test_one_login_that_fails_is_enough(
    kit: Kit, tmp_path: Path, credentials: WriteCredentials
) -> None:
    kit.configure("password = another", "chatter.secrets = yes", "chatter.log = yes")
    with open(credentials(SECRET), "rb") as secret:
        options = MountOptions(libdir=str(kit.path))
        rows, answers = ask_all(options, remote(), tmp_path, secret.fileno())
    found = by_name(answers)
    assert found["open"].answers["code"] == 35
    assert [row.level for row in rows if row.level != "ok"] == ["failure"]
    assert "password" in rows[-1].remedy
    assert "read-async" not in found
    assert SECRET not in repr((rows, answers))


def test_without_credentials_no_login_is_tried(kit: Kit, tmp_path: Path) -> None:
    rows, answers = ask_all(MountOptions(libdir=str(kit.path)), remote(), tmp_path, -1)
    assert "credentials" in rows[0].finding
    assert not any(QUESTIONS[answer.question].needs_disk for answer in answers)


def test_credentials_that_are_none(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.memfd_create("credentials")
    os.write(fd, SECRET.encode())
    config = configure(MountOptions(libdir=str(kit.path)), remote())
    answer = ask("open", QUESTIONS["open"], config, tmp_path, fd)
    os.close(fd)
    assert "line 1" in answer.answers["error"]
    assert SECRET not in json.dumps(answer.answers)
    assert judge(answer).level == "failure"


def test_a_bug_of_ours_is_seen(tmp_path: Path) -> None:
    config = configure(MountOptions(libdir="/none"), None)
    answer = ask("no such question", QUESTIONS["open"], config, tmp_path, -1)
    assert answer.ended == "exit 70"
    assert "KeyError" in answer.said[-1]
    answer = ask("functions", QUESTIONS["functions"], config, tmp_path, -1)
    assert "libdir=/none" in answer.answers["error"]
    assert judge(answer).level == "warning"


def test_what_a_dead_process_wrote_last_may_be_broken() -> None:
    assert probe._answers(b'{"a": 1}\n[2]\n{"b"') == {"a": 1}


def test_answers_are_words() -> None:
    answer = Answer("x", "what?", {"a": True, "b": [1, 2], "c": [], "d": "e"}, "exit 0", 1.0, [])
    assert judge(answer).finding == "a=yes, b=1 2, c=none, d=e"
    answer = Answer("open", "what?", {}, "signal 6", 1.0, ["a mistake"])
    assert judge(answer).level == "failure"
    assert "a mistake" in judge(answer).finding
