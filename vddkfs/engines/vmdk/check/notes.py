"""What `vddkfs check` finds: one finding a kind of damage and run of sectors, in bounded number.

Pure. Sectors are those of the image, which are the link's own.
"""

from typing import Final, Literal

import msgspec

from vddkfs.engines.vmdk.text import printable
from vddkfs.errors import VddkfsError

Level = Literal["damage", "warning", "unchecked"]
"""*damage*: something is not as it must be. *warning*: nothing is lost, but something is odd.
*unchecked*: this could not be looked at, whatever it is like."""

DAMAGE: Final = "damage"
WARNING: Final = "warning"
UNCHECKED: Final = "unchecked"

OVERLAP: Final = "overlap"
"""The code of the findings that are told one by one, because each names others."""

MAX_FINDINGS = 100
"""Findings of one kind in one file that are told apart; of the others their number is told."""


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong with *file*, which belongs to the VMDK *link*; both are paths.

    *code* is a word for the kind of damage, for scripts; *what* is for people. It concerns
    *sectors* sectors of the image from *sector* on, or no particular ones if that is -1.
    *exit_code* is that of the error behind an unchecked file.
    """

    level: Level
    code: str
    link: str
    file: str
    what: str
    sector: int = -1
    sectors: int = 0
    exit_code: int = 0


class Notes:
    """The findings about one file, as they come, and those of neighbouring sectors as one."""

    def __init__(self, link: str, file: str) -> None:
        self.link = link
        self.file = file
        self._ready: list[Finding] = []
        self._last: Finding | None = None
        self._merged = 0
        self._counts: dict[str, int] = {}
        self._hidden: dict[str, tuple[Level, int]] = {}

    def damage(self, code: str, what: str, sector: int = -1, sectors: int = 0) -> None:
        """Add a finding of that level."""
        self._add(Finding(DAMAGE, code, self.link, self.file, what, sector, sectors))

    def warning(self, code: str, what: str, sector: int = -1, sectors: int = 0) -> None:
        """Add a finding of that level."""
        self._add(Finding(WARNING, code, self.link, self.file, what, sector, sectors))

    def unchecked(self, code: str, what: str, exit_code: int) -> None:
        """Add a finding of that level."""
        finding = Finding(UNCHECKED, code, self.link, self.file, what, exit_code=exit_code)
        self._add(finding)

    def ready(self) -> list[Finding]:
        """Return, once, the findings that nothing more can be joined to."""
        found, self._ready = self._ready, []
        return found

    def rest(self) -> list[Finding]:
        """Return, once, all findings that are left, with a word on those not told apart."""
        self._put_last()
        for code, (level, count) in self._hidden.items():
            what = f"and {count} more of this kind"
            self._ready.append(Finding(level, code, self.link, self.file, what))
        self._hidden.clear()
        return self.ready()

    def _add(self, finding: Finding) -> None:
        if finding.sector >= 0 and not finding.sectors:
            # What it concerns lies beyond the disk.
            finding = msgspec.structs.replace(finding, sector=-1)
        last = self._last
        if (
            last is not None
            and last.code == finding.code != OVERLAP
            and last.sectors
            and last.sector + last.sectors == finding.sector
        ):
            self._last = msgspec.structs.replace(last, sectors=last.sectors + finding.sectors)
            self._merged += 1
            return
        self._put_last()
        self._last = finding

    def _put_last(self) -> None:
        last, merged = self._last, self._merged
        self._last, self._merged = None, 0
        if last is None:
            return
        count = self._counts[last.code] = self._counts.get(last.code, 0) + 1
        if count > MAX_FINDINGS:
            self._hidden[last.code] = last.level, count - MAX_FINDINGS
            return
        if merged:
            more = f"the {merged} that follow are" if merged > 1 else "the next is"
            last = msgspec.structs.replace(last, what=f"{last.what} ({more} damaged likewise)")
        self._ready.append(last)


def said(error: VddkfsError, path: str) -> str:
    """Return what *error* says of the file *path*, without naming it."""
    cause = f" ({error.cause})" if error.cause else ""
    return error.message.removeprefix(f"{printable(path)}: ") + cause
