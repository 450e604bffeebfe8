"""Extents that are opened when they are first read: for a link that has too many to hold open.

A disk of 62 TiB in pieces of 2 GiB has more than thirty thousand. All of them are looked at when
the link is opened (each is there, a regular file, and long enough); what a sparse one has in its
header is checked when it is first read, and what is odd about it is told by `vddkfs check` only.

A ``Shelf`` bounds how many are open. An extent is closed only while nothing is being read, so that
no reader meets a descriptor that is another file's by then.
"""

import contextlib
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

from vddkfs.engines.base import FileStamp
from vddkfs.engines.vmdk.extents import DATA, UNSURE, Extent, Piece, WouldWait
from vddkfs.engines.vmdk.files import NO_LIMIT, OpenFile, stamp_of
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import EngineError, StaleImage, VddkfsError

MOST_OPEN = 1024
"""How many deferred extents a chain holds open at most."""

Opener = Callable[[], tuple[Extent, OpenFile]]


class Shelf:
    """The deferred extents that are open, the one that was used last at the end."""

    def __init__(self, most: int = 0) -> None:
        self.in_use = False
        self._most = most or _most_open()
        self._open: OrderedDict[DeferredExtent, None] = OrderedDict()
        self._readers = 0
        self._tidying = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep what is open, or becomes open, until the block ends. Not to be nested."""
        with self._changed:
            while self._tidying:
                self._changed.wait()
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                if self.is_full and not self._tidying:
                    self._tidy()
                self._changed.notify_all()

    def try_reading(self) -> bool:
        """Begin what ``reading`` does, for somebody who opens nothing; False if he had to wait.

        ``end_reading`` ends it.
        """
        with self._changed:
            if self._tidying:
                return False
            self._readers += 1
            return True

    def end_reading(self) -> None:
        """End what ``try_reading`` began. Never waits."""
        with self._changed:
            self._readers -= 1
            self._changed.notify_all()

    @property
    def is_full(self) -> bool:
        """Whether some will be closed when nobody reads: a long scan does well to pause."""
        return len(self._open) > self._most

    def use(self, extent: "DeferredExtent") -> Extent:
        """Return what *extent* stands for, opened now if it is not. For a reader only."""
        real = extent.opened()
        with self._changed:
            self._open[extent] = None
            self._open.move_to_end(extent)
        return real

    def close(self, extent: "DeferredExtent") -> None:
        """Close *extent*, which nobody reads."""
        with self._changed:
            self._open.pop(extent, None)
        extent.shut()

    def _tidy(self) -> None:
        """Close what was not used for longest, when all who read now have ended."""
        self._tidying = True
        try:
            while self._readers:
                self._changed.wait()
            while len(self._open) > self._most // 2:
                extent, _ = self._open.popitem(last=False)
                extent.shut()
        finally:
            self._tidying = False


def _most_open() -> int:
    """Return how many extents may be open: a part of the files that this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if soft == resource.RLIM_INFINITY else max(8, min(MOST_OPEN, soft // 4))


class DeferredExtent:
    """See ``Extent``: stands for the one that *opener* brings. Also see ``OpenFile``, in ``close``.

    *stamp* is what the file was when the link was opened; another one at its path is an error.
    """

    grain = 0
    holder = ""
    __slots__ = (
        "_file",
        "_lock",
        "_opener",
        "_shelf",
        "end",
        "fd",
        "limit",
        "link",
        "path",
        "real",
        "stamp",
        "start",
    )

    def __init__(
        self,
        start: int,
        sectors: int,
        path: str,
        link: str,
        stamp: FileStamp,
        opener: Opener,
        shelf: Shelf,
    ) -> None:
        self.start = start
        self.end = start + sectors
        self.path = path
        self.link = link
        self.stamp = stamp
        self.fd = -1
        self.limit = NO_LIMIT
        self.real: Extent | None = None
        self._file: OpenFile | None = None
        self._lock = threading.Lock()
        self._opener = opener
        self._shelf = shelf

    def locate(self, sector: int, count: int, fresh: bool, flags: int) -> int:
        """See ``Extent``."""
        return self.real.locate(sector, count, fresh, flags) if self.real is not None else UNSURE

    def pieces(self, sector: int, count: int, fresh: bool, flags: int) -> list[Piece]:
        """See ``Extent``."""
        if flags and self.real is None:
            raise WouldWait
        return self._shelf.use(self).pieces(sector, count, fresh, flags)

    def areas(self, sector: int, count: int) -> Iterator[tuple[int, int]]:
        """See ``Extent``. What cannot be opened is data: its reader meets the error."""
        try:
            real = self._shelf.use(self)
        except VddkfsError:
            real = None
        if real is None:
            return iter(((DATA, count),))
        return real.areas(sector, count)

    def unpack(self, piece: Piece, view: memoryview, fresh: bool, flags: int) -> None:
        """See ``Extent``."""
        self._shelf.use(self).unpack(piece, view, fresh, flags)

    def forget(self) -> None:
        """See ``Extent``."""
        if self.real is not None:
            self.real.forget()

    def opened(self) -> Extent:
        """Return what this stands for, opened if it is not. For the shelf.

        Raises EngineError, StaleImage.
        """
        real = self.real
        if real is not None:
            return real
        with self._lock:
            if self.real is None:
                self._open()
            assert self.real is not None
            return self.real

    def _open(self) -> None:
        try:
            real, file = self._opener()
        except StaleImage:
            raise
        except VddkfsError as error:
            raise EngineError(error.message, link=self.link, sector=self.start) from error
        if (file.stamp.device, file.stamp.inode) != (self.stamp.device, self.stamp.inode):
            file.close()
            raise StaleImage(f"{printable(self.path)} was replaced by another file")
        self._file, self.fd = file, file.fd
        self.real = real

    def shut(self) -> None:
        """Close the file if it is open. For the shelf."""
        file, self._file, self.real, self.fd = self._file, None, None, -1
        if file is not None:
            # It was open for reading: nothing is lost if a file system complains.
            with contextlib.suppress(OSError):
                file.close()

    def was_written(self) -> bool:
        """See ``OpenFile``."""
        return self._file is not None and self._file.was_written()

    def stamp_now(self) -> FileStamp:
        """Return the stamp of the file as it is now. Raises as ``OpenFile.stamp_now``."""
        found = stamp_of(self.path)
        if (found.device, found.inode) != (self.stamp.device, self.stamp.inode):
            raise StaleImage(f"{printable(self.path)} was replaced by another file")
        return found

    def close(self) -> None:
        """Close the file for good, when nobody reads it."""
        self._shelf.close(self)
