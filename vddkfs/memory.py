"""The machine's memory: how much of it the cache takes, and what writers must not wait for."""

import contextlib
import ctypes
import re
from pathlib import Path
from typing import Final

MIB: Final = 1024 * 1024
_MOST: Final = 256 * MIB
_LEAST: Final = 16 * MIB
_PR_SET_IO_FLUSHER: Final = 57
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_FROM_HEAP: Final = 4 * MIB
_KEPT_IN_HEAP: Final = 64 * MIB


def default_cache_size(root: Path = Path("/")) -> int:
    """Return the least of 256 MiB, an eighth of the memory, and half of what is available; bytes.

    The memory is the machine's, or what the control group of this process may have (a container,
    a systemd unit with MemoryMax=), if that is less. Never below 16 MiB.
    """
    told = _meminfo(root)
    memory = min([told["MemTotal"], *_group_limits(root)])
    available = told.get("MemAvailable", memory)
    return max(_LEAST, min(_MOST, memory // 8, available // 2) // MIB * MIB)


def _meminfo(root: Path) -> dict[str, int]:
    """Return the entries of /proc/meminfo in bytes; see proc(5)."""
    text = (root / "proc/meminfo").read_text("ascii")
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+): +(\d+) kB$", text, re.M)}


def _group_limits(root: Path) -> list[int]:
    """Return the limits of this process's control group (version 2) and of those above it."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        entry = (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape")
        group = re.search(r"^0::(/.*)$", entry, re.M)
        top = root / "sys/fs/cgroup"
        place = top / group[1].lstrip("/") if group else top
        # In a container the top is its own group; that of the machine has no such file.
        for each in (place, *place.parents):
            with contextlib.suppress(OSError, ValueError):
                found.append(int((each / "memory.max").read_text("ascii")))
    return found


def write_back_without_waiting() -> bool:
    """Have this thread, and all that it starts later, get memory without writing any back.

    Whoever serves a file that a loop device writes to must not wait, for memory, for that very
    write. Says whether the kernel let it: it needs CAP_SYS_RESOURCE, and Linux 5.6.
    """
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0)


def keep_buffers() -> None:
    """Have large buffers come from memory that was used before, where the C library can do that.

    What is written arrives in a new buffer of up to 1 MiB each time. Taken from the kernel and
    given back, its pages are cleared and faulted in anew for each: a third of what a write costs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_IN_HEAP)
