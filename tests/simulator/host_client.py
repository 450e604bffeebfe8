"""A site to serve, its host process, and a client that speaks common/wire.h with it."""

import itertools
import os
import shlex
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeVar

SECTOR = 512
HOLE = 0xFFFFFFFF
DEADLINE_S = 20.0

T = TypeVar("T")

LOGIN, LOGOUT, PREPARE, END_ACCESS, CLEANUP = range(1, 6)
OPEN, READ, WRITE, FLUSH, QUERY, MAP, METADATA, CLOSE = range(6, 14)

REQUEST = struct.Struct("=IIQQQ")
REPLY = struct.Struct("=IIQII")
SEGMENT = struct.Struct("=IIQQ")

READ_ONLY = 4


def pack(*values: int | str | bytes | None) -> bytes:
    """A body: integers as u64, text as strings, bytes as they are."""
    body = b""
    for value in values:
        if isinstance(value, bytes):
            body += value
        elif isinstance(value, int):
            body += struct.pack("=Q", value)
        elif value is None:
            body += struct.pack("=I", 0xFFFFFFFF)
        else:
            text = value.encode()
            body += struct.pack("=I", len(text)) + text + b"\0"
    return body


class Body:
    """Takes the values of a body one after the other."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def number(self) -> int:
        (value,) = struct.unpack_from("=Q", self.raw)
        self.raw = self.raw[8:]
        return int(value)

    def text(self) -> str | None:
        (length,) = struct.unpack_from("=I", self.raw)
        if length == 0xFFFFFFFF:
            self.raw = self.raw[4:]
            return None
        text = self.raw[4 : 4 + length].decode()
        self.raw = self.raw[5 + length :]
        return text


class Refused(Exception):
    def __init__(self, code: int, why: str | None) -> None:
        super().__init__(f"error {code}: {why}")
        self.code = code
        self.why = why


@dataclass
class Reply:
    op: int
    error: int
    request: int
    body: bytes
    fds: list[int] = field(default_factory=list)

    def checked(self) -> "Reply":
        if self.error:
            raise Refused(self.error, Body(self.body).text() if self.body else None)
        return self


class Peer:
    """One connection, synchronous; requests can be sent without awaiting their answers."""

    def __init__(self, site: Path, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE_S)
        folder = os.open(site / ".sim", os.O_PATH)
        try:  # the path of the site may be longer than a socket's address
            self.socket.connect(f"/proc/self/fd/{folder}/{name}")
        finally:
            os.close(folder)
        self.ids = itertools.count(1)
        self.buffer = b""
        self.fds: list[int] = []

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """As the kernel does for a client that is killed."""
        self.socket.close()
        for fd in self.fds:
            with suppress(OSError):
                os.close(fd)
        self.fds = []

    def send(self, op: int, body: bytes = b"", start: int = 0, count: int = 0) -> int:
        number = next(self.ids)
        self.socket.sendall(REQUEST.pack(op, len(body), number, start, count) + body)
        return number

    def _receive(self, count: int) -> bytes:
        while len(self.buffer) < count:
            data, fds, _, _ = socket.recv_fds(self.socket, 1 << 20, 64)
            self.fds += fds
            if not data:
                raise EOFError("the host has closed the connection")
            self.buffer += data
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def reply(self) -> Reply:
        op, error, number, size, fd_count = REPLY.unpack(self._receive(REPLY.size))
        body = self._receive(size)
        for _ in range(max(0, (fd_count - 1) // 64)):
            assert self._receive(1) == b"+"
        fds, self.fds = self.fds[:fd_count], self.fds[fd_count:]
        assert len(fds) == fd_count
        return Reply(op, error, number, body, fds)

    def ask(self, op: int, body: bytes = b"", start: int = 0, count: int = 0) -> Reply:
        number = self.send(op, body, start, count)
        reply = self.reply()
        assert (reply.request, reply.op) == (number, op)
        return reply.checked()

    def code(self, op: int, body: bytes = b"", start: int = 0, count: int = 0) -> int:
        self.send(op, body, start, count)
        return self.reply().error


@dataclass
class Login:
    peer: Peer
    session: int


@dataclass
class Disk:
    """An open disk; over a network transport it can read."""

    peer: Peer
    capacity: int
    links: int
    host: str | None
    local: bool
    redo: bool
    metadata: dict[str, str | None]
    files: list[tuple[str, bool]]
    fds: list[int]
    segments: list[tuple[int, int, int, int]]

    def read(self, start: int, count: int) -> bytes:
        return self.data(self.peer.ask(READ, start=start, count=count))

    def data(self, reply: Reply) -> bytes:
        result = b""
        for file, _, offset, length in SEGMENT.iter_unpack(reply.checked().body):
            piece = b"" if file == HOLE else os.pread(self.fds[file], length, offset)
            result += piece.ljust(length, b"\0")
        return result

    def write(self, start: int, data: bytes) -> None:
        self.peer.ask(WRITE, data, start, len(data) // SECTOR)

    def allocated(self, start: int, count: int, chunk: int = 128) -> list[tuple[int, int]]:
        reply = self.peer.ask(QUERY, pack(chunk), start, count)
        return [(offset, length) for _, _, offset, length in SEGMENT.iter_unpack(reply.body)]

    def close(self) -> None:
        self.release()
        self.peer.ask(CLOSE)
        self.peer.end()

    def die(self) -> None:
        self.release()
        self.peer.end()

    def release(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def read_map(fd: int, count: int) -> list[tuple[int, int, int, int]]:
    raw = os.pread(fd, count * SEGMENT.size, 0)
    assert len(raw) == count * SEGMENT.size
    return [(f, link, offset, length) for f, link, offset, length in SEGMENT.iter_unpack(raw)]


def disk_of(peer: Peer, reply: Reply) -> Disk:
    body = Body(reply.body)
    capacity, _, links = body.number(), body.number(), body.number()
    for _ in range(3):
        body.number()
    body.text()
    body.text()
    assert (body.number(), body.number()) == (SECTOR, SECTOR)
    host, local, redo = body.text(), body.number(), body.number()
    metadata = {str(body.text()): body.text() for _ in range(body.number())}
    files = [(str(body.text()), body.number() == 1) for _ in range(body.number())]
    count = body.number()
    assert body.raw == b""
    disk = Disk(peer, capacity, links, host, local == 1, redo == 1, metadata, files, reply.fds, [])
    if count:
        disk.segments = read_map(disk.fds[0], count)
        os.close(disk.fds.pop())
    return disk


Event = dict[str, str]


class Host:
    """A running host process and the site it serves."""

    def __init__(self, site: Path, process: subprocess.Popen[str]) -> None:
        self.site = site
        self.process = process
        self.peers: list[Peer] = []

    def connect(self, name: str) -> Peer:
        peer = Peer(self.site, name)
        self.peers.append(peer)
        return peer

    def configure(self, *lines: str) -> None:
        configure(self.site, *lines)

    def login(
        self,
        vm: str | None = "vm-1",
        snapshot: str | None = None,
        *,
        user: str = "root",
        password: str = "secret",
        cookie: str | None = None,
        read_only: bool = False,
        release: int = 80,
        tmp: str | None = "/tmp/own",
    ) -> Login:
        peer = self.connect("vim.sock")
        spec = f"moref={vm}" if vm and "?" not in vm else vm
        reply = peer.ask(
            LOGIN,
            pack(os.getpid(), release, user, password, cookie, spec, snapshot, int(read_only), tmp),
        )
        return Login(peer, Body(reply.body).number())

    def open(
        self,
        login: Login | int,
        path: str = "[ds1] web/web.vmdk",
        *,
        write: bool = False,
        transport: str = "nbd",
        thumbprint: str | None = None,
        buffer_bytes: int = 0,
        buffers: int = 0,
    ) -> Disk:
        session = login if isinstance(login, int) else login.session
        peer = self.connect("nfc.sock")
        flags = 0 if write else READ_ONLY
        body = pack(session, path, flags, transport, thumbprint, 902, buffer_bytes, buffers)
        try:
            return disk_of(peer, peer.ask(OPEN, body))
        except BaseException:
            peer.end()
            raise

    def events(self, name: str = "") -> list[Event]:
        log = (self.site / ".sim" / "events.log").read_text(encoding="utf-8")
        found = []
        for line in log.splitlines():
            parts = shlex.split(line)
            event = dict(part.partition("=")[::2] for part in parts[3:])
            if not name or parts[2] == name:
                found.append(event | {"name": parts[2]})
        return found

    def await_event(self, name: str, **wanted: str) -> Event:
        def found() -> Event | None:
            matching = [
                event
                for event in self.events(name)
                if all(event.get(key) == value for key, value in wanted.items())
            ]
            return matching[-1] if matching else None

        return until(found, f"event {name} {wanted}")


def until(check: Callable[[], T | None], what: str) -> T:
    deadline = time.monotonic() + DEADLINE_S
    while (result := check()) is None or result is False:
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.002)
    return result


def configure(site: Path, *lines: str) -> None:
    fresh = site / "sim.conf.new"
    fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    fresh.rename(site / "sim.conf")


@contextmanager
def serving(program: Path, site: Path, *, preserve: bool = False) -> Iterator[Host]:
    process = subprocess.Popen(
        [program, site], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        host = Host(site, process)
        try:
            yield host
        finally:
            for peer in host.peers:
                peer.end()
        if process.poll() is None:
            process.terminate()
        _, errors = process.communicate(timeout=DEADLINE_S)
        if not preserve:
            assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.communicate()
