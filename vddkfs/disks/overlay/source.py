"""What an overlay belongs to, and the small files that say so: JSON with a checksum."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec

from vddkfs.disks.overlay.files import Files, read_all, told, write_all
from vddkfs.engines.base import LinkIdentity
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import OverlayError

VERSION: Final = 1
_MOST_BYTES: Final = 64 * 1024 * 1024
_Document = TypeVar("_Document", bound=msgspec.Struct)


class SourceDisk(msgspec.Struct, frozen=True):
    """A disk that was mounted: *capacity* in bytes, *links* from the base on.

    *live*: somebody may write its last link, so that its content may move under the overlay.
    """

    name: str
    capacity: int
    links: tuple[LinkIdentity, ...]
    live: bool = False

    def difference(self, other: "SourceDisk", forced: bool) -> str:
        """Say how *other* is not this disk, or "".

        *forced*: times, sizes and content ids of its files may be others, not the files.
        """
        if self.capacity != other.capacity:
            return f"it had {self.capacity} bytes and has {other.capacity}"
        if len(self.links) != len(other.links):
            return f"it had {len(self.links)} links and has {len(other.links)}"
        for mine, theirs in zip(self.links, other.links, strict=True):
            found = mine.change_to(theirs, live=forced)
            if found:
                return found
        return ""


def image_name(disk: str, number: int) -> str:
    """Return what the fork of the image of link *number* of *disk* is called: as its file is."""
    return f"{disk}/chain/{number}.raw"


class OverlayFile(msgspec.Struct, frozen=True):
    """``overlay.json``: *created* in seconds since 1970; *ident* is hexadecimal."""

    ident: str
    created: float
    source: tuple[SourceDisk, ...]
    kind: str = "vddkfs overlay"
    version: int = VERSION


class ForkFile(msgspec.Struct, frozen=True):
    """``fork.json``: of the image called *name*, of *capacity* bytes."""

    name: str
    ident: str
    capacity: int
    created: float


def write_document(files: Files, path: str, document: msgspec.Struct) -> None:
    """Write *document* to the new file *path*, and flush it. Raises OSError."""
    # Not msgspec's JSON, which cannot have the odd bytes that a file name may.
    text = json.dumps(msgspec.to_builtins(document)).encode("ascii")
    fd = files.open(path, create=True)
    try:
        write_all(files, fd, text + b"\n" + _checksum(text) + b"\n", 0)
        files.sync(fd)
    finally:
        files.close(fd)


def read_document(files: Files, path: str, kind: type[_Document]) -> _Document:
    """Return the document in *path*. Raises OverlayError if it is damaged, OSError if not there."""
    fd = files.open(path, read_only=True)
    try:
        with told(path, "reading"):
            raw = bytearray(min(files.size(fd), _MOST_BYTES))
            read_all(files, fd, memoryview(raw), 0)
    finally:
        files.close(fd)
    text, _, rest = bytes(raw).partition(b"\n")
    if rest.strip() != _checksum(text):
        raise OverlayError(
            f"{printable(path)}: damaged: its checksum is wrong",
            advice="put it back from a copy; or start an overlay in another folder",
        )
    found: Any = json.loads(text)
    version = found.get("version", VERSION)
    if version != VERSION:
        raise OverlayError(
            f"{printable(path)}: version {version}; this release knows version {VERSION}",
            advice="use the release that made it",
        )
    return msgspec.convert(found, kind)


def check_source(
    folder: str, was: Sequence[SourceDisk], now: Sequence[SourceDisk], forced: bool
) -> None:
    """Raise OverlayError if the overlay in *folder*, made for *was*, is not one for *now*.

    Disks that were not mounted then, or are not now, do not matter.
    """
    known = {disk.name: disk for disk in was}
    for disk in now:
        if disk.name not in known:
            continue
        found = known[disk.name].difference(disk, forced)
        if found:
            advice = "use another folder, or give up what was written: `vddkfs overlay discard`"
            if not known[disk.name].difference(disk, True):
                advice += "; or force it, if you know that the disk's content is still the same"
            raise OverlayError(
                f"{printable(folder)}: it was made for another source: disk "
                f"{printable(disk.name)}: {printable(found)}",
                advice=advice,
            )


def refuse_live(folder: str, now: Sequence[SourceDisk]) -> None:
    """Raise OverlayError if somebody may write a disk of *now*."""
    live = [printable(disk.name) for disk in now if disk.live]
    if live:
        raise OverlayError(
            f"{printable(folder)}: no overlay on {', '.join(live)}: its owner may write it, and "
            "what is read then is a mix of both",
            advice="take a snapshot of the VM and mount that, or force it",
        )


def _checksum(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).hexdigest().encode("ascii")
