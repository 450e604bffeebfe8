"""A fork: what was written to one image, instead of the source. Bytes on top of ``store``."""

from collections.abc import Callable, Iterator

from vddkfs.disks.overlay.extents import Extent, blocks_of, changed_bytes, kinds, merged
from vddkfs.disks.overlay.files import Files
from vddkfs.disks.overlay.space import Limits
from vddkfs.disks.overlay.store import Store
from vddkfs.disks.overlay.table import BELOW, BLOCK, ZERO, Run

ReadBelow = Callable[[int, int], bytes]
"""Return what the source has: *size* bytes from *offset*."""


class Fork:
    """The fork of an image of *capacity* bytes, kept in *folder* under the id *ident*.

    ``create`` makes an empty one, ``open`` goes on with one; ``close`` ends both. Offsets and sizes
    are in bytes, and lie inside the image; all methods raise OverlayError.

    Threads: any, several at once. Who writes has the range, rounded out to blocks of 4 KiB, for
    himself as far as other writers are concerned. Only ``touched`` and ``locate`` never wait for a
    disk.
    """

    def __init__(
        self, files: Files, folder: str, ident: bytes, capacity: int, limits: Limits
    ) -> None:
        self.folder = folder
        self.capacity = capacity
        self._piece = limits.piece * BLOCK
        self._store = Store(files, folder, ident, capacity, limits)

    def create(self) -> None:
        """Make the files of an empty fork in the folder, which is there and empty."""
        self._store.create()

    def open(self, *, read_only: bool = False) -> bool:
        """Go on with what is there. Returns False if the fork was not closed the last time.

        *read_only*: nothing in the folder is changed, and nothing may be written.
        """
        return self._store.open(read_only=read_only)

    def flush(self) -> None:
        """Return when all that was written before is on the disk.

        After a flush has failed for what the disk did, every flush and every write fails: what it
        lost cannot be told. Reads go on.
        """
        self._store.flush()

    def close(self) -> None:
        """Flush, and close the files. They are closed also if that fails."""
        self._store.close()

    @property
    def lost(self) -> bool:
        """Whether a flush has failed for what the disk did."""
        return self._store.lost

    # Looking

    @property
    def changed_bytes(self) -> int:
        """How much of the image is in the fork, zeros included."""
        with self._store.lock:
            return changed_bytes(self._store.map, self.capacity)

    @property
    def data_bytes(self) -> int:
        """How much of that is stored."""
        return self._store.map.data_blocks * BLOCK

    def touched(self, offset: int, size: int) -> bool:
        """Say whether any block of the range is in the fork."""
        first, count = blocks_of(offset, size)
        with self._store.lock:
            return self._store.map.touched(first, count)

    def locate(self, offset: int, size: int) -> list[Run]:
        """Return what the blocks of the range are: in a place, ZERO or BELOW.

        Places are to look at: what they hold may be another block's when the next commit is over.
        """
        self._check(offset, size)
        first, count = blocks_of(offset, size)
        with self._store.lock:
            return self._store.map.runs(first, count)

    def extents(self) -> Iterator[Extent]:
        """Return what is in the fork, in order, neighbours merged.

        What is written meanwhile may be there or not.
        """
        return merged(self._store.leaves(), self.capacity)

    # Reading

    def read_into(self, offset: int, into: memoryview) -> list[Extent]:
        """Fill *into* from *offset* with what is in the fork; return the gaps, which are not.

        Gaps are left as they are: the source has them, or had them when this was called.
        """
        self._check(offset, len(into))
        end = offset + len(into)
        first, count = blocks_of(offset, len(into))
        gaps = []
        with self._store.reading(first, count) as runs:
            for run in runs:
                begin = max(offset, run.block * BLOCK)
                stop = min(end, (run.block + run.blocks) * BLOCK)
                part = into[begin - offset : stop - offset]
                if run.place == BELOW:
                    gaps.append(Extent(begin, stop - begin, False))
                elif run.place == ZERO:
                    part[:] = bytes(len(part))
                else:
                    self._store.read(part, run.place, begin - run.block * BLOCK)
        return gaps

    # Writing

    def write(self, offset: int, data: bytes | memoryview, read_below: ReadBelow) -> None:
        """Write *data* from *offset*. It lasts when a ``flush`` that begins later has returned.

        *read_below* is asked for the rest of a block that *data* has a part of, and may raise what
        it likes. If this fails, each block is old or new.
        """
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self._check(offset, len(view))
        end = offset + len(view)
        while offset < end:
            block, skip = divmod(offset, BLOCK)
            whole = (end - offset) // BLOCK * BLOCK
            if skip or not whole:
                size = min(BLOCK - skip, end - offset)
                self._write(block, memoryview(self._merged(offset, view[:size], read_below)))
            else:
                size = min(whole, self._piece)
                self._write(block, view[:size])
            offset, view = offset + size, view[size:]

    def zero(self, offset: int, size: int, read_below: ReadBelow) -> None:
        """Write zeros, without an array of them."""
        self._check(offset, size)
        end = offset + size
        first, last = -(-offset // BLOCK), end // BLOCK
        if end == self.capacity:
            last = -(-end // BLOCK)
        if first >= last:
            self.write(offset, bytes(size), read_below)
            return
        self.write(offset, bytes(first * BLOCK - offset), read_below)
        self._store.put([(first, last - first, None)])
        if last * BLOCK < end:
            self.write(last * BLOCK, bytes(end - last * BLOCK), read_below)

    def _merged(self, offset: int, part: memoryview, read_below: ReadBelow) -> bytearray:
        """Return the block that *part* of it, from *offset* on, makes with what it was."""
        start = offset // BLOCK * BLOCK
        inside = min(BLOCK, self.capacity - start)
        content = bytearray(BLOCK)
        if len(part) < inside:
            view = memoryview(content)[:inside]
            for gap in self.read_into(start, view):
                below = read_below(gap.offset, gap.size)
                view[gap.offset - start :][: gap.size] = below
        content[offset - start : offset - start + len(part)] = part
        return content

    def _write(self, block: int, data: memoryview) -> None:
        """Write whole blocks, at most a piece."""
        self._store.put([(block + at, count, part) for at, count, part in kinds(data)])

    def _check(self, offset: int, size: int) -> None:
        if not 0 <= offset <= offset + size <= self.capacity:
            raise ValueError(f"{size} bytes from {offset} of an image of {self.capacity}")
