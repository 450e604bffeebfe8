"""``vddkfs umount``: unmount, and return when the daemon is gone."""

import argparse
import os
import select

from vddkfs.control import ask
from vddkfs.errors import DaemonDied, MountBusy, NotMounted
from vddkfs.mountinfo import FILE_SYSTEM
from vddkfs.mounts import holders, mounted_at, unmount
from vddkfs.state import canonical, log_path, socket_path

SUMMARY = "unmount, and wait for the daemon to be gone"
DESCRIPTION = """\
Unmount MOUNTPOINT and wait until its daemon is gone. A mount whose daemon has died is removed too.
"""
_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="where a vddkfs mount is")
    parser.add_argument(
        "-l",
        "--lazy",
        action="store_true",
        help="take the mount out of sight now, and away when its last file is closed",
    )


def run(arguments: argparse.Namespace) -> int:
    """Unmount. Returns 0, or raises NotMounted, MountBusy or DaemonDied."""
    place = canonical(arguments.mountpoint)
    mounted = mounted_at(place)
    if mounted is None or mounted.kind != FILE_SYSTEM:
        raise NotMounted(f"{arguments.mountpoint}: no vddkfs mount there")
    try:
        daemon = os.pidfd_open(int(ask(place, "status")["pid"]))
    except (NotMounted, ProcessLookupError):
        # The daemon is dead, or hangs: the mount can go all the same.
        _unmount(place, arguments.lazy)
        socket_path(place).unlink(missing_ok=True)
        log_path(place).unlink(missing_ok=True)
        return 0
    try:
        _unmount(place, arguments.lazy)
        if not arguments.lazy and not select.select([daemon], [], [], _SECONDS)[0]:
            raise DaemonDied(
                f"{place} is unmounted, but its daemon has not ended within {_SECONDS:g} s",
                advice="look at its log",
            )
    finally:
        os.close(daemon)
    return 0


def _unmount(place: str, lazy: bool) -> None:
    try:
        unmount(place, lazy=lazy)
    except MountBusy as error:
        raise MountBusy(
            error.message, cause="; ".join(holders(place)), advice=error.advice
        ) from None
