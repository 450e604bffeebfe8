"""SOURCE as typed: what it names, and which engine opens it.

A folder of VMDKs, an .ova, a .vmx, or one .vmdk are read by the built-in engine; a ``vddk://`` URL
names disks for VMware's library (see ``remote``).
"""

import collections
import os
import re

from vddkfs.disks.vm import Chain, ImagePlan, LeftOut, Source, WorkerPlan
from vddkfs.engines.base import LinkInfo
from vddkfs.engines.config import VmdkConfig
from vddkfs.engines.vmdk.discover import discover
from vddkfs.errors import UnsupportedFormat, UsageError
from vddkfs.names import unique_names
from vddkfs.options import MountOptions
from vddkfs.remote import open_remote
from vddkfs.writing import local_refusal

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def open_source(text: str, options: MountOptions) -> Source:
    """Return what SOURCE *text* holds, leaving out (with the reason) what cannot be opened.

    Blocks while it reads descriptors and headers, or while a worker opens remote disks. Raises
    VddkfsError if nothing can be opened.
    """
    if not text or "\0" in text:
        raise UsageError("an empty SOURCE", advice="name a folder, an .ova, a .vmx or a .vmdk")
    url = _URL.match(text)
    if url is not None and url[1].lower() == "vddk":
        return open_remote(text, options)
    if url is not None:
        raise UnsupportedFormat(
            f"{text.split('?')[0]}: {url[1]}:// cannot be opened by this release",
            advice="name a folder of VMDKs, an .ova, a .vmx, a .vmdk or a vddk:// URL",
        )
    return _open_local(text, options)


def _open_local(text: str, options: MountOptions) -> Source:
    path = os.path.abspath(text)
    follow_any, raw_devices = options.follow_parents == "any", options.raw_devices == "yes"
    found = discover(path, follow_any=follow_any, raw_devices=raw_devices)
    names = unique_names(chain.name for chain in found.chains)
    chains = zip(names, found.chains, strict=True)
    # Under whatever name: a file may have several, and several descriptors.
    users = collections.Counter(file for chain in found.chains for file in _files(chain.links[0]))
    planned = []
    for number, (name, chain) in enumerate(chains):
        refusal = None
        if options.writable:
            shared = any(users[file] > 1 for file in _files(chain.links[0]))
            refusal = local_refusal(chain.links, options, shared=shared)
        planned.append(plan_local(number, name, chain.links, follow_any, raw_devices, refusal))
    return Source(
        text=text,
        path=path,
        engine="vmdk",
        chains=tuple(chain for chain, _ in planned),
        workers=tuple(worker for _, worker in planned),
        left_out=tuple(LeftOut(left.path, str(left.error)) for left in found.left_out),
    )


def _files(link: LinkInfo) -> set[tuple[int, int, int]]:
    return {(file.device, file.inode, file.offset) for file in link.identity.files}


def plan_local(
    worker: int,
    name: str,
    links: tuple[LinkInfo, ...],
    follow_any: bool,
    raw_devices: bool = False,
    refusal: str | None = None,
) -> tuple[Chain, WorkerPlan]:
    """Return the disk *name*, all of whose images the mount's worker number *worker* reads.

    The last link has no child that would keep its owner from writing it: it is live. *refusal* says
    why the base is not written, "" if it is; None: nobody asked for that.
    """
    images = tuple(ImagePlan(number, worker, number) for number in range(len(links)))
    paths = tuple(os.fsencode(link.path) for link in links)
    writable = refusal == ""
    config = VmdkConfig(
        links=paths,
        follow_any=follow_any,
        raw_devices=raw_devices,
        writable=writable,
        keep_content_id=writable and len(links) > 1,
    )
    chain = Chain(name, links, images, len(links) - 1, writable, refusal or "")
    return chain, WorkerPlan(name, config)
