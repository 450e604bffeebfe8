"""One question to the library, in a process of its own.

Started as ``python -I -m vddkfs.doctor.questions PARENT_PID SECRET_FD`` with a ``Job`` on stdin.
Answers are lines of JSON on stdout, each out before the next call of the library is made, so that a
crash leaves what was answered before it. What the library prints and logs goes to stderr, redacted;
so is every answer.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from vddkfs.engines.base import SECTOR
from vddkfs.engines.config import VddkConfig
from vddkfs.engines.output import WorkerOutput
from vddkfs.engines.vddk import configuration, layouts
from vddkfs.engines.vddk.calls import CALLS, PREFIX
from vddkfs.engines.vddk.codes import VixFailure
from vddkfs.engines.vddk.completions import Pending
from vddkfs.engines.vddk.connection import Connection
from vddkfs.engines.vddk.kit import find_kit
from vddkfs.engines.vddk.layouts import MIN_CHUNK, OpenFlag
from vddkfs.engines.vddk.library import Library
from vddkfs.engines.vddk.messages import LEVELS
from vddkfs.engines.vddk.native import Pointer
from vddkfs.engines.vddk.params import ConnectSpec, SessionCookie, UserPassword
from vddkfs.engines.vddk.secrets import Credentials, leave_no_core, read_credentials
from vddkfs.engines.worker import die_with_parent
from vddkfs.errors import VddkfsError
from vddkfs.observe.redact import Redactor

CALLBACK_SECONDS: Final = 20.0
_BIG: Final = 2048
_CODES: Final = (0, 1, 13, 14009, 14014, 16007, 25000, 26000, 12345, 0x5_0000_0004)
_VERSIONS: Final = ((9, 0), (8, 0), (7, 0), (6, 7), (6, 5), (6, 0), (5, 5))


class Job(msgspec.Struct, frozen=True):
    """What is asked, of which library, and of which disk: the first image of *config*."""

    question: str
    config: VddkConfig


class Bench:
    """The library that is asked. *tell* gives an answer."""

    def __init__(
        self, job: Job, credentials: Credentials, tell: Callable[[str, Any], None]
    ) -> None:
        self.config = job.config
        self.tell = tell
        self._credentials = credentials
        self.say: Callable[[str, str], None] = lambda level, text: None
        self.library: Library

    def load(self) -> Library:
        """Load the library."""
        kit = find_kit(self.config.libdir)
        self.library = Library(kit, log=lambda level, text: self.say(level, text))
        return self.library

    def write_configuration(self) -> str:
        """Write the configuration file that the library is given, and return its path."""
        folder = Path(self.config.tmp_directory)
        theirs = self.config.vddk_config
        operators = configuration.read_operators(theirs) if theirs else ""
        path = folder / "vddk.conf"
        configuration.write(configuration.generate(str(folder), operators), path)
        return str(path)

    def initialise(self) -> Library:
        """Load and initialise the library."""
        self.load().init(self.write_configuration())
        return self.library

    def connect(self) -> Connection:
        """Connect as a mount would; nothing is attached."""
        config, found = self.config, self._credentials
        if not config.server:
            return Connection(self.library, ConnectSpec())
        login: UserPassword | SessionCookie = UserPassword(found.user, found.password)
        if found.cookie:
            login = SessionCookie(found.cookie, found.user, found.password)
        spec = ConnectSpec(
            server=config.server,
            vmx_spec=config.vmx_spec,
            thumbprint=config.thumbprint,
            credentials=login,
            snapshot=config.images[0].snapshot,
            transports=config.transports,
            port=config.port,
            nfc_port=config.nfc_port,
        )
        return Connection(self.library, spec)


class Disk:
    """An open disk, by the library's own pointer: errors are answers here."""

    def __init__(self, bench: Bench, connection: Connection) -> None:
        path = bench.config.images[0].path
        self.tell = bench.tell
        self.library = bench.library
        self.native = bench.library.native
        self.pointer: Pointer = connection.open_raw(path, OpenFlag.READ_ONLY)
        code, info = self.native.info(self.pointer)
        self.library.check(code, "GetInfo", path)
        assert info is not None
        self.info = info

    def read(self, start: int, count: int) -> int:
        """Call Read; return its code."""
        buffer = self.native.buffer(memoryview(bytearray(count * SECTOR)), True)
        return self.native.call("Read", self.pointer, start, count, buffer)

    def close(self, connection: Connection) -> None:
        """Close the disk and the connection."""
        self.tell("close", self.native.call("Close", self.pointer))
        connection.disconnect()


class AsyncRead:
    """One ReadAsync: what it *returned*, and what came of it."""

    def __init__(self, disk: Disk, start: int, count: int) -> None:
        self._called = threading.Event()
        self.code = -1
        self.thread = 0
        caller = threading.get_ident()
        self._memory = memoryview(bytearray(count * SECTOR))
        buffer = disk.native.buffer(self._memory, True)
        pending = Pending(PREFIX + "ReadAsync", id(disk), 0, self._done, lambda: None)
        key = disk.library.completions.add(pending)
        self.returned = disk.native.begin("ReadAsync", disk.pointer, start, count, buffer, key)
        self.inside = self._called.is_set() and self.thread == caller

    def _done(self, code: int) -> None:
        self.code, self.thread = code, threading.get_ident()
        self._called.set()

    @property
    def complete(self) -> bool:
        """Whether its callback has come."""
        return self._called.is_set()

    def wait(self) -> bool:
        """Wait for the callback, and say whether it came."""
        return self._called.wait(CALLBACK_SECONDS)


# The questions about the library alone.


def _ask_functions(bench: Bench) -> None:
    library = bench.load()
    release = library.kit.release
    bench.tell("release", library.kit.release_text)
    names = [call.name.removeprefix(PREFIX) for call in CALLS]
    bench.tell("absent", [name for name in names if not library.has(name)])
    bench.tell("connect_params_bytes", 128 if layouts.has_long_params(release) else 80)
    bench.tell("info_bytes", 64 if layouts.has_sector_sizes(release) else 56)
    bench.tell("not_loaded", sorted(library.loaded.failed))


def _ask_version(major: int, minor: int) -> Callable[[Bench], None]:
    def ask(bench: Bench) -> None:
        library = bench.load()
        path = bench.write_configuration()
        bench.tell("init", library.native.init(major, minor, str(library.kit.libdir), path))

    return ask


def _ask_transports(bench: Bench) -> None:
    library = bench.initialise()
    bench.tell("transports", list(library.transports()))
    bench.tell("accepted", ".".join(map(str, library.version or ())))
    bench.tell("build", library.build or "unknown")


def _ask_texts(bench: Bench) -> None:
    library = bench.initialise()
    for code in _CODES:
        bench.tell(str(code), library.error_text(code) or "no text")


# The questions about a disk.


def _ask_open(bench: Bench) -> None:
    library = bench.initialise()
    began = time.monotonic()
    connection = bench.connect()
    bench.tell("connect_seconds", round(time.monotonic() - began, 3))
    began = time.monotonic()
    disk = Disk(bench, connection)
    bench.tell("open_seconds", round(time.monotonic() - began, 3))
    bench.tell("transport", library.native.transport_mode(disk.pointer))
    info = disk.info
    bench.tell("capacity", info.capacity)
    bench.tell("links", info.links)
    bench.tell("adapter", info.adapter or "unknown")
    bench.tell("sector_bytes", [info.logical_sector_bytes, info.physical_sector_bytes])
    for name in ("GetMetadataKeys", "ReadMetadata"):
        if not library.has(name):
            bench.tell("metadata_keys", f"there is no {name}")
            break
    else:
        code, raw = library.native.metadata("GetMetadataKeys", disk.pointer, limit=1 << 20)
        keys = [key.decode(errors="backslashreplace") for key in raw.split(b"\0") if key]
        bench.tell("metadata_keys", keys if code == 0 else code)
    bench.tell("read_first_sector", disk.read(0, 1))
    disk.close(connection)


def _ask_async(bench: Bench) -> None:
    if not bench.initialise().has("ReadAsync"):
        bench.tell("returned", "there is no ReadAsync")
        return
    connection = bench.connect()
    disk = Disk(bench, connection)
    read = AsyncRead(disk, 0, 1)
    bench.tell("returned", read.returned)
    bench.tell("callback_came", read.wait())
    bench.tell("completed", read.code)
    bench.tell("inside_the_call", read.inside)
    bench.tell("wait", disk.native.call("Wait", disk.pointer))
    disk.close(connection)


def _ask_mixed(bench: Bench) -> None:
    if not bench.initialise().has("ReadAsync"):
        bench.tell("read", "there is no ReadAsync")
        return
    connection = bench.connect()
    disk = Disk(bench, connection)
    read = AsyncRead(disk, 0, min(_BIG, disk.info.capacity))
    bench.tell("was_under_way", not read.complete)
    bench.tell("read", disk.read(0, 1))
    bench.tell("callback_came", read.wait())
    bench.tell("read_after", disk.read(0, 1))
    disk.native.call("Wait", disk.pointer)
    disk.close(connection)


def _ask_past_end(bench: Bench) -> None:
    bench.initialise()
    connection = bench.connect()
    disk = Disk(bench, connection)
    capacity = disk.info.capacity
    bench.tell("last_sector", disk.read(capacity - 1, 1))
    bench.tell("at_the_end", disk.read(capacity, 1))
    bench.tell("across_the_end", disk.read(capacity - 1, 2))
    bench.tell("far_behind", disk.read(capacity * 1024, 1))
    disk.close(connection)


def _ask_blocks(bench: Bench) -> None:
    library = bench.initialise()
    if not library.has("QueryAllocatedBlocks"):
        bench.tell("query", "there is no QueryAllocatedBlocks")
        return
    connection = bench.connect()
    disk = Disk(bench, connection)
    capacity = disk.info.capacity
    tail = capacity % MIN_CHUNK
    whole = min(capacity - tail, MIN_CHUNK * layouts.MAX_CHUNKS)

    def query(key: str, start: int, count: int, chunk: int = MIN_CHUNK) -> None:
        code, blocks = library.native.allocated(disk.pointer, start, count, chunk)
        bench.tell(key, code)
        if code == 0:
            bench.tell(f"{key}_blocks", len(blocks))

    if whole:
        query("whole", 0, whole)
    query("unaligned_start", 1, MIN_CHUNK)
    query("unaligned_count", 0, MIN_CHUNK + 1)
    query("small_chunk", 0, MIN_CHUNK, MIN_CHUNK // 2)
    query("past_the_end", capacity - tail, MIN_CHUNK)
    bench.tell("tail_sectors", tail)
    if tail:
        query("tail", capacity - tail, tail)
    disk.close(connection)


class Question(NamedTuple):
    """*asks* is the question in words; some need a disk, and thus a SOURCE."""

    asks: str
    ask: Callable[[Bench], None]
    needs_disk: bool = False


QUESTIONS: Final[dict[str, Question]] = {
    "functions": Question("which functions are absent?", _ask_functions),
    **{
        f"init-{major}.{minor}": Question(
            f"does InitEx accept version {major}.{minor}?", _ask_version(major, minor)
        )
        for major, minor in _VERSIONS
    },
    "transports": Question("which transports does it list?", _ask_transports),
    "texts": Question("what are the texts of some codes?", _ask_texts),
    "open": Question("does the disk open, and what is told of it?", _ask_open, True),
    "read-async": Question("what does ReadAsync return, where is the callback?", _ask_async, True),
    "mixed": Question("a Read while a ReadAsync is under way?", _ask_mixed, True),
    "past-the-end": Question("reads past the end?", _ask_past_end, True),
    "allocated": Question("the bounds of QueryAllocatedBlocks?", _ask_blocks, True),
}
"""By name, in the order that they are asked in."""


def main(arguments: list[str]) -> int:
    """Answer the question on stdin."""
    die_with_parent(int(arguments[0]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    secret = int(arguments[1])
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    answers = os.dup(1)
    redactor = Redactor()

    def tell(key: str, value: Any) -> None:
        line = redactor.redact(json.dumps({key: value}))
        os.write(answers, line.encode() + b"\n")

    try:
        credentials = Credentials()
        if job.config.server and secret >= 0:
            leave_no_core()
            credentials = read_credentials(secret)
            redactor = Redactor(credentials.secrets)
    except VddkfsError as error:
        _tell_error(tell, error)
        os._exit(0)
    output = WorkerOutput(redactor)
    bench = Bench(job, credentials, tell)
    bench.say = lambda level, text: output.say(LEVELS.get(level, logging.INFO), text)
    code = 0
    try:
        QUESTIONS[job.question].ask(bench)
    except VddkfsError as error:
        _tell_error(tell, error)
    except BaseException:
        output.say(logging.ERROR, traceback.format_exc())
        code = 70
    output.close()
    # The library's threads still run; its own end at exit is no part of the question.
    os._exit(code)


def _tell_error(tell: Callable[[str, Any], None], error: VddkfsError) -> None:
    if isinstance(error, VixFailure):
        tell("code", error.code)
    tell("error", f"{error.message} ({error.cause})" if error.cause else error.message)
    tell("advice", error.advice)


if __name__ == "__main__":
    main(sys.argv[1:])
