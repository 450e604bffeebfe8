"""What ``vddkfs status`` says of a status.json, in words. Nothing here asks or prints."""

from collections.abc import Iterator
from typing import Any, NamedTuple

Found = dict[str, Any]
"""What status.json holds, or one disk or worker of it."""


def human(count: float) -> str:
    """Return *count* bytes as a person reads it: "200 GiB", "1.5 MiB"."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.1f}".removesuffix(".0") + " " + units[0]


def duration(seconds: float | None) -> str:
    """Return a time as a person reads it, in two or three digits: "12 us", "3.4 ms", "70 s"."""
    if seconds is None:
        return "-"
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        # Rounded first: 999.7 us are 1 ms, not 1000 us.
        if round(seconds / size) < 1000:
            return f"{_short(seconds / size)} {unit}"
    return f"{_short(seconds)} s"


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if value < 9.95 else f"{value:.0f}"


def percent(share: float | None) -> str:
    """Return a share of 0 to 1 as "83 %"; "-" for that of nothing."""
    return "-" if share is None else f"{share:.0%}".replace("%", " %")


def printable(text: str) -> str:
    """Return *text* with what would spoil a line or a terminal escaped: names may hold anything."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def title(found: Found) -> str:
    """Return a line that says which mount it is."""
    return (
        f"{printable(found['source'])} at {printable(found['mountpoint'])} "
        f"(pid {found['pid']}, vddkfs {found['vddkfs']})"
    )


def report(found: Found) -> Iterator[str]:
    """Yield the lines that tell everything of a status.json."""
    reads, cache = found["reads"], found["cache"]
    yield title(found)
    yield (
        f"up {found['uptime']:.0f} s, {found['open_files']} files open, "
        f"requests: {found['in_flight']} in flight, {found['queued']} queued"
    )
    yield f"reads: {reads['count']}, {human(reads['bytes'])}, {reads['errors']} failed"
    yield from _writes(found)
    yield (
        f"cache {human(cache['size'])} of {human(cache['limit'])}: {cache['hits']} hits, "
        f"{cache['misses']} misses, {cache['coalesced']} waits for another's; "
        f"{percent(cache['hit_ratio'])} hits"
    )
    yield (
        f"from the source {human(cache['source_bytes'])}; read ahead "
        f"{human(cache['prefetched'])}: {percent(cache['prefetched_used'])} used, "
        f"{percent(cache['prefetched_wasted'])} wasted"
    )
    if any(times["count"] for times in found["latency"].values()):
        yield latency(found)
    for disk in found["disks"]:
        name = printable(disk["name"])
        yield (
            f"{name}: {human(disk['capacity'])}, {disk['links']} links, "
            f"{human(disk['cache_held'])} of the cache, {percent(disk['cache']['hit_ratio'])} hits"
        )
        for worker in disk["workers"]:
            yield from _worker(worker)
    yield f"log: {printable(found['log'])}"
    yield from map(printable, found["warnings"])


def _writes(found: Found) -> Iterator[str]:
    writes = found["writes"]
    if not writes["writable"]:
        return
    line = f"writes: {writes['count']}, {human(writes['bytes'])}"
    if found["overlay"]:
        line += f"; overlay {printable(found['overlay'])} has {human(writes['changed'])}"
    yield line
    for name, why in writes["broken"].items():
        yield f"{printable(name)} is written no more: {printable(why)}"


_LAYERS = {
    "fuse": "reads",
    "writes": "writes",
    "cache": "waits for the cache",
    "worker": "reads by workers",
    "library": "reads by the library",
}


def latency(found: Found) -> str:
    """Return a line with what is typical of each layer that has done something."""
    parts = [
        f"{words} {duration(times['median'])}, {duration(times['p99'])}"
        for layer, words in _LAYERS.items()
        if (times := found["latency"][layer])["count"]
    ]
    return "latency (median, 99 %): " + ("; ".join(parts) or "nothing was read yet")


def _worker(worker: Found) -> Iterator[str]:
    pid = f", pid {worker['pid']}" if worker["pid"] else ""
    yield (
        f"  worker {printable(worker['name'])}: {worker['state']}{pid}, "
        f"{worker['requests']} requests, {worker['in_flight']} in flight, "
        f"{worker['queued']} queued, oldest {worker['oldest_request']:.1f} s; "
        f"{worker['restarts']} restarts, {worker['resent']} sent again, {worker['errors']} errors"
    )
    for line in worker["last_errors"]:
        yield f"    {printable(line)}"


class Pace(NamedTuple):
    """What went on between two looks: reads and bytes per second, those answered and those fetched
    from the source, and the share of hits (None: nothing was looked up)."""

    reads: float
    bytes: float
    source_bytes: float
    hit_ratio: float | None


def same_mount(before: Found, now: Found) -> bool:
    """Say whether both are of one daemon, so that its counters went on."""
    return bool((before["pid"], before["started"]) == (now["pid"], now["started"]))


def pace(before: Found, now: Found, seconds: float) -> Pace:
    """Return what went on in *seconds* between two looks at a mount, or at one disk of it."""

    def more(part: str, key: str) -> int:
        return max(0, int(now[part][key]) - int(before[part][key]))

    hits = more("cache", "hits")
    lookups = hits + more("cache", "misses") + more("cache", "coalesced")
    return Pace(
        reads=more("reads", "count") / seconds,
        bytes=more("reads", "bytes") / seconds,
        source_bytes=more("cache", "source_bytes") / seconds,
        hit_ratio=hits / lookups if lookups else None,
    )


def waiting(disk: Found) -> tuple[int, int]:
    """Return how many requests of a disk's workers are in flight, and how many are queued."""
    workers = disk["workers"]
    return sum(one["in_flight"] for one in workers), sum(one["queued"] for one in workers)


def new_warnings(before: Found, now: Found) -> list[str]:
    """Return the warnings that came between two looks. Each begins with its time."""
    known = set(before["warnings"])
    return [printable(line) for line in now["warnings"] if line not in known]


def pace_words(went: Pace, in_flight: int, queued: int) -> str:
    """Return a line of what went on, for who reads no tables."""
    return (
        f"{went.reads:.0f} reads/s, {human(went.bytes)}/s, {percent(went.hit_ratio)} hits, "
        f"{human(went.source_bytes)}/s from the source, {in_flight} in flight, {queued} queued"
    )


def interval(before: Found, now: Found, seconds: float) -> Iterator[str]:
    """Yield lines of what went on between two looks: the mount's, those of disks that were busy,
    and new warnings. Workers that several disks share count for each of them."""
    went = pace(before, now, seconds)
    yield "all: " + pace_words(went, now["in_flight"], now["queued"])
    disks = {disk["name"]: disk for disk in before["disks"]}
    for disk in now["disks"]:
        went = pace(disks[disk["name"]], disk, seconds)
        in_flight, queued = waiting(disk)
        if went.reads or went.source_bytes or in_flight or queued:
            yield f"{printable(disk['name'])}: " + pace_words(went, in_flight, queued)
    yield from new_warnings(before, now)
