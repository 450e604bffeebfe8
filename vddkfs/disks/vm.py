"""What a SOURCE turned out to be: disks that can be mounted, and what was left out and why."""

from collections.abc import Sequence
from typing import Any

import msgspec

from vddkfs import __version__
from vddkfs.disks.disk import Disk
from vddkfs.engines.base import SECTOR, LinkInfo


class LeftOut(msgspec.Struct, frozen=True):
    """Something of the source that is not in the tree."""

    path: str
    reason: str


class Chain(msgspec.Struct, frozen=True):
    """One disk before it is mounted: the *name* of its folder, and its links, base first."""

    name: str
    links: tuple[LinkInfo, ...]

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the disk at the mounted point."""
        return self.links[-1].capacity * SECTOR


class Source(msgspec.Struct, frozen=True):
    """An opened SOURCE: *text* as it was typed, *path* made absolute."""

    text: str
    path: str
    engine: str
    chains: tuple[Chain, ...]
    left_out: tuple[LeftOut, ...]


def describe_source(source: Source) -> dict[str, Any]:
    """Return what vm.json holds, and what ``vddkfs info --json`` prints."""
    return {
        "vddkfs": __version__,
        "source": source.path,
        "engine": {"name": source.engine, "version": __version__, "transport": "file"},
        "disks": [
            {
                "name": chain.name,
                "capacity": chain.capacity_bytes,
                "links": [describe_link(link) for link in chain.links],
            }
            for chain in source.chains
        ],
        "left_out": [{"path": left.path, "reason": left.reason} for left in source.left_out],
    }


def describe_link(link: LinkInfo) -> dict[str, Any]:
    """Return one link as the documents show it; sizes in bytes."""
    return {
        "file": link.path,
        "format": link.format,
        "capacity": link.capacity * SECTOR,
        "cid": link.content_id,
        "parent_cid": link.parent_content_id,
        "parent_hint": link.parent_hint,
        "extents": [
            {
                "kind": extent.kind,
                "access": extent.access,
                "size": extent.sectors * SECTOR,
                "file": extent.path,
                "offset": extent.offset * SECTOR,
                "file_size": extent.file_bytes,
                "allocated": extent.allocated_bytes,
            }
            for extent in link.extents
        ],
    }


def describe_disk(disk: Disk, writers: Sequence[str] = ()) -> dict[str, Any]:
    """Return what info.json holds of *disk*; *writers* are the files that may be written."""
    base, last = disk.links[0], disk.links[-1]
    return {
        "name": disk.name,
        "capacity": disk.capacity,
        "logical_sector_size": SECTOR,
        "physical_sector_size": SECTOR,
        "uuid": last.uuid or base.uuid,
        "adapter": last.adapter or base.adapter,
        "hardware_version": last.hardware_version or base.hardware_version,
        "tools_version": last.tools_version or base.tools_version,
        "engine": "vmdk",
        "transport": "file",
        "writable": list(writers),
        "links": [
            {
                "number": number,
                "image": f"chain/{number}.raw",
                "cache_policy": policy(number < len(disk.links) - 1),
                **describe_link(link),
            }
            for number, link in enumerate(disk.links)
        ],
    }


def policy(frozen: bool) -> str:
    """Return the word for how an image is cached (see the manual, Semantics)."""
    return "immutable" if frozen else "close-to-open"
