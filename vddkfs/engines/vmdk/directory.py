"""From the number of a grain table to its entries, through the grain directory of an extent file.

Nothing is read at open: pages of the directory and tables come when they are asked for, so a disk
of 62 TiB costs no more than a small one.

Where a format keeps a redundant directory with tables of its own, that is used for each table that
the primary directory does not lead to, or whose entries cannot be right. That is decided for a
whole table, and for all who ask: readers by way of the cache or past it, and the map, see the same.
"""

import os
import threading
from array import array
from collections.abc import Callable

from vddkfs.engines.vmdk.extents import WouldWait, read_exactly
from vddkfs.engines.vmdk.files import OpenFile
from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.sesparse import TABLE_SECTORS, TABLE_TAG
from vddkfs.engines.vmdk.sparse import ZERO_ENTRY
from vddkfs.engines.vmdk.tables import TableCache, empty_table, to_entries
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import EngineError

PAGE_ENTRIES = 4096
"""Directory entries that are read, and kept, at once."""

_PAGE_KEYS = 1 << 32
_LOW_32 = (1 << 32) - 1


class Directory:
    """The tables of *file*, laid out as *layout* says. *start* is the extent's first sector.

    *link* is the VMDK it belongs to, for errors. *tell* gets one line when the redundant directory
    is first needed.
    """

    __slots__ = (
        "_cache",
        "_changes",
        "_directory_bytes",
        "_empty",
        "_file",
        "_keys",
        "_layout",
        "_link",
        "_lock",
        "_spare_bytes",
        "_spared",
        "_start",
        "_tell",
        "_width",
    )

    def __init__(
        self,
        file: OpenFile,
        layout: Layout,
        start: int,
        link: str,
        cache: TableCache,
        tell: Callable[[str], None],
    ) -> None:
        self._file = file
        self._layout = layout
        self._start = start
        self._link = link
        self._cache = cache
        self._keys = cache.new_keys()
        self._spared: set[int] = set()
        self._changes = 0
        self._lock = threading.Lock()
        self._tell: Callable[[str], None] | None = tell
        # Entries of 64 bits come with an area of tables, and name these by number.
        self._width = 8 if layout.tables_end else 4
        self._empty = empty_table(layout.entries, self._width)
        self._directory_bytes = file.base + layout.directory * 512
        self._spare_bytes = file.base + layout.spare_directory * 512

    def cached(self, number: int) -> "array[int] | None":
        """Return table *number* if it is in memory."""
        return self._cache.get(self._keys + number)

    def entries(self, number: int, first: int, stop: int, fresh: bool, flags: int) -> "array[int]":
        """Return the entries *first* to *stop* (exclusive) of table *number*.

        Raises WouldWait with *flags* if they are not in memory, EngineError if they are damaged.
        """
        if fresh:
            by_spare = self._decided(number, flags)
            directory = self._spare_bytes if by_spare else self._directory_bytes
            place = self._named_by(directory, number, flags)
            return self._at(place, number, first, stop, flags)
        table = self.cached(number)
        if table is None:
            if flags:
                raise WouldWait
            table = self._load(number)
        return table[first:stop]

    def entry_now(self, number: int, index: int, flags: int) -> int:
        """Return one 32-bit entry of table *number* as it is in the file, -1 for any doubt.

        The hot path of readers past all caches.
        """
        if self._layout.spare_directory and (number in self._spared or self.cached(number) is None):
            return -1
        fd, raw = self._file.fd, bytearray(4)
        if os.preadv(fd, (raw,), self._directory_bytes + number * 4, flags) != 4:
            return -1
        table = int.from_bytes(raw, "little")
        if table < self._layout.lowest:
            return -1 if table else 0
        if os.preadv(fd, (raw,), table * 512 + index * 4, flags) != 4:
            return -1
        return int.from_bytes(raw, "little")

    def forget(self) -> None:
        """Forget all that was read."""
        self._keys = self._cache.new_keys()
        self._spared.clear()

    def forget_table(self, number: int) -> None:
        """Forget table *number*, and what the directory says of it.

        Whoever is reading either of these keeps it for himself.
        """
        with self._lock:
            self._changes += 1
            self._cache.drop(self._keys + _PAGE_KEYS + number - number % PAGE_ENTRIES)
            self._cache.drop(self._keys + number)

    def places(self, number: int, stop: int) -> "array[int]":
        """Return where in the file the tables from *number* to *stop* are, in bytes.

        0 is for a table without grains, -1 for one that cannot be found. None at all are returned
        if the directory cannot be read there. Past the cache, for those who scan.
        """
        try:
            page = self._read(self._directory_bytes + number * self._width, stop - number, number)
        except EngineError:
            if not self._layout.spare_directory:
                return array("q")
            return array("q", [self._spare_place(each) for each in range(number, stop)])
        if not any(page):
            return array("q", bytes(8 * len(page)))
        base, lowest = self._file.base, self._layout.lowest
        if self._width == 4 and not any(0 < entry < lowest for entry in page):
            return array("q", [(entry << 9) + base if entry else 0 for entry in page])
        return array("q", [self._checked(entry, number + n) for n, entry in enumerate(page)])

    def table_at(self, place: int, number: int, first: int, stop: int) -> "array[int]":
        """Return entries of table *number*, which is at byte *place*. Past the cache."""
        if self._layout.spare_directory:
            return self._either(number, paged=False)[first:stop]
        return self._read(place + first * self._width, stop - first, number)

    def table_bytes(self) -> int:
        """Return what a whole table takes in the file."""
        return self._layout.entries * self._width

    def damage(self, sector: int, what: str) -> EngineError:
        """Return the error for *sector* of the image, which is lost because of *what*."""
        size = self._file.size if self._file.holder else os.fstat(self._file.fd).st_size
        return EngineError(
            f"{printable(self._file.path)}: sector {sector} of the image is lost: {what} "
            f"(the file has {size} bytes, and data from sector {self._layout.lowest} on)",
            link=self._link,
            sector=sector,
        )

    def _keep(self, key: int, table: "array[int]", changes: int) -> None:
        """Store *table* unless one was changed since *changes* was looked at, before the read."""
        with self._lock:
            if changes == self._changes:
                self._cache.put(key, table)

    def _load(self, number: int) -> "array[int]":
        """Read table *number*, and the directory page that names it, into the cache."""
        keys, changes = self._keys, self._changes
        table = self._either(number, paged=True)
        if not any(table):
            table = self._empty
        self._keep(keys + number, table, changes)
        return table

    def _length(self, number: int) -> int:
        """Entries of table *number* that describe grains of the disk: the last has fewer."""
        layout = self._layout
        return min(layout.entries, layout.grains - number * layout.entries)

    def _decided(self, number: int, flags: int) -> bool:
        """Say whether table *number* is read by the redundant directory."""
        if not self._layout.spare_directory:
            return False
        if number not in self._spared and self.cached(number) is None:
            if flags:
                raise WouldWait
            self._load(number)
        return number in self._spared

    def _either(self, number: int, *, paged: bool) -> "array[int]":
        """Return table *number* by the primary directory, or if that is damaged by the other."""
        problem: EngineError
        found, stop = self._empty[:0], self._length(number)
        try:
            if paged:
                place = self._place(self._paged(number), number)
            else:
                place = self._named_by(self._directory_bytes, number, 0)
            found = self._at(place, number, 0, stop, 0)
            if not self._layout.spare_directory or self._can_be(found):
                self._spared.discard(number)
                return found
            problem = self.damage(self._sector(number), "its grain table has impossible entries")
        except EngineError as error:
            problem = error
        try:
            spare = self._spare(number, stop)
        except EngineError:
            spare = None
        if spare is not None and self._can_be(spare):
            self._spared.add(number)
            self._say(problem)
            return spare
        self._spared.discard(number)
        if found:
            # Only some of its entries are wrong: whoever reads one of these meets the error.
            return found
        raise problem

    def _spare(self, number: int, stop: int) -> "array[int] | None":
        if not self._layout.spare_directory:
            return None
        place = self._named_by(self._spare_bytes, number, 0)
        return self._at(place, number, 0, stop, 0)

    def _checked(self, entry: int, number: int) -> int:
        """Return the byte of table *number* whose directory entry is *entry*; see ``places``."""
        try:
            place = self._place(entry, number)
        except EngineError:
            return self._spare_place(number)
        return place * 512 + self._file.base if place else 0

    def _spare_place(self, number: int) -> int:
        """Return the byte of table *number* by the redundant directory; see ``places``."""
        if not self._layout.spare_directory:
            return -1
        try:
            place = self._named_by(self._spare_bytes, number, 0)
        except EngineError:
            return -1
        return place * 512 + self._file.base if place else 0

    def _say(self, problem: EngineError) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(
                f"{printable(self._file.path)}: the grain table for sector {problem.sector} is "
                "damaged; the redundant grain directory is used, see `vddkfs check`"
            )

    def _can_be(self, entries: "array[int]") -> bool:
        """Say whether all 32-bit *entries* can be right: zero, or a place in the file."""
        if max(entries, default=0) * 512 >= os.fstat(self._file.fd).st_size:
            return False
        lowest = self._layout.lowest
        low = {entry for entry in entries if entry < lowest} if lowest > 1 else {0}
        return low <= ({0, ZERO_ENTRY} if self._layout.zero_grains else {0})

    def _paged(self, number: int) -> int:
        """Return what the directory says of table *number*, by way of the cache."""
        first = number - number % PAGE_ENTRIES
        keys, changes = self._keys, self._changes
        page = self._cache.get(keys + _PAGE_KEYS + first)
        if page is None:
            size = min(PAGE_ENTRIES, self._layout.tables - first)
            page = self._read(self._directory_bytes + first * self._width, size, number)
            self._keep(keys + _PAGE_KEYS + first, page, changes)
        return page[number - first]

    def _named_by(self, directory_bytes: int, number: int, flags: int) -> int:
        """Return the sector of table *number* as the file's directory names it now."""
        place = directory_bytes + number * self._width
        return self._place(self._read(place, 1, number, flags)[0], number)

    def _at(self, place: int, number: int, first: int, stop: int, flags: int) -> "array[int]":
        if not place:
            return self._empty[first:stop]
        offset = self._file.base + place * 512 + first * self._width
        return self._read(offset, stop - first, number, flags)

    def _place(self, entry: int, number: int) -> int:
        """Return the sector of table *number* whose directory entry is *entry*, 0 for none."""
        layout = self._layout
        if entry == 0:
            return 0
        place = entry
        if self._width == 8:
            place = layout.tables_at + (entry & _LOW_32) * TABLE_SECTORS
            if entry >> 32 == TABLE_TAG << 28 and place + TABLE_SECTORS <= layout.tables_end:
                return place
        elif entry >= layout.lowest:
            return place
        raise self.damage(
            self._sector(number), f"its grain table is said to be at sector {place} ({entry:#x})"
        )

    def _sector(self, number: int) -> int:
        return self._start + number * self._layout.entries * self._layout.grain

    def _read(self, offset: int, entries: int, number: int, flags: int = 0) -> "array[int]":
        """Read *entries* from byte *offset* on, for table *number*."""
        raw = bytearray(entries * self._width)
        file = self._file
        try:
            read_exactly(
                file.fd,
                memoryview(raw),
                offset,
                path=file.path,
                link=self._link,
                sector=0,
                limit=file.limit,
                flags=flags,
            )
        except EngineError as error:
            reason = error.__cause__
            why = f": {reason.strerror}" if isinstance(reason, OSError) else ""
            raise self.damage(
                self._sector(number), f"its grain table cannot be read from byte {offset}{why}"
            ) from error
        return to_entries(raw, self._width)
