"""Where the log goes, how a line looks, and what never gets into one.

A daemon in the foreground logs to stderr; one in the background to syslog where there is one, else
to a file in the state folder that goes away with the mount. ``log=`` overrides both.
"""

import logging
import logging.handlers
import re
import sys
from collections import deque
from pathlib import Path
from typing import Final

_LINE: Final = "%(asctime)s %(levelname)s %(message)s"
_SYSLOG: Final = Path("/dev/log")

_SECRETS: Final = (
    # user:password@ of a URL
    (re.compile(r"(\w+://[^\s/:@]+):[^\s@/]+@"), r"\1:xxx@"),
    # password=..., "password": "...", and the other names of such things
    (
        re.compile(
            r"(?i)\b(pass(?:word|wd)?|cookie|token|ticket|secret)(\"?\s*[=:]\s*)(\"[^\"]*\"|[^\s,;]+)"
        ),
        r"\1\2xxx",
    ),
)


def redact(text: str) -> str:
    """Return *text* with what looks like a secret replaced by ``xxx``."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class Redaction(logging.Filter):
    """Redacts every record; it sits on the handlers, where all loggers' records pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record's text."""
        text = record.getMessage()
        if record.exc_info and not record.exc_text:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        record.msg, record.args = redact(text), None
        return True


class Recent(logging.Handler):
    """Keeps the last warnings and errors, for status."""

    def __init__(self, most: int = 20) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=most)
        self.setFormatter(logging.Formatter(_LINE))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's line."""
        self.lines.append(self.format(record))


def set_up(target: str, level: str, foreground: bool, fallback: Path) -> Recent:
    """Send the log to *target* (see ``log=``); *fallback* is the file of the state folder.

    Returns the handler that remembers the last warnings. Raises OSError if a file cannot be opened.
    """
    recent = Recent()
    handlers: list[logging.Handler] = [_handler(target, foreground, fallback), recent]
    root = logging.getLogger()
    root.setLevel(level.upper())
    for handler in handlers:
        handler.addFilter(Redaction())
        root.addHandler(handler)
    # pyfuse3 tells every request at debug level, which hides what vddkfs says there.
    logging.getLogger("pyfuse3").setLevel(logging.INFO)
    return recent


def _handler(target: str, foreground: bool, fallback: Path) -> logging.Handler:
    if target == "auto":
        background = "syslog" if _SYSLOG.is_socket() else str(fallback)
        target = "stderr" if foreground else background
    handler: logging.Handler
    if target == "stderr":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("vddkfs: %(levelname)s %(message)s"))
    elif target == "syslog":
        handler = logging.handlers.SysLogHandler(str(_SYSLOG), facility="daemon")
        handler.setFormatter(logging.Formatter("vddkfs[%(process)d]: %(levelname)s %(message)s"))
    else:
        handler = logging.FileHandler(target, encoding="utf-8")
        handler.setFormatter(logging.Formatter(_LINE))
    return handler
