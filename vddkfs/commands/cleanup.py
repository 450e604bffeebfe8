"""``vddkfs cleanup``: take away what dead mounts left behind."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vddkfs.commands.arguments import add_mount_options
from vddkfs.errors import EXIT_OK, LeftBehind, UsageError
from vddkfs.options import MountOptions, parse_options
from vddkfs.state import state_folder

if TYPE_CHECKING:
    from vddkfs import leftovers

SUMMARY = "remove what dead mounts left behind"
DESCRIPTION = """\
Remove the temporary folders, control sockets and logs of mounts whose daemon is dead, and have
VMware's library detach disks that such a mount had hot-added to this machine.
What belongs to a living mount is left alone.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_mount_options(parser, "mount options; credentials= and libdir= are those that matter here")
    parser.add_argument(
        "--server",
        metavar="NAME",
        default="",
        help="whose hot-added disks the credentials are for, if several servers' were left",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would be done")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Clean up, and print what was done. Returns 0, or raises LeftBehind."""
    from vddkfs import leftovers

    options = parse_options(arguments.options)
    state = state_folder()
    with leftovers.alone(state):
        report = leftovers.clean(state, None, dry=True)
        if not arguments.dry_run:
            report = _clean(state, {one.server for one in report.remaining}, arguments, options)
    if arguments.json:
        print(leftovers.as_json(report))
    else:
        _print(report, "would remove" if arguments.dry_run else "removed")
    if arguments.dry_run or not report.remaining:
        return EXIT_OK
    sys.stdout.flush()
    first = report.remaining[0]
    raise LeftBehind(
        f"{len(report.remaining)} left: {first.path}", cause=first.reason, advice=first.remedy
    )


def _clean(
    state: Path, servers: set[str], arguments: argparse.Namespace, options: MountOptions
) -> "leftovers.Report":
    """Clean up; *servers* are those whose disks may have been left."""
    from vddkfs import leftovers

    secret = _secret(options) if servers - {""} else -1
    if secret < 0:
        return leftovers.clean(state, None)
    try:
        server = _server(arguments.server, servers)
        worker = leftovers.by_worker(secret, options.libdir)
        return leftovers.clean(state, leftovers.only(server, worker))
    finally:
        os.close(secret)


def _secret(options: MountOptions) -> int:
    """Return a descriptor of the credentials, -1 if there are none: nobody is asked for them."""
    from vddkfs.credentials import open_credentials
    from vddkfs.doctor.server import has_credentials

    return open_credentials(options.credentials) if has_credentials(options.credentials) else -1


def _server(given: str, servers: set[str]) -> str:
    """Return the server that the credentials are for: another must not get to see them."""
    servers = servers - {""}
    if given and given not in servers:
        raise UsageError(
            f"--server {given}: nothing was left of that server",
            advice=f"left was something of {', '.join(sorted(servers))}",
        )
    if not given and len(servers) > 1:
        names = ", ".join(sorted(servers))
        raise UsageError(
            f"hot-added disks of several servers were left: {names}",
            advice="say with --server which one the credentials are for",
        )
    return given or min(servers)


def _print(report: "leftovers.Report", verb: str) -> None:
    for path in report.removed:
        print(f"{verb}\t{path}\t")
    if report.cleaned:
        # Detaching may remove the file of the change tracking.
        note = "the next changed-block query of their VM may be full, until its next snapshot"
        print(f"detached\t{report.cleaned} hot-added disks\t{note}")
    for one in report.remaining:
        print(f"remaining\t{one.path}\t{one.reason}; {one.remedy}")
    if not report.removed and not report.cleaned and not report.remaining:
        print("nothing was left by dead mounts")
