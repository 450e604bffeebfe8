"""The folder of an overlay: whose it is, who has it open, and a fork for each image written to.

    DIR/overlay.json         what it belongs to; once it is there, this is an overlay
    DIR/lock                 locked by who has it open
    DIR/forks/0000/          a fork: fork.json, map, map.next, segment-0000 ...

A fork is made under another name and then renamed, so that one that is there is whole.
"""

import errno
import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import msgspec

from vddkfs.disks.overlay.files import Files, told
from vddkfs.disks.overlay.fork import Fork
from vddkfs.disks.overlay.source import (
    ForkFile,
    OverlayFile,
    SourceDisk,
    check_source,
    read_document,
    refuse_live,
    write_document,
)
from vddkfs.disks.overlay.space import Limits, Segments
from vddkfs.disks.overlay.table import BLOCK
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import OverlayError

log = logging.getLogger(__name__)

MARK: Final = "overlay.json"
FORK: Final = "fork.json"
FORKS: Final = "forks"
_NEW: Final = ".new"
_LOCK: Final = "lock"
_OURS: Final = frozenset((MARK, MARK + _NEW, FORKS, _LOCK))


class Overlay:
    """An overlay that is open, in *folder*. ``open`` makes one; ``close`` ends it.

    Any thread.
    """

    def __init__(
        self, files: Files, folder: str, lock: int, document: OverlayFile, limits: Limits
    ) -> None:
        self.folder = folder
        self.document = document
        self._files = files
        self._lock_fd = lock
        self._limits = limits
        self._lock = threading.Lock()
        self._forks: dict[str, Fork] = {}

    @classmethod
    def open(
        cls,
        folder: str,
        source: Sequence[SourceDisk],
        force: bool = False,
        *,
        files: Files | None = None,
        limits: Limits | None = None,
    ) -> "Overlay":
        """Return the overlay in *folder*, made if it is empty or not there, for *source*.

        *force* lets live disks be used, and disks whose files have changed since.
        Raises OverlayError: the folder has something else in it, is in use, was made for another
        source, is damaged, or has no space.
        """
        files = files or Files()
        folder = os.path.abspath(folder)
        if not force:
            refuse_live(folder, source)
        with told(folder, "making it"):
            with suppress(FileExistsError):
                files.make_folder(folder)
            files.sync_folder(os.path.dirname(folder))
        check_ours(files, folder)
        lock = take_lock(files, folder)
        try:
            limits = limits or Limits()
            document = _document(files, folder, source, force, limits)
            overlay = cls(files, folder, lock, document, limits)
            overlay._clear()
            return overlay
        except BaseException:
            files.close(lock)
            raise

    def fork(self, name: str, capacity: int) -> Fork:
        """Return the fork of the image *name*, of *capacity* bytes; it is made if need be."""
        with self._lock:
            return self._found(name, capacity) or self._made(name, capacity)

    def find(self, name: str, capacity: int) -> Fork | None:
        """Return the fork of the image *name* if there is one."""
        with self._lock:
            return self._found(name, capacity)

    def close(self) -> None:
        """Flush and close all forks, and let the folder go. Raises the first OverlayError."""
        failures = []
        with self._lock:
            for fork in self._forks.values():
                try:
                    fork.close()
                except OverlayError as error:
                    failures.append(error)
            self._forks = {}
            self._files.close(self._lock_fd)
        if failures:
            raise failures[0]

    def _found(self, name: str, capacity: int) -> Fork | None:
        if name in self._forks:
            return self._forks[name]
        for path, document in forks_in(self._files, self.folder):
            if document.name != name:
                continue
            if document.capacity != capacity:
                raise OverlayError(
                    f"{printable(path)}: {printable(name)} had {document.capacity} bytes when it "
                    f"was made, and has {capacity}",
                    advice="use another folder, or `vddkfs overlay discard`",
                )
            fork = Fork(self._files, path, bytes.fromhex(document.ident), capacity, self._limits)
            if not fork.open():
                log.info("%s: %s was not closed the last time", path, printable(name))
            self._forks[name] = fork
            return fork
        return None

    def _made(self, name: str, capacity: int) -> Fork:
        folder = os.path.join(self.folder, FORKS)
        with told(folder, "making a fork"):
            names = self._files.names(folder)
            taken = [int(each) for each in names if each.isdigit()]
            path = os.path.join(folder, f"{max(taken, default=-1) + 1:04}")
            ident = uuid.uuid4()
            new = path + _NEW
            if os.path.basename(new) in names:
                remove_tree(self._files, new)
            self._files.make_folder(new)
            document = ForkFile(name, ident.hex, capacity, time.time())
            write_document(self._files, os.path.join(new, FORK), document)
            fork = Fork(self._files, new, ident.bytes, capacity, self._limits)
            fork.create()
            # Its paths are those of before; nothing is in it that is worth keeping open.
            fork.close()
            self._files.sync_folder(new)
            self._files.rename(new, path)
            self._files.sync_folder(folder)
        found = self._found(name, capacity)
        assert found is not None
        return found

    def _clear(self) -> None:
        """Remove what a crash left of forks that were being made or discarded.

        And have the names of the others on the disk: they may be in memory only.
        """
        folder = os.path.join(self.folder, FORKS)
        with told(folder, "clearing it"):
            self._files.sync_folder(self.folder)
            self._files.sync_folder(folder)
            for name in self._files.names(folder):
                if not name.isdigit():
                    remove_tree(self._files, os.path.join(folder, name))


def check_ours(files: Files, folder: str) -> None:
    """Raise OverlayError if *folder* is no folder, or has anything that no overlay has."""
    try:
        others = [name for name in files.names(folder) if name not in _OURS]
    except OSError as error:
        raise OverlayError(
            f"{printable(folder)}: not a folder that can be read",
            cause=error.strerror or str(error),
            advice="name a folder for the overlay, empty or not there yet",
        ) from error
    if others:
        raise OverlayError(
            f"{printable(folder)}: not an overlay: it has {printable(others[0])} in it",
            advice="name an empty folder, or one that is not there yet",
        )


def take_lock(files: Files, folder: str) -> int:
    """Return a descriptor that holds the lock of the overlay in *folder*. OverlayError if held."""
    path = os.path.join(folder, _LOCK)
    with told(path, "locking"):
        try:
            fd = files.open(path)
        except FileNotFoundError:
            with suppress(FileExistsError):
                files.close(files.open(path, create=True))
            fd = files.open(path)
        try:
            files.lock(fd)
        except BlockingIOError:
            files.close(fd)
            raise OverlayError(
                f"{printable(folder)}: another mount is using it",
                advice="unmount that, or name another folder",
                errno=errno.EBUSY,
            ) from None
        except BaseException:
            files.close(fd)
            raise
        return fd


def _document(
    files: Files, folder: str, source: Sequence[SourceDisk], force: bool, limits: Limits
) -> OverlayFile:
    """Return what the overlay belongs to; make one, or add disks that it does not know yet."""
    path = os.path.join(folder, MARK)
    try:
        was = read_document(files, path, OverlayFile)
    except FileNotFoundError:
        _check_empty(files, folder)
        _check_space(files, folder, limits)
        with told(folder, "making an overlay"):
            with suppress(FileExistsError):
                files.make_folder(os.path.join(folder, FORKS))
            document = OverlayFile(uuid.uuid4().hex, time.time(), tuple(source))
            _replace(files, path, document)
        return document
    check_source(folder, was.source, source, force)
    try:
        _check_space(files, folder, limits)
    except OverlayError as error:
        log.warning("only what is in the overlay can be written: %s", error)
    now = {disk.name: disk for disk in was.source} | {disk.name: disk for disk in source}
    if tuple(now.values()) == was.source:
        return was
    for disk in was.source:
        if now[disk.name] != disk:
            log.warning("%s: forced onto %s, whose files have changed", folder, disk.name)
    document = msgspec.structs.replace(was, source=tuple(now.values()))
    with told(path, "writing"):
        _replace(files, path, document)
    return document


def _replace(files: Files, path: str, document: OverlayFile) -> None:
    with suppress(FileNotFoundError):
        files.remove(path + _NEW)
    write_document(files, path + _NEW, document)
    files.rename(path + _NEW, path)
    files.sync_folder(os.path.dirname(path))


def _check_empty(files: Files, folder: str) -> None:
    """Raise OverlayError if there are forks, though nothing says of what."""
    with suppress(FileNotFoundError):
        if any(name.isdigit() for name in files.names(os.path.join(folder, FORKS))):
            raise OverlayError(
                f"{printable(folder)}: damaged: it has forks, but {MARK} is not there",
                advice="put it back from a copy, or name another folder",
            )


def _check_space(files: Files, folder: str, limits: Limits) -> None:
    """Raise OverlayError if there is no space for the first step of a fork."""
    Segments(files, folder, limits).check_free(limits.spare * BLOCK + 2 * limits.log_room)


def forks_in(files: Files, folder: str) -> list[tuple[str, ForkFile]]:
    """Return the folders of the forks in the overlay *folder*, and what they say of themselves."""
    forks = os.path.join(folder, FORKS)
    with told(forks, "reading"):
        paths = [os.path.join(forks, name) for name in files.names(forks) if name.isdigit()]
    found = []
    for path in paths:
        with told(path, "reading"):
            found.append((path, read_document(files, os.path.join(path, FORK), ForkFile)))
    return found


def remove_tree(files: Files, path: str) -> None:
    """Remove the folder of a fork, and the files in it. Raises OSError."""
    for name in files.names(path):
        files.remove(os.path.join(path, name))
    files.remove_folder(path)
