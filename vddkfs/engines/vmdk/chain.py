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
from vddkfs.engines.vmdk.files import NOTHING_OUTSIDE, Archives, Trust, open_file, resolve
from vddkfs.engines.vmdk.opening import Context, open_link
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import BrokenChain, SourceMissing, VddkfsError

MAX_LINKS = 254
"""A base and 253 deltas: more than vSphere (32 snapshots) or VDDK allow."""

_FileId = tuple[int, int, int]


class Links:
    """The links that one look at a SOURCE finds, each opened once, however many chains have it.

    Hints and extents outside a link's folder are followed as far as *trust* goes. Nothing stays
    open.
    """

    def __init__(self, trust: Trust = NOTHING_OUTSIDE, archives: Archives | None = None) -> None:
        self._trust = trust
        self._archives = archives or Archives()
        self._known: dict[str, LinkInfo | VddkfsError] = {}

    def chain(self, leaf: str) -> tuple[LinkInfo, ...]:
        """Open the chain that ends with the VMDK *leaf*, check it, and describe it base first.

        Raises BrokenChain, and all that ``open_link`` raises, for the first link that fails.
        """
        links: list[LinkInfo] = []
        files: set[_FileId] = set()
        path = os.path.abspath(leaf)
        while True:
            info = self._describe(path, links)
            _check(info, links, files)
            links.append(info)
            files.add(_file(info))
            if info.parent_content_id == NO_PARENT:
                return tuple(reversed(links))
            if not info.parent_hint:
                raise BrokenChain(
                    f"{printable(info.path)}: has the parent content id {info.parent_content_id}, "
                    "but does not say which file that is",
                    advice="restore its descriptor from a good copy",
                )
            path = resolve(info.parent_hint, info.path, self._trust)

    def _describe(self, path: str, links: list[LinkInfo]) -> LinkInfo:
        """Describe the link *path*; the last of *links*, if any, is the child that names it."""
        if path not in self._known:
            self._known[path] = self._look(path)
        found = self._known[path]
        if isinstance(found, LinkInfo):
            return found
        # What is missing may be one of its extents.
        if isinstance(found, SourceMissing) and links and self._is_missing(path):
            raise BrokenChain(
                f"{printable(path)}: is missing, but is the parent of {printable(links[-1].path)}",
                advice="bring the file back, under that name",
            ) from found
        raise found

    def _look(self, path: str) -> LinkInfo | VddkfsError:
        """Return what the link *path* is, or why it cannot be opened."""
        # One context a link: only the links of an engine are open, and share a bound, together.
        context = Context(self._trust, table_cache_bytes=0, archives=self._archives)
        try:
            link = open_link(path, context)
        except VddkfsError as error:
            return error
        link.close()
        return link.info

    def _is_missing(self, path: str) -> bool:
        """Say whether there is no file *path*, be it in a folder or in an archive."""
        try:
            open_file(path, self._archives).close()
        except SourceMissing:
            return True
        except VddkfsError:
            return False
        return False


def describe_chain(leaf: str, trust: Trust = NOTHING_OUTSIDE) -> tuple[LinkInfo, ...]:
    """Describe one chain; see ``Links.chain``."""
    return Links(trust).chain(leaf)


def _check(info: LinkInfo, links: list[LinkInfo], files: set[_FileId]) -> None:
    """Check that *info* may follow *links*, which begin with the leaf and are in *files*."""
    path = printable(info.path)
    if _file(info) in files:
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


def _file(info: LinkInfo) -> _FileId:
    stamp = info.identity.files[0]
    return stamp.device, stamp.inode, stamp.offset
