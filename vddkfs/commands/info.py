"""``vddkfs info``: what a SOURCE holds, and what would be mounted of it."""

import argparse
import json
import sys
from typing import Any

from vddkfs.disks.describe import describe_source
from vddkfs.observe.summary import human
from vddkfs.options import parse_options
from vddkfs.source import open_source

SUMMARY = "show what would be mounted"
DESCRIPTION = """\
Show the disks of SOURCE, the links of their chains, and what would be left out and why.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", metavar="SOURCE", help="a folder of VMDKs, a .vmx or a .vmdk")
    parser.add_argument("--json", action="store_true", help="print what vm.json would hold")
    parser.add_argument(
        "-o",
        dest="options",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="mount options; follow_parents= is the one that matters here",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the description. Returns 0, or raises if nothing could be mounted."""
    options = parse_options(arguments.options)
    found = describe_source(open_source(arguments.source, options))
    if arguments.json:
        print(json.dumps(found, indent=2))
    elif sys.stdout.isatty():
        _print_table(found)
    else:
        _print_lines(found)
    return 0


def _rows(found: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for disk in found["disks"]:
        for number, link in enumerate(disk["links"]):
            allocated = sum(extent["allocated"] for extent in link["extents"])
            last = number == len(disk["links"]) - 1
            file = f"{disk['name']}/chain/{number}.raw" + (" = disk.raw" if last else "")
            size = human(link["capacity"])
            rows.append((file, size, human(allocated), link["format"], link["file"]))
    return rows


_HEADINGS = ("file", "capacity", "allocated", "format", "link")


def _print_table(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, because rich takes brackets in plain strings, which file names may hold, for markup.
    table = Table(title=Text(found["source"]), title_justify="left")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading in _HEADINGS[1:3] else "left")
    for row in _rows(found):
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    console.print(table)
    for left in found["left_out"]:
        console.print(f"left out: {left['reason']}", markup=False)


def _print_lines(found: dict[str, Any]) -> None:
    print("\t".join(_HEADINGS))
    for row in _rows(found):
        print("\t".join(row))
    for left in found["left_out"]:
        print(f"left out: {left['reason']}")
