"""What the images of one worker share: the library, its folder, its output, its sessions.

Made once, on the worker's main thread. The folder (tmpDirectory) is the worker's alone, and its
successor's: what it holds when a worker begins was left by one that ended badly. If disks may have
been hot-added then, they are cleaned up first, under the VM's lock (K24).
"""

import collections
import contextlib
import dataclasses
import logging
import os
import select
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from vddkfs.engines.config import VddkConfig, VddkImage
from vddkfs.engines.output import WorkerOutput
from vddkfs.engines.vddk import configuration
from vddkfs.engines.vddk.codes import VixFailure
from vddkfs.engines.vddk.kit import find_kit
from vddkfs.engines.vddk.library import Library
from vddkfs.engines.vddk.messages import LEVELS
from vddkfs.engines.vddk.params import ConnectSpec, SessionCookie, UserPassword
from vddkfs.engines.vddk.secrets import Credentials, leave_no_core, read_credentials
from vddkfs.engines.vddk.slots import SessionSlots, VmLock
from vddkfs.errors import EngineError
from vddkfs.observe.redact import Redactor

SESSION_SECONDS: Final = 20.0
"""How long a worker waits for one of the machine's sessions before the daemon hears of it."""
DESCRIBE_SESSION_SECONDS: Final = 240.0
"""The same where somebody waits for an answer about the disks: nobody asks again then."""
SESSION_LOOK: Final = 0.1
WORKER_FILE: Final = "worker.json"
"""In a worker's folder: its VddkConfig."""
_CONFIGURATION: Final = "vddk.conf"


class Runtime:
    """See the module. Raises EngineError, UsageError, AccessDenied."""

    def __init__(self, config: VddkConfig, secret: int) -> None:
        self.config = config
        self._deferred: collections.deque[Callable[[], None]] = collections.deque()
        self.also_deferred: Callable[[], None] | None = None
        """What else the main thread is to do when it is woken."""
        self.woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        leave_no_core()
        credentials = read_credentials(secret) if config.server else Credentials()
        self._credentials = credentials
        self.output = WorkerOutput(Redactor(credentials.secrets))
        self.folder = Path(config.tmp_directory)
        shared = Path(config.shared_directory)
        self._slots = SessionSlots(shared, config.server, config.max_sessions)
        self._lock = VmLock(shared, config.server, config.vmx_spec)
        self.session_seconds = SESSION_SECONDS
        self._initialised = False
        self._uncleaned = False
        trace = self._trace if config.debug else None
        self.library = Library(
            find_kit(config.libdir), log=self._heard, trace=trace, clean=self._clean
        )
        left = self._begin_folder()
        try:
            self._initialise()
        except BaseException:
            if not left:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self._warn_of_ipv6()
        self._clean_up_after(left)

    @property
    def asynchronous(self) -> bool:
        """Whether the library reads, and writes if it is to, asynchronously.

        One that could do only one of them must not mix the two ways on a handle.
        """
        writes = any(image.writable for image in self.config.images)
        return self.library.has("ReadAsync") and (not writes or self.library.has("WriteAsync"))

    def say(self, level: int, text: str) -> None:
        """Have the daemon log *text*."""
        self.output.say(level, text)

    def _heard(self, level: str, text: str) -> None:
        self.output.say(LEVELS.get(level, logging.INFO), f"VDDK: {text}")

    def _clean(self, text: str) -> str:
        return self.output.redactor.redact(text)

    def _trace(self, call: str, seconds: float, moved: int, result: int) -> None:
        told = f", {moved} bytes" if moved else ""
        self.output.say(logging.DEBUG, f"{call}: {result}, {seconds * 1000:.3f} ms{told}")

    # The folder, and what was left.

    def _begin_folder(self) -> bool:
        """Have an empty folder, but for what Cleanup may need; say whether it was not empty."""
        left = self.folder.is_dir() and any(self.folder.iterdir())
        if left and not self.config.hot_adds:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (_CONFIGURATION, WORKER_FILE):
            (self.folder / name).unlink(missing_ok=True)
        # What a dead worker was about, for `vddkfs cleanup`. Nothing in it is secret.
        (self.folder / WORKER_FILE).write_bytes(msgspec.json.encode(self.config))
        return left

    def _initialise(self) -> None:
        theirs = self.config.vddk_config
        operators = configuration.read_operators(theirs) if theirs else ""
        debug = self.config.debug
        written = configuration.generate(str(self.folder), operators, debug=debug, name=theirs)
        for warning in written.warnings:
            self.say(logging.WARNING, warning)
        not_loaded = self.library.loaded.reasons()
        if not_loaded:
            self.say(logging.WARNING, f"a part of VDDK cannot be loaded: {not_loaded}")
        path = self.folder / _CONFIGURATION
        configuration.write(written, path)
        self.library.init(str(path))
        self._initialised = True
        self.say(
            logging.INFO,
            f"VDDK {self.library.kit.release_text} build {self.library.build or 'unknown'} from "
            f"{self.library.kit.libdir}",
        )

    def _clean_up_after(self, left: bool) -> None:
        """Remove what a worker that ended badly had attached. Nothing that fails here is fatal."""
        if left and self.config.hot_adds and self.library.has("Cleanup"):
            self._uncleaned = True
            if self._lock.alone():
                self._uncleaned = not self.clean_up()
            else:
                self.say(logging.WARNING, "no cleanup: another worker of this VM lives")
        self._lock.share()

    def clean_up(self, *, quiet: bool = False) -> bool:
        """Have the library remove hot-added disks that are attached for nobody.

        Says whether none is left; *quiet*: nothing is logged where nothing was attached.
        """
        try:
            found = self.library.cleanup(self._spec())
        except VixFailure as error:
            self.say(logging.WARNING, f"hot-added disks could not be cleaned up: {error}")
            return False
        if quiet and not found.cleaned and not found.remaining:
            return True
        self.say(
            logging.WARNING,
            f"hot-added disks cleaned up: {found.cleaned}, remaining: {found.remaining}; the next "
            "changed-block query of this VM may be full, until a snapshot was taken and removed",
        )
        return not found.remaining

    def _warn_of_ipv6(self) -> None:
        server = self.config.server
        if not server:
            return
        families = {socket.AF_INET6} if ":" in server else set()
        with contextlib.suppress(OSError):
            families = families or {entry[0] for entry in socket.getaddrinfo(server, None)}
        if families == {socket.AF_INET6}:
            self.say(
                logging.WARNING,
                f"{server} has IPv6 addresses only, which VDDK {self.library.kit.release_text} "
                "may not be able to use",
            )

    # Connections.

    def _spec(self) -> ConnectSpec:
        config, found = self.config, self._credentials
        credentials: UserPassword | SessionCookie = UserPassword(found.user, found.password)
        if found.cookie:
            credentials = SessionCookie(found.cookie, found.user, found.password)
        return ConnectSpec(
            server=config.server,
            vmx_spec=config.vmx_spec,
            thumbprint=config.thumbprint,
            credentials=credentials,
            transports=config.transports,
            port=config.port,
            nfc_port=config.nfc_port,
        )

    def spec(self, image: VddkImage) -> ConnectSpec:
        """Return how *image* is connected to.

        With a reference to a snapshot the library opens no disk to be written.
        """
        snapshot = "" if image.writable else image.snapshot
        spec = self._spec() if self.config.server else ConnectSpec()
        if not self.config.server:
            snapshot = ""
        return dataclasses.replace(spec, snapshot=snapshot, read_only=not image.writable)

    # Sessions.

    @property
    def limits_sessions(self) -> bool:
        """Whether the machine's sessions of this server are counted."""
        return bool(self.config.max_sessions and self.config.server)

    def take_session(self) -> None:
        """Take one of the machine's sessions, waiting a while for whoever has one to spare.

        Raises EngineError, to be tried again if others have them all.
        """
        most, server = self.config.max_sessions, self.config.server
        if self.limits_sessions and self._slots.held >= most:
            raise EngineError(
                f"{len(self.config.images)} disks are read by one worker, each in a session of its "
                f"own, and max_sessions={most} allows fewer",
                advice="raise max_sessions=, or leave hotadd out of transports=",
            )
        began = time.monotonic()
        told = False
        while self.limits_sessions and not self._slots.take():
            if time.monotonic() - began > self.session_seconds:
                raise EngineError(
                    f"all {most} sessions of {server} are in use",
                    advice="wait, or raise max_sessions=",
                    retry="busy",
                )
            if not told:
                told = True
                self.say(logging.INFO, f"waiting for one of {most} sessions of {server}")
            time.sleep(SESSION_LOOK)

    def give_session_back(self) -> None:
        """Let somebody else have the session."""
        self._slots.give_back()

    def session_wanted(self) -> bool:
        """Say whether another worker of this machine waits for a session."""
        return self.limits_sessions and self._slots.wanted()

    # The main thread.

    def wake(self) -> None:
        """Have the main thread look what is to be done. From any thread."""
        os.eventfd_write(self.woken, 1)

    def defer(self, work: Callable[[], None]) -> None:
        """Have the main thread do *work*. From any thread."""
        self._deferred.append(work)
        self.wake()

    def run_deferred(self) -> None:
        """Do what was deferred."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.woken)
        if self.also_deferred is not None:
            self.also_deferred()
        while self._deferred:
            self._deferred.popleft()()

    def wait(self, seconds: float) -> None:
        """Wait until somebody wakes the main thread, for at most *seconds*."""
        select.select([self.woken], [], [], max(0.0, seconds))

    def close(self) -> None:
        """End the use of the library, and leave nothing behind.

        The folder stays where disks may still be attached: the library knows them by it alone.
        """
        done = True
        if self._initialised:
            if self.config.hot_adds and self.library.has("Cleanup"):
                done = self.clean_up_at_end()
            self.library.exit()
            self._initialised = False
        self._slots.close()
        self._lock.close()
        self.output.close()
        if done:
            shutil.rmtree(self.folder, ignore_errors=True)

    def clean_up_at_end(self) -> bool:
        """Remove what is still attached though it was closed (a failed open leaves it, K24).

        Says whether nothing of this worker, nor of those before it, can be attached any more.
        """
        if self._lock.alone():
            return self.clean_up(quiet=True)
        # The calls for metadata fail by design: their first one asks for a length.
        calls = self.library.statistics().items()
        failed = any(one.failures for name, one in calls if "Metadata" not in name)
        if self._uncleaned or failed:
            self.say(logging.WARNING, "no cleanup: another worker of this VM lives")
            return False
        return True
