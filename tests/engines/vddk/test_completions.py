"""The table of asynchronous requests."""

import pytest

from vddkfs.engines.vddk.calls import Ledger
from vddkfs.engines.vddk.completions import Completions, Pending


class Table:
    def __init__(self) -> None:
        self.events: list[object] = []
        self.ledger = Ledger()
        self.table = Completions(self.ledger, lambda text: self.events.append(f"! {text}"))

    def add(self, owner: int = 1) -> int:
        return self.table.add(
            Pending(
                "VixDiskLib_ReadAsync",
                owner,
                512,
                self.events.append,
                lambda: self.events.append("released"),
            )
        )


@pytest.fixture
def table() -> Table:
    return Table()


def test_once_and_the_buffer_is_let_go_before(table: Table) -> None:
    key = table.add()
    assert table.table.count() == 1
    assert table.table.finish(key, 0)
    assert table.events == ["released", 0]
    assert not table.table.finish(key, 0)
    assert len(table.events) == 3
    assert table.table.stray == 1
    assert table.table.count() == 0
    assert table.ledger.snapshot()["VixDiskLib_ReadAsync"].bytes == 512


def test_a_failed_call_is_withdrawn_silently(table: Table) -> None:
    key = table.add()
    assert table.table.withdraw(key, 14011)
    assert table.events == ["released"]
    assert not table.table.withdraw(key, 14011)
    figures = table.ledger.snapshot()["VixDiskLib_ReadAsync"]
    assert (figures.count, figures.failures, figures.bytes) == (1, 1, 0)


def test_wait_settles_what_is_in_doubt_on_its_own_handle(table: Table) -> None:
    sure, unsure, other = table.add(1), table.add(1), table.add(2)
    table.table.doubt(unsure)
    table.table.doubt(other)
    table.table.settle(1)
    assert table.table.count(1) == 1
    assert table.table.count(2) == 1
    assert table.table.finish(sure, 0)
    assert table.table.finish(other, 0)
    table.table.doubt(unsure)


def test_an_exception_of_the_receiver_stops_here(table: Table) -> None:
    def fail(code: int) -> None:
        raise OSError(f"code {code}")

    key = table.table.add(Pending("VixDiskLib_ReadAsync", 1, 512, fail, lambda: None))
    assert table.table.finish(key, 0)
    assert table.events == ["! a completion failed: OSError('code 0')"]
