"""Asking a worker, before anything is mounted, what the images of a source are.

The library must not be loaded into the process that will be the daemon, so a worker is started for
the one question, and ends with it. Blocks; no trio runs yet.
"""

import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable

import msgspec

from vddkfs.engines import protocol
from vddkfs.engines.base import Description
from vddkfs.engines.config import VddkConfig
from vddkfs.engines.protocol import Op
from vddkfs.engines.spawn import ending, spawn
from vddkfs.errors import WorkerFailed

SECONDS = 300.0
"""How long each image may take to open."""
_STOP_SECONDS = 5.0


def describe_images(
    config: VddkConfig, secret: int, say: Callable[[bytes], None], seconds: float = SECONDS
) -> Description:
    """Return what a worker finds out of *config*'s images, opened one after another.

    *say* gets each line that the worker prints (see ``engines.output``), on a thread of its own.
    Raises WorkerFailed if the worker dies or takes longer than *seconds* for each image, and
    whatever the engine raises.
    """
    told, output = os.pipe2(os.O_CLOEXEC)
    try:
        sock, process = spawn(output)
    except OSError as error:
        os.close(told)
        raise WorkerFailed(f"a worker cannot be started: {error}") from error
    finally:
        os.close(output)
    listener = threading.Thread(target=_listen, args=(told, say))
    listener.start()
    try:
        header = protocol.request_header(Op.DESCRIBE, 1)
        protocol.send(sock, header, protocol.encode(config), fd=secret)
        packet, fd = _answer(sock, seconds * max(1, len(config.images)))
        if not packet:
            process.wait(_STOP_SECONDS)
            raise WorkerFailed(
                f"the worker ended while it opened the disks ({ending(process.returncode)})",
                advice="the library crashed; `vddkfs doctor` looks whether it is whole",
            )
        status = protocol.REPLY.unpack_from(packet)[3]
        body = protocol.body_of(packet, protocol.REPLY.size, fd)
        if status:
            raise protocol.decode_error(body, status)
        return msgspec.msgpack.decode(body, type=Description)
    except (OSError, subprocess.TimeoutExpired, *protocol.GARBLED) as error:
        raise WorkerFailed(f"an answer of the worker makes no sense: {error}") from error
    finally:
        _end(sock, process)
        listener.join()


def _answer(sock: socket.socket, seconds: float) -> tuple[bytes, int]:
    """Return the worker's answer, an empty packet if it ended. Raises WorkerFailed if too late."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([sock], [], [], left)[0]:
            try:
                packet, fd = protocol.receive(sock)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                return b"", -1
            return packet, fd
    raise WorkerFailed(
        f"the disks were not opened within {seconds:g} s",
        advice="check that the server and its hosts can be reached, and look at the log",
    )


def _end(sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
    try:
        sock.send(protocol.request_header(Op.STOP, 0), socket.MSG_DONTWAIT)
        process.wait(_STOP_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
    finally:
        sock.close()


def _listen(told: int, say: Callable[[bytes], None]) -> None:
    with open(told, "rb") as lines:
        for line in lines:
            say(line)
