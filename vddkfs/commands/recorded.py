"""The disk that an overlay says it was made on, opened again by the built-in engine.

The overlay has the identity of every link: a disk that is another one by now is not read.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Final

from vddkfs.disks.overlay.manage import Reading
from vddkfs.engines.base import SECTOR, LinkIdentity
from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.engines.vmdk.chain import describe_chain
from vddkfs.engines.vmdk.files import Trust, open_file
from vddkfs.engines.vmdk.recognise import read_descriptor
from vddkfs.engines.vmdk.text import printable
from vddkfs.engines.vmdk.write.child import Parent, copied
from vddkfs.errors import OverlayError

_EXTENTS: Final = 4096
_SECONDS: Final = 0.5
"""How much of a map is asked for at once."""


class RecordedDisk:
    """What is below the fork *found* of the overlay *folder*, opened as far as *trust* goes.

    *links* are those of the image. *forced* takes files that were written since. ``close`` ends it.
    Raises OverlayError if the disk is not what it was or cannot be read here, and what opening a
    chain raises. For one thread.
    """

    def __init__(self, folder: str, found: Reading, trust: Trust, *, forced: bool) -> None:
        self._folder = folder
        self._name = found.disk.name
        self._image = found.number
        self._forced = forced
        was = found.disk.links[: found.number + 1]
        if not all(link.files for link in was):
            raise OverlayError(
                f"{printable(folder)}: {printable(self._name)} was read by VMware's library, which "
                "this command does not use",
                advice="mount it again with that overlay= and copy the image's file; or export the "
                "changed extents as json",
            )
        self.links = describe_chain(was[-1].path, trust)
        now = [link.identity for link in self.links]
        self._compare(was, now, forced)
        if self.links[-1].capacity * SECTOR != found.fork.capacity:
            raise self._another(f"it had {found.fork.capacity} bytes", forced=True)
        paths = [link.path for link in self.links]
        self._engine = VmdkEngine(paths, follow_any=trust.outside, raw_devices=trust.devices)
        try:
            self._compare(now, self._engine.identities(), forced)
        except BaseException:
            self._engine.close()
            raise

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill *into*, whole sectors, from byte *offset* of the image. Raises EngineError."""
        sector, count = offset // SECTOR, len(into) // SECTOR
        self._engine.read(self._image, sector, count, into, False)

    def data(self) -> Iterator[tuple[int, int]]:
        """Yield where there may be anything but zeros, in bytes: (begin, end), in order."""
        sector, end = 0, self.links[-1].capacity
        while sector < end:
            found = self._engine.map(self._image, sector, end - sector, _EXTENTS, _SECONDS)
            for extent in found.extents:
                if extent.data:
                    yield extent.sector * SECTOR, (extent.sector + extent.count) * SECTOR
            sector = found.next_sector

    def parent(self) -> Parent:
        """Return the image's last link, to be the parent of another.

        Raises OverlayError for one in an archive.
        """
        last = self.links[-1]
        if not os.path.isfile(last.path):
            raise OverlayError(
                f"{printable(last.path)}: is in an archive, where no VMDK can have its parent",
                advice="export the disk as raw",
            )
        descriptors = []
        for link in reversed(self.links):
            file = open_file(link.path)
            try:
                descriptors.append(read_descriptor(file)[0])
            finally:
                file.close()
        return Parent(last.path, last.content_id, last.capacity, copied(descriptors))

    def check_again(self) -> None:
        """Raise OverlayError, or StaleImage, if the disk was written since it was opened.

        *forced* takes that, but not a last link with another content id: a child has named it.
        """
        was = [link.identity for link in self.links]
        now = self._engine.revalidate()
        self._compare(was, now, self._forced)
        before, after = was[-1].content_id, now[-1].content_id
        if before != after:
            raise self._another(f"content id {before} became {after}", forced=True)

    def close(self) -> None:
        """Close the files."""
        self._engine.close()

    def _compare(
        self, was: Sequence[LinkIdentity], now: Sequence[LinkIdentity], forced: bool
    ) -> None:
        if len(was) != len(now):
            raise self._another(f"it had {len(was)} links and has {len(now)}", forced=True)
        for mine, theirs in zip(was, now, strict=True):
            change = mine.change_to(theirs, live=forced)
            if change:
                raise self._another(change, forced=bool(mine.replaced_by(theirs)))

    def _another(self, what: str, *, forced: bool) -> OverlayError:
        """Return the error for a disk that is not what it was; *forced*: nothing can force that."""
        advice = "bring back the source that the overlay was made on"
        if not forced:
            advice += (
                "; or force it (-o overlay_force=yes), if you know that its content is the same"
            )
        return OverlayError(
            f"{printable(self._folder)}: it was made for another source: disk "
            f"{printable(self._name)}: {printable(what)}",
            advice=advice,
        )
