"""An open disk.

Units are sectors of 512 bytes; only whole sectors are read and written.

Threads: opening and closing is for the session thread. All other calls are for any thread, but
never for two at once: the caller sees to it, because only it knows its threads. Requests that
``read_async`` and ``write_async`` began may be under way in any number while the next call is made.
Over SAN, HotAdd and for local files they complete inside the call.
"""

from collections.abc import Iterable
from functools import partial
from types import TracebackType

from vddkfs.engines.base import SECTOR
from vddkfs.engines.vddk.calls import PREFIX
from vddkfs.engines.vddk.codes import VixFailure
from vddkfs.engines.vddk.completions import Done, Pending
from vddkfs.engines.vddk.connection import Connection
from vddkfs.engines.vddk.layouts import (
    MAX_CHUNK,
    MAX_CHUNKS,
    MIN_CHUNK,
    VIX_ASYNC,
    OpenFlag,
)
from vddkfs.engines.vddk.native import DiskInfo, Pointer
from vddkfs.errors import EngineError

MAX_METADATA_BYTES = 1 << 20
"""Of the list of keys, and of each value."""


class Handle:
    """A disk, opened when this is made. Raises VixFailure.

    *path* is ``[datastore] folder/name.vmdk`` as the snapshot's hardware list has it, or a local
    path. Buffers are memoryviews of bytes, of exactly *count* sectors; with UNBUFFERED they begin
    at an address that is a multiple of 512 (HotAdd needs it).
    """

    def __init__(
        self, connection: Connection, path: str, flags: OpenFlag = OpenFlag.READ_ONLY
    ) -> None:
        self.path = path
        self.flags = flags
        self._library = connection.library
        self._native = connection.library.native
        self._completions = connection.library.completions
        self._pointer: Pointer | None = connection.open_raw(path, flags)
        self._capacity = -1
        self._began = False
        """Whether anything asynchronous was ever begun: the library may still be at the end of a
        request whose completion has come."""

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _handle(self) -> Pointer:
        if self._pointer is None:
            raise ValueError(f"{self.path} is closed")
        return self._pointer

    def close(self) -> None:
        """Close the disk, after waiting for what is under way; once more does nothing.

        Raises VixFailure. A request that is under way even then keeps its buffer, and stays
        uncompleted: the library may still write there.
        """
        self._library.session_thread()
        if self._pointer is None:
            return
        if self._began and self._native.has("Wait"):
            try:
                self.wait()
            except VixFailure as error:
                self._library.messages.complain(str(error))
        pointer, self._pointer = self._pointer, None
        self._check(self._native.call("Close", pointer), "Close")

    def lent(self) -> int:
        """Return the address of the library's handle, for who begins requests past this class.

        None of them may be under way at the close, which waits for the library's end of them.
        """
        self._began = True
        return self._native.address(self._handle)

    @property
    def under_way(self) -> int:
        """How many asynchronous requests are not completed yet."""
        return self._completions.count(id(self))

    # What the disk is.

    def info(self) -> DiskInfo:
        """Return capacity, adapter and the like. Raises VixFailure."""
        code, info = self._native.info(self._handle)
        self._check(code, "GetInfo")
        if info is None:
            raise EngineError(f"{self.path}: VDDK told nothing about the disk")
        self._capacity = info.capacity
        return info

    def transport_mode(self) -> str:
        """Return the transport in use, such as nbdssl: not always one that was asked for (K08)."""
        return self._native.transport_mode(self._handle)

    def metadata(self) -> dict[str, str]:
        """Return the disk's metadata. Raises VixFailure; a key that goes away is left out."""
        for name in ("GetMetadataKeys", "ReadMetadata"):
            if not self._native.has(name):
                return {}
        code, raw = self._native.metadata("GetMetadataKeys", self._handle, limit=MAX_METADATA_BYTES)
        self._check(code, "GetMetadataKeys")
        found: dict[str, str] = {}
        for key in raw.partition(b"\0\0")[0].split(b"\0"):
            if key:
                code, value = self._native.metadata(
                    "ReadMetadata", self._handle, key, limit=MAX_METADATA_BYTES
                )
                if code == 0:
                    found[_plain(key)] = _plain(value.partition(b"\0")[0])
        return found

    def query_allocated(
        self, start: int, count: int, chunk: int = MIN_CHUNK
    ) -> list[tuple[int, int]]:
        """Return what is allocated in [*start*, *start* + *count*): (offset, length), in order.

        The library is asked for whole chunks of *chunk* sectors, as many at once as it takes; it
        may take minutes, so the caller asks for slices. What it cannot be asked, the end of a disk
        behind its last whole chunk, counts as allocated. Neighbours are merged. Raises VixFailure,
        or EngineError where the library has no such function.
        """
        if chunk % MIN_CHUNK or not MIN_CHUNK <= chunk <= MAX_CHUNK:
            raise ValueError(f"a chunk of {chunk} sectors cannot be asked for")
        self._library.require("QueryAllocatedBlocks")
        capacity = self._capacity if self._capacity >= 0 else self.info().capacity
        end = min(start + count, capacity)
        whole = capacity // chunk * chunk
        first = start // chunk * chunk
        last = min(-(-end // chunk) * chunk, whole)
        blocks: list[tuple[int, int]] = []
        while first < last:
            step = min(last - first, MAX_CHUNKS * chunk)
            code, found = self._native.allocated(self._handle, first, step, chunk)
            self._check(code, "QueryAllocatedBlocks")
            blocks += found
            first += step
        if whole < end:
            blocks.append((whole, end - whole))
        return merged(blocks, start, end)

    # Data.

    def read(self, start: int, count: int, buffer: memoryview) -> None:
        """Fill *buffer* with *count* sectors from *start*. Raises VixFailure."""
        self._transfer("Read", start, count, buffer)

    def write(self, start: int, count: int, buffer: memoryview) -> None:
        """Write *count* sectors at *start*. Raises VixFailure."""
        self._library.require("Write")
        self._transfer("Write", start, count, buffer)

    def read_async(self, start: int, count: int, buffer: memoryview, done: Done) -> None:
        """Begin to fill *buffer*; *done* is told the result once, perhaps before this returns.

        Raises VixFailure if the library did not take the request: *done* is not called then. *done*
        gets a code: make an error of it with Library.failure, on another thread.
        """
        self._library.require("ReadAsync")
        self._begin("ReadAsync", start, count, buffer, done)

    def write_async(self, start: int, count: int, buffer: memoryview, done: Done) -> None:
        """Begin to write *buffer*, which must not change before *done*; see read_async."""
        self._library.require("WriteAsync")
        self._begin("WriteAsync", start, count, buffer, done)

    def wait(self) -> None:
        """Wait until every asynchronous request of this handle is completed. Raises VixFailure."""
        self._library.require("Wait")
        self._check(self._native.call("Wait", self._handle), "Wait")
        self._completions.settle(id(self))

    def flush(self) -> None:
        """Make the source keep what was written. Raises VixFailure."""
        self._library.require("Flush")
        self._check(self._native.call("Flush", self._handle), "Flush")

    def _check(self, code: int, call: str) -> None:
        self._library.check(code, call, self.path)

    def _buffer(self, count: int, memory: memoryview, *, writable: bool) -> Pointer:
        if memory.nbytes != count * SECTOR or count <= 0:
            raise ValueError(f"a buffer of {memory.nbytes} bytes is not {count} sectors")
        buffer = self._native.buffer(memory, writable)
        if OpenFlag.UNBUFFERED in self.flags and self._native.address(buffer) % SECTOR:
            self._native.release(buffer)
            raise ValueError("unbuffered transfers need memory that is aligned to sectors")
        return buffer

    def _transfer(self, name: str, start: int, count: int, memory: memoryview) -> None:
        handle = self._handle
        buffer = self._buffer(count, memory, writable=name == "Read")
        try:
            code = self._native.call(name, handle, start, count, buffer, moved=count * SECTOR)
        finally:
            self._native.release(buffer)
        self._check(code, name)

    def _begin(self, name: str, start: int, count: int, memory: memoryview, done: Done) -> None:
        handle = self._handle
        buffer = self._buffer(count, memory, writable=name == "ReadAsync")
        release = partial(self._native.release, buffer)
        self._began = True
        key = self._completions.add(Pending(PREFIX + name, id(self), count * SECTOR, done, release))
        try:
            code = self._native.begin(name, handle, start, count, buffer, key)
        except BaseException:
            self._completions.withdraw(key, 1)
            raise
        if code == VIX_ASYNC:
            return
        if code == 0:
            self._completions.doubt(key)
        elif self._completions.withdraw(key, code):
            raise self._library.failure(code, name, self.path)
        else:
            self._library.messages.complain(
                f"{PREFIX}{name} gave {code} for a request that it had completed"
            )


def merged(blocks: Iterable[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Return *blocks* (offset, length) cut to [*start*, *end*), in order, neighbours as one."""
    result: list[tuple[int, int]] = []
    for offset, length in sorted(blocks):
        first, last = max(offset, start), min(offset + length, end)
        if first >= last:
            continue
        if result and first <= sum(result[-1]):
            before = result.pop()
            first, last = before[0], max(last, sum(before))
        result.append((first, last - first))
    return result


def _plain(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")
