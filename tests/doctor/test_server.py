"""The server of a SOURCE: names, ports that listen and refuse, certificates, credentials."""

import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doctor.conftest import WriteCredentials
from vddkfs.doctor import server
from vddkfs.doctor.rows import Row
from vddkfs.options import MountOptions, parse_options
from vddkfs.remote import Remote, parse_remote

SHA1 = ":".join(["AB"] * 20)
SHA256 = ":".join(["CD"] * 32)


def remote(name: str, port: int = 443) -> Remote:
    return Remote(name, port, "vm-1", parse_remote("vddk:///x.vmdk").links)


def by_what(rows: list[Row]) -> dict[str, Row]:
    assert all(row.remedy or row.level == "ok" for row in rows)
    return {row.what: row for row in rows}


@pytest.fixture
def listening() -> Iterator[int]:
    """A port that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


@pytest.fixture
def refusing() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str, str]:
    """A key, a certificate, and its thumbprints as openssl tells them."""
    if shutil.which("openssl") is None:
        pytest.skip("absent: openssl")
    folder = tmp_path_factory.mktemp("certificate")
    key, made = str(folder / "key.pem"), str(folder / "cert.pem")

    def openssl(*words: str) -> str:
        done = subprocess.run(
            ["openssl", *words], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    openssl("genrsa", "-out", key, "2048")
    openssl("req", "-x509", "-key", key, "-subj", "/CN=vc", "-days", "2", "-out", made)
    prints = [
        openssl("x509", "-in", made, "-noout", "-fingerprint", kind).partition("=")[2]
        for kind in ("-sha1", "-sha256")
    ]
    return key, made, prints[0], prints[1]


@pytest.fixture
def secure(certificate: tuple[str, str, str, str]) -> Iterator[int]:
    """The port of a TLS server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[0])

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                try:
                    with context.wrap_socket(connection, server_side=True) as wrapped:
                        wrapped.recv(1)
                except OSError:
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(20)


# Names.


def test_k16_ipv6_only_is_warned_of() -> None:
    [row] = server.judge_addresses("vc", ["fd00::1"])
    assert (row.level, row.what) == ("warning", "DNS")
    assert "IPv6" in row.finding
    assert server.judge_addresses("fd00::1", ["fd00::1"])[0].level == "warning"
    [row] = server.judge_addresses("vc", ["10.0.0.1", "fd00::1"])
    assert (row.level, row.finding) == ("ok", "vc is 10.0.0.1, fd00::1")
    assert "needs no DNS" in server.judge_addresses("10.0.0.1", ["10.0.0.1"])[0].finding


def test_ipv4_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    assert server.lookup("vc") == ["10.0.0.1", "fd00::1"]


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    rows = by_what(server.check(remote("vc"), MountOptions()))
    assert rows["DNS"].level == "failure"
    assert "vc has no address" in rows["DNS"].finding
    assert set(rows) == {"DNS", "credentials"}


def test_a_resolver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(30) and [])
    rows = by_what(server.check(remote("vc"), MountOptions(), seconds=0.1))
    release.set()
    assert rows["DNS"].level == "failure"
    assert "no answer within" in rows["DNS"].finding


# Ports.


def test_ports_that_listen_and_refuse(listening: int, refusing: int) -> None:
    assert server.reach(["127.0.0.1"], listening, 3) == ""
    assert "refused" in server.reach(["127.0.0.1"], refusing, 3)
    assert server.reach([], refusing, 3)
    # The second address is tried where the first refuses.
    assert server.reach(["127.0.0.9", "127.0.0.1"], listening, 3) == ""


def test_a_port_that_does_not_answer() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            # The queue is full now: the kernel answers nobody any more.
            assert server.reach(["127.0.0.1"], port, 0.2) == "no answer within 0.2 s"


def test_a_closed_port_of_the_server_fails_and_one_of_the_hosts_is_a_warning() -> None:
    assert server.judge_port(443, "", hosts=False).level == "ok"
    assert server.judge_port(443, "refused", hosts=False).level == "failure"
    assert server.judge_port(902, "", hosts=True).level == "ok"
    row = server.judge_port(902, "refused", hosts=True)
    assert row.level == "warning"
    assert "every ESXi host" in row.remedy


# Certificates.


def test_thumbprints_are_those_that_openssl_tells(
    secure: int, certificate: tuple[str, str, str, str], refusing: int
) -> None:
    options = parse_options([f"nfc_port={refusing},thumbprint={certificate[2]}"])
    rows = by_what(server.check(remote("127.0.0.1", secure), options))
    assert rows["certificate"].level == "ok"
    for thumbprint in certificate[2:]:
        assert thumbprint in rows["certificate"].finding
    assert rows[f"port {secure}"].level == "ok"
    assert rows[f"port {refusing}"].level == "warning"
    options = parse_options([f"nfc_port={refusing},thumbprint={SHA1}"])
    rows = by_what(server.check(remote("127.0.0.1", secure), options))
    assert rows["certificate"].level == "failure"


@pytest.mark.parametrize(
    ("given", "level"),
    [("", "warning"), (SHA1, "ok"), (SHA256, "ok"), (SHA1.replace("AB", "EF", 1), "failure")],
)
def test_thumbprints_are_compared(given: str, level: str) -> None:
    row = server.judge_certificate(SHA1, SHA256, given)
    assert row.level == level
    assert SHA1 in row.finding
    assert SHA256 in row.finding
    assert bool(row.remedy) == (level != "ok")


def test_a_server_without_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"220 not TLS\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        rows = by_what(server.check(remote("127.0.0.1", port), parse_options(["nfc_port=1"])))
        thread.join(10)
    assert rows["certificate"].level == "failure"
    assert "no TLS" in rows["certificate"].finding


def test_a_server_that_says_nothing(listening: int) -> None:
    options = parse_options(["nfc_port=1"])
    rows = by_what(server.check(remote("127.0.0.1", listening), options, seconds=0.2))
    assert rows["certificate"].level == "failure"


# Credentials.


def test_credentials_are_looked_at_and_not_read(
    credentials: WriteCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = credentials("S3cr3t-probe")

    def never(*_: object) -> bytes:
        raise AssertionError("it was read")

    monkeypatch.setattr(os, "pread", never)
    monkeypatch.setattr(os, "read", never)
    [row] = server.credentials(path)
    assert row.level == "ok"
    assert "mode 0600, owner" in row.finding
    Path(path).chmod(0o644)
    [row] = server.credentials(path)
    assert (row.level, row.remedy) == ("failure", f"chmod 0600 {path}")
    assert "0644" in row.finding
    [row] = server.credentials("/nonexistent")
    assert row.level == "failure"


def test_no_credentials_and_those_of_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    [row] = server.credentials("")
    assert row.level == "warning"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert server.credentials("")[0].level == "warning"
    (tmp_path / "vddkfs").touch(mode=0o400)
    [row] = server.credentials("")
    assert (row.level, row.finding[:12]) == ("ok", "from systemd")
