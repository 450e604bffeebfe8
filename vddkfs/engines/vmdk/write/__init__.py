"""Writing to the base of a chain. ``BaseWriter`` is all that others need.

``base`` says what may be written, and writes flat extents; ``allocate`` gives grains of sparse ones
their place, in an order that a crash may interrupt anywhere; ``places`` finds and checks what is
there; ``writable`` is one file with its barriers.
"""

from vddkfs.engines.vmdk.write.base import BaseWriter

__all__ = ["BaseWriter"]
