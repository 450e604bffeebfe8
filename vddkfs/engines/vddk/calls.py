"""The functions of libvixDiskLib: one table, from which they are declared, loaded and counted.

The table follows the vendor's programming guides and what is public about later releases.
``VixDiskLib_Init`` and ``VixDiskLib_Connect`` are superseded by their Ex forms; they are in the
table so that it is complete, and are never called.

*required* marks what reading a disk cannot do without and what every supported release (6.5 and
newer) has: a library that lacks one is refused by name. All others may be missing.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from vddkfs.engines.histogram import Histogram, merged

PREFIX: Final = "VixDiskLib_"


@dataclass(frozen=True, slots=True)
class Call:
    """One function: *since* is the VDDK release that first had it in this form."""

    name: str
    returns: str
    parameters: str
    required: bool = False
    since: tuple[int, int] = (1, 0)

    @property
    def gives_code(self) -> bool:
        """Whether it returns a VixError."""
        return self.returns == "VixError"

    @property
    def declaration(self) -> str:
        """The C declaration, for cffi."""
        return f"{self.returns} {self.name}({self.parameters});"


def _call(
    name: str,
    parameters: str,
    *,
    returns: str = "VixError",
    required: bool = False,
    since: tuple[int, int] = (1, 0),
) -> Call:
    return Call(PREFIX + name, returns, parameters, required, since)


_LOGS = "VixDiskLibGenericLogFunc *log, VixDiskLibGenericLogFunc *warn, "
_LOGS += "VixDiskLibGenericLogFunc *panic"
_VERSION = "uint32 majorVersion, uint32 minorVersion"
_CONNECT = "const VixDiskLibConnectParams *params"
_SPAN = "VixDiskLibHandle handle, VixDiskLibSectorType start, VixDiskLibSectorType count"
_DONE = "VixDiskLibCompletionCB callback, void *data"
_PROGRESS = "VixDiskLibProgressFunc progress, void *data"

CALLS: Final[tuple[Call, ...]] = (
    _call("InitEx", f"{_VERSION}, {_LOGS}, const char *libDir, const char *file", required=True),
    _call("Init", f"{_VERSION}, {_LOGS}, const char *libDir"),
    _call("Exit", "void", returns="void", required=True),
    _call("ListTransportModes", "void", returns="const char *", required=True),
    _call("Cleanup", f"{_CONNECT}, uint32 *cleaned, uint32 *remaining"),
    _call("Connect", f"{_CONNECT}, VixDiskLibConnection *connection"),
    _call(
        "ConnectEx",
        f"{_CONNECT}, Bool readOnly, const char *snapshotRef, const char *transportModes, "
        "VixDiskLibConnection *connection",
        required=True,
        since=(1, 1),
    ),
    _call("Disconnect", "VixDiskLibConnection connection", required=True),
    _call("PrepareForAccess", f"{_CONNECT}, const char *identity", since=(5, 0)),
    _call("EndAccess", f"{_CONNECT}, const char *identity", since=(5, 0)),
    _call(
        "Open",
        "VixDiskLibConnection connection, const char *path, uint32 flags, VixDiskLibHandle *handle",
        required=True,
    ),
    _call("Close", "VixDiskLibHandle handle", required=True),
    _call("GetInfo", "VixDiskLibHandle handle, VixDiskLibInfo **info", required=True),
    _call("FreeInfo", "VixDiskLibInfo *info", returns="void", required=True),
    _call("GetTransportMode", "VixDiskLibHandle handle", returns="const char *", required=True),
    _call("Read", f"{_SPAN}, uint8 *buffer", required=True),
    _call("Write", f"{_SPAN}, const uint8 *buffer"),
    _call("ReadAsync", f"{_SPAN}, uint8 *buffer, {_DONE}", since=(6, 5)),
    _call("WriteAsync", f"{_SPAN}, const uint8 *buffer, {_DONE}", since=(6, 5)),
    _call("Wait", "VixDiskLibHandle handle", since=(6, 5)),
    _call("Flush", "VixDiskLibHandle handle", since=(6, 0)),
    _call(
        "QueryAllocatedBlocks",
        f"{_SPAN}, VixDiskLibSectorType chunk, VixDiskLibBlockList **list",
        since=(6, 7),
    ),
    _call("FreeBlockList", "VixDiskLibBlockList *list", since=(6, 7)),
    _call("AllocateConnectParams", "void", returns="VixDiskLibConnectParams *", since=(6, 7)),
    _call(
        "GetConnectParams",
        "VixDiskLibConnection connection, VixDiskLibConnectParams **params",
    ),
    _call("FreeConnectParams", "VixDiskLibConnectParams *params", returns="void"),
    _call(
        "ReadMetadata",
        "VixDiskLibHandle handle, const char *key, char *buffer, size_t length, size_t *needed",
    ),
    _call("GetMetadataKeys", "VixDiskLibHandle handle, char *keys, size_t length, size_t *needed"),
    _call("WriteMetadata", "VixDiskLibHandle handle, const char *key, const char *value"),
    _call(
        "Create",
        "VixDiskLibConnection connection, const char *path, "
        f"const VixDiskLibCreateParams *params, {_PROGRESS}",
    ),
    _call("CreateChild", f"VixDiskLibHandle handle, const char *path, int diskType, {_PROGRESS}"),
    _call("Unlink", "VixDiskLibConnection connection, const char *path"),
    _call(
        "Grow",
        "VixDiskLibConnection connection, const char *path, VixDiskLibSectorType capacity, "
        f"Bool updateGeometry, {_PROGRESS}",
    ),
    _call("Shrink", f"VixDiskLibHandle handle, {_PROGRESS}"),
    _call("Defragment", f"VixDiskLibHandle handle, {_PROGRESS}"),
    _call("Rename", "const char *source, const char *target"),
    _call(
        "Clone",
        "VixDiskLibConnection targetConnection, const char *target, "
        "VixDiskLibConnection sourceConnection, const char *source, "
        f"const VixDiskLibCreateParams *params, {_PROGRESS}, Bool overWrite",
    ),
    _call("Attach", "VixDiskLibHandle parent, VixDiskLibHandle child"),
    _call("IsAttachPossible", "VixDiskLibHandle parent, VixDiskLibHandle child"),
    _call("SpaceNeededForClone", "VixDiskLibHandle handle, int diskType, uint64 *bytes"),
    _call("CheckRepair", "VixDiskLibConnection connection, const char *file, Bool repair"),
    _call("GetErrorText", "VixError error, const char *locale", returns="char *", required=True),
    _call("FreeErrorText", "char *text", returns="void", required=True),
)

BY_NAME: Final[dict[str, Call]] = {call.name: call for call in CALLS}

SESSION_CALLS: Final[frozenset[str]] = frozenset(
    PREFIX + name
    for name in (
        "InitEx",
        "Exit",
        "ConnectEx",
        "Disconnect",
        "Open",
        "Close",
        "Cleanup",
        "PrepareForAccess",
        "EndAccess",
    )
)
"""Calls that one designated thread makes: the one that made InitEx (vendor guide; K22)."""


@dataclass(slots=True)
class CallStatistics:
    """What one function did: *times* has all its calls, *bytes* is what reads and writes moved.
    An asynchronous call counts when it is complete, with the time since it was issued.
    """

    failures: int = 0
    bytes: int = 0
    times: Histogram = field(default_factory=Histogram)

    @property
    def count(self) -> int:
        """How often it was called."""
        return self.times.count

    @property
    def seconds(self) -> float:
        """The sum over all calls."""
        return self.times.seconds

    def copy(self) -> "CallStatistics":
        """Return the figures of now."""
        return replace(self, times=Histogram(self.times.buckets, self.times.seconds))

    def plus(self, other: "CallStatistics") -> "CallStatistics":
        """Return the figures of both."""
        return CallStatistics(
            self.failures + other.failures,
            self.bytes + other.bytes,
            merged((self.times, other.times)),
        )


Trace = Callable[[str, float, int, int], None]
"""Called after each call: name, seconds, bytes moved, result (a VixError code, 0 where none).

It is called on whatever thread the call or its completion was on, and must not call VDDK.
"""


class Ledger:
    """Counts calls, and tells each to the *trace* hook. Safe for any thread.

    *elsewhere* tells of calls that are counted elsewhere, and are not traced.
    """

    def __init__(self, trace: Trace | None = None) -> None:
        self.trace = trace
        self.elsewhere: Callable[[], dict[str, CallStatistics]] = dict
        self._lock = threading.Lock()
        self._calls: dict[str, CallStatistics] = {}

    def record(self, name: str, began: float, moved: int, result: int) -> None:
        """Count one call that *began* at that time.perf_counter()."""
        seconds = time.perf_counter() - began
        with self._lock:
            entry = self._calls.get(name)
            if entry is None:
                entry = self._calls[name] = CallStatistics()
            entry.times.observe(seconds)
            entry.failures += result != 0
            entry.bytes += moved
        if self.trace is not None:
            self.trace(name, seconds, moved, result)

    def snapshot(self) -> dict[str, CallStatistics]:
        """Return a copy of the figures, by function."""
        with self._lock:
            found = {name: entry.copy() for name, entry in self._calls.items()}
        for name, more in self.elsewhere().items():
            found[name] = found[name].plus(more) if name in found else more
        return found
