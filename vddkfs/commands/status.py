"""``vddkfs status``: what a running mount is doing, asked over its control socket."""

import argparse
import json
import math
from typing import Any, Final

from vddkfs.commands.watch import watch
from vddkfs.control import ask
from vddkfs.errors import NotMounted, UsageError
from vddkfs.observe import summary

SUMMARY = "show what a mount is doing"
DESCRIPTION = """\
Ask the daemon of MOUNTPOINT what it is doing. Works also while a disk of the mount hangs.
"""
_SECONDS: Final = 1.0
"""Between two looks, unless the operator wants another time."""
_FEWEST, _MOST = 0.1, 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.usage = f"{parser.prog} [-h] [--json | --metrics | --watch [SECONDS]] MOUNTPOINT"
    # May be missing, because a mount point behind --watch is taken for its value at first.
    parser.add_argument(
        "mountpoint", metavar="MOUNTPOINT", nargs="?", help="where a vddkfs mount is"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print what .vddkfs/status.json holds")
    how.add_argument("--metrics", action="store_true", help="print what .vddkfs/metrics holds")
    how.add_argument(
        "--watch",
        nargs="?",
        const=str(_SECONDS),
        metavar="SECONDS",
        help="show what goes on, again every SECONDS (default: 1) until it is interrupted",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the status. Returns 0, or raises NotMounted, or UsageError for a bad interval."""
    mountpoint, seconds = _asked(arguments)
    if arguments.watch is not None:
        return watch(mountpoint, seconds, lambda: look(mountpoint, "status"))
    if arguments.metrics:
        print(look(mountpoint, "metrics")["metrics"], end="")
        return 0
    found = look(mountpoint, "status")
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for line in summary.report(found):
            print(line)
    return 0


def look(mountpoint: str, what: str) -> dict[str, Any]:
    """Return what the daemon says. Raises NotMounted where there is none, or it refuses."""
    found = ask(mountpoint, what)
    if "error" in found:
        raise NotMounted(f"{mountpoint}: the daemon refused: {found['error']}")
    return found


def _asked(arguments: argparse.Namespace) -> tuple[str, float]:
    """Return the mount point, and the seconds between two looks."""
    mountpoint, seconds = arguments.mountpoint, arguments.watch
    if mountpoint is None and seconds is not None and not _is_number(seconds):
        mountpoint, seconds = seconds, str(_SECONDS)
    if mountpoint is None:
        raise UsageError("MOUNTPOINT is missing", advice="`vddkfs status --help` tells the usage")
    if seconds is None:
        return mountpoint, _SECONDS
    if not _is_number(seconds) or not _FEWEST <= float(seconds) <= _MOST:
        raise UsageError(f"--watch {seconds}: from {_FEWEST:g} to {_MOST:g} seconds are possible")
    return mountpoint, float(seconds)


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False
