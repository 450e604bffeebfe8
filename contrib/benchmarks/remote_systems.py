"""What ``run remote`` compares: vddkfs on a ``vddk://`` source, and NBD over the same latency.

The peers read the same flat file, from nbdkit with its filters ``delay`` and ``rate`` in the place
of the host: a disk behind NBD with a profile's latency and bandwidth.
"""

import shlex
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.material import Material
from benchmarks.processes import BenchmarkError, command_line, end, is_alive, until
from benchmarks.remote_site import HELD, SERVER, Site, transport_of
from benchmarks.systems import END_SECONDS, Served, Stub, System, Vddkfs, vddkfs_command


@dataclass(frozen=True)
class Link:
    """What lies between a peer and the bytes."""

    milliseconds: int
    bits_per_second: int


LINKS: Final = {
    "lan": Link(1, 10_000_000_000),
    "nbdssl": Link(1, 1_200_000_000),
    "nbdssl-tuned": Link(1, 1_200_000_000),
}
"""The profiles that nbdkit can imitate: its delays are whole milliseconds, san has half a one."""
_BURST_SECONDS: Final = 0.02
"""How long a peer may read faster than the rate after a pause; nbdkit's own 2 s would be the whole
of a disk."""


def url(moref: str, snapshot: str, disks: Sequence[str]) -> str:
    """Return the SOURCE of disks that are all held by one snapshot, or by none if that is empty."""
    held = f"@{snapshot}" if snapshot else ""
    return f"vddk://{SERVER}/?moref={moref}" + "".join(f"&disk={disk}{held}" for disk in disks)


def mount_command(site: Site, source: str, mount: Path, *options: str) -> list[str | Path]:
    """Return the command that mounts *source* of the site."""
    words = [f"libdir={site.folder}", f"credentials={site.credentials}", *options]
    return [vddkfs_command(), "mount", source, mount, "-o", ",".join(words)]


class RemoteVddkfs(Vddkfs):
    """The product on the simulated server, options as an operator would have them."""

    title = "`vddkfs mount vddk://... -o credentials=FILE,libdir=DIR`"

    def __init__(
        self, mounts: Path, site: Site, profile: str, name: str = "vddkfs", *options: str
    ) -> None:
        self.name = name
        super().__init__(mounts)
        self._site = site
        self._profile = profile
        self._options = options

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return the mount command; san wants to be asked for."""
        transport = transport_of(self._profile)
        more = ["transports=san", "san_check=no"] if transport == "san" else []
        held = HELD[material.name]
        source = url(held.moref, held.snapshot, held.disks)
        return mount_command(self._site, source, mount, *self._options, *more)


class Peer(System):
    """A reader of NBD behind nbdkit, which ends with it; *writable*: a writer as well."""

    knows_holes = False

    def __init__(
        self, mounts: Path, profile: str, read_ahead: bool, writable: bool = False
    ) -> None:
        if read_ahead:
            self.name += "-ra"
        super().__init__(mounts)
        self._link = LINKS[profile]
        self._read_ahead = read_ahead
        self.writable = writable

    def command(self, mount: Path, material: Material) -> list[str | Path]:
        """Return nbdkit with the client as what it runs."""
        link = self._link
        return [
            *("nbdkit", "-f", *(() if self.writable else ("-r",)), "-U", "-"),
            *("--filter=delay", "--filter=rate", "file", material.leaf),
            *(f"rdelay={link.milliseconds}ms", f"wdelay={link.milliseconds}ms"),
            *(f"rate={link.bits_per_second}", f"burstiness={_BURST_SECONDS}"),
            *("--run", self.client(mount)),
        ]

    @abstractmethod
    def client(self, mount: Path) -> str:
        """Return the client's command for a shell, which knows $uri and $unixsocket."""

    def served(self, given: Served) -> Served:
        """Raise the kernel's read-ahead as vddkfs does it on its own mount."""
        if self._read_ahead:
            from vddkfs.fuse import session

            why = session.raise_read_ahead(str(given.mount))
            if why:
                raise BenchmarkError(f"{self.name}: the read-ahead cannot be raised: {why}")
        return given


class NbdfusePeer(Peer):
    """nbdfuse with as many connections as it likes: four to a server that allows them."""

    name = "nbdfuse"
    title = "`nbdkit --filter=delay --filter=rate file FILE`, `nbdfuse DIR/disk.raw URI`"

    def client(self, mount: Path) -> str:
        """Return nbdfuse."""
        how = "" if self.writable else "-r "
        return f'exec nbdfuse {how}{shlex.quote(str(mount / "disk.raw"))} "$uri"'


class QsdPeer(Peer):
    """qemu-storage-daemon over the same nbdkit; it mounts on a file."""

    name = "qsd"
    title = "the same nbdkit, `qemu-storage-daemon --blockdev nbd --export type=fuse`"

    def file(self, mount: Path, material: Material) -> Path:
        """Return the file that it mounts on."""
        mount.touch()
        return mount

    def client(self, mount: Path) -> str:
        """Return the daemon."""
        on, off = ("on", "off") if self.writable else ("off", "on")
        export = f"type=fuse,id=export,node-name=disk,writable={on},mountpoint={mount}"
        return (
            f"exec qemu-storage-daemon --blockdev driver=nbd,node-name=disk,read-only={off},"
            'server.type=unix,server.path="$unixsocket" '
            f"--export {shlex.quote(export)}"
        )

    def unmount(self, served: Served) -> None:
        """End the daemon, which unmounts; nbdkit ends with what it runs."""
        daemons = [pid for pid in served.pids() if _is(pid, "qemu-storage-daemon")]
        end(daemons, patience=END_SECONDS)
        if not until(lambda: not is_alive(served.daemon), END_SECONDS):
            raise BenchmarkError("nbdkit does not end with qemu-storage-daemon")


class RemoteStub(Stub):
    """The stub, for the size of the remote disk."""

    def can(self, material: Material) -> bool:
        """Stand beside every disk: the bytes are always the same."""
        return True


PEERS: Final[dict[str, tuple[type[NbdfusePeer] | type[QsdPeer], bool]]] = {
    "nbdfuse": (NbdfusePeer, False),
    "nbdfuse-ra": (NbdfusePeer, True),
    "qsd": (QsdPeer, False),
    "qsd-ra": (QsdPeer, True),
}
"""By name; True: with the kernel's read-ahead raised."""
VARIANTS: Final = {
    "vddkfs-4k": "block_size=4K",
    "vddkfs-16k": "block_size=16K",
    "vddkfs-256k": "block_size=256K",
}
"""vddkfs with another option than its default; only when asked for."""
LIMIT: Final = "limit"
DEFAULT_LIMIT: Final = "limit-own"
"""The C client with the library's own buffers, where that is not the same."""
TITLES: Final = {
    "vddkfs": RemoteVddkfs.title,
    **{name: f"the same with `{option}`" for name, option in VARIANTS.items()},
    LIMIT: "`vixsim-limits`, a C client that does nothing else, with the configuration of vddkfs: "
    "what the profile gives, nothing mounted",
    DEFAULT_LIMIT: "the same client with the library's own buffers (4 of 64 KiB)",
    "stub": Stub.title,
    "nbdfuse": NbdfusePeer.title,
    "nbdfuse-ra": "nbdfuse on a mount with read_ahead_kb as vddkfs raises that of its own",
    "qsd": QsdPeer.title,
    "qsd-ra": "qsd on a mount with read_ahead_kb as vddkfs raises that of its own",
}


def make(name: str, mounts: Path, site: Site, profile: str) -> System | None:
    """Return the system *name* for a profile; None where there is none."""
    if name == "vddkfs":
        return RemoteVddkfs(mounts, site, profile)
    if name in VARIANTS:
        return RemoteVddkfs(mounts, site, profile, name, VARIANTS[name])
    if name == "stub":
        return RemoteStub(mounts)
    if name in PEERS and profile in LINKS:
        peer, read_ahead = PEERS[name]
        return peer(mounts, profile, read_ahead)
    return None


def of_system(served: Served) -> list[int]:
    """Return the processes that serve, without what stands for the server."""
    return [pid for pid in served.pids() if not _is(pid, "nbdkit")]


def _is(pid: int, name: str) -> bool:
    return command_line(pid).split(" ")[0] == name
