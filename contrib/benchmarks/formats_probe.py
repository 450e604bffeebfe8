"""What the built-in engine takes by itself, in a process of its own. Prints JSON.

    formats_probe.py describe LEAF          seconds to describe a chain, as the daemon does
    formats_probe.py open LEAF              seconds to open a disk of one link, as the worker does
    formats_probe.py reads LEAF COUNT       microseconds of a 4 KiB read at a random place

The first two tell the most memory that the process had, too. The tables are warm for "reads": 4 KiB
of every 64 were read before.
"""

import json
import random
import sys
import time
from pathlib import Path

from vddkfs.engines.vmdk import VmdkEngine, describe_chain

_BLOCK = 8
_STEP = 128
"""Both in sectors."""


def peak() -> int:
    """Return the most bytes of memory that this process had; rusage has those of its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def describing(leaf: str) -> dict[str, float]:
    """Describe the chain that ends with *leaf*."""
    begun = time.perf_counter()
    links = describe_chain(leaf)
    return {"seconds": time.perf_counter() - begun, "bytes": peak(), "links": len(links)}


def opening(leaf: str) -> dict[str, float]:
    """Open *leaf*; then see how long the first read in its last table takes."""
    begun = time.perf_counter()
    engine = VmdkEngine([leaf])
    opened = time.perf_counter()
    sector = engine.identities()[0].capacity - _BLOCK
    engine.read(0, sector, _BLOCK, memoryview(bytearray(_BLOCK * 512)), False)
    return {
        "seconds": opened - begun,
        "read_seconds": time.perf_counter() - opened,
        "bytes": peak(),
    }


def reads(leaf: str, count: int) -> dict[str, float]:
    """Read *count* blocks of the chain that ends with *leaf*, as a worker does."""
    paths = [link.path for link in describe_chain(leaf)]
    engine = VmdkEngine(paths)
    image = len(paths) - 1
    capacity = engine.identities()[image].capacity
    buffer = memoryview(bytearray(_BLOCK * 512))
    for sector in range(0, capacity, _STEP):
        engine.read(image, sector, _BLOCK, buffer, False)
    dice = random.Random(2)
    sectors = [dice.randrange(capacity // _BLOCK) * _BLOCK for _ in range(count)]
    begun = time.perf_counter()
    for sector in sectors:
        if not engine.read_nowait(image, sector, _BLOCK, buffer, False):
            engine.read(image, sector, _BLOCK, buffer, False)
    return {"microseconds": (time.perf_counter() - begun) / count * 1e6}


if __name__ == "__main__":
    if sys.argv[1] == "describe":
        found = describing(sys.argv[2])
    elif sys.argv[1] == "open":
        found = opening(sys.argv[2])
    else:
        found = reads(sys.argv[2], int(sys.argv[3]))
    print(json.dumps(found))
