"""The simulated server of ``run remote``: a kit, a site with disks of noise, and its host process.

The kit is that of ``contrib/simulator/build``. The large disk is flat: what any system reads of it
are the same bytes of one file, which ``material.kept_in_memory`` keeps in the page cache.
"""

import contextlib
import hashlib
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.guest import Size, make_files
from benchmarks.material import MIB, Material, write_descriptor
from benchmarks.processes import BenchmarkError, end, run

PROFILES: Final = ("lan", "nbdssl", "nbdssl-tuned", "san")
TRANSPORTS: Final = {"san": "san"}
"""How a profile's disk is reached; all others by nbdssl."""
SERVER: Final = "benchmark"
FOUR: Final = tuple(f"four{number}" for number in range(1, 5))
"""The disks of one VM that are read at once."""
MANY: Final = 40
"""Small VMs with two disks each."""
SMALL: Final = 4 * MIB
SESSIONS: Final = 50
"""What the host allows, while MANY mounts of two disks are there."""
_SIMULATOR: Final = Path(__file__).resolve().parents[1] / "simulator"
_BUILT: Final = Path(__file__).resolve().parents[2] / "build" / "simulator"
_READY_SECONDS: Final = 20.0


@dataclass(frozen=True)
class Held:
    """Disks of one VM that one snapshot holds: their paths in a datastore."""

    moref: str
    snapshot: str
    disks: tuple[str, ...]


HELD: Final = {
    "large": Held("vm-16", "snapshot-1", ("[ds1] large/large.vmdk",)),
    "four": Held("vm-17", "snapshot-2", tuple(f"[ds1] four/{name}.vmdk" for name in FOUR)),
    "files": Held("vm-18", "snapshot-3", ("[ds1] files/files.vmdk",)),
}
"""By the names of the materials."""


@dataclass(frozen=True)
class SiteSizes:
    """Bytes of the disks; of what is 0 there is none. *four*: each of these.

    *files* is what is on the disk with files, *many* the number of small VMs.
    """

    large: int
    four: int = 0
    files: Size | None = None
    many: int = MANY

    @property
    def wanted(self) -> int:
        """Bytes of free space that making it takes: the files are there twice for a while."""
        files = 2 * self.files.disk * MIB if self.files else 0
        return self.large + 4 * self.four + files + 2 * self.many * SMALL


class Site:
    """The kit and its site, in *folder*, which is made anew and removed with it.

    The site itself lies in *elsewhere*, if that is given, which is made and removed as well.
    """

    def __init__(self, folder: Path, sizes: SiteSizes, elsewhere: Path | None = None) -> None:
        self.folder = folder
        self.site = elsewhere or folder / "sites" / SERVER
        self.sizes = sizes
        self.checksum = ""
        """Of all files of the disk with files; see ``checksum``."""
        self._host: subprocess.Popen[bytes] | None = None
        # The password is any: the site asks for none in particular.
        self.credentials = folder / "credentials"
        self.password = folder / "password"
        self.client_folder = folder / "client"

    def large(self) -> Material:
        """The large disk; its leaf is the flat file with the raw bytes, as that of the others."""
        flat = self._flat("large/large")
        return Material("large", flat, (flat,), self.sizes.large, "large")

    def four(self) -> Material:
        """The four disks of one VM; its leaf is that of the first."""
        flats = tuple(self._flat(f"four/{name}") for name in FOUR)
        return Material("four", flats[0], flats, self.sizes.four, FOUR[0])

    def files(self) -> Material:
        """The disk with an ext4 full of files."""
        flat = self._flat("files/files")
        return Material("files", flat, (flat,), flat.stat().st_size, "files")

    def _flat(self, name: str) -> Path:
        return self.site / "ds1" / f"{name}-flat.vmdk"

    def make(self) -> None:
        """Build the kit, and make the site and its disks."""
        run([_SIMULATOR / "build", _BUILT], timeout=600.0)
        for place in (self.folder, self.site):
            shutil.rmtree(place, ignore_errors=True)
        self.site.mkdir(parents=True)
        link = self.folder / "sites" / SERVER
        if link != self.site:
            link.parent.mkdir(parents=True)
            link.symlink_to(self.site)
        self.client_folder.mkdir()
        # Copied: the library looks for its sites beside the folder that it really lies in.
        shutil.copytree(_BUILT / "lib64", self.folder / "lib64", symlinks=True)
        for path, text in (
            (self.credentials, "user=benchmark\npassword=any\n"),
            (self.password, "any\n"),
        ):
            path.touch(0o600)
            path.write_text(text)
        self._make_disk("large/large", self.sizes.large)
        there = ["large"]
        if self.sizes.four:
            there.append("four")
            for name in FOUR:
                self._make_disk(f"four/{name}", self.sizes.four)
        if self.sizes.files:
            there.append("files")
            self._make_files(self.sizes.files)
        lines = ["[host esx1]", "datastores = ds1"]
        for held in map(HELD.__getitem__, there):
            lines += _vm(held.moref, held.snapshot, held.disks)
        for number in range(self.sizes.many):
            for name in small_disks(number):
                self._make_disk(name.removesuffix(".vmdk"), SMALL)
            disks = [f"[ds1] {name}" for name in small_disks(number)]
            lines += _vm(small_vm(number), small_snapshot(number), disks)
        (self.site / "registry.conf").write_text("\n".join([*lines, ""]))
        self.configure("instant")

    def _make_disk(self, name: str, size: int) -> None:
        """Make a disk of noise."""
        flat = self._flat(name)
        flat.parent.mkdir(parents=True, exist_ok=True)
        with flat.open("wb") as file:
            for _ in range(0, size, MIB):
                file.write(os.urandom(MIB))
        self._describe(name, size)

    def _make_files(self, size: Size) -> None:
        """Make the disk with an ext4 full of files."""
        flat = self._flat("files/files")
        flat.parent.mkdir(parents=True)
        files = self.folder / "files"
        files.mkdir()
        make_files(files, size)
        self.checksum = checksum(sums_of_files(files))
        with flat.open("wb") as file:
            file.truncate(size.disk * MIB)
        run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", files, flat])
        shutil.rmtree(files)
        self._describe("files/files", size.disk * MIB)

    def _describe(self, name: str, size: int) -> None:
        flat = self._flat(name)
        path = flat.with_name(flat.name.replace("-flat", ""))
        write_descriptor(path, "vmfs", [f'RW {size // 512} VMFS "{flat.name}"'])

    def configure(self, profile: str, *lines: str) -> None:
        """Have the site behave as *profile* from now on."""
        usual = ["seed = 1", f"profile = {profile}", f"san.scsi_disk = {self.site}"]
        for path in (self.folder / "sim.conf", self.site / "sim.conf"):
            new = path.with_suffix(".new")
            new.write_text("\n".join([*usual, *lines, ""]))
            new.rename(path)

    @contextlib.contextmanager
    def served(self, log: Path) -> Iterator[None]:
        """Have the host process run."""
        with log.open("wb") as output:
            self._host = host = subprocess.Popen(
                [_BUILT / "bin" / "vixsim-host", self.site],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        assert host.stdout is not None
        try:
            ready = select.select([host.stdout], [], [], _READY_SECONDS)[0]
            if not ready or host.stdout.readline().strip() != b"ready":
                raise BenchmarkError(f"the host process does not serve: {log.read_text()[-300:]}")
            yield
        finally:
            end([host.pid])
            host.wait()
            host.stdout.close()

    @property
    def host(self) -> int:
        """The host process, which is of no system and outlives them all."""
        if self._host is None:
            raise BenchmarkError("the host process does not run")
        return self._host.pid

    def limits(
        self,
        profile: str,
        seconds: float,
        tuned: bool = True,
        material: str = "large",
        writes: bool = False,
    ) -> dict[tuple[str, int], Any]:
        """Return what the C client gets of all disks of a material at once, by (workload, depth).

        *tuned*: with the configuration that vddkfs gives to the library, else with its defaults.
        *writes*: what it gets of writes, and of these alone, to the disk without its snapshot.
        """
        held = HELD[material]
        # What vddkfs would write for its own worker: nothing but the client differs.
        from vddkfs.engines.vddk import configuration

        text = f"tmpDirectory={self.client_folder}\n"
        if tuned:
            text = configuration.generate(str(self.client_folder)).text
        config = self.folder / "client.conf"
        config.write_text(text)
        transport = transport_of(profile)
        command: list[str | Path] = [
            *("env", f"LD_LIBRARY_PATH={self.folder / 'lib64'}", _BUILT / "bin" / "vixsim-limits"),
            *("--libdir", self.folder, "--config", config, "--server", SERVER),
            *("--user", "benchmark", "--password-file", self.password, "--thumbprint", ""),
            *("--moref", held.moref, "--transports", transport),
            *(["--write", "--only", "write"] if writes else ["--snapshot", held.snapshot]),
            *("--seconds", str(seconds), "--json"),
            # As vddkfs opens such a disk.
            *(["--unbuffered"] if transport == "san" else []),
            *held.disks,
        ]
        found = json.loads(run(command, timeout=60.0 + 10 * seconds))
        if found["transport"] != transport:
            raise BenchmarkError(f"{profile} was read over {found['transport']}")
        return {(one["name"], one["depth"]): one for one in found["workloads"]}

    def remove(self) -> None:
        """Remove all of it: loop devices that stand for LUNs, what killed mounts left."""
        for device in _loop_devices(self.site):
            subprocess.run(["losetup", "-d", device], capture_output=True, check=False)
        for folder in _folders_of_workers():
            shutil.rmtree(folder, ignore_errors=True)
        for place in (self.folder, self.site):
            shutil.rmtree(place, ignore_errors=True)


def _folders_of_workers() -> Iterator[Path]:
    """Yield what killed mounts of the site left in vddkfs's own state folder."""
    from vddkfs.state import state_folder

    with contextlib.suppress(OSError):
        for folder in list((state_folder() / "vddk").iterdir()):
            # Those of other mounts may go away meanwhile.
            with contextlib.suppress(OSError, ValueError):
                told = [*folder.glob("worker.json"), *folder.glob("*/worker.json")]
                if any(json.loads(one.read_text())["server"] == SERVER for one in told):
                    yield folder


def transport_of(profile: str) -> str:
    """Return the transport by which a profile's disk is read."""
    return TRANSPORTS.get(profile, "nbdssl")


def small_vm(number: int) -> str:
    """Return the moref of a small VM."""
    return f"vm-{100 + number}"


def small_snapshot(number: int) -> str:
    """Return the snapshot that holds both disks of a small VM."""
    return f"snapshot-{100 + number}"


def small_disks(number: int) -> list[str]:
    """Return the paths of a small VM's disks in the datastore."""
    return [f"many{number}/{name}.vmdk" for name in ("one", "two")]


def sums_of_files(folder: Path) -> str:
    """Read all files below *folder* in the order of their file system; return what md5sum says."""
    script = 'cd "$1" && find . -type f -print0 | xargs -0 md5sum'
    return run(["sh", "-c", script, "sh", folder])


def checksum(sums: str) -> str:
    """Return one checksum of all *sums*, in whatever order these are."""
    return hashlib.sha256("\n".join(sorted(sums.splitlines())).encode()).hexdigest()


def _vm(moref: str, snapshot: str, disks: Sequence[str]) -> list[str]:
    held = [f"disk = {disk}" for disk in disks]
    lines = [f"[vm {moref}]", f"name = {moref}", "host = esx1", "power = off", *held]
    return [*lines, f"[snapshot {snapshot}]", f"vm = {moref}", *held]


def _loop_devices(folder: Path) -> Iterator[str]:
    listed = subprocess.run(
        ["losetup", "--list", "--noheadings", "--raw", "--output", "NAME,BACK-FILE"],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in listed.stdout.splitlines():
        name, _, file = line.partition(" ")
        if file.startswith(f"{folder}/"):
            yield name
