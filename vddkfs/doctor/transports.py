"""What each of VDDK's transports needs of this machine."""

import contextlib
import os
from pathlib import Path
from typing import Final

import msgspec

from vddkfs.doctor.rows import Row
from vddkfs.engines.vddk.kit import PLUGIN
from vddkfs.engines.vddk.session import SCSI_DISKS
from vddkfs.option_values import TRANSPORTS
from vddkfs.options import MountOptions

SECONDS: Final = 20.0
DEFAULT: Final = ("nbdssl", "nbd")
_SCSI_HOSTS: Final = "/sys/class/scsi_host"
_DMI: Final = Path("/sys/class/dmi/id")
_MTAB: Final = "/etc/mtab"
_VIRTUAL_CONTROLLERS: Final = frozenset({"vmw_pvscsi", "mptspi", "mptsas", "BusLogic"})
_PLUGIN_REMEDY: Final = f"unpack the kit again, all of it: lib64/{PLUGIN} belongs to it"

Problem = tuple[str, str]
"""What is in the way, and the remedy."""


class Seen(msgspec.Struct, frozen=True):
    """What was seen. *disks* are the SCSI disks' devices, *unreadable* those that do not open.

    *scsi_disks* is whether the kernel has the class at all; *product* is the machine's name in its
    firmware; *controllers* are the drivers of its SCSI controllers.
    """

    root: bool
    scsi_disks: bool
    disks: tuple[str, ...]
    unreadable: tuple[str, ...]
    product: str
    controllers: frozenset[str]
    mtab: bool


class Library(msgspec.Struct, frozen=True):
    """What the library has to do with it: *present*, its *plugin*, and what that *lacks*."""

    present: bool
    plugin: bool = False
    lacks: tuple[str, ...] = ()


def look() -> Seen:
    """Look at this machine."""
    disks = _disks()
    return Seen(
        root=os.geteuid() == 0,
        scsi_disks=os.path.isdir(SCSI_DISKS),
        disks=disks,
        unreadable=tuple(disk for disk in disks if not os.access(disk, os.R_OK)),
        product=_product(),
        controllers=_controllers(),
        mtab=_readable(_MTAB),
    )


def _disks() -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        blocks = Path(SCSI_DISKS).glob("*/device/block/*")
        return tuple(sorted(f"/dev/{block.name}" for block in blocks))
    return ()


def _product() -> str:
    words = []
    for name in ("sys_vendor", "product_name"):
        with contextlib.suppress(OSError):
            words.append((_DMI / name).read_text("utf-8", "replace").strip())
    return " ".join(words)


def _controllers() -> frozenset[str]:
    found = set()
    with contextlib.suppress(OSError):
        for host in os.listdir(_SCSI_HOSTS):
            with contextlib.suppress(OSError):
                name = Path(_SCSI_HOSTS, host, "proc_name").read_text("utf-8", "replace")
                found.add(name.strip())
    return frozenset(found)


def _readable(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


# Judging.


def judge(seen: Seen, library: Library, options: MountOptions) -> list[Row]:
    """Return a row for each transport, and a failure if none that was asked for can work."""
    problems = {
        "file": [],
        "san": _san(seen, library),
        "hotadd": _hotadd(seen, library),
        "nbdssl": [],
        "nbd": [],
    }
    rows = [_row(name, problems[name], library) for name in TRANSPORTS]
    asked = options.transports or DEFAULT
    if all(problems[name] for name in asked):
        finding = "none of " + ", ".join(asked) + " can work on this machine"
        remedy = "add nbdssl to transports=, or put right what is named above"
        rows.append(Row("failure", "transports", finding, remedy))
    elif asked[0] != "file":
        working = ", ".join(name for name in asked if not problems[name])
        rows.append(Row("ok", "transports", f"in use, in this order: {working}"))
    if not seen.mtab:
        finding = "cannot be read: VDDK may fail over san and hotadd"
        rows.append(Row("warning", _MTAB, finding, f"ln -s /proc/self/mounts {_MTAB}"))
    return rows


def _row(name: str, problems: list[Problem], library: Library) -> Row:
    what = f"transport {name}"
    if problems:
        findings, remedies = zip(*problems, strict=True)
        finding = "cannot work: " + "; ".join(findings)
        return Row("warning", what, finding, "; ".join(dict.fromkeys(remedies)))
    finding = {
        "file": "for vddk:///PATH: nothing more is needed",
        "san": "this machine has what it needs; whether it sees the LUNs only a mount shows",
        "hotadd": "this machine has what it needs; its VM must have free SCSI slots",
        "nbdssl": "nothing more is needed but the network: ports 443 and 902",
        "nbd": "nothing more is needed but the network: ports 443 and 902",
    }[name]
    waits = "" if library.present else ", once VDDK is installed"
    return Row("ok", what, finding + waits)


def _san(seen: Seen, library: Library) -> list[Problem]:
    problems = _advanced(seen, library)
    if not seen.scsi_disks:
        remedy = "load the module with `modprobe sd_mod`, and give the machine SCSI LUNs"
        problems.append((f"there is no {SCSI_DISKS}, without which VDDK may crash", remedy))
    elif not seen.disks:
        remedy = "give the machine the LUNs of the datastores (Fibre Channel or iSCSI)"
        problems.append(("this machine sees no SCSI disk", remedy))
    elif len(seen.unreadable) == len(seen.disks):
        names = ", ".join(seen.unreadable[:5])
        problems.append((f"the SCSI disks cannot be read: {names}", "mount as root"))
    return problems


def _hotadd(seen: Seen, library: Library) -> list[Problem]:
    problems = _advanced(seen, library)
    if "vmware" not in seen.product.lower():
        finding = f"this machine is no VMware virtual machine ({seen.product or 'unknown'})"
        return [*problems, (finding, "use it in a VM of the same vCenter; else nbdssl or san")]
    if not seen.controllers & _VIRTUAL_CONTROLLERS:
        finding = "this VM has no SCSI controller that disks can be added to"
        problems.append((finding, "add a SCSI controller (PVSCSI) to this VM"))
    return problems


def _advanced(seen: Seen, library: Library) -> list[Problem]:
    problems: list[Problem] = []
    if not seen.root:
        problems.append(("it needs root", "mount as root"))
    if library.present and not library.plugin:
        problems.append((f"the kit has no lib64/{PLUGIN}", _PLUGIN_REMEDY))
    if library.lacks:
        names = ", ".join(library.lacks)
        problems.append((f"{PLUGIN} needs {names}", "install what is missing above"))
    return problems
