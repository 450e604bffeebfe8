"""The one module that speaks to C: a loaded libvixDiskLib as typed functions, through cffi.

cffi's values are of type Any; they come no further than this module, where pointers leave as the
opaque ``Pointer``. The structures are those of the library's release (layouts.py).

A string given to a call is kept alive for the length of the call, and those of connection
parameters for as long as the parameters. The callbacks given to the library are never freed,
because a thread of the library may be on its way into one at any time; for the same reason a
process that initialised the library should end with os._exit, not by tearing Python down.

cffi releases the GIL in every call, and takes it in every callback, so callbacks may come inside a
call as well as on threads of the library.
"""

import time
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from cffi import FFI

from vddkfs.engines.vddk import layouts
from vddkfs.engines.vddk.calls import BY_NAME, CALLS, PREFIX, Ledger
from vddkfs.engines.vddk.codes import code_of
from vddkfs.engines.vddk.completions import Completions
from vddkfs.engines.vddk.kit import Kit
from vddkfs.engines.vddk.layouts import ADAPTERS, Release
from vddkfs.engines.vddk.messages import Messages
from vddkfs.engines.vddk.params import ParamsFields
from vddkfs.errors import EngineError

Pointer: TypeAlias = "FFI.CData"
"""A pointer of the library's, or a buffer for it: nothing outside of this module looks inside."""

_FOREVER: Final[list[object]] = []
"""Callbacks: the library may call them as long as the process lives."""

_LINE_BYTES: Final = 4096
_LONGEST_LINE: Final = 1 << 20
_BUFFER_TOO_SMALL: Final = 24
_VA_LIST_BYTES: Final = 24
"""Size of what a va_list points to on x86-64."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """A disk's geometry, of its BIOS or of the device."""

    cylinders: int
    heads: int
    sectors: int


@dataclass(frozen=True, slots=True)
class DiskInfo:
    """What GetInfo tells of an open disk. *capacity* is in sectors, *links* counts the chain.

    The sector sizes are in bytes, and None for releases before 7.0, which do not tell them.
    *adapter* is "" where it is unknown.
    """

    capacity: int
    links: int
    adapter: str
    bios_geometry: Geometry
    physical_geometry: Geometry
    parent_hint: str
    uuid: str
    logical_sector_bytes: int | None
    physical_sector_bytes: int | None


@dataclass(slots=True)
class Params:
    """Connection parameters in C, with what they point to. *lent* ones are the library's memory."""

    pointer: Pointer
    keep: list[Pointer]
    lent: bool


def declare(release: Release) -> FFI:
    """Return a cffi FFI with all types and functions as the library of *release* has them."""
    ffi = FFI()
    ffi.cdef(layouts.structures(release) + "\n".join(call.declaration for call in CALLS))
    return ffi


class Native:
    """A library that loader.load has loaded.

    ``call`` may be used from any thread; which thread may make which call is the caller's affair.
    """

    def __init__(
        self, kit: Kit, ledger: Ledger, completions: Completions, messages: Messages
    ) -> None:
        """Find every function. Raises EngineError naming the required ones that are missing."""
        self._ffi = declare(kit.release)
        self._ledger = ledger
        self._completions = completions
        self._messages = messages
        self._sector_sizes = layouts.has_sector_sizes(kit.release)
        self._libc: Any = self._ffi.dlopen(None)
        library: Any = self._ffi.dlopen(str(kit.library))
        self._functions: dict[str, Any] = {}
        for call in CALLS:
            try:
                self._functions[call.name] = getattr(library, call.name)
            except AttributeError:
                self._functions[call.name] = None
        lacking = [c.name for c in CALLS if c.required and self._functions[c.name] is None]
        if lacking:
            raise EngineError(
                f"{kit.library} is not a complete VDDK library: it has no {', '.join(lacking)}",
                advice="install the kit again, and check that libdir= names it",
            )
        self.null: Final = self._ffi.NULL
        self._log = self._log_function("info")
        self._warn = self._log_function("warning")
        self._panic = self._log_function("critical")
        self._done = self._completion_function()
        _FOREVER.extend((self._log, self._warn, self._panic, self._done))

    def has(self, name: str) -> bool:
        """Whether the library has the function *name* (without prefix)."""
        return self._functions[PREFIX + name] is not None

    def call(self, name: str, *arguments: object, moved: int = 0) -> int:
        """Call a function that returns a VixError, and return its code; None is NULL.

        *name* is without prefix, *moved* what a success moves in bytes, for the statistics.
        """
        result = code_of(self._call(name, arguments, moved))
        return 0 if result == layouts.VIX_ASYNC else result

    def _call(self, name: str, arguments: tuple[object, ...], moved: int = 0) -> Any:
        name = PREFIX + name
        began = time.perf_counter()
        result = self._functions[name](*self._plain(arguments))
        code = code_of(result) if BY_NAME[name].gives_code else 0
        self._ledger.record(name, began, 0 if code else moved, code)
        return result

    def _plain(self, arguments: tuple[object, ...]) -> list[object]:
        return [
            self.null if one is None else encoded(one) if isinstance(one, str) else one
            for one in arguments
        ]

    # Setting up.

    def init(self, major: int, minor: int, libdir: str, configuration: str | None) -> int:
        """Call InitEx with our log functions."""
        log = (self._log, self._warn, self._panic)
        return self.call("InitEx", major, minor, *log, libdir, configuration)

    def exit(self) -> None:
        """Call Exit."""
        self._call("Exit", ())

    def transport_modes(self) -> str:
        """Return what ListTransportModes says."""
        return self._text(self._call("ListTransportModes", ())) or ""

    def error_text(self, code: int) -> str:
        """Return what GetErrorText says of *code*, or ""."""
        text = self._call("GetErrorText", (code, None))
        said = self._text(text) or ""
        if text:
            self._call("FreeErrorText", (text,))
        return said

    # Connections.

    def make_params(self, fields: ParamsFields) -> Params:
        """Return connection parameters with *fields*. Free them with free_params."""
        lent = self.has("AllocateConnectParams")
        keep: list[Pointer] = []
        params: Any
        if lent:
            params = self._call("AllocateConnectParams", ())
            if not params:
                raise EngineError("the VDDK library has no memory for connection parameters")
        else:
            area = self._ffi.new("char[]", layouts.CONNECT_PARAMS_BYTES)
            keep.append(area)
            params = self._ffi.cast("VixDiskLibConnectParams *", area)

        def held(text: str | None) -> Any:
            if text is None:
                return self.null
            keep.append(self._ffi.new("char[]", encoded(text)))
            return keep[-1]

        params.vmxSpec = held(fields.vmx_spec)
        params.serverName = held(fields.server)
        params.thumbPrint = held(fields.thumbprint)
        params.port = fields.port
        params.nfcHostPort = fields.nfc_port
        if fields.credential_type:
            params.credType = fields.credential_type
        if fields.credential_type == layouts.CredentialType.UID:
            params.creds.uid.userName = held(fields.user)
            params.creds.uid.password = held(fields.password)
        elif fields.credential_type == layouts.CredentialType.SESSION_ID:
            params.creds.sessionId.cookie = held(fields.cookie)
            params.creds.sessionId.userName = held(fields.user)
            params.creds.sessionId.key = held(fields.password)
        return Params(params, keep, lent)

    def free_params(self, params: Params) -> None:
        """Give *params* back; what the library allocated goes back to it, and nothing else."""
        pointer: Any = params.pointer
        if params.lent:
            # Our strings are not the library's to free.
            pointer.vmxSpec = pointer.serverName = pointer.thumbPrint = self.null
            session = pointer.creds.sessionId
            session.cookie = session.userName = session.key = self.null
            if self.has("FreeConnectParams"):
                self._call("FreeConnectParams", (pointer,))
        params.keep.clear()

    def connect(
        self, params: Params, read_only: bool, snapshot: str | None, transports: str | None
    ) -> tuple[int, Pointer]:
        """Call ConnectEx; return its code and the connection."""
        out: Any = self._ffi.new("VixDiskLibConnection *")
        code = self.call("ConnectEx", params.pointer, read_only, snapshot, transports, out)
        return code, out[0]

    def cleanup(self, params: Params) -> tuple[int, int, int]:
        """Call Cleanup; return its code, and how many disks were cleaned up and remain."""
        cleaned: Any = self._ffi.new("uint32 *")
        remaining: Any = self._ffi.new("uint32 *")
        code = self.call("Cleanup", params.pointer, cleaned, remaining)
        return code, int(cleaned[0]), int(remaining[0])

    # Disks.

    def open(self, connection: Pointer, path: str, flags: int) -> tuple[int, Pointer]:
        """Call Open; return its code and the handle."""
        out: Any = self._ffi.new("VixDiskLibHandle *")
        code = self.call("Open", connection, path, flags, out)
        return code, out[0]

    def info(self, handle: Pointer) -> tuple[int, DiskInfo | None]:
        """Call GetInfo; return its code and a copy of what it gave."""
        out: Any = self._ffi.new("VixDiskLibInfo **")
        code = self.call("GetInfo", handle, out)
        if code or not out[0]:
            return code, None
        told = out[0]
        info = DiskInfo(
            capacity=told.capacity,
            links=told.numLinks,
            adapter=ADAPTERS.get(told.adapterType, ""),
            bios_geometry=_geometry(told.biosGeo),
            physical_geometry=_geometry(told.physGeo),
            parent_hint=self._text(told.parentFileNameHint) or "",
            uuid=self._text(told.uuid) or "",
            logical_sector_bytes=told.logicalSectorSize if self._sector_sizes else None,
            physical_sector_bytes=told.physicalSectorSize if self._sector_sizes else None,
        )
        self._call("FreeInfo", (told,))
        return code, info

    def transport_mode(self, handle: Pointer) -> str:
        """Return what GetTransportMode says, "" if nothing."""
        return self._text(self._call("GetTransportMode", (handle,))) or ""

    def metadata(self, name: str, *arguments: object, limit: int) -> tuple[int, bytes]:
        """Call GetMetadataKeys or ReadMetadata: first for the size, at most *limit* bytes."""
        needed: Any = self._ffi.new("size_t *")
        code = self.call(name, *arguments, None, 0, needed)
        size = min(int(needed[0]), limit)
        if code not in (0, _BUFFER_TOO_SMALL) or not size:
            return code, b""
        area: Any = self._ffi.new("char[]", size)
        code = self.call(name, *arguments, area, size, needed)
        return code, bytes(self._ffi.buffer(area)) if code == 0 else b""

    def allocated(
        self, handle: Pointer, start: int, count: int, chunk: int
    ) -> tuple[int, list[tuple[int, int]]]:
        """Call QueryAllocatedBlocks; return its code and the blocks (offset, length), in sectors.

        Raises EngineError for more blocks than there are chunks: such a list is not believed.
        """
        out: Any = self._ffi.new("VixDiskLibBlockList **")
        code = self.call("QueryAllocatedBlocks", handle, start, count, chunk, out)
        told = out[0]
        if code or not told:
            return code, []
        number = told.numBlocks
        plausible = number <= count // chunk
        numbers: Any = []
        if plausible and number:
            numbers = self._ffi.unpack(self._ffi.cast("uint64 *", told.blocks), 2 * number)
        if self.has("FreeBlockList"):
            self.call("FreeBlockList", told)
        if not plausible:
            raise EngineError(f"VDDK told of {number} allocated blocks in {count // chunk} chunks")
        return code, list(zip(numbers[::2], numbers[1::2], strict=True))

    # Buffers and asynchronous calls.

    def buffer(self, memory: memoryview, writable: bool) -> Pointer:
        """Return *memory* for the library; it cannot be unmapped or resized until ``release``."""
        if writable:
            return self._ffi.from_buffer("uint8[]", memory, require_writable=True)
        return self._ffi.from_buffer("uint8[]", memory, require_writable=False)

    def address(self, buffer: Pointer) -> int:
        """Return the address of *buffer*, or of what a handle points to, in memory."""
        return int(self._ffi.cast("uintptr_t", buffer))

    def address_of(self, name: str) -> int:
        """Return the address of the function *name* (without prefix), which the library has."""
        return int(self._ffi.cast("uintptr_t", self._functions[PREFIX + name]))

    def release(self, buffer: Pointer) -> None:
        """Let go of the memory of *buffer*."""
        self._ffi.release(buffer)

    def begin(
        self, name: str, handle: Pointer, start: int, count: int, buffer: Pointer, key: int
    ) -> int:
        """Call ReadAsync or WriteAsync for request *key*; return the code, VIX_ASYNC included.

        The completion may come before this returns.
        """
        data = self._ffi.cast("void *", key)
        return code_of(
            self._functions[PREFIX + name](handle, start, count, buffer, self._done, data)
        )

    # Callbacks.

    def _completion_function(self) -> object:
        ffi, finish = self._ffi, self._completions.finish

        def done(data: Any, result: int) -> None:
            finish(int(ffi.cast("uintptr_t", data)), code_of(result))

        return ffi.callback("void(void *, VixError)", done, onerror=self._swallow)

    def _log_function(self, level: str) -> object:
        hear = self._messages.hear

        def log(form: Any, arguments: Any) -> None:
            hear(level, self._formatted(form, arguments))

        return self._ffi.callback("void(const char *, void *)", log, onerror=self._swallow)

    def _formatted(self, form: Any, arguments: Any) -> str:
        """Return what printf would print. *arguments* is a va_list: it can be walked once only."""
        if not form:
            return ""
        text: Any = form
        if b"%" in self._ffi.string(form) and arguments:
            walked = self._ffi.new("char[]", _VA_LIST_BYTES)
            self._ffi.memmove(walked, arguments, _VA_LIST_BYTES)
            text = self._ffi.new("char[]", _LINE_BYTES)
            length = self._libc.vsnprintf(text, _LINE_BYTES, form, walked)
            if length >= _LINE_BYTES:
                size = min(length + 1, _LONGEST_LINE)
                text = self._ffi.new("char[]", size)
                length = self._libc.vsnprintf(text, size, form, arguments)
            if length < 0:
                text = form
        return self._text(text) or ""

    def _swallow(self, error: Exception, value: object, traceback: object) -> None:
        self._messages.complain(f"a callback of VDDK failed: {error!r}")

    def _text(self, pointer: Any) -> str | None:
        if not pointer:
            return None
        text: Any = self._ffi.string(pointer)
        return str(text, errors="backslashreplace")


def _geometry(told: Any) -> Geometry:
    return Geometry(told.cylinders, told.heads, told.sectors)


def encoded(text: str) -> bytes:
    """Return *text* as the library takes it. Raises ValueError if it has a NUL inside."""
    raw = text.encode(errors="surrogateescape")
    if b"\0" in raw:
        raise ValueError("a text for VDDK holds a NUL character")
    return raw
