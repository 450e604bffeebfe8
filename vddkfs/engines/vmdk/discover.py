"""From the SOURCE an operator typed to the chains that can be shown, and the reasons for the rest.

A SOURCE is one ``.vmdk`` (any link: it is the mounted point), a ``.vmx``, or a folder, of which
subfolders are not searched, or an archive (an ``.ova``), which is read as if it were a folder.
Nothing stays open.
"""

import os
import re

import msgspec

from vddkfs.engines.base import LinkInfo
from vddkfs.engines.vmdk.chain import Links
from vddkfs.engines.vmdk.files import Archives, Trust, is_archive, open_file, resolve
from vddkfs.engines.vmdk.folder import Folder
from vddkfs.engines.vmdk.text import printable
from vddkfs.engines.vmdk.vmx import MAX_VMX_BYTES, parse_vmx
from vddkfs.errors import SourceMissing, VddkfsError

_SUFFIX = re.compile(r"\.vmdk$", re.I)


class Chain(msgspec.Struct, frozen=True):
    """A disk: its *links*, base first; the last is the mounted point.

    *name* is the base's file name without ``.vmdk``. Two chains may have the same.
    """

    name: str
    links: tuple[LinkInfo, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The links' paths, base first: what a ``VmdkEngine`` is made from."""
        return tuple(link.path for link in self.links)


class LeftOut(msgspec.Struct, frozen=True):
    """A file that is not shown, and why."""

    path: str
    error: VddkfsError


class Discovery(msgspec.Struct, frozen=True):
    """What a SOURCE has: *chains* in a stable order, and what was left out."""

    chains: tuple[Chain, ...]
    left_out: tuple[LeftOut, ...]


def discover(source: str, *, follow_any: bool = False, raw_devices: bool = False) -> Discovery:
    """Find the disks of *source*.

    *follow_any* is ``follow_parents=any``: parents and extents outside a link's folder, and disks
    outside the .vmx's, are followed. With *raw_devices* extents may be devices of this machine.
    Raises the first reason if no disk can be opened.
    """
    path, trust = os.path.abspath(source), Trust(follow_any, raw_devices)
    if os.path.isdir(path) or is_archive(path):
        return _discover_folder(path, trust)
    if path.lower().endswith(".vmx"):
        return _discover_vmx(path, trust)
    return Discovery((_chain(path, Links(trust)),), ())


def _chain(leaf: str, known: Links) -> Chain:
    links = known.chain(leaf)
    return Chain(_SUFFIX.sub("", os.path.basename(links[0].path)), links)


def _discover_vmx(path: str, trust: Trust) -> Discovery:
    file = open_file(path)
    try:
        raw = file.head(MAX_VMX_BYTES + 1)
    finally:
        file.close()
    found = _Findings(trust)
    seen: set[str] = set()
    for disk in parse_vmx(raw, printable(path)):
        try:
            leaf = resolve(disk.file_name, path, trust)
        except VddkfsError as error:
            found.left_out.append(LeftOut(disk.file_name, error))
            continue
        if leaf not in seen:
            seen.add(leaf)
            found.try_chain(leaf)
    return found.result(f"no virtual disk in {printable(path)}")


class _Findings:
    """Chains and failures, as they come."""

    def __init__(self, trust: Trust, archives: Archives | None = None) -> None:
        self._links = Links(trust, archives)
        self.chains: list[Chain] = []
        self.left_out: list[LeftOut] = []

    def try_chain(self, leaf: str) -> None:
        try:
            self.chains.append(_chain(leaf, self._links))
        except VddkfsError as error:
            self.left_out.append(LeftOut(leaf, error))

    def result(self, nothing: str) -> Discovery:
        if not self.chains:
            if self.left_out:
                raise self.left_out[0].error
            raise SourceMissing(
                nothing, advice="name a .vmdk, a .vmx, an .ova or a folder of VMDKs"
            )
        return Discovery(tuple(self.chains), tuple(self.left_out))


def _discover_folder(path: str, trust: Trust) -> Discovery:
    archives = Archives()
    folder = Folder(path, archives)
    folder.scan()
    found = _Findings(trust, archives)
    for leaf in folder.leaves():
        found.try_chain(leaf)
    found.left_out += [LeftOut(name, error) for name, error in folder.errors.items()]
    found.left_out.sort(key=lambda entry: entry.path)
    return found.result(f"no VMDK in {printable(path)}")
