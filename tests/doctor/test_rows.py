"""Checks are bounded, and none ends the command."""

import threading
import time

import pytest

from vddkfs.doctor.rows import Row, TimedOut, bounded, sheltered, within, worst
from vddkfs.errors import AccessDenied


def test_the_worst_counts() -> None:
    rows = [Row("ok", "a", "b"), Row("failure", "a", "b", "c"), Row("warning", "a", "b", "c")]
    assert worst(rows) == "failure"
    assert worst(rows[:1]) == "ok"
    assert worst([rows[0], rows[2]]) == "warning"
    assert worst([]) == "ok"


def test_what_hangs_is_left_to_itself() -> None:
    release = threading.Event()

    def hang() -> list[Row]:
        release.wait()
        return []

    began = time.monotonic()
    [row] = bounded("the disk", 0.05, hang, level="warning", remedy="pull the plug")
    assert time.monotonic() - began < 5
    assert row == Row("warning", "the disk", "no answer within 0.05 s", "pull the plug")
    with pytest.raises(TimedOut):
        within(0.05, release.wait)
    release.set()


def test_a_result_comes_through() -> None:
    assert bounded("x", 5, lambda: [Row("ok", "x", "y")]) == [Row("ok", "x", "y")]
    assert within(5, lambda: 7) == 7


@pytest.mark.parametrize(
    ("error", "level", "remedy"),
    [
        (AccessDenied("no way", cause="mode 0", advice="chmod it"), "failure", "chmod it"),
        (AccessDenied("no way"), "failure", "look at the log"),
        (PermissionError(13, "Permission denied"), "warning", "look at it as root"),
        (KeyError("odd"), "warning", "bug in vddkfs"),
        (SystemExit(3), "", ""),
    ],
)
def test_what_is_raised_becomes_a_row(error: BaseException, level: str, remedy: str) -> None:
    def check() -> list[Row]:
        raise error

    if not level:
        with pytest.raises(SystemExit):
            sheltered("x", check)
        return
    for [row] in (bounded("x", 5, check), sheltered("x", check)):
        assert (row.level, row.what) == (level, "x")
        assert remedy in row.remedy


def test_a_finding_is_one_line_without_a_secret() -> None:
    def check() -> list[Row]:
        raise AccessDenied("password=S3cr3t-probe\nis bad")

    [row] = sheltered("x", check)
    assert "S3cr3t" not in row.finding
    assert "\n" not in row.finding
