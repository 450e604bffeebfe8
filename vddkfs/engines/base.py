"""What an engine is, seen from the worker process that runs it, and the words both ends share.

Units: a *sector* is 512 bytes everywhere in vddkfs; capacities, starts and counts of this module
are in sectors unless a name ends in ``_bytes``.

Images: an engine is opened on one chain, base first. Image ``n`` is the raw view composed of links
0 to ``n``; the mounted disk is the last image.

This module is used by the worker, so it imports neither trio nor pyfuse3 nor anything above
``engines/``.
"""

import socket
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

SECTOR = 512
"""Bytes in a sector: the unit of VMDK structures and of VDDK, whatever the guest's disk reports."""


class ExtentInfo(msgspec.Struct, frozen=True):
    """One extent of a link: *sectors* long, of the descriptor's *kind* (SPARSE, FLAT, VMFS,
    ZERO...).

    *path* is absolute, or empty for ZERO; *offset* is the first sector used in a flat file.
    *allocated_bytes* is what the file occupies on its file system (st_blocks * 512).
    """

    kind: str
    sectors: int
    access: str = "RW"
    path: str = ""
    offset: int = 0
    file_bytes: int = 0
    allocated_bytes: int = 0


class FileStamp(msgspec.Struct, frozen=True):
    """The identity of one file: it changes when the file is replaced or (ctime, mtime) written.

    A file inside an archive begins at byte *offset* of that, whose stamp it is but for the size.
    """

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    offset: int = 0


class LinkIdentity(msgspec.Struct, frozen=True):
    """What must stay equal while a frozen link is mounted (see the manual, Semantics).

    *files* holds a stamp of every file of the link, descriptor first. *content_id* is the VMDK's
    CID, eight hexadecimal digits. *problem* says what is wrong with a link that can be read in part
    only. Of a remote disk: the *snapshot* reference that it is reached by, the number of *links*
    that are composed, and its *uuid*.
    """

    path: str
    content_id: str
    capacity: int
    files: tuple[FileStamp, ...] = ()
    problem: str = ""
    snapshot: str = ""
    links: int = 0
    uuid: str = ""

    def replaced_by(self, other: "LinkIdentity") -> str:
        """Say how *other* is another disk altogether, or "" when only its content may have moved.

        A live link may be written by its owner: times, sizes and CID move. It must not be another
        file (path, device, inode) or have another capacity.
        """
        if self.path != other.path:
            return f"path {self.path} became {other.path}"
        if self.capacity != other.capacity:
            return f"capacity {self.capacity} became {other.capacity} sectors"
        if self.snapshot != other.snapshot:
            return f"snapshot {self.snapshot} became {other.snapshot}"
        if self.links != other.links:
            return f"it had {self.links} links and has {other.links}"
        if self.uuid != other.uuid:
            return f"uuid {self.uuid} became {other.uuid}"
        for mine, theirs in zip(self.files, other.files, strict=False):
            if (mine.path, mine.device, mine.inode) != (theirs.path, theirs.device, theirs.inode):
                return f"{mine.path} was replaced by another file"
        if len(self.files) != len(other.files):
            return f"it had {len(self.files)} files and has {len(other.files)}"
        return ""

    def change_to(self, other: "LinkIdentity", live: bool) -> str:
        """Say how *other* is not what was mounted, or "": a *live* link may be written."""
        return self.replaced_by(other) if live else self.difference(other)

    def difference(self, other: "LinkIdentity") -> str:
        """Say the first difference to *other* in words, or "" when they are equal."""
        replaced = self.replaced_by(other)
        if replaced:
            return replaced
        if self.content_id != other.content_id:
            return f"content id {self.content_id} became {other.content_id}"
        for mine, theirs in zip(self.files, other.files, strict=True):
            if mine != theirs:
                return f"{mine.path} was modified"
        return ""


class LinkInfo(msgspec.Struct, frozen=True):
    """One VMDK of a chain, as its descriptor and its files tell.

    *format* is the createType of the descriptor; *mtime_ns* the newest of the files' mtimes;
    *identity* what it was when it was described; *change_tracking* the name of the file in which
    the host tracks changes; *notes* are what an operator should know of its state.
    """

    path: str
    format: str
    capacity: int
    content_id: str
    parent_content_id: str
    parent_hint: str
    extents: tuple[ExtentInfo, ...]
    mtime_ns: int
    identity: LinkIdentity
    adapter: str = ""
    hardware_version: str = ""
    uuid: str = ""
    tools_version: str = ""
    change_tracking: str = ""
    notes: tuple[str, ...] = ()
    metadata: dict[str, str] = {}


class EngineFacts(msgspec.Struct, frozen=True):
    """What reads the disks: *version* (that of vddkfs if empty) and *build* of the *library* file,
    and the *transport* that the bytes come by."""

    version: str = ""
    build: str = ""
    library: str = ""
    transport: str = "file"


class CallCount(msgspec.Struct, frozen=True):
    """What one function of the library did: calls, failures, their seconds, bytes they moved.

    *buckets* are those of a Histogram of the calls' times.
    """

    name: str
    count: int
    failures: int
    seconds: float
    bytes: int
    buckets: tuple[int, ...] = ()


class EngineReport(msgspec.Struct, frozen=True):
    """What an engine tells for status: the *transports* in use, and its library's *calls*.

    *reads_in_c* counts the reads that took the way without Python.
    """

    transports: tuple[str, ...] = ()
    calls: tuple[CallCount, ...] = ()
    reads_in_c: int = 0


class Description(msgspec.Struct, frozen=True):
    """What a worker found out of the images that it was asked about: *links*, one for each."""

    links: tuple[LinkInfo, ...]
    facts: EngineFacts


class MapExtent(msgspec.Struct, frozen=True, array_like=True):
    """*count* sectors from *sector*; *data* is False where they are known to read as zeros."""

    sector: int
    count: int
    data: bool


class MapSlice(msgspec.Struct, frozen=True, array_like=True):
    """A part of an allocation map; *next_sector* is where the next query goes on (or the end)."""

    extents: tuple[MapExtent, ...]
    next_sector: int


class Step(msgspec.Struct, frozen=True):
    """What was done about old content in one *place* (see ``vddkfs.cache.coherence``), and to what.

    *done* is False where old content may be left. *told* says what was done, or why it was not.
    """

    place: str
    subject: str
    told: str
    seconds: float
    done: bool = True


class Renewal(msgspec.Struct, frozen=True):
    """What an engine did to know nothing of before, and what its images are now."""

    identities: tuple[LinkIdentity, ...]
    steps: tuple[Step, ...]


Done = Callable[[Exception | None], None]
"""Told once how a read ended, from any thread."""

Answer = Callable[[int, Exception | None], None]
"""Told once how the read with that request id ended."""


class Receiver(Protocol):
    """Receives in the worker's place, and serves reads by itself. For the worker's main thread."""

    def next(self) -> tuple[bytes, int]:
        """Return the next packet that the worker has to see, and the descriptor with it (or -1).

        Does meanwhile what the engine's ``tick`` does. An empty packet: the daemon is gone.
        """

    def lend(self, number: int, area: memoryview) -> None:
        """Let reads go to the chunk *number*."""

    def take_back(self, number: int) -> None:
        """Forget the chunk *number*; no read is under way."""


class Engine(Protocol):
    """What the worker's main thread asks of any engine. Any method may raise a VddkfsError.

    ``revalidate``, ``renew`` and ``close`` never overlap a read.
    """

    def identities(self) -> Sequence[LinkIdentity]:
        """Return what was opened, an identity for each image."""

    def map(self, image: int, sector: int, count: int, limit: int, seconds: float) -> MapSlice:
        """Return the allocation of [*sector*, *sector* + *count*), neighbours merged.

        Stops early after *limit* extents or about *seconds*, always after some progress.
        """

    def revalidate(self) -> Sequence[LinkIdentity]:
        """Drop what is kept of a live link, and return all identities as they are now.

        Looks at the paths again, so a replaced file shows. Raises if a link cannot be opened any
        more.
        """

    def renew(self) -> Renewal:
        """Know nothing of before: drop all that is kept of every image, frozen ones too.

        From the source up: what block devices of this machine keep, then what a library keeps, then
        tables. No read that begins later brings anything older than this call, but for what the
        steps say is not done. Raises as ``revalidate`` does.
        """

    def close(self) -> None:
        """Close everything. Called once."""


class AsyncEngine(Engine, Protocol):
    """An engine whose reads end by themselves. All methods run on the worker's main thread."""

    def start_read(
        self, image: int, sector: int, count: int, into: memoryview, direct: bool, done: Done
    ) -> None:
        """Begin to fill *into* with *count* sectors of *image* from *sector*; never short.

        *done* may be called before this returns. *into* belongs to the engine until then.
        """

    def start_write(self, sector: int, data: memoryview, done: Done) -> None:
        """Begin to write *data*, whole sectors, to the base from *sector* on.

        Only for an engine that was opened to be written. *done* may be called before this returns;
        *data* belongs to the engine until then. What *done* is told of may have been written in
        part if it is an error. Writes that overlap are never under way at once.
        """

    def start_flush(self, done: Done) -> None:
        """Begin to see to it that all writes that have ended are on the disk; tell *done*.

        An error says that writes may be lost, and the same flush is not worth another try.
        """

    def report(self) -> EngineReport:
        """Return what status shows of the engine."""

    def complain(self, text: str) -> None:
        """Say *text* where the daemon hears it, at once: this process is about to end."""

    def receiver(self, sock: socket.socket, answer: Answer) -> Receiver | None:
        """Return what is quicker than the worker at receiving from *sock*, None for nothing.

        It is the engine's, which ends its use in ``close``. Reads that it begins and does not
        answer are told to *answer*.
        """

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when ``tick`` has something to do."""

    def tick(self) -> float:
        """Do what is due, and return how many seconds the next thing is away (inf: nothing)."""

    def drain(self) -> None:
        """Return when no read and no write is under way, and no flush that minds what comes next.

        That may be: memory is taken back, images are looked at again, or all is closed.
        """


class BlockingEngine(Engine, Protocol):
    """An engine whose reads wait: they run on a pool of threads.

    ``read`` may be called from several threads at once. All other methods, and ``read_nowait``,
    are called from the worker's main thread only; ``write`` and ``flush`` by any thread, several at
    once, and beside reads.
    """

    @property
    def threads(self) -> int:
        """How many reads at once do good: more where they wait, fewer where they compute."""

    def read_nowait(
        self, image: int, sector: int, count: int, into: memoryview, direct: bool
    ) -> bool:
        """Fill *into* (*count* sectors) if that needs no waiting; say whether it was done.

        When False is returned *into* may have been partly written. *direct* asks that no cached
        table is used.
        """

    def read(self, image: int, sector: int, count: int, into: memoryview, direct: bool) -> None:
        """Fill *into* with *count* sectors of *image* from *sector*; it is never short."""

    def write(self, sector: int, data: memoryview) -> None:
        """Write *data*, whole sectors, to the base: see ``AsyncEngine.start_write``."""

    def flush(self) -> None:
        """Return when all writes that have returned are on the disk."""
