"""Workers on the simulator that write, and what is asked of them."""

import msgspec

from tests.engines.vddk.workers import BASE, LOCAL, PLAIN, Worker
from tests.simulator.disks import noise
from vddkfs.engines import protocol
from vddkfs.engines.base import SECTOR, EngineReport
from vddkfs.engines.config import VddkImage
from vddkfs.engines.protocol import Op

WRITTEN = msgspec.structs.replace(PLAIN, writable=True)
WRITTEN_BASE = msgspec.structs.replace(BASE, writable=True)
WRITTEN_LOCAL = msgspec.structs.replace(LOCAL, writable=True)
THIN = VddkImage("[ds1] plain/thin.vmdk", live=True, writable=True)

SYNCHRONOUS = """
from vddkfs.engines.vddk.runtime import Runtime
Runtime.asynchronous = property(lambda self: False)
"""
NO_FLUSH = """
from vddkfs.engines.vddk.library import Library
Library.has = lambda self, name, before=Library.has: name != "Flush" and before(self, name)
"""


class Writer(Worker):
    """A worker that writes from byte *at* of its chunk, a place that is the caller's to choose."""

    def begin_write(self, sector: int, data: bytes, at: int = 0) -> int:
        """Ask for a write, do not wait, and return its id."""
        if self._area is None:
            self.read(0, 1)
        assert self._area is not None
        self._area[at : at + len(data)] = data
        self.ask(Op.WRITE, sector=sector, count=len(data) // SECTOR, offset=at)
        return self.last_id

    def write(self, sector: int, data: bytes) -> None:
        """Write *data* there."""
        self.begin_write(sector, data)
        self.answer()

    def write_again(self, sector: int, data: bytes) -> None:
        """Write *data*, which comes with the request."""
        self.call(Op.WRITE_AGAIN, data, sector=sector)

    def flush(self) -> None:
        """Have what was written kept."""
        self.call(Op.FLUSH)

    def report(self) -> EngineReport:
        """Return what the engine has done."""
        return protocol.decode_report(self.call(Op.REPORT))

    def calls(self, name: str) -> int:
        """Return how often a function of the library was called."""
        counts = {one.name: one.count for one in self.report().calls}
        return counts.get(f"VixDiskLib_{name}", 0)


def pieces(seed: object, count: int, size: int = 4096) -> list[bytes]:
    """Return *count* different pieces of noise."""
    return [noise((seed, number), size) for number in range(count)]
