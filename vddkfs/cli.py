"""The command line: one sub-command a module of ``vddkfs.commands``, and the form that mount(8)
calls.

An expected failure is one line on stderr and the exit code of its class (see ``vddkfs.errors``).
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final, NoReturn

from vddkfs import __version__
from vddkfs.commands import check, cleanup, doctor, info, invalidate, mount, overlay, status, umount
from vddkfs.errors import ALL_ERRORS, EXIT_BUG, EXIT_OK, UsageError, VddkfsError
from vddkfs.options import without_rw

COMMANDS: Final = {
    "mount": mount,
    "umount": umount,
    "info": info,
    "check": check,
    "status": status,
    "invalidate": invalidate,
    "overlay": overlay,
    "doctor": doctor,
    "cleanup": cleanup,
}

_DESCRIPTION: Final = """\
Mount VMware virtual machine disks, at every point of their snapshot chains, as raw block files.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, advice=f"`{self.prog} --help` tells the usage")


class _Version(argparse.Action):
    def __call__(self, *_: object) -> None:
        from vddkfs.fuse import session

        import pyfuse3  # isort: skip  (after vddkfs.fuse.session, which loads the C module)

        hooks = "" if session.has_hooks() else ", without the C module"
        print(
            f"vddkfs {__version__} (pyfuse3 {pyfuse3.__version__}, "
            f"libfuse {session.libfuse_version()}, engine vmdk {__version__}{hooks})"
        )
        sys.exit(0)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    codes = [(EXIT_OK, "done"), (EXIT_BUG, "a bug in vddkfs")]
    codes += [(kind.exit_code, kind.__doc__ or "") for kind in ALL_ERRORS]
    epilog = "exit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in codes)
    top = _Parser(
        prog="vddkfs",
        description=_DESCRIPTION,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="vddkfs COMMAND ... | vddkfs SOURCE MOUNTPOINT [-o OPTIONS]",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show all versions and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, prog="vddkfs")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # Names that are not UTF-8 are shown escaped: a listing must not end at one.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    mount8 = len(words) > 1 and not words[0].startswith("-") and words[0] not in COMMANDS
    if mount8:
        words.insert(0, "mount")
    try:
        parsed = parser().parse_args(words)
        if mount8:
            parsed.options = without_rw(parsed.options)
        return int(parsed.run(parsed))
    except VddkfsError as error:
        print(f"vddkfs: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has gone; let nothing be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        print("vddkfs: this is a bug in vddkfs; please report the lines above", file=sys.stderr)
        return EXIT_BUG
