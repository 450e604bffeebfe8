"""``vddkfs info``: what a SOURCE holds, and what would be mounted of it."""

import argparse
import json
import sys
from typing import Any

from vddkfs.commands.arguments import add_mount_options
from vddkfs.disks.describe import describe_source
from vddkfs.engines.vmdk.text import printable
from vddkfs.observe.summary import human
from vddkfs.options import parse_options
from vddkfs.source import open_source

SUMMARY = "show what would be mounted"
DESCRIPTION = """\
Show the disks of SOURCE, the links of their chains, and what would be left out and why.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder of VMDKs, an .ova, a .vmx or a .vmdk"
    )
    parser.add_argument("--json", action="store_true", help="print what vm.json would hold")
    add_mount_options(parser, "mount options; follow_parents= and raw_devices= matter here")


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


def _rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for disk in found["disks"]:
        for number, link in enumerate(disk["links"]):
            # A file that several extents are in occupies its space once.
            files = {extent["file"]: extent["allocated"] for extent in link["extents"]}
            last = number == len(disk["links"]) - 1
            file = f"{disk['name']}/chain/{number}.raw" + (" = disk.raw" if last else "")
            size = human(link["capacity"])
            facts = link["format"], link["file"], link["cid"], link["parent_cid"], _extents(link)
            cells = file, size, human(sum(files.values())), *facts
            rows.append(tuple(map(printable, cells)))
    return rows


def _extents(link: dict[str, Any]) -> str:
    """Return how many extents of each kind there are, in order of their kinds' first."""
    kinds = [extent["kind"] for extent in link["extents"]]
    counts = [(kinds.count(kind), kind) for kind in dict.fromkeys(kinds)]
    return " + ".join(f"{count} {kind}" if count > 1 else kind for count, kind in counts) or "none"


def _remarks(found: dict[str, Any]) -> list[str]:
    """Return what there is to say below the table: the disks' hardware, tracking, odd states."""
    lines = []
    for disk in found["disks"]:
        facts = [f"{name} {disk[key]}" for key, name in _FACTS if disk.get(key)]
        if facts:
            lines.append(f"{disk['name']}: {', '.join(facts)}")
        for link in disk["links"]:
            if tracking := link.get("change_tracking"):
                lines.append(f"{link['file']}: changes are tracked in {tracking}")
            lines += [f"{link['file']}: note: {note}" for note in link.get("notes", ())]
    lines += [f"left out: {left['reason']}" for left in found["left_out"]]
    return [printable(line) for line in lines]


_HEADINGS = ("file", "capacity", "allocated", "format", "link", "cid", "parent cid", "extents")
_WIDE = 5
"""How many of the columns a person's table has; the others come as lines below it."""
_FACTS = (
    ("adapter", "adapter"),
    ("hardware_version", "hardware version"),
    ("tools_version", "tools version"),
    ("uuid", "uuid"),
)


def _print_table(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, because rich takes brackets in plain strings, which file names may hold, for markup.
    table = Table(title=Text(printable(found["source"])), title_justify="left")
    for heading in _HEADINGS[:_WIDE]:
        table.add_column(heading, justify="right" if heading in _HEADINGS[1:3] else "left")
    for row in _rows(found):
        table.add_row(*(Text(cell) for cell in row[:_WIDE]))
    console = Console()
    console.print(table)
    for file, *_, cid, parent, extents in _rows(found):
        told = f"{file}: cid {cid}, parent cid {parent}, extents {extents}"
        console.print(told, markup=False, soft_wrap=True)
    for remark in _remarks(found):
        console.print(remark, markup=False, soft_wrap=True)


def _print_lines(found: dict[str, Any]) -> None:
    print("\t".join(_HEADINGS))
    for row in _rows(found):
        print("\t".join(row))
    for remark in _remarks(found):
        print(remark)
