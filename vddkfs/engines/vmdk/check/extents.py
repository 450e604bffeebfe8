"""One extent with grains, from its header to its last grain, looked at for `vddkfs check`.

Memory is bounded whatever the size of the disk, see ``overlap``. What nothing refers to is
told of hosted sparse, streamOptimized and vmfsSparse extents; an seSparse extent grows in steps and
keeps what the guest gave back, so there it would say nothing.
"""

import struct
from collections.abc import Generator, Iterator
from itertools import combinations

from vddkfs.engines.vmdk import cowd, sesparse, sparse
from vddkfs.engines.vmdk.check.notes import OVERLAP, Notes, said
from vddkfs.engines.vmdk.check.overlap import (
    WINDOW_SLOTS,
    Claim,
    Claims,
    Comparison,
    Overlap,
)
from vddkfs.engines.vmdk.check.stream import MarkerChain, PackedTableWalk
from vddkfs.engines.vmdk.check.tables import (
    GRAIN,
    SPARE_TABLE,
    TABLE,
    TableWalk,
    WideTableWalk,
)
from vddkfs.engines.vmdk.descriptor import ExtentLine
from vddkfs.engines.vmdk.files import OpenFile
from vddkfs.engines.vmdk.formats import COWD, SESPARSE, SPARSE
from vddkfs.engines.vmdk.layout import Layout
from vddkfs.engines.vmdk.opening import read_layout
from vddkfs.engines.vmdk.sparse import SparseHeader
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import DamagedSource, UnsupportedFormat

Tick = tuple[int, int]
"""How far a check of one file is: so much of so much."""

FEW_SECTORS = 128
"""Less than so much that nothing refers to is not worth a word: it keeps something aligned."""

_OVERHEAD = struct.Struct("<Q")
_OVERHEAD_AT = 64
_FREE = struct.Struct("<I")
_FREE_AT = 28


def check_grains(
    file: OpenFile, line: ExtentLine, start: int, header: SparseHeader | None, notes: Notes
) -> Iterator[Tick]:
    """Check the extent *line*, which is in *file* and begins at sector *start* of the link.

    *header* is what was parsed of it already. All that is found goes to *notes*.
    """
    extent = _GrainExtent(file, line, start, notes)
    layout = extent.layout(header)
    if layout is None:
        yield from extent.salvage()
    elif line.kind == SESPARSE:
        yield from extent.check_wide(layout)
    else:
        yield from extent.check_narrow(layout)


class _GrainExtent:
    def __init__(self, file: OpenFile, line: ExtentLine, start: int, notes: Notes) -> None:
        self._file = file
        self._line = line
        self._start = start
        self._notes = notes
        self._head = file.head(cowd.HEADER_BYTES)
        self._header: SparseHeader | None = None

    def layout(self, header: SparseHeader | None) -> Layout | None:
        """Return the extent's layout, None if that cannot be found out; both with notes."""
        path = printable(self._file.path)
        try:
            if header is None and self._line.kind == SPARSE and self._is(sparse.MAGIC):
                header = sparse.parse_header(self._head, path, self._file.size)
            self._header = header
            if self._line.kind == SESPARSE and self._is(sesparse.MAGIC):
                layout = self._wide_layout(path)
            else:
                layout = read_layout(self._file, self._line.kind, header)
        except DamagedSource as error:
            code = "footer" if self._header and self._header.at_end else "header"
            self._notes.damage(code, said(error, path), self._start, self._line.sectors)
            return None
        except UnsupportedFormat as error:
            self._notes.unchecked("unsupported", said(error, path), error.exit_code)
            return None
        self._check_lengths(layout)
        for note in layout.notes:
            self._notes.damage("directory", note)
        if not layout.clean:
            self._notes.warning(
                "unclean", "was not closed by whoever wrote it last, or is being written"
            )
        return layout

    def salvage(self) -> Iterator[Tick]:
        """Look at what needs no tables: the markers of a file whose footer is missing."""
        if self._header is not None and self._header.marked:
            yield from self._chain(self._header.grain, self._header.capacity).ticks()

    def check_narrow(self, layout: Layout) -> Iterator[Tick]:
        """Check tables and grains where entries are sectors."""
        kind = PackedTableWalk if layout.packed else TableWalk
        walk = kind(self._file, layout, self._start, self._line.sectors, self._notes)
        fixed = self._fixed(layout)

        def claims() -> Iterator[Claim | None]:
            yield from fixed
            yield from walk.claims()

        begin, end = self._grains_area(layout, walk.file_sectors)
        taken = None
        # Tables lie among the grains of a vmfsSparse extent.
        if self._line.kind != COWD and not layout.packed and begin <= WINDOW_SLOTS:
            taken = yield from _compare_regular(claims, walk, begin)
        if taken is None:
            comparison = Comparison(claims, walk.file_sectors, count_from=begin)
            yield from _ticks(comparison, walk)
            self._note_overlaps(comparison.overlaps, walk)
            taken = comparison.taken
        if not isinstance(walk, PackedTableWalk):
            self._note_unreferenced(end - begin - taken, max(layout.grain, FEW_SECTORS))
        elif layout.marked:
            chain = self._chain(layout.grain, layout.capacity)
            yield from chain.ticks()
            unused = chain.chain.grain_sectors - walk.referenced
            if chain.chain.whole and unused < 0:
                chain.chain.broken("the chain of markers ends before the last grains")
            elif chain.chain.whole:
                self._note_unreferenced(unused, 1)

    def check_wide(self, layout: Layout) -> Iterator[Tick]:
        """Check tables and grains of an seSparse extent."""
        walk = WideTableWalk(self._file, layout, self._start, self._line.sectors, self._notes)

        def grains() -> Iterator[Claim | None]:
            return walk.claims(tables=False)

        def tables() -> Iterator[Claim | None]:
            return walk.claims(grains=False)

        if (yield from _compare_regular(grains, walk, layout.lowest)) is None:
            comparison = Comparison(grains, walk.grain_slots)
            yield from _ticks(comparison, walk)
            self._note_overlaps(comparison.overlaps, walk)
            if comparison.beyond:
                self._notes.warning(
                    "too-large", "the file is too large for all of its grains to be compared"
                )
        comparison = Comparison(tables, walk.table_slots)
        yield from _ticks(comparison, walk)
        self._note_overlaps(comparison.overlaps, walk)
        self._note_overlaps(_pairs(self._fixed(layout)), walk)

    def _is(self, magic: bytes) -> bool:
        return self._head.startswith(magic)

    def _wide_layout(self, path: str) -> Layout:
        """Return the layout of an seSparse file, also of one whose journal was not replayed."""
        constant = sesparse.parse_constant(self._head, path, self._file.size)
        volatile = self._file.at(constant.volatile * 512, sesparse.HEADER_BYTES)
        try:
            return sesparse.parse_header(self._head, volatile, path, self._file.size)
        except UnsupportedFormat as error:
            self._notes.damage("journal", said(error, path), self._start, self._line.sectors)
        replayed = volatile[:24] + bytes(8) + volatile[32:]
        return sesparse.parse_header(self._head, replayed, path, self._file.size)

    def _check_lengths(self, layout: Layout) -> None:
        missing = self._line.sectors - layout.capacity
        what = f"has {layout.capacity} sectors, but its descriptor says {self._line.sectors}"
        if missing > 0:
            self._notes.damage("length", what, self._start + layout.capacity, missing)
        elif -missing >= layout.grain:
            self._notes.warning("length", what)

    def _fixed(self, layout: Layout) -> list[Claim]:
        """Return what the header, the descriptor and the directories take."""
        claims = []

        def add(start: int, count: int, kind: str) -> None:
            count = min(count, -(-self._file.size // 512) - start)
            if count > 0:
                claims.append(Claim(start, count, kind, 0, count))

        add(0, 4 if self._line.kind == COWD else 1, "header")
        if self._header is not None and self._header.descriptor_offset:
            add(self._header.descriptor_offset, self._header.descriptor_sectors, "descriptor")
        if self._line.kind == SESPARSE:
            constant = sesparse.parse_constant(self._head, "", self._file.size)
            add(constant.volatile, 1, "volatile header")
            add(constant.tables, constant.tables_sectors, "area of grain tables")
            add(constant.grains, -(-self._file.size // 512), "area of grains")
        width = 8 if self._line.kind == SESPARSE else 4
        sectors = -(-layout.tables * width // 512)
        add(layout.directory, sectors, "grain directory")
        if layout.spare_directory:
            add(layout.spare_directory, sectors, "redundant grain directory")
        return claims

    def _grains_area(self, layout: Layout, file_sectors: int) -> tuple[int, int]:
        """Return the sectors between which all should belong to something."""
        if self._line.kind == COWD:
            # What lies behind the header's mark was taken from the file system in advance.
            return layout.lowest, min(_FREE.unpack_from(self._head, _FREE_AT)[0], file_sectors)
        return max(_OVERHEAD.unpack_from(self._head, _OVERHEAD_AT)[0], layout.lowest), file_sectors

    def _chain(self, grain: int, capacity: int) -> "_TickingChain":
        first = _OVERHEAD.unpack_from(self._head, _OVERHEAD_AT)[0]
        needed = self._header is not None and self._header.at_end
        chain = MarkerChain(self._file, grain, capacity, first, self._notes, needed=needed)
        return _TickingChain(chain, -(-self._file.size // 512))

    def _note_unreferenced(self, sectors: int, least: int) -> None:
        if sectors >= least:
            self._notes.warning(
                "unreferenced",
                f"{sectors * 512} bytes of the file belong to nothing, as a crash leaves them",
            )

    def _note_overlaps(self, overlaps: list[Overlap], walk: TableWalk) -> None:
        for overlap in overlaps:
            for owner in overlap.owners:
                self._note_overlap(overlap, owner, walk)

    def _note_overlap(self, overlap: Overlap, owner: Claim, walk: TableWalk) -> None:
        """Note what *owner* has of *overlap*, and with whom."""
        first = max(owner.start, overlap.start)
        last = min(owner.end, overlap.start + overlap.count) - 1
        names = [
            f"the {_name(one, walk)}"
            for one in overlap.owners
            if one is not owner and one.start <= last and one.end > first
        ]
        if overlap.more or not names:
            names.append("others")
        # Where claims are in grains or tables, the last of them ends where the next would begin.
        begin, end = walk.sector_of(owner.kind, first), walk.sector_of(owner.kind, last + 1) - 1
        sector, sectors = -1, 0
        pieces = -(-owner.count // owner.size)
        if owner.kind == GRAIN:
            sector, sectors = walk.image_sectors(owner.number, pieces)
        elif owner.kind in (TABLE, SPARE_TABLE):
            entries = walk.layout.entries
            sector, sectors = walk.image_sectors(owner.number * entries, pieces * entries)
        self._notes.damage(
            OVERLAP,
            f"the {_name(owner, walk)} has sectors {begin} to {end} of the file, "
            f"which belong to {' and '.join(names)} as well",
            sector,
            sectors,
        )


class _TickingChain:
    """A chain of markers with its progress."""

    def __init__(self, chain: MarkerChain, file_sectors: int) -> None:
        self.chain = chain
        self._file_sectors = file_sectors

    def ticks(self) -> Iterator[Tick]:
        for here in self.chain.walk():
            yield min(here, self._file_sectors), self._file_sectors


def _pairs(claims: list[Claim]) -> list[Overlap]:
    """Return the overlaps of a few claims, which may be of any length."""
    found = []
    for one, two in combinations(claims, 2):
        first, last = max(one.start, two.start), min(one.end, two.end)
        if first < last:
            found.append(Overlap(first, last - first, (one, two)))
    return found


def _name(claim: Claim, walk: TableWalk) -> str:
    """Return what *claim* is, for people."""
    if claim.kind == GRAIN:
        return f"grain of sector {walk.image_sectors(claim.number)[0]} of the image"
    if claim.kind in (TABLE, SPARE_TABLE):
        return f"{claim.kind} {claim.number}"
    return claim.kind


def _compare_regular(
    claims: Claims, walk: TableWalk, begin: int
) -> Generator[Tick, None, int | None]:
    """Go through *claims* for the first time: there may be only grains from sector *begin* on.

    Returns how many sectors these take, None if it is not that simple, or something overlaps.
    """
    marks = walk.make_marks(begin)
    if marks is None:
        return None
    # What lies in areas of its own cannot be among the grains.
    below = 0 if isinstance(walk, WideTableWalk) else begin
    is_regular = True

    def others() -> Iterator[Claim | None]:
        nonlocal is_regular
        for claim in claims():
            if claim is None or claim.end <= below:
                yield claim
            else:
                is_regular = False

    comparison = Comparison(others, below)
    yield from _ticks(comparison, walk)
    walk.marks = None
    if not is_regular or marks.twice or comparison.overlaps:
        return None
    return marks.count * walk.layout.grain


def _ticks(comparison: Comparison, walk: TableWalk) -> Iterator[Tick]:
    before = walk.tables_seen
    total = max(walk.layout.tables * comparison.passes, 1)
    for _ in comparison.run():
        yield min(walk.tables_seen - before, total), total
