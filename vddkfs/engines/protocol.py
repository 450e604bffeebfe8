"""The words that the daemon and a worker exchange over their SOCK_SEQPACKET socket.

A packet is a fixed header and, for the rarer operations, a msgpack body. Reads, the hot path, are a
header alone in both directions. A body too long for a packet travels in a sealed memfd that is
passed along (flag ``BODY_IN_FD``), so that no message can fail for its length.

Request ids are the daemon's: a worker repeats them and attaches no meaning. A reply whose id the
daemon no longer knows (a request given up earlier) is dropped.

Both ends run the same release of vddkfs, so there is no version in the protocol.
"""

import array
import contextlib
import fcntl
import os
import socket
import struct
from enum import IntEnum
from typing import Final

import msgspec

from vddkfs.engines.base import EngineReport, LinkIdentity, MapSlice, Renewal
from vddkfs.errors import ALL_ERRORS, EngineError, Retry, VddkfsError


class GarbledMessage(Exception):
    """A message between the daemon and its worker was cut short or lost a part."""


GARBLED: Final = (struct.error, msgspec.MsgspecError, GarbledMessage)
"""What a message that the other end should not have sent makes the functions below raise."""


class Op(IntEnum):
    """What is asked of a worker. The header's fields that each uses are named."""

    READ = 1  # image, sector, count (sectors), chunk, offset (bytes in the chunk)
    OPEN = 2  # body: EngineConfig; reply: tuple[LinkIdentity, ...]
    MAP = 3  # image, sector; body: MapQuery; reply: MapSlice
    REVALIDATE = 4  # reply: tuple[LinkIdentity, ...]
    LEND = 5  # chunk, count (bytes); the memfd comes along
    TAKE_BACK = 6  # chunk
    STOP = 7  # no reply: the worker ends
    DESCRIBE = 8  # body: VddkConfig; reply: Description
    REPORT = 9  # reply: EngineReport
    RENEW = 10  # reply: Renewal
    WRITE = 11  # sector, count (sectors), chunk, offset (bytes in the chunk): to the base
    FLUSH = 12  # no body: all writes that were answered are on the disk
    WRITE_AGAIN = 13  # sector; body: what was written there, and may be lost


DIRECT: Final = 1
"""Flag of READ: use no cached table of a live link, and no page of a block device."""
BODY_IN_FD: Final = 128

REQUEST: Final = struct.Struct("<BBHIQQII")
"""op, flags, image, count, request id, sector, chunk, offset in the chunk (bytes)."""
REPLY: Final = struct.Struct("<BBHiQ")
"""op, flags, (unused), status (0 or an errno), request id."""

MAX_PACKET: Final = 64 * 1024
"""Bytes of the longest packet: well below the kernel's default socket buffer of 208 KiB."""
_FD_SPACE: Final = socket.CMSG_SPACE(array.array("i").itemsize)
_CUT: Final = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_CLOEXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
"""Plain integers: the operators of enum members are slow, and these are on the hot path."""
MAX_BODY: Final = 64 * 1024 * 1024
"""Bytes of the longest body that is accepted in a file descriptor."""


class MapQuery(msgspec.Struct, frozen=True):
    """Bounds of one MAP request: *count* sectors to look at, at most *limit* extents."""

    count: int
    limit: int = 2048
    seconds: float = 0.02


class ErrorBody(msgspec.Struct, frozen=True):
    """A VddkfsError on its way to the other process."""

    kind: str
    message: str
    errno: int
    cause: str = ""
    advice: str = ""
    link: str = ""
    sector: int = -1
    retry: Retry = ""


_KINDS: Final = {kind.__name__: kind for kind in ALL_ERRORS}


def encode_error(error: VddkfsError) -> bytes:
    """Return the body that tells the other end of *error*."""
    link = error.link if isinstance(error, EngineError) else ""
    sector = error.sector if isinstance(error, EngineError) else -1
    retry = error.retry if isinstance(error, EngineError) else ""
    return msgspec.msgpack.encode(
        ErrorBody(
            kind=type(error).__name__,
            message=_plain(error.message),
            errno=error.errno,
            cause=_plain(error.cause),
            advice=_plain(error.advice),
            link=_plain(link),
            sector=sector,
            retry=retry,
        )
    )


def _plain(text: str) -> str:
    """Return *text* without what UTF-8 cannot say: bytes of file names in other encodings."""
    return text.encode(errors="backslashreplace").decode()


def decode_error(body: bytes, status: int) -> VddkfsError:
    """Return the error that a failed reply tells of; *status* is the errno of its header."""
    if not body:
        return EngineError(os.strerror(status), errno=status)
    told = msgspec.msgpack.decode(body, type=ErrorBody)
    kind = _KINDS.get(told.kind, EngineError)
    if kind is EngineError:
        return EngineError(
            told.message,
            cause=told.cause,
            advice=told.advice,
            errno=told.errno,
            link=told.link,
            sector=told.sector,
            retry=told.retry,
        )
    return kind(told.message, cause=told.cause, advice=told.advice, errno=told.errno)


def encode(body: msgspec.Struct | tuple[msgspec.Struct, ...]) -> bytes:
    """Return *body* in msgpack."""
    return msgspec.msgpack.encode(body)


def decode_identities(body: bytes) -> tuple[LinkIdentity, ...]:
    """Return the identities of a reply to OPEN or REVALIDATE."""
    return msgspec.msgpack.decode(body, type=tuple[LinkIdentity, ...])


def decode_report(body: bytes) -> EngineReport:
    """Return the reply to REPORT."""
    return msgspec.msgpack.decode(body, type=EngineReport)


def decode_renewal(body: bytes) -> Renewal:
    """Return the reply to RENEW."""
    return msgspec.msgpack.decode(body, type=Renewal)


def decode_map(body: bytes) -> MapSlice:
    """Return the reply to MAP."""
    return msgspec.msgpack.decode(body, type=MapSlice)


def memfd_with(content: bytes) -> int:
    """Return a sealed memfd that holds *content*; the caller closes it."""
    fd = os.memfd_create("vddkfs-message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd


def send(
    sock: socket.socket, header: bytes, body: bytes = b"", *, fd: int = -1, flags: int = 0
) -> None:
    """Send one packet, with *fd* passed along if given.

    A body that does not fit goes into a memfd, and the header's flags byte says so; such a message
    cannot carry an *fd* of its own. Raises BlockingIOError where *flags* has MSG_DONTWAIT and the
    socket is full.
    """
    carried = -1
    if len(header) + len(body) > MAX_PACKET:
        if fd >= 0:
            raise ValueError("a message with a file descriptor must fit one packet")
        carried = memfd_with(body)
        header = bytes((header[0], header[1] | BODY_IN_FD)) + header[2:]
        fd, body = carried, b""
    try:
        if fd < 0:
            sock.send(header + body, flags)
        else:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
            sock.sendmsg([header + body], [rights], flags)
    finally:
        if carried >= 0:
            os.close(carried)


def receive(sock: socket.socket, flags: int = 0) -> tuple[bytes, int]:
    """Return the next packet and the file descriptor that came along (-1: none).

    An empty packet means that the other end is gone. The caller owns the descriptor.
    """
    data, ancillary, message_flags, _ = sock.recvmsg(MAX_PACKET, _FD_SPACE, flags | _CLOEXEC)
    if not ancillary and not message_flags & _CUT:
        return data, -1
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    for extra in fds[1:]:
        os.close(extra)
    fd = fds[0] if fds else -1
    if message_flags & _CUT:
        if fd >= 0:
            os.close(fd)
        raise GarbledMessage("it was cut short")
    return data, fd


def body_of(packet: bytes, header_size: int, fd: int) -> bytes:
    """Return a packet's body, from *fd* (which is closed) where the flags say so."""
    if not packet[1] & BODY_IN_FD:
        return packet[header_size:]
    if fd < 0:
        raise GarbledMessage("its body is missing")
    with open(fd, "rb") as file:
        # The descriptor shares its position with the one that wrote.
        file.seek(0)
        content = file.read(MAX_BODY + 1)
    if len(content) > MAX_BODY:
        raise GarbledMessage(f"it is longer than {MAX_BODY} bytes")
    return content


def pair() -> tuple[socket.socket, socket.socket]:
    """Return a connected pair: the daemon's end, non-blocking, and the worker's, inheritable."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, option, 1024 * 1024)
    ours.setblocking(False)
    return ours, theirs


def request_header(
    op: Op,
    request_id: int,
    *,
    flags: int = 0,
    image: int = 0,
    sector: int = 0,
    count: int = 0,
    chunk: int = 0,
    offset: int = 0,
) -> bytes:
    """Return the header of a request."""
    return REQUEST.pack(op, flags, image, count, request_id, sector, chunk, offset)


def reply_header(op: int, status: int, request_id: int) -> bytes:
    """Return the header of a reply; *status* is 0 or an errno."""
    return REPLY.pack(op, 0, 0, status, request_id)
