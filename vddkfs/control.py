"""The control socket: commands to a running mount, never through the mount itself.

A request is one line of JSON, ``{"command": ...}``; the answer is one line of JSON, with ``error``
in it, and for an expected failure its ``exit_code``, where the command failed. The socket is 0600,
and the peer's user id is compared as well.
"""

import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import trio

from vddkfs.errors import NotMounted, UsageError, VddkfsError
from vddkfs.state import canonical, socket_path

log = logging.getLogger(__name__)

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

_LONGEST: Final = 64 * 1024
_SECONDS: Final = 5.0
_ACCEPT_AGAIN: Final = 0.1
_ABANDONED: Final = (OSError, trio.BrokenResourceError, trio.TooSlowError)


class ControlServer:
    """Answers on the socket at *path* until cancelled, and removes it then."""

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self._path = path
        self._handlers = handlers

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve. *task_status* is told when the socket accepts."""
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        old = os.umask(0o177)
        try:
            await listener.bind(str(self._path))
        finally:
            os.umask(old)
        listener.listen(16)
        ours = self._path.stat().st_ino
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    try:
                        connection, _ = await listener.accept()
                    except OSError as error:
                        log.warning("a command cannot be taken: %s", error)
                        await trio.sleep(_ACCEPT_AGAIN)
                        continue
                    nursery.start_soon(self._serve, connection)
        finally:
            listener.close()
            # A mount that was taken down lazily may have been followed by another at its place.
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_ino == ours:
                    self._path.unlink()

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        with connection, contextlib.suppress(*_ABANDONED):
            if _peer(connection) not in (0, os.geteuid()):
                return
            with trio.fail_after(_SECONDS):
                request = await _line(connection)
            answer = await self._answer(request)
            stream = trio.SocketStream(connection)
            with trio.fail_after(_SECONDS):
                await stream.send_all(json.dumps(answer).encode() + b"\n")

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            handler = self._handlers[request["command"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {"error": "an unknown command"}
        try:
            return await handler(request)
        except VddkfsError as error:
            return {"error": str(error), "exit_code": error.exit_code}
        except Exception as error:
            log.exception("a bug in vddkfs: the command %s failed", request["command"])
            return {"error": f"a bug in vddkfs: {error!r}"}


def _peer(connection: trio.socket.SocketType) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("iII", credentials)[1])


async def _line(connection: trio.socket.SocketType) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < _LONGEST:
        part = await connection.recv(4096)
        if not part:
            break
        data += part
    return data


class Question:
    """A command that the daemon of *mountpoint* has been sent, and has not answered yet.

    *mountpoint* is canonical, and not touched. Raises NotMounted where nobody takes the command,
    UsageError where it is too long. An answer that may take a while is waited for by ``fileno``.
    """

    def __init__(self, mountpoint: str, command: str, **arguments: Any) -> None:
        self.mountpoint = mountpoint
        request = json.dumps({"command": command, **arguments}).encode() + b"\n"
        if len(request) > _LONGEST:
            raise UsageError("too many names for one command", advice="name their folder")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(2 * _SECONDS)
        try:
            self._socket.connect(str(socket_path(mountpoint)))
            self._socket.sendall(request)
        except OSError as error:
            self.close()
            raise self._unanswered(error) from error

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the answer is there."""
        return self._socket.fileno()

    def answer(self) -> dict[str, Any]:
        """Wait a little for the answer, and return it. Raises NotMounted."""
        try:
            with self._socket.makefile("rb") as answer:
                return dict(json.loads(answer.readline()))
        except (OSError, ValueError) as error:
            raise self._unanswered(error) from error

    def close(self) -> None:
        """Wait no longer; the daemon goes on with what it was asked for."""
        self._socket.close()

    def _unanswered(self, error: Exception) -> NotMounted:
        if isinstance(error, FileNotFoundError):
            return NotMounted(f"{self.mountpoint}: no vddkfs mount there")
        return NotMounted(
            f"{self.mountpoint}: the daemon of that mount does not answer",
            cause=str(error),
            advice=f"`vddkfs umount {self.mountpoint}` removes a mount whose daemon is dead",
        )


def ask(mountpoint: str, command: str, **arguments: Any) -> dict[str, Any]:
    """Send *command* to the daemon of *mountpoint* and return its answer. Raises NotMounted."""
    question = Question(canonical(mountpoint), command, **arguments)
    try:
        return question.answer()
    finally:
        question.close()
