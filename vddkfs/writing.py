"""Whether the base of a disk is written in a mount with ``writable``, and if not, why.

Only the base of a chain is ever written (K20). Links above it are changes to what it held when they
were made, so that it is written below them only where the operator says so with ``restore=yes``: a
restore over SAN, for which one snapshot was made that is reverted and removed afterwards. Over the
network the host gives the base another content id with the first write: the links above it cannot
be opened any more then, until the snapshot was reverted. Below a virtual machine that runs nothing
is written at all.

What is found here keeps the disk readable: its base cannot be opened for writing, and the mount
says why. What only the open of the engine shows is the engine's to refuse.
"""

import os
from collections.abc import Sequence

from vddkfs.engines.base import LinkInfo
from vddkfs.engines.config import VddkImage
from vddkfs.engines.vmdk.write.base import check_described
from vddkfs.errors import UsageError, VddkfsError
from vddkfs.options import MountOptions

POWERED_OFF = "powered-off"
SHARED = "another disk of this mount has the same base"


def check_powered_off(options: MountOptions) -> None:
    """Raise UsageError if a VM's disks are to be written and it may be running."""
    if options.writable and options.assume != POWERED_OFF:
        raise UsageError(
            "the base of a remote disk is written only if its virtual machine is known to be "
            "powered off, and nobody said so",
            advice=f"mount with assume={POWERED_OFF} if it is, and stays so; or without writable",
        )


def check_sessions(options: MountOptions, written: int, others: bool) -> None:
    """Raise UsageError if *written* bases leave no session for one another, or for *others*.

    A disk that is written keeps its session, with its lock, for as long as it is mounted.
    """
    needed = written + others
    if written and 0 < options.max_sessions < needed:
        raise UsageError(
            f"{written} disks that are written keep a session each, and max_sessions="
            f"{options.max_sessions} leaves too few",
            advice=f"mount with max_sessions={needed} or more, or fewer disks",
        )


def remote_refusal(
    links: Sequence[VddkImage], base: LinkInfo | None, options: MountOptions, *, shared: bool
) -> str:
    """Say why the base of a disk of VDDK's, the first of its *links*, is not written, or "".

    *base* is what the library told of it, None where it could not be opened by itself. *shared*:
    another disk has the same one.
    """
    path = links[0].path
    if base is None:
        return f"{path}: it is not opened by itself; name the snapshot that holds it"
    if base.identity.links > 1:
        return f"{path}: it is no base, but composed of {base.identity.links} links"
    if shared:
        return f"{path}: {SHARED}"
    above = len(links) - 1
    if not above and not links[0].snapshot:
        return ""
    held = f"links lie above it ({above} of them mounted)" if above else ""
    return _of_children(path, held or f"{links[0].snapshot} holds it", options)


def local_refusal(links: Sequence[LinkInfo], options: MountOptions, *, shared: bool) -> str:
    """Say why the base of a disk of this machine's files, base first, is not written, or ""."""
    base = links[0]
    try:
        check_described(base)
    except VddkfsError as error:
        return str(error)
    if any(file.offset for file in base.identity.files):
        return f"{base.path}: it is in an archive, which is only read"
    if shared:
        return f"{base.path}: {SHARED}"
    if len(links) > 1:
        why = _of_children(base.path, f"links lie above it ({len(links) - 1} of them)", options)
        if why:
            return why
    for path in dict.fromkeys([base.path, *(one.path for one in base.extents if one.path)]):
        if not os.access(path, os.W_OK, effective_ids=True):
            return f"{path}: it may not be written by this user"
    return ""


def _of_children(path: str, held: str, options: MountOptions) -> str:
    if options.restore == "yes":
        return ""
    return f"{path}: {held}, which would not fit any more; restore=yes writes it nevertheless"
