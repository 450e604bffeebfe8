"""A connection to a server, or to this machine's files. For the session thread only."""

from types import TracebackType

from vddkfs.engines.vddk.layouts import OpenFlag
from vddkfs.engines.vddk.library import Library
from vddkfs.engines.vddk.native import Params, Pointer
from vddkfs.engines.vddk.params import ConnectSpec


class Connection:
    """Connects when made. Raises VixFailure.

    ConnectEx only logs in: a wrong thumbprint, a closed port 902 or a missing disk show in Open. A
    connection made with ``read_only`` opens every disk read-only, whatever the flags.
    """

    def __init__(self, library: Library, spec: ConnectSpec) -> None:
        library.session_thread()
        self.library = library
        self.spec = spec
        self._params: Params | None = library.native.make_params(spec.fields())
        self._pointer: Pointer | None = None
        try:
            code, pointer = library.native.connect(
                self._params,
                spec.read_only,
                spec.snapshot or None,
                ":".join(spec.transports) or None,
            )
            library.check(code, "ConnectEx", spec.subject)
        except BaseException:
            self._free()
            raise
        self._pointer = pointer

    def __enter__(self) -> "Connection":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.disconnect()

    def open_raw(self, path: str, flags: OpenFlag) -> Pointer:
        """Open the disk *path*, and return the library's handle; Handle wraps it."""
        self.library.session_thread()
        if self._pointer is None:
            raise ValueError("the connection is closed")
        code, handle = self.library.native.open(self._pointer, path, int(flags))
        self.library.check(code, "Open", path)
        return handle

    def disconnect(self) -> None:
        """Disconnect, when all handles are closed; once more does nothing. Raises VixFailure."""
        self.library.session_thread()
        pointer, self._pointer = self._pointer, None
        if pointer is None:
            return
        try:
            code = self.library.native.call("Disconnect", pointer)
            self.library.check(code, "Disconnect", self.spec.subject)
        finally:
            self._free()

    def _free(self) -> None:
        params, self._params = self._params, None
        if params is not None:
            self.library.native.free_params(params)
