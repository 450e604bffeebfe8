"""Partition tables: from a disk's sectors to partitions, with no I/O of its own.

Sources: UEFI Specification 2.10, chapter 5 (GPT, protective MBR); for the MBR, which no standard
describes, the behaviour of Linux (block/partitions/msdos.c) and of util-linux (libblkid, sfdisk).
Where those differ:

- A protective entry (type 0xEE) makes the disk a GPT disk, wherever in the MBR it is. The other
  entries of a hybrid MBR are not shown, and neither are they when both copies of the GPT are
  damaged: Linux and libblkid do the same, sfdisk would show the MBR.
- A file system on the whole disk also ends its first sector with 55 AA. As in Linux and libblkid,
  an entry with a status other than 0x00 and 0x80 means that there is no table. A FAT, exFAT, NTFS
  or BitLocker boot sector counts as a table only if it has a partition that lies on the disk: the
  boot code area of a partitioned disk may still hold the remains of a former file system.
- An MBR partition that reaches past the end of the disk is shortened, one of a GPT is left out, as
  Linux does. What starts outside the disk is left out of both.
- An extended partition is listed with its whole size, as sfdisk does; Linux shows its first two
  sectors only. All extended partitions are followed, as Linux does; sfdisk follows one.

Content never raises: what is sound is returned, and the rest is told in ``warnings``.
"""

import struct
import uuid
import zlib
from collections.abc import Generator, Iterator
from itertools import count
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import msgspec

_T = TypeVar("_T")
_Reads: TypeAlias = Generator[tuple[int, int], bytes, _T]

MAX_EBRS = 256
"""Links followed in the chains of all extended partitions of a disk together."""
MAX_GPT_ENTRIES = 1024
MAX_GPT_ENTRY_BYTES = 4096
"""With MAX_GPT_ENTRIES this bounds the longest read that ``parse`` asks for: 4 MiB."""
MAX_WARNINGS = 32
"""Warnings of one table; a last one says how many more there were."""

_MBR_BYTES = 512
_MBR_MAGIC = b"\x55\xaa"
_MBR_ENTRIES = 446
_MBR_ENTRY = struct.Struct("<B3xB3xII")
_MBR_DISK_ID = 440
_STATUSES = frozenset({0x00, 0x80})
_EXTENDED = frozenset({0x05, 0x0F, 0x85})
_PROTECTIVE = 0xEE
_FIRST_LOGICAL = 5

_GPT_MAGIC = b"EFI PART"
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_HEADER_CRC = 16
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_GPT_UNUSED = bytes(16)
_GPT_LEGACY_BOOTABLE = 1 << 2

_BPB = struct.Struct("<HBHB4xB")
_BPB_OFFSET = 11
_VOLUME_NAMES = frozenset({b"NTFS    ", b"EXFAT   ", b"-FVE-FS-"})


class Partition(msgspec.Struct, frozen=True):
    """One partition; *start* and *size* are in bytes and lie inside the disk.

    *number* is the one Linux and sfdisk use: MBR primaries 1 to 4 by slot, logicals from 5 in the
    order of their chain; GPT entries from 1 by slot. *type* is "0x83" and the like, or a GUID in
    lower case. *uuid* is what Linux calls PARTUUID: the GPT's unique GUID in lower case, or
    disk id and number of an MBR ("deadbeef-01"; "" when the disk has no id). *name* is the GPT's,
    "" for an MBR. *bootable* is the MBR's active flag or the GPT's legacy BIOS attribute.
    """

    number: int
    start: int
    size: int
    type: str
    name: str = ""
    uuid: str = ""
    bootable: bool = False


class PartitionTable(msgspec.Struct, frozen=True):
    """The sound partitions of a disk by number, and in *warnings* what was wrong with the rest.

    Partitions may overlap; an extended partition overlaps its logical ones.
    """

    label: Literal["dos", "gpt"]
    partitions: tuple[Partition, ...] = ()
    warnings: tuple[str, ...] = ()


class _MbrEntry(NamedTuple):
    """An entry of an MBR or EBR; *start* and *size* are in bytes, *start* is relative in an EBR."""

    status: int
    type: int
    start: int
    size: int


class _GptHeader(NamedTuple):
    last_usable: int
    entries_offset: int
    entries: int
    entry_bytes: int
    entries_crc: int


class _Damaged(Exception):
    """One copy of a GPT cannot be used; the text says why."""


class _Scan:
    """The disk that is being parsed, and the warnings so far."""

    def __init__(self, capacity: int, sector_size: int) -> None:
        self.capacity = capacity
        self.sector_size = sector_size
        self._warnings: list[str] = []
        self._more = 0

    def warn(self, text: str) -> None:
        if len(self._warnings) < MAX_WARNINGS - 1:
            self._warnings.append(text)
        else:
            self._more += 1

    def table(self, label: Literal["dos", "gpt"], partitions: list[Partition]) -> PartitionTable:
        more = [f"{self._more} more warnings were left out"] if self._more else []
        ordered = sorted(partitions, key=lambda partition: partition.number)
        return PartitionTable(label, tuple(ordered), (*self._warnings, *more))


def parse(
    capacity_bytes: int, sector_size: int = 512
) -> Generator[tuple[int, int], bytes, PartitionTable | None]:
    """Parse the partition table of a disk of *capacity_bytes*, asking the caller for its bytes.

    The generator yields (offset, length), both in bytes, always inside the disk, and must be sent
    exactly those bytes (anything shorter is a ValueError). It returns the table, or None if the
    disk has none. *sector_size* is the logical sector size that the guest sees, 512 or 4096: the
    unit of all addresses in a table. No read is longer than 4 MiB, and there are at most
    MAX_EBRS + 1 of them.
    """
    if sector_size not in (512, 4096):
        raise ValueError(f"sector size {sector_size} is neither 512 nor 4096")
    return _parse(_Scan(capacity_bytes, sector_size))


def parse_bytes(
    image: bytes | bytearray | memoryview, sector_size: int = 512
) -> PartitionTable | None:
    """Parse the partition table of the disk whose whole content is *image*."""
    view = memoryview(image).cast("B")
    steps = parse(len(view), sector_size)
    try:
        offset, length = next(steps)
        while True:
            offset, length = steps.send(bytes(view[offset : offset + length]))
    except StopIteration as end:
        table: PartitionTable | None = end.value
        return table


def _read(offset: int, length: int) -> _Reads[bytes]:
    data = yield offset, length
    if len(data) != length:
        raise ValueError(f"{length} bytes were asked for at {offset}, {len(data)} were sent")
    return data


def _parse(scan: _Scan) -> _Reads[PartitionTable | None]:
    if scan.capacity < _MBR_BYTES:
        return None
    sector = yield from _read(0, _MBR_BYTES)
    if not sector.endswith(_MBR_MAGIC):
        return None
    entries = _mbr_entries(sector, scan.sector_size)
    plausible = all(entry.status in _STATUSES for entry in entries)
    if any(entry.type == _PROTECTIVE for entry in entries):
        gpt = yield from _parse_gpt(scan, entries)
        # Checksums prove more than status bytes do; without them, boot code that happens to have
        # 0xEE in the right place is still boot code.
        return gpt if plausible or gpt.partitions else None
    if not plausible:
        return None
    dos = yield from _parse_mbr(scan, sector, entries)
    return dos if dos.partitions or not _is_volume(sector) else None


def _is_volume(sector: bytes) -> bool:
    """Say whether this is the boot sector of a Windows file system, by its BIOS parameter block."""
    if sector[3:11] in _VOLUME_NAMES:
        return True
    sector_bytes, cluster, reserved, fats, media = _BPB.unpack_from(sector, _BPB_OFFSET)
    return (
        sector_bytes in (512, 1024, 2048, 4096)
        and cluster.bit_count() == 1
        and reserved > 0
        and 1 <= fats <= 4
        and (media == 0xF0 or media >= 0xF8)
    )


# MBR


def _mbr_entries(sector: bytes, sector_size: int) -> list[_MbrEntry]:
    table = sector[_MBR_ENTRIES : -len(_MBR_MAGIC)]
    return [
        _MbrEntry(status, kind, start * sector_size, size * sector_size)
        for status, kind, start, size in _MBR_ENTRY.iter_unpack(table)
    ]


def _parse_mbr(scan: _Scan, sector: bytes, entries: list[_MbrEntry]) -> _Reads[PartitionTable]:
    disk_id = int.from_bytes(sector[_MBR_DISK_ID : _MBR_DISK_ID + 4], "little")
    numbered = [(slot, entry) for slot, entry in enumerate(entries, 1) if entry.size]
    numbers = count(_FIRST_LOGICAL)
    visited = {0}
    for _slot, entry in numbered.copy():
        if entry.type in _EXTENDED and entry.start < scan.capacity:
            logicals = yield from _logicals(scan, entry, visited)
            numbered += [(next(numbers), logical) for logical in logicals]
    return scan.table("dos", list(_mbr_partitions(scan, disk_id, numbered)))


def _mbr_partitions(
    scan: _Scan, disk_id: int, numbered: list[tuple[int, _MbrEntry]]
) -> Iterator[Partition]:
    for number, entry in numbered:
        size = min(entry.size, scan.capacity - entry.start)
        if size <= 0:
            scan.warn(f"partition {number} starts outside the disk and is left out")
            continue
        if size < entry.size:
            scan.warn(
                f"partition {number} reaches past the end of the disk: "
                f"{size} of its {entry.size} bytes are shown"
            )
        yield Partition(
            number=number,
            start=entry.start,
            size=size,
            type=f"0x{entry.type:02x}",
            uuid=f"{disk_id:08x}-{number:02x}" if disk_id else "",
            bootable=entry.status == 0x80,
        )


def _logicals(scan: _Scan, extended: _MbrEntry, visited: set[int]) -> _Reads[list[_MbrEntry]]:
    """Follow the chain of EBRs of *extended*; return its logical partitions with absolute starts.

    *visited* holds the offsets of all boot records of the disk that were read: a link to one of
    them ends the chain.
    """
    logicals: list[_MbrEntry] = []
    here = extended
    while True:
        problem = _chain_problem(scan, here.start, visited)
        if problem:
            scan.warn(f"the chain of logical partitions ends early at byte {here.start}: {problem}")
            return logicals
        visited.add(here.start)
        sector = yield from _read(here.start, _MBR_BYTES)
        if not sector.endswith(_MBR_MAGIC):
            # An extended partition without any logical one may never have been given an EBR.
            if here is not extended or any(sector):
                scan.warn(f"the extended boot record at byte {here.start} has no signature")
            return logicals
        entries = [entry for entry in _mbr_entries(sector, scan.sector_size) if entry.size]
        logicals += _ebr_data(scan, sector, here, extended)
        link = next((entry for entry in entries if entry.type in _EXTENDED), None)
        if link is None:
            return logicals
        # Data starts are relative to their own EBR, links to the start of the extended partition.
        here = link._replace(start=extended.start + link.start)


def _chain_problem(scan: _Scan, start: int, visited: set[int]) -> str:
    if start in visited:
        return "it is a loop"
    if start + _MBR_BYTES > scan.capacity:
        return "this is outside the disk"
    if len(visited) > MAX_EBRS:
        return f"{MAX_EBRS} links are the most that is followed"
    return ""


def _ebr_data(
    scan: _Scan, sector: bytes, here: _MbrEntry, extended: _MbrEntry
) -> Iterator[_MbrEntry]:
    """Return the data partitions of one EBR: the first two entries, and the others if sensible.

    OS/2 used all four, others left garbage in the last two: those must lie inside both the link
    and the extended partition, as Linux has it.
    """
    for slot, entry in enumerate(_mbr_entries(sector, scan.sector_size)):
        if not entry.size or entry.type in _EXTENDED:
            continue
        start = here.start + entry.start
        inside = (
            entry.start + entry.size <= here.size
            and start >= extended.start
            and start + entry.size <= extended.start + extended.size
        )
        if slot < 2 or inside:
            yield entry._replace(start=start)


# GPT


def _parse_gpt(scan: _Scan, mbr: list[_MbrEntry]) -> _Reads[PartitionTable]:
    hybrid = sum(1 for entry in mbr if entry.size and entry.type not in (0, _PROTECTIVE))
    if hybrid:
        scan.warn(f"hybrid MBR: its own partitions ({hybrid}) are ignored, the GPT is used")
    problems: list[str] = []
    last = scan.capacity // scan.sector_size - 1
    for name, lba in (("primary", 1), ("backup", last)):
        try:
            header = yield from _gpt_header(scan, lba)
            array = yield from _gpt_array(scan, header)
        except _Damaged as damage:
            problems.append(f"the {name} GPT cannot be used: {damage}")
            continue
        for problem in problems:
            scan.warn(f"{problem}; the backup at the end of the disk is used")
        if header.last_usable > last:
            scan.warn(f"the GPT was made for a larger disk: this one ends with LBA {last}")
        return scan.table("gpt", list(_gpt_partitions(scan, header, array)))
    for problem in problems:
        scan.warn(problem)
    return scan.table("gpt", [])


def _gpt_header(scan: _Scan, lba: int) -> _Reads[_GptHeader]:
    offset = lba * scan.sector_size
    if lba < 1 or offset + scan.sector_size > scan.capacity:
        raise _Damaged("its place is outside the disk")
    sector = yield from _read(offset, scan.sector_size)
    magic, _, size, crc, _, my_lba, _, _, last_usable, _, array_lba, entries, entry_bytes, acrc = (
        _GPT_HEADER.unpack_from(sector)
    )
    if magic != _GPT_MAGIC:
        raise _Damaged("no header signature")
    if not _GPT_HEADER.size <= size <= scan.sector_size:
        raise _Damaged(f"a header of {size} bytes")
    unsigned = sector[:_GPT_HEADER_CRC] + bytes(4) + sector[_GPT_HEADER_CRC + 4 : size]
    if zlib.crc32(unsigned) != crc:
        raise _Damaged("wrong header checksum")
    if my_lba != lba:
        raise _Damaged(f"its header says LBA {my_lba} and is at {lba}")
    if not 1 <= entries <= MAX_GPT_ENTRIES:
        raise _Damaged(f"{entries} entries")
    power_of_two = entry_bytes.bit_count() == 1
    if not (power_of_two and _GPT_ENTRY.size <= entry_bytes <= MAX_GPT_ENTRY_BYTES):
        raise _Damaged(f"entries of {entry_bytes} bytes")
    return _GptHeader(last_usable, array_lba * scan.sector_size, entries, entry_bytes, acrc)


def _gpt_array(scan: _Scan, header: _GptHeader) -> _Reads[bytes]:
    length = header.entries * header.entry_bytes
    if header.entries_offset + length > scan.capacity:
        raise _Damaged("its entries are outside the disk")
    array = yield from _read(header.entries_offset, length)
    if zlib.crc32(array) != header.entries_crc:
        raise _Damaged("wrong checksum of the entries")
    return array


def _gpt_partitions(scan: _Scan, header: _GptHeader, array: bytes) -> Iterator[Partition]:
    last = scan.capacity // scan.sector_size - 1
    for index in range(header.entries):
        kind, unique, first, final, attributes, name = _GPT_ENTRY.unpack_from(
            array, index * header.entry_bytes
        )
        if kind == _GPT_UNUSED:
            continue
        if first > final:
            scan.warn(f"partition {index + 1} ends before it starts and is left out")
        elif final > last:
            scan.warn(f"partition {index + 1} does not fit on the disk and is left out")
        else:
            yield Partition(
                number=index + 1,
                start=first * scan.sector_size,
                size=(final - first + 1) * scan.sector_size,
                type=str(uuid.UUID(bytes_le=kind)),
                name=name.decode("utf-16-le", "replace").partition("\0")[0],
                uuid=str(uuid.UUID(bytes_le=unique)),
                bootable=bool(attributes & _GPT_LEGACY_BOOTABLE),
            )
