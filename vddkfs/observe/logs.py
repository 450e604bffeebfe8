"""Where the log goes, how a line looks, and what never gets into one.

A daemon in the foreground logs to stderr; one in the background to syslog where there is one, else
to a file in the state folder that goes away with the mount. ``log=`` overrides both.
"""

import errno
import logging
import logging.handlers
import queue
import sys
from collections import deque
from pathlib import Path
from typing import Final

from vddkfs.errors import UsageError
from vddkfs.observe.redact import redact as redact  # also for who imports it from here

_LINE: Final = "%(asctime)s %(levelname)s %(message)s"
_SYSLOG: Final = Path("/dev/log")


class Redaction(logging.Filter):
    """Redacts every record; it sits on the handlers, where all loggers' records pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record's text."""
        text = record.getMessage()
        if record.exc_info and not record.exc_text:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        record.msg, record.args = redact(text), None
        return True


class _SysLog(logging.handlers.SysLogHandler):
    """Sends lines that UTF-8 cannot say, with names in other encodings, escaped and not at all."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).encode(errors="backslashreplace").decode()


class Recent(logging.Handler):
    """Keeps the last warnings and errors, for status."""

    def __init__(self, most: int = 20) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=most)
        self.setFormatter(logging.Formatter(_LINE))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's line."""
        self.lines.append(self.format(record))


class Log:
    """The log of a running daemon: *target* is where it goes, ``recent`` its last warnings.

    Lines are written by a thread, so that a slow disk or syslog keeps no request waiting.
    """

    def __init__(self, target: str, handler: logging.Handler, fallback: Path) -> None:
        self.target = target
        self.recent = Recent()
        self._fallback = fallback if target == str(fallback) else None
        lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self._handlers: list[logging.Handler] = [logging.handlers.QueueHandler(lines), self.recent]
        self._listener = logging.handlers.QueueListener(lines, handler)
        self._writer = handler
        root = logging.getLogger()
        for each in self._handlers:
            each.addFilter(Redaction())
            root.addHandler(each)
        self._listener.start()

    def ended_well(self) -> None:
        """Remove the file of the state folder: nobody has to look for what went wrong."""
        if self._fallback is not None:
            self._fallback.unlink(missing_ok=True)

    def close(self) -> None:
        """Write what is left, and stop."""
        for each in self._handlers:
            logging.getLogger().removeHandler(each)
        self._listener.stop()
        self._writer.close()


def set_up(target: str, level: str, foreground: bool, fallback: Path) -> Log:
    """Send the log to *target* (see ``log=``); *fallback* is the file of the state folder.

    Starts a thread: not before a fork. Raises UsageError if the target cannot be opened.
    """
    if target == "auto":
        background = "syslog" if _SYSLOG.is_socket() else str(fallback)
        target = "stderr" if foreground else background
    try:
        handler = _handler(target)
    except OSError as error:
        raise UsageError(
            f"log={target} cannot be opened", cause=str(error), advice="name another place for it"
        ) from None
    logging.getLogger().setLevel(level.upper())
    # pyfuse3 tells every request at debug level, which hides what vddkfs says there.
    logging.getLogger("pyfuse3").setLevel(logging.INFO)
    return Log(target, handler, fallback)


def _handler(target: str) -> logging.Handler:
    handler: logging.Handler
    if target == "stderr":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("vddkfs: %(levelname)s %(message)s"))
    elif target == "syslog":
        if not _SYSLOG.is_socket():
            raise FileNotFoundError(errno.ENOENT, "no syslog daemon listens", str(_SYSLOG))
        handler = _SysLog(str(_SYSLOG), facility="daemon")
        handler.setFormatter(logging.Formatter("vddkfs[%(process)d]: %(levelname)s %(message)s"))
    else:
        handler = logging.FileHandler(target, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter(_LINE))
    return handler
