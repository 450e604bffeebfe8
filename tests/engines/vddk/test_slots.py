"""Slots of sessions: kernel locks on files, which every worker of the machine looks at."""

from pathlib import Path

import pytest

from vddkfs.engines.vddk import slots
from vddkfs.engines.vddk.slots import SessionSlots


def test_whoever_waits_is_seen_and_gets_what_is_given_back(tmp_path: Path) -> None:
    holder, waiter = (SessionSlots(tmp_path, "vc", 1) for _ in range(2))
    assert holder.take()
    assert not holder.wanted()
    assert not waiter.take()
    assert holder.wanted()
    holder.give_back()
    assert waiter.take()
    assert not holder.wanted()
    for one in (holder, waiter):
        one.close()


def test_another_who_looks_is_nobody_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All holders look each second, and hold the lock for a moment as they do."""
    holder = SessionSlots(tmp_path, "vc", 1)
    assert holder.take()
    lock = slots._lock
    looks: list[int] = []

    def busy_at_first(fd: int, how: int) -> bool:
        looks.append(fd)
        return len(looks) > 1 and lock(fd, how)

    monkeypatch.setattr(slots, "_lock", busy_at_first)
    assert not holder.wanted()
    holder.close()


def test_no_limit_takes_nothing(tmp_path: Path) -> None:
    free = SessionSlots(tmp_path, "vc", 0)
    assert free.take()
    assert free.held == 0
    assert not free.wanted()
    assert list(tmp_path.iterdir()) == []
