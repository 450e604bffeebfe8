"""``vddkfs doctor``: what can work on this machine, and what cannot, with what to do about it."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

import msgspec

from vddkfs import __version__
from vddkfs.commands.arguments import add_mount_options
from vddkfs.errors import EXIT_OK, ChecksFailed
from vddkfs.options import MountOptions, parse_options

if TYPE_CHECKING:
    from vddkfs.doctor.examination import Report

SUMMARY = "say what can work on this machine and what cannot"
DESCRIPTION = """\
Check this machine, VMware's library, and with SOURCE also that: its server, or its files.
Nothing is mounted or changed. A failure is something that SOURCE, or an option, needs.
"""
_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", metavar="SOURCE", nargs="?", default="", help="what is to be mounted"
    )
    add_mount_options(parser)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="ask VMware's library what it answers; with a vddk:// SOURCE, log in and open a disk",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what was found. Returns 0, or raises ChecksFailed."""
    from vddkfs.doctor.examination import examine

    options = parse_options(arguments.options)
    secret = _secret(arguments.source, options) if arguments.probe else -1
    try:
        report = examine(arguments.source, options, ask=arguments.probe, secret=secret)
    finally:
        if secret >= 0:
            os.close(secret)
    if arguments.json:
        print(_json(report, arguments.probe))
    elif sys.stdout.isatty():
        _print_table(report)
    else:
        for row in report.rows:
            print("\t".join((row.level, row.what, row.finding, row.remedy)))
    if report.result != "failure":
        return EXIT_OK
    failed = list(dict.fromkeys(row.what for row in report.rows if row.level == "failure"))
    sys.stdout.flush()
    raise ChecksFailed(f"failed: {', '.join(failed)}", advice="the remedies are named above")


def _secret(source: str, options: MountOptions) -> int:
    """Return a descriptor of the credentials for the probe's login, -1 if it has none to make."""
    from vddkfs.credentials import open_credentials
    from vddkfs.doctor.server import has_credentials
    from vddkfs.doctor.sources import remote_of
    from vddkfs.errors import VddkfsError

    try:
        remote = remote_of(source)
        if remote is None or not remote.server:
            return -1
        # Asked for at the terminal before anything else begins, because that forks.
        if has_credentials(options.credentials) or os.isatty(0):
            return open_credentials(options.credentials)
    except VddkfsError:
        # What is wrong with SOURCE or with the credentials is among the results.
        pass
    return -1


def _json(report: "Report", probed: bool) -> str:
    found = {
        "vddkfs": __version__,
        "result": report.result,
        "checks": msgspec.to_builtins(report.rows),
    }
    if probed:
        found["probe"] = msgspec.to_builtins(report.answers)
    return json.dumps(found, indent=2)


def _print_table(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, because rich takes brackets in plain strings, which file names may hold, for markup.
    table = Table()
    for heading in ("result", "what", "finding", "remedy"):
        table.add_column(heading, overflow="fold")
    for row in report.rows:
        cells = (Text(cell) for cell in (row.what, row.finding, row.remedy))
        table.add_row(Text(row.level, style=_COLOURS[row.level]), *cells)
    Console().print(table)
