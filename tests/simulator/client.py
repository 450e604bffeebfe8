"""A client of the library, in a process of its own: it may crash, hang or be killed.

``kit.py`` runs this file as a script with the number of a socket. The first message names the kit
and the function to be run, with its source: it is a function of a test module, called with a
``Client`` and plain arguments, and sees the names of this module and of ``vix``.
"""

import contextlib
import ctypes
import mmap
import os
import pickle
import random  # noqa: F401 - for the functions
import signal  # noqa: F401 - for the functions
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.simulator import vix
from tests.simulator.vix import *  # noqa: F403 - for the functions
from tests.simulator.vix import OK, READ_ONLY, SECTOR, SESSIONID, UID, VIX_ASYNC

USER, PASSWORD = "operator", "s3cret pass/word&%"


class Failed(Exception):
    """A function of the library did not succeed."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"VixDiskLib_{name}: {code}")
        self.code = code


class Channel:
    """Pickled messages, each behind its length."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)

    def send(self, value: Any) -> None:
        packed = pickle.dumps(value)
        self.socket.sendall(struct.pack("<I", len(packed)) + packed)

    def receive(self, timeout: float | None = None) -> Any:
        """Return the next message. Raises EOFError and TimeoutError."""
        self.socket.settimeout(timeout)
        (length,) = struct.unpack("<I", self._bytes(4))
        return pickle.loads(self._bytes(length))

    def _bytes(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


class Buffer:
    """Memory that begins at a page, or some bytes behind one."""

    def __init__(self, size: int, skew: int = 0) -> None:
        self.map = mmap.mmap(-1, size + skew)
        self.skew = skew
        self.bytes = (ctypes.c_uint8 * size).from_buffer(self.map, skew)

    @property
    def data(self) -> bytes:
        return self.map[self.skew :]

    def fill(self, data: bytes) -> "Buffer":
        self.map[self.skew :] = data
        return self


def request(data: bytes) -> Buffer:
    return Buffer(len(data)).fill(data)


class Request:
    """One asynchronous read or write."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.done = threading.Event()
        self.error = -1  # the code
        self.whole_error = -1
        self.thread = 0  # of the callback
        self.inside = False  # called back before the function returned
        self.calls = 0
        self.finished = 0.0

    def wait(self, timeout: float = 20) -> bytes:
        assert self.done.wait(timeout), "no callback came"
        if self.error != OK:
            raise Failed("callback", self.error)
        return self.buffer.data


class Disk:
    """An open disk."""

    def __init__(self, client: "Client", handle: ctypes.c_void_p) -> None:
        self.client = client
        self.handle = handle
        self.issuing: Request | None = None

    @property
    def transport(self) -> str:
        mode: bytes = self.client.lib.GetTransportMode(self.handle)
        return mode.decode()

    @property
    def sectors(self) -> int:
        return int(self.info()["capacity"])

    def info(self) -> dict[str, Any]:
        found = ctypes.POINTER(vix.Info)()
        self.client.check("GetInfo", self.handle, ctypes.byref(found))
        info = found.contents
        values = {
            "capacity": info.capacity,
            "adapterType": info.adapterType,
            "numLinks": info.numLinks,
            "parentFileNameHint": info.parentFileNameHint,
            "uuid": info.uuid,
            "biosGeo": tuple(info.biosGeo),
            "physGeo": tuple(info.physGeo),
        }
        self.client.lib.FreeInfo(found)
        return values

    def read(self, start: int, count: int, skew: int = 0) -> bytes:
        buffer = Buffer(count * SECTOR, skew)
        self.client.check("Read", self.handle, start, count, buffer.bytes)
        return buffer.data

    def read_all(self, step: int = 2048) -> bytes:
        end = self.sectors
        return b"".join(self.read(start, min(step, end - start)) for start in range(0, end, step))

    def write(self, start: int, data: bytes) -> None:
        self.client.check("Write", self.handle, start, len(data) // SECTOR, request(data).bytes)

    def read_async(self, start: int, count: int) -> Request:
        return self._begin("ReadAsync", start, count, Buffer(count * SECTOR))

    def write_async(self, start: int, data: bytes) -> Request:
        return self._begin("WriteAsync", start, len(data) // SECTOR, request(data))

    def _begin(self, name: str, start: int, count: int, buffer: Buffer) -> Request:
        made = self.client.remember(Request(buffer))
        self.issuing = self.client.requests[made]
        code = getattr(self.client.lib, name)(
            self.handle, start, count, buffer.bytes, self.client.completion, made
        )
        result, self.issuing = self.issuing, None
        result.inside = result.done.is_set() and result.thread == threading.get_native_id()
        if code & 0xFFFF != VIX_ASYNC:
            raise Failed(name, code & 0xFFFF)
        return result

    def wait(self) -> None:
        self.client.check("Wait", self.handle)

    def flush(self) -> None:
        self.client.check("Flush", self.handle)

    def close(self) -> None:
        self.client.check("Close", self.handle)

    def query(self, start: int, count: int, chunk: int = 128) -> list[tuple[int, int]]:
        """Return (first, end) of what is allocated, in sectors."""
        found = ctypes.POINTER(vix.BlockList)()
        self.client.check(
            "QueryAllocatedBlocks", self.handle, start, count, chunk, ctypes.byref(found)
        )
        length = found.contents.numBlocks
        first = ctypes.addressof(found.contents) + vix.BlockList.blocks.offset
        blocks = (vix.Block * length).from_address(first)
        values = [(block.offset, block.offset + block.length) for block in blocks]
        self.client.check("FreeBlockList", found)
        return values


class Client:
    """The library in this process, and what it says."""

    def __init__(self, libdir: str, channel: Channel) -> None:
        self.libdir = libdir
        self.channel = channel
        self.lib = vix.Library(libdir)
        self.logs: list[tuple[str, str]] = []
        self.requests: dict[int, Request] = {}
        self.completion = vix.CompletionCB(self._completed)
        self._loggers = [self._logger(level) for level in ("log", "warn", "panic")]
        self._libc = ctypes.CDLL(None)

    def tell(self, value: Any) -> None:
        """Send the test a message."""
        self.channel.send(("told", value))

    def hear(self) -> Any:
        return self.channel.receive()

    def _logger(self, level: str) -> Any:
        def log(form: bytes, arguments: int) -> None:
            buffer = ctypes.create_string_buffer(16384)
            self._libc.vsnprintf(buffer, len(buffer), form, ctypes.c_void_p(arguments))
            self.logs.append((level, buffer.value.decode(errors="replace")))

        return vix.LogFunc(log)

    def text(self, level: str = "") -> str:
        """Return what came through the callbacks."""
        return "\n".join(line for kind, line in self.logs if level in ("", kind))

    def remember(self, made: Request) -> int:
        self.requests[len(self.requests) + 1] = made
        return len(self.requests)

    def _completed(self, key: int, error: int) -> None:
        made = self.requests[key]
        made.error, made.whole_error = error & 0xFFFF, error
        made.thread = threading.get_native_id()
        made.calls += 1
        made.finished = time.monotonic()
        made.done.set()

    def code(self, name: str, *arguments: Any) -> int:
        code: int = getattr(self.lib, name)(*arguments)
        return code & 0xFFFF

    def check(self, name: str, *arguments: Any) -> None:
        if code := self.code(name, *arguments):
            raise Failed(name, code)

    def outcome(self, function: Callable[..., Any], *arguments: Any, **keys: Any) -> int:
        """Return the code with which *function* fails, 0 if it does not."""
        try:
            function(*arguments, **keys)
        except Failed as failed:
            return failed.code
        return OK

    def init(self, config: str | None = None, logs: bool = True, libdir: str | None = None) -> None:
        loggers = self._loggers if logs else [vix.LogFunc() for _ in range(3)]
        place = (libdir or self.libdir).encode()
        self.check("InitEx", 6, 5, *loggers, place, config.encode() if config else None)

    def exit(self) -> None:
        self.lib.Exit()

    def params(
        self,
        vm: str | None = "vm-16",
        *,
        server: str = "vcenter",
        user: str = USER,
        password: str = PASSWORD,
        cookie: str | None = None,
        thumbprint: str | None = None,
        port: int = 0,
    ) -> vix.ConnectParams:
        made = vix.ConnectParams()
        made.vmxSpec = vm if vm is None else (vm if "?" in vm else f"moref={vm}").encode()
        made.serverName = server.encode()
        made.thumbPrint = thumbprint.encode() if thumbprint else None
        made.nfcHostPort = port
        made.credType = SESSIONID if cookie else UID
        if cookie:
            made.creds.sessionId.cookie = cookie.encode()
            made.creds.sessionId.userName = user.encode()
            made.creds.sessionId.key = password.encode()
        else:
            made.creds.uid.userName = user.encode()
            made.creds.uid.password = password.encode()
        return made

    def connect(
        self,
        vm: str | None = "vm-16",
        snapshot: str | None = None,
        modes: str | None = "nbd",
        read_only: bool = True,
        **keys: Any,
    ) -> ctypes.c_void_p:
        connection = ctypes.c_void_p()
        flag, reference = b"\1" if read_only else b"\0", snapshot.encode() if snapshot else None
        wanted = modes.encode() if modes else None
        params = ctypes.byref(self.params(vm, **keys))
        self.check("ConnectEx", params, flag, reference, wanted, ctypes.byref(connection))
        return connection

    def connect_local(self) -> ctypes.c_void_p:
        connection = ctypes.c_void_p()
        empty = ctypes.byref(vix.ConnectParams())
        self.check("Connect", empty, ctypes.byref(connection))
        return connection

    def open(self, connection: ctypes.c_void_p, path: str, flags: int = READ_ONLY) -> Disk:
        handle = ctypes.c_void_p()
        self.check("Open", connection, path.encode(), flags, ctypes.byref(handle))
        return Disk(self, handle)

    @contextlib.contextmanager
    def disk(self, path: str, flags: int | None = None, **keys: Any) -> Iterator[Disk]:
        """Connect (or stay local, for a plain path), open; close and disconnect at the end."""
        writing = keys.get("read_only") is False
        if path.startswith("["):
            connection = self.connect(**keys)
        else:
            keys.pop("read_only", None)
            connection = self.connect_local(**keys)
        opened = self.open(connection, path, (0 if writing else 4) if flags is None else flags)
        yield opened
        opened.close()
        self.check("Disconnect", connection)


def main() -> None:
    channel = Channel(int(sys.argv[1]))
    job = channel.receive()
    try:
        client = Client(job["libdir"], channel)
        if job["init"]:
            client.init(job["config"])
        names = dict(vars(vix), **globals())
        exec(compile(job["source"], job["file"], "exec"), names)
        answer = ("result", names[job["name"]](client, **job["arguments"]))
    except BaseException:
        answer = ("raised", traceback.format_exc())
    sys.stdout.flush()
    channel.send(answer)
    os._exit(0)


if __name__ == "__main__":
    main()
