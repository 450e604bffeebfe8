"""Real worker processes: they start, tell what they print, and never outlive their daemon."""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from vddkfs.engines import process, protocol, spawn
from vddkfs.engines.process import WorkerProcess
from vddkfs.engines.protocol import Op

SECONDS = 20.0


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def answers(worker: WorkerProcess) -> bool:
    """Say whether the worker answers (that nothing is open in it)."""
    protocol.send(worker.sock, protocol.request_header(Op.REVALIDATE, 7))
    with trio.move_on_after(SECONDS):
        await trio.lowlevel.wait_readable(worker.sock)
        packet, _ = protocol.receive(worker.sock)
        return protocol.REPLY.unpack_from(packet)[4] == 7
    return False


def gone(pid: int) -> bool:
    """Say whether no process, or only a zombie, has *pid*."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] in (b"Z", b"X")
    except FileNotFoundError:
        return True


def until(condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
    """Look again and again until *condition* holds or *seconds* are over; say whether it did."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        select.select([], [], [], 0.01)
    return True


async def test_it_starts_answers_and_ends_in_good_order() -> None:
    before = count_fds()
    worker = WorkerProcess("disk")
    assert await answers(worker)
    start = trio.current_time()
    assert await worker.end(kill=False)
    assert trio.current_time() - start < process.STOP_SECONDS, "it was asked, and not killed"
    assert worker._popen.returncode == 0
    assert gone(worker.pid)
    assert count_fds() == before


async def test_a_killed_one_is_gone_at_once() -> None:
    worker = WorkerProcess("disk")
    assert await worker.end(kill=True)
    assert worker._popen.returncode == -signal.SIGKILL
    assert gone(worker.pid)


@pytest.mark.parametrize("kill", [False, True])
async def test_a_stopped_one_is_killed(kill: bool) -> None:
    worker = WorkerProcess("disk")
    assert await answers(worker)
    os.kill(worker.pid, signal.SIGSTOP)
    start = trio.current_time()
    assert await worker.end(kill=kill)
    took = trio.current_time() - start
    assert (took >= process.STOP_SECONDS) is (not kill), "it had its time to end by itself"
    assert took < process.STOP_SECONDS + process.REAP_SECONDS
    assert worker._popen.returncode == -signal.SIGKILL


async def test_one_that_ends_by_itself_is_noticed_and_reaped() -> None:
    worker = WorkerProcess("disk")
    assert await answers(worker)
    assert not await worker.reap(0.01), "it is alive"
    os.kill(worker.pid, signal.SIGKILL)
    with trio.fail_after(SECONDS):
        await worker.forward_output()
    assert await worker.end(kill=False)
    assert worker._popen.returncode == -signal.SIGKILL


PRINTER = """
import os, sys
sys.stdout.write("one\\ntwo "); sys.stdout.flush()
sys.stderr.write("halves\\n\\n" + "x" * 9000); sys.stderr.flush()
os.write(1, b"\\ncaf\\xe9\\nthe last words")
"""


async def test_what_it_prints_is_logged_line_by_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spawn, "_command", lambda theirs: [sys.executable, "-I", "-c", PRINTER])
    worker = WorkerProcess("web")
    with trio.fail_after(SECONDS):
        await worker.forward_output()
    assert await worker.end(kill=False)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    lines = [record.getMessage() for record in caplog.records]
    said = [line.removeprefix("worker of web says: ") for line in lines]
    assert said[:2] == ["one", "two halves"]
    assert 4096 <= len(said[2]) <= 9000
    assert set(said[2]) == {"x"}
    assert said[3:] == ["caf\ufffd", "the last words"]


async def test_the_last_words_of_one_that_was_killed_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = "import threading; print('dying', flush=True); threading.Event().wait()"
    monkeypatch.setattr(spawn, "_command", lambda theirs: [sys.executable, "-I", "-c", code])
    worker = WorkerProcess("web")
    with trio.fail_after(SECONDS):
        await trio.lowlevel.wait_readable(worker._output)
    assert await worker.end(kill=True)
    assert "worker of web says: dying" in caplog.text


async def test_it_sees_nothing_of_the_daemons_environment_and_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_DAEMON", "1")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
    code = "import os; print(sorted(os.environ), os.getcwd(), sorted(os.listdir('/proc/self/fd')))"
    monkeypatch.setattr(
        spawn,
        "_command",
        lambda theirs: [sys.executable, "-I", "-c", f"{code}; print({theirs.fileno()})"],
    )
    inheritable = os.dup(0)
    os.set_inheritable(inheritable, True)
    worker = WorkerProcess("web")
    with trio.fail_after(SECONDS):
        await worker.forward_output()
    await worker.end(kill=False)
    os.close(inheritable)
    first, number = [r.getMessage().removeprefix("worker of web says: ") for r in caplog.records]
    variables, rest = first.split("] ", 1)
    assert {"'LANG'", "'LC_ALL'", "'PATH'"} <= set(variables.strip("[").split(", "))
    assert "SECRET" not in variables
    assert "LD_LIBRARY_PATH" not in variables
    folder, files = rest.split(" ", 1)
    assert folder == "/"
    listing = 1
    assert len(files.split(", ")) == 3 + 1 + listing
    assert f"'{number}'" in files


async def test_one_that_cannot_be_started_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spawn, "_command", lambda theirs: ["/nowhere/python"])
    before = count_fds()
    with pytest.raises(FileNotFoundError):
        WorkerProcess("web")
    assert count_fds() == before


PARENT = """
import select, threading
from vddkfs.engines import protocol
from vddkfs.engines.process import WorkerProcess
worker = WorkerProcess("disk")
protocol.send(worker.sock, protocol.request_header(protocol.Op.REVALIDATE, 1))
select.select([worker.sock], [], [])
print(worker.pid, flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_it_dies_when_its_daemon_is_killed(stopped: bool) -> None:
    command = [sys.executable, "-I", "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        # Held by its pidfd, so that nobody else can have the number when it is looked at.
        pidfd = os.pidfd_open(pid)
        assert not gone(pid)
        if stopped:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        parent.kill()
        parent.wait(SECONDS)
        try:
            assert until(lambda: gone(pid)), "a killed daemon leaves no worker behind"
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


TALKER = """
import socket, sys
socket.socket(fileno=int(sys.argv[1])).recv(65536)
for _ in range(300):
    sys.stderr.write("<7>" + "x" * 1000 + "\\n")
sys.exit(3)
"""


async def test_one_that_says_a_lot_at_its_end_is_listened_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    def command(theirs: Any) -> list[str]:
        return [sys.executable, "-c", TALKER, str(theirs.fileno())]

    monkeypatch.setattr(spawn, "_command", command)
    worker = WorkerProcess("disk", stop_seconds=SECONDS)
    assert await worker.end(kill=False)
    assert worker._popen.returncode == 3, "it was not killed"
    assert caplog.text.count("x" * 1000) == 300
