"""From the number of a grain table to its entries, through the grain directory of an extent file.

Nothing is read at open: pages of the directory and tables come when they are asked for, so a disk
of 62 TiB costs no more than a small one.

Where a format keeps a redundant directory with tables of its own (see ``redundant``), what the
primary ones have lost is taken from these: each entry that cannot be right, and each table that
cannot be read. An entry that can be right always counts, so readers by way of the cache, readers
past it and the map see the same.
"""

import os
import threading
from array import array
from collections.abc import Callable

from vddkfs.engines.vmdk.extents import WouldWait, read_exactly
from vddkfs.engines.vmdk.files import OpenFile
from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.redundant import Possible, agrees, merged
from vddkfs.engines.vmdk.sesparse import TABLE_SECTORS, TABLE_TAG
from vddkfs.engines.vmdk.tables import TableCache, empty_table, to_entries
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import EngineError

PAGE_ENTRIES = 4096
"""Directory entries that are read, and kept, at once."""

_PAGE_KEYS = 1 << 32
_LOW_32 = (1 << 32) - 1


class Directory:
    """The tables of *file*, laid out as *layout* says. *start* is the extent's first sector.

    *link* is the VMDK it belongs to, for errors. *tell* gets a line when the redundant directory is
    needed.
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
        "_spare_is_sound",
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
        self._changes = 0
        self._lock = threading.Lock()
        self._tell = tell
        # Entries of 64 bits come with an area of tables, and name these by number.
        self._width = 8 if layout.tables_end else 4
        self._empty = empty_table(layout.entries, self._width)
        self._directory_bytes = file.base + layout.directory * 512
        self._spare_bytes = file.base + layout.spare_directory * 512
        self._spare_is_sound: bool | None = None if layout.spare_directory else False

    def cached(self, number: int) -> "array[int] | None":
        """Return table *number* if it is in memory."""
        return self._cache.get(self._keys + number)

    def entries(self, number: int, first: int, stop: int, fresh: bool, flags: int) -> "array[int]":
        """Return the entries *first* to *stop* (exclusive) of table *number*.

        Raises WouldWait with *flags* if they are not in memory, EngineError if they are damaged.
        """
        if fresh:
            found = self._now(number, first, stop, flags, paged=False)
        else:
            table = self.cached(number)
            if table is None:
                if flags:
                    raise WouldWait
                table = self._load(number)
            found = table[first:stop]
        return self._mended(found, number, first, flags) if self._layout.spare_directory else found

    def entry_now(self, number: int, index: int, flags: int) -> int:
        """Return one 32-bit entry of table *number* as it is in the file, -1 for any doubt.

        The hot path of readers past all caches. It may be no place in the file.
        """
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
        if self._layout.spare_directory:
            self._spare_is_sound = None

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
            return (
                array("q", [-1]) * (stop - number) if self._layout.spare_directory else array("q")
            )
        if not any(page):
            return array("q", bytes(8 * len(page)))
        base, lowest = self._file.base, self._layout.lowest
        if self._width == 4 and not any(0 < entry < lowest for entry in page):
            return array("q", [(entry << 9) + base if entry else 0 for entry in page])
        return array("q", [self._checked(entry, number + n) for n, entry in enumerate(page)])

    def table_at(self, place: int, number: int, first: int, stop: int) -> "array[int]":
        """Return entries of table *number*, which is at byte *place*. Past the cache.

        Entries that cannot be right are left as they are.
        """
        return self._cut(place + first * self._width, stop - first, number)

    def table_bytes(self) -> int:
        """Return what a whole table takes in the file."""
        return self._layout.entries * self._width

    def damage(self, sector: int, what: str) -> EngineError:
        """Return the error for *sector* of the image, which is lost because of *what*."""
        return EngineError(
            f"{printable(self._file.path)}: sector {sector} of the image is lost: {what} "
            f"(the file has {self._size()} bytes, and data from sector {self._layout.lowest} on)",
            link=self._link,
            sector=sector,
        )

    def _load(self, number: int) -> "array[int]":
        """Read table *number*, and the directory page that names it, into the cache."""
        keys, changes = self._keys, self._changes
        table = self._now(number, 0, self._length(number), 0, paged=True)
        if not any(table):
            table = self._empty
        self._keep(keys + number, table, changes)
        return table

    def _keep(self, key: int, table: "array[int]", changes: int) -> None:
        """Store *table* unless one was changed since *changes* was looked at, before the read."""
        with self._lock:
            if changes == self._changes:
                self._cache.put(key, table)

    def _length(self, number: int) -> int:
        """Entries of table *number* that describe grains of the disk: the last has fewer."""
        layout = self._layout
        return min(layout.entries, layout.grains - number * layout.entries)

    def _now(self, number: int, first: int, stop: int, flags: int, *, paged: bool) -> "array[int]":
        """Return entries of table *number*, those of the redundant one if it cannot be read."""
        try:
            if paged:
                place = self._place(self._paged(number), number)
            else:
                place = self._named_by(self._directory_bytes, number, flags)
            return self._at(place, number, first, stop, flags)
        except EngineError as problem:
            if not self._may_use_spare(flags):
                raise
            try:
                found = self._spare(number, first, stop)
            except EngineError:
                raise problem from None
            self._say(number)
            return found

    def _mended(self, found: "array[int]", number: int, first: int, flags: int) -> "array[int]":
        """Return *found*, entries of table *number* from *first* on, without what cannot be right.

        What nobody has right stays: its readers meet the error.
        """
        possible = self._possible()
        if possible.all(found):
            return found
        if flags:
            raise WouldWait
        if not self._may_use_spare(flags):
            return found
        try:
            mended = merged(found, self._spare(number, first, first + len(found)), possible)
        except EngineError:
            return found
        if mended != found:
            self._say(number)
        return mended

    def _possible(self) -> Possible:
        return Possible(self._layout.lowest, -(-self._size() // 512), self._layout.zero_grains)

    def _size(self) -> int:
        """Return the bytes of the file as it is now; one in an archive keeps those that it has."""
        return self._file.size if self._file.holder else os.fstat(self._file.fd).st_size

    def _may_use_spare(self, flags: int) -> bool:
        """Say whether what the redundant tables say can be believed, and is not there in vain.

        Found out once: they must not contradict any entry of the primary ones that can be right.
        """
        if self._spare_is_sound is None:
            if flags:
                raise WouldWait
            self._spare_is_sound = agrees(
                self._layout, self._whole_primary, self._whole_spare, self._possible()
            )
        return self._spare_is_sound

    def _whole_primary(self, number: int) -> "array[int]":
        place = self._named_by(self._directory_bytes, number, 0)
        return self._at(place, number, 0, self._length(number), 0)

    def _whole_spare(self, number: int) -> "array[int]":
        return self._spare(number, 0, self._length(number))

    def _spare(self, number: int, first: int, stop: int) -> "array[int]":
        return self._at(self._named_by(self._spare_bytes, number, 0), number, first, stop, 0)

    def _say(self, number: int) -> None:
        self._tell(
            f"{printable(self._file.path)}: the grain table for sector {self._sector(number)} is "
            "damaged; the redundant grain directory is used, see `vddkfs check`"
        )

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
        return self._cut(offset, stop - first, number, flags)

    def _cut(self, offset: int, entries: int, number: int, flags: int = 0) -> "array[int]":
        """Return *entries* of a table from byte *offset* on, of one that the file's end may cut.

        What is behind the end is given as what no entry can be: only its readers meet the error.
        """
        try:
            return self._read(offset, entries, number, flags)
        except EngineError as error:
            end = min(self._file.limit, os.fstat(self._file.fd).st_size)
            there = max(0, end - offset) // self._width
            if there == 0 or there >= entries or _is_failure(error):
                raise
        lost = array(self._empty.typecode, [-1 + (1 << 8 * self._width)])
        return self._read(offset, there, number, flags) + lost * (entries - there)

    def _checked(self, entry: int, number: int) -> int:
        """Return the byte of table *number* whose directory entry is *entry*; see ``places``."""
        try:
            place = self._place(entry, number)
        except EngineError:
            return -1
        return place * 512 + self._file.base if place else 0

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


def _is_failure(error: EngineError) -> bool:
    """Say whether *error* is the disk's, not that of a file that ends too early."""
    cause = error.__cause__
    return cause is not None and isinstance(cause.__cause__, OSError)
