"""Which files of a folder, or of an archive, are disks, and which are extents of these."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress

from vddkfs.engines.vmdk.descriptor import Descriptor
from vddkfs.engines.vmdk.files import Archives, OpenFile, list_folder, open_file
from vddkfs.engines.vmdk.recognise import is_extent_name, read_descriptor
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import UnsupportedFormat, VddkfsError

_SUFFIX = re.compile(r"\.vmdk$", re.I)
_NOT_AS_IT_IS = re.compile(r"\.vmdk\.(gz|\d{9})$", re.I)
"""How OVF names a disk that it keeps compressed, or in chunks."""
_TRACKING_FILE = re.compile(r"-ctk\.vmdk$", re.I)

_FileId = tuple[int, int, int]


class Folder:
    """The files of a folder that look like VMDKs, as far as their first kilobytes tell."""

    def __init__(self, path: str, archives: Archives | None = None) -> None:
        self.path = path
        self.descriptors: dict[_FileId, tuple[str, Descriptor]] = {}
        self.errors: dict[str, VddkfsError] = {}
        self.ids: dict[str, _FileId] = {}
        self.is_archive = not os.path.isdir(path)
        self._embedded: set[_FileId] = set()
        self._archives = archives or Archives()

    def scan(self) -> None:
        """Read every file's descriptor. Raises if the folder itself cannot be listed."""
        paths = [os.path.join(self.path, name) for name in list_folder(self.path, self._archives)]
        for path in paths:
            if _NOT_AS_IT_IS.search(path) and self.is_archive:
                self.errors[path] = UnsupportedFormat(
                    f"{printable(path)}: is stored compressed or in pieces",
                    advice="unpack the archive, then the disk, and name that",
                )
        paths = [path for path in paths if _SUFFIX.search(path) and not _TRACKING_FILE.search(path)]
        for path in paths:
            if not is_extent_name(path):
                self._look(path)
        # Of thousands of extents that are named as such only those that nobody owns are looked at.
        owned = {path for _, names in self._owners() for path in names}
        for path in paths:
            if is_extent_name(path) and path not in owned:
                self._look(path)
        self._drop_extents()

    def _look(self, path: str) -> None:
        if os.path.isdir(path):
            return
        try:
            file = open_file(path, self._archives)
        except VddkfsError as error:
            self.errors[path] = error
            return
        try:
            self._add(file)
        except VddkfsError as error:
            self.errors[path] = error
        finally:
            file.close()

    def _add(self, file: OpenFile) -> None:
        identity = file.stamp.device, file.stamp.inode, file.stamp.offset
        self.ids[file.path] = identity
        descriptor, header = read_descriptor(file)
        if identity in self.descriptors:
            return
        self.descriptors[identity] = file.path, descriptor
        if header is not None:
            self._embedded.add(identity)

    def _owners(self) -> Iterator[tuple[_FileId, list[str]]]:
        """Yield the descriptors that own files, and the paths of these.

        Only a descriptor that is a file of its own owns others, so nothing that a guest wrote to
        the first sector of its flat disk can hide the disk's real descriptor.
        """
        for identity, (path, descriptor) in self.descriptors.items():
            if identity in self._embedded or is_extent_name(path):
                continue
            names = [line.name for line in descriptor.extents if line.name]
            names.append(descriptor.settings.get("changetrackpath", ""))
            yield identity, self._inside(path, names)

    def _drop_extents(self) -> None:
        """Forget the files that belong to a descriptor: they are no disks."""
        owned: set[_FileId] = set()
        for identity, paths in self._owners():
            owned |= {self.ids[path] for path in paths if path in self.ids} - {identity}
        for path, identity in self.ids.items():
            if identity in owned:
                self.descriptors.pop(identity, None)
                self.errors.pop(path, None)

    def _inside(self, path: str, names: list[str]) -> list[str]:
        return [
            os.path.normpath(os.path.join(os.path.dirname(path), name)) for name in names if name
        ]

    def parent(self, identity: _FileId) -> _FileId | None:
        """Return which file of this folder is the parent of *identity*, if one is."""
        path, descriptor = self.descriptors[identity]
        if descriptor.is_base or not descriptor.parent_hint:
            return None
        (parent,) = self._inside(path, [descriptor.parent_hint])
        found = self.ids.get(parent)
        return found if found in self.descriptors else None

    def children(self, link: os.stat_result, content_id: str) -> Iterator[str]:
        """Yield the files of this folder that are made on *link* when it had *content_id*."""
        for path, descriptor in self.descriptors.values():
            if descriptor.is_base or descriptor.parent_cid != content_id:
                continue
            for parent in self._inside(path, [descriptor.parent_hint]):
                with suppress(OSError, ValueError):
                    if os.path.samestat(os.stat(parent), link):
                        yield path

    def _reach(self, identity: _FileId, reached: set[_FileId]) -> None:
        """Add to *reached* what is not yet there of *identity* and all that is below it."""
        here: _FileId | None = identity
        while here is not None and here not in reached:
            reached.add(here)
            here = self.parent(here)

    def leaves(self) -> list[str]:
        """Return the leaves in order of their names, and one link of every loop without a leaf."""
        parents = {self.parent(identity) for identity in self.descriptors}
        leaves = [identity for identity in self.descriptors if identity not in parents]
        reached: set[_FileId] = set()
        for leaf in leaves:
            self._reach(leaf, reached)
        for identity in self.descriptors:
            if identity not in reached:
                leaves.append(identity)
                self._reach(identity, reached)
        return sorted(self.descriptors[leaf][0] for leaf in leaves)


def children_beside(path: str) -> list[str]:
    """Return the VMDKs that were made on the content of the link *path*, in order.

    Only those in its folder are found, and in that of the file that a symbolic link leads to. What
    cannot be read there is none.
    """
    found: set[str] = set()
    with suppress(VddkfsError, OSError):
        link = os.stat(path)
        file = open_file(path)
        try:
            content_id = read_descriptor(file)[0].cid
        finally:
            file.close()
        for place in {os.path.dirname(each(path)) for each in (os.path.abspath, os.path.realpath)}:
            folder = Folder(place)
            folder.scan()
            found |= set(folder.children(link, content_id))
    return sorted(found)
