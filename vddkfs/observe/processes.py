"""What a process costs the machine, as the kernel counts it."""

import os
from pathlib import Path
from typing import Final, NamedTuple

_USER, _SYSTEM, _RESIDENT = 11, 12, 21
"""Places in /proc/PID/stat behind the name, which may hold blanks and brackets."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Usage(NamedTuple):
    """*cpu* is in seconds since the process began, *resident* in bytes, shared memory included."""

    cpu: float
    resident: int


def usage(pid: int) -> Usage | None:
    """Return what process *pid* uses; None if it is gone. Never waits for the process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    ticks = int(fields[_USER]) + int(fields[_SYSTEM])
    return Usage(ticks / _TICKS, int(fields[_RESIDENT]) * _PAGE)
