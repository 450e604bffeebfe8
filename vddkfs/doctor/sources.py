"""The SOURCE: whether it can be opened, as far as that is to be known without a login."""

import os
import re
from typing import Final

import msgspec

from vddkfs.disks.vm import Source
from vddkfs.doctor.rows import Row, plain
from vddkfs.errors import UnsupportedFormat, VddkfsError
from vddkfs.options import MountOptions
from vddkfs.remote import Remote, parse_remote, readable
from vddkfs.source import open_source

SECONDS: Final = 30.0
HANGS: Final = "check the file system that it is on: a network share may not answer"
_URL: Final = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def remote_of(text: str) -> Remote | None:
    """Return what a ``vddk://`` URL names, None for a local SOURCE. Raises VddkfsError."""
    url = _URL.match(text)
    if url is None:
        return None
    if url[1].lower() != "vddk":
        raise UnsupportedFormat(
            f"{url[1]}:// cannot be opened by this release",
            advice="name a folder of VMDKs, an .ova, a .vmx, a .vmdk or a vddk:// URL",
        )
    if names_server_only(text):
        found = server_of(text)
        if found is not None:
            return found
    return parse_remote(text)


def server_of(text: str) -> Remote | None:
    """Return the server of a ``vddk://`` URL that names nothing else, or nothing sensible."""
    authority = text[len("vddk://") :].partition("/")[0] if text.lower().startswith("vddk:") else ""
    try:
        found = parse_remote(f"vddk://{authority}/?moref=vm-1&disk=[any] any.vmdk")
    except VddkfsError:
        return None
    return msgspec.structs.replace(found, moref="", links=()) if found.server else None


def names_server_only(text: str) -> bool:
    """Say whether *text* is ``vddk://SERVER/``: enough to look at the server."""
    authority, _, rest = text.partition("://")[2].partition("/")
    return bool(authority) and not rest


def check_local(text: str, options: MountOptions) -> list[Row]:
    """Open the local SOURCE *text*, and return what it holds. Raises VddkfsError."""
    return judge_local(open_source(text, options))


def judge_local(source: Source) -> list[Row]:
    """Return what is to be said of an open *source*."""
    names = ", ".join(chain.name for chain in source.chains)
    rows = [Row("ok", "SOURCE", plain(f"{len(source.chains)} disks can be mounted: {names}"))]
    for left in source.left_out:
        remedy = "see what works and what does not in the manual page (man vddkfs)"
        rows.append(Row("warning", "SOURCE", plain(f"left out: {left.reason}"), remedy))
    return rows


def check_remote(remote: Remote) -> list[Row]:
    """Return what is to be said of a remote SOURCE without asking its server."""
    if not remote.server:
        return [_file(remote.links[0].path)]
    if not remote.links:
        return [Row("ok", "SOURCE", f"{remote.server} alone: no disk is looked at")]
    numbers = readable(remote.links)
    finding = f"{remote.shown}: {len(remote.links)} links, {len(numbers)} of them can be opened"
    if len(numbers) < len(remote.links):
        remedy = "give the others' snapshots as well, disk=[...] NAME.vmdk@snapshot-N"
        return [Row("warning", "SOURCE", finding, remedy)]
    return [Row("ok", "SOURCE", finding)]


def _file(path: str) -> Row:
    if not os.path.exists(path):
        return Row("failure", "SOURCE", f"{path} does not exist", "name an existing .vmdk")
    if not os.access(path, os.R_OK):
        return Row("failure", "SOURCE", f"{path} may not be read", "have its mode changed")
    return Row("ok", "SOURCE", f"{path} can be read")
