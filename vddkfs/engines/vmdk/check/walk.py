"""`vddkfs check`: the structures of every chain of a SOURCE, walked without changing anything.

A generator of findings and of how far it is; it prints nothing and goes on after damage as far as
it can. What ``open_link`` refuses is looked at as well, so files are opened and parsed here.

A chain's links are looked at from the base up, each once, however many chains it is in. Files that
someone writes meanwhile look damaged.
"""

import os
import re
from collections.abc import Iterator

import msgspec

from vddkfs.engines.vmdk.chain import MAX_LINKS
from vddkfs.engines.vmdk.check.link import check_link
from vddkfs.engines.vmdk.check.notes import DAMAGE, UNCHECKED, WARNING, Finding, said
from vddkfs.engines.vmdk.descriptor import (
    MAX_DESCRIPTOR_BYTES,
    Descriptor,
    looks_like_descriptor,
    parse_descriptor,
)
from vddkfs.engines.vmdk.files import (
    NOTHING_OUTSIDE,
    OpenFile,
    Trust,
    is_archive,
    open_file,
    resolve,
)
from vddkfs.engines.vmdk.folder import Folder
from vddkfs.engines.vmdk.recognise import read_descriptor
from vddkfs.engines.vmdk.sparse import HEADER_BYTES, MAGIC, SparseHeader
from vddkfs.engines.vmdk.text import printable
from vddkfs.engines.vmdk.vmx import MAX_VMX_BYTES, parse_vmx
from vddkfs.errors import (
    AccessDenied,
    DamagedSource,
    NotAVmdk,
    SourceMissing,
    UnsupportedFormat,
    VddkfsError,
)

_SUFFIX = re.compile(r"\.vmdk$", re.I)
_FileId = tuple[int, int, int]


class Progress(msgspec.Struct, frozen=True):
    """*done* of *total* of the *file* of a *link* has been looked at, in no particular unit."""

    link: str
    file: str
    done: int
    total: int


class ChainDone(msgspec.Struct, frozen=True):
    """All of a chain has been looked at: how many *links* it has, and the findings about them."""

    name: str
    links: int
    damage: int
    warnings: int
    unchecked: int


Event = Finding | Progress | ChainDone


class _Link(msgspec.Struct, frozen=True):
    """A link whose descriptor could be read. *identity* is that of its file.

    An *embedded* descriptor is behind *header*, unless that is damaged.
    """

    path: str
    identity: _FileId
    descriptor: Descriptor
    header: SparseHeader | None
    embedded: bool


def check_source(source: str, trust: Trust = NOTHING_OUTSIDE) -> Iterator[Event]:
    """Check the disks of *source*, which is all that ``discover`` takes.

    Findings come as they are found, and a ``ChainDone`` behind those of each chain. Files outside a
    link's folder are followed as far as *trust* goes. Raises VddkfsError if there is nothing to
    check: no such SOURCE, nothing that could be a disk.
    """
    path = os.path.abspath(source)
    check = _Check(trust)
    if os.path.isdir(path) or is_archive(path):
        yield from _check_folder(path, check)
    elif path.lower().endswith(".vmx"):
        yield from _check_vmx(path, check)
    else:
        yield from check.chain(path, named=True)


def _check_folder(path: str, check: "_Check") -> Iterator[Event]:
    folder = Folder(path)
    folder.scan()
    leaves = folder.leaves()
    if not leaves and not folder.errors:
        raise SourceMissing(
            f"no VMDK in {printable(path)}",
            advice="name a .vmdk, a .vmx, an .ova or a folder of VMDKs",
        )
    for leaf in leaves:
        yield from check.chain(leaf)
    for file, error in sorted(folder.errors.items()):
        if isinstance(error, NotAVmdk):
            yield Finding(WARNING, "stray", file, file, said(error, file))
        elif file in check.visited:
            continue
        elif isinstance(error, UnsupportedFormat | AccessDenied):
            yield _failed(error, file, file, "unreadable")
        else:
            yield from check.chain(file)


def _check_vmx(path: str, check: "_Check") -> Iterator[Event]:
    file = open_file(path)
    try:
        raw = file.head(MAX_VMX_BYTES + 1)
    finally:
        file.close()
    disks = parse_vmx(raw, printable(path))
    if not disks:
        raise SourceMissing(
            f"no virtual disk in {printable(path)}",
            advice="name a .vmdk, a .vmx, an .ova or a folder of VMDKs",
        )
    leaves = []
    for name in dict.fromkeys(disk.file_name for disk in disks):
        try:
            leaves.append(resolve(name, path, check.trust))
        except VddkfsError as error:
            yield _failed(error, path, path, "outside")
    for leaf in dict.fromkeys(leaves):
        yield from check.chain(leaf)


class _Check:
    """What is known of all chains so far: *visited* paths, and the findings about each link."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust
        self.visited: set[str] = set()
        self._counts: dict[_FileId, dict[str, int]] = {}

    def chain(self, leaf: str, *, named: bool = False) -> Iterator[Event]:
        """Check the chain that ends with *leaf*. If the operator *named* it, it must be a VMDK."""
        links, findings = self._links(leaf, named)
        counts = {DAMAGE: 0, WARNING: 0, UNCHECKED: 0}
        for finding in findings:
            counts[finding.level] += 1
            yield finding
        for link in reversed(links):
            mine = self._counts.get(link.identity)
            if mine is None:
                mine = self._counts[link.identity] = dict.fromkeys(counts, 0)
                for event in self._link(link):
                    if isinstance(event, Finding):
                        mine[event.level] += 1
                    yield event
            for level, count in mine.items():
                counts[level] += count
        base = links[-1].path if links and links[-1].descriptor.is_base else leaf
        name = _SUFFIX.sub("", os.path.basename(base))
        yield ChainDone(name, len(links), counts[DAMAGE], counts[WARNING], counts[UNCHECKED])

    def _link(self, link: _Link) -> Iterator[Event]:
        notes = check_link(
            link.path, link.descriptor, link.header, self.trust, embedded=link.embedded
        )
        for found in notes:
            if isinstance(found, Finding):
                yield found
            else:
                file, done, total = found
                yield Progress(link.path, file, done, total)

    def _links(self, leaf: str, named: bool) -> tuple[list[_Link], list[Finding]]:
        """Return the links from *leaf* to the base, or as far as they lead, and what is wrong."""
        links: list[_Link] = []
        findings: list[Finding] = []
        path = leaf
        while True:
            self.visited.add(path)
            child = links[-1] if links else None
            try:
                link = _read_link(path)
            except VddkfsError as error:
                if (
                    named
                    and child is None
                    and isinstance(
                        error, SourceMissing | NotAVmdk | AccessDenied | UnsupportedFormat
                    )
                ):
                    raise
                findings.append(_unreadable(error, path, child))
                return links, findings
            findings += _beside_child(link, child)
            if link.identity in [one.identity for one in links] or len(links) == MAX_LINKS:
                what = "is its own ancestor: the chain is a loop"
                if len(links) == MAX_LINKS:
                    what = f"the chain has more than {MAX_LINKS} links"
                findings.append(Finding(DAMAGE, "loop", path, path, what))
                return links, findings
            links.append(link)
            if link.descriptor.is_base or link.descriptor.encrypted:
                return links, findings
            if not link.descriptor.parent_hint:
                what = (
                    f"has the parent content id {link.descriptor.parent_cid}, "
                    "but does not say which file that is"
                )
                findings.append(Finding(DAMAGE, "descriptor", path, path, what))
                return links, findings
            try:
                path = resolve(link.descriptor.parent_hint, path, self.trust)
            except VddkfsError as error:
                findings.append(_failed(error, path, path, "outside"))
                return links, findings


def _read_link(path: str) -> _Link:
    """Return the link *path*. Raises VddkfsError if there is no descriptor that can be read."""
    file = open_file(path)
    try:
        identity = file.stamp.device, file.stamp.inode, file.base
        try:
            descriptor, header = read_descriptor(file)
        except (DamagedSource, UnsupportedFormat):
            found = _behind_bad_header(file)
            if found is None:
                raise
            return _Link(path, identity, found, None, embedded=True)
        return _Link(path, identity, descriptor, header, embedded=header is not None)
    finally:
        file.close()


def _behind_bad_header(file: OpenFile) -> Descriptor | None:
    """Return the embedded descriptor of a sparse file whose header cannot be right."""
    head = file.head(HEADER_BYTES)
    if not head.startswith(MAGIC) or len(head) < HEADER_BYTES:
        return None
    offset, sectors = (int.from_bytes(head[at : at + 8], "little") for at in (28, 36))
    if not 0 < offset < 1 << 40 or not 0 < sectors <= MAX_DESCRIPTOR_BYTES // 512:
        return None
    raw = file.at(offset * 512, sectors * 512)
    if not looks_like_descriptor(raw):
        return None
    try:
        return parse_descriptor(raw, printable(file.path))
    except VddkfsError:
        return None


def _beside_child(link: _Link, child: _Link | None) -> list[Finding]:
    """Return what is wrong between *link* and the *child* that names it as its parent."""
    if child is None or link.descriptor.encrypted:
        return []
    wanted = child.descriptor.parent_cid
    if link.descriptor.cid == wanted:
        return []
    what = (
        f"its content id is {link.descriptor.cid}, but its child "
        f"{printable(os.path.basename(child.path))} was made on {wanted}: it was changed after the "
        "snapshot, or is another file"
    )
    capacity = child.descriptor.capacity
    return [Finding(DAMAGE, "cid", link.path, link.path, what, 0, capacity)]


def _unreadable(error: VddkfsError, path: str, child: _Link | None) -> Finding:
    """Return the finding for a link without a descriptor; *child* names it as its parent."""
    link, sectors = path, 0
    what = said(error, path)
    if child is not None:
        link, sectors = child.path, child.descriptor.capacity
        what += f", but it is the parent of {printable(os.path.basename(child.path))}"
    sector = 0 if sectors else -1
    if isinstance(error, AccessDenied | UnsupportedFormat):
        return _failed(error, link, path, "unreadable")
    code = "missing" if isinstance(error, SourceMissing) else "descriptor"
    return Finding(DAMAGE, code, link, path, what, sector, sectors)


def _failed(error: VddkfsError, link: str, file: str, code: str) -> Finding:
    """Return the finding that *error* keeps *file* from being checked."""
    what = said(error, file)
    return Finding(UNCHECKED, code, link, file, what, exit_code=error.exit_code)
