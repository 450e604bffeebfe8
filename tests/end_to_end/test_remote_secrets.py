"""K07: the library prints the password in every disguise that it knows, and nobody else has it."""

import base64
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from tests.end_to_end.mounting import children, vddkfs
from tests.end_to_end.remote import CHAIN, MIB, PASSWORD, Proxy, RemoteMount
from tests.simulator.client import Client
from vddkfs.state import state_folder

LOGINS = 10
SECRETS = ("secrets", "stdout", "stderr", "log", "split")
COOKIE = "52f1a9c0-cookie=+/"


def disguises(secret: str) -> list[bytes]:
    """Return all forms of a secret that the simulator prints, and a few more."""
    found = {secret, quote(secret, safe=""), secret.encode().hex()}
    every = "".join(f"%{byte:02X}" for byte in secret.encode())
    found |= {every, every.lower()}
    for text in (secret, f"operator:{secret}"):
        found.add(base64.b64encode(text.encode()).decode().rstrip("="))
    raw = [word.encode() for word in found]
    return [*raw, secret.encode("utf-16-le")]


def forms(text: str, secret: str) -> set[str]:
    """Say in which forms a secret is in a text."""
    found = {"clear"} if secret in text else set()
    for word in re.split(r"[\s@:]", text):
        if "%" in word and unquote(word) == secret:
            found.add("URL")
    for name, plain in (("base64", secret), ("base64 pair", f"operator:{secret}")):
        if base64.b64encode(plain.encode()).decode() in text:
            found.add(name)
    return found


def _login(client: Client, secret: str) -> str:
    client.connect(vm="vm-20", snapshot="snapshot-8", user="operator", password=secret)
    return "\n".join(client.text(level) for level in ("log", "warn", "panic"))


def printed(proxy: Proxy) -> None:
    """Check that each login has the simulator print the password, by its own callbacks."""
    process = proxy.kit.client(_login, secret=PASSWORD)
    assert forms(process.result(), PASSWORD) == {"clear", "URL", "base64", "base64 pair"}
    assert PASSWORD in process.stdout
    assert PASSWORD in process.stderr


def processes(mount: RemoteMount) -> list[int]:
    return [mount.pid, *children(mount.pid)]


def places(mount: RemoteMount) -> Iterator[tuple[str, bytes]]:
    """Return everything that anybody could look into, by name."""
    yield "the log", mount.log.read_bytes()
    for name in (
        ".vddkfs/status.json",
        ".vddkfs/metrics",
        "vm.json",
        "big/info.json",
        "big/map.json",
    ):
        yield name, mount.content(name)
    done = vddkfs("status", "--json", mount.place)
    yield "vddkfs status", (done.stdout + done.stderr).encode()
    yield "the mount table", Path("/proc/self/mountinfo").read_bytes()
    for pid in processes(mount):
        for name in ("cmdline", "environ"):
            yield f"{name} of {pid}", Path(f"/proc/{pid}/{name}").read_bytes()
    for path in state_folder().rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()


def memory(pid: int) -> Iterator[bytes]:
    """Return what of a process's memory a core would hold: all that can be read."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            area, rights, *_ = line.split()
            if not rights.startswith("r") or line.endswith(("[vvar]", "[vsyscall]")):
                continue
            start, end = (int(word, 16) for word in area.split("-"))
            try:
                file.seek(start)
                yield file.read(end - start)
            except OSError:
                continue


def judge(mount: RemoteMount, secret: str) -> None:
    """Look everywhere for every form of a secret."""
    wanted = disguises(secret)
    for name, content in places(mount):
        assert not [form for form in wanted if form in content], name
    pieces = list(memory(mount.pid))
    assert sum(map(len, pieces)) > MIB
    # The daemon's memory can be searched at all: the name of the disk is there.
    assert any(b"[ds1] big/big.vmdk" in piece for piece in pieces)
    assert not [form for form in wanted for piece in pieces if form in piece]


def log_in_often(mount: RemoteMount, proxy: Proxy) -> None:
    """Have the idle disk closed and opened again ten times."""
    fd = mount.open("big/disk.raw", direct=True)
    for number in range(LOGINS):
        assert mount.ask("pread", fd, 4096, 4096 * number)
        logouts = len(proxy.kit.events("logout"))
        proxy.wait_for_more("logout", logouts)


def test_k07_secrets(proxy: Proxy) -> None:
    proxy.kit.configure(*(f"chatter.{key} = yes" for key in SECRETS))
    printed(proxy)
    found, _ = proxy.big(MIB, "log_level=debug", "idle_close=0.1", "keepalive=never")
    found.allow("says: ")
    log_in_often(found, proxy)
    text = found.log.read_text()
    for line in (
        r"VDDK: VixDiskLibVim: login with user name \S+, password xxx",
        r"stdout: VixDiskLib: user \S+ password xxx",
        r"stderr: VixDiskLib: user \S+ password xxx",
        r"<password>xxx</password> encoded xxx",
    ):
        assert len(re.findall(line, text)) >= LOGINS, line
    judge(found, PASSWORD)


def test_k07_a_cookie(proxy: Proxy) -> None:
    proxy.kit.configure(f"cookie = {COOKIE}", *(f"chatter.{key} = yes" for key in SECRETS))
    proxy.credentials.write_text(f"cookie={COOKIE}\n")
    found, _ = proxy.big(MIB, "log_level=debug")
    found.allow("says: ")
    assert found.read("big/disk.raw", 0, 4096)
    assert "by=cookie" in (proxy.kit.site / ".sim" / "events.log").read_text()
    judge(found, COOKIE)


def test_k07_of_a_mount_that_fails(proxy: Proxy) -> None:
    """What the library complains about goes to stderr there."""
    proxy.kit.configure("password = another", *(f"chatter.{key} = yes" for key in SECRETS))
    place = proxy.kit.path / "place"
    place.mkdir()
    words = proxy.options("log_level=debug")
    done = vddkfs("mount", proxy.url(*CHAIN), place, "-o", ",".join(words))
    assert done.returncode not in (0, 1)
    for form in disguises(PASSWORD):
        assert form not in (done.stdout + done.stderr).encode()


def test_k07_of_a_worker_that_crashes(proxy: Proxy) -> None:
    """Its last words, which nobody redacts any more, do not hold a secret either."""
    proxy.kit.configure("fault = ReadAsync count=1 abort", *(f"chatter.{k} = yes" for k in SECRETS))
    found, data = proxy.big(MIB, "log_level=debug")
    found.expect("ended unexpectedly")
    found.allow("says: ")
    found.restarts = 1
    assert found.read("big/disk.raw", 4096, 4096, True) == data[4096:8192]
    judge(found, PASSWORD)


@pytest.mark.skipif(subprocess.call(["which", "gcore"], stdout=-3) != 0, reason="absent: gcore")
def test_k07_core_of_the_daemon(proxy: Proxy, tmp_path: Path) -> None:
    proxy.kit.configure(*(f"chatter.{key} = yes" for key in SECRETS))
    found, _ = proxy.big(MIB, "log_level=debug", "cache_size=4M")
    found.allow("says: ")
    assert found.read("big/disk.raw", 0, 4096)
    keys: dict[str, Any] = {"capture_output": True, "timeout": 60, "check": True}
    subprocess.run(["gcore", "-o", str(tmp_path / "core"), str(found.pid)], **keys)
    core = (tmp_path / f"core.{found.pid}").read_bytes()
    assert b"big/big.vmdk" in core
    assert not [form for form in disguises(PASSWORD) if form in core]
