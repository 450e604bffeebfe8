"""Mounts of disks that the simulator serves: a kit with a host of its own, and what belongs to it.

``conftest.py`` hands its fixtures on. Every mount is judged as those of ``mounting`` are; besides,
nothing may be left of it at the host, on this machine and in the state folder.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.mounting import (
    COMMAND,
    PROMPT,
    Done,
    Mount,
    Mounts,
    alive,
    run,
    sha256,
    succeed,
    until,
)
from tests.simulator.disks import make_vmfs
from tests.simulator.fixtures import contents, datastores, kits
from tests.simulator.kit import Event, Host, Kit, Kits, replace
from vddkfs.errors import NotMounted
from vddkfs.state import state_folder

__all__ = ["contents", "datastores", "kits", "proxies", "proxy"]

MIB = 1024 * 1024
PASSWORD = "S3cr3t-probe"
CHAIN = (
    "[ds1] web01/web01.vmdk@snapshot-1",
    "[ds1] web01/web01-000001.vmdk@snapshot-2",
    "[ds1] web01/web01-000002.vmdk@snapshot-3",
)
"""Every link of vm-16, each held by a snapshot; see SNAPSHOTS."""
PLAIN = "[ds1] plain/plain.vmdk@snapshot-9"
BIG = "[ds1] big/big.vmdk@snapshot-8"
SNAPSHOTS = """
[snapshot snapshot-3]
vm = vm-16
disk = [ds1] web01/web01-000002.vmdk
[snapshot snapshot-9]
vm = vm-17
disk = [ds1] plain/plain.vmdk
disk = [ds1] plain/thin.vmdk
disk = [ds1] plain/sparse.vmdk
[vm vm-20]
name = big
host = esx1
power = off
disk = [ds1] big/big.vmdk
[snapshot snapshot-8]
vm = vm-20
disk = [ds1] big/big.vmdk
"""
_NUMBERS = itertools.count()
Contents = Callable[[str], bytes]


def workers(mount: Mount) -> list[dict[str, Any]]:
    """Return what status tells of all workers of a mount."""
    return [worker for disk in mount.status()["disks"] for worker in disk["workers"]]


def total(mount: Mount, what: str) -> int:
    """Return the sum of a counter over all workers."""
    return sum(worker[what] for worker in workers(mount))


class RemoteMount(Mount):
    """One mount of a URL, which *kit* serves. At its end nothing of it may be left anywhere."""

    def __init__(
        self, kit: Kit, source: str, place: Path, log: Path, options: Sequence[str]
    ) -> None:
        super().__init__(source, place, log, options)  # type: ignore[arg-type]
        self.kit = kit
        self.prefix: Sequence[str] = ()
        """Words before the command."""

    def worker_at(self, number: int) -> dict[str, Any]:
        """Return what status tells of the worker of one image, counted over all disks."""
        return workers(self)[number]

    def _judge_restarts(self) -> list[str]:
        try:
            found = workers(self)
        except NotMounted as error:
            return [str(error)]
        # Over hotadd the disks share one worker.
        counted = {worker["name"]: worker["restarts"] for worker in found}
        if self.restarts is not None and sum(counted.values()) != self.restarts:
            return [f"not {self.restarts} restarts: {found}"]
        return []

    def _judge_umount(self) -> list[str]:
        folders = self.folders()
        assert folders
        problems = super()._judge_umount()
        problems += [f"{path} is left: {[*path.rglob('*')]}" for path in folders if path.exists()]
        problems += [f"{device} is still attached" for device in self.kit.attachments()]
        try:
            until(lambda: not left_sessions(self.kit), PROMPT, "the end of all sessions")
        except AssertionError:
            problems += [f"a session is left: {event}" for event in left_sessions(self.kit)]
        return problems

    def folders(self) -> list[Path]:
        """Return the folders of the workers' files that the daemon holds."""
        held = set()
        for path in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                held.add(os.readlink(path))
        return [Path(name) for name in held if name.startswith(f"{state_folder()}/vddk/mount-")]

    def start(self, *words: str) -> Done:
        options = ",".join(self.options)
        source = str(self.source)
        done = run(*self.prefix, COMMAND, "mount", source, self.place, "-o", options, *words)
        assert done.returncode == 0, done.stderr
        self.pid = int(self.status()["pid"])
        self.ended = False
        return done


def dd(path: str, direct: bool, block: int = MIB) -> bytes:
    """Return what dd reads of a file."""
    command = ["dd", f"if={path}", f"bs={block}", "status=none"]
    command += ["iflag=direct"] if direct else []
    return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout


def hashes(mount: Mount, name: str) -> set[str]:
    """Hash a file in several ways, which have to agree: with blocks that fit and that do not."""
    path = mount.path(name)
    found = {sha256(dd(path, direct=True)), sha256(dd(path, direct=True, block=44 * 1024))}
    found.add(sha256(dd(path, direct=False, block=100_000)))
    found.add(mount.sha256(name))
    return found


def left_sessions(kit: Kit) -> list[Event]:
    """Return the sessions at the host, opens that nobody closed, whose clients are gone."""
    if not kit.hosts or kit.hosts[-1].process.poll() is not None:
        return []
    pid = kit.hosts[-1].process.pid
    ends = kit.events("close") + kit.events("session-ended")
    ended = {event.fields["session"] for event in ends if event.pid == pid}
    return [
        event
        for event in kit.events("open")
        if event.pid == pid
        and event.fields["session"] not in ended
        and not alive(int(event.fields["client"]))
    ]


class Proxy:
    """This machine as a proxy: a kit of VDDK, and the credentials for its server."""

    def __init__(self, kit: Kit, mounts: Mounts, contents: Contents) -> None:
        self.kit = kit
        self.mounts = mounts
        self.content = contents
        self.credentials = kit.path / "credentials"
        self.credentials.touch(0o600)
        self.credentials.write_text(f"user=operator\npassword={PASSWORD}\n")
        # The library finds its sites beside the folder that it really lies in.
        (kit.path / "lib64").unlink()
        shutil.copytree(kit.build / "lib64", kit.path / "lib64", symlinks=True)
        kit.register((kit.site / "registry.conf").read_text() + SNAPSHOTS)

    @property
    def host(self) -> Host:
        return self.kit.hosts[-1]

    def url(self, *disks: str, moref: str = "vm-16", server: str = "vcenter") -> str:
        return f"vddk://{server}/?moref={moref}" + "".join(f"&disk={disk}" for disk in disks)

    def alias(self) -> str:
        """Return a name of the server that no other test has: with it, sessions are shared."""
        name = f"vc-{os.getpid()}-{next(_NUMBERS)}"
        (self.kit.path / "sites" / name).symlink_to("vcenter")
        return name

    def options(self, *options: str) -> list[str]:
        """Return the words of -o that a mount needs, with *options* behind them."""
        return [f"libdir={self.kit.path}", f"credentials={self.credentials}", *options]

    def prepare(self, source: str, *options: str) -> RemoteMount:
        number = len(self.mounts.made)
        place = self.mounts.folder / f"mnt{number}"
        place.mkdir()
        log = self.mounts.folder / f"daemon{number}.log"
        mount = RemoteMount(self.kit, source, place, log, self.options(*options))
        self.mounts.made.append(mount)
        return mount

    def mount(self, *disks: str, moref: str = "vm-16", options: Sequence[str] = ()) -> RemoteMount:
        mount = self.prepare(self.url(*disks, moref=moref), *options)
        mount.start()
        return mount

    def mounted_file(self, path: Path) -> RemoteMount:
        """Mount a VMDK of this machine through VDDK."""
        mount = self.prepare(f"vddk://{path}")
        mount.options = [word for word in mount.options if not word.startswith("credentials=")]
        mount.start()
        return mount

    def big(self, size: int, *options: str) -> tuple[RemoteMount, bytes]:
        """Mount one flat disk of noise over nbd; return its content as well."""
        data = os.urandom(size)
        self.make_big(data)
        return self.mount(BIG, moref="vm-20", options=("transports=nbd", *options)), data

    def make_big(self, data: bytes, *, thin: bool = False) -> Path:
        """Make the disk of vm-20."""
        folder = self.kit.site / "ds1" / "big"
        folder.mkdir(exist_ok=True)
        return make_vmfs(folder / "big.vmdk", data, grain=MIB, thin=thin)

    def raw(self, disk: str) -> bytes:
        """Return what qemu-img reads from a disk, as the datastores were made."""
        return self.content(disk.partition("@")[0])

    def restart(self, number: int = signal.SIGKILL) -> None:
        """End the host, and start another."""
        self.host.stop(number)
        self.kit.start()

    def wait_for_more(self, events: str, count: int) -> None:
        """Wait until there are more than *count* events of a name."""
        until(lambda: len(self.kit.events(events)) > count, what=f"more than {count} {events}")

    def trigger(self, name: str) -> Path:
        """Make the file that a fault waits for; it goes when that strikes."""
        path = self.kit.site / name
        replace(path, "")
        return path


@pytest.fixture
def scsi_disk(able: None, tmp_path: Path) -> Iterator[Sequence[str]]:
    """Return words before a command that has it see a /sys/class/scsi_disk, as SAN wants it.

    Where this machine has none, the command is given a /sys/class of its own; what it mounts below
    tmp_path is seen by everybody.
    """
    if os.path.isdir("/sys/class/scsi_disk"):
        yield ()
        return
    succeed("mount", "--bind", tmp_path, tmp_path)
    try:
        succeed("mount", "--make-shared", tmp_path)
        script = """
            set -e
            mount --make-rprivate /sys
            mount -t tmpfs none /sys/class
            mkdir /sys/class/scsi_disk /sys/class/bdi
            mount --bind /sys/devices/virtual/bdi /sys/class/bdi
            exec "$@"
        """
        yield ("unshare", "-m", "--propagation", "unchanged", "sh", "-c", script, "sh")
    finally:
        succeed("umount", "-l", tmp_path)


@pytest.fixture
def proxies(kits: Kits, contents: Contents, mount: Mounts) -> Callable[..., Proxy]:
    """Make proxies with kits of their own; their mounts are taken down and judged before those."""
    absent = [tool for tool in ("cc", "c++") if shutil.which(tool) is None]
    if absent:
        pytest.skip(f"absent: the tool {', '.join(absent)}")

    def make(release: str = "8.0", **keys: Any) -> Proxy:
        return Proxy(kits(release, **keys), mount, contents)

    return make


@pytest.fixture
def proxy(proxies: Callable[..., Proxy]) -> Proxy:
    """Return a proxy with a kit of the newest release, its host running."""
    return proxies()
