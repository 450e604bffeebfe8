"""What a SOURCE turned out to be: disks that can be mounted, and what was left out and why."""

import msgspec

from vddkfs.engines.base import SECTOR, EngineFacts, LinkInfo
from vddkfs.engines.config import EngineConfig


class LeftOut(msgspec.Struct, frozen=True):
    """Something of the source that is not in the tree."""

    path: str
    reason: str


class WorkerPlan(msgspec.Struct, frozen=True):
    """A worker that the mount is to have: *name* for messages, and what it opens.

    *secret* is a descriptor that the worker gets the credentials from, or -1. *folder* is the
    mount's folder for what its workers leave, or empty.
    """

    name: str
    config: EngineConfig
    secret: int = -1
    folder: str = ""


class ImagePlan(msgspec.Struct, frozen=True):
    """Who reads the image of link *number*: *worker* (a place in ``Source.workers``) as *index*."""

    number: int
    worker: int
    index: int


class Chain(msgspec.Struct, frozen=True):
    """One disk before it is mounted: the *name* of its folder, and its links, base first.

    *live* is the number of the link that somebody may write, or -1. *images* are those that can be
    read, by their links' numbers; the last one is the disk at the mounted point. *writable*: image
    0 may be written in this mount; *unwritable* says why not, where that was asked for.
    """

    name: str
    links: tuple[LinkInfo, ...]
    images: tuple[ImagePlan, ...]
    live: int = -1
    writable: bool = False
    unwritable: str = ""

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the disk at the mounted point."""
        return self.links[self.images[-1].number].capacity * SECTOR


class Source(msgspec.Struct, frozen=True):
    """An opened SOURCE: *text* as it was typed, *path* made absolute."""

    text: str
    path: str
    engine: str
    chains: tuple[Chain, ...]
    workers: tuple[WorkerPlan, ...]
    left_out: tuple[LeftOut, ...]
    facts: EngineFacts = EngineFacts()
