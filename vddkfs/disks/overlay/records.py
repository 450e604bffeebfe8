"""What is in the map file of a fork, byte by byte. Pure functions; all integers little-endian.

The file is in pages of 4 KiB. Page 0 is the header; from page 1 on follow transactions, each in
whole pages: 80 bytes of head, then entries of 16 bytes. Transactions are numbered from 1. Up to
``Header.snapshot_end`` they are the map as it was when the file was made; later ones change it,
in their order. What follows the last is anything.

    header       magic 8s, version I, bytes of a block I, fork 16s, capacity Q, generation Q,
                 snapshot_end Q, reserved Q, digest 16s
    transaction  magic 8s, fork 16s, generation Q, number Q, entries I, flags I, unused 16s,
                 digest 16s (of the head before it, and the entries)
    entry        block << 24 | count - 1, place (2**48 - 1: zeros)
"""

import hashlib
import struct
from array import array
from collections.abc import Iterable
from typing import Final

import msgspec

from vddkfs.disks.overlay.table import BLOCK

PAGE: Final = 4096
VERSION: Final = 1
CLOSED: Final = 1
"""Flag of a transaction: the fork was closed after it, and all is well."""
MOST_ENTRIES: Final = 65_536
"""Entries of a transaction, unless more were made at once."""
ENTRY_BYTES: Final = 16

_HEADER: Final = struct.Struct("<8sII16sQQQQ")
_HEAD: Final = struct.Struct("<8s16sQQII16x")
_DIGEST: Final = 16
HEAD_BYTES: Final = _HEAD.size + _DIGEST
_MAP_MAGIC: Final = b"vddkfs-M"
_TRANSACTION_MAGIC: Final = b"vddkfs-T"
_COUNT_BITS: Final = 24
_MOST_BLOCKS: Final = 1 << _COUNT_BITS


class Header(msgspec.Struct, frozen=True):
    """Page 0: *capacity* in bytes; *generation* is another for each attempt to write a file of the
    fork, drawn by lot; *reserved* is how long the file was made."""

    fork: bytes
    capacity: int
    generation: int
    snapshot_end: int
    reserved: int
    version: int = VERSION
    block: int = BLOCK

    def encode(self) -> bytes:
        """Return the page."""
        head = _HEADER.pack(
            _MAP_MAGIC,
            self.version,
            self.block,
            self.fork,
            self.capacity,
            self.generation,
            self.snapshot_end,
            self.reserved,
        )
        return (head + _digest(head)).ljust(PAGE, b"\0")


def decode_header(page: bytes) -> Header | None:
    """Return the header in *page*, or None if there is none, or a damaged one."""
    head = page[: _HEADER.size]
    if len(page) < PAGE or page[_HEADER.size :][:_DIGEST] != _digest(head):
        return None
    magic, version, block, fork, capacity, generation, end, reserved = _HEADER.unpack(head)
    if magic != _MAP_MAGIC:
        return None
    return Header(fork, capacity, generation, end, reserved, version, block)


class Head(msgspec.Struct, frozen=True):
    """The head of a transaction of *entries*."""

    fork: bytes
    generation: int
    number: int
    entries: int
    flags: int = 0

    @property
    def size(self) -> int:
        """Bytes of the whole transaction, in whole pages."""
        return transaction_bytes(self.entries)


def transaction_bytes(entries: int) -> int:
    """Return how long a transaction of *entries* is."""
    return -(-(HEAD_BYTES + entries * ENTRY_BYTES) // PAGE) * PAGE


def encode(head: Head, entries: "array[int]") -> bytes:
    """Return a transaction with *entries*, two numbers each."""
    raw = _HEAD.pack(
        _TRANSACTION_MAGIC, head.fork, head.generation, head.number, head.entries, head.flags
    )
    body = entries.tobytes()
    return (raw + _digest(raw, body) + body).ljust(head.size, b"\0")


def decode_head(raw: bytes, fork: bytes, generation: int) -> Head | None:
    """Return the head of a transaction of the file that *raw* begins with, or None."""
    if len(raw) < HEAD_BYTES:
        return None
    magic, of, made, number, entries, flags = _HEAD.unpack_from(raw)
    if magic != _TRANSACTION_MAGIC or of != fork or made != generation:
        return None
    return Head(fork, generation, number, entries, flags)


def decode(head: Head, raw: bytes) -> "array[int] | None":
    """Return the entries of the transaction *raw*, two numbers each, or None if it is torn."""
    body = raw[HEAD_BYTES:][: head.entries * ENTRY_BYTES]
    if raw[_HEAD.size : HEAD_BYTES] != _digest(raw[: _HEAD.size], body):
        return None
    entries = array("Q")
    entries.frombytes(body)
    return entries


def enter(entries: "array[int]", block: int, count: int, place: int, zero: int) -> None:
    """Append to *entries* that *count* blocks from *block* are in *place*; *zero* is no place."""
    while count > _MOST_BLOCKS:
        entries.extend((block << _COUNT_BITS | _MOST_BLOCKS - 1, place))
        block, count = block + _MOST_BLOCKS, count - _MOST_BLOCKS
        place = place if place == zero else place + _MOST_BLOCKS
    entries.extend((block << _COUNT_BITS | count - 1, place))


def entered(entries: "array[int]") -> Iterable[tuple[int, int, int]]:
    """Yield the (block, count, place) of *entries*."""
    for first, place in zip(entries[::2], entries[1::2], strict=True):
        yield first >> _COUNT_BITS, (first & _MOST_BLOCKS - 1) + 1, place


def _digest(*parts: bytes) -> bytes:
    found = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        found.update(part)
    return found.digest()
