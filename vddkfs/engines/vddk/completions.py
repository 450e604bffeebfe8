"""Asynchronous requests under way: each is completed exactly once, on whatever thread that is.

The rules, from the vendor's guide and what is known of the library:

- A call that returns VIX_ASYNC (25000) took the request: its callback comes, or has come. Over
  transports without real asynchrony it comes *inside* the call, on the calling thread. So the
  request is in the table before the call is made, and no lock is held while it is.
- A call that returns an error did not take the request: no callback comes, and the caller is told
  by an exception. Should a callback have come all the same, that was the completion.
- What a return of 0 means is not documented: 25000 is the value of success. It is taken as "taken",
  never as "done", because a buffer that is used too early is wrong data. If no callback comes, the
  next successful Wait on the handle, which ends when nothing is outstanding, completes it.
- A callback for a request that is not in the table (a second one) is counted and dropped.

The table keeps the buffer's memory from being unmapped or resized until the completion.
"""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from vddkfs.engines.vddk.calls import Ledger

Done = Callable[[int], None]
"""Told the result of an asynchronous request: a VixError code without upper bits, 0 for success.

It comes on a thread of the library or inside the call that issued the request; it must be quick,
and call nothing of VDDK.
"""


@dataclass(slots=True)
class Pending:
    """One request: *release* lets go of the buffer, *owner* tells the handles apart."""

    call: str
    owner: int
    moved: int
    done: Done
    release: Callable[[], None]
    began: float = field(default_factory=time.perf_counter)
    unsure: bool = False


class Completions:
    """The table. *complain* is told in words of what should not have happened."""

    def __init__(self, ledger: Ledger, complain: Callable[[str], None]) -> None:
        self._ledger: Final = ledger
        self._complain = complain
        self._keys = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._lock = threading.Lock()
        self.stray = 0

    def add(self, pending: Pending) -> int:
        """Enter a request, and return its key: a number from 1 on that is not used again."""
        key = next(self._keys)
        with self._lock:
            self._pending[key] = pending
        return key

    def finish(self, key: int, result: int) -> bool:
        """Complete request *key*; say whether it still was to be completed."""
        with self._lock:
            pending = self._pending.pop(key, None)
            self.stray += pending is None
        if pending is None:
            self._complain(f"VDDK completed request {key}, which is not under way (any more)")
            return False
        pending.release()
        self._ledger.record(pending.call, pending.began, 0 if result else pending.moved, result)
        try:
            pending.done(result)
        except Exception as error:
            self._complain(f"a completion failed: {error!r}")
        return True

    def withdraw(self, key: int, result: int) -> bool:
        """Take back a request whose call failed; say whether it was not completed before."""
        with self._lock:
            pending = self._pending.pop(key, None)
        if pending is None:
            return False
        pending.release()
        self._ledger.record(pending.call, pending.began, 0, result)
        return True

    def doubt(self, key: int) -> None:
        """Note that the call of request *key* returned 0."""
        with self._lock:
            pending = self._pending.get(key)
            if pending is not None:
                pending.unsure = True

    def settle(self, owner: int) -> None:
        """Complete what is in doubt on handle *owner*: Wait said that nothing is outstanding."""
        with self._lock:
            keys = [key for key, one in self._pending.items() if one.owner == owner and one.unsure]
        for key in keys:
            self.finish(key, 0)

    def count(self, owner: int | None = None) -> int:
        """How many requests are under way, on one handle or on all."""
        with self._lock:
            return sum(owner in (None, one.owner) for one in self._pending.values())
