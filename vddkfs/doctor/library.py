"""VDDK: whether it is there, its release, what it lacks, and whether a worker can use it."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from vddkfs.doctor.rows import Level, Row, TimedOut, of_error, plain, within
from vddkfs.engines.base import EngineFacts
from vddkfs.engines.config import VddkConfig
from vddkfs.engines.describe import describe_images
from vddkfs.engines.output import parse_line
from vddkfs.engines.vddk.kit import PLACES, PLUGIN, Kit, Missing, find_kit, missing_dependencies
from vddkfs.engines.vddk.loader import system_libraries
from vddkfs.errors import SourceMissing, VddkfsError, WorkerFailed
from vddkfs.options import MountOptions

SECONDS: Final = 60.0
"""For the dynamic loader to list what each of the kit's files needs."""
WORKER_SECONDS: Final = 60.0
GET: Final = (
    "get VMware's VDDK 8 kit for Linux (VMware-vix-disklib-8...x86_64.tar.gz) from Broadcom's "
    "developer portal, unpack it, and give -o libdir=FOLDER, the vmware-vix-disklib-distrib in it"
)
_WHAT: Final = "VDDK"
_RECOMMENDED: Final = (7,)
_NEEDS: Final = {
    "libexpat.so.1": ("san and hotadd need it", "libexpat1 (apt-get) or expat (dnf)"),
    "libsqlite3.so.0": ("VDDK may need it", "libsqlite3-0 (apt-get) or sqlite-libs (dnf)"),
}


class Seen(msgspec.Struct, frozen=True):
    """What was seen of VDDK. *described* is what a worker told that initialised the library.

    *problem* says why there is no *kit*, *unusable* why a worker could not use it. *brought* are
    the names of the kit's own files, *system* the sonames of this machine's libraries.
    """

    architecture: str
    kit: Kit | None = None
    problem: VddkfsError | None = None
    brought: frozenset[str] = frozenset()
    system: frozenset[str] = frozenset()
    missing: tuple[Missing, ...] = ()
    unlisted: str = ""
    described: EngineFacts | None = None
    unusable: VddkfsError | None = None
    said: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether a worker could load and initialise the library."""
        return self.described is not None

    @property
    def plugin(self) -> bool:
        """Whether the kit has the file that san and hotadd need."""
        return PLUGIN in self.brought

    @property
    def plugin_lacks(self) -> tuple[str, ...]:
        """What the plugin needs and this machine does not have."""
        return tuple(one.name for one in self.missing if PLUGIN in one.wanted_by)


def look(options: MountOptions, folder: Path) -> Seen:
    """Look for VDDK, and have a worker try it; *folder* is for the worker. Main thread only."""
    architecture = os.uname().machine
    system = within(SECONDS, lambda: frozenset(system_libraries()))
    try:
        kit = within(SECONDS, lambda: find_kit(options.libdir))
    except VddkfsError as error:
        return Seen(architecture, problem=error, system=system)
    brought = frozenset(os.listdir(kit.folder))
    missing: tuple[Missing, ...] = ()
    unlisted = ""
    try:
        missing = within(SECONDS, lambda: missing_dependencies(kit))
    except VddkfsError as error:
        unlisted = str(error)
    except TimedOut:
        unlisted = f"the dynamic loader was not ready within {SECONDS:g} s"
    described, unusable, said = describe(options, folder)
    return Seen(
        architecture,
        kit=kit,
        brought=brought,
        system=system,
        missing=missing,
        unlisted=unlisted,
        described=described,
        unusable=unusable,
        said=said,
    )


def describe(
    options: MountOptions, folder: Path, seconds: float = WORKER_SECONDS
) -> tuple[EngineFacts | None, VddkfsError | None, tuple[str, ...]]:
    """Have a worker initialise the library; return what it told, or why not, and its warnings."""
    said: list[str] = []

    def hear(line: bytes) -> None:
        level, text = parse_line(line)
        if level >= logging.WARNING and text and text not in said:
            said.append(text)

    try:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            config = VddkConfig(
                images=(),
                tmp_directory=str(Path(own) / "worker"),
                shared_directory=own,
                libdir=options.libdir,
                vddk_config=options.vddk_config,
            )
            facts = describe_images(config, -1, hear, seconds).facts
    except VddkfsError as error:
        return None, error, tuple(said)
    except OSError as error:
        return None, WorkerFailed(f"a worker has no folder: {error}"), tuple(said)
    return facts, None, tuple(said)


# Judging.


def judge(seen: Seen, wanted: bool) -> list[Row]:
    """Return what is to be said of VDDK. It is *wanted* for a vddk:// SOURCE or with libdir=."""
    level: Level = "failure" if wanted else "warning"
    if seen.architecture != "x86_64":
        finding = f"VDDK runs on x86_64 only, and this machine is {seen.architecture}"
        return [Row(level, _WHAT, finding, "use another machine for vddk://; local VMDKs work")]
    if seen.kit is None:
        return [_absent(seen, level)]
    rows = [_kit(seen.kit)]
    rows += _use(seen, level)
    rows += _dependencies(seen, seen.kit, level)
    return rows


def _absent(seen: Seen, level: Level) -> Row:
    if seen.problem is None or isinstance(seen.problem, SourceMissing):
        places = ", ".join(PLACES)
        return Row(level, _WHAT, f"not installed: it is in none of {places}", GET)
    return of_error(level, _WHAT, seen.problem)


def _kit(kit: Kit) -> Row:
    finding = f"release {kit.release_text} in {kit.libdir}"
    if kit.release < _RECOMMENDED:
        return Row("warning", _WHAT, f"{finding}: VDDK 6 hangs and fails more often", GET)
    return Row("ok", _WHAT, finding)


def _use(seen: Seen, level: Level) -> list[Row]:
    what = "VDDK in a worker"
    if seen.described is None:
        error = seen.unusable or WorkerFailed("it was not tried")
        remedy = error.advice if "doctor" not in error.advice else ""
        row = of_error(level, what, error)
        return [Row(row.level, row.what, row.finding, remedy or _again(seen))]
    build = seen.described.build or "unknown"
    rows = [Row("ok", what, f"release {seen.described.version} build {build} was initialised")]
    for text in seen.said[:5]:
        remedy = "look in the kit's release notes, or give a newer kit with libdir="
        rows.append(Row("warning", "VDDK says", plain(text), remedy))
    return rows


def _again(seen: Seen) -> str:
    if seen.missing:
        return "install what is missing below"
    return f"unpack the kit again; if that does not help, {GET}"


def _dependencies(seen: Seen, kit: Kit, level: Level) -> list[Row]:
    what = "libraries of VDDK"
    if seen.unlisted:
        remedy = f"run `ldd {kit.library}` yourself"
        return [Row("warning", what, plain(seen.unlisted), remedy)]
    rows = []
    for missing in seen.missing:
        main = kit.library.name in missing.wanted_by
        by = ", ".join(missing.wanted_by)
        remedy = missing.remedy or f"install the package that has {missing.name}"
        fatal: Level = level if main and not seen.usable else "warning"
        rows.append(Row(fatal, what, f"{missing.name} is missing, for {by}", remedy))
    known = {one.name.partition(" ")[0] for one in seen.missing}
    for name, (why, packages) in _NEEDS.items():
        if name in known or name in seen.system or name in seen.brought:
            continue
        rows.append(Row("warning", what, f"{name} is missing: {why}", f"install {packages}"))
    return rows or [Row("ok", what, "all are there, expat and sqlite too")]
