"""One link, from its descriptor to its extents, looked at for `vddkfs check`."""

import os
from collections.abc import Iterator

from vddkfs.engines.vmdk.check.extents import check_grains
from vddkfs.engines.vmdk.check.notes import Finding, Notes, said
from vddkfs.engines.vmdk.descriptor import Descriptor, ExtentLine
from vddkfs.engines.vmdk.files import OpenFile, Trust, open_device, open_file, resolve
from vddkfs.engines.vmdk.formats import (
    GRAIN_KINDS,
    SPARSE,
    ZEROS,
    check_descriptor,
    check_extent,
    names_device,
)
from vddkfs.engines.vmdk.sparse import SparseHeader
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import (
    AccessDenied,
    BrokenChain,
    SourceMissing,
    UnsupportedFormat,
    VddkfsError,
)

LinkEvent = Finding | tuple[str, int, int]
"""A finding, or a file with how far it is: so much of so much."""

_UNCHECKED = (AccessDenied, UnsupportedFormat, BrokenChain)


def check_link(
    path: str,
    descriptor: Descriptor,
    header: SparseHeader | None,
    trust: Trust,
    *,
    embedded: bool,
) -> Iterator[LinkEvent]:
    """Check the link *path*, whose *descriptor* was read, with all its extents.

    An *embedded* descriptor is in the one sparse file of the link, behind *header* unless that is
    damaged. Files outside the link's folder, and devices, are looked at as far as *trust* goes.
    """
    notes = Notes(path, path)
    try:
        check_descriptor(descriptor, path)
    except UnsupportedFormat as error:
        notes.unchecked("unsupported", said(error, path), error.exit_code)
    if not descriptor.encrypted:
        link = _Link(path, header, trust, embedded)
        start = 0
        for line in descriptor.extents:
            yield from link.extent(line, start)
            start += line.sectors
        yield from link.flat_files()
    yield from notes.rest()


class _Link:
    def __init__(
        self, path: str, header: SparseHeader | None, trust: Trust, embedded: bool
    ) -> None:
        self._path = path
        self._embedded = embedded
        self._header = header
        self._trust = trust
        # Of each flat file: its size, and which sectors are (from, to, first of the image).
        self._flat: dict[str, tuple[int, list[tuple[int, int, int]]]] = {}
        self._sparse: set[str] = set()

    def extent(self, line: ExtentLine, start: int) -> Iterator[LinkEvent]:
        """Check the extent *line*, which begins at sector *start* of the link."""
        if line.kind == ZEROS:
            return
        notes = Notes(self._path, self._path)
        name = self._name(line, start, notes)
        if name:
            notes = Notes(self._path, name)
            try:
                file = open_device(name) if names_device(line) else open_file(name)
            except VddkfsError as error:
                self._not_opened(error, line, start, notes, name)
            else:
                try:
                    yield from self._opened(file, line, start, notes)
                finally:
                    file.close()
        yield from notes.rest()

    def flat_files(self) -> Iterator[Finding]:
        """Compare each flat file with all extents that are in it."""
        for name, (size, used) in self._flat.items():
            notes = Notes(self._path, name)
            end = 0
            for begin, stop, start in sorted(used):
                if begin < end:
                    notes.damage(
                        "overlap",
                        f"two extents of the descriptor have sectors {begin} to "
                        f"{min(end, stop) - 1} of the file",
                        start,
                        min(end, stop) - begin,
                    )
                end = max(end, stop)
            if size > end * 512:
                notes.warning(
                    "too-long",
                    f"has {size} bytes, of which the descriptor needs {end * 512}",
                )
            yield from notes.rest()

    def _name(self, line: ExtentLine, start: int, notes: Notes) -> str:
        """Return the path of the extent's file, "" with a note if it is not to be looked at."""
        try:
            check_extent(line, self._path, devices=self._trust.devices)
            if self._embedded:
                return self._path
            if names_device(line):
                return line.name
            return resolve(line.name, self._path, self._trust)
        except _UNCHECKED as error:
            notes.unchecked("unsupported", said(error, self._path), error.exit_code)
        except VddkfsError as error:
            notes.damage("descriptor", said(error, self._path), start, line.sectors)
        return ""

    def _not_opened(
        self, error: VddkfsError, line: ExtentLine, start: int, notes: Notes, name: str
    ) -> None:
        if isinstance(error, _UNCHECKED):
            notes.unchecked("unreadable", said(error, name), error.exit_code)
            return
        what = said(error, name)
        if isinstance(error, SourceMissing):
            what += f", but {printable(os.path.basename(self._path))} names it as an extent"
        code = "missing" if isinstance(error, SourceMissing) else "unreadable"
        notes.damage(code, what, start, line.sectors)

    def _opened(
        self, file: OpenFile, line: ExtentLine, start: int, notes: Notes
    ) -> Iterator[LinkEvent]:
        if line.kind not in GRAIN_KINDS and not self._embedded:
            self._check_flat(file, line, start, notes)
            return
        if self._embedded and line.kind != SPARSE:
            notes.damage(
                "descriptor",
                "its embedded descriptor does not describe this file",
                start,
                line.sectors,
            )
            return
        if file.path in self._sparse:
            notes.damage("descriptor", "the descriptor lists the file twice", start, line.sectors)
            return
        self._sparse.add(file.path)
        try:
            for done, total in check_grains(file, line, start, self._header, notes):
                yield from notes.ready()
                yield file.path, done, total
        except VddkfsError as error:
            notes.damage("unreadable", said(error, file.path), start, line.sectors)

    def _check_flat(self, file: OpenFile, line: ExtentLine, start: int, notes: Notes) -> None:
        size = 0 if names_device(line) else file.size
        used = self._flat.setdefault(file.path, (size, []))[1]
        used.append((line.offset, line.offset + line.sectors, start))
        there = max(0, min(file.size // 512 - line.offset, line.sectors))
        if there < line.sectors:
            notes.damage(
                "too-short",
                f"has {file.size} bytes, but {(line.offset + line.sectors) * 512} are needed",
                start + there,
                line.sectors - there,
            )
