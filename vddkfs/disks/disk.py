"""A disk of the mounted VM: its chain of links, its images, and the watch over what they stand for.

Link 0 is the base. A link that has a child, or that a snapshot holds, is *frozen*: nobody may write
it, and it is cached for as long as its identity holds. A *live* link may be written at any time by
whoever owns it, so that each open of its image begins with nothing older than that open.

A *channel* is one worker and those images of the disk that it reads: the built-in engine reads all
images of a disk in one worker, VDDK has one for each connection.
"""

import errno
import functools
import logging
import time
from collections.abc import Collection, Sequence

import trio

from vddkfs.cache.arena import FRAME
from vddkfs.cache.coherence import policy
from vddkfs.cache.frames import DiskCache, SectorCache
from vddkfs.disks.base_writes import BaseWrites
from vddkfs.disks.coalesce import Coalesced
from vddkfs.disks.image import Image
from vddkfs.disks.vm import Chain, ImagePlan
from vddkfs.engines.base import LinkIdentity, Step
from vddkfs.engines.client import WorkerClient
from vddkfs.errors import StaleImage, VddkfsError

log = logging.getLogger(__name__)


class Channel:
    """A worker's *client*, the cache that it fills, and the images that it reads."""

    def __init__(self, client: WorkerClient, cache: DiskCache, images: Sequence[ImagePlan]) -> None:
        self.client = client
        self.cache = cache
        self.images = tuple(images)
        self.suspect = False
        """Set when an image of it turned out to be another disk by what another worker has found:
        what this one has open is of before."""

    def identities(self, found: Sequence[LinkIdentity]) -> dict[int, LinkIdentity]:
        """Return the worker's identities by the numbers of this disk's links.

        Raises StaleImage if the worker has other images than it was asked for.
        """
        if len(found) <= max(plan.index for plan in self.images):
            raise StaleImage(f"{self.client.name}: it has {len(found)} links now")
        return {plan.number: found[plan.index] for plan in self.images}


class Disk:
    """One chain. *clients* are the mount's workers, by the numbers that the chain's images name.

    *mode* is the mount option ``cache`` (see ``vddkfs.cache.coherence.policy``).
    """

    def __init__(
        self,
        chain: Chain,
        clients: Sequence[WorkerClient],
        *,
        nursery: trio.Nursery,
        cache: SectorCache,
        read_ahead: int,
        mode: str = "auto",
    ) -> None:
        self.name = chain.name
        self._mode = mode
        self.links = chain.links
        self.live = chain.live
        self._writable = chain.writable
        self._numbers = [plan.number for plan in chain.images]
        self._identities = {n: chain.links[n].identity for n in self._numbers}
        self._channels: dict[int, Channel] = {}
        for worker in dict.fromkeys(plan.worker for plan in chain.images):
            mine = [plan for plan in chain.images if plan.worker == worker]
            client = clients[worker]
            key = chain.name if len(mine) == len(chain.images) else f"{chain.name}/{mine[0].number}"
            self._channels[worker] = Channel(client, cache.disk(key, client), mine)
        self._revalidated = {
            worker: Coalesced(nursery, functools.partial(self._revalidate, channel))
            for worker, channel in self._channels.items()
        }
        # What is fetched ahead must not push itself out of a small cache.
        ahead = min(read_ahead, max(FRAME, cache.arena.share_bytes // 4))
        self.images = tuple(self._image(plan, nursery, ahead) for plan in chain.images)
        if chain.writable:
            self._let_write()
        elif chain.unwritable:
            self.images[0].read_only = chain.unwritable

    def _let_write(self) -> None:
        """Let the base be written; all images above it show what is written."""
        base = self.images[0]
        client = next(
            channel.client
            for channel in self._channels.values()
            if any(plan.number == base.number for plan in channel.images)
        )
        base.writes = BaseWrites(base.name, client, base.cache, self._wrote)
        for image in self.images[1:]:
            image.above_writes = True
            image.read_only = "only the base of a chain is written"

    async def prove_access(self) -> None:
        """Have the base opened to be written. Raises VddkfsError, saying why it cannot be."""
        await self.images[0].look()

    def _wrote(self, start: int, end: int) -> None:
        for image in self.images:
            image.wrote(start, min(end, image.capacity))

    def _may_change(self, number: int) -> bool:
        """Whether the content of link *number* may move: by its owner, or by this mount."""
        return number == self.live or (number == 0 and self._writable)

    def _image(self, plan: ImagePlan, nursery: trio.Nursery, read_ahead: int) -> Image:
        channel = self._channels[plan.worker]
        frozen = plan.number != self.live and not self._writable
        return Image(
            f"{self.name}/chain/{plan.number}.raw",
            self.links[: plan.number + 1],
            index=plan.index,
            policy=policy(frozen, self._mode),
            client=channel.client,
            cache=channel.cache,
            revalidate=self._revalidated[plan.worker],
            nursery=nursery,
            read_ahead=read_ahead,
        )

    @property
    def clients(self) -> list[WorkerClient]:
        """The workers that read this disk."""
        return [channel.client for channel in self._channels.values()]

    @property
    def caches(self) -> list[DiskCache]:
        """What is kept of this disk, one cache for each of its workers."""
        return [channel.cache for channel in self._channels.values()]

    @property
    def top(self) -> Image:
        """The image at the mounted point: the whole chain."""
        return self.images[-1]

    @property
    def capacity(self) -> int:
        """Bytes of the disk at the mounted point."""
        return self.top.capacity

    async def _revalidate(self, channel: Channel) -> None:
        """Compare every link of *channel* with what it was. Raises VddkfsError.

        A change of a frozen link, or a replaced live one, makes the images above it another disk:
        their open files get ESTALE, and files opened after this call show the new one.
        """
        if self._mode == "auto" and not channel.suspect:
            found = await channel.client.revalidate()
        else:
            channel.suspect = False
            try:
                found = (await channel.client.renew()).identities
            except VddkfsError:
                channel.suspect = True
                raise
        await self._look(channel, found)

    async def _look(self, channel: Channel, identities: Sequence[LinkIdentity]) -> None:
        """Compare what the worker of *channel* has found with what was mounted."""
        now = channel.identities(identities)
        if self._changed(now, channel):
            await channel.client.reopen()
        elif self.live in now and now[self.live] != self._identities[self.live]:
            found = now[self.live]
            if found.problem and found.problem != self._identities[self.live].problem:
                log.error("disk %s can be read in part only: %s", self.name, found.problem)
            self._identities[self.live] = found
            self.top.modified(found)
        self._check_capacities()

    async def invalidate(
        self, images: Collection[Image], start: int = 0, end: int | None = None
    ) -> list[Step]:
        """Have nothing older than this call served of *images*, but from the kernel's own pages.

        What is cached of [*start*, *end*) (in bytes; by default everything) is dropped; a worker
        drops all that it has. Images that turn out to be another disk are superseded. Where the
        source cannot be asked that is a step that is not done; the cache is dropped all the same,
        so that later reads ask the source, or fail.
        """
        wanted = {image.number for image in images}
        channels = [
            channel
            for channel in self._channels.values()
            if any(plan.number in wanted for plan in channel.images)
        ]
        steps: list[Step] = []

        async def renew(channel: Channel) -> None:
            steps.extend(await self._renewed(channel))

        # All of them before anything is dropped: what one worker still reads could fill a page of
        # a device that another reads from next.
        async with trio.open_nursery() as nursery:
            for channel in channels:
                nursery.start_soon(renew, channel)
        for image in images:
            steps += _dropped(image, start, end)
        return steps

    async def _renewed(self, channel: Channel) -> list[Step]:
        """Have a worker know nothing of before; return what was done, or why it was not."""
        began = time.perf_counter()
        steps: list[Step] = []
        try:
            renewal = await channel.client.renew()
            steps += renewal.steps
            await self._look(channel, renewal.identities)
        except VddkfsError as error:
            seconds = time.perf_counter() - began
            steps.append(Step("library", channel.client.name, str(error), seconds, done=False))
        return steps

    def opened(self, worker: int, identities: Sequence[LinkIdentity]) -> None:
        """Look at what a new process of *worker* has opened, before anybody reads from it.

        If that is another disk, what was asked of the old one is still answered, but reaches
        nobody: the images' generations have moved. Raises StaleImage if it cannot be shown at all.
        """
        channel = self._channels.get(worker)
        if channel is not None:
            self._changed(channel.identities(identities), channel)
            self._check_capacities()

    def _changed(self, now: dict[int, LinkIdentity], channel: Channel) -> bool:
        """Say whether an image has become another disk, and make its open files stale if so.

        *channel* has found what there is *now*; what other workers have open of such images is not
        believed in any more.
        """
        for number, found in sorted(now.items()):
            was = self._identities[number]
            change = was.change_to(found, self._may_change(number))
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
                self._identities.update(now)
                for image in self.images:
                    if image.number >= number:
                        image.supersede()
                for other in self._channels.values():
                    above = any(plan.number >= number for plan in other.images)
                    other.suspect = other.suspect or (above and other is not channel)
                return True
        return False

    def _check_capacities(self) -> None:
        """Refuse to show a disk in files of another size, for as long as it has another size."""
        for number, identity in self._identities.items():
            link = self.links[number]
            if link.capacity != identity.capacity:
                raise StaleImage(
                    f"disk {self.name}: the capacity of {link.path} was {link.capacity} sectors "
                    f"and is {identity.capacity}",
                    advice="mount again to see the disk as it is now",
                    errno=errno.ESTALE,
                )


def _dropped(image: Image, start: int, end: int | None) -> list[Step]:
    """Drop what the daemon keeps of an image."""
    began = time.perf_counter()
    had_map = image.map is not None
    image.drop(start, end)
    seconds = time.perf_counter() - began
    told = "the allocation map is dropped" if had_map else "there was no allocation map"
    return [
        Step("tables", image.name, told, 0.0),
        Step("cache", image.name, "what was cached is dropped", seconds),
    ]
