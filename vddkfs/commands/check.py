"""``vddkfs check``: whether the structures of a disk are sound, down to its last grain."""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from vddkfs.commands.arguments import add_mount_options
from vddkfs.errors import ALL_ERRORS, EXIT_OK, DamageFound, UnsupportedFormat, VddkfsError
from vddkfs.options import parse_options

if TYPE_CHECKING:
    from vddkfs.engines.vmdk.check import ChainDone, Event, Finding, Progress

SUMMARY = "look for damage in the structures of disks"
DESCRIPTION = """\
Walk through descriptors, headers, tables and grains of every chain of SOURCE, and tell what is
damaged. Nothing is changed. Disks that are being written look damaged: check them at rest.
"""
_COLOURS = {"damage": "red", "warning": "yellow", "unchecked": "magenta"}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder of VMDKs, a .vmx, an .ova or a .vmdk"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress on a terminal")
    add_mount_options(
        parser, "mount options; follow_parents= and raw_devices= are the ones that matter here"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what is found. Returns 0, or raises DamageFound, or why something was not checked."""
    from vddkfs.engines.vmdk.check import check_source
    from vddkfs.engines.vmdk.files import Trust

    if _URL.match(arguments.source):
        raise UnsupportedFormat(
            "only files of this machine can be checked",
            advice="name a folder of VMDKs, a .vmx, an .ova or a .vmdk",
        )
    options = parse_options(arguments.options)
    trust = Trust(options.follow_parents == "any", options.raw_devices == "yes")
    printer = _Printer(sys.stderr.isatty() and not arguments.quiet, arguments.json)
    with printer:
        for event in check_source(arguments.source, trust):
            printer.take(event)
    if arguments.json:
        print(json.dumps(_summary(os.path.abspath(arguments.source), printer), indent=2))
    sys.stdout.flush()
    damage = printer.levels.count("damage")
    if damage:
        raise DamageFound(
            f"damage was found: {damage} finding{'s' if damage > 1 else ''}",
            advice="copy the files that are named above again from their source, or restore them",
        )
    if printer.unchecked is not None:
        raise _not_checked(printer.unchecked)
    return EXIT_OK


class _Printer:
    """Prints findings as they come, and keeps them for the summary. *levels* are those of all."""

    def __init__(self, progress: bool, collect: bool) -> None:
        self.levels: list[str] = []
        self.unchecked: Finding | None = None
        self.chains: list[tuple[ChainDone, list[Finding]]] = []
        self.others: list[Finding] = []
        self._collect = collect
        self._bar = _Bar() if progress else None

    def __enter__(self) -> "_Printer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.hide()

    def take(self, event: "Event") -> None:
        """Show *event*, unless all is printed at the end."""
        from vddkfs.engines.vmdk.check import ChainDone, Progress

        if isinstance(event, Progress):
            if self._bar is not None:
                self._bar.show(event)
            return
        if isinstance(event, ChainDone):
            self.chains.append((event, self.others))
            self.others = []
        else:
            self.levels.append(event.level)
            if event.level == "unchecked" and self.unchecked is None:
                self.unchecked = event
            if self._collect:
                self.others.append(event)
        if self._collect:
            return
        if self._bar is not None:
            self._bar.hide()
        if isinstance(event, ChainDone):
            print(_told(event))
        elif sys.stdout.isatty():
            _print_coloured(event)
        else:
            print("\t".join(_fields(event)))


class _Bar:
    """The progress of one file, on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bars = Progress(console=Console(stderr=True), transient=True)
        self._task = self._bars.add_task("")
        self._shown = False

    def show(self, progress: "Progress") -> None:
        """Show how far the check is."""
        from rich.markup import escape

        self._bars.update(
            self._task,
            description=escape(_printable(os.path.basename(progress.file))),
            completed=progress.done,
            total=progress.total,
        )
        if not self._shown:
            self._bars.start()
            self._shown = True

    def hide(self) -> None:
        """Take the bar away, so that a line can be printed."""
        if self._shown:
            self._bars.stop()
            self._shown = False


def _fields(finding: "Finding") -> tuple[str, ...]:
    return (
        finding.level,
        _printable(finding.link),
        _printable(finding.file),
        _sectors(finding, "-"),
        finding.what,
    )


def _sectors(finding: "Finding", between: str) -> str:
    if finding.sector < 0:
        return ""
    last = finding.sector + max(finding.sectors, 1) - 1
    return f"{finding.sector}{between}{last}"


def _print_coloured(finding: "Finding") -> None:
    from rich.console import Console
    from rich.text import Text

    where = _printable(os.path.basename(finding.file))
    if finding.link != finding.file:
        where += f" (of {_printable(os.path.basename(finding.link))})"
    sectors = _sectors(finding, " to ")
    if sectors:
        where += f", sectors {sectors} of the image"
    line = Text.assemble((finding.level, _COLOURS[finding.level]), f"  {where}: {finding.what}")
    Console(soft_wrap=True, highlight=False).print(line)


def _told(chain: "ChainDone") -> str:
    """Return the line that sums a chain up."""
    parts = [_counted(chain.links, "link"), f"{chain.damage} damage"]
    parts.append(_counted(chain.warnings, "warning"))
    if chain.unchecked:
        parts.append(f"{chain.unchecked} not checked")
    return f"{_printable(chain.name)}: {', '.join(parts)}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _summary(source: str, printer: _Printer) -> dict[str, Any]:
    worst = next((level for level in _COLOURS if level in printer.levels), "ok")
    return {
        "source": _printable(source),
        "result": "unchecked" if worst == "warning" and printer.unchecked else worst,
        "chains": [
            {
                "name": _printable(done.name),
                "links": done.links,
                "damage": done.damage,
                "warnings": done.warnings,
                "unchecked": done.unchecked,
                "findings": list(_plain(findings)),
            }
            for done, findings in printer.chains
        ],
        "other_findings": list(_plain(printer.others)),
    }


def _plain(findings: Iterable["Finding"]) -> Iterator[dict[str, Any]]:
    for finding in findings:
        plain: dict[str, Any] = {
            "level": finding.level,
            "code": finding.code,
            "link": _printable(finding.link),
            "file": _printable(finding.file),
            "what": finding.what,
        }
        if finding.sector >= 0:
            plain |= {"sector": finding.sector, "sectors": finding.sectors}
        yield plain


def _not_checked(finding: "Finding") -> VddkfsError:
    """Return the error for what could not be looked at, of the kind that kept it from that."""
    kinds = {kind.exit_code: kind for kind in ALL_ERRORS}
    kind = kinds.get(finding.exit_code, UnsupportedFormat)
    return kind(
        f"{_printable(finding.file)}: was not checked: {finding.what}",
        advice="no damage was found in the rest",
    )


def _printable(text: str) -> str:
    from vddkfs.engines.vmdk.text import printable

    return printable(text)
