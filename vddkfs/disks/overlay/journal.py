"""The map file of a fork: a snapshot of the map, then what changed, transaction by transaction.

There are two files, ``map`` and ``map.next``, both with space for the largest map that the fork can
have now. When ``map`` is full, the map as it is goes to ``map.next``, which takes its name; the old
file becomes the next. So the map never wants space that is not there, however full the disk is.

    write all of map.next, barrier; link map as map.old; rename map.next to map; barrier of the
    folder; rename map.old to map.next

A crash leaves a transaction torn at most, the last, which was not acknowledged: it is cut off. A
torn one that is followed by others is damage; so is one that is missing before the mark that a
clean close leaves.
"""

import os
import secrets
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from vddkfs.disks.overlay.files import Files, failure, read_all, told, write_all
from vddkfs.disks.overlay.records import (
    CLOSED,
    ENTRY_BYTES,
    MOST_ENTRIES,
    PAGE,
    VERSION,
    Head,
    Header,
    decode,
    decode_head,
    decode_header,
    encode,
    enter,
    entered,
    transaction_bytes,
)
from vddkfs.disks.overlay.table import BLOCK, ZERO, Run
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import OverlayError

MAP: Final = "map"
_NEXT: Final = "map.next"
_OLD: Final = "map.old"
_STEP: Final = 1024 * 1024
ADVICE: Final = (
    "put its files back from a copy, or give up what was written: `vddkfs overlay discard`"
)

Apply = Callable[[int, int, int], object]


class Journal:
    """The map files in *folder*, of the fork with id *fork* of an image of *capacity* bytes.

    *room* is for how many bytes of changes there is space behind a snapshot, at least. ``create``
    or ``open`` comes first, ``close_files`` last. Not for several threads at once.
    """

    def __init__(self, files: Files, folder: str, fork: bytes, capacity: int, room: int) -> None:
        self.path = os.path.join(folder, MAP)
        self.clean = False
        self.compactions = 0
        """How often another file has become the map since this one was opened."""
        self._files = files
        self._folder = folder
        self._fork = fork
        self._capacity = capacity
        self._room = room
        self._fd = self._next_fd = -1
        self._reserved = self._next_reserved = 0
        self._generation = 0
        self._number = 1
        self._end = PAGE
        self._next_is = _NEXT

    # Opening

    def create(self) -> None:
        """Make the files of an empty map. Raises OverlayError."""
        with told(self.path, "making it"):
            self._fd = self._files.open(self.path, create=True)
            self._next_fd = self._files.open(self._name(_NEXT), create=True)
            self.reserve(0)
            self._write_snapshot(self._fd, self._reserved, [])
            # Where there are no hard links this fails now, and not when the file is full.
            self._files.link(self.path, self._name(_OLD))
            self._files.remove(self._name(_OLD))

    def open(self, apply: Apply, *, read_only: bool = False) -> None:
        """Call *apply* with each (block, count, place) that was entered, in order.

        Raises OverlayError if the map is damaged; *apply* may have been called then.
        """
        with told(self.path, "reading"):
            self._fd = self._files.open(self.path, read_only=read_only)
            self._reserved = self._files.size(self._fd)
            header = self._header()
            self._generation = header.generation
            self._replay(header, apply)
            if not read_only:
                self._open_next()
                # A killed process may have left the last transaction, and names, in memory only;
                # what is shown from now on must not go away.
                self._files.sync(self._fd)
                self._files.sync_folder(self._folder)

    def _header(self) -> Header:
        header = decode_header(self._read(0, PAGE)) if self._reserved >= PAGE else None
        if header is None:
            raise self._damage(0, "the header is no header of a map, or its checksum is wrong")
        if (header.version, header.block) != (VERSION, BLOCK):
            raise OverlayError(
                f"{printable(self.path)}: version {header.version} with blocks of {header.block} "
                f"bytes; this release knows version {VERSION} with {BLOCK}",
                advice="use the release that made it",
            )
        if header.fork != self._fork or header.capacity != self._capacity:
            raise self._damage(0, "it is the map of another fork")
        if self._reserved < header.reserved:
            what = f"the file ends at byte {self._reserved} and was {header.reserved} bytes long"
            raise self._damage(self._reserved, what)
        return header

    def _replay(self, header: Header, apply: Apply) -> None:
        while True:
            head, entries = self._transaction()
            if head is None or entries is None:
                break
            self.clean = bool(head.flags & CLOSED)
            for block, count, place in entered(entries):
                if (block + count - 1) * BLOCK >= self._capacity:
                    raise self._damage(self._end, "an entry is beyond the end of the image")
                apply(block, count, place)
            self._number += 1
            self._end += head.size
        if self._end < header.snapshot_end:
            raise self._damage(self._end, "the checksum is wrong")
        later = self._later()
        if later:
            what = f"the checksum is wrong, and {later} good transactions follow"
            raise self._damage(self._end, what)

    def _transaction(self) -> "tuple[Head, array[int]] | tuple[None, None]":
        """Return the next transaction, or Nones if there is no good one."""
        head = self._head(self._end)
        if head is None or head.number != self._number or self._end + head.size > self._reserved:
            return None, None
        entries = decode(head, self._read(self._end, head.size))
        return (None, None) if entries is None else (head, entries)

    def _later(self) -> int:
        """Return how many good transactions there are behind the end, where none must be."""
        found, at = 0, self._end
        while at < self._reserved:
            chunk = self._read(at, min(_STEP, self._reserved - at))
            for offset in range(0, len(chunk), PAGE):
                head = decode_head(chunk[offset : offset + PAGE], self._fork, self._generation)
                if head is not None and head.number > self._number:
                    whole = at + offset + head.size <= self._reserved
                    good = whole and decode(head, self._read(at + offset, head.size)) is not None
                    found += good
            at += len(chunk)
        return found

    def _head(self, at: int) -> Head | None:
        if at + PAGE > self._reserved:
            return None
        return decode_head(self._read(at, PAGE), self._fork, self._generation)

    def _open_next(self) -> None:
        """Open or make ``map.next``; a crash may have left it missing, and an old map beside it."""
        names = self._files.names(self._folder)
        if _OLD in names:
            self._files.remove(self._name(_OLD))
        self._next_fd = self._files.open(self._name(_NEXT), create=_NEXT not in names)
        self._next_reserved = self._files.size(self._next_fd)

    def close_files(self) -> None:
        """Close the descriptors."""
        for fd in (self._fd, self._next_fd):
            if fd >= 0:
                with suppress(OSError):
                    self._files.close(fd)
        self._fd = self._next_fd = -1

    # Writing

    def reserve(self, runs: int) -> None:
        """Have space for a map of *runs* in both files, also after a crash. Raises OSError."""
        needed = self._needed(runs)
        if self._reserved < needed:
            needed = max(needed, self._reserved + self._room if runs else 0)
            self._files.allocate(self._fd, self._reserved, needed - self._reserved)
            self._files.sync(self._fd)
            self._reserved = needed
        if self._next_reserved < self._reserved:
            more = self._reserved - self._next_reserved
            self._files.allocate(self._next_fd, self._next_reserved, more)
            self._files.sync(self._next_fd)
            self._next_reserved = self._reserved

    def missing(self, runs: int) -> int:
        """Return how many bytes ``reserve`` would allocate, about."""
        needed = self._needed(runs)
        return max(0, needed - self._reserved) + max(0, needed - self._next_reserved)

    def _needed(self, runs: int) -> int:
        """Return the size of a file for a snapshot of *runs*, and half as much of changes."""
        overhead = (runs // MOST_ENTRIES + 1) * 2 * PAGE
        needed = PAGE + runs * ENTRY_BYTES * 3 // 2 + overhead + self._room
        return -(-needed // PAGE) * PAGE

    def fits(self, entries: int) -> bool:
        """Say whether a transaction of *entries* has its place in the file."""
        return self._end + transaction_bytes(entries) <= self._reserved

    def append(self, entries: "array[int]", flags: int = 0) -> None:
        """Write a transaction, barrier. Raises OSError; it may be there then, and is overwritten.

        What it refers to is on the disk already.
        """
        head = Head(self._fork, self._generation, self._number, len(entries) // 2, flags)
        write_all(self._files, self._fd, encode(head, entries), self._end)
        self.sync(self._fd)
        self._number += 1
        self._end += head.size

    def sync(self, fd: int) -> None:
        """Barrier for the file *fd*. Raises OverlayError: a failed flush cannot be repaired."""
        try:
            self._files.sync(fd)
        except OSError as error:
            raise failure(self.path, "flushing", error) from error

    def compact(self, leaves: Iterable[list[Run]], barrier: Callable[[], None]) -> None:
        """Go on in the other file, which begins with the runs of *leaves*.

        *barrier* is called when they have been read, and returns when the data that they refer to
        are on the disk. Raises OSError if it cannot be done, and then ``map`` is as it was;
        OverlayError if a flush failed.
        """
        number, end, generation = self._number, self._end, self._generation
        try:
            # Never that of an attempt that came to nothing, here or before a crash: the file may
            # have good transactions of that one behind those that are written now.
            self._generation = secrets.randbits(64)
            self._write_snapshot(self._next_fd, self._next_reserved, leaves, barrier)
            self._name_next()
            with suppress(FileNotFoundError):
                self._files.remove(self._name(_OLD))
            self._files.link(self.path, self._name(_OLD))
            self._files.rename(self._name(_NEXT), self.path)
        except BaseException:
            # A map.next of this generation may be complete: it must never be taken for the map.
            self._number, self._end, self._generation = number, end, generation
            raise
        self._fd, self._next_fd = self._next_fd, self._fd
        self._reserved, self._next_reserved = self._next_reserved, self._reserved
        self._next_is = _OLD
        self.compactions += 1
        try:
            self._files.sync_folder(self._folder)
        except OSError as error:
            raise failure(self.path, "flushing its folder", error) from error
        # All is on the disk; the name is for the next time.
        with suppress(OSError):
            self._name_next()

    def _name_next(self) -> None:
        """Let the file that is not the map be called ``map.next``."""
        if self._next_is == _OLD:
            self._files.rename(self._name(_OLD), self._name(_NEXT))
            self._next_is = _NEXT

    def _write_snapshot(
        self,
        fd: int,
        reserved: int,
        leaves: Iterable[list[Run]],
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        self._number, self._end = 1, PAGE
        entries = array("Q")
        for runs in leaves:
            for run in runs:
                enter(entries, run.block, run.blocks, run.place, ZERO)
            if len(entries) // 2 >= MOST_ENTRIES:
                self._write_part(fd, entries)
                entries = array("Q")
        if entries:
            self._write_part(fd, entries)
        barrier()
        reserved = max(reserved, self._end)
        header = Header(self._fork, self._capacity, self._generation, self._end, reserved)
        write_all(self._files, fd, header.encode(), 0)
        self.sync(fd)

    def _write_part(self, fd: int, entries: "array[int]") -> None:
        head = Head(self._fork, self._generation, self._number, len(entries) // 2)
        write_all(self._files, fd, encode(head, entries), self._end)
        self._number += 1
        self._end += head.size

    def _read(self, at: int, size: int) -> bytes:
        raw = bytearray(size)
        read_all(self._files, self._fd, memoryview(raw), at)
        return bytes(raw)

    def _name(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _damage(self, at: int, what: str) -> OverlayError:
        return OverlayError(
            f"{printable(self.path)}: damaged at byte {at}: {what}",
            advice=ADVICE,
        )
