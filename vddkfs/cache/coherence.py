"""The rules of freshness: what is kept of an image, for how long, and what an invalidation drops.

Old content can be in five places: (1) the kernel's page cache of our file, (2) the sector cache,
(3) what the engine's library keeps of an open disk, (4) the page cache of a block device on this
machine that SAN transport reads, (5) the allocation map and the tables of the engine. Above us are
(6) loop devices and guests mounted on our files, which can be named but are not ours. The manual's
page on semantics tells the operator what follows from these rules.

The order of an invalidation is the way of the data, from the source up: a place that was dropped
before the one that it is filled from would be filled with old content again.
"""

import enum
from typing import Final

PLACES: Final = {
    "device": "the page cache of a block device on this machine",
    "library": "what the library keeps of an open disk",
    "tables": "allocation maps and tables",
    "cache": "the sector cache",
    "kernel": "the kernel's pages of our files",
    "loop": "loop devices, and guests mounted on them",
}
"""Where old content can be, in the order in which it is dropped."""


class Policy(enum.StrEnum):
    """What is kept of an image between one open of its file and the next."""

    IMMUTABLE = "immutable"
    """Everything, while the identity of its links holds: nobody may write them."""
    CLOSE_TO_OPEN = "close-to-open"
    """Nothing: whoever opens the file sees nothing that is older than that."""
    NONE = "none"
    """Nothing is kept at all, not even while the file is open."""

    @property
    def caches(self) -> bool:
        """Whether reads may be answered from memory."""
        return self is not Policy.NONE

    @property
    def lasts(self) -> bool:
        """Whether what was read stays right when nobody has the file open, and holes stay zeros."""
        return self is Policy.IMMUTABLE


def policy(frozen: bool, mode: str) -> Policy:
    """Return the policy of an image whose links nobody may write (*frozen*), or may.

    *mode* is the mount option ``cache``: auto, strict or none.
    """
    if mode == "none":
        return Policy.NONE
    return Policy.IMMUTABLE if frozen and mode == "auto" else Policy.CLOSE_TO_OPEN
