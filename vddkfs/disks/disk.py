"""A disk of the mounted VM: its chain of links, its images, and the watch over what they stand for.

Link 0 is the base. Every link but the last has a child and is *frozen*: nobody may write it, and it
is cached for as long as its identity holds. The last link is *live*: whoever owns it may write it
at any time, so that each open of its image begins with nothing older than that open.
"""

import errno
import logging
import os
from collections.abc import Sequence

import trio

from vddkfs.cache.arena import FRAME
from vddkfs.cache.frames import DiskCache, SectorCache
from vddkfs.disks.coalesce import Coalesced
from vddkfs.disks.image import Image
from vddkfs.engines.base import SECTOR, LinkIdentity, LinkInfo
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.protocol import EngineConfig
from vddkfs.engines.requests import Patience
from vddkfs.errors import StaleImage

log = logging.getLogger(__name__)


class Disk:
    """One chain, served by one worker. *name* is its folder's name; *links* are base first."""

    def __init__(
        self,
        name: str,
        links: Sequence[LinkInfo],
        *,
        nursery: trio.Nursery,
        cache: SectorCache,
        patience: Patience,
        read_ahead: int,
        follow_any: bool = False,
    ) -> None:
        self.name = name
        self.links = tuple(links)
        self._identities = tuple(link.identity for link in links)
        config = EngineConfig(
            links=tuple(os.fsencode(link.path) for link in links), follow_any=follow_any
        )
        self.client = WorkerClient(name, config, patience, self._opened)
        self.cache: DiskCache = cache.disk(name, self.client)
        self._revalidated = Coalesced(nursery, self._revalidate)
        self.images = tuple(
            Image(
                f"{name}/chain/{number}.raw",
                self.links[: number + 1],
                frozen=number < len(self.links) - 1,
                client=self.client,
                cache=self.cache,
                revalidate=self.revalidate,
                nursery=nursery,
                # What is fetched ahead must not push itself out of a small cache.
                read_ahead=min(read_ahead, max(FRAME, cache.arena.share_bytes // 4)),
            )
            for number in range(len(self.links))
        )

    @property
    def top(self) -> Image:
        """The image at the mounted point: the whole chain."""
        return self.images[-1]

    @property
    def capacity(self) -> int:
        """Bytes of the disk at the mounted point."""
        return self.links[-1].capacity * SECTOR

    async def revalidate(self) -> None:
        """Compare every link with what it was, beginning after this call. Raises VddkfsError.

        A change of a frozen link, or a replaced live one, makes the images above it another disk:
        their open files get ESTALE, and files opened after this call show the new one.
        """
        await self._revalidated()

    async def _revalidate(self) -> None:
        now = await self.client.revalidate()
        if self._changed(now):
            await self.client.reopen()
        elif now[-1] != self._identities[-1]:
            if now[-1].problem and now[-1].problem != self._identities[-1].problem:
                log.error("disk %s can be read in part only: %s", self.name, now[-1].problem)
            self._identities = now
            self.top.modified(now[-1])
        self._check_capacities()

    def _opened(self, identities: tuple[LinkIdentity, ...]) -> None:
        """Look at what a new worker has opened, before anybody reads from it.

        If that is another disk, what was asked of the old one is still answered, but reaches
        nobody: the images' generations have moved.
        """
        self._changed(identities)
        self._check_capacities()

    def _changed(self, now: tuple[LinkIdentity, ...]) -> bool:
        """Say whether an image has become another disk, and make its open files stale if so."""
        if len(now) != len(self.links):
            raise StaleImage(f"disk {self.name}: it has {len(now)} links now")
        for number, (was, found) in enumerate(zip(self._identities, now, strict=True)):
            live = number == len(self.links) - 1
            change = was.replaced_by(found) if live else was.difference(found)
            if change:
                log.error(
                    "disk %s: link %d (%s) changed under the mount: %s; files that are open on "
                    "chain/%d.raw and above get ESTALE",
                    self.name,
                    number,
                    was.path,
                    change,
                    number,
                )
                self._identities = now
                for image in self.images[number:]:
                    image.supersede()
                return True
        return False

    def _check_capacities(self) -> None:
        """Refuse to show a disk in files of another size, for as long as it has another size."""
        for link, identity in zip(self.links, self._identities, strict=True):
            if link.capacity != identity.capacity:
                raise StaleImage(
                    f"disk {self.name}: the capacity of {link.path} was {link.capacity} sectors "
                    f"and is {identity.capacity}",
                    advice="mount again to see the disk as it is now",
                    errno=errno.ESTALE,
                )
