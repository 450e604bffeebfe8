"""Names of the folders that the disks of a mount are shown in."""

from collections.abc import Iterable

_RESERVED = frozenset({"vm.json", ".vddkfs", ".", ".."})


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
