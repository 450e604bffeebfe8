"""``vddkfs overlay export``: an image of an overlay as a file."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Final

from vddkfs.commands.arguments import add_mount_options
from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import EXIT_OK, UsageError
from vddkfs.options import MountOptions, parse_options

if TYPE_CHECKING:
    from rich.progress import Progress

    from vddkfs.commands.recorded import RecordedDisk
    from vddkfs.disks.overlay.manage import Reading
    from vddkfs.disks.overlay.target import Target
    from vddkfs.disks.overlay.union import Union

FORMATS: Final = ("json", "raw", "vmdk")
_STDOUT: Final = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="DIR", help="the overlay")
    parser.add_argument(
        "image", metavar="IMAGE", help="as its file in the mount is called, and `show` tells"
    )
    parser.add_argument(
        "out", metavar="OUT", help="the new file; of json also -, which is standard output"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="json", help="what is written (default: json)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--quiet", action="store_true", help="show no progress on a terminal")
    add_mount_options(
        parser, "mount options; follow_parents=, raw_devices= and overlay_force= matter here"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the file. Returns 0, or raises OverlayError, UsageError, or what the source raises."""
    folder = os.path.abspath(arguments.folder)
    options = parse_options(arguments.options)
    if arguments.out != _STDOUT:
        _check_outside(folder, os.path.abspath(arguments.out))
    if arguments.format == "json":
        _export_json(folder, arguments)
    elif arguments.out == _STDOUT:
        raise UsageError(
            f"--format {arguments.format}: cannot be written to standard output",
            advice="name a file",
        )
    else:
        _export_disk(folder, arguments, options)
    return EXIT_OK


def _check_outside(folder: str, out: str) -> None:
    """Raise UsageError if the file *out* would be in the overlay *folder*."""
    inside = os.path.realpath(folder) + "/"
    if os.path.realpath(out).startswith(inside):
        raise UsageError(
            f"{printable(out)}: is in the overlay, where nothing else can be",
            advice="name a file in another folder",
        )


def _export_json(folder: str, arguments: argparse.Namespace) -> None:
    from vddkfs.disks.overlay import manage
    from vddkfs.disks.overlay.target import making

    lines = manage.as_json(folder, arguments.image)
    if arguments.out == _STDOUT:
        sys.stdout.writelines(lines)
        sys.stdout.flush()
        return
    with making(arguments.out, arguments.force, _files_of(folder)) as target:
        size = 0
        for line in lines:
            target.write(line.encode(), size)
            size += len(line)


def _export_disk(folder: str, arguments: argparse.Namespace, options: MountOptions) -> None:
    from vddkfs.commands.recorded import RecordedDisk
    from vddkfs.disks.overlay import manage
    from vddkfs.disks.overlay.target import making
    from vddkfs.disks.overlay.union import Union
    from vddkfs.engines.vmdk.files import Trust

    out = os.path.abspath(arguments.out)
    trust = Trust(options.follow_parents == "any", options.raw_devices == "yes")
    notes: list[str] = []
    with ExitStack() as stack:
        found = stack.enter_context(manage.reading(folder, arguments.image))
        target = stack.enter_context(making(out, arguments.force, _files_of(folder)))
        source = RecordedDisk(folder, found, trust, forced=options.overlay_force == "yes")
        stack.enter_context(closing(source))
        bar = stack.enter_context(closing(_Bar(out, not arguments.quiet)))
        union = Union(found.fork, source)
        if arguments.format == "raw":
            _write_raw(union, target, bar)
        else:
            _write_vmdk(union, target, bar, source, out)
            notes = list(_notes(found, source, out))
        source.check_again()
    for note in notes:
        print(f"vddkfs: note: {note}", file=sys.stderr)


def _files_of(folder: str) -> frozenset[tuple[int, int]]:
    """Return the files that the overlay is on, which nothing may take the place of."""
    from vddkfs.disks.overlay import manage

    links = [link for disk in manage.source_of(folder) for link in disk.links]
    return frozenset((stamp.device, stamp.inode) for link in links for stamp in link.files)


def _write_raw(union: "Union", target: "Target", bar: "_Bar") -> None:
    bar.begin(union.capacity)
    target.cut(union.capacity)
    for piece in union.pieces():
        if piece.content is not None:
            target.write(piece.content, piece.offset)
        bar.show(piece.done)


def _write_vmdk(
    union: "Union", target: "Target", bar: "_Bar", source: "RecordedDisk", out: str
) -> None:
    """Write the child *out*, which is called something else until it is whole."""
    from vddkfs.engines.vmdk.write.child import GRAIN_BYTES, write_child

    count = union.touched_grains(GRAIN_BYTES)
    bar.begin(count * GRAIN_BYTES)

    def grains() -> Iterator[tuple[int, memoryview | None]]:
        for piece in union.grains(GRAIN_BYTES):
            yield piece.offset // GRAIN_BYTES, piece.content
            bar.show(piece.done)

    target.cut(write_child(target.write, out, source.parent(), count, grains()))


def _notes(found: "Reading", source: "RecordedDisk", out: str) -> Iterator[str]:
    """Yield what there is to know of a child of *source*."""
    from vddkfs.engines.vmdk.write.child import hint_of

    link = source.links[-1]
    if os.path.isabs(hint_of(out, link.path)):
        yield (
            f"{printable(out)}: its parent is in another folder: "
            "what mounts it must follow that (-o follow_parents=any)"
        )
    if found.number == len(found.disk.links) - 1:
        yield (
            f"{printable(link.path)}: nobody may write it any more: {printable(out)} is its child "
            f"only while its content id is {link.content_id}"
        )


class _Bar:
    """The progress in bytes on stderr, if *wanted* and where that is a terminal."""

    def __init__(self, out: str, wanted: bool) -> None:
        self._bars = _bars() if wanted and sys.stderr.isatty() else None
        if self._bars is not None:
            from rich.markup import escape

            self._task = self._bars.add_task(escape(printable(os.path.basename(out))))

    def begin(self, total: int) -> None:
        """Show a bar of *total* bytes."""
        if self._bars is not None:
            self._bars.update(self._task, total=total)
            self._bars.start()

    def show(self, done: int) -> None:
        """Show that *done* bytes are through."""
        if self._bars is not None:
            self._bars.update(self._task, completed=done)

    def close(self) -> None:
        """Take the bar away."""
        if self._bars is not None:
            self._bars.stop()


def _bars() -> "Progress":
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)
