"""Reads of a worker on the simulator into many places of a chunk, with Python and without."""

import mmap
import os
import random
from collections.abc import Callable
from typing import Any

from tests.engines.vddk.workers import PLAIN, Worker, configured
from tests.simulator.disks import SECTORS
from tests.simulator.kit import Kit
from vddkfs.engines import protocol
from vddkfs.engines.base import SECTOR, CallCount, EngineReport
from vddkfs.engines.config import VddkImage
from vddkfs.engines.protocol import Op

WITHOUT = "import sys; sys.modules['vddkfs.engines.vddk._reads'] = None"
"""What a worker runs first that is to read with Python."""
SIZES = (1, 7, 8, 8, 8, 8, 64, 128, 300)

Contents = Callable[[str], bytes]


class Reader:
    """A worker and one chunk of memory in it; *places* regions of it are read into."""

    def __init__(self, worker: Worker, number: int = 0, places: int = 32) -> None:
        self.worker = worker
        self.number = number
        self.region = 512 * SECTOR
        size = places * self.region
        fd = os.memfd_create(f"chunk-{number}")
        os.ftruncate(fd, size)
        self.area = mmap.mmap(fd, size)
        worker.call(Op.LEND, fd=fd, chunk=number, count=size)
        os.close(fd)

    def ask(self, sector: int, count: int, place: int = 0, **fields: int) -> int:
        """Ask for a read, and return the id of its answer."""
        offset = place * self.region
        fields |= {"sector": sector, "count": count, "chunk": self.number, "offset": offset}
        self.worker.ask(Op.READ, **fields)
        return self.worker.last_id

    def read(self, sector: int, count: int, **fields: int) -> bytes:
        self.ask(sector, count, **fields)
        self.worker.answer()
        return self.area[: count * SECTOR]

    def whole(self, image: int = 0) -> bytes:
        """Return all of a disk."""
        parts = [
            self.read(sector, min(500, SECTORS - sector), image=image)
            for sector in range(0, SECTORS, 500)
        ]
        return b"".join(parts)

    def packet(self) -> bytes:
        """Return the next answer as it came, without the request's id."""
        packet, _ = protocol.receive(self.worker.sock)
        return packet[:8] + packet[16:]


def report(worker: Worker) -> EngineReport:
    return protocol.decode_report(worker.call(Op.REPORT))


def in_c(worker: Worker) -> int:
    return report(worker).reads_in_c


def read_calls(worker: Worker) -> CallCount:
    [found] = [one for one in report(worker).calls if one.name == "VixDiskLib_ReadAsync"]
    return found


def opened(worker: Worker, kit: Kit, *images: VddkImage, **more: Any) -> Reader:
    worker.open(configured(kit, *(images or (PLAIN,)), **more))
    return Reader(worker)


def random_reads(reader: Reader, disks: list[bytes], total: int, depth: int = 32) -> None:
    """Keep *depth* reads under way, and compare each with what the disk holds."""
    chance = random.Random(1)
    free = list(range(32))
    under_way: dict[int, tuple[int, int, int, int]] = {}
    worker, sent = reader.worker, 0
    while sent < total or under_way:
        while sent < total and len(under_way) < depth:
            image, count = chance.randrange(len(disks)), chance.choice(SIZES)
            sector = chance.randrange(SECTORS - count)
            place = free.pop(chance.randrange(len(free)))
            flags = chance.choice((0, 0, 0, protocol.DIRECT))
            number = reader.ask(sector, count, place, image=image, flags=flags)
            under_way[number] = image, sector, count, place
            sent += 1
        image, sector, count, place = under_way.pop(worker.answered())
        start = place * reader.region
        found = reader.area[start : start + count * SECTOR]
        assert found == disks[image][sector * SECTOR : (sector + count) * SECTOR]
        reader.area[start : start + reader.region] = b"\xee" * reader.region
        free.append(place)
