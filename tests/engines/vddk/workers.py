"""Real workers on the simulator, asked over the protocol, some with a guard of ours taken out.

Each is a process of its own: the library can be initialised once in a process, and may crash it.
"""

import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any
from unittest import mock

import msgspec

from tests.simulator.kit import Kit
from vddkfs.engines import protocol, spawn
from vddkfs.engines.base import SECTOR, Description, LinkIdentity, Renewal
from vddkfs.engines.config import VddkConfig, VddkImage
from vddkfs.engines.output import parse_line
from vddkfs.engines.protocol import MapQuery, Op

USER, PASSWORD = "operator", "S3cr3t-probe &%/+ü"
SECONDS = 30.0
CHUNK = 8 * 1024 * 1024

PLAIN = VddkImage("[ds1] plain/plain.vmdk", live=True)
BASE = VddkImage("[ds1] web01/web01.vmdk", "snapshot-1")
MIDDLE = VddkImage("[ds1] web01/web01-000001.vmdk", "snapshot-2")
LEAF = VddkImage("[ds1] web01/web01-000002.vmdk", live=True)
LOCAL = VddkImage("[local1] local/local.vmdk", live=True)
_VMS = {"web01": "vm-16", "plain": "vm-17", "local": "vm-18"}

SCSI = "from vddkfs.engines.vddk import session; session.SCSI_DISKS = '/'"
"""Not a guard taken out: what a proxy with SCSI disks looks like, on any machine."""


def command(patch: str) -> Callable[[socket], list[str]]:
    """Return what starts a worker that runs *patch* before anything else."""
    code = f"{patch}\nimport sys\nfrom vddkfs.engines.worker import main\nmain(sys.argv[1:])"

    def words(theirs: socket) -> list[str]:
        numbers = [str(theirs.fileno()), str(os.getpid())]
        return [sys.executable, "-I", "-X", "utf8", "-c", code, *numbers]

    return words


@contextmanager
def patched(patch: str) -> Iterator[None]:
    """Have every worker that is started meanwhile run *patch* first."""
    with mock.patch.object(spawn, "_command", command(patch)):
        yield


def credentials(text: str = f"user={USER}\npassword={PASSWORD}\n") -> int:
    """Return a descriptor of credentials; the caller closes it."""
    return protocol.memfd_with(text.encode())


def configured(kit: Kit, *images: VddkImage, **more: Any) -> VddkConfig:
    """Return the configuration of a worker on *images* of one VM of *kit*."""
    folder = images[0].path.partition("] ")[2].partition("/")[0]
    values: dict[str, Any] = {
        "images": images,
        "tmp_directory": str(kit.path / "worker"),
        "server": "vcenter",
        "vmx_spec": f"moref={_VMS.get(folder, 'vm-17')}",
        "transports": ("nbdssl",),
        "libdir": str(kit.path),
        "shared_directory": str(kit.path / "shared"),
        "keepalive": 0.0,
    }
    return VddkConfig(**(values | more))


class Died(Exception):
    """The worker ended instead of answering; *code* as subprocess has it."""

    def __init__(self, code: int, output: str) -> None:
        super().__init__(f"the worker ended with {code}: {output}")
        self.code = code


class Worker:
    """One worker. What it says goes to a file; *said* are its lines so far."""

    def __init__(self, kit: Kit, patch: str = "", login: str = "") -> None:
        number = len(list(kit.path.glob("worker-*.log")))
        self.log = kit.path / f"worker-{number}.log"
        output = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with patched(patch):
                self.sock, self.process = spawn.spawn(output)
        finally:
            os.close(output)
        self.sock.settimeout(SECONDS)
        self.last_id = 0
        self._area: mmap.mmap | None = None
        self._secret = credentials(login) if login else credentials()

    # What it is asked.

    def ask(self, op: int, body: bytes = b"", fd: int = -1, **fields: int) -> None:
        """Send a request and do not wait."""
        self.last_id += 1
        header = protocol.request_header(Op(op), self.last_id, **fields)
        protocol.send(self.sock, header, body, fd=fd)

    def answer(self) -> bytes:
        """Return the body of the next answer. Raises what the worker tells, and Died."""
        return self._next_answer()[1]

    def answered(self) -> int:
        """Return the id of the request that is answered next: the last one has *last_id*."""
        return self._next_answer()[0]

    def _next_answer(self) -> tuple[int, bytes]:
        try:
            packet, fd = protocol.receive(self.sock)
        except ConnectionResetError:
            packet, fd = b"", -1
        if not packet:
            raise Died(self.process.wait(SECONDS), self.text)
        status, number = protocol.REPLY.unpack_from(packet)[3:]
        body = protocol.body_of(packet, protocol.REPLY.size, fd)
        if status:
            raise protocol.decode_error(body, status)
        return number, body

    def call(self, op: int, body: bytes = b"", fd: int = -1, **fields: int) -> bytes:
        """Send a request and return the body of its answer."""
        self.ask(op, body, fd, **fields)
        return self.answer()

    def open(self, config: VddkConfig) -> tuple[LinkIdentity, ...]:
        """Have the images opened."""
        body = self.call(Op.OPEN, protocol.encode(config), self._secret)
        return protocol.decode_identities(body)

    def describe(self, config: VddkConfig) -> Description:
        """Have the images looked at."""
        body = self.call(Op.DESCRIBE, protocol.encode(config), self._secret)
        return msgspec.msgpack.decode(body, type=Description)

    def revalidate(self) -> tuple[LinkIdentity, ...]:
        """Have the images looked at again."""
        return protocol.decode_identities(self.call(Op.REVALIDATE))

    def renew(self) -> Renewal:
        """Have nothing kept of before."""
        return protocol.decode_renewal(self.call(Op.RENEW))

    def map(self, count: int, image: int = 0) -> bytes:
        """Have a part of the allocation map made."""
        return self.call(Op.MAP, protocol.encode(MapQuery(count)), image=image)

    def begin_read(self, sector: int, count: int, image: int = 0, *, direct: bool = False) -> None:
        """Ask for a read and do not wait; ``answer`` ends it."""
        if self._area is None:
            fd = os.memfd_create("chunk")
            os.ftruncate(fd, CHUNK)
            self._area = mmap.mmap(fd, CHUNK)
            self.call(Op.LEND, fd=fd, chunk=0, count=CHUNK)
            os.close(fd)
        flags = protocol.DIRECT if direct else 0
        self.ask(Op.READ, image=image, sector=sector, count=count, flags=flags)

    def read(self, sector: int, count: int, image: int = 0, *, direct: bool = False) -> bytes:
        """Return *count* sectors."""
        self.begin_read(sector, count, image, direct=direct)
        self.answer()
        assert self._area is not None
        return self._area[: count * SECTOR]

    # How it ends.

    def stop(self) -> int:
        """Have it end in good order, and return its exit code."""
        if self.process.poll() is None:
            self.ask(Op.STOP)
        return self.process.wait(SECONDS)

    def kill(self) -> None:
        """kill -9, and wait for its end."""
        self.process.kill()
        self.process.wait(SECONDS)

    def finish(self) -> None:
        """Leave nothing of it."""
        self.kill()
        self.sock.close()
        os.close(self._secret)

    # What it said.

    @property
    def text(self) -> str:
        """All of it, as it came out of the process."""
        return self.log.read_text(errors="backslashreplace")

    @property
    def said(self) -> list[tuple[int, str]]:
        """Level (of ``logging``) and text of each line."""
        return [parse_line(line) for line in self.log.read_bytes().splitlines()]

    def says(self, *words: str, level: int = 0) -> bool:
        """Say whether one line, at *level* if one is given, has all of *words*."""
        return any(
            all(word in text for word in words) and level in (0, found) for found, text in self.said
        )


Workers = Callable[..., Worker]


def entries(folder: Path) -> set[str]:
    """Return what is in a folder, nothing if it is not there."""
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
