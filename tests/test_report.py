"""How steps are told to a person."""

import pytest

from vddkfs.engines.base import Step
from vddkfs.report import duration, line, lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 ms"),
        (0.00034, "0.3 ms"),
        (0.00094, "0.9 ms"),
        (0.00096, "1 ms"),
        (0.0124, "12 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (4.24, "4.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (125.4, "2 min 5 s"),
        (3600, "60 min 0 s"),
    ],
)
def test_a_time_is_told_in_its_own_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_steps_make_a_table_of_plain_lines() -> None:
    told = lines(
        [
            Step("library", "web", "closed and opened again", 12.5),
            Step("kernel", "web/chain/0.raw", "it waits", 5.0, done=False),
        ]
    )
    assert told == [
        "library  web              12.5 s  closed and opened again",
        "kernel   web/chain/0.raw   5.0 s  not done: it waits",
    ]
    assert lines([]) == []


def test_a_step_is_one_line_of_a_log() -> None:
    step = Step("cache", "web", "dropped", 0.002)
    assert line(step) == "cache: web: dropped (2 ms)"
    assert "not done: why" in line(Step("cache", "web", "why", 0, done=False))
