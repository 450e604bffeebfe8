"""From a link to its base: the snapshot chain that parentFileNameHint and the content ids tell.

Rules, from "Virtual Disk Format 5.0" where it speaks, else as other readers do:

- parentCID ffffffff makes a link the base, whatever its hint says.
- A hint is relative to the folder of the link that has it.
- A link's parentCID must equal its parent's CID: otherwise the parent was written after the
  snapshot, and what the two show together is a mixture that never existed.
- Links may differ in capacity (a disk is enlarged after its snapshot was taken): beyond its parent
  a link that has nothing shows zeros, and a parent's surplus is not seen.
"""

import os

from vddkfs.engines.base import LinkInfo
from vddkfs.engines.vmdk.descriptor import NO_PARENT
from vddkfs.engines.vmdk.files import NOTHING_OUTSIDE, Trust, resolve
from vddkfs.engines.vmdk.opening import Context, open_link
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import BrokenChain, SourceMissing

MAX_LINKS = 254
"""A base and 253 deltas: more than vSphere (32 snapshots) or VDDK allow."""


def describe_chain(leaf: str, trust: Trust = NOTHING_OUTSIDE) -> tuple[LinkInfo, ...]:
    """Open the chain that ends with the VMDK *leaf*, check it, and describe it base first.

    Hints and extents outside a link's folder are followed as far as *trust* goes. Nothing stays
    open. Raises BrokenChain, and all that ``open_link`` raises, for the first link that fails.
    """
    links: list[LinkInfo] = []
    path = os.path.abspath(leaf)
    while True:
        info = _describe(path, links, trust)
        _check(info, links)
        links.append(info)
        if info.parent_content_id == NO_PARENT:
            return tuple(reversed(links))
        if not info.parent_hint:
            raise BrokenChain(
                f"{printable(info.path)}: has the parent content id {info.parent_content_id}, "
                "but does not say which file that is",
                advice="restore its descriptor from a good copy",
            )
        path = resolve(info.parent_hint, info.path, trust)


def _describe(path: str, links: list[LinkInfo], trust: Trust) -> LinkInfo:
    """Describe the link *path*; the last of *links*, if any, is the child that names it."""
    try:
        link = open_link(path, Context(trust, table_cache_bytes=0))
    except SourceMissing as error:
        if not links or os.path.exists(path):
            raise
        raise BrokenChain(
            f"{printable(path)}: is missing, but is the parent of {printable(links[-1].path)}",
            advice="bring the file back, under that name",
        ) from error
    link.close()
    return link.info


def _check(info: LinkInfo, links: list[LinkInfo]) -> None:
    """Check that *info* may follow *links*, which begin with the leaf."""
    path = printable(info.path)
    if _file(info) in map(_file, links):
        raise BrokenChain(
            f"{path}: is its own ancestor: the chain is a loop, closed by "
            f"{printable(links[-1].path)}",
            advice="correct parentFileNameHint there",
        )
    if len(links) == MAX_LINKS:
        raise BrokenChain(
            f"{printable(links[0].path)}: its chain has more than {MAX_LINKS} links",
            advice="consolidate the snapshots",
        )
    if links and links[-1].parent_content_id != info.content_id:
        raise BrokenChain(
            f"{path}: its content id is {info.content_id}, but its child "
            f"{printable(links[-1].path)} was made on {links[-1].parent_content_id}",
            advice="the parent was changed after the snapshot, or is another file: "
            "restore the one that belongs to it",
        )


def _file(info: LinkInfo) -> tuple[int, int, int]:
    stamp = info.identity.files[0]
    return stamp.device, stamp.inode, stamp.offset
