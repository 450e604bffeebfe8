"""``vddkfs status --watch``: what goes on in a mount, looked at again and again."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from vddkfs.errors import NotMounted
from vddkfs.observe import summary
from vddkfs.observe.summary import Pace, human, percent, printable
from vddkfs.state import canonical, socket_path

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Found = dict[str, Any]
Show = Callable[[Found | None, Found, float], None]
"""Shows what is now, and what went on in the seconds since a look before, if there was one."""

_GOING_DOWN: Final = 0.5
"""Seconds after which the socket of a mount that goes down is gone."""
_WARNINGS: Final = 5
"""How many of the last warnings are shown below the table."""
_COLUMNS: Final = (
    *("disk, worker", "reads /s", "bytes /s", "hits", "source /s", "cache"),
    *("state", "in flight", "queued", "oldest", "lost", "errors"),
)


def watch(mountpoint: str, seconds: float, look: Callable[[], Found]) -> int:
    """Show what *look* finds, every *seconds*. Returns 0 when that is interrupted.

    Raises NotMounted when the mount is gone.
    """
    shown = _on_screen() if sys.stdout.isatty() else _in_lines()
    with contextlib.suppress(KeyboardInterrupt), shown as show:
        now, since = look(), time.monotonic()
        show(None, now, seconds)
        while True:
            time.sleep(max(0.0, since + seconds - time.monotonic()))
            before, now = now, _look_again(mountpoint, look)
            until = time.monotonic()
            # The counters of another daemon at the same place begin anew.
            same = summary.same_mount(before, now)
            show(before if same else None, now, until - since)
            since = until
    return 0


def _look_again(mountpoint: str, look: Callable[[], Found]) -> Found:
    try:
        return look()
    except NotMounted:
        time.sleep(_GOING_DOWN)
        if not socket_path(canonical(mountpoint)).exists():
            raise NotMounted(f"{mountpoint}: it is not mounted any more") from None
        return look()


@contextlib.contextmanager
def _in_lines() -> Iterator[Show]:
    """Print lines for other programs: what the mount is, and then what went on."""

    def show(before: Found | None, now: Found, seconds: float) -> None:
        if before is None:
            lines = iter([summary.title(now)])
        else:
            lines = summary.interval(before, now, seconds)
        clock = time.strftime("%H:%M:%S")
        print(*(f"{clock} {line}" for line in lines), sep="\n", flush=True)

    yield show


@contextlib.contextmanager
def _on_screen() -> Iterator[Show]:
    """Draw a table for a person, each in the place of the one before."""
    from rich.live import Live

    with Live(auto_refresh=False) as live:

        def show(before: Found | None, now: Found, seconds: float) -> None:
            live.update(_picture(before, now, seconds), refresh=True)

        yield show


def _picture(before: Found | None, now: Found, seconds: float) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    went = summary.pace(before or now, now, seconds)
    cache = now["cache"]
    lines = [
        summary.title(now),
        summary.pace_words(went, now["in_flight"], now["queued"]),
        f"cache {human(cache['size'])} of {human(cache['limit'])}, "
        f"{now['open_files']} files open, up {now['uptime']:.0f} s",
        summary.latency(now),
    ]
    warnings = [printable(line) for line in now["warnings"][-_WARNINGS:]]
    # Text, because rich takes brackets in plain strings, which names may hold, for markup.
    return Group(*map(Text, lines), _table(before, now, seconds), *map(Text, warnings))


def _table(before: Found | None, now: Found, seconds: float) -> "Table":
    """Return a row for each disk, and one for each worker of a disk that has several."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in _COLUMNS:
        left = heading in ("disk, worker", "state")
        table.add_column(heading, justify="left" if left else "right")
    known = {disk["name"]: disk for disk in before["disks"]} if before else {}
    for disk in now["disks"]:
        went = summary.pace(known.get(disk["name"], disk), disk, seconds)
        name = printable(disk["name"])
        cells = [name, *_paced(went), human(disk["cache_held"])]
        workers = [_worker(worker) for worker in disk["workers"]]
        if len(workers) == 1:
            rows = [cells + workers[0][1:]]
        else:
            # Their names begin with that of the disk.
            short = [[each.removeprefix(f"{name}/"), *rest] for each, *rest in workers]
            rows = [cells, *([f"  {each}", *[""] * 5, *rest] for each, *rest in short)]
        for row in rows:
            # Where there is no room the widest column gives of its own: that of the names.
            table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row))
    return table


def _paced(went: Pace) -> list[str]:
    return [
        f"{went.reads:.0f}",
        human(went.bytes),
        percent(went.hit_ratio),
        human(went.source_bytes),
    ]


def _worker(worker: Found) -> list[str]:
    return [
        printable(worker["name"]),
        worker["state"],
        str(worker["in_flight"]),
        str(worker["queued"]),
        f"{worker['oldest_request']:.1f} s",
        str(worker["restarts"]),
        str(worker["errors"]),
    ]
