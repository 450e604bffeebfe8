"""``vddkfs mount``: check the arguments, start the daemon, and return when the mount answers."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable

from vddkfs.commands.arguments import add_mount_options
from vddkfs.disks.vm import Source
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import EXIT_BUG, DaemonDied, UsageError, VddkfsError
from vddkfs.mounts import check_fuse, check_mountpoint
from vddkfs.observe import logs
from vddkfs.options import OPTIONS, MountOptions, parse_options
from vddkfs.source import open_source
from vddkfs.state import canonical, log_path, state_folder

log = logging.getLogger(__name__)

SUMMARY = "mount a VM's disks"
DESCRIPTION = """\
Mount SOURCE (a folder of VMDKs, an .ova, a .vmx, or one .vmdk) at MOUNTPOINT, an empty folder.
Returns when the mount answers; the daemon goes on in the background.

options for -o:
""" + "\n".join(
    f"  {option.name + ('=' + option.metavar if option.metavar else ''):<28} {option.meaning}"
    for option in OPTIONS
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", metavar="SOURCE", help="what to mount")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an empty folder")
    add_mount_options(parser)
    parser.add_argument(
        "-f", "--foreground", action="store_true", help="stay in front, and log to stderr"
    )


def run(arguments: argparse.Namespace) -> int:
    """Mount. Returns 0, or raises what went wrong."""
    options = parse_options(arguments.options)
    place = canonical(arguments.mountpoint)
    check_mountpoint(place)
    _check_overlay(options.overlay, place)
    check_fuse()
    source = open_source(arguments.source, options)
    for left in source.left_out:
        print(f"vddkfs: left out: {left.reason}", file=sys.stderr)
    for chain in source.chains:
        if chain.unwritable:
            print(f"vddkfs: {chain.name}: only read: {chain.unwritable}", file=sys.stderr)
    state_folder(create=True)
    if arguments.foreground:
        _serve(source, place, options, foreground=True, ready=lambda: None)
        return 0
    return _in_background(source, place, options)


def _check_overlay(folder: str, place: str) -> None:
    """Raise UsageError if the overlay's *folder* would be below the mount at *place*."""
    if not folder.startswith("/"):
        return
    if os.path.commonpath([os.path.realpath(folder), place]) == place:
        raise UsageError(
            f"overlay={printable(folder)}: would be hidden by the mount at {printable(place)}",
            advice="name a folder elsewhere",
        )


def _serve(
    source: Source,
    place: str,
    options: MountOptions,
    *,
    foreground: bool,
    ready: Callable[[], None],
) -> None:
    """Be the daemon."""
    # Imported here: the command that only starts the daemon has no need of trio and pyfuse3.
    import trio

    from vddkfs.daemon import Daemon

    fallback = log_path(place)
    log_to = logs.set_up(options.log, options.log_level, foreground, fallback)
    for left in source.left_out:
        log.warning("left out: %s", left.reason)
    for chain in source.chains:
        if chain.unwritable:
            log.warning("%s is only read: %s", chain.name, chain.unwritable)
    daemon = Daemon(source, place, options, log_to)
    try:
        trio.run(daemon.run, ready)
        log_to.ended_well()
    except BaseExceptionGroup as group:
        raise _expected(group) from group
    finally:
        log_to.close()


def _expected(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the VddkfsError that ended the nurseries, or the first exception in them."""
    matched = group.subgroup(VddkfsError)
    error: BaseException = matched if matched is not None else group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _in_background(source: Source, place: str, options: MountOptions) -> int:
    """Fork the daemon, wait for its word, and return or raise accordingly."""
    told, tell = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(told)
        _become_daemon(source, place, options, tell)
    os.close(tell)
    with open(told, encoding="utf-8") as words:
        line = words.readline()
    if not line:
        _, status = os.waitpid(child, 0)
        raise DaemonDied(
            f"{place}: the daemon ended (status {os.waitstatus_to_exitcode(status)}) before the "
            "mount answered",
            advice="mount with -f to see why",
        )
    answer = json.loads(line)
    if answer["exit_code"]:
        os.waitpid(child, 0)
        print(f"vddkfs: {answer['message']}", file=sys.stderr)
    return int(answer["exit_code"])


def _become_daemon(source: Source, place: str, options: MountOptions, tell: int) -> None:
    """Serve in a process of its own, and never return."""
    code = EXIT_BUG

    def say(exit_code: int, message: str) -> None:
        with open(tell, "w", encoding="utf-8", closefd=True) as words:
            words.write(json.dumps({"exit_code": exit_code, "message": message}) + "\n")

    said = False

    def ready() -> None:
        nonlocal said
        said = True
        _detach()
        say(0, "")

    try:
        os.setsid()
        os.chdir("/")
        # Until the mount is there: SIGHUP then has old content dropped.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _close_all_but({tell, *(plan.secret for plan in source.workers if plan.secret >= 0)})
        _serve(source, place, options, foreground=False, ready=ready)
        code = 0
    except VddkfsError as error:
        code = error.exit_code
        if not said:
            say(code, str(error))
    except BaseException:
        if not said:
            sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _close_all_but(kept: set[int]) -> None:
    """Close every descriptor from 3 on that is not in *kept*."""
    first = 3
    for fd in sorted(kept):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def _detach() -> None:
    """Let go of the terminal: until now errors could be printed there."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
