"""What the dynamic loader reads of a shared library, without loading it: names and versions.

Only little-endian 64-bit files for x86-64 are read: VDDK has no others. Everything is bounded by
the file's size, because a kit may be damaged.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct("<16sHHIQQQIHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_DYNAMIC: Final = struct.Struct("<qQ")
_VERDEF: Final = struct.Struct("<HHHHIII")
_VERNEED: Final = struct.Struct("<HHIII")
_VERNAUX: Final = struct.Struct("<IHHII")
_WORDS: Final = struct.Struct("<II")

_X86_64 = 62
_PT_LOAD, _PT_DYNAMIC = 1, 2
_NEEDED, _STRTAB, _SONAME = 1, 5, 14
_VERDEF_TAG, _VERDEFNUM, _VERNEED_TAG, _VERNEEDNUM = 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF


class NotLoadable(Exception):
    """The file is no shared library for this machine; the text says why."""


@dataclass(frozen=True, slots=True)
class SharedLibrary:
    """*wants* holds the symbol versions it needs, by soname; *defines* those it has itself."""

    path: Path
    soname: str
    needed: tuple[str, ...]
    wants: dict[str, frozenset[str]] = field(default_factory=dict)
    defines: frozenset[str] = frozenset()


def read(path: Path) -> SharedLibrary:
    """Return what *path* says of itself. Raises NotLoadable, or OSError if it cannot be read."""
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).read()
        except (ValueError, IndexError, OverflowError, struct.error) as error:
            raise NotLoadable("it is empty, cut short or damaged") from error


class _Reader:
    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._loads: list[tuple[int, int, int]] = []
        self._strings = 0

    def read(self) -> SharedLibrary:
        (ident, kind, machine, _, _, segments, _, _, _, size, count) = _HEADER.unpack_from(
            self._content
        )
        if ident[:4] != b"\x7fELF":
            raise NotLoadable("it is not a shared library")
        if ident[4] != 2 or ident[5] != 1 or machine != _X86_64:
            raise NotLoadable("it is for another kind of processor than x86-64")
        if kind != 3:
            raise NotLoadable("it is not a shared library")
        dynamic: tuple[int, int] | None = None
        for index in range(count):
            tag, _, offset, address, _, length, _, _ = _SEGMENT.unpack_from(
                self._content, segments + index * size
            )
            if tag == _PT_LOAD:
                self._loads.append((address, length, offset))
            elif tag == _PT_DYNAMIC:
                dynamic = (offset, length)
        if dynamic is None:
            raise NotLoadable("it is not a shared library")
        tags = list(self._tags(*dynamic))
        first = dict(reversed(tags))
        self._strings = self._place(first[_STRTAB]) if _STRTAB in first else 0
        return SharedLibrary(
            path=self._path,
            soname=self._text(first[_SONAME]) if _SONAME in first else "",
            needed=tuple(self._text(value) for tag, value in tags if tag == _NEEDED),
            wants=self._wants(first.get(_VERNEED_TAG, 0), first.get(_VERNEEDNUM, 0)),
            defines=frozenset(self._defines(first.get(_VERDEF_TAG, 0), first.get(_VERDEFNUM, 0))),
        )

    def _tags(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for place in range(offset, offset + length, _DYNAMIC.size):
            tag, value = _DYNAMIC.unpack_from(self._content, place)
            if tag == 0:
                return
            yield tag, value

    def _place(self, address: int) -> int:
        for start, length, offset in self._loads:
            if start <= address < start + length:
                return address - start + offset
        raise ValueError("an address is outside of the file")

    def _text(self, offset: int) -> str:
        start = self._strings + offset
        end = self._content.find(b"\0", start)
        if end < 0 or not self._strings:
            raise ValueError("a name is outside of the file")
        return self._content[start:end].decode(errors="backslashreplace")

    def _wants(self, address: int, count: int) -> dict[str, frozenset[str]]:
        wants: dict[str, frozenset[str]] = {}
        place = self._place(address) if count else 0
        for _ in range(min(count, 0xFFFF)):
            _, entries, name, inner, following = _VERNEED.unpack_from(self._content, place)
            versions = set()
            at = place + inner
            for _ in range(entries):
                _, _, _, version, more = _VERNAUX.unpack_from(self._content, at)
                versions.add(self._text(version))
                at += more
            wants[self._text(name)] = frozenset(versions)
            place += following
        return wants

    def _defines(self, address: int, count: int) -> Iterator[str]:
        place = self._place(address) if count else 0
        for _ in range(min(count, 0xFFFF)):
            *_, inner, following = _VERDEF.unpack_from(self._content, place)
            yield self._text(_WORDS.unpack_from(self._content, place + inner)[0])
            place += following
