"""``vddkfs overlay``: what was written to overlays, and what becomes of it."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from vddkfs.commands import export
from vddkfs.control import ask
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import EXIT_OK, NotMounted, OverlayError, UsageError
from vddkfs.mountinfo import FILE_SYSTEM, Entry, entries
from vddkfs.observe.summary import human
from vddkfs.state import socket_path

if TYPE_CHECKING:
    from vddkfs.disks.overlay.manage import Summary

SUMMARY = "show, export or discard what was written to an overlay"
DESCRIPTION = """\
Look after the folders that were given as overlay= when SOURCE was mounted. Nothing here touches
the source, and list, show and `export --format json` work beside a mount that is using the folder.

  vddkfs overlay list                                of the mounts that are running
  vddkfs overlay list /var/overlays                  of the overlays in a folder
  vddkfs overlay show /var/overlays/web01
  vddkfs overlay export /var/overlays/web01 web01/disk.raw --format vmdk web01-changed.vmdk
  vddkfs overlay discard /var/overlays/web01
"""
_EXPORT: Final = """\
Write what the fork of an image holds, or what it makes of its source, to a new file:

  json  the changed extents: where, how long, and whether they are zeros
  raw   the whole disk, merged; what is a hole stays one
  vmdk  the changed grains of 64 KiB as a child link of the source's link

raw and vmdk read the source, which must be what the overlay was made on, and refuse an overlay
that a mount is using: copy the image's file from that mount instead.

  vddkfs overlay export /var/overlays/web01 web01/disk.raw changed.json
  vddkfs overlay export /var/overlays/web01 web01/disk.raw --format raw web01.raw
"""
_MARK: Final = "overlay.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: one sub-command for each thing to do."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, what: str, more: str) -> argparse.ArgumentParser:
        return actions.add_parser(
            name,
            help=what,
            description=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    what = "list overlays"
    one = action("list", what, "A line for each overlay: whose it is, how large, how old, in use.")
    one.add_argument(
        "folders",
        metavar="DIR",
        nargs="*",
        help="an overlay, or a folder of overlays; by default those of the running mounts",
    )
    one.add_argument("--json", action="store_true", help="print the list as JSON")

    what = "show the images that were written in an overlay"
    one = action("show", what, "Show what an overlay belongs to, and each image written in it.")
    one.add_argument("folder", metavar="DIR", help="the overlay")
    one.add_argument("--json", action="store_true", help="print it as JSON")

    what = "give up what was written"
    one = action("discard", what, "Remove what was written to an image, or to all of an overlay.")
    one.add_argument("folder", metavar="DIR", help="the overlay")
    one.add_argument("image", metavar="IMAGE", nargs="?", help="only that image (default: all)")
    one.add_argument("--yes", action="store_true", help="do not ask")

    export.add_arguments(action("export", "write an image, or its changes, to a file", _EXPORT))


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked. Returns 0, or raises OverlayError, UsageError, or what a source raises."""
    if arguments.action == "export":
        return export.run(arguments)
    return {"list": _list, "show": _show, "discard": _discard}[arguments.action](arguments)


# list


def _list(arguments: argparse.Namespace) -> int:
    folders = list(_in(arguments.folders)) if arguments.folders else list(_mounted())
    found = [_looked_at(folder, mount) for folder, mount in folders]
    if arguments.json:
        print(json.dumps({"overlays": found}, indent=2))
    else:
        _print(_COLUMNS, [_row(each) for each in found], right=range(3, 6))
    return EXIT_OK


_COLUMNS: Final = ("overlay", "disks", "images", "changed", "stored", "age", "in use", "problem")


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    forks = found["forks"]
    problems = [found["problem"], *(fork["problem"] for fork in forks)]
    return (
        found["folder"],
        ", ".join(disk["name"] for disk in found["source"]),
        ", ".join(fork["name"] for fork in forks) or "-",
        human(sum(fork["changed_bytes"] for fork in forks)),
        human(sum(fork["stored_bytes"] for fork in forks)),
        age(time.time() - found["created"]) if found["created"] else "-",
        found["mountpoint"] or ("yes" if found["in_use"] else "no"),
        "; ".join(filter(None, problems)),
    )


def _looked_at(folder: str, mountpoint: str) -> dict[str, Any]:
    """Return what ``show`` says of the overlay *folder*, and what is wrong where it cannot."""
    from vddkfs.disks.overlay import manage

    try:
        found = _plain(manage.show(folder)) | {"problem": ""}
    except OverlayError as error:
        found = {"folder": folder, "created": 0, "in_use": bool(mountpoint)}
        found |= {"source": [], "forks": [], "problem": str(error)}
    return found | {"mountpoint": mountpoint}


def _in(folders: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the overlays that *folders* are, or have in them; what else is in those is passed over.

    Raises OverlayError for one where there are none.
    """
    for given in folders:
        folder = os.path.abspath(given)
        if os.path.lexists(os.path.join(folder, _MARK)):
            yield folder, ""
            continue
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise OverlayError(
                f"{printable(folder)}: cannot be looked into",
                cause=str(error.strerror),
                advice="name an overlay, or a folder of overlays",
            ) from None
        found = [os.path.join(folder, name) for name in names]
        found = [each for each in found if os.path.lexists(os.path.join(each, _MARK))]
        if not found:
            raise OverlayError(
                f"{printable(folder)}: there is no overlay",
                advice="name the folder that was given as overlay=, or the one it is in",
            )
        yield from ((each, "") for each in found)


def _mounted() -> Iterator[tuple[str, str]]:
    """Yield the overlays of the running mounts, with their mount points.

    A mount that does not answer is named on stderr.
    """
    for place in _mountpoints(entries()):
        try:
            folder = ask(place, "status").get("overlay")
        except NotMounted as error:
            print(f"vddkfs: {error}", file=sys.stderr)
            continue
        if folder:
            yield str(folder), place


def _mountpoints(table: Sequence[Entry]) -> list[str]:
    """Return a mount point for each vddkfs mount: the one that its daemon knows, if it is there."""
    places: dict[str, list[str]] = {}
    for entry in table:
        if entry.kind == FILE_SYSTEM:
            places.setdefault(entry.device, []).append(entry.place)
    return [
        next((each for each in found if socket_path(each).exists()), found[0])
        for found in places.values()
    ]


# show


def _show(arguments: argparse.Namespace) -> int:
    from vddkfs.disks.overlay import manage

    found = manage.show(os.path.abspath(arguments.folder))
    if arguments.json:
        print(json.dumps(_plain(found), indent=2))
        return EXIT_OK
    used = (
        "in use by a mount: what it has not flushed is not counted"
        if found.in_use
        else "not in use"
    )
    print(f"{printable(found.folder)}: made {_when(found.created)}, {used}")
    for disk in found.source:
        live = ", live: somebody may write its last link" if disk.live else ""
        links = "1 link" if len(disk.links) == 1 else f"{len(disk.links)} links"
        print(f"{printable(disk.name)}: {human(disk.capacity)}, {links}{live}")
        for number, link in enumerate(disk.links):
            print(f"  {number}: {printable(link.path)}, content id {printable(link.content_id)}")
    rows = [
        (
            fork.name,
            human(fork.capacity),
            human(fork.changed_bytes),
            human(fork.zero_bytes),
            human(fork.stored_bytes),
            _when(fork.created),
            _when(fork.written),
            "yes" if fork.clean else "no",
            fork.problem,
        )
        for fork in found.forks
    ]
    headings = ("image", "capacity", "changed", "zeros", "stored", "made", "written", "closed")
    _print((*headings, "problem"), rows, right=range(1, 5))
    return EXIT_OK


# discard


def _discard(arguments: argparse.Namespace) -> int:
    from vddkfs.disks.overlay import manage

    folder = os.path.abspath(arguments.folder)
    if not arguments.yes:
        _confirm(folder, arguments.image)
    manage.discard(folder, arguments.image)
    return EXIT_OK


def _confirm(folder: str, image: str | None) -> None:
    """Ask whether to discard. Raises UsageError unless the answer is yes."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            f"{printable(folder)}: nobody is there to confirm that it is discarded",
            advice="say --yes to discard it without being asked",
        )
    what = f"what was written to {printable(image)} in" if image else "all of"
    question = f"Discard {what} {printable(folder)}{_amount(folder, image)}? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError(f"{printable(folder)}: not confirmed: nothing was discarded")


def _amount(folder: str, image: str | None) -> str:
    """Return how much would be lost, as far as it can be told. Raises OverlayError if in use."""
    from vddkfs.disks.overlay import manage

    try:
        found = manage.show(folder)
    except OverlayError:
        return " (which is damaged)"
    if found.in_use:
        # Says so, without a question that would be for nothing.
        manage.discard(folder, image)
    forks = [each for each in found.forks if image in (None, each.name)]
    return f" ({human(sum(each.changed_bytes for each in forks))} changed)" if forks else ""


# How it is told


def age(seconds: float) -> str:
    """Return how long ago something was, in one unit: "4 d", "3 h", "2 min", "1 s"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _plain(found: "Summary") -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(found)
    return plain


def _print(headings: Sequence[str], rows: Sequence[Sequence[str]], right: range) -> None:
    """Print a table on a terminal, else lines with tabs. A last column without text is left out."""
    if not any(row[-1] for row in rows):
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    rows = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in (headings, *rows):
            print("\t".join(line))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
