"""What a worker says: everything that its library logs or prints, line by line, without secrets.

A library in a worker logs through callbacks, and some of it prints to stdout and stderr past them.
``WorkerOutput`` takes both, and writes lines ``<N>TEXT`` to the stderr that the worker was started
with, which is a pipe to the daemon; N is the digit that syslog has for the level. ``parse_line`` is
the daemon's end.

Nothing that was printed leaves the worker before its line is whole, or is so long that a part can
be cut off safely: a secret may come in two writes. What was printed but not passed on when the
worker crashes is lost, and so is the end of a line of more than 64 KiB. That is better than a
secret in a log. What came through ``say`` is out when that returns. Each call of ``say`` is looked
at alone: a secret that a library logs in two calls is not found.

Imports the standard library and ``observe.redact`` only.
"""

import codecs
import contextlib
import ctypes
import logging
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from vddkfs.observe.redact import Redactor

LONGEST: Final = 65536
"""Characters of a line that are kept; what follows is left out."""
PATIENCE: Final = 0.5
"""Seconds after which the beginning of an unfinished line is passed on, if it can be cut safely."""
_PIECE: Final = 4000
"""Bytes of a line as the daemon gets it: less than PIPE_BUF, so that no other writer breaks it."""
_READ: Final = 65536
_LAST_READS: Final = 32
"""How often a stream is read at the end: a child of the library may print for ever."""
_CUT: Final = " [cut]"

_DIGITS: Final = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG_DIGIT: Final = 7
_LEVELS: Final = {3: logging.ERROR, 4: logging.WARNING, 5: logging.INFO, 6: logging.INFO}
_LINE: Final = re.compile(rb"<([0-7])>")
# Controls, line separators, and what turns the direction of text: a log is read on a terminal.
_UNPRINTABLE: Final = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]")


def parse_line(line: bytes) -> tuple[int, str]:
    """Return the level (of ``logging``) and the text of a *line* from a worker's stderr.

    A line without a level is one that the worker did not write through here, such as the last words
    of an interpreter that cannot start: a warning.
    """
    found = _LINE.match(line)
    level = logging.WARNING
    if found is not None:
        digit = int(found[1])
        level = _LEVELS.get(digit, logging.DEBUG if digit == _DEBUG_DIGIT else logging.CRITICAL)
        line = line[found.end() :]
    return level, line.decode("utf-8", "replace").rstrip()


class WorkerOutput:
    """Takes over fds 1 and 2 of this process, from now on and for good.

    To be made before the library is loaded. *redactor* may be replaced at any time, and must be as
    soon as a secret is known. *patience* is in seconds. Threads may call ``say`` at any time. A
    daemon that does not read stops whoever says or prints something, once the pipe is full.
    """

    def __init__(self, redactor: Redactor | None = None, patience: float = PATIENCE) -> None:
        self.redactor = redactor or Redactor()
        self._patience = patience
        self._lock = threading.Lock()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.original = os.dup(2)
        """The descriptor of the stderr that the worker was started with, for ``faulthandler``: when
        that writes, no thread of Python is left to pass its words on."""
        _buffer_lines()
        self._streams = [self._take(1, "stdout"), self._take(2, "stderr")]
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC)[::-1]
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()
        self._closed = False

    def say(self, level: int, text: str) -> None:
        """Pass on *text*, which may have several lines, at *level* (of ``logging``)."""
        redactor = self.redactor
        if len(text) > LONGEST:
            text = text[: redactor.cut(text[:LONGEST], anywhere=True)] + _CUT
        digit = next((digit for least, digit in _DIGITS if level >= least), _DEBUG_DIGIT)
        # Redacted before it is split: a secret may have a line end in it.
        self._write(digit, redactor.redact(text))

    def close(self, seconds: float = 1.0) -> None:
        """Pass on what was printed, unfinished lines too, within *seconds*; ``say`` still works.

        What is printed later is lost: fds 1 and 2 do not lead back to where nothing is redacted.
        """
        if self._closed:
            return
        self._closed = True
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        _flush_library()
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for fd in (1, 2):
            os.dup2(null, fd)
        os.close(null)
        # A byte, and not the end of the pipe: a child of the library may have the other end too.
        # The thread may have seen both ends already, and be gone.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._wake, b".")
        os.close(self._wake)
        self._thread.join(seconds)

    def _take(self, fd: int, name: str) -> "_Stream":
        """Make *fd* the writing end of a pipe, and return what collects its lines."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reading, False)
        os.dup2(writing, fd)
        os.close(writing)
        return _Stream(reading, lambda text: self._printed(name, text), lambda: self.redactor)

    def _printed(self, name: str, text: str) -> None:
        text = self.redactor.redact(text).rstrip()
        if text:
            self._write(6, f"{name}: {text}")

    def _write(self, digit: int, text: str) -> None:
        """Write the lines of *text*, which holds no secret any more."""
        head = b"<%d>" % digit
        lines = b""
        for line in re.split("\r?\n|\r", text):
            line = _UNPRINTABLE.sub(_escape, line.rstrip())
            data = line.encode(errors="backslashreplace")
            while data:
                end = _piece(data)
                lines += head + data[:end] + b"\n"
                data = data[end:]
        with self._lock, contextlib.suppress(OSError):
            # One line a call: the kernel does not mix that with what others write. If the daemon is
            # gone there is nobody to tell.
            for whole in lines.splitlines(keepends=True):
                while whole:
                    whole = whole[os.write(self.original, whole) :]

    def _run(self) -> None:
        """Collect lines until ``close``, or until nobody can print any more."""
        poll = select.poll()
        streams = {stream.fd: stream for stream in self._streams}
        for fd in (self._woken, *streams):
            poll.register(fd, select.POLLIN)
        closing = False
        while streams and not closing:
            due = [stream.since + self._patience for stream in streams.values() if stream.since]
            wait = max(0.0, min(due) - time.monotonic()) * 1000 + 1 if due else None
            ready = {fd for fd, _ in poll.poll(wait)}
            closing = self._woken in ready
            for stream in list(streams.values()):
                if stream.fd in ready or closing:
                    ended = stream.read(_LAST_READS if closing else 1)
                    if ended or closing:
                        poll.unregister(stream.fd)
                        del streams[stream.fd]
                        stream.finish()
                if stream.since and time.monotonic() - stream.since >= self._patience:
                    stream.pass_on()
        os.close(self._woken)


class _Stream:
    """Collects the lines that come from *fd* in pieces, and gives them to *emit* one by one.

    Keeps at most LONGEST characters and the piece that was just read.
    """

    def __init__(
        self, fd: int, emit: Callable[[str], None], redactor: Callable[[], Redactor]
    ) -> None:
        self.fd = fd
        self.since = 0.0
        """When the unfinished line got longer; 0 if nothing waits to be looked at."""
        self._emit = emit
        self._redactor = redactor
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._pieces: list[str] = []
        self._size = 0
        self._skipping = False

    def read(self, times: int) -> bool:
        """Read what is there, up to so many *times*; return True at the end of the stream."""
        for _ in range(times):
            try:
                data = os.read(self.fd, _READ)
            except BlockingIOError:
                return False
            if not data:
                return True
            self._feed(self._decoder.decode(data))
        return False

    def pass_on(self) -> None:
        """Emit as much of the unfinished line as can be cut off safely, and keep the rest."""
        text = "".join(self._pieces)
        self.since = 0.0
        end = self._redactor().cut(text)
        if end:
            self._emit(text[:end])
        self._keep(text[end:])

    def finish(self) -> None:
        """Emit what is left, and close."""
        self._feed(self._decoder.decode(b"", final=True))
        self._end_line()
        os.close(self.fd)

    def _feed(self, text: str) -> None:
        first, *others = text.split("\n")
        self._add(first)
        for piece in others:
            self._end_line()
            self._add(piece)

    def _add(self, piece: str) -> None:
        if self._skipping or not piece:
            return
        self._pieces.append(piece)
        self._size += len(piece)
        self.since = self.since or time.monotonic()
        if self._size > LONGEST:
            text = "".join(self._pieces)[:LONGEST]
            self._emit(text[: self._redactor().cut(text, anywhere=True)] + _CUT)
            self._keep("")
            self._skipping = True

    def _end_line(self) -> None:
        if self._pieces:
            self._emit("".join(self._pieces))
        self._keep("")
        self._skipping = False

    def _keep(self, text: str) -> None:
        self._pieces = [text] if text else []
        self._size = len(text)
        if not text:
            self.since = 0.0


def _piece(data: bytes) -> int:
    """Return how many bytes of UTF-8 *data* make one line, so that no character is broken."""
    end = min(_PIECE, len(data))
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


# --- the C library's own buffers. Python's streams are not in them; what a library prints is.

_LINE_BUFFERED: Final = 1


def _buffer_lines() -> None:
    """Let C code's stdout go out line by line: into a pipe it would be 4 KiB at a time."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        libc = ctypes.CDLL(None)
        stdout = ctypes.c_void_p.in_dll(libc, "stdout")
        libc.setvbuf(stdout, None, ctypes.c_int(_LINE_BUFFERED), ctypes.c_size_t(0))


def _flush_library() -> None:
    """Write what C code printed to stdout and did not finish."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        libc = ctypes.CDLL(None)
        libc.fflush(ctypes.c_void_p.in_dll(libc, "stdout"))
