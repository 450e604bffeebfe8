"""The compressed grains of a streamOptimized extent, looked at for `vddkfs check`.

By two ways: from the tables, each entry must lead to a grain that says it is the one and expands to
its size; from the first marker, each must lead to the next, to the end of the file.
"""

from collections.abc import Iterator, Sequence

from vddkfs.engines.vmdk.check.notes import Notes
from vddkfs.engines.vmdk.check.overlap import Claim
from vddkfs.engines.vmdk.check.tables import GRAIN, TableWalk
from vddkfs.engines.vmdk.deflate import StreamError, expand, longest_bytes
from vddkfs.engines.vmdk.files import OpenFile
from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.sparse import (
    ENTRIES_PER_TABLE,
    GRAIN_MARKER_BYTES,
    MARKER,
    MARKER_DIRECTORY,
    MARKER_END,
    MARKER_FOOTER,
    MARKER_TABLE,
)

_TICK = 16
_PADDING = 1 << 20


class PackedTableWalk(TableWalk):
    """The tables of an extent with compressed grains. All of these are expanded on the first way.

    *referenced* counts the sectors that they take.
    """

    def __init__(
        self, file: OpenFile, layout: Layout, start: int, sectors: int, notes: Notes
    ) -> None:
        super().__init__(file, layout, start, sectors, notes)
        self.referenced = 0

    def grain_claims(self, places: Sequence[int], first: int) -> Iterator[Claim | None]:
        """See ``TableWalk``: one claim a grain."""
        for number, place in enumerate(places, first):
            if place == 0 or not self.is_possible(place, number):
                continue
            size = self._grain_bytes(place, number)
            if size:
                sectors = -(-size // 512)
                self.referenced += sectors if self.noting else 0
                yield self.claim(place, sectors, GRAIN, number, sectors)
            if number % _TICK == 0:
                yield None

    def _grain_bytes(self, place: int, number: int) -> int:
        """Return the bytes of a grain with its marker, 0 if there is no such grain."""
        offset, head = place * 512, 0
        size = longest = longest_bytes(self.layout.grain)
        if self.layout.marked:
            head = GRAIN_MARKER_BYTES
            raw = self.file.at(offset, head)
            if len(raw) < head:
                self._outside(place, number)
                return 0
            says, size, _ = map(int, MARKER.unpack(raw + bytes(4)))
            if says != number * self.layout.grain or not 0 < size <= longest:
                self.damage(
                    "marker",
                    f"the grain's marker at sector {place} is of {size} bytes for sector {says} "
                    f"of the extent, not for {number * self.layout.grain}",
                    number,
                )
                return 0
            if not self.noting:
                return head + size
        packed = self.file.at(offset + head, size)
        if len(packed) < (size if self.layout.marked else 1):
            self._outside(place, number)
            return 0
        used = self._expand(packed, place, number)
        return head + (size if self.layout.marked else used)

    def _outside(self, place: int, number: int) -> None:
        self.damage(
            "grain-outside",
            f"the grain at sector {place} is not inside the file of {self.file.size} bytes",
            number,
        )

    def _expand(self, packed: bytes, place: int, number: int) -> int:
        """Expand a grain and return how many bytes of *packed* it took, 0 with a note if none."""
        whole = self.layout.grain * 512
        wanted = self.image_sectors(number)[1] * 512
        try:
            content, used, ended = expand(packed, whole)
        except StreamError as error:
            self.damage(
                "compressed", f"the compressed grain at sector {place} is damaged: {error}", number
            )
            return 0
        found = len(content)
        if not wanted <= found <= whole or not ended:
            short = f"{found} bytes" if found <= whole else f"more than {whole} bytes"
            self.damage(
                "compressed", f"the compressed grain at sector {place} expands to {short}", number
            )
        return used


class MarkerChain:
    """The markers of *file*, of *grain* and *capacity* sectors, from sector *first* on.

    Who reads the file from front to back needs them, as one has to whose directory is at the end.
    If that is in front (not *needed*), what is wrong with the chain is worth a warning only.
    *grain_sectors* counts what the grains on the way take; *whole* is whether its end was reached.
    """

    def __init__(
        self,
        file: OpenFile,
        grain: int,
        capacity: int,
        first: int,
        notes: Notes,
        *,
        needed: bool,
    ) -> None:
        self._file = file
        self._needed = needed
        self._grain = grain
        self._capacity = capacity
        self._first = first
        self._notes = notes
        self.grain_sectors = 0
        self.whole = False

    def walk(self) -> Iterator[int]:
        """Go from marker to marker. Yields the sector now and then."""
        here = self._first
        count = 0
        if here * 512 > self._file.size:
            self.broken(f"the first marker is said to be at sector {here}, behind the file's end")
            return
        while here * 512 < self._file.size:
            raw = self._file.at(here * 512, MARKER.size)
            sectors = self._length(raw, here) if len(raw) == MARKER.size else 0
            if not sectors:
                self.broken(f"the chain of markers breaks at sector {here}: that is no marker")
                return
            here += sectors
            if raw == bytes(MARKER.size):
                self._end(here)
                break
            count += 1
            if count % _TICK == 0:
                yield here
        self.whole = True

    def broken(self, what: str) -> None:
        """Note that the chain is broken."""
        note = self._notes.damage if self._needed else self._notes.warning
        note("markers", what)

    def _length(self, raw: bytes, here: int) -> int:
        """Return how many sectors a marker and what it is for take, 0 if it is none."""
        number, size, kind = map(int, MARKER.unpack(raw))
        if size:
            end = here * 512 + GRAIN_MARKER_BYTES + size
            if (
                size > longest_bytes(self._grain)
                or number % self._grain
                or number >= self._capacity
                or end > self._file.size
            ):
                return 0
            sectors = -(-(GRAIN_MARKER_BYTES + size) // 512)
            self.grain_sectors += sectors
            return sectors
        table = ENTRIES_PER_TABLE * 4 // 512
        known = number == {MARKER_END: 0, MARKER_TABLE: table, MARKER_FOOTER: 1}.get(kind)
        if not known and not (kind == MARKER_DIRECTORY and number):
            return 0
        if (here + 1 + number) * 512 > self._file.size:
            return 0
        return 1 + number

    def _end(self, here: int) -> None:
        left = self._file.size - here * 512
        # Some fill their last megabyte with zeros.
        if left > _PADDING or any(self._file.at(here * 512, max(left, 0))):
            self._notes.warning(
                "unreferenced", f"{left} bytes follow the last marker, and belong to nothing"
            )
