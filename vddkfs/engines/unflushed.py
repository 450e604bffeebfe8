"""Writes that were answered and are not known to be on the disk.

What a library has taken is in its own memory, or in a server's, until it is flushed: if its process
is lost, the writes are sent to the next, in the order in which they were answered. Writes that
overlap are never under way at once, so that this is the order in which they have to be made.
"""

import collections
import socket
from typing import Final

import msgspec
import trio

from vddkfs.engines import protocol
from vddkfs.engines.base import SECTOR
from vddkfs.engines.protocol import Op
from vddkfs.engines.requests import Bytes

MUCH: Final = 64 * 1024 * 1024
"""Bytes that are kept before they are flushed unasked; twice as many, and further writes wait."""
_AT_ONCE: Final = 4


class Kept(msgspec.Struct, frozen=True):
    """A write that may be lost, the *number*-th that was answered."""

    number: int
    sector: int
    data: Bytes

    def overlaps(self, other: "Kept") -> bool:
        """Say whether one sector is in both."""
        mine, theirs = len(self.data) // SECTOR, len(other.data) // SECTOR
        return self.sector < other.sector + theirs and other.sector < self.sector + mine


class Unflushed:
    """Counts the writes that were answered, and with *keeps* has their bytes until a flush.

    For the trio thread.
    """

    def __init__(self, *, keeps: bool) -> None:
        self._keeps = keeps
        self._answered = 0
        self._flushed = 0
        self._kept: collections.deque[Kept] = collections.deque()
        self.bytes = 0

    @property
    def dirty(self) -> bool:
        """Whether there is anything to flush."""
        return self._answered > self._flushed

    @property
    def much(self) -> bool:
        """Whether it is time to flush."""
        return self.bytes > MUCH

    @property
    def full(self) -> bool:
        """Whether further writes should wait."""
        return self.bytes > 2 * MUCH

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What would be lost, in order."""
        return tuple(self._kept)

    @property
    def at_risk(self) -> bool:
        """Whether anything is lost if the process is."""
        return bool(self._kept)

    def add(self, sector: int, data: Bytes) -> None:
        """Take a write that was just answered."""
        self._answered += 1
        if self._keeps:
            self._kept.append(Kept(self._answered, sector, data))
            self.bytes += len(data)

    def mark(self) -> int:
        """Return what ``flushed`` is told when a flush that begins now has succeeded."""
        return self._answered

    def flushed(self, mark: int) -> None:
        """Forget all that was answered before *mark* was made."""
        self._flushed = max(self._flushed, mark)
        while self._kept and self._kept[0].number <= mark:
            self.bytes -= len(self._kept.popleft().data)

    def clear(self) -> None:
        """Forget everything: it is lost."""
        self.flushed(self._answered)


async def write_again(sock: socket.socket, kept: tuple[Kept, ...]) -> bool:
    """Have the process behind *sock*, which has opened the disk, write what was *kept*.

    In order, but for what lies apart. Returns False where the process is gone, or makes no sense.
    Raises what it tells, a VddkfsError.
    """
    under_way: dict[int, Kept] = {}
    for write in kept:
        while len(under_way) >= _AT_ONCE or any(write.overlaps(o) for o in under_way.values()):
            if not await _answered(sock, under_way):
                return False
        header = protocol.request_header(Op.WRITE_AGAIN, write.number, sector=write.sector)
        while True:
            try:
                protocol.send(sock, header, bytes(write.data))
                break
            except BlockingIOError:
                if not under_way or not await _answered(sock, under_way):
                    return False
            except OSError:
                return False
        under_way[write.number] = write
    while under_way:
        if not await _answered(sock, under_way):
            return False
    return True


async def _answered(sock: socket.socket, under_way: dict[int, Kept]) -> bool:
    """Wait for the end of one of the writes *under_way*."""
    await trio.lowlevel.wait_readable(sock)
    try:
        packet, fd = protocol.receive(sock)
        if not packet:
            return False
        _, _, _, status, number = protocol.REPLY.unpack_from(packet)
        body = protocol.body_of(packet, protocol.REPLY.size, fd)
        error = protocol.decode_error(body, status) if status else None
    except BlockingIOError:
        return True
    except (OSError, *protocol.GARBLED):
        return False
    if error is not None:
        raise error
    return under_way.pop(number, None) is not None
