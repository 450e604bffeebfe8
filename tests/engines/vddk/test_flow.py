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
