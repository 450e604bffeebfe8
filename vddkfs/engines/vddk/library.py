"""libvixDiskLib, loaded and initialised: what concerns the library as a whole.

Threads: a process makes one Library and initialises it once, on its main thread, before it starts
the threads that will call VDDK, and after any fork. InitEx, Exit, Cleanup, PrepareForAccess,
EndAccess and all of connections and opening are for that thread alone, which is checked (K22).
Reading and writing is for any thread, one at a time for each handle.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

from vddkfs.engines.vddk import codes, loader
from vddkfs.engines.vddk.calls import PREFIX, CallStatistics, Ledger, Trace
from vddkfs.engines.vddk.codes import VixFailure
from vddkfs.engines.vddk.completions import Completions
from vddkfs.engines.vddk.kit import Kit
from vddkfs.engines.vddk.layouts import MAX_IDENTITY
from vddkfs.engines.vddk.messages import LogSink, Messages
from vddkfs.engines.vddk.native import Native
from vddkfs.engines.vddk.params import ConnectSpec
from vddkfs.errors import EngineError

_VERSIONS = ((8, 0), (7, 0), (6, 7), (6, 5), (6, 0))
"""What programs in the field pass to InitEx. Newer libraries took older numbers so far."""


class Cleaned(NamedTuple):
    """What VixDiskLib_Cleanup did: hot-added disks removed, and still there."""

    cleaned: int
    remaining: int


class Library:
    """See the module. *kit* comes from ``kit.find_kit``; *log* and *trace* from whoever listens.
    *clean* takes secrets out of the library's own texts for errors.

    Making one loads the library, and raises EngineError, naming what is missing, if that fails.
    """

    def __init__(
        self,
        kit: Kit,
        *,
        log: LogSink | None = None,
        trace: Trace | None = None,
        clean: Callable[[str], str] | None = None,
    ) -> None:
        self.kit = kit
        self._clean = clean
        self.messages = Messages(log)
        self.ledger = Ledger(trace)
        self.completions = Completions(self.ledger, self.messages.complain)
        self.loaded = loader.load(kit)
        self.native = Native(kit, self.ledger, self.completions, self.messages)
        self.version: tuple[int, int] | None = None
        """The version that InitEx accepted."""
        self._thread = 0

    @property
    def build(self) -> str:
        """The build number that the library logged, "" before InitEx (K15)."""
        return self.messages.build

    def has(self, name: str) -> bool:
        """Whether the library has the function *name*, such as ``ReadAsync``."""
        return self.native.has(name)

    def require(self, name: str) -> None:
        """Raise EngineError unless the library has the function *name*."""
        if not self.has(name):
            raise EngineError(
                f"VDDK {self.kit.release_text} has no {PREFIX}{name}",
                advice="a newer release of VDDK has it",
            )

    def session_thread(self) -> None:
        """Raise RuntimeError unless this is the thread that initialised the library."""
        if self._thread != threading.get_ident():
            raise RuntimeError("this VDDK call belongs to the thread that initialised the library")

    def init(self, configuration: str | None = None) -> None:
        """Initialise; *configuration* is the path of a configuration file.

        Tries the version of the release, then older ones. Raises VixFailure for the last try, with
        all of them in its cause.
        """
        if threading.current_thread() is not threading.main_thread() or self.version:
            raise RuntimeError("VDDK is initialised once, on the main thread")
        tries: list[str] = []
        code = 0
        for major, minor in self._versions():
            code = self.native.init(major, minor, str(self.kit.libdir), configuration)
            if code == 0:
                self._thread = threading.get_ident()
                self.version = (major, minor)
                return
            tries.append(f"{major}.{minor} gave {code}")
        failure = self.failure(code, "InitEx", f"VDDK {self.kit.release_text} in {self.kit.libdir}")
        failure.cause += f" (tried {', '.join(tries)})"
        raise failure

    def _versions(self) -> list[tuple[int, int]]:
        major, minor = (*self.kit.release, 0)[:2]
        return [(major, minor), *(one for one in _VERSIONS if one < (major, minor))]

    def exit(self) -> None:
        """End the use of the library, when everything is closed. It may take a second."""
        self.session_thread()
        self.native.exit()
        self._thread = 0

    def transports(self) -> tuple[str, ...]:
        """Return the transports that the library offers, in its own order (K08)."""
        return tuple(mode for mode in self.native.transport_modes().split(":") if mode)

    def error_text(self, code: int) -> str:
        """Return the library's own text for *code*, or ""."""
        text = self.native.error_text(code)
        return self._clean(text) if self._clean is not None else text

    def failure(self, code: int, call: str, about: str = "") -> VixFailure:
        """Return the error for *code*, the result of *call* (without prefix) on *about*."""
        return codes.error_from(
            code,
            PREFIX + call,
            self.error_text(code),
            about=about,
            refused=self.messages.refused_lately,
        )

    def check(self, code: int, call: str, about: str = "") -> None:
        """Raise the error for *code*, unless it is 0."""
        if code:
            raise self.failure(code, call, about)

    def cleanup(self, spec: ConnectSpec) -> Cleaned:
        """Remove hot-added disks that dead processes left on this machine (K24).

        To be called after Disconnect, with the same tmpDirectory as theirs.
        """
        self.session_thread()
        self.require("Cleanup")
        params = self.native.make_params(spec.fields(with_vm=False))
        try:
            code, cleaned, remaining = self.native.cleanup(params)
            self.check(code, "Cleanup", spec.subject)
        finally:
            self.native.free_params(params)
        return Cleaned(cleaned, remaining)

    def prepare_access(self, spec: ConnectSpec, identity: str) -> None:
        """Keep vCenter from moving the VM; to be called before its snapshot is made."""
        self._access("PrepareForAccess", spec, identity)

    def end_access(self, spec: ConnectSpec, identity: str) -> None:
        """Undo prepare_access, also that of a process that died."""
        self._access("EndAccess", spec, identity)

    def _access(self, call: str, spec: ConnectSpec, identity: str) -> None:
        self.session_thread()
        self.require(call)
        if not 0 < len(identity.encode()) <= MAX_IDENTITY:
            raise ValueError(f"an identity has 1 to {MAX_IDENTITY} characters")
        params = self.native.make_params(spec.fields())
        try:
            self.check(self.native.call(call, params.pointer, identity), call, spec.vmx_spec)
        finally:
            self.native.free_params(params)

    def statistics(self) -> dict[str, CallStatistics]:
        """Return what each function did so far, by its full name."""
        return self.ledger.snapshot()
