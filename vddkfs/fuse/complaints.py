"""The log of failed requests: enough to know what is wrong, and not a line for each sector."""

import logging
import time
from typing import Final

from vddkfs.errors import EngineError, VddkfsError

log = logging.getLogger(__name__)

_QUIET_SECONDS: Final = 60.0
_MOST_TOLD: Final = 1000
"""Failed requests that are logged within that time."""


class Complaints:
    """What was logged of late, of all files of a mount."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str, int], float] = {}

    def tell(self, what: str, name: str, offset: int, error: VddkfsError) -> None:
        """Log a failed request: the same at most once a minute, and not each of a lost region."""
        link = error.link if isinstance(error, EngineError) else ""
        now = time.monotonic()
        key = (f"{what} of {name}", link or str(error), offset)
        if now - self._told.get(key, -_QUIET_SECONDS) < _QUIET_SECONDS:
            return
        self._told = {
            each: when for each, when in self._told.items() if now - when < _QUIET_SECONDS
        }
        if len(self._told) >= _MOST_TOLD:
            return
        self._told[key] = now
        if len(self._told) == _MOST_TOLD:
            log.error("%d requests have failed within a minute; no more are logged", _MOST_TOLD)
        where = f" (link {link})" if link else ""
        log.error("%s%s: %s at offset %d failed: %s", name, where, what, offset, error)
