"""The overlay of one mount: opened before the mount is there, flushed and closed after it.

What is written goes to a folder that the operator named, or to a private one (``tmp``), which is
removed at the end. A private folder of a daemon that was killed is removed by the next one.
"""

import logging
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from vddkfs.disks.disk import Disk
from vddkfs.disks.layer import Layer, Threads
from vddkfs.disks.overlay import Overlay, SourceDisk, manage
from vddkfs.engines.vmdk.write.locks import writer_of
from vddkfs.errors import OverlayError

log = logging.getLogger(__name__)

TMP: Final = "tmp"
_PREFIX: Final = ".vddkfs-private-overlay-"
"""Nothing that an operator would call an overlay of his: what is left of those is removed."""


@asynccontextmanager
async def overlay_of(
    disks: Sequence[Disk], where: str, force: bool, live: bool
) -> AsyncIterator[str]:
    """Let every image of *disks* be written into the overlay *where*, until the end of the block.

    *live* says that somebody may write the live links of the disks, *force* that this is no matter.
    Gives the folder. Raises OverlayError if the folder cannot be used, if one of the disks is being
    written, and at the end if not all of it could be flushed.
    """
    if not force:
        await trio.to_thread.run_sync(_refuse_written, disks)
    if where == TMP:
        await trio.to_thread.run_sync(_remove_left)
        folder = await trio.to_thread.run_sync(_private_folder)
    else:
        folder = where
    try:
        source = [_source(disk, live) for disk in disks]
        overlay = await trio.to_thread.run_sync(Overlay.open, folder, source, force)
        try:
            await trio.to_thread.run_sync(_attach, overlay, disks)
            yield folder
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(overlay.close)
    finally:
        if where == TMP:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_remove, folder)


def _refuse_written(disks: Sequence[Disk]) -> None:
    """Raise OverlayError if somebody has a link of a disk, in files of this machine, open for
    writing: its owner the last one, or a restore the base."""
    for disk in disks:
        for found in filter(None, (writer_of(link) for link in disk.links if link.extents)):
            raise OverlayError(
                f"disk {disk.name}: no overlay on what is being written: {found}",
                advice="wait for its end, mount a snapshot, or force it with overlay_force=yes",
            )


def _source(disk: Disk, live: bool) -> SourceDisk:
    """Return what the overlay of *disk* belongs to."""
    identities = tuple(link.identity for link in disk.links)
    return SourceDisk(disk.name, disk.capacity, identities, live and disk.live >= 0)


def _attach(overlay: Overlay, disks: Sequence[Disk]) -> None:
    for disk in disks:
        # Writers of a part of a block wait for the source, which may hang.
        threads = Threads()
        for image in disk.images:
            fork = overlay.find(image.name, image.capacity)
            image.layer = Layer(overlay, image.name, image.capacity, fork, threads)


def _private_folder() -> str:
    """Return a new folder on a disk: /tmp may be memory."""
    return tempfile.mkdtemp(prefix=_PREFIX, dir=os.environ.get("TMPDIR", "/var/tmp"))


def _remove_left() -> None:
    """Remove private folders whose daemons are gone: nobody can want what is in them."""
    for path in Path(os.environ.get("TMPDIR", "/var/tmp")).glob(f"{_PREFIX}*"):
        with suppress(OverlayError, OSError):
            # Not what a link leads to: anybody may make one here, to an overlay that is kept.
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
                manage.discard(str(path))
                shutil.rmtree(path)


def _remove(folder: str) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s is left: %s", folder, error)
