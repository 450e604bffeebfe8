"""Read-ahead: which part of a file to fetch before it is asked for. Pure arithmetic, in bytes.

An open file may have many readers in it (a loop device is one open file). Each read is taken for
the next one of a *stream*: the one whose end is closest to it, if that is near enough; otherwise it
begins a new one. The kernel sends the requests of one reader several at a time and not always in
order, hence "near".

A stream is *unproved* until it has read 256 KiB in sequence, and takes little disorder until then:
random readers in one place must not look like one who goes forward. Both kinds have lists of their
own, so that many random reads never displace a reader who has proved.

What is far from all streams begins a new one even within the window of another: several readers go
through neighbouring areas, and each should have its own window. It takes over the other's when it
has proved, because it may as well be the same reader, who has skipped something.
"""

from typing import Final

from vddkfs.cache.worth import BLOCK, Worth

__all__ = ["BLOCK", "Stream", "Streams"]

_PROVED: Final = 16
"""Proved streams that are told apart in one file."""
_UNPROVED: Final = 32
"""Unproved ones: a reader must come back before that many others have begun one. More of them, and
random readers would more often find each other's ends."""
_PROOF: Final = 256 * 1024
"""Bytes that must have been read in sequence before anything is fetched ahead."""
_GAP: Final = 64 * 1024
"""What may be left out in sequence: loop devices skip holes in small steps."""
_GAP_COST: Final = 4
"""Bytes of proof that each byte left out costs: random reads in one place leave out as much as they
read, and more."""
_NEAR: Final = 4 * BLOCK
"""How far a read may be from the end of its stream, once that has proved."""
_TRUST: Final = 8 * BLOCK
"""How many bytes more may be skipped than read before a stream that has proved is in doubt."""
_WINDOW: Final = 2 * BLOCK
"""The first window, and the last one of a source that is faster than its reader: what is fetched
stays in the processor's caches until it is read."""
_CALM: Final = 512 * BLOCK
"""Bytes read without a wait after which the window is halved: one wait costs far less than that."""
_CONSUMED: Final = 2 * BLOCK
"""Bytes read since the proof after which the next frame is fetched even if reading ahead was worth
nothing so far: the waste of one who stops then is a half of what was read."""
_NOTHING: Final = (0, 0)


class Stream:
    """One reader going forward. Offsets and sizes in bytes; begins with a read of [start, end)."""

    __slots__ = (
        "_balance",
        "_calm_from",
        "_capacity",
        "_due",
        "_issued",
        "_limit",
        "_proved_at",
        "_stalled",
        "_worth",
        "ahead",
        "position",
        "sequential",
        "window",
    )

    def __init__(self, capacity: int, limit: int, worth: Worth, start: int, end: int) -> None:
        self._capacity = capacity
        self._limit = limit
        self._worth = worth
        # One read alone proves nothing, however long.
        self._balance = min(end - start, _PROOF // 2)
        self._proved_at = 0
        self._calm_from = 0
        self._issued = 0
        self._due = 0
        self._stalled = 0
        self.position = end
        """The end of what was read in sequence."""
        self.sequential = False
        """Whether it has proved: whole frames are worth fetching."""
        self.window = 0
        """How far ahead of the reader to fetch; 0 before the proof."""
        self.ahead: tuple[int, int] = _NOTHING
        """What to fetch ahead now, after the latest read: aligned, inside the capacity, and naming
        no frame twice while the stream goes on; (x, x): nothing."""

    def goes_on(self, start: int, end: int) -> bool:
        """Note a read of [*start*, *end*) if that is just what comes next in a proved stream.

        Nearly every read of a stream takes this way.
        """
        if start != self.position or not self.sequential:
            return False
        self.position = end
        self.ahead = _NOTHING
        if self._balance < _TRUST:
            self._balance = min(_TRUST, self._balance + end - start)
        if end > self._due:
            self._name()
        return True

    def note(self, start: int, end: int) -> None:
        """Note a read of [*start*, *end*), which is near."""
        self.ahead = _NOTHING
        gap = start - self.position
        if not self.sequential:
            if end > self.position:
                new = end - max(start, self.position)
                self._balance = max(0, self._balance - _GAP_COST * max(0, gap)) + new
                self.position = end
                self.sequential = self._balance >= _PROOF
            return
        # What comes late fills a gap that was skipped before: in the end, disorder costs nothing.
        self._balance = min(_TRUST, self._balance - max(0, gap) + end - start)
        self.position = max(self.position, end)
        if self._balance <= 0:
            self.sequential = False
            self._balance = 0
        elif gap <= _GAP and self._balance >= _TRUST // 2 and self.position > self._due:
            self._name()

    def open_window(self, window: int) -> None:
        """Begin to fetch ahead, because it has proved: *window* or more."""
        self.window = max(self.window, window, min(_WINDOW, self._limit))
        self._balance = _TRUST
        self._proved_at = self._calm_from = self.position
        # Nothing was fetched ahead of what the reader is in: waiting there tells nothing.
        self._stalled = _align_up(self.position)
        self._name()

    def took(self, end: int) -> None:
        """Say that fetching stopped at *end* for want of memory: the rest is named again later."""
        if end < self._issued:
            self._issued = end - end % BLOCK
            self._plan()

    def waited(self) -> None:
        """Say that the reader found the data not there yet: the window may grow.

        It doubles once per frame: all that the kernel asks for at a time waits for the same frame.
        """
        if not self.sequential or self.position <= self._stalled:
            return
        self._stalled = _align_up(self.position)
        self._calm_from = self.position
        if self.window < self._limit:
            self.window = min(self._limit, 2 * self.window)
            self._plan()

    def covers(self, position: int) -> bool:
        """Say whether *position* is in what was fetched ahead of the reader."""
        return self.position <= position <= self._issued

    def _name(self) -> None:
        if self.position - self._calm_from > _CALM:
            self._calm_from = self.position
            self.window = max(min(_WINDOW, self._limit), self.window // 2)
        next_frame = _align_up(self.position)
        wanted = min(self._capacity, _align_up(self.position + self.window))
        first = max(self._issued, next_frame)
        if first < wanted:
            allowance = self._worth.allowance
            last = min(wanted, first + allowance - allowance % BLOCK)
            if last == first == next_frame and self._consumes():
                last = min(wanted, first + BLOCK)
            if last > first:
                self.ahead = (first, last)
                self._issued = last
        self._plan()

    def _consumes(self) -> bool:
        """Say whether the reader has gone on for a while since the proof, with nothing left out."""
        return self._balance == _TRUST and self.position - self._proved_at >= _CONSUMED

    def _plan(self) -> None:
        """Say from which position on there is a frame to name."""
        done = self._issued >= self._capacity
        self._due = self._capacity if done else self._issued - self.window


class Streams:
    """The streams of one open file of *capacity* bytes.

    *limit* is the largest window of each of them; with 0 nothing is fetched ahead, but streams are
    told all the same.
    """

    __slots__ = ("_capacity", "_current", "_limit", "_proved", "_unproved", "_worth")

    def __init__(self, capacity: int, limit: int, worth: Worth) -> None:
        self._capacity = capacity
        self._limit = limit
        self._worth = worth
        self._proved: list[Stream] = []
        self._unproved: list[Stream] = []
        self._current = Stream(capacity, limit, worth, 0, 0)

    def access(self, start: int, end: int) -> Stream:
        """Note a read of [*start*, *end*), inside the capacity; return the stream it belongs to.

        Its ``ahead`` is what to fetch ahead now.
        """
        if not self._current.goes_on(start, end):
            self._current = self._note(start, end)
        return self._current

    def _note(self, start: int, end: int) -> Stream:
        stream = _closest(self._proved, start, -_NEAR, _NEAR)
        if stream is not None:
            self._proved.remove(stream)
            if not stream.goes_on(start, end):
                stream.note(start, end)
        else:
            stream = _closest(self._unproved, start, -_PROOF, _GAP)
            if stream is not None:
                self._unproved.remove(stream)
                stream.note(start, end)
                if stream.sequential:
                    covering = [one.window for one in self._proved if one.covers(start)]
                    stream.open_window(max(covering, default=0))
            else:
                stream = Stream(self._capacity, self._limit, self._worth, start, end)
        proved = stream.sequential
        streams = self._proved if proved else self._unproved
        streams.insert(0, stream)
        del streams[_PROVED if proved else _UNPROVED :]
        return stream


def _closest(streams: list[Stream], start: int, low: int, high: int) -> Stream | None:
    """Return the stream whose end is closest to *start*, if *start* is *low* to *high* from it.

    The latest of several, which are in the order of their use.
    """
    found = None
    least = max(-low, high) + 1
    for stream in streams:
        gap = start - stream.position
        if low <= gap <= high and abs(gap) < least:
            if not gap:
                return stream
            found = stream
            least = abs(gap)
    return found


def _align_up(offset: int) -> int:
    return -(-offset // BLOCK) * BLOCK
