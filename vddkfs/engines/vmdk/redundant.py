"""Whether redundant grain tables can be believed, and what is taken from them.

Pure, but for the reads that are handed in.

A file has them to mend its primary tables, but not everybody who writes a file keeps them in step,
and a grain that they do not know would become zeros. So they are believed only if they contradict
no primary entry that can be right, anywhere in the file, and if every grain that the file has room
for is known to them; and then only an entry that cannot be right is taken from them.
"""

from array import array
from collections.abc import Callable
from typing import Final

import msgspec

from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.sparse import ZERO_ENTRY
from vddkfs.errors import EngineError

MAX_COMPARED: Final = 1 << 16
"""Tables of the largest extent whose redundant ones are believed: 2 TiB of 64 KiB grains."""

Table = Callable[[int], "array[int]"]


class Possible(msgspec.Struct, frozen=True):
    """Which 32-bit entries can be right.

    0, the mark of zeros where it has that meaning, and places from *lowest* on in a file of so many
    *sectors*.
    """

    lowest: int
    sectors: int
    zero_grains: bool

    def one(self, entry: int) -> bool:
        """Say whether *entry* can be right."""
        if entry == 0 or (entry == ZERO_ENTRY and self.zero_grains):
            return True
        return self.lowest <= entry < self.sectors

    def all(self, entries: "array[int]") -> bool:
        """Say whether all *entries* can be right."""
        if max(entries, default=0) >= self.sectors:
            return False
        # Both at the speed of C, as this is asked of every table that is read.
        least = min(filter(None, entries), default=self.lowest)
        return least >= self.lowest or all(map(self.one, entries))


def agrees(layout: Layout, primary: Table, spare: Table, possible: Possible) -> bool:
    """Say whether the redundant tables of an extent can be believed.

    *primary* and *spare* return a table by its number, or raise EngineError.
    """
    if layout.tables > MAX_COMPARED:
        return False
    grains, first = 0, possible.sectors
    for number in range(layout.tables):
        try:
            theirs = spare(number)
        except EngineError:
            return False
        try:
            ours = merged(primary(number), theirs, possible)
        except EngineError:
            ours = theirs
        if ours != theirs:
            return False
        places = [entry for entry in theirs if entry > ZERO_ENTRY and possible.one(entry)]
        grains += len(places)
        first = min([first, *places])
    # Whoever writes a file puts each grain behind the last: a gap is a grain that they do not know.
    return grains > 0 and possible.sectors - first - grains * layout.grain < layout.grain


def merged(ours: "array[int]", theirs: "array[int]", possible: Possible) -> "array[int]":
    """Return *ours* with what *theirs* has for each entry that cannot be right."""
    pairs = zip(ours, theirs, strict=True)
    return array(
        ours.typecode,
        [mine if possible.one(mine) or not possible.one(other) else other for mine, other in pairs],
    )
