"""One image, open over VDDK: a connection of its own, and the handle on it.

The operator's transports are tried in order. Each is asked for alone, and read back after the
open: the library falls back to the network in silence otherwise (K08). What a transport cannot do
is said once, and the next one is tried; what no transport could change (a wrong password, a disk
that is not there) ends the search.

A disk that is to be written is proved to take that: sector 0 is written as it is, over each
transport that is tried, whenever the disk is opened (K04, K18, K27). Where every transport refuses,
the error's errno is EROFS. A lock that somebody else holds ends the search: waiting may help, other
transports do not.

Everything here is for the worker's main thread.
"""

import contextlib
import dataclasses
import errno
import logging
import mmap
import os
from collections.abc import Callable
from typing import Final

from vddkfs.engines.base import SECTOR, LinkIdentity, LinkInfo
from vddkfs.engines.config import VddkImage
from vddkfs.engines.vddk.codes import RetryClass, VixFailure
from vddkfs.engines.vddk.connection import Connection
from vddkfs.engines.vddk.handle import Handle
from vddkfs.engines.vddk.layouts import MIN_CHUNK, OpenFlag
from vddkfs.engines.vddk.library import Library
from vddkfs.engines.vddk.native import DiskInfo
from vddkfs.engines.vddk.params import ConnectSpec
from vddkfs.errors import EngineError, Retry

Say = Callable[[int, str], None]
"""Told what the operator should know: a level of ``logging``, and the text."""

SCSI_DISKS: Final = "/sys/class/scsi_disk"
_ADVANCED: Final = ("san", "hotadd")
_NO_LICENCE: Final = (32, 16064)
_ELSEWHERE: Final = (1, 6, 7, 13, 16002, 16064, 16065, 32, 8)
"""Codes of an open that another transport may not end with: no licence, no device, no slot."""
_NOT_TO_BE_WRITTEN: Final = (1, 6, 11, 16013)
"""Codes of an open that may be for writing only. 1: among other things, a VM that runs."""


class Unwritable(EngineError):
    """A disk cannot be written over one transport."""


class OpenDisk:
    """*image* open over *transport*. Made by ``open_disk``; raises VixFailure, EngineError."""

    def __init__(
        self, library: Library, spec: ConnectSpec, image: VddkImage, compression: str = ""
    ) -> None:
        self.image = image
        self.compression = compression
        [self.transport] = spec.transports or ("file",)
        self.connection = Connection(library, spec)
        try:
            self._open_handle()
        except BaseException:
            with contextlib.suppress(VixFailure):
                self.connection.disconnect()
            raise

    def _open_handle(self, retry: Retry = "") -> None:
        """Open the disk; *retry* is what an open over another transport is worth."""
        flags = _flags(self.transport, self.compression)
        if self.image.writable:
            flags &= ~OpenFlag.READ_ONLY
        try:
            self.handle = Handle(self.connection, self.image.path, flags)
        except VixFailure as error:
            if self.image.writable and error.code in _NOT_TO_BE_WRITTEN:
                raise self._unwritable(error, retry) from error
            raise
        try:
            mode = self.handle.transport_mode()
            if mode != self.transport:
                raise EngineError(
                    f"{self.image.path}: VDDK opened it over {mode} and not over {self.transport}",
                    advice=f"add {mode} to transports= if that will do",
                    retry=retry,
                )
            self.info: DiskInfo = self.handle.info()
            self.metadata = self.handle.metadata()
            if self.transport == "san":
                self.prove()
            if self.image.writable:
                self.prove_writing(retry)
        except BaseException:
            self._close_handle()
            raise

    def close(self) -> None:
        """Close the disk and the connection, whatever goes wrong on the way."""
        self._close_handle()
        with contextlib.suppress(VixFailure):
            self.connection.disconnect()

    def _close_handle(self) -> None:
        with contextlib.suppress(VixFailure):
            self.handle.close()

    def renew(self) -> None:
        """Open the disk again on the same connection: nothing that VDDK knew of it is kept."""
        self._close_handle()
        self._open_handle(retry="reconnect")

    def identity(self) -> LinkIdentity:
        """Return what must stay equal while the disk is mounted."""
        info = self.info
        return LinkIdentity(
            path=self.image.path,
            # The short content id is not to be had; the long one is as good.
            content_id=self._known("longContentID"),
            capacity=info.capacity,
            snapshot=self.image.snapshot,
            links=info.links,
            uuid=info.uuid,
        )

    def _known(self, key: str) -> str:
        """Return the entry *key* of the disk database, "" where there is none."""
        return self.metadata.get(key) or self.metadata.get(f"ddb.{key}", "")

    def describe(self) -> LinkInfo:
        """Return the disk as the documents show it."""
        identity = self.identity()
        return LinkInfo(
            path=self.image.path,
            format="remote" if self.connection.spec.server else "local",
            capacity=self.info.capacity,
            content_id=identity.content_id,
            parent_content_id="",
            parent_hint=self.info.parent_hint,
            extents=(),
            mtime_ns=0,
            identity=identity,
            adapter=self.info.adapter,
            hardware_version=self._known("virtualHWVersion"),
            uuid=self.info.uuid,
            metadata=self.metadata,
            tools_version=self._known("toolsVersion"),
        )

    def prove(self) -> None:
        """Read one sector where data is, if that can be found out: SAN opens what it cannot read.

        Raises VixFailure.
        """
        sector = 0
        whole = self.info.capacity // MIN_CHUNK * MIN_CHUNK
        if whole and self.connection.library.has("QueryAllocatedBlocks"):
            with contextlib.suppress(VixFailure, EngineError):
                blocks = self.handle.query_allocated(0, min(whole, MIN_CHUNK * 8192))
                sector = blocks[0][0] if blocks else 0
        self.handle.read(sector, 1, aligned_sector())

    def prove_writing(self, retry: Retry = "") -> None:
        """Write sector 0 as it is, which changes no byte. Raises Unwritable, VixFailure.

        *retry* is what an open over another transport is worth.
        """
        sector = aligned_sector()
        try:
            self.handle.read(0, 1, sector)
            self.handle.write(0, 1, sector)
        except VixFailure as error:
            if error.retry_class is RetryClass.NEVER or error.code in _ELSEWHERE:
                raise self._unwritable(error, retry) from error
            raise

    def _unwritable(self, error: VixFailure, retry: Retry) -> Unwritable:
        """Return what to fail with; over a network it may have been the connection all the same."""
        lasting = error.retry_class is RetryClass.NEVER or self.transport in _ADVANCED
        return Unwritable(
            f"{self.image.path}: it cannot be written over {self.transport}: "
            f"{error.message.removeprefix(self.image.path + ': ')}",
            cause=error.cause,
            advice=error.advice,
            errno=errno.EROFS,
            retry=retry if lasting else error.retry,
        )


def open_disk(
    library: Library,
    spec: ConnectSpec,
    image: VddkImage,
    say: Say,
    *,
    san_check: bool = True,
    compression: str = "",
) -> OpenDisk:
    """Open *image* over the first of *spec*'s transports that serves it. Raises VixFailure.

    *san_check* leaves ``san`` out on a machine without SCSI disks. *compression* is for the
    network.
    """
    if not spec.server:
        return OpenDisk(library, spec, image)
    offered = library.transports()
    failure: EngineError | None = None
    for transport in spec.transports:
        refusal = _refusal(transport, offered, san_check, library.loaded.reasons())
        if refusal:
            failure = failure or EngineError(f"{image.path}: {refusal}")
            say(logging.WARNING, f"transport {transport} is left out: {refusal}")
            continue
        try:
            alone = dataclasses.replace(spec, transports=(transport,))
            disk = OpenDisk(library, alone, image, compression)
        except EngineError as error:
            if not _may_differ(error, transport):
                raise
            failure = error
            say(logging.WARNING, f"{image.path}: transport {transport} does not serve it: {error}")
        else:
            say(logging.INFO, f"{image.path}: open over {transport}, {disk.info.links} links")
            return disk
    assert failure is not None
    raise failure


def _refusal(transport: str, offered: tuple[str, ...], san_check: bool, not_loaded: str) -> str:
    """Say why *transport* is not even tried, or ""; *not_loaded* is what the library lacks."""
    if transport not in offered:
        why = f" ({not_loaded})" if transport in _ADVANCED and not_loaded else ""
        return f"VDDK offers only {', '.join(offered)}{why}"
    if transport == "san" and san_check and not os.path.isdir(SCSI_DISKS):
        return (
            f"this machine has no {SCSI_DISKS}, without which VDDK may crash; with NVMe over "
            "Fabrics alone, mount with san_check=no"
        )
    return ""


def _may_differ(error: EngineError, transport: str) -> bool:
    """Say whether another transport may end otherwise than with *error*."""
    if isinstance(error, Unwritable):
        return True
    if not isinstance(error, VixFailure):
        return not error.retry
    if transport not in _ADVANCED:
        return error.code in _NO_LICENCE
    return error.code in _ELSEWHERE or error.retry_class is RetryClass.NEVER


def _flags(transport: str, compression: str) -> OpenFlag:
    if transport == "san":
        # Linux would keep pages of the LUN and answer from them.
        return OpenFlag.READ_ONLY | OpenFlag.UNBUFFERED
    if compression and transport in ("nbd", "nbdssl"):
        return OpenFlag.READ_ONLY | OpenFlag[compression.upper()]
    return OpenFlag.READ_ONLY


def aligned_sector() -> memoryview:
    """Return memory of one sector that unbuffered reads can go to."""
    return memoryview(mmap.mmap(-1, mmap.PAGESIZE))[:SECTOR]
