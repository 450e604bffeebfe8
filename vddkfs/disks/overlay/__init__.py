"""The overlay: local storage that takes writes instead of the source.

``Overlay.open`` opens a folder, ``Overlay.fork`` what was written to one image; ``manage`` is what
an operator does to such a folder. Free of FUSE and of engines; all calls may wait for a disk, so
they belong on a thread, but for those that say otherwise.
"""

from vddkfs.disks.overlay.extents import Extent
from vddkfs.disks.overlay.folder import Overlay
from vddkfs.disks.overlay.fork import Fork
from vddkfs.disks.overlay.source import SourceDisk
from vddkfs.disks.overlay.space import Limits
from vddkfs.disks.overlay.table import BELOW, BLOCK, ZERO, Run

__all__ = ["BELOW", "BLOCK", "ZERO", "Extent", "Fork", "Limits", "Overlay", "Run", "SourceDisk"]
