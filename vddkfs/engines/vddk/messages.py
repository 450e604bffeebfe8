"""What the library says through its log functions: levels, the build number, and hints.

The three callbacks may come on any thread of the library, at any time between InitEx and the
process's end. Nothing that happens here reaches the library, and nothing here calls it.

Secrets are not removed here: whoever receives the lines redacts them (K07).
"""

import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Final

from vddkfs.engines.vddk.codes import tells_refusal

LogSink = Callable[[str, str], None]
"""Told each line: level (debug, info, warning, error or critical) and text, without line end.

It comes on whatever thread the library logs on, and must not call VDDK. What it raises is dropped.
"""

LEVELS: Final = {
    "critical": logging.ERROR,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}
"""The levels that a LogSink is told, as those of ``logging``."""

REFUSAL_SECONDS: Final = 5.0
"""How long a refusal of memory in the log is held to explain a failure."""

_BUILD = re.compile(r"\bbuild-(\d+)")
_PHONE_HOME = ("Get CEIP status failed", "VDDK_PhoneHome")


class Messages:
    """Passes lines on to *sink*, and remembers what they tell.

    *build* is the number in the first "build-NNN" the library wrote (K15), "" until then. *lost*
    counts lines whose delivery failed.
    """

    def __init__(self, sink: LogSink | None = None) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._refused = -REFUSAL_SECONDS
        self.build = ""
        self.lost = 0

    def hear(self, level: str, text: str) -> None:
        """Take what the library said at *level*. Never raises."""
        try:
            text = text.rstrip()
            if not text:
                return
            if not self.build:
                match = _BUILD.search(text)
                if match:
                    self.build = match[1]
            if tells_refusal(text):
                self._refused = time.monotonic()
            if any(words in text for words in _PHONE_HOME):
                # It says so as a warning on healthy systems that have no way to the Internet.
                level = "debug"
            if self._sink is not None:
                self._sink(level, text)
        except Exception:
            with self._lock:
                self.lost += 1

    def complain(self, text: str) -> None:
        """Tell of something odd that this package saw."""
        self.hear("warning", text)

    @property
    def refused_lately(self) -> bool:
        """Whether the host was lately said to have no memory for a request."""
        return time.monotonic() - self._refused < REFUSAL_SECONDS
