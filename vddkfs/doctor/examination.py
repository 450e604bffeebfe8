"""All checks, in the order that they are shown in. For the main thread: workers are started."""

import os
from typing import Final

import msgspec

from vddkfs.doctor import library, machine, probe, server, sources, transports
from vddkfs.doctor.rows import Level, Row, TimedOut, bounded, of_error, sheltered, worst
from vddkfs.errors import VddkfsError
from vddkfs.options import MountOptions
from vddkfs.remote import Remote
from vddkfs.state import held, state_folder

_LIBRARY: Final = "VDDK"


class Report(msgspec.Struct):
    """What was found, in order, and what the library *answered* if it was probed."""

    rows: list[Row] = []
    answers: list[probe.Answer] = []

    @property
    def result(self) -> Level:
        """The worst of the rows."""
        return worst(self.rows)


def examine(text: str, options: MountOptions, *, ask: bool = False, secret: int = -1) -> Report:
    """Return what is found of this machine and of SOURCE *text*, which may be empty.

    *ask* is for the probe, *secret* the descriptor of its credentials. Raises nothing that is
    expected.
    """
    report = Report()
    report.rows += bounded("machine", machine.SECONDS, lambda: _machine(options))
    report.rows.append(machine.builtin(machine.can_mount(report.rows)))
    remote: Remote | None = None
    named: list[Row] = []
    wanted = bool(options.libdir or options.vddk_config) or text.lower().startswith("vddk:")
    if text:
        try:
            remote = sources.remote_of(text)
        except VddkfsError as error:
            named = [of_error("failure", "SOURCE", error)]
            remote = sources.server_of(text)
        else:
            named = _source(text, remote, options)
    usable = _vddk(report, options, remote, wanted)
    report.rows += named
    if remote is not None and remote.server:
        report.rows += server.check(remote, options)
    if ask:
        _probe(report, usable, remote, options, secret)
    return report


def _machine(options: MountOptions) -> list[Row]:
    return machine.judge(machine.look(), options)


def _source(text: str, remote: Remote | None, options: MountOptions) -> list[Row]:
    if remote is not None:
        found = remote
        return bounded("SOURCE", sources.SECONDS, lambda: sources.check_remote(found))
    return bounded(
        "SOURCE",
        sources.SECONDS,
        lambda: sources.check_local(text, options),
        remedy=sources.HANGS,
    )


def _vddk(report: Report, options: MountOptions, remote: Remote | None, wanted: bool) -> bool:
    """Look at the library and at its transports; say whether it can be used."""
    seen: list[library.Seen] = []
    level: Level = "failure" if wanted else "warning"

    def look() -> list[Row]:
        try:
            folder = state_folder(create=True) / "vddk" / f"doctor-{os.getpid()}"
            with held(folder):
                seen.append(library.look(options, folder))
        except TimedOut:
            finding = "looking for it took too long"
            return [Row(level, _LIBRARY, finding, "check the file system that it is on")]
        return library.judge(seen[0], wanted)

    report.rows += sheltered(_LIBRARY, look, level=level)
    has = library.Seen("") if not seen else seen[0]
    # A file of this machine is read without any transport.
    local = remote is not None and not remote.server
    judged = msgspec.structs.replace(options, transports=("file",)) if local else options
    report.rows += bounded(
        "transports",
        transports.SECONDS,
        lambda: transports.judge(
            transports.look(),
            transports.Library(has.kit is not None, has.plugin, has.plugin_lacks),
            judged,
        ),
    )
    return has.usable


def _probe(
    report: Report, usable: bool, remote: Remote | None, options: MountOptions, secret: int
) -> None:
    if not usable:
        finding = "the library was not asked, because a worker cannot use it"
        report.rows.append(Row("warning", "probe", finding, "put right what is said of VDDK above"))
        return

    def ask() -> list[Row]:
        folder = state_folder(create=True) / "vddk" / f"doctor-{os.getpid()}"
        with held(folder):
            rows, report.answers = probe.ask_all(options, remote, folder, secret)
        return rows

    report.rows += sheltered("probe", ask)
