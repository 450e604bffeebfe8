"""Writers to ranges of their own, readers beside them, and flushes: on the machine's own files."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.disks.overlay.memory import MemoryDisk
from vddkfs.disks.overlay import BLOCK, Fork, Limits, Overlay
from vddkfs.disks.overlay.space import Segments

BLOCKS = 64
LIMITS = Limits(reserve=0, grow=64, spare=8, piece=2, pending=40, retired=20, log_room=BLOCK)


def below(offset: int, size: int) -> bytes:
    return bytes(size)


def together(*tasks: Callable[[], None]) -> None:
    """Run *tasks* at once; raise what the first that failed raised."""
    failures: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def pattern(number: int, turn: int) -> bytes:
    return (number * 1000 + turn).to_bytes(4, "little") * (BLOCK // 4)


def run_all(fork: Fork, turns: int, through: Callable[[int, int], None]) -> None:
    """Let four writers rewrite a quarter each, while two readers look and one flushes."""
    ended = threading.Event()
    left = [4]

    def write(quarter: int) -> None:
        try:
            for turn in range(1, turns):
                for number in range(quarter, BLOCKS, 4):
                    fork.write(number * BLOCK, pattern(number, turn), below)
                through(quarter, turn)
        finally:
            left[0] -= 1
            if not left[0]:
                ended.set()

    def read(step: int) -> None:
        newest = [0] * BLOCKS
        while not ended.is_set():
            for first in range(0, BLOCKS, step):
                found = bytearray(step * BLOCK)
                fork.read_into(first * BLOCK, memoryview(found))
                for number in range(first, first + step):
                    block = found[(number - first) * BLOCK :][:BLOCK]
                    if block == bytes(BLOCK):
                        turn = 0
                    else:
                        turn = int.from_bytes(block[:4], "little") - number * 1000
                        assert block == pattern(number, turn), "old or new as a whole"
                    assert turn >= newest[number], "never back"
                    newest[number] = turn

    def flush() -> None:
        while not ended.is_set():
            fork.flush()

    writers = [lambda quarter=quarter: write(quarter) for quarter in range(4)]
    together(*writers, lambda: read(1), lambda: read(16), flush)


def test_readers_and_writers_at_once(tmp_path: Path) -> None:
    overlay = Overlay.open(str(tmp_path / "overlay"), (), limits=LIMITS)
    fork = overlay.fork("disk/0", BLOCKS * BLOCK)
    run_all(fork, 40, lambda quarter, turn: fork.flush() if turn % 7 == quarter else None)
    overlay.close()
    overlay = Overlay.open(str(tmp_path / "overlay"), (), limits=LIMITS)
    fork = overlay.fork("disk/0", BLOCKS * BLOCK)
    found = bytearray(BLOCKS * BLOCK)
    assert fork.read_into(0, memoryview(found)) == []
    assert found == b"".join(pattern(number, 39) for number in range(BLOCKS))
    assert fork.changed_bytes == BLOCKS * BLOCK
    overlay.close()


def test_many_writers_share_the_spare_places(tmp_path: Path) -> None:
    """On a full disk more writers rewrite at once than there are spare places for."""
    limits = Limits(reserve=0, grow=16, spare=4, piece=2, log_room=BLOCK)
    overlay = Overlay.open(str(tmp_path / "overlay"), (), limits=limits)
    fork = overlay.fork("disk/0", BLOCKS * BLOCK)
    for number in range(32):
        fork.write(number * BLOCK, pattern(number, 0), below)
    store = fork._store
    store._segments._limits = Limits(reserve=1 << 62)

    def write(first: int) -> None:
        for turn in range(30):
            fork.write(first * BLOCK, pattern(first, turn) + pattern(first + 1, turn), below)

    together(*(lambda first=first: write(first) for first in range(0, 32, 2)))
    found = bytearray(32 * BLOCK)
    assert fork.read_into(0, memoryview(found)) == []
    assert found == b"".join(pattern(number, 29) for number in range(32))
    overlay.close()


def test_a_place_that_is_read_is_not_used_again(tmp_path: Path) -> None:
    """A commit frees nothing that somebody reads who looked at the map before it."""
    overlay = Overlay.open(str(tmp_path / "overlay"), (), limits=LIMITS)
    fork = overlay.fork("disk/0", BLOCKS * BLOCK)
    store = fork._store
    fork.write(0, pattern(0, 1), below)
    fork.flush()
    fork.write(0, pattern(0, 2), below)
    free = store._free.count
    flusher = threading.Thread(target=fork.flush)
    with store.reading(0, 1):
        flusher.start()
        while not store._releasing:
            time.sleep(0.001)
        assert store._free.count == free
        content = bytearray(BLOCK)
        assert fork.read_into(0, memoryview(content)) == [], "others read meanwhile"
        assert content == pattern(0, 2)
        fork.write(BLOCK, pattern(1, 1), below)
        assert store._free.count == free - 1, "or write"
    flusher.join()
    assert store._free.count == free
    overlay.close()


def test_a_segment_that_is_written_while_a_commit_begins_is_flushed_by_one() -> None:
    """Between finding the set of such segments and putting one into it, a commit may take it."""
    segments = Segments(MemoryDisk(), "/", LIMITS)
    taken: list[set[int]] = []

    class Interrupted(set[int]):
        def add(self, number: int) -> None:
            if not taken:
                taken.append(segments.take_dirty())
            super().add(number)

    segments.grow(1)
    segments._dirty = Interrupted(segments.take_dirty())
    segments.write(memoryview(bytes(BLOCK)), 0)
    assert segments.take_dirty() == {0}
    assert segments.take_dirty() == set()
