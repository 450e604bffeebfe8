"""What `vddkfs overlay` does to a folder. Nothing here waits for a mount: it may be in use.

Sizes and offsets in bytes.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import msgspec

from vddkfs.disks.overlay.extents import Extent, changed_bytes, merged
from vddkfs.disks.overlay.files import Files, told
from vddkfs.disks.overlay.folder import (
    FORKS,
    MARK,
    check_ours,
    forks_in,
    remove_tree,
    take_lock,
)
from vddkfs.disks.overlay.fork import Fork
from vddkfs.disks.overlay.journal import Journal
from vddkfs.disks.overlay.source import (
    ForkFile,
    OverlayFile,
    SourceDisk,
    image_name,
    read_document,
)
from vddkfs.disks.overlay.space import Limits
from vddkfs.disks.overlay.table import BLOCK, BlockMap
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import OverlayError

_TRIES: Final = 3
_DISK: Final = "/disk.raw"
"""The name of a disk's last image in a mount, which has another one too."""
_IMAGE: Final = re.compile(r"(.+)/chain/(\d{1,9})\.raw", re.DOTALL)


class ForkSummary(msgspec.Struct, frozen=True):
    """A fork: of image *name*; *stored_bytes* is what its files occupy, *changed_bytes* how much of
    the image is in it, *zero_bytes* of that as zeros; *created* and *written* are seconds since
    1970. *clean*: it was closed. *problem* says why it cannot be read."""

    name: str
    folder: str
    capacity: int
    created: float
    written: float
    stored_bytes: int
    changed_bytes: int = 0
    zero_bytes: int = 0
    clean: bool = False
    problem: str = ""


class Summary(msgspec.Struct, frozen=True):
    """An overlay and its forks; *in_use* by a mount."""

    folder: str
    created: float
    in_use: bool
    source: tuple[SourceDisk, ...]
    forks: tuple[ForkSummary, ...]


def show(folder: str) -> Summary:
    """Return what is in the overlay *folder*. Raises OverlayError if it is none, or damaged.

    A fork that is damaged is in the list, with its problem.
    """
    files = Files()
    document = _overlay(files, folder)
    forks = tuple(_summary(files, path, each) for path, each in forks_in(files, folder))
    return Summary(folder, document.created, _in_use(files, folder), document.source, forks)


def source_of(folder: str) -> tuple[SourceDisk, ...]:
    """Return what the overlay *folder* belongs to. Raises OverlayError as ``show`` does."""
    return _overlay(Files(), folder).source


def extents(folder: str, name: str) -> Iterator[Extent]:
    """Return what the fork of image *name* has, in order, neighbours merged."""
    files = Files()
    _overlay(files, folder)
    path, document = _fork(files, folder, name)
    found, _ = _read(files, path, document)
    return merged(found.changed(), document.capacity)


def as_json(folder: str, name: str) -> Iterator[str]:
    """Return the changed extents of image *name* as JSON, a line at a time: they may be millions.

    Of a fork that a mount has open, that is what was there at its last flush.
    """
    files = Files()
    _overlay(files, folder)
    path, document = _fork(files, folder, name)
    found, _ = _read(files, path, document)
    head: dict[str, str | int] = {
        "image": document.name,
        "capacity": document.capacity,
        "block": BLOCK,
        "changed_bytes": changed_bytes(found, document.capacity),
    }
    return _json_lines(head, merged(found.changed(), document.capacity))


def _json_lines(head: dict[str, str | int], extents: Iterator[Extent]) -> Iterator[str]:
    between = json.dumps(head)[:-1] + ', "extents": ['
    for extent in extents:
        plain = {"start": extent.offset, "length": extent.size, "zero": extent.zero}
        yield f"{between}\n{json.dumps(plain)}"
        between = ","
    yield f"{between}]}}\n" if between != "," else "\n]}\n"


class Reading(msgspec.Struct, frozen=True):
    """A *fork*, open for reading: of the image of link *number* of the *disk*."""

    fork: Fork
    name: str
    disk: SourceDisk
    number: int


@contextmanager
def reading(folder: str, name: str) -> Iterator[Reading]:
    """Open the fork of image *name*, and keep mounts away from the overlay meanwhile.

    Nothing is changed. Raises OverlayError: in use, damaged, or no such image.
    """
    files = Files()
    _overlay(files, folder)
    with _held(files, folder):
        path, of = _fork(files, folder, name)
        disk, number = _image(folder, _overlay(files, folder), of.name)
        fork = Fork(files, path, bytes.fromhex(of.ident), of.capacity, Limits())
        fork.open(read_only=True)
        try:
            yield Reading(fork, of.name, disk, number)
        finally:
            fork.close()


@contextmanager
def _held(files: Files, folder: str) -> Iterator[None]:
    try:
        lock = take_lock(files, folder)
    except OverlayError as error:
        if error.errno != errno.EBUSY:
            raise
        raise OverlayError(
            f"{printable(folder)}: a mount is using it: what that has not flushed would be missing",
            advice="unmount it, or copy the image's file from that mount",
            errno=errno.EBUSY,
        ) from None
    try:
        yield
    finally:
        files.close(lock)


def _image(folder: str, document: OverlayFile, name: str) -> tuple[SourceDisk, int]:
    """Return the disk of the image *name*, and the number of its link."""
    found = _IMAGE.fullmatch(name)
    for disk in document.source:
        if found and disk.name == found[1] and int(found[2]) < len(disk.links):
            return disk, int(found[2])
    raise OverlayError(
        f"{printable(folder)}: damaged: it does not say what {printable(name)} is an image of",
        advice="the changed extents can be exported all the same: --format json",
    )


def discard(folder: str, name: str | None = None) -> None:
    """Remove the fork of image *name*, or the whole overlay; the folder stays, with the lock.

    Raises OverlayError if a mount is using it. It works on damaged forks too.
    """
    files = Files()
    check_ours(files, folder)
    mark = os.path.join(folder, MARK)
    if not os.path.lexists(mark):
        raise _no_overlay(folder)
    lock = take_lock(files, folder)
    try:
        if name is not None:
            path, _ = _fork(files, folder, name)
            with told(path, "discarding"):
                gone = path + ".discarded"
                files.rename(path, gone)
                files.sync_folder(os.path.dirname(path))
                remove_tree(files, gone)
            return
        with told(folder, "discarding"):
            # The mark goes last: until then what a crash left can be discarded again.
            with suppress(FileNotFoundError):
                shutil.rmtree(os.path.join(folder, FORKS))
            files.remove(mark)
            files.sync_folder(folder)
    finally:
        files.close(lock)


def _overlay(files: Files, folder: str) -> OverlayFile:
    check_ours(files, folder)
    try:
        with_mark = read_document(files, os.path.join(folder, MARK), OverlayFile)
    except FileNotFoundError:
        raise _no_overlay(folder) from None
    return with_mark


def _no_overlay(folder: str) -> OverlayError:
    return OverlayError(
        f"{printable(folder)}: not an overlay: {MARK} is not there",
        advice="name the folder that was given as overlay=",
    )


def _fork(files: Files, folder: str, name: str) -> tuple[str, ForkFile]:
    """Return the fork of image *name*; DISK/disk.raw is the last image of DISK."""
    known = forks_in(files, folder)
    if name.endswith(_DISK):
        last = {each.name: len(each.links) - 1 for each in _overlay(files, folder).source}
        disk = name.removesuffix(_DISK)
        name = image_name(disk, last[disk]) if disk in last else name
    for path, document in known:
        if document.name == name:
            return path, document
    names = ", ".join(printable(document.name) for _, document in known) or "none"
    raise OverlayError(
        f"{printable(folder)}: nothing was written to an image {printable(name)}",
        advice=f"there is: {names}",
    )


def _summary(files: Files, path: str, document: ForkFile) -> ForkSummary:
    with told(path, "reading"):
        stats = [os.stat(os.path.join(path, name)) for name in files.names(path)]
    summary = ForkSummary(
        name=document.name,
        folder=path,
        capacity=document.capacity,
        created=document.created,
        written=max(found.st_mtime for found in stats),
        stored_bytes=sum(found.st_blocks * 512 for found in stats),
    )
    try:
        found, clean = _read(files, path, document)
    except OverlayError as error:
        return msgspec.structs.replace(summary, problem=str(error))
    return msgspec.structs.replace(
        summary,
        changed_bytes=changed_bytes(found, document.capacity),
        zero_bytes=found.zero_blocks * BLOCK,
        clean=clean,
    )


def _read(files: Files, path: str, document: ForkFile) -> tuple[BlockMap, bool]:
    """Return the map of a fork as it is on the disk, and whether it was closed after that."""
    for tries in range(_TRIES):
        found = BlockMap()
        fork = bytes.fromhex(document.ident)
        journal = Journal(files, path, fork, document.capacity, 0)
        try:
            journal.open(found.set, read_only=True)
            return found, journal.clean
        except OverlayError:
            # A mount may just have put another file in its place.
            if tries == _TRIES - 1:
                raise
        finally:
            journal.close_files()
    raise AssertionError


def _in_use(files: Files, folder: str) -> bool:
    try:
        files.close(take_lock(files, folder))
    except OverlayError as error:
        return error.errno == errno.EBUSY
    return False
