"""What the library says: through callbacks, behind the client's back, and into its own file."""

import base64
import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.simulator.client import PASSWORD, USER, Client
from tests.simulator.kit import Kit, packets


def _session(client: Client) -> dict[str, str]:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        disk.read(0, 1)
        disk.info()
    return {level: client.text(level) for level in ("log", "warn", "panic")}


def test_it_is_quiet_unless_told_otherwise(kit: Kit) -> None:
    process = kit.client(_session)
    said = process.result()
    assert process.stdout == process.stderr == ""
    assert said["panic"] == said["warn"] == ""
    assert PASSWORD not in said["log"]


@pytest.mark.parametrize(
    ("lines", "out", "err"),
    [
        (("chatter.stdout = yes",), True, False),
        (("chatter.stderr = yes",), False, True),
        (("chatter.stdout = yes", "chatter.stderr = yes"), True, True),
    ],
)
def test_lines_on_stdout_and_stderr(kit: Kit, lines: tuple[str, ...], out: bool, err: bool) -> None:
    kit.configure(*lines)
    process = kit.client(_session)
    process.result()
    assert bool(process.stdout) is out
    assert bool(process.stderr) is err
    for text in (process.stdout, process.stderr):
        assert all("VixDiskLib" in line for line in text.splitlines())
        assert not text or text.endswith("\n")
    assert "Read" in process.stdout + process.stderr


def _written(kit: Kit) -> list[bytes]:
    """Return what a client wrote, one item a write(2)."""
    found = []
    with packets() as (reader, writer):
        process = kit.client(_session, output=writer)
        os.close(writer)
        while part := os.read(reader, 65536):
            found.append(part)
        process.result()
    return found


def test_lines_may_be_split_across_writes(kit: Kit) -> None:
    kit.configure("chatter.stderr = yes")
    parts = _written(kit)
    assert parts
    assert all(part.endswith(b"\n") for part in parts)
    kit.configure("chatter.stderr = yes", "chatter.split = yes")
    parts = _written(kit)
    assert any(not part.endswith(b"\n") for part in parts)
    lines = b"".join(parts).splitlines()
    assert all(line.startswith(b"VixDiskLib") for line in lines)


def test_chatter_at_every_so_many_calls(kit: Kit) -> None:
    kit.configure("chatter.stderr = yes")
    process = kit.client(_session)
    process.result()
    often = len(process.stderr.splitlines())
    kit.configure("chatter.stderr = yes", "chatter.every = 3")
    process = kit.client(_session)
    process.result()
    assert 0 < len(process.stderr.splitlines()) < often


def test_log_lines_come_at_all_levels(kit: Kit) -> None:
    kit.configure("chatter.log = yes")
    config = kit.config("vixDiskLib.transport.LogLevel=6")
    said = kit.run(_session, config=config)
    levels = {level for text in said.values() for level in re.findall(r"level (\d)", text)}
    assert levels == set("0123456")
    assert re.search(r"level 0\b", said["panic"])
    assert re.search(r"level [12]\b", said["warn"])
    assert "100.0% done" in said["log"], "a format with arguments of several kinds"


@pytest.mark.parametrize(("level", "more"), [(0, False), (6, True)])
def test_the_level_is_the_client_s(kit: Kit, level: int, more: bool) -> None:
    usual = kit.run(_session)["log"]
    said = kit.run(_session, config=kit.config(f"vixDiskLib.transport.LogLevel={level}"))["log"]
    assert (len(said) > len(usual)) is more


FORMS = {"clear", "URL-encoded", "URL-encoded throughout", "base64"}


def leaks(text: str) -> set[str]:
    """Say in which forms the password is in a text."""
    found = set()
    if PASSWORD in text:
        found.add("clear")
    if quote(PASSWORD, safe="") in text:
        found.add("URL-encoded")
    if "".join(f"%{byte:02X}" for byte in PASSWORD.encode()) in text:
        found.add("URL-encoded throughout")
    for secret in (PASSWORD, f"{USER}:{PASSWORD}"):
        if base64.b64encode(secret.encode()).decode() in text:
            found.add("base64")
    return found


def test_secrets_leak_in_every_form(kit: Kit) -> None:
    kit.configure("chatter.secrets = yes", "chatter.stdout = yes", "chatter.stderr = yes")
    process = kit.client(_session)
    said = process.result()
    assert leaks("\n".join(said.values())) == FORMS
    assert "clear" in leaks(process.stdout)
    assert "clear" in leaks(process.stderr)


def _session_by_cookie(client: Client) -> str:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17", cookie="52-ab cookie"):
        return client.text()


def test_a_cookie_is_a_secret_and_no_user_name(kit: Kit) -> None:
    kit.configure("chatter.secrets = yes")
    said = kit.run(_session_by_cookie)
    assert f"user name {USER}, password 52-ab cookie" in said  # of ConnectEx
    assert f"user name {USER}, password {PASSWORD}" in said  # of Open
    assert "user name 52-ab" not in said


def test_secrets_are_never_in_the_simulator_s_own_log(kit: Kit) -> None:
    kit.configure("chatter.secrets = yes")
    kit.run(_session)
    assert not leaks((kit.site / ".sim" / "events.log").read_text())
    assert kit.events()


def test_the_phone_home_complains_as_a_warning(kit: Kit) -> None:
    kit.configure("chatter.phone_home = yes")
    said = kit.run(_session)
    assert "Get CEIP status failed" in said["warn"]
    assert "VDDK_PhoneHome:" in said["warn"]


def _silent_init(client: Client, path: str) -> int:
    client.init(path, logs=False)
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        disk.read(0, 1)
    return os.getpid()


def test_without_callbacks_it_writes_a_file_of_its_own(kit: Kit, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    kit.configure_kit(f'log_directory = "{logs}"')
    pid = kit.run(_silent_init, init=False, path=kit.config())
    text = (logs / f"vixDiskLib-{pid}.log").read_text()
    assert "Release build-" in text
    assert "plain.vmdk" in text
    assert PASSWORD not in text


def test_that_file_is_in_the_user_s_folder(kit: Kit, tmp_path: Path) -> None:
    kit.environment["USER"] = f"vixsim-{os.getpid()}"
    folder = Path(f"/tmp/vmware-{kit.environment['USER']}")
    try:
        pid = kit.run(_silent_init, init=False, path=kit.config())
        assert (folder / f"vixDiskLib-{pid}.log").read_text()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_client_may_name_that_file(kit: Kit, tmp_path: Path) -> None:
    log = tmp_path / "own.log"
    config = kit.config(f'log.fileName="{log}"')
    process = kit.client(_silent_init, init=False, path=config)
    process.result()
    assert "Release build-" in log.read_text()
    assert process.stdout == process.stderr == ""


def _failing(client: Client) -> Any:
    connection = client.connect(vm="vm-17")
    client.outcome(client.open, connection, "[ds1] plain/%s%n%d.vmdk")
    return client.text("warn")


def test_names_are_not_formats(kit: Kit) -> None:
    assert "%s%n%d.vmdk" in kit.run(_failing)
