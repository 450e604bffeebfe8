"""The window of reads in flight: who waits for the end of all is woken by it."""

from vddkfs.engines.vddk.flow import Flow, Piece


def test_the_end_of_the_last_read_wakes_whoever_waits_for_it() -> None:
    """The library's thread that ends a read would tell nobody else."""
    issued: list[Piece] = []
    woken: list[int] = []
    flow = Flow(issued.append, lambda: woken.append(len(issued)))
    for _ in range(2):
        flow.start(0, memoryview(bytearray(512)), lambda error: None)
    flow.ended(issued[0], None)
    flow.draining = True
    assert flow.busy
    assert not woken
    flow.ended(issued[1], None)
    assert not flow.busy
    assert len(woken) == 1
    flow.draining = False
    flow.start(0, memoryview(bytearray(512)), lambda error: None)
    flow.ended(issued[2], None)
    assert len(woken) == 1, "otherwise each completion would wake the main thread in vain"


def sectors(count: int) -> memoryview:
    return memoryview(bytearray(512 * count))


def test_what_needs_stillness_comes_before_all_that_was_not_begun() -> None:
    issued: list[Piece] = []
    woken: list[int] = []
    order: list[str] = []
    flow = Flow(issued.append, lambda: woken.append(1))
    flow.start(0, sectors(1), lambda error: order.append("read"))
    flow.start(8, sectors(1), lambda error: order.append("write"), writes=True)
    for number in range(2):
        flow.when_still(lambda number=number: order.append(f"still {number}"))
    flow.start(16, sectors(1), lambda error: order.append("later"), writes=True)
    assert len(issued) == 2
    assert flow.offer()[0] == 0, "nothing begins elsewhere either"
    assert flow.offer()[2], "and what ends there wakes"
    flow.ended(issued[1], None)
    flow.pump()
    assert order == ["write"]
    assert not flow.draining
    woken.clear()
    flow.ended(issued[0], None)
    assert woken
    flow.pump()
    assert order == ["write", "read", "still 0", "still 1"]
    assert [piece.writes for piece in issued] == [False, True, True]
    flow.ended(issued[2], None)
    assert not flow.busy


def test_what_needs_stillness_is_done_at_once_where_nothing_is_under_way() -> None:
    flow = Flow(lambda piece: None, lambda: None)
    done: list[int] = []
    flow.when_still(lambda: done.append(1))
    assert done == [1]
    assert not flow.busy


class Elsewhere:
    """Reads that somebody else has begun."""

    def __init__(self, requests: int) -> None:
        self.requests = requests
        self.watched = False

    def under_way(self, watch: bool) -> tuple[int, int]:
        self.watched |= watch
        return self.requests, 512 * self.requests

    def news(self) -> tuple[float, int]:
        return 0.0, 0


def test_stillness_is_that_of_others_too() -> None:
    flow = Flow(lambda piece: None, lambda: None)
    others = flow.elsewhere = Elsewhere(1)
    done: list[int] = []
    flow.when_still(lambda: done.append(1))
    assert not done
    assert others.watched, "its end is to wake the main thread"
    others.requests = 0
    flow.pump()
    assert done == [1]


def test_a_refused_write_is_a_smaller_write() -> None:
    issued: list[Piece] = []
    flow = Flow(issued.append, lambda: None)
    flow.start(0, sectors(2048), lambda error: None, writes=True)
    for _ in range(2):
        flow.piece //= 2
    parts = flow._parts(issued[0])
    assert [(part.sector, len(part.memory), part.writes) for part in parts] == [
        (0, 512 * 1024, True),
        (1024, 512 * 1024, True),
    ]
