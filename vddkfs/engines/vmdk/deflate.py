"""Compressed grains, expanded: what reads them and what checks them have in common.

A grain is a zlib stream (RFC 1950) of what the whole grain holds.
"""

from typing import Final, NamedTuple

from isal import isal_zlib

StreamError: Final[type[Exception]] = isal_zlib.error  # type: ignore[assignment]


class Expanded(NamedTuple):
    """*content* is what a stream expanded to, *used* the bytes that it took; *ended*: so it said.

    One that does not end where it should has one byte more than was asked for, or has not ended.
    """

    content: bytes
    used: int
    ended: bool


def expand(packed: bytes, most: int) -> Expanded:
    """Expand the stream that *packed* begins with to *most* bytes, and one more.

    Raises StreamError if it is none.
    """
    stream = isal_zlib.decompressobj()
    content = stream.decompress(packed, most + 1)
    return Expanded(content, len(packed) - len(stream.unused_data), stream.eof)


def longest_bytes(grain: int) -> int:
    """Return how many bytes a compressed grain of *grain* sectors can have: incompressible ones
    grow a little."""
    return 2 * grain * 512
