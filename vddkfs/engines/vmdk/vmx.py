"""The .vmx of a VM: which virtual disks it has, in the order of their controllers.

Pure: bytes in, structs out.
"""

import re

import msgspec

from vddkfs.engines.vmdk.text import decode, pair
from vddkfs.errors import DamagedSource, NotAVmdk, UnsupportedFormat

MAX_VMX_BYTES = 1 << 20
"""The longest .vmx that is read; a real one has a few KiB."""

_BUSES = ("scsi", "sata", "nvme", "ide")
_DEVICE = re.compile(r"(scsi|sata|nvme|ide)(\d{1,3}):(\d{1,3})\.filename")
_ESCAPE = re.compile(r"\|([0-9A-Fa-f]{2})")
_NO_FILE = ("", "auto detect", "emptybackingstring")


class VmxDisk(msgspec.Struct, frozen=True):
    """A virtual disk: *device* is like ``scsi0:0``, *file_name* as the .vmx has it."""

    device: str
    file_name: str


def parse_vmx(raw: bytes, path: str) -> tuple[VmxDisk, ...]:
    """Return the disks that *raw*, the content of the .vmx *path*, has connected.

    CD-ROMs, floppies and devices that are not present are left out. Raises UnsupportedFormat for an
    encrypted VM, DamagedSource for an absurd length, NotAVmdk for what is no .vmx at all.
    """
    if len(raw) > MAX_VMX_BYTES:
        raise DamagedSource(
            f"{path}: longer than {MAX_VMX_BYTES} bytes, which no .vmx is",
            advice="name another file",
        )
    settings: dict[str, str] = {}
    for line in decode(raw).splitlines():
        found = pair(line)
        if found is not None:
            settings.setdefault(*found)
    if not settings or b"\0" in raw:
        raise NotAVmdk(
            f"{path}: not a .vmx", advice="name a .vmdk, a .vmx, an .ova or a folder of VMDKs"
        )
    if any(key.startswith("encryption.") for key in settings):
        raise UnsupportedFormat(
            f"{path}: the VM is encrypted", advice="read it through VDDK, or decrypt the VM first"
        )
    disks: list[tuple[tuple[int, int, int], VmxDisk]] = []
    for key, value in settings.items():
        match = _DEVICE.fullmatch(key)
        if match is None:
            continue
        bus, number, unit = match.group(1), int(match.group(2)), int(match.group(3))
        device = f"{bus}{number}:{unit}"
        name = _ESCAPE.sub(lambda escape: chr(int(escape.group(1), 16)), value)
        if _is_disk(settings, f"{bus}{number}", device, name):
            disks.append(((_BUSES.index(bus), number, unit), VmxDisk(device, name)))
    return tuple(disk for _, disk in sorted(disks, key=lambda entry: entry[0]))


def _is_disk(settings: dict[str, str], controller: str, device: str, name: str) -> bool:
    present = (settings.get(f"{one}.present", "true").lower() for one in (controller, device))
    kind = settings.get(f"{device}.devicetype", "disk").lower()
    return (
        "false" not in present
        and "cdrom" not in kind
        and kind != "disabled"
        and name.lower() not in _NO_FILE
        and not name.lower().endswith((".iso", ".flp"))
    )
