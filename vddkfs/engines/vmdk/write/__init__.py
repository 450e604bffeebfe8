"""Writing to the base of a chain. ``WritableBase`` is all that an engine needs.

``opened`` has what is settled when it is opened: ``locks`` against others who write, its
``content_id``, that it can be written at all. ``base`` says what may be written, and writes flat
extents; ``allocate`` gives grains of sparse ones their place, in an order that a crash may
interrupt anywhere; ``places`` finds and checks what is there; ``writable`` is one file with its
barriers.
"""

from vddkfs.engines.vmdk.write.base import BaseWriter
from vddkfs.engines.vmdk.write.locks import Locks, lock_to_read
from vddkfs.engines.vmdk.write.opened import WritableBase

__all__ = ["BaseWriter", "Locks", "WritableBase", "lock_to_read"]
