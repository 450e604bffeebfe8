"""Workers on the simulator that write, and what is asked of them."""

import msgspec

from tests.engines.vddk.workers import BASE, LOCAL, PLAIN, Worker
from tests.simulator.disks import noise
from tests.simulator.kit import Kit
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

_SERVES = """
from vddkfs.engines import protocol as _protocol, worker as _worker

def _call(self, packet, fd, before=_worker.Worker._call):
    op, _, _, count, number, sector, chunk, offset = _protocol.REQUEST.unpack_from(packet)

    def done(error):
        if error is None:
            self._reply(op, 0, number)
        else:
            self._fail(op, number, error)

    if op == _protocol.Op.WRITE:
        area = self._chunks[chunk][1][offset : offset + 512 * count]
        self._engine.start_write(sector, area, done)
    elif op == _protocol.Op.WRITE_AGAIN:
        body = _protocol.body_of(packet, _protocol.REQUEST.size, fd)
        self._engine.start_write(sector, memoryview(body), done)
    elif op == _protocol.Op.FLUSH:
        self._engine.start_flush(done)
    else:
        before(self, packet, fd)

_worker.Worker._call = _call
"""
"""The engine's two calls behind the protocol's, whatever else the worker does with those."""


class Writer(Worker):
    """A worker that writes from byte *at* of its chunk, a place that is the caller's to choose."""

    def __init__(self, kit: Kit, patch: str = "") -> None:
        super().__init__(kit, _SERVES + patch)

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
