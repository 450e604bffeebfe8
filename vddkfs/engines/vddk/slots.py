"""What the proxy's workers share: sessions of a server, and the lock of each VM.

Both are kernel locks on files of the state folder, held by the worker itself, so that they end with
it however it ends. The files stay; they are empty.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from pathlib import Path
from typing import Final

_LOOKS: Final = 3
_LOOK_SECONDS: Final = 0.002


def _named(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _open(path: Path) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class SessionSlots:
    """At most *limit* connections to *server* from all mounts that share *folder*; 0: no limit."""

    def __init__(self, folder: Path, server: str, limit: int) -> None:
        self._folder = folder / "sessions" / _named(server)
        self._limit = limit
        self._held: list[int] = []
        self._waiting = -1

    @property
    def held(self) -> int:
        """How many slots this process has."""
        return len(self._held)

    def take(self) -> bool:
        """Take a slot; False: all are taken, and their holders are told that somebody waits."""
        if not self._limit:
            return True
        for number in range(self._limit):
            fd = _open(self._folder / str(number))
            # A second descriptor of a slot that this very process has does not get it again.
            if _lock(fd, fcntl.LOCK_EX):
                self._held.append(fd)
                self._wait(False)
                return True
            os.close(fd)
        self._wait(True)
        return False

    def give_back(self) -> None:
        """Give one slot back."""
        if self._held:
            os.close(self._held.pop())

    def wanted(self) -> bool:
        """Say whether somebody waits for a slot."""
        if not self._limit:
            return False
        fd = _open(self._folder / "waiting")
        try:
            for _ in range(_LOOKS):
                if _lock(fd, fcntl.LOCK_EX):
                    return False
                # Somebody waits; or somebody else looks, who has the lock for a moment only.
                time.sleep(_LOOK_SECONDS)
            return True
        finally:
            os.close(fd)

    def _wait(self, begin: bool) -> None:
        if begin and self._waiting < 0:
            self._waiting = _open(self._folder / "waiting")
            # Where somebody looks just now, the next try says it.
            if not _lock(self._waiting, fcntl.LOCK_SH):
                os.close(self._waiting)
                self._waiting = -1
        elif not begin and self._waiting >= 0:
            os.close(self._waiting)
            self._waiting = -1

    def close(self) -> None:
        """Give all slots back."""
        while self._held:
            self.give_back()
        self._wait(False)


class VmLock:
    """Held shared by every live worker of a VM, so that Cleanup never takes a disk from one."""

    def __init__(self, folder: Path, server: str, vmx_spec: str) -> None:
        self._fd = _open(folder / "vms" / _named(f"{server}\n{vmx_spec}"))

    def alone(self) -> bool:
        """Take the lock for this worker alone; False if another worker of the VM lives."""
        return _lock(self._fd, fcntl.LOCK_EX)

    def share(self) -> None:
        """Be one of the VM's live workers. Waits while somebody cleans up."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def close(self) -> None:
        """Let go."""
        with contextlib.suppress(OSError):
            os.close(self._fd)
