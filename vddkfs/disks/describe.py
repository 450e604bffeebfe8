"""Sources and disks in words: what vm.json and info.json hold, and what ``vddkfs info`` prints."""

from collections.abc import Sequence
from typing import Any

from vddkfs import __version__
from vddkfs.disks.disk import Disk
from vddkfs.disks.vm import Source
from vddkfs.engines.base import SECTOR, EngineFacts, LinkInfo


def describe_source(source: Source) -> dict[str, Any]:
    """Return what vm.json holds, and what ``vddkfs info --json`` prints."""
    return {
        "vddkfs": __version__,
        "source": source.path,
        "engine": {"name": source.engine, **describe_engine(source.facts)},
        "disks": [
            {
                "name": chain.name,
                "capacity": chain.capacity_bytes,
                **describe_hardware(chain.links),
                "links": [describe_link(link) for link in chain.links],
            }
            for chain in source.chains
        ],
        "left_out": [{"path": left.path, "reason": left.reason} for left in source.left_out],
    }


def describe_engine(facts: EngineFacts) -> dict[str, Any]:
    """Return what reads the disks, and how."""
    described = {"version": facts.version or __version__, "transport": facts.transport}
    if facts.build:
        described["build"] = facts.build
    if facts.library:
        described["library"] = facts.library
    return described


def describe_link(link: LinkInfo) -> dict[str, Any]:
    """Return one link as the documents show it; sizes in bytes."""
    return {
        "file": link.path,
        "format": link.format,
        "capacity": link.capacity * SECTOR,
        "cid": link.content_id,
        "parent_cid": link.parent_content_id,
        "parent_hint": link.parent_hint,
        **({"change_tracking": link.change_tracking} if link.change_tracking else {}),
        **({"notes": list(link.notes)} if link.notes else {}),
        **({"snapshot": link.identity.snapshot} if link.identity.snapshot else {}),
        **({"metadata": link.metadata} if link.metadata else {}),
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


def describe_hardware(links: Sequence[LinkInfo]) -> dict[str, str]:
    """Return what the descriptors say of the machine: the last link's word, else the base's."""
    base, last = links[0], links[-1]
    return {
        "uuid": last.uuid or base.uuid,
        "adapter": last.adapter or base.adapter,
        "hardware_version": last.hardware_version or base.hardware_version,
        "tools_version": last.tools_version or base.tools_version,
    }


def describe_disk(
    disk: Disk,
    engine: str = "vmdk",
    facts: EngineFacts | None = None,
    writers: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what info.json holds of *disk*; *writers* are the files that may be written."""
    shown = {
        image.number: {
            "image": f"chain/{image.number}.raw",
            "cache_policy": image.policy.value,
        }
        for image in disk.images
    }
    return {
        "name": disk.name,
        "capacity": disk.capacity,
        "logical_sector_size": SECTOR,
        "physical_sector_size": SECTOR,
        **describe_hardware(disk.links),
        "engine": engine,
        "transport": (facts or EngineFacts()).transport,
        "writable": list(writers),
        "links": [
            {"number": number, **shown.get(number, {}), **describe_link(link)}
            for number, link in enumerate(disk.links)
        ],
    }
