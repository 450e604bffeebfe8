"""``vddkfs status``: what a running mount is doing, asked over its control socket."""

import argparse
import json
from typing import Any

from vddkfs.commands.info import human
from vddkfs.control import ask
from vddkfs.errors import NotMounted

SUMMARY = "show what a mount is doing"
DESCRIPTION = """\
Ask the daemon of MOUNTPOINT what it is doing. Works also while a disk of the mount hangs.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="where a vddkfs mount is")
    parser.add_argument("--json", action="store_true", help="print what .vddkfs/status.json holds")


def run(arguments: argparse.Namespace) -> int:
    """Print the status. Returns 0, or raises NotMounted."""
    found = ask(arguments.mountpoint, "status")
    if "error" in found:
        raise NotMounted(f"{arguments.mountpoint}: the daemon refused: {found['error']}")
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def _print(found: dict[str, Any]) -> None:
    cache = found["cache"]
    print(
        f"{found['source']} at {found['mountpoint']} (pid {found['pid']}, vddkfs {found['vddkfs']})"
    )
    print(f"up {found['uptime']:.0f} s, {found['open_files']} files open")
    print(
        f"cache {human(cache['size'])} of {human(cache['limit'])}: {cache['hits']} hits, "
        f"{cache['misses']} misses, {cache['prefetched']} blocks read ahead"
    )
    for disk in found["disks"]:
        print(f"{disk['name']}: {human(disk['capacity'])}, {disk['links']} links")
        for worker in disk["workers"]:
            _print_worker(worker)
    print(f"log: {found['log']}")
    for line in found["warnings"]:
        print(line)


def _print_worker(worker: dict[str, Any]) -> None:
    pid = f", pid {worker['pid']}" if worker["pid"] else ""
    print(
        f"  worker {worker['name']}: {worker['state']}{pid}, {worker['requests']} requests, "
        f"{worker['in_flight']} in flight, {worker['queued']} queued, oldest "
        f"{worker['oldest_request']:.1f} s; {worker['restarts']} restarts, {worker['resent']} "
        f"sent again, {worker['errors']} errors"
    )
    for line in worker["last_errors"]:
        print(f"    {line}")
