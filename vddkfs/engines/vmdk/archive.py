"""The members of an OVA: the files of a tar archive, found where they lie, without unpacking.

Sources: POSIX.1 (pax), "ustar Interchange Format" and "pax Interchange Format"; the manual of GNU
tar, "Basic Tar Format". Pure but for the *read* that is handed in. The archive comes from anywhere,
so nothing in it is believed: every header's checksum is compared, every place lies inside the
archive and behind the one before, and the number of members and the length of what describes them
are bounded.

Decisions where an archive allows several:

- The first block of zeros ends the archive, as for tar. An archive that simply ends behind a
  member's data, without that block or without the padding before it, is taken as complete.
- Names are relative: one that is absolute or climbs with ``..`` makes the whole archive refused,
  because nobody makes such an OVA in good faith. An OVA is flat, but a member in a subfolder is
  kept, under its name with the folder. A leading ``./`` is dropped.
- Of members with one name the last counts, because that is the one which unpacking would leave. A
  link, folder or device under the name of an earlier file takes that file away.
- Only regular files are members. Sparse ones (GNU's ``S``, or marked so by pax records) are left
  out like links and devices, because their bytes do not lie in the archive as they are.
"""

import re
from collections.abc import Callable

import msgspec

from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import DamagedSource, NotAVmdk

BLOCK_BYTES = 512

MAX_MEMBERS = 512
"""Entries of any kind in one archive; an OVA has a handful."""

MAX_RECORD_BYTES = 64 << 10
"""The longest extended record (a long name, or pax settings) that is read."""

MAX_RECORDS = 8
"""Extended records before one member: one long name, one link name, one of pax are usual."""

MAX_RECORDS_BYTES = 1 << 20
"""Bytes of all extended records of an archive together; those of an OVA have a few hundred."""

MAX_SPARSE_BLOCKS = 4096
"""Further header blocks of one sparse member, 21 pieces each."""

COPY_ADVICE = "copy the archive again from its source, or restore it"
UNPACK_ADVICE = "unpack it with tar, look at what comes out, and name the .vmdk there"

_ZEROS = bytes(BLOCK_BYTES)
_MAX_SIZE = 1 << 62
_NO_DATA = b"123456"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_SOLARIS, _GLOBAL = b"L", b"K", b"x", b"X", b"g"
_OF_ONE_ENTRY = (_LONG_NAME, _LONG_LINK, _PAX, _PAX_SOLARIS)
_RECORDS = (*_OF_ONE_ENTRY, _GLOBAL)
_REGULAR = (b"0", b"\0", b"7")
_PAX_LENGTH = re.compile(rb"([0-9]{1,6}) ")


class Member(msgspec.Struct, frozen=True):
    """A regular file inside an archive: *size* bytes from byte *offset* of the archive."""

    name: str
    offset: int
    size: int


class _Header(msgspec.Struct, frozen=True):
    """A block that describes an entry, as it stands: *name* may be replaced by a record."""

    name: str
    size: int
    kind: bytes
    continued: bool


class _Described:
    """What the extended records before an entry say of it."""

    def __init__(self) -> None:
        self.count = 0
        self.long_name: str | None = None
        self.pax: dict[bytes, bytes] = {}


def looks_like_archive(head: bytes) -> bool:
    """Say whether *head*, the first bytes of a file, begin with the header of a tar's entry.

    Its first 512 bytes are looked at; fewer are not enough.
    """
    return len(head) >= BLOCK_BYTES and head[0] != 0 and _checksum_matches(head[:BLOCK_BYTES])


def read_members(read: Callable[[int, int], bytes], size: int, path: str) -> tuple[Member, ...]:
    """Return the regular files of the archive *path*, in the order in which they lie in it.

    *read(offset, count)* returns bytes of the archive (fewer at its end), which has *size* bytes;
    *path* is for messages. Raises NotAVmdk if this is no archive at all, DamagedSource for one that
    is truncated, inconsistent or absurd, and what *read* raises.
    """
    return _Walk(read, size, path).members()


class _Walk:
    """One way through an archive; *here* is the byte of the next header."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, path: str) -> None:
        self._read = read
        self._size = size
        self._path = printable(path)
        self._here = 0
        self._last = ""
        self._records_bytes = 0

    def members(self) -> tuple[Member, ...]:
        found: dict[str, Member] = {}
        entries = 0
        described = _Described()
        while (header := self._next_header(described)) is not None:
            entries += header.kind not in _OF_ONE_ENTRY
            if entries > MAX_MEMBERS:
                raise self._damaged(f"it has more than {MAX_MEMBERS} members", advice=UNPACK_ADVICE)
            if header.kind in _RECORDS:
                self._take_record(header, described)
                continue
            name, member = self._take_entry(header, described)
            found.pop(name, None)
            if member is not None:
                found[name] = member
            described = _Described()
        return tuple(found.values())

    def _next_header(self, described: _Described) -> _Header | None:
        """Return the header at *here*, None at the end of the archive."""
        expected = min(max(self._size - self._here, 0), BLOCK_BYTES)
        block = self._read(self._here, expected) if expected else b""
        if self._here == 0 and not looks_like_archive(block):
            raise NotAVmdk(
                f"{self._path}: is not a tar archive, which an OVA is",
                advice="name an .ova, a .vmdk, a .vmx or a folder of VMDKs",
            )
        if len(block) == expected and block == _ZEROS[:expected]:
            if described.count:
                raise self._damaged(
                    "truncated archive: it ends between the record that describes a member and "
                    f"the member, at byte {self._here}{self._after()}"
                )
            return None
        if len(block) < BLOCK_BYTES:
            raise self._damaged(
                f"truncated archive: of the header at byte {self._here}{self._after()} "
                f"{len(block)} bytes are there, {BLOCK_BYTES - len(block)} are missing"
            )
        if not _checksum_matches(block):
            raise self._damaged(
                f"the header at byte {self._here}{self._after()} is not one: "
                "its checksum does not match"
            )
        return self._parse(block)

    def _parse(self, block: bytes) -> _Header:
        name = _to_nul(block[:100])
        prefix = _to_nul(block[345:500]) if block[257:263] == b"ustar\0" else b""
        size = _number(block[124:136])
        if not 0 <= size < _MAX_SIZE:
            raise self._damaged(f"the header at byte {self._here}{self._after()} has no valid size")
        return _Header(
            name=_text(prefix + b"/" + name if prefix else name),
            size=size,
            kind=block[156:157],
            continued=block[482] != 0,
        )

    def _take_record(self, header: _Header, described: _Described) -> None:
        described.count += header.kind in _OF_ONE_ENTRY
        if described.count > MAX_RECORDS or header.size > MAX_RECORD_BYTES:
            raise self._damaged(
                f"more describes the member at byte {self._here} than {MAX_RECORDS} records of "
                f"{MAX_RECORD_BYTES} bytes",
                advice=UNPACK_ADVICE,
            )
        self._records_bytes += header.size
        if self._records_bytes > MAX_RECORDS_BYTES:
            raise self._damaged(
                f"the records that describe its members have more than {MAX_RECORDS_BYTES} bytes",
                advice=UNPACK_ADVICE,
            )
        offset = self._here + BLOCK_BYTES
        raw = self._read(offset, header.size) if header.size else b""
        if len(raw) < header.size:
            raise self._truncated("a record that describes a member", offset, header.size, len(raw))
        if header.kind == _LONG_NAME:
            described.long_name = _text(_to_nul(raw))
        elif header.kind == _GLOBAL:
            # What it says of all members, their times and owners, is nothing to us.
            if any(map(_decides, self._settings(raw))):
                raise self._damaged(
                    f"the global record at byte {self._here} gives all members one name or size",
                    advice=UNPACK_ADVICE,
                )
        elif header.kind != _LONG_LINK:
            described.pax.update(self._settings(raw))
        self._go_behind(offset, header.size)

    def _take_entry(self, header: _Header, described: _Described) -> tuple[str, Member | None]:
        """Go behind an entry; return its name, and the member unless it is no regular file."""
        raw_name = header.name if described.long_name is None else described.long_name
        if b"path" in described.pax:
            raw_name = _text(described.pax[b"path"])
        size = header.size
        if b"size" in described.pax:
            size = self._pax_size(described.pax[b"size"])
        self._last = raw_name
        offset = self._here + BLOCK_BYTES
        if header.kind == b"S":
            offset = self._behind_sparse_blocks(header, offset)
        is_folder = header.kind == b"\0" and raw_name.endswith("/")
        if header.kind in _NO_DATA or is_folder:
            size = 0
        there = max(self._size - offset, 0)
        if size > there:
            raise self._truncated(f"its member {printable(raw_name)}", offset, size, there)
        sparse = any(key.startswith(b"GNU.sparse.") for key in described.pax)
        regular = header.kind in _REGULAR and not sparse and not raw_name.endswith("/")
        name = self._checked_name(raw_name) if regular else _joined(raw_name)
        self._go_behind(offset, size)
        return name, Member(name, offset, size) if regular else None

    def _behind_sparse_blocks(self, header: _Header, offset: int) -> int:
        """Return where the data of a sparse member begins, behind the list of its pieces."""
        continued = header.continued
        for _ in range(MAX_SPARSE_BLOCKS):
            if not continued:
                return offset
            block = self._read(offset, BLOCK_BYTES) if offset < self._size else b""
            if len(block) < BLOCK_BYTES:
                raise self._truncated("a sparse member's header", offset, BLOCK_BYTES, len(block))
            continued = block[504] != 0
            offset += BLOCK_BYTES
        raise self._damaged(
            f"the sparse member at byte {self._here} has no end", advice=UNPACK_ADVICE
        )

    def _checked_name(self, name: str) -> str:
        joined = _joined(name)
        parts = re.split(r"[/\\]", name)
        if not joined or "\0" in name or name[0] in "/\\" or ".." in parts:
            raise self._damaged(
                f'the member at byte {self._here} is named "{printable(name)[:200]}": '
                "names must be relative and lead nowhere else",
                advice=UNPACK_ADVICE,
            )
        return joined

    def _settings(self, raw: bytes) -> dict[bytes, bytes]:
        """Return the settings of a pax record: lines of "LENGTH key=value", one after another."""
        found: dict[bytes, bytes] = {}
        here = 0
        while here < len(raw):
            match = _PAX_LENGTH.match(raw, here)
            end = here + int(match.group(1)) if match else 0
            if match is None or not match.end() < end <= len(raw) or raw[end - 1 : end] != b"\n":
                raise self._damaged(f"the pax record at byte {self._here} is not one")
            key, equals, value = raw[match.end() : end - 1].partition(b"=")
            if not equals:
                raise self._damaged(f"the pax record at byte {self._here} has a line without '='")
            found[key] = value
            here = end
        return found

    def _pax_size(self, value: bytes) -> int:
        if not re.fullmatch(rb"[0-9]{1,18}", value):
            raise self._damaged(f"the pax record before byte {self._here} has no valid size")
        return int(value)

    def _go_behind(self, offset: int, size: int) -> None:
        self._here = offset + -(-size // BLOCK_BYTES) * BLOCK_BYTES

    def _after(self) -> str:
        return f", after {printable(self._last)}," if self._last else ""

    def _truncated(self, what: str, offset: int, size: int, there: int) -> DamagedSource:
        return self._damaged(
            f"truncated archive: of {what} ({size} bytes from byte {offset}) "
            f"{there} bytes are there, {size - there} are missing"
        )

    def _damaged(self, what: str, advice: str = COPY_ADVICE) -> DamagedSource:
        return DamagedSource(f"{self._path}: {what}", advice=advice)


def _checksum_matches(block: bytes) -> bool:
    """Compare a header's checksum; some old writers summed signed bytes."""
    said = _number(block[148:156])
    rest = block[:148] + b"        " + block[156:]
    return said >= 0 and (said == sum(rest) or said == sum(memoryview(rest).cast("b")))


def _number(field: bytes) -> int:
    """Return a header's number: octal digits, or binary where they do not suffice; -1 if none."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            return -1
        return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    digits = _to_nul(field).strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        return -1
    return int(digits or b"0", 8)


def _decides(key: bytes) -> bool:
    return key in (b"path", b"size") or key.startswith(b"GNU.sparse.")


def _joined(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _to_nul(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _text(name: bytes) -> str:
    """Return a name as Linux has it: UTF-8, and bytes that are not as surrogate escapes."""
    return name.decode("utf-8", "surrogateescape")
