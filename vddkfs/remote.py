"""A ``vddk://`` SOURCE: which disks of which VM, and how they become chains.

``vddk://SERVER[:PORT]/?moref=vm-16&disk=[ds] web01/web01.vmdk@snapshot-12&disk=...`` names a VM by
its managed object reference, and its links, base first, each with the snapshot that it is reached
by. A link without a snapshot can be read if it is the last of its disk (nothing else is known to
hold it still: it is live); otherwise it is shown in info.json only. ``vddk:///PATH/DISK.vmdk``
reads a file of this machine through VDDK.

What else belongs to a disk is not written there: the library tells how many links it composes, and
a link that it composes of one alone begins a new disk.
"""

import collections
import functools
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Final
from urllib.parse import unquote

import msgspec

from vddkfs import leftovers
from vddkfs.credentials import ask, open_credentials
from vddkfs.disks.vm import Chain, ImagePlan, Source, WorkerPlan
from vddkfs.engines.base import EngineFacts, LinkIdentity, LinkInfo
from vddkfs.engines.config import VddkConfig, VddkImage
from vddkfs.engines.describe import describe_images
from vddkfs.engines.output import parse_line
from vddkfs.errors import LeftBehind, UnsupportedFormat, UsageError
from vddkfs.names import unique_names
from vddkfs.observe.redact import redact
from vddkfs.options import MountOptions
from vddkfs.state import held, state_folder
from vddkfs.writing import check_powered_off, check_sessions, remote_refusal

FORM: Final = (
    "write vddk://SERVER/?moref=vm-16&disk=[datastore] folder/disk.vmdk@snapshot-12, with disk= "
    "for every link, base first, or vddk:///PATH/DISK.vmdk for a file of this machine"
)
_AUTHORITY: Final = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)(:(?P<port>\d{1,5}))?"
)
_DATASTORE_PATH: Final = re.compile(r"\[(?P<store>[^\]]*)\] ?(?P<file>.+)")
_SNAPSHOT: Final = re.compile(r"[A-Za-z0-9_.:-]+")
_MOREF: Final = re.compile(r"[A-Za-z0-9_.-]+")


class Remote(msgspec.Struct, frozen=True):
    """What the URL says. *server* is empty for a file of this machine; *links* are base first."""

    server: str
    port: int
    moref: str
    links: tuple[VddkImage, ...]

    @property
    def shown(self) -> str:
        """The URL in short, for messages and the mount table."""
        if not self.server:
            return f"vddk://{self.links[0].path}"
        return f"vddk://{self.server}/?moref={self.moref}"


def parse_remote(text: str) -> Remote:
    """Return what the ``vddk://`` URL *text* names. Raises UsageError with what is wrong."""
    authority, slash, rest = text.partition("://")[2].partition("/")
    if not authority and slash:
        return _local("/" + rest)
    if "@" in authority:
        raise UsageError(
            "a user name does not belong into SOURCE", advice="put it into credentials=FILE"
        )
    match = _AUTHORITY.fullmatch(authority)
    if match is None or (match["port"] and not 0 < int(match["port"]) < 65536):
        raise UsageError(f"{authority or 'an empty name'} is not a server", advice=FORM)
    path, question, query = rest.partition("?")
    if path.strip("/") or not question:
        raise UnsupportedFormat(
            f"vddk://{authority}/{path}: virtual machines cannot be found by name in this release",
            advice=FORM,
        )
    moref, disks = _query(query)
    server = match["host"].strip("[]")
    return Remote(server, int(match["port"] or 443), moref, tuple(_link(disk) for disk in disks))


def _local(path: str) -> Remote:
    path = unquote(path)
    if not path.endswith(".vmdk") or "?" in path:
        raise UsageError(f"{path} is not the path of a .vmdk", advice=FORM)
    return Remote("", 0, "", (VddkImage(os.path.abspath(path), live=True),))


def _query(query: str) -> tuple[str, list[str]]:
    """Return the moref and the disks. Names are decoded, but a plus sign stays what it is."""
    moref, disks = "", []
    for item in query.split("&"):
        key, equals, value = item.partition("=")
        value = unquote(value)
        if key == "moref" and equals and not moref:
            moref = value
        elif key == "disk" and equals and value:
            disks.append(value)
        elif item:
            raise UsageError(f"{key}= is not known, empty or twice in SOURCE", advice=FORM)
    if not _MOREF.fullmatch(moref):
        raise UsageError("SOURCE has no moref=, the VM's reference, such as vm-16", advice=FORM)
    if not disks:
        raise UsageError("SOURCE names no disk=", advice=FORM)
    return moref, disks


def _link(text: str) -> VddkImage:
    path, at, snapshot = text.rpartition("@")
    if not at or snapshot.endswith(".vmdk"):
        path, snapshot = text, ""
    match = _DATASTORE_PATH.fullmatch(path)
    if match is None or not path.endswith(".vmdk") or "\0" in path:
        raise UsageError(f"disk={text} is not [datastore] folder/disk.vmdk", advice=FORM)
    if "@" in match["store"]:
        # The library builds a URL of datastore and host, and cannot tell the two apart then.
        raise UsageError(
            f"disk={text}: VDDK cannot open disks of datastore {match['store']}, because its name "
            "holds an @",
            advice="rename the datastore",
        )
    if snapshot and not _SNAPSHOT.fullmatch(snapshot):
        raise UsageError(f"disk={text}: {snapshot} is not a snapshot reference", advice=FORM)
    return VddkImage(f"[{match['store']}] {match['file']}", snapshot)


class RemoteChain(msgspec.Struct, frozen=True):
    """One disk: numbers into ``Remote.links``, base first, and those that have an image."""

    links: tuple[int, ...]
    images: tuple[int, ...]


def readable(links: tuple[VddkImage, ...]) -> list[int]:
    """Return the numbers of the links that can be opened.

    Those with a snapshot, and the last one, or one that is followed by another disk's: whether a
    link without a snapshot is the last of its disk only the names in the same folder tell.
    """
    return [
        number
        for number, link in enumerate(links)
        if link.snapshot or number == len(links) - 1 or not _same_disk(link, links[number + 1])
    ]


def _same_disk(link: VddkImage, following: VddkImage) -> bool:
    """Say whether *following* looks like a delta of *link*: web01.vmdk and web01-000001.vmdk."""
    return _stem(link.path) == _stem(following.path)


def _stem(path: str) -> str:
    return re.sub(r"-\d{6}$", "", path.removesuffix(".vmdk"))


def group(links: tuple[VddkImage, ...], opened: dict[int, LinkInfo]) -> list[RemoteChain]:
    """Return the disks that *links* are of; *opened* tells of those that could be opened.

    A link that is composed of one alone is a base, and begins a disk. One that could not be opened
    belongs to the disk of its neighbour that it shares its name with.
    """
    chains: list[list[int]] = []
    for number, link in enumerate(links):
        found = opened.get(number)
        if found is not None:
            begins = found.identity.links == 1
        else:
            begins = number == 0 or not _same_disk(links[number - 1], link)
        if begins or not chains:
            chains.append([])
        chains[-1].append(number)
    return [
        RemoteChain(tuple(chain), tuple(number for number in chain if number in opened))
        for chain in chains
        if any(number in opened for number in chain)
    ]


# Opening.


def open_remote(text: str, options: MountOptions) -> Source:
    """Return the disks that the ``vddk://`` URL *text* names, as a worker finds them.

    Blocks while they are opened one after another. Raises VddkfsError.
    """
    remote = parse_remote(text)
    if remote.server:
        check_powered_off(options)
    secret = _secret(remote.server, options) if remote.server else -1
    numbers = readable(remote.links)
    folder = state_folder(create=True) / "vddk"
    asking = folder / f"describe-{os.getpid()}"
    asked = _config(remote, options, asking / "0", numbers)
    # Attaching a disk to this machine only to look at it would be a lot of trouble.
    others = tuple(name for name in asked.transports if name != "hotadd")
    looked = msgspec.structs.replace(asked, transports=others) if others else asked
    said: list[str] = []
    with held(asking):
        try:
            found = describe_images(looked, secret, functools.partial(_keep_warning, said))
        finally:
            if not looked.hot_adds:
                # A worker that crashed has left things.
                shutil.rmtree(asking / "0", ignore_errors=True)
    # What the library complained of on the way is told only where no error is.
    for message in said:
        print(f"vddkfs: {message}", file=sys.stderr)
    opened = dict(zip(numbers, found.links, strict=True))
    if asked.hot_adds:
        _clean_up(asked, secret)
    return _source(text, remote, options, opened, found.facts, secret)


def _secret(server: str, options: MountOptions) -> int:
    return open_credentials(options.credentials, functools.partial(ask, server))


def _clean_up(config: VddkConfig, secret: int) -> None:
    """Take away the disks that dead mounts of this server have left attached to this machine."""
    try:
        with leftovers.alone(state_folder()):
            mine = leftovers.only(config.server, leftovers.by_worker(secret))
            report = leftovers.clean(state_folder(), mine)
    except LeftBehind:
        return  # somebody else is at it
    if report.cleaned:
        print(f"vddkfs: {report.cleaned} disks of dead mounts were detached", file=sys.stderr)
    for one in report.remaining:
        print(f"vddkfs: {one.path}: {one.reason}; {one.remedy}", file=sys.stderr)


def _keep_warning(said: list[str], line: bytes) -> None:
    """Keep what a worker that opens the disks warns of."""
    level, message = parse_line(line)
    if level >= logging.WARNING and message:
        said.append(redact(message))


def _config(
    remote: Remote,
    options: MountOptions,
    folder: Path,
    numbers: list[int],
    *,
    writable: bool = False,
) -> VddkConfig:
    images = [
        msgspec.structs.replace(link, live=not link.snapshot, writable=writable)
        for number, link in enumerate(remote.links)
        if number in numbers
    ]
    return VddkConfig(
        images=tuple(images),
        tmp_directory=str(folder),
        server=remote.server,
        port=remote.port,
        nfc_port=options.nfc_port,
        thumbprint=options.thumbprint,
        vmx_spec=f"moref={remote.moref}" if remote.server else "",
        transports=(options.transports or ("nbdssl", "nbd")) if remote.server else (),
        san_check=options.san_check == "yes",
        san_devices=options.san_devices,
        drop_caches=options.drop_caches == "yes",
        compression="" if options.compression == "none" else options.compression,
        libdir=options.libdir,
        vddk_config=options.vddk_config,
        keepalive=options.keepalive,
        idle_close=options.idle_close,
        shared_directory=str(state_folder() / "vddk"),
        max_sessions=options.max_sessions,
        debug=options.log_level == "debug",
    )


def _source(
    text: str,
    remote: Remote,
    options: MountOptions,
    opened: dict[int, LinkInfo],
    facts: EngineFacts,
    secret: int,
) -> Source:
    """Plan a worker for each image; over hotadd one for all, because attaching is the VM's.

    A base that is written always has a worker of its own, which alone opens it: it holds its lock.
    """
    chains = group(remote.links, opened)
    names = unique_names(_disk_name(remote.links[chain.links[0]]) for chain in chains)
    folder = state_folder() / "vddk" / f"mount-{os.getpid()}"
    workers: list[WorkerPlan] = []
    planned: list[Chain] = []
    refusals = _refusals(remote, options, chains, opened)
    written = {chain.links[0] for chain, why in zip(chains, refusals, strict=True) if why == ""}
    together = [n for chain in chains for n in chain.images if n not in written]
    if remote.server:
        check_sessions(options, len(written), bool(together))
    shared = _config(remote, options, folder / "0", together)
    if shared.hot_adds and together:
        workers.append(WorkerPlan(remote.moref, shared, secret, str(folder)))
    index = 0
    for name, chain, refusal in zip(names, chains, refusals, strict=True):
        images = []
        for place, number in enumerate(chain.links):
            if number not in chain.images:
                continue
            if shared.hot_adds and number not in written:
                images.append(ImagePlan(place, 0, index))
                index += 1
            else:
                own = folder / str(len(workers))
                config = _config(remote, options, own, [number], writable=number in written)
                images.append(ImagePlan(place, len(workers), 0))
                workers.append(WorkerPlan(f"{name}/chain/{place}", config, secret, str(folder)))
        links = tuple(opened.get(n) or _unopened(remote.links[n]) for n in chain.links)
        last = images[-1].number
        live = last if not remote.links[chain.links[last]].snapshot else -1
        chosen = Chain(name, links, tuple(images), live, refusal == "", refusal or "")
        planned.append(chosen)
    return Source(
        text=text,
        path=remote.shown,
        engine="vddk",
        chains=tuple(planned),
        workers=tuple(workers),
        left_out=(),
        facts=facts,
    )


def _refusals(
    remote: Remote, options: MountOptions, chains: list[RemoteChain], opened: dict[int, LinkInfo]
) -> list[str | None]:
    """Say for each disk why its base is not written, "" if it is; None: nobody asked for that."""
    if not options.writable:
        return [None] * len(chains)
    bases = collections.Counter(remote.links[chain.links[0]].path for chain in chains)
    return [
        remote_refusal(
            [remote.links[number] for number in chain.links],
            opened.get(chain.links[0]),
            options,
            shared=bases[remote.links[chain.links[0]].path] > 1,
        )
        for chain in chains
    ]


def _disk_name(link: VddkImage) -> str:
    return os.path.basename(link.path).removesuffix(".vmdk")


def _unopened(link: VddkImage) -> LinkInfo:
    """Return what is known of a link without a snapshot: its name."""
    return LinkInfo(
        path=link.path,
        format="remote",
        capacity=0,
        content_id="",
        parent_content_id="",
        parent_hint="",
        extents=(),
        mtime_ns=0,
        identity=LinkIdentity(link.path, "", 0),
    )
