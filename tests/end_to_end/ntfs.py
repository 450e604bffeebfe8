"""An NTFS volume as Windows leaves it when the power goes away: its $LogFile is not closed.

ntfs-3g keeps no journal itself and empties the one that is there, so what Windows would have
left is written by hand: the two restart pages of a log with a client and without the mark that
the volume was closed. All layouts are those of NTFS 3.1, numbers are little-endian.
"""

import struct
from pathlib import Path

SECTOR = 512
PAGE = 4096
RECORD = 1024
"""Bytes of a record of the MFT; mkntfs makes them so."""
LOG_FILE = 2
"""The number of $LogFile's record."""
DATA = 0x80
NO_CLIENT = 0xFFFF
EMPTY = 0xFF
"""The byte that all of an emptied $LogFile consists of."""


def leave_unclean(image: Path, start: int) -> None:
    """Have the NTFS volume *start* bytes into a raw file look as if Windows had lost its power."""
    with open(image, "r+b") as file:
        file.seek(start)
        volume = file.read(64 * 1024 * 1024)
        assert log_is_empty(volume), "the log is in use"
        place, size = log_file(volume)
        for number in range(2):
            file.seek(start + place + number * PAGE)
            file.write(_restart_page(size, 0x100000 + number * 8))


def log_is_empty(volume: bytes) -> bool:
    """Say whether nothing is in a volume's $LogFile: it counts as closed then."""
    place, size = log_file(volume)
    return set(volume[place : place + size]) == {EMPTY}


def log_file(volume: bytes) -> tuple[int, int]:
    """Return where $LogFile's data is in a volume, and how long it is, in bytes."""
    assert volume[3:11] == b"NTFS    "
    cluster = struct.unpack_from("<H", volume, 11)[0] * volume[13]
    mft = struct.unpack_from("<Q", volume, 48)[0] * cluster
    record = volume[mft + LOG_FILE * RECORD :][:RECORD]
    assert record[:4] == b"FILE"
    (here,) = struct.unpack_from("<H", record, 20)
    while True:
        kind, length = struct.unpack_from("<II", record, here)
        if kind == DATA:
            break
        here += length
    (runs,) = struct.unpack_from("<H", record, here + 32)
    (size,) = struct.unpack_from("<Q", record, here + 48)
    # A run: the sizes of two numbers, then how many clusters, then which is the first.
    run = record[here + runs :]
    counted, placed = run[0] & 15, run[0] >> 4
    clusters = int.from_bytes(run[1 : 1 + counted], "little")
    first = int.from_bytes(run[1 + counted : 1 + counted + placed], "little")
    assert clusters * cluster == size, "the log is in pieces"
    return first * cluster, size


def _restart_page(size: int, number: int) -> bytes:
    """Return a restart page of a log of *size* bytes, *number* being its sequence number."""
    page = bytearray(PAGE)
    # The update sequence array of 1 + 8 numbers is at 30, the restart area at 48, version 1.1.
    struct.pack_into("<4sHHqIIHhh", page, 0, b"RSTR", 30, 9, 0, PAGE, PAGE, 48, 1, 1)
    # One client, none free, client 0 in use, and no flag: 2 would say that it was closed.
    area = (number, 1, NO_CLIENT, 0, 0, 67 - size.bit_length(), 48 + 160, 48, size, 0, 48, 64, 1, 0)
    struct.pack_into("<qHHHHIHHqIHHII", page, 48, *area)
    struct.pack_into("<qqHHH6xI", page, 96, number, number, NO_CLIENT, NO_CLIENT, 0, 8)
    page[128:136] = "NTFS".encode("utf-16-le")
    # Each sector ends with the page's update number; what was there is in the array.
    struct.pack_into("<H", page, 30, 1)
    for sector in range(PAGE // SECTOR):
        last = (sector + 1) * SECTOR - 2
        page[32 + 2 * sector : 34 + 2 * sector] = page[last : last + 2]
        struct.pack_into("<H", page, last, 1)
    return bytes(page)
