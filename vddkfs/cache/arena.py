"""The arena: the shared memory that workers read into and the daemon answers from.

It is a set of *chunks* (memfds), each lent to one disk, and so to one worker process, at a time: a
library that scribbles can spoil its own disk only. A chunk is cut into *frames* of 1 MiB, and a
frame is one large *slot*, or many small ones of a *block* each (64 KiB, unless the operator wants
another size). A slot is what one request fills, and what is kept and evicted.

Only the trio thread touches the books, so there are no locks. Making a chunk's memory is slow (the
kernel clears every page) and happens in a thread.

Units: bytes, unless a name says otherwise.
"""

import fcntl
import math
import mmap
import os
from collections import deque
from typing import Final, Protocol

import trio

from vddkfs.errors import VddkfsError

FRAME: Final = 1024 * 1024
BLOCK: Final = 64 * 1024
"""What a scattered read fetches, unless the operator wants another size."""
CHUNK: Final = 16 * 1024 * 1024
_FULL_SECONDS: Final = 5.0
"""How long no more memory is asked for after the machine had none."""


class Chunk:
    """One memfd. *owner* is the key of the disk that it is lent to; its fd goes to that worker."""

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size
        self.owner: object = None
        self.fd = os.memfd_create(f"vddkfs-arena-{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.frames = [Frame(self, index) for index in range(size // FRAME)]
        self._map: mmap.mmap | None = None
        self.view = memoryview(b"")

    def allocate(self) -> None:
        """Give the chunk its memory. Blocks: for a thread. Raises OSError (ENOMEM, ENOSPC)."""
        os.posix_fallocate(self.fd, 0, self.size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        self._map = mmap.mmap(self.fd, self.size)
        self._map.madvise(mmap.MADV_DONTDUMP)
        self.view = memoryview(self._map).toreadonly()

    def put(self, offset: int, data: memoryview) -> None:
        """Copy *data* to *offset*."""
        assert self._map is not None
        self._map[offset : offset + len(data)] = data

    def close(self) -> None:
        """Give the memory back."""
        os.close(self.fd)
        self.view = memoryview(b"")
        self._map = None

    def pinned(self) -> bool:
        """Say whether a request or a reader is using a part of the chunk now."""
        return any(frame.pins for frame in self.frames)


class Frame:
    """1 MiB of a chunk. *pins* counts requests under way and readers; a pinned frame stays."""

    __slots__ = ("chunk", "offset", "pins", "slots")

    def __init__(self, chunk: Chunk, index: int) -> None:
        self.chunk = chunk
        self.offset = index * FRAME
        self.pins = 0
        self.slots: list[Slot] = []

    def cut(self, size: int) -> "list[Slot]":
        """Make slots of *size* bytes, a part of a frame, of all of it; return them."""
        self.slots = [
            Slot(self, offset, size) for offset in range(self.offset, self.offset + FRAME, size)
        ]
        return self.slots


class Tenant(Protocol):
    """What the cache keeps in a slot."""

    kept: bool
    """Whether it stays there when nobody uses it."""


class Slot:
    """A part of a frame that one request fills. *tenant* is what the cache keeps there."""

    __slots__ = ("chunk_number", "frame", "offset", "pins", "size", "tenant")

    def __init__(self, frame: Frame, offset: int, size: int) -> None:
        self.frame = frame
        self.chunk_number = frame.chunk.number
        self.offset = offset
        self.size = size
        self.pins = 0
        self.tenant: Tenant | None = None

    def pin(self) -> None:
        """Keep the slot's memory from being used for anything else."""
        self.pins += 1
        self.frame.pins += 1

    def unpin(self) -> None:
        """Undo one pin."""
        self.pins -= 1
        self.frame.pins -= 1

    def bytes(self, start: int, end: int) -> memoryview:
        """Return [*start*, *end*) of the slot, without a copy; valid until the next await."""
        base = self.offset
        return self.frame.chunk.view[base + start : base + end]

    def fill(self, start: int, data: memoryview) -> None:
        """Put *data* to byte *start* of the slot, for a worker to write it somewhere."""
        self.frame.chunk.put(self.offset + start, data)


class Arena:
    """Chunks within a budget of *size*, and who has them. *block* divides a frame.

    A few chunks (the *floor*) are kept back for every disk of the mount that has not come for them
    yet, so that a disk that hangs with all its requests pinned cannot take the others' memory.
    """

    def __init__(self, size: int, disks: int = 1, block: int = BLOCK) -> None:
        self.block = block
        disks = max(disks, 1)
        frames = max(size // FRAME, 4 * disks)
        chunk_frames = CHUNK // FRAME
        while chunk_frames > 1 and frames // chunk_frames < 4 * disks:
            chunk_frames //= 2
        self.chunk_size = chunk_frames * FRAME
        self.limit = frames // chunk_frames
        self._disks = disks
        self._floor = max(1, self.limit // (4 * disks))
        self._next_number = 0
        self._full_until = -math.inf
        self._spare: list[Chunk] = []
        self._growing: dict[object, trio.Event] = {}
        self.chunks: dict[object, list[Chunk]] = {}
        self.count = 0

    @property
    def size(self) -> int:
        """Bytes of memory that chunks occupy now."""
        return self.count * self.chunk_size

    @property
    def fair_share(self) -> int:
        """How many chunks each disk would have if all had the same."""
        return max(1, self.limit // self._disks)

    @property
    def share_bytes(self) -> int:
        """The fair share in bytes."""
        return self.fair_share * self.chunk_size

    def may_grow(self, owner: object) -> bool:
        """Say whether *owner* may get another chunk without taking one away from anybody."""
        if not self._spare and trio.current_time() < self._full_until:
            return False
        unused = self.limit - self.count + len(self._spare)
        others = [len(chunks) for key, chunks in self.chunks.items() if key != owner]
        kept_back = self._floor * max(self._disks - 1 - len(others), 0)
        kept_back += sum(max(self._floor - have, 0) for have in others)
        return unused > kept_back

    async def grow(self, owner: object) -> Chunk | None:
        """Return a chunk that is newly *owner*'s, or None where there is none to be had now.

        Callers of one owner that come while a chunk is being made wait for that one, and get None.
        Raises VddkfsError where the owner has no chunk at all and the machine has no memory.
        """
        under_way = self._growing.get(owner)
        if under_way is not None:
            await under_way.wait()
            return None
        chunk = None
        if self.may_grow(owner) or not self.chunks.get(owner):
            event = self._growing[owner] = trio.Event()
            try:
                chunk = self._spare.pop() if self._spare else await self._make()
            finally:
                del self._growing[owner]
                event.set()
        if chunk is not None:
            chunk.owner = owner
            self.chunks.setdefault(owner, []).append(chunk)
        elif not self.chunks.get(owner):
            raise VddkfsError(
                "no memory for the cache", advice="free some, or mount with a smaller cache_size="
            )
        return chunk

    async def _make(self) -> Chunk | None:
        self.count += 1
        chunk = None
        try:
            chunk = Chunk(self._next_number, self.chunk_size)
            self._next_number += 1
            await trio.to_thread.run_sync(chunk.allocate)
        except (OSError, RuntimeError, MemoryError):
            # No memory, descriptor or thread to be had: what there is has to do for a while.
            self.count -= 1
            self._full_until = trio.current_time() + _FULL_SECONDS
            if chunk is not None:
                chunk.close()
            return None
        except BaseException:
            self.count -= 1
            if chunk is not None:
                chunk.close()
            raise
        return chunk

    def release(self, chunk: Chunk) -> None:
        """Take *chunk*, which nobody uses any more, from its owner; it becomes a spare."""
        self.chunks[chunk.owner].remove(chunk)
        chunk.owner = None
        self._spare.append(chunk)

    def richest(self) -> object | None:
        """Return the owner with the most chunks, if that is more than its fair share."""
        key = max(self.chunks, key=lambda key: len(self.chunks[key]), default=None)
        return key if key is not None and len(self.chunks[key]) > self.fair_share else None

    def close(self) -> None:
        """Give all memory back."""
        for chunk in [*self._spare, *(c for owned in self.chunks.values() for c in owned)]:
            chunk.close()
        self._spare.clear()
        self.chunks.clear()
        self.count = 0


class FreeFrames:
    """The frames of one disk that hold nothing, the most recently freed first (it is warm)."""

    def __init__(self) -> None:
        self._frames: deque[Frame] = deque()

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, frame: Frame) -> None:
        """Take back *frame*, whose slots nobody uses any more."""
        frame.slots = []
        self._frames.append(frame)

    def add_chunk(self, chunk: Chunk) -> None:
        """Take all frames of a new chunk, so that its beginning is used first."""
        for frame in reversed(chunk.frames):
            self.add(frame)

    def remove_chunk(self, chunk: Chunk) -> None:
        """Forget the frames of a chunk that goes to another disk."""
        self._frames = deque(frame for frame in self._frames if frame.chunk is not chunk)

    def pop(self) -> Frame | None:
        """Return a free frame, or None."""
        return self._frames.pop() if self._frames else None
