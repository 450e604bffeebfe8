"""The control socket: commands to a running mount, never through the mount itself.

A request is one line of JSON, ``{"command": ...}``; the answer is one line of JSON. The socket is
0600, and the peer's user id is compared as well.
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

from vddkfs.errors import NotMounted
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


def ask(mountpoint: str, command: str, **arguments: Any) -> dict[str, Any]:
    """Send *command* to the daemon of *mountpoint* and return its answer. Raises NotMounted."""
    place = canonical(mountpoint)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(2 * _SECONDS)
        try:
            sock.connect(str(socket_path(place)))
            sock.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            with sock.makefile("rb") as answer:
                return dict(json.loads(answer.readline()))
        except FileNotFoundError:
            raise NotMounted(f"{mountpoint}: no vddkfs mount there") from None
        except (OSError, ValueError) as error:
            raise NotMounted(
                f"{mountpoint}: the daemon of that mount does not answer",
                cause=str(error),
                advice=f"`vddkfs umount {mountpoint}` removes a mount whose daemon is dead",
            ) from error
