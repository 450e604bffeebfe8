"""The control socket: it answers those who may ask, and nothing they send can hurt the mount."""

import errno
import json
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from vddkfs import control
from vddkfs.control import ControlServer, Question, ask
from vddkfs.errors import MountBusy, NotMounted, UsageError

SECONDS = 10.0


async def status(request: dict[str, Any]) -> dict[str, Any]:
    """Answer with what was asked."""
    return {"asked": request, "odd": "caf\udce9"}


async def broken(request: dict[str, Any]) -> dict[str, Any]:
    """Have a bug."""
    raise KeyError("oops")


async def refused(request: dict[str, Any]) -> dict[str, Any]:
    """Fail as was to be expected."""
    raise MountBusy("web: busy", advice="try again")


async def never(request: dict[str, Any]) -> dict[str, Any]:
    """Answer never."""
    await trio.sleep_forever()
    raise AssertionError


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Path]:
    path = folder / "control.sock"
    async with trio.open_nursery() as nursery:
        handlers = {"status": status, "never": never, "broken": broken, "refused": refused}
        server = ControlServer(path, handlers)
        await nursery.start(server.run)
        yield path
        nursery.cancel_scope.cancel()


async def send(path: Path, data: bytes, end: bool = True) -> bytes:
    """Send *data*, and return all that is answered."""
    with trio.fail_after(SECONDS):
        stream = await trio.open_unix_socket(path)
        async with stream:
            try:
                await stream.send_all(data)
                if end:
                    await stream.send_eof()
                return b"".join([part async for part in stream])
            except trio.BrokenResourceError:
                return b""


async def works(path: Path) -> bool:
    """Say whether the server answers."""
    answer = await send(path, b'{"command": "status", "n": 7}\n', end=False)
    return bool(json.loads(answer)["asked"] == {"command": "status", "n": 7})


async def test_a_line_is_answered_with_a_line(tmp_path: Path) -> None:
    async with serving(tmp_path) as path:
        answer = await send(path, b'{"command": "status", "x": [1]}\n', end=False)
        assert answer.endswith(b"\n")
        assert answer.count(b"\n") == 1
        assert json.loads(answer) == {
            "asked": {"command": "status", "x": [1]},
            "odd": "caf\udce9",
        }


async def test_the_socket_is_for_its_owner_alone_and_goes_away(tmp_path: Path) -> None:
    (tmp_path / "control.sock").write_text("left over by a daemon that was killed")
    mask = os.umask(0)
    try:
        async with serving(tmp_path) as path:
            assert stat.S_ISSOCK(path.lstat().st_mode)
            assert stat.S_IMODE(path.lstat().st_mode) == 0o600
            assert os.umask(0) == 0, "the process has its own mask again"
            assert await works(path)
    finally:
        os.umask(mask)
    assert not path.exists()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"status\n",
        b"{}\n",
        b"[]\n",
        b"7\n",
        b"null\n",
        b'"status"\n',
        b'{"command": "stop"}\n',
        b'{"command": null}\n',
        b'{"command": ["status"]}\n',
        b'{"command": {"a": 1}}\n',
        b"\xff\xfe\n",
        b'{"command": "status"',
        b'{"command":' + b"[" * 50_000 + b"\n",
        b'{"command": ' + b"9" * 5000 + b"}\n",
    ],
    ids=lambda line: repr(line[:20]),
)
async def test_what_is_no_known_command_is_refused_and_hurts_nobody(
    line: bytes, tmp_path: Path
) -> None:
    async with serving(tmp_path) as path:
        assert "unknown command" in json.loads(await send(path, line))["error"]
        assert await works(path)


async def test_a_request_without_an_end_is_not_read_for_ever(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(tmp_path) as path:
        start = trio.current_time()
        answer = await send(path, b"x" * 1_000_000, end=False)
        assert answer == b"" or "error" in json.loads(answer)
        assert trio.current_time() - start < 1, "it did not wait for more"
        assert await works(path)


async def test_a_slow_client_does_not_block_others_and_is_let_go(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(tmp_path) as path:
        slow = [await trio.open_unix_socket(path) for _ in range(20)]
        for stream in slow:
            await stream.send_all(b'{"comm')
        assert await works(path)
        for stream in slow:
            assert await stream.receive_some() == b"", "it had its time"
            await stream.aclose()
        assert trio.current_time() >= 5


async def test_a_command_that_hangs_does_not_block_others(tmp_path: Path) -> None:
    async with serving(tmp_path) as path:
        stream = await trio.open_unix_socket(path)
        async with stream:
            await stream.send_all(b'{"command": "never"}\n')
            for _ in range(3):
                assert await works(path)


async def test_a_command_with_a_bug_says_so_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path) as path:
        assert "bug" in json.loads(await send(path, b'{"command": "broken"}\n'))["error"]
        assert await works(path)
    assert "KeyError: 'oops'" in caplog.text


async def test_a_command_that_is_refused_tells_why_and_with_which_code(tmp_path: Path) -> None:
    async with serving(tmp_path) as path:
        answer = json.loads(await send(path, b'{"command": "refused"}\n', end=False))
        assert answer == {"error": "web: busy; try again", "exit_code": MountBusy.exit_code}
        assert await works(path)


async def test_the_socket_of_a_later_mount_at_the_same_place_stays(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        async with serving(tmp_path) as path:
            later = ControlServer(path, {"status": status})
            await nursery.start(later.run)
        assert await works(path)
        nursery.cancel_scope.cancel()
    assert not path.exists()


async def test_a_client_that_leaves_without_its_answer_hurts_nobody(tmp_path: Path) -> None:
    async with serving(tmp_path) as path:
        for data in (b"", b"{", b'{"command": "status"}\n', b"x" * 70_000):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.send(data)
            assert await works(path)


async def test_another_user_is_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as path:
        for peer in (0, os.geteuid()):
            monkeypatch.setattr(control, "_peer", lambda connection, peer=peer: peer)
            assert await works(path)
        monkeypatch.setattr(control, "_peer", lambda connection: 12345)
        assert await send(path, b'{"command": "status"}\n', end=False) == b""


async def test_the_peer_is_the_user_at_the_other_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = control._peer

    def peer(connection: Any) -> int:
        seen.append(real(connection))
        return seen[-1]

    monkeypatch.setattr(control, "_peer", peer)
    async with serving(tmp_path) as path:
        assert await works(path)
    assert seen == [os.geteuid()]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.ENOMEM])
async def test_no_descriptor_for_a_client_is_no_end_of_the_mount(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.socket.socket() as any_socket:
        kind = type(any_socket)
    real = kind.accept
    failures = [OSError(code, os.strerror(code))]

    async def accept(self: Any) -> Any:
        if failures:
            await trio.lowlevel.checkpoint()
            raise failures.pop()
        return await real(self)

    monkeypatch.setattr(kind, "accept", accept)
    async with serving(tmp_path) as path:
        assert await works(path)


# The other end


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the socket of every mount at one place."""
    monkeypatch.setattr(control, "socket_path", lambda mountpoint: tmp_path / "control.sock")
    return tmp_path


async def test_ask_sends_the_command_and_returns_the_answer(place: Path) -> None:
    async with serving(place):
        answer = await trio.to_thread.run_sync(lambda: ask("/mnt/web", "status", n=1))
        assert answer["asked"] == {"command": "status", "n": 1}
        answer = await trio.to_thread.run_sync(lambda: ask("/mnt/web", "dance"))
        assert answer == {"error": "an unknown command"}


def test_ask_tells_that_there_is_no_mount(place: Path) -> None:
    with pytest.raises(NotMounted, match="/mnt/web: no vddkfs mount there"):
        ask("/mnt/web", "status")


async def test_an_answer_may_be_waited_for_by_whoever_asked(place: Path) -> None:
    async with serving(place):
        question = Question("/mnt/web", "status", n=2)
        try:
            await trio.lowlevel.wait_readable(question.fileno())
            assert question.answer()["asked"] == {"command": "status", "n": 2}
        finally:
            question.close()


def test_a_question_that_is_too_long_is_not_asked(place: Path) -> None:
    with pytest.raises(UsageError, match="too many names"):
        Question("/mnt/web", "status", names=["x" * 1000] * 70)


@pytest.mark.parametrize("answer", [b"", b"no JSON\n", b'{"cut'])
def test_ask_tells_that_the_daemon_answered_nothing_of_use(answer: bytes, place: Path) -> None:
    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "control.sock"))
        server.listen(1)
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        with pytest.raises(NotMounted, match="does not answer"):
            ask("/mnt/web", "status")
        thread.join(SECONDS)


@pytest.mark.parametrize("how", ["dead", "hung"])
def test_ask_tells_that_the_daemon_does_not_answer(
    how: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "control.sock"))
        if how == "hung":
            server.listen(1)
        with pytest.raises(NotMounted, match="does not answer") as caught:
            ask("/mnt/web", "status")
    assert caught.value.cause
    assert "vddkfs umount /mnt/web" in caught.value.advice
