"""How long ``vddkfs invalidate`` takes where there is the most to drop: a full cache, 62 TiB.

What fills the cache is reads of 64 KiB all over the disk, none near another, so that each of them
is an entry of its own.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final

from benchmarks.figures import MIB
from benchmarks.processes import BenchmarkError, end, run
from benchmarks.systems import Served, vddkfs_command
from benchmarks.works import PROBE, Round

_READERS: Final = 4
_FILL_SECONDS: Final = 300.0
_COMMAND_SECONDS: Final = 60.0


def invalidate(this: Round) -> None:
    """Fill the cache and have all of it dropped, while another process reads the status."""
    served = this.served
    note = f"{_fill(served) // MIB} MiB"
    with _reading_status(served) as longest:
        begun = time.perf_counter()
        said = run([vddkfs_command(), "invalidate", served.file, "--json"], _COMMAND_SECONDS)
        seconds = time.perf_counter() - begun
    steps = [step for mount in json.loads(said)["mounts"] for step in mount["steps"]]
    undone = [step for step in steps if not step["done"]]
    if undone:
        raise BenchmarkError(f"not done: {undone[0]['place']}: {undone[0]['told']}")
    dropped = [step["seconds"] for step in steps if step["place"] in ("cache", "tables")]
    if len(dropped) < 2:
        raise BenchmarkError("invalidate says nothing of its steps cache and tables")
    this.add("cache", 1000 * sum(dropped), note)
    this.add("daemon", 1000 * sum(step["seconds"] for step in steps), note)
    this.add("command", 1000 * seconds, note)
    this.add("status", 1000 * longest[0], note)


def _fill(served: Served) -> int:
    """Read until the cache is full, and return what it holds, in bytes."""
    limit: int = served.status()["cache"]["limit"]
    run(
        [
            *("fio", "--name=fill", f"--filename={served.file}", "--readonly", "--thread"),
            *("--rw=randread", "--bs=64k", "--ioengine=psync", "--fadvise_hint=random"),
            # A map of what was read would take memory for all of the disk.
            *("--norandommap", "--random_generator=tausworthe64", "--allow_file_create=0"),
            *(f"--numjobs={_READERS}", f"--io_size={limit // _READERS * 11 // 10}"),
        ],
        timeout=_FILL_SECONDS,
    )
    cache = served.status()["cache"]
    if cache["size"] < limit or not cache["evictions"]:
        raise BenchmarkError(f"the cache is not full: {cache['size']} of {limit} bytes")
    return limit


@contextlib.contextmanager
def _reading_status(served: Served) -> Iterator[list[float]]:
    """Have status.json read all the time; the longest of its seconds is there in the end."""
    status = served.mount / ".vddkfs" / "status.json"
    words = [sys.executable, "-P", str(PROBE), "longest", str(status)]
    longest: list[float] = []
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield longest
            said, _ = process.communicate("\n", timeout=_COMMAND_SECONDS)
            if process.returncode:
                raise BenchmarkError("status.json cannot be read")
            longest.append(float(said))
        except subprocess.TimeoutExpired:
            raise BenchmarkError("status.json is not answered") from None
        finally:
            end([process.pid], patience=0.1)
