"""Clients in C, linked with the library as any is; also with the sanitizers."""

import subprocess
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.simulator.client import PASSWORD, USER
from tests.simulator.disks import check, raw
from tests.simulator.kit import CHAIN, PROGRAMS, Kit, Kits, built, compiled

PLAIN, SPARSE = "[ds1] plain/plain.vmdk", "[ds1] plain/sparse.vmdk"
FLAGS = {
    "": (),
    "address": ("-fsanitize=address,undefined", "-fsanitize-undefined-trap-on-error"),
    "thread": ("-fsanitize=thread",),
}
LOUD = {
    "ASAN_OPTIONS": "abort_on_error=0:exitcode=99:detect_leaks=1",
    "TSAN_OPTIONS": "exitcode=99:halt_on_error=1:second_deadlock_stack=1",
}


@cache
def program(name: str, folder: Path, sanitize: str = "") -> Path:
    build = built("8.0", sanitize)
    target = folder / f"{name}{sanitize and '-'}{sanitize}"
    words = (*FLAGS[sanitize], f"-L{build / 'lib64'}", "-lvixDiskLib")
    return compiled(PROGRAMS / f"{name}.c", target, *words)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("programs")
    return lambda name, sanitize="": program(name, folder, sanitize)


def environment_of(kit: Kit, path: Path) -> dict[str, str]:
    """Return a program's; one that is built with a sanitizer brings the runtime along."""
    own = {"LD_PRELOAD": ""} if "-" in path.name else {}
    return {**kit.environment, **LOUD, **own, "LD_LIBRARY_PATH": str(kit.path / "lib64")}


def run(kit: Kit, path: Path, *words: object) -> tuple[bytes, str]:
    """Run a program with the kit's libraries; return what it wrote to stdout and stderr."""
    done = subprocess.run(
        [str(path), str(kit.path), kit.config(), *map(str, words)],
        env=environment_of(kit, path),
        capture_output=True,
        timeout=55,
        check=False,
    )
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, f"{done.returncode}\n{said}"
    assert "Sanitizer" not in said, said
    return done.stdout, said


LOGIN = ("vcenter", USER, PASSWORD)


@pytest.mark.parametrize("modes", ["nbdssl", "nbd", "san", "hotadd"])
def test_a_client_that_knows_only_what_is_published(
    request: pytest.FixtureRequest, kit: Kit, contents: Any, programs: Any, modes: str
) -> None:
    if modes in ("san", "hotadd"):
        request.getfixturevalue("loops")
    client = programs("public_client")
    out, said = run(kit, client, *LOGIN, "vm-16", "snapshot-2", modes, CHAIN[1])
    assert out == contents(CHAIN[1])
    assert f"transport {modes}\n" in said
    assert said.endswith("done\n")
    out, said = run(kit, client, *LOGIN, "vm-17", "", modes, PLAIN, "write")
    wanted = bytearray(contents(PLAIN))
    for number, start in enumerate(range(0, len(wanted), 1000 * 512)):
        wanted[start : start + 512] = bytes([ord("a") + number]) * 512
    assert out == wanted
    assert raw(kit.disk(PLAIN)) == wanted


def test_that_client_over_a_network_with_delays(kit: Kit, contents: Any, programs: Any) -> None:
    kit.configure("net.latency_us = 500", "net.jitter = 0.9")
    client = programs("public_client")
    out, _ = run(kit, client, *LOGIN, "vm-16", "snapshot-1", "nbdssl", CHAIN[0])
    assert out == contents(CHAIN[0])


@pytest.mark.parametrize("sanitize", ["", "address", "thread"])
@pytest.mark.parametrize("modes", ["nbd", "file"])
def test_random_operations_against_a_model(
    kits: Kits, programs: Any, modes: str, sanitize: str
) -> None:
    kit = kits(sanitize=sanitize, host=False)
    host = kit.start(**LOUD) if modes != "file" else None
    path = SPARSE if host else str(kit.disk(SPARSE))
    server = "vcenter" if host else "-"
    out, said = run(kit, programs("random_ops", sanitize), server, "vm-17", modes, path, 10_000, 7)
    assert f"transport {modes}\n" in said
    if host:
        assert host.stop() == 0
        assert "Sanitizer" not in host.log.read_text()
    assert raw(kit.disk(SPARSE)) == out
    check(kit.disk(SPARSE))


@pytest.mark.parametrize("sanitize", ["address", "thread"])
@pytest.mark.parametrize("modes", ["san", "hotadd", "nbdssl"])
def test_the_other_transports_with_sanitizers(
    kits: Kits, loops: None, programs: Any, modes: str, sanitize: str
) -> None:
    kit = kits(sanitize=sanitize, host=False)
    host = kit.start(**LOUD)
    kit.configure("net.latency_us = 200", "net.jitter = 0.5")
    words = ("vcenter", "vm-17", modes, PLAIN, 1000, 8)
    out, said = run(kit, programs("random_ops", sanitize), *words)
    assert f"transport {modes}\n" in said
    assert host.stop() == 0
    assert "Sanitizer" not in host.log.read_text()
    assert raw(kit.disk(PLAIN)) == out


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_many_clients_of_one_host_with_sanitizers(
    kits: Kits, contents: Any, programs: Any, sanitize: str
) -> None:
    kit = kits(sanitize=sanitize, host=False)
    host = kit.start(**LOUD)
    kit.configure("chatter.secrets = yes", "chatter.phone_home = yes", "net.latency_us = 300")
    client = programs("public_client", sanitize)
    words = [
        str(client),
        str(kit.path),
        kit.config(),
        *LOGIN,
        "vm-16",
        "snapshot-2",
        "nbd",
        CHAIN[1],
    ]
    with ExitStack() as stack:
        processes = []
        for _ in range(3):
            process = subprocess.Popen(
                words,
                env=environment_of(kit, client),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            out, said = process.communicate(timeout=55)
            assert process.returncode == 0, said.decode()
            assert out == contents(CHAIN[1])
            assert b"Sanitizer" not in said
    assert host.stop() == 0
    assert "Sanitizer" not in host.log.read_text()


def test_ten_thousand_operations_while_connections_are_slow(kit: Kit, programs: Any) -> None:
    kit.configure("net.latency_us = 100", "net.jitter = 1", "net.buffers = 4")
    words = ("vcenter", "vm-17", "nbdssl", SPARSE, 2000, 9)
    out, _ = run(kit, programs("random_ops"), *words)
    assert raw(kit.disk(SPARSE)) == out
