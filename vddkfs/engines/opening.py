"""The first exchange with a new process: what it is to open, and what it has found."""

import logging
import socket

import trio

from vddkfs.engines import protocol
from vddkfs.engines.base import LinkIdentity
from vddkfs.engines.config import EngineConfig
from vddkfs.engines.protocol import Op

log = logging.getLogger(__name__)


async def open_chain(
    name: str, sock: socket.socket, config: EngineConfig, secret: int
) -> tuple[LinkIdentity, ...] | None:
    """Have the process behind *sock* open *config*, and return what that is.

    None where the process ended first, or makes no sense. Raises what it tells, a VddkfsError.
    *secret* is a descriptor that goes along, or -1.
    """
    header = protocol.request_header(Op.OPEN, 0)
    try:
        protocol.send(sock, header, protocol.encode(config), fd=secret)
        await trio.lowlevel.wait_readable(sock)
        packet, fd = protocol.receive(sock)
    except (OSError, *protocol.GARBLED):
        return None
    if not packet:
        return None
    try:
        status = protocol.REPLY.unpack_from(packet)[3]
        body = protocol.body_of(packet, protocol.REPLY.size, fd)
        if status:
            raise protocol.decode_error(body, status)
        return protocol.decode_identities(body)
    except protocol.GARBLED as error:
        log.error("worker of %s: its first answer makes no sense: %s", name, error)
        return None
