"""The kernel's table of mounts, and which of them a path leads into.

A path is followed by the table, so that nothing below a vddkfs mount is ever touched: not even a
stat, which would wait behind a disk that hangs. Names are decoded with surrogates where they are
not UTF-8.
"""

import errno
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

FILE_SYSTEM: Final = "fuse.vddkfs"
_MOST_LINKS: Final = 40
"""Symbolic links in one path, as the kernel has it."""
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


class Entry(NamedTuple):
    """A mount: *device* is ``major:minor``, *root* what of its file system is shown at *place*.

    *number* and *parent* are the kernel's numbers of this mount and of the one it is mounted on.
    """

    number: int
    parent: int
    device: str
    root: str
    place: str
    kind: str
    source: str

    def name(self, path: str) -> str:
        """Return how the file system calls *path*, which is below *place*: "" is its top."""
        return f"{self.root}/{path[len(self.place) :]}".strip("/").replace("//", "/")


def entries(table: bytes | None = None) -> list[Entry]:
    """Return the mounts of *table*, by default of this process, in the kernel's order."""
    if table is None:
        table = Path("/proc/self/mountinfo").read_bytes()
    found = []
    # Not by splitlines(): the kernel escapes only the newline, and names may hold other line ends.
    for raw in table.rstrip(b"\n").split(b"\n"):
        before, _, after = os.fsdecode(raw).partition(" - ")
        number, parent, device, root, place = before.split(" ")[:5]
        kind, source = after.split(" ")[:2]
        found.append(
            Entry(
                int(number),
                int(parent),
                device,
                _unescape(root),
                _unescape(place),
                _unescape(kind),
                _unescape(source),
            )
        )
    return found


def _unescape(field: str) -> str:
    """Undo the octal escapes that the kernel uses for space, tab, newline, backslash and #."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 8)), field)


class Table:
    """The mounts of *found*, as a path meets them."""

    def __init__(self, found: Iterable[Entry]) -> None:
        self.entries: Sequence[Entry] = tuple(found)
        numbers = {entry.number for entry in self.entries}
        self._on = {
            (entry.parent if entry.parent in numbers - {entry.number} else None, entry.place): entry
            for entry in self.entries
        }

    def at(self, path: str) -> Entry | None:
        """Return the mount that shows *path*: absolute, with neither links nor dots in it."""
        return self._walk(path)[-1]

    def _walk(self, path: str) -> list[Entry | None]:
        """Return the mounts on the way to *path*, the last one last; None where there is none."""
        met: list[Entry | None] = [None]
        here = ""
        for name in ["", *filter(None, path.split("/"))]:
            here = f"{here.rstrip('/')}/{name}"
            # A mount may itself be covered by another at the same place.
            while (over := self._on.get((met[-1].number if met[-1] else None, here))) is not None:
                met.append(over)
        return met

    def locate(self, path: str, start: str = "/") -> tuple[Entry, str] | None:
        """Return the vddkfs mount that *path* leads into, and what its file system calls the file.

        A relative *path* begins at *start*. Symbolic links are followed outside of vddkfs mounts
        only, and a ``..`` inside of one takes a name away. None if the path leads elsewhere; raises
        OSError where it leads nowhere.
        """
        names = os.path.join(start, path).split("/")[::-1]
        here, links = "/", 0
        while names:
            name = names.pop()
            if name == "..":
                here = os.path.dirname(here)
            if name in ("", ".", ".."):
                continue
            here = os.path.join(here, name)
            if self._is_ours(here):
                continue
            target = _link(here)
            if target is not None:
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                here = os.path.dirname(here)
                if target.startswith("/"):
                    here = "/"
                names += target.split("/")[::-1]
        entry = self.at(here)
        return (entry, entry.name(here)) if entry and entry.kind == FILE_SYSTEM else None

    def _is_ours(self, path: str) -> bool:
        """Say whether a vddkfs mount is on the way to *path*."""
        return any(entry is not None and entry.kind == FILE_SYSTEM for entry in self._walk(path))


def _link(path: str) -> str | None:
    """Return where a symbolic link leads, None if *path* is something else. Raises OSError."""
    try:
        return os.readlink(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
