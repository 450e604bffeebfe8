"""Writing to a hosted sparse extent: grains in place, and new ones at the file's end.

Source: VMware "Virtual Disk Format 5.0", section "Hosted Sparse Extents". The order of writes is
such that after a crash, or a power loss that any of the writes since the last barrier survived, the
file shows for each grain its old or its new content:

1. The header says that the file is in use (``uncleanShutdown``); barrier. Once.
2. New grains are written whole, and new tables as zeros, behind all that anything refers to.
3. Barrier (fdatasync): from here on they are on the disk. One for all new grains of a request.
4. The directories name the new tables, then the tables the new grains, the redundant one of each
   first: what readers use is never ahead of its copy.

What the last step wrote may reach the disk in any order: an entry leads to something complete or is
still what it was. A place is used once only, also where step 4 failed and was taken back: its entry
may be on the disk.

Nothing is remembered of the tables, so every request is checked against what the file says now.
"""

import errno
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import msgspec

from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.sparse import ENTRIES_PER_TABLE
from vddkfs.engines.vmdk.text import printable
from vddkfs.engines.vmdk.write.places import TABLE_SECTORS, Part, Places, Tables
from vddkfs.engines.vmdk.write.writable import WritableFile
from vddkfs.errors import EngineError

_UNCLEAN_BYTE = 72
_MAX_SECTORS = 1 << 32


class _Change(msgspec.Struct, frozen=True):
    """Bytes of a directory or table, from byte *offset* of the file on: *new* instead of *old*."""

    offset: int
    new: bytes
    old: bytes


class SparseWriter:
    """Writes the sectors of one hosted sparse extent of *sectors*, which begins at sector *start*
    of the image.

    *reserved* are the ranges of sectors of *file*, (first, end), where no grain can be. *forget* is
    called with the number of each grain table that was changed, before the write returns.

    Threads: ``write`` may be called by several at once. Allocations take turns; grains that have
    their place are written in parallel.
    """

    def __init__(
        self,
        file: WritableFile,
        layout: Layout,
        start: int,
        sectors: int,
        reserved: tuple[tuple[int, int], ...],
        forget: Callable[[int], None],
    ) -> None:
        self._file = file
        self._layout = layout
        self._grain = layout.grain
        self._start = start
        self._places = Places(file, layout, start, sectors, reserved)
        self._forget = forget
        self._lock = threading.Lock()
        self._turn = 0
        self._next = 0
        self._begun = False
        self._marked = False
        self._failed = False

    def check(self, sector: int, data: memoryview) -> None:
        """Accept every request: this extent can take any content."""

    def write(self, sector: int, data: memoryview) -> None:
        """Write *data* from *sector* of the image on, all in this extent.

        Raises EngineError. Damage is met before anything is written. Where the disk is full or
        fails, a part of the request may have been done, grain by grain, and the file may have
        grown; nothing refers to what is not there, and the same places are tried again.
        """
        try:
            self._write(sector - self._start, data)
        except EngineError:
            self._failed = True
            raise

    def prove(self) -> None:
        """Write the extent's first sector as it is, if it has a place.

        That is not the beginning of changes, so that the header says nothing of it. Nobody else
        writes yet.
        """
        parts = list(self._places.split(0, 512))
        self._places.find(parts)
        if parts[0].place:
            place = parts[0].place * 512
            self._file.write(self._file.read(512, place, self._start), place, self._start)

    def finish(self) -> None:
        """Say in the header that the file is complete, if this object said that it is not.

        For the end, after all was flushed. It stays if a write failed, or if it was so before.
        """
        if self._marked and not self._failed:
            self._file.write(b"\0", _UNCLEAN_BYTE, self._start)
            self._file.sync()
            self._marked = False

    def _write(self, relative: int, data: memoryview) -> None:
        parts = list(self._places.split(relative, len(data)))
        self._find(parts)
        absent = [
            part for part in parts if not part.place and not _is_zero(data[part.begin : part.end])
        ]
        if absent or any(part.place for part in parts):
            self._begin()
        if absent:
            with self._lock:
                self._allocate(absent, data)
        for place, begin, end in _runs(part for part in parts if part.place):
            sector = self._start + relative + begin // 512
            self._file.write(data[begin:end], place * 512, sector)

    def _find(self, parts: list[Part]) -> None:
        """Find the places of *parts*, without waiting for the lock if nothing changes meanwhile.

        What is read while it changes may be half of one entry and half of another. And a grain is
        not written in place before whoever allocated it had its table forgotten: a reader might
        miss what was written.
        """
        before = self._turn
        try:
            self._places.find(parts)
            settled = not before & 1 and before == self._turn
        except EngineError:
            settled = False
        if not settled:
            with self._lock:
                self._places.find(parts)

    def _begin(self) -> None:
        """Say in the header that the file is in use, before anything in it changes."""
        if self._begun:
            return
        with self._lock:
            if self._begun:
                return
            if self._file.read(1, _UNCLEAN_BYTE, self._start) == b"\0":
                self._file.write(b"\1", _UNCLEAN_BYTE, self._start)
                self._file.sync()
                self._marked = True
            self._begun = True

    # Allocating; the lock is held

    def _allocate(self, absent: list[Part], data: memoryview) -> None:
        """Give places to those of *absent* that still have none, with the content of *data*."""
        found = self._places.find(absent)
        new = [part for part in absent if not part.place]
        if not new:
            return
        for tables in found:
            if self._layout.spare_directory and bool(tables.primary) != bool(tables.spare):
                what = "only one of its table and the redundant one exists"
                raise self._places.damage(tables.parts[0].grain, what)
        sector = self._places.sector(new[0].grain)
        missing = sum(not tables.primary for tables in found)
        table_sectors = missing * TABLE_SECTORS * (2 if self._layout.spare_directory else 1)
        place = self._free_place()
        tables_at = place + len(new) * self._grain
        end = tables_at + table_sectors
        if end > _MAX_SECTORS:
            raise self._too_large(sector)
        self._file.write(self._content(new, data), place * 512, sector)
        if table_sectors:
            self._file.write(bytes(table_sectors * 512), tables_at * 512, sector)
        self._file.sync()
        self._next = end
        self._enter(self._changes(found, place, tables_at), found, sector)

    def _changes(self, found: list[Tables], place: int, tables_at: int) -> list[_Change]:
        """Return what enters the new grains, from sector *place* on, and the new tables."""
        changes = []
        for tables in found:
            new = [part for part in tables.parts if not part.place]
            if not tables.primary:
                tables.primary, tables_at = tables_at, tables_at + TABLE_SECTORS
                if self._layout.spare_directory:
                    tables.spare, tables_at = tables_at, tables_at + TABLE_SECTORS
                    named = self._layout.spare_directory * 512 + tables.number * 4
                    changes.append(_Change(named, _raw(tables.spare), bytes(4)))
                named = self._layout.directory * 512 + tables.number * 4
                changes.append(_Change(named, _raw(tables.primary), bytes(4)))
            runs = _entry_runs(new, place, self._grain)
            place += len(new) * self._grain
            for table in filter(None, (tables.spare, tables.primary)):
                changes += [_Change(table * 512 + at, entries, old) for at, entries, old in runs]
        return changes

    def _enter(self, changes: list[_Change], found: list[Tables], sector: int) -> None:
        """Make *changes* in their order, or none of them if the disk allows that much."""
        self._turn += 1
        done = 0
        try:
            for change in changes:
                done += 1
                self._file.write(change.new, change.offset, sector)
        except EngineError:
            for change in reversed(changes[:done]):
                with suppress(EngineError):
                    self._file.write(change.old, change.offset, sector)
            raise
        finally:
            for tables in found:
                self._forget(tables.number)
            self._turn += 1

    def _content(self, new: list[Part], data: memoryview) -> bytes | memoryview:
        """Return the grains of *new*, one behind the other, zeros where *data* has nothing."""
        size = self._grain * 512
        begin, end = new[0].begin, new[-1].end
        if new[-1].grain - new[0].grain + 1 == len(new) == (end - begin) / size:
            return data[begin:end]
        pieces: list[bytes | memoryview] = []
        for part in new:
            head, length = part.within * 512, part.end - part.begin
            pieces += bytes(head), data[part.begin : part.end], bytes(size - head - length)
        return b"".join(pieces)

    def _free_place(self) -> int:
        """Return the first sector for new grains: behind everything, at a multiple of a grain."""
        if not self._next:
            size = self._file.size()
            self._places.check_references(size)
            self._next = -(-size // 512)
        return -(-self._next // self._grain) * self._grain

    def _too_large(self, sector: int) -> EngineError:
        return EngineError(
            f"{printable(self._file.path)}: a sparse extent cannot grow beyond 2 TiB",
            advice="convert the disk to a flat one, or to one in pieces of 2 GiB",
            errno=errno.ENOSPC,
            link=self._file.link,
            sector=sector,
        )


def _raw(entry: int) -> bytes:
    return entry.to_bytes(4, "little")


def _entry_runs(new: list[Part], place: int, grain: int) -> list[tuple[int, bytes, bytes]]:
    """Return (byte in the table, entries, entries until now) of consecutive grains of *new*.

    They get places from *place* on, *grain* sectors each.
    """
    runs: list[tuple[int, bytes, bytes]] = []
    last = -1
    for part in new:
        entry, old = _raw(place), _raw(part.entry)
        if part.grain == last + 1 and runs:
            at, entries, until_now = runs[-1]
            runs[-1] = at, entries + entry, until_now + old
        else:
            runs.append((part.grain % ENTRIES_PER_TABLE * 4, entry, old))
        last, place = part.grain, place + grain
    return runs


def _is_zero(data: memoryview) -> bool:
    return data.tobytes() == bytes(len(data))


def _runs(parts: Iterable[Part]) -> Iterator[tuple[int, int, int]]:
    """Yield (sector of the file, begin, end) of *parts*, which have places, merged."""
    place = begin = end = 0
    for part in parts:
        here = part.place + part.within
        if end and part.begin == end and here == place + (end - begin) // 512:
            end = part.end
            continue
        if end:
            yield place, begin, end
        place, begin, end = here, part.begin, part.end
    if end:
        yield place, begin, end
