"""`vddkfs check`: the structures of every chain of a SOURCE, looked at without changing anything.

``walk`` goes from a SOURCE to chains and their links, ``link`` looks at one, ``extents`` at one
file with grains, ``tables`` and ``stream`` at what is in it; ``overlap`` is the arithmetic of what
may not lie on top of one another, ``notes`` what is told.
"""

from vddkfs.engines.vmdk.check.notes import Finding
from vddkfs.engines.vmdk.check.walk import ChainDone, Event, Progress, check_source

__all__ = ["ChainDone", "Event", "Finding", "Progress", "check_source"]
