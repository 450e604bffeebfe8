"""One VMDK that is open: its extents, and what it is. See ``opening`` for how it comes about.

The files of a link stay open from ``open_link`` to ``OpenLink.close`` (but see ``deferred``), and
what the descriptor promises of them was checked: a link that opens can be read, but for damage
inside its grain tables and grains, which shows when a range is read.
"""

import contextlib
from bisect import bisect_right
from collections.abc import Iterator
from typing import Protocol

from vddkfs.engines.base import FileStamp, LinkIdentity, LinkInfo
from vddkfs.engines.vmdk.deferred import DeferredExtent
from vddkfs.engines.vmdk.extents import Extent, Piece
from vddkfs.errors import StaleImage


class StampedFile(Protocol):
    """A file of a link, open or not."""

    @property
    def stamp(self) -> FileStamp:
        """What it was when the link was opened."""

    @property
    def holder(self) -> str:
        """The archive that it is in, or ""."""

    def was_written(self) -> bool:
        """Say whether what is open of it was written since the link was opened."""

    def stamp_now(self) -> FileStamp:
        """Return what it is now. Raises StaleImage, SourceMissing, AccessDenied."""

    def close(self) -> None:
        """Close it."""


class OpenLink:
    """An opened VMDK. *extents* cover [0, ``capacity``) sectors without gaps."""

    def __init__(
        self, info: LinkInfo, files: tuple[StampedFile, ...], extents: tuple[Extent, ...]
    ) -> None:
        self.info = info
        self.path = info.path
        self.capacity = info.capacity
        self.extents = extents
        self._files = files
        self._held = [file for file in files if file.holder]
        self.in_archive = bool(self._held)
        self.deferred = any(isinstance(extent, DeferredExtent) for extent in extents)
        self._starts = [extent.start for extent in extents]

    def extent_at(self, sector: int) -> Extent:
        """Return the extent that has *sector*, which is below ``capacity``."""
        return self.extents[bisect_right(self._starts, sector) - 1]

    def pieces(self, sector: int, count: int, fresh: bool, flags: int) -> list[Piece]:
        """Return the runs of [*sector*, *sector* + *count*), all in the link; see ``Extent``."""
        extent = self.extent_at(sector)
        if sector + count <= extent.end:
            return extent.pieces(sector, count, fresh, flags)
        found: list[Piece] = []
        end = sector + count
        while sector < end:
            extent = self.extent_at(sector)
            stop = min(end, extent.end)
            found += extent.pieces(sector, stop - sector, fresh, flags)
            sector = stop
        return found

    def areas(self, sector: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield (kind, sectors) of [*sector*, *sector* + *count*); see ``Extent``."""
        end = sector + count
        while sector < end:
            extent = self.extent_at(sector)
            stop = min(end, extent.end)
            yield from extent.areas(sector, stop - sector)
            sector = stop

    def look_again(self, problem: str) -> LinkIdentity:
        """Forget all tables, and return what the open files are now.

        For a link that cannot be opened anew because of *problem*. Raises StaleImage, SourceMissing
        or AccessDenied if a path leads to another file than the one that is open.
        """
        for extent in self.extents:
            extent.forget()
        stamps = tuple(file.stamp_now() for file in self._files)
        was = self.info.identity
        return LinkIdentity(was.path, was.content_id, was.capacity, stamps, problem)

    def check_holders(self) -> None:
        """Raise StaleImage if an archive that files of the link are in has been written.

        What was a part of one file may be a part of another by then.
        """
        for file in self._held:
            if file.was_written():
                raise StaleImage(f"{file.stamp.path}: the archive was written since it was opened")

    def close(self) -> None:
        """Close the link's files."""
        for file in self._files:
            # They were open for reading: nothing is lost if a file system complains.
            with contextlib.suppress(OSError):
                file.close()
