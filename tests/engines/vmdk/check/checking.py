"""What the tests of `vddkfs check` share: sound extents of every format, and short findings."""

import os
import struct
from pathlib import Path
from typing import Any

from tests.engines.vmdk.makers import Extent, Flat, Grains, Hosted, Mark, Zero
from tests.engines.vmdk.makers_chain import Link, write_chain
from tests.engines.vmdk.makers_esx import Cowd, SeSparse
from tests.engines.vmdk.makers_stream import Stream
from vddkfs.engines.vmdk.check import ChainDone, Finding, Progress, check_source
from vddkfs.engines.vmdk.files import Trust

SECTOR = 512
GRAIN = 128
DATA = {number: bytes([number + 1]) * (GRAIN * SECTOR) for number in range(4)}
TABLE = 22
"""Where ``Maker.sparse`` puts the first table of a disk with one; its first grain is at 128."""

Shape = tuple[str, str, str, int, int]
"""Level, code, name of the file, sector, sectors."""


def events(source: str | Path, **trust: bool) -> tuple[list[Finding], list[ChainDone]]:
    """Check *source*; progress never goes backwards within a way through a file."""
    findings, chains = [], []
    for event in check_source(str(source), Trust(**trust)):
        if isinstance(event, Finding):
            findings.append(event)
            assert event.what.isprintable()
            assert event.link
            assert event.file
            assert event.sectors > 0 or event.sector == -1
            assert (event.exit_code > 0) == (event.level == "unchecked")
        elif isinstance(event, ChainDone):
            chains.append(event)
        else:
            assert isinstance(event, Progress)
            assert 0 <= event.done <= event.total
            assert event.total > 0
    return findings, chains


def shapes(source: str | Path, **trust: bool) -> list[Shape]:
    return [
        (one.level, one.code, os.path.basename(one.file), one.sector, one.sectors)
        for one in events(source, **trust)[0]
    ]


def patch(path: str | Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def entry(number: int, place: int, table: int = TABLE) -> tuple[int, bytes]:
    """Return where the table entry of a grain is in the file, and its bytes."""
    return table * SECTOR + number * 4, struct.pack("<I", place)


def number_at(path: str | Path, offset: int, width: int = 4) -> int:
    raw = Path(path).read_bytes()[offset : offset + width]
    assert len(raw) == width
    return int.from_bytes(raw, "little")


def grains(count: int, size: int, **keys: Any) -> Grains:
    content: dict[int, bytes | Mark] = {
        number: bytes([number % 255 + 1, number // 255]) * (size * SECTOR // 2)
        for number in range(0, count, 2)
    }
    return Grains(count * size, size, content, **keys)


HEALTHY: dict[str, Extent] = {
    "flat": Flat(b"x" * 4096),
    "flat-with-offset": Flat(b"x" * 4096, offset=5),
    "zero": Zero(100),
    "hosted": Hosted(grains(1100, 8)),
    "hosted-redundant": Hosted(grains(1100, 8), redundant=True),
    "hosted-all-tables": Hosted(grains(9, 8), redundant=True, all_tables=True),
    "hosted-rounded": Hosted(Grains(1003, 8, {125: b"x" * 3 * SECTOR}), rounded=True),
    "hosted-cut": Hosted(Grains(1003, 8, {125: b"x" * 3 * SECTOR}, cut=True)),
    "hosted-zero-grains": Hosted(Grains(800, 8, {1: Mark.ZERO, 2: b"x" * 4096})),
    "hosted-backwards": Hosted(grains(9, 8, order=((8, 0), (6, 0), (4, 0), (2, 0)))),
    "hosted-odd-places": Hosted(grains(9, 8, order=((4, 3), (2, 1), (8, 20)))),
    "hosted-empty": Hosted(Grains(1 << 20, 128, {})),
    "cowd": Cowd(grains(9000, 1)),
    "cowd-all-tables": Cowd(grains(40, 1), all_tables=True),
    "cowd-child": Cowd(grains(40, 8), child=True),
    "cowd-gaps": Cowd(grains(40, 8, order=((4, 3), (2, 1)))),
    "cowd-empty": Cowd(Grains(1 << 20, 1, {})),
    "sesparse": SeSparse(grains(9000, 8)),
    "sesparse-spread": SeSparse(grains(40, 8), spread=True),
    "sesparse-backwards": SeSparse(
        Grains(8 * 9000, 8, {1: b"x" * 4096, 2: Mark.ZERO, 3: Mark.UNMAPPED, 5000: b"y" * 4096}),
        backwards=True,
    ),
    "sesparse-gaps": SeSparse(grains(40, 8, order=((4, 3), (2, 1)))),
    "sesparse-empty": SeSparse(Grains(1 << 20, 8, {})),
    "stream": Stream(grains(1100, 8)),
    "stream-short": Stream(Grains(1003, 8, {125: b"x" * 3 * SECTOR}), short=True),
    "stream-tables-first": Stream(grains(1100, 8), footer=False),
    "stream-redundant": Stream(grains(40, 8), footer=False, redundant=True),
    "stream-bare": Stream(grains(40, 8), footer=False, prefix="nothing"),
    "stream-empty": Stream(Grains(1 << 20, 128, {})),
}
TYPES = {"cowd": "vmfsSparse", "sesparse": "seSparse", "stream": "streamOptimized"}


def write(folder: Path, name: str, extent: Extent) -> Path:
    kind = TYPES.get(name.split("-")[0], "custom")
    return write_chain(folder, [Link(kind, (extent,))])[0]
