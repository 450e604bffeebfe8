"""SOURCE as typed: what it names, and which engine opens it.

Now: a folder of VMDKs, a .vmx, or one .vmdk, all read by the built-in engine.
"""

import os
import re
from collections.abc import Iterable

from vddkfs.disks.vm import Chain, LeftOut, Source
from vddkfs.engines.vmdk.discover import discover
from vddkfs.errors import UnsupportedFormat, UsageError

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_RESERVED = frozenset({"vm.json", ".vddkfs", ".", ".."})


def open_source(text: str, follow_parents: str = "folder") -> Source:
    """Return what SOURCE *text* holds, leaving out (with the reason) what cannot be opened.

    Blocks while it reads descriptors and headers. Raises VddkfsError if nothing can be opened.
    """
    if not text or "\0" in text:
        raise UsageError("an empty SOURCE", advice="name a folder, a .vmx or a .vmdk")
    url = _URL.match(text)
    if url is not None:
        raise UnsupportedFormat(
            f"{text.split('?')[0]}: {url[1]}:// cannot be opened by this release",
            advice="name a folder of VMDKs, a .vmx or a .vmdk",
        )
    path = os.path.abspath(text)
    found = discover(path, follow_any=follow_parents == "any")
    names = unique_names(chain.name for chain in found.chains)
    return Source(
        text=text,
        path=path,
        engine="vmdk",
        chains=tuple(
            Chain(name, chain.links) for name, chain in zip(names, found.chains, strict=True)
        ),
        left_out=tuple(LeftOut(left.path, str(left.error)) for left in found.left_out),
    )


def unique_names(names: Iterable[str]) -> list[str]:
    """Return *names* with a suffix where two would clash, or where one is ours already."""
    taken = set(_RESERVED)
    result = []
    for name in names:
        # A file called just ".vmdk" has no name to give.
        name = name or "disk"
        candidate, number = name, 1
        while candidate in taken:
            number += 1
            candidate = f"{name}-{number}"
        taken.add(candidate)
        result.append(candidate)
    return result
