"""The loop in C by itself, on a library that the test plays: what no library should do, too."""

import array
import contextlib
import mmap
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI

from vddkfs.engines import protocol
from vddkfs.engines.protocol import Op
from vddkfs.engines.vddk import _reads_build

reads_c: Any = pytest.importorskip("vddkfs.engines.vddk._reads", reason="it is not built")

SOURCE = Path(_reads_build.__file__).with_name("reads.c")
VIX_ASYNC = 25000
HANDLE = 0x1234
SIZE = 1 << 20
_ASYNC = "uint64_t(void *, uint64_t, uint64_t, uint8_t *, void (*)(void *, uint64_t), void *)"


class Played:
    """The library and the daemon; *calls* are what ReadAsync was called with."""

    def __init__(self, images: int = 1) -> None:
        self.ffi = FFI()
        self.lib = reads_c.lib
        self.result = VIX_ASYNC
        self.inside: Callable[[], None] = lambda: None
        self.calls: list[tuple[int, int, int, int]] = []
        self.endings: list[Callable[[int], None]] = []
        self.daemon, self.worker = protocol.pair()
        self.woken = os.eventfd(0, os.EFD_NONBLOCK)
        self._function = self.ffi.callback(_ASYNC, self._read_async)
        address = int(self.ffi.cast("uintptr_t", self._function))
        self.reads = self.lib.reads_new(self.worker.fileno(), self.woken, address, 0, images)
        self.area = mmap.mmap(-1, SIZE)
        self.start = int(self.ffi.cast("uintptr_t", self.ffi.from_buffer(self.area)))
        self.lib.reads_lend(self.reads, 0, self.start, SIZE)
        self.offer()
        self.packet = reads_c.ffi.new("uint8_t[]", protocol.MAX_PACKET)
        self.received = reads_c.ffi.new("struct received *")
        self.ended = reads_c.ffi.new("struct ended *")

    def _read_async(self, *given: Any) -> int:
        handle, sector, count, buffer, done, data = given
        numbers = [int(self.ffi.cast("uintptr_t", one)) for one in (handle, buffer)]
        self.calls.append((numbers[0], sector, count, numbers[1]))
        self.endings.append(lambda code: done(data, code))
        self.inside()
        return self.result

    def offer(self, room: int = SIZE, piece: int = SIZE, **more: int) -> None:
        told = {"no_direct": 0, "aligned": 0, "watch": 0} | more
        self.lib.reads_offer(self.reads, 0, HANDLE, room, piece, *told.values())

    def ask(self, number: int, count: int = 8, **fields: int) -> None:
        header = protocol.request_header(Op.READ, number, count=count, **fields)
        protocol.send(self.daemon, header)

    def next(self, until: int = -1) -> int:
        return int(
            self.lib.reads_next(self.reads, until, self.packet, protocol.MAX_PACKET, self.received)
        )

    def answers(self) -> list[tuple[int, ...]]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(protocol.REPLY.unpack(protocol.receive(self.daemon)[0]))
        return found

    def answered(self) -> list[int]:
        found = self.answers()
        assert all(answer[:4] == (Op.READ, 0, 0, 0) for answer in found)
        return [answer[4] for answer in found]

    def under_way(self, watch: bool = False) -> tuple[int, int]:
        requests, size = (reads_c.ffi.new("uint64_t *") for _ in range(2))
        self.lib.reads_under_way(self.reads, 0, watch, requests, size)
        return requests[0], size[0]

    def was_woken(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return bool(os.eventfd_read(self.woken))
        return False

    def taken(self) -> tuple[int, ...] | None:
        """Return id and code of a read that Python is to take."""
        if not self.lib.reads_take_ended(self.reads, self.ended):
            return None
        return self.ended.id, self.ended.code

    def close(self) -> None:
        self.lib.reads_close(self.reads)
        os.close(self.woken)
        for end in (self.daemon, self.worker):
            end.close()


@pytest.fixture
def played() -> Iterator[Played]:
    made = Played()
    yield made
    made.close()


def test_the_compiler_has_nothing_to_say() -> None:
    if shutil.which("cc") is None:
        pytest.skip("absent: the tool cc")
    # Every function is static, for the cffi module that includes the file.
    words = [
        "cc",
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-function",
        "-c",
        "-o",
        "/dev/null",
    ]
    done = subprocess.run([*words, SOURCE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def turn(played: Played) -> None:
    """Have everything served that is there."""
    assert played.next() == played.lib.NEXT_TURN


def test_a_read_is_begun_and_answered(played: Played) -> None:
    played.ask(2**63 + 5, 16, sector=2**40, offset=512)
    turn(played)
    assert played.calls == [(HANDLE, 2**40, 16, played.start + 512)]
    assert played.under_way() == (1, 8192)
    assert played.answers() == []
    played.endings[0](0)
    assert played.answered() == [2**63 + 5]
    assert played.under_way() == (0, 0)
    assert not played.was_woken()


@pytest.mark.parametrize("result", [VIX_ASYNC, 0, (1 << 20) + VIX_ASYNC])
def test_only_the_callback_says_that_it_is_done(result: int, played: Played) -> None:
    played.result = result
    played.ask(1)
    turn(played)
    assert (played.answers(), played.under_way()[0]) == ([], 1)
    played.endings[0](1 << 20)
    assert played.answered() == [1]


def test_a_second_completion_ends_no_other_read(played: Played) -> None:
    for number in range(1, 700):
        played.ask(number)
        turn(played)
        for ending in played.endings[:-1][-3:]:
            ending(0)
        assert played.answers() == []
        assert played.under_way()[0] == 1
        played.endings[-1](0)
        assert played.answered() == [number]
    assert played.lib.reads_strays(played.reads) == 3 * 699 - 6
    assert played.was_woken()
    assert played.taken() is None


@pytest.mark.parametrize("code", [2, 14011, 25001])
@pytest.mark.parametrize("how", ["returned", "called", "inside"])
def test_a_failure_is_pythons(how: str, code: int, played: Played) -> None:
    if how == "returned":
        played.result = code | 7 << 32
    elif how == "inside":
        played.inside = lambda: played.endings[-1](code)
    played.ask(3, 8, sector=40, offset=4096)
    turn(played)
    if how == "called":
        played.endings[0](code | 7 << 32)
    assert played.was_woken()
    assert played.under_way() == (1, 4096), "until Python counts it"
    assert played.taken() == (3, code)
    ended = played.ended
    assert (ended.image, ended.sector, ended.count, ended.offset) == (0, 40, 8, 4096)
    assert played.under_way() == (0, 0)
    assert played.taken() is None
    assert played.answers() == []


def test_an_error_after_the_completion_changes_nothing(played: Played) -> None:
    played.inside = lambda: played.endings[-1](0)
    played.result = 14011
    played.ask(1)
    turn(played)
    assert played.answered() == [1]
    assert played.taken() is None
    assert played.lib.reads_strays(played.reads) == 1


def test_a_completion_after_the_error_changes_nothing(played: Played) -> None:
    played.result = 14011
    played.ask(1)
    turn(played)
    played.endings[0](0)
    assert played.taken() == (1, 14011)
    played.endings[0](0)
    assert played.answers() == []
    assert played.lib.reads_strays(played.reads) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"image": 1},
        {"count": 0},
        {"count": 2**32 - 1},
        {"chunk": 1},
        {"chunk": 1024},
        {"offset": SIZE},
        {"offset": SIZE - 8 * 512 + 1},
        {"offset": 2**32 - 1},
        {"flags": 2},
        {"flags": protocol.BODY_IN_FD},
    ],
    ids=str,
)
def test_what_is_not_ordinary_is_pythons(fields: dict[str, int], played: Played) -> None:
    played.ask(1, **fields)
    assert played.next() == played.lib.NEXT_PACKET
    assert (played.calls, played.under_way()) == ([], (0, 0))
    header = protocol.REQUEST.unpack(reads_c.ffi.buffer(played.packet, played.received.length))
    assert header[4] == 1


@pytest.mark.parametrize(
    ("offer", "fields", "ordinary"),
    [
        ({"room": 4096}, {}, True),
        ({"room": 4095}, {}, False),
        ({"room": 0}, {}, False),
        ({"piece": 4096}, {}, True),
        ({"piece": 4095}, {}, False),
        ({"aligned": 1}, {"offset": 1024}, True),
        ({"aligned": 1}, {"offset": 1000}, False),
        ({"no_direct": 1}, {}, True),
        ({"no_direct": 1}, {"flags": protocol.DIRECT}, False),
        ({}, {"flags": protocol.DIRECT}, True),
    ],
    ids=str,
)
def test_what_python_offers(
    offer: dict[str, int], fields: dict[str, int], ordinary: bool, played: Played
) -> None:
    played.offer(**offer)
    played.ask(1, **fields)
    expected = played.lib.NEXT_TURN if ordinary else played.lib.NEXT_PACKET
    assert played.next() == expected


def test_a_closed_disk_is_not_read(played: Played) -> None:
    played.lib.reads_offer(played.reads, 0, 0, SIZE, SIZE, 0, 0, 0)
    played.ask(1)
    assert played.next() == played.lib.NEXT_PACKET


def test_no_more_is_begun_than_there_is_room_for(played: Played) -> None:
    played.offer(room=3 * 4096)
    for number in range(4):
        played.ask(number)
    assert played.next() == played.lib.NEXT_PACKET
    assert played.under_way() == (3, 3 * 4096)
    played.endings[1](0)
    played.ask(9)
    turn(played)
    assert played.under_way() == (3, 3 * 4096)


def test_more_than_there_are_slots(played: Played) -> None:
    for number in range(256):
        played.ask(number, 1)
        turn(played)
    played.ask(256, 1)
    assert played.next() == played.lib.NEXT_PACKET
    for ending in reversed(played.endings):
        ending(0)
    assert played.answered() == list(range(255, -1, -1))
    played.ask(257, 1)
    turn(played)


def test_whoever_waits_is_woken_by_each_end(played: Played) -> None:
    for number in range(3):
        played.ask(number)
    turn(played)
    played.endings[0](0)
    assert not played.was_woken()
    assert played.under_way(watch=True)[0] == 2
    played.endings[1](0)
    assert played.was_woken()
    played.offer()
    played.endings[2](0)
    assert not played.was_woken()


def test_an_answer_that_cannot_be_sent_is_pythons(played: Played) -> None:
    played.worker.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            played.worker.send(bytes(16))
    played.ask(1)
    turn(played)
    played.endings[0](0)
    assert played.was_woken()
    assert played.taken() == (1, 0)


def test_a_daemon_that_is_gone_needs_no_answer(played: Played) -> None:
    played.ask(1)
    turn(played)
    played.daemon.close()
    played.endings[0](0)
    assert played.under_way() == (0, 0)
    assert played.taken() is None
    assert played.next() == played.lib.NEXT_PACKET
    assert played.received.length == 0


def test_python_has_its_turn_however_many_there_are(played: Played) -> None:
    played.inside = lambda: played.endings[-1](0)
    for number in range(100):
        played.ask(number)
    turn(played)
    assert len(played.calls) == 64
    turn(played)
    assert len(played.calls) == 100


def test_it_sleeps_until_something_is_due(played: Played) -> None:
    began = time.monotonic()
    assert played.next(time.monotonic_ns() + 200_000_000) == played.lib.NEXT_TURN
    assert 0.19 < time.monotonic() - began < 5
    os.eventfd_write(played.woken, 1)
    assert played.next((1 << 63) - 1) == played.lib.NEXT_TURN


def test_python_looks_soon_after_reads_were_served(played: Played) -> None:
    """A signal may have come meanwhile that has interrupted no sleep."""
    played.ask(1)
    began = time.monotonic()
    assert played.next((1 << 63) - 1) == played.lib.NEXT_TURN
    assert 0.9 < time.monotonic() - began < 5


def test_descriptors_come_along_and_no_others_stay(played: Played) -> None:
    before = len(os.listdir("/proc/self/fd"))
    header = protocol.request_header(Op.LEND, 1)
    numbers = [os.dup(0), os.dup(0)]
    rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers)
    played.daemon.sendmsg([header], [rights])
    assert played.next() == played.lib.NEXT_PACKET
    assert played.received.fd >= 0
    assert not os.get_inheritable(played.received.fd)
    for number in (*numbers, played.received.fd):
        os.close(number)
    assert len(os.listdir("/proc/self/fd")) == before


def test_figures(played: Played) -> None:
    for number in range(3):
        played.ask(number)
    turn(played)
    for code, ending in zip((0, 0, 5), played.endings, strict=True):
        ending(code)
    figures = reads_c.ffi.new("uint64_t[]", 67)
    played.lib.reads_figures(played.reads, figures)
    failures, moved, nanoseconds, *buckets = figures
    assert (failures, moved, sum(buckets)) == (1, 8192, 3)
    assert 0 < nanoseconds < 60e9
    came_back = reads_c.ffi.new("uint64_t *")
    moved_at = played.lib.reads_news(played.reads, 0, came_back)
    assert came_back[0] == 8192
    assert 0 <= time.monotonic_ns() - moved_at < 60e9
    played.lib.reads_news(played.reads, 0, came_back)
    assert came_back[0] == 0
