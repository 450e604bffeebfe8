"""The simulated server of ``run remote``: a kit, a site with disks of noise, and its host process.

The kit is that of ``contrib/simulator/build``. The large disk is flat: what any system reads of it
are the same bytes of one file, which ``material.kept_in_memory`` keeps in the page cache.
"""

import contextlib
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.material import MIB, Material
from benchmarks.processes import BenchmarkError, end, run

PROFILES: Final = ("lan", "nbdssl", "nbdssl-tuned", "san")
TRANSPORTS: Final = {"san": "san"}
"""How a profile's disk is reached; all others by nbdssl."""
SERVER: Final = "benchmark"
VM: Final = "vm-16"
SNAPSHOT: Final = "snapshot-1"
DISK: Final = "[ds1] large/large.vmdk"
MANY: Final = 40
"""Small VMs with two disks each."""
SMALL: Final = 4 * MIB
SESSIONS: Final = 50
"""What the host allows, while MANY mounts of two disks are there."""
_SIMULATOR: Final = Path(__file__).resolve().parents[1] / "simulator"
_BUILT: Final = Path(__file__).resolve().parents[2] / "build" / "simulator"
_READY_SECONDS: Final = 20.0


class Site:
    """The kit and its site, in *folder*, which is made anew and removed with it."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self.folder = folder
        self.site = folder / "sites" / SERVER
        self.capacity = capacity
        self._host: subprocess.Popen[bytes] | None = None
        # The password is any: the site asks for none in particular.
        self.credentials = folder / "credentials"
        self.password = folder / "password"
        self.client_folder = folder / "client"

    @property
    def material(self) -> Material:
        """The large disk; its leaf is the flat file with the raw bytes."""
        flat = self.site / "ds1" / "large" / "large-flat.vmdk"
        return Material("remote", flat, (flat,), self.capacity, "large")

    def make(self) -> None:
        """Build the kit, and make the site and its disks."""
        run([_SIMULATOR / "build", _BUILT], timeout=600.0)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.site.mkdir(parents=True)
        self.client_folder.mkdir()
        # Copied: the library looks for its sites beside the folder that it really lies in.
        shutil.copytree(_BUILT / "lib64", self.folder / "lib64", symlinks=True)
        for path, text in (
            (self.credentials, "user=benchmark\npassword=any\n"),
            (self.password, "any\n"),
        ):
            path.touch(0o600)
            path.write_text(text)
        self._make_disk("ds1/large/large", self.capacity)
        lines = ["[host esx1]", "datastores = ds1", *_vm(VM, SNAPSHOT, [DISK])]
        for number in range(MANY):
            for name in small_disks(number):
                self._make_disk("ds1/" + name.removesuffix(".vmdk"), SMALL)
            disks = [f"[ds1] {name}" for name in small_disks(number)]
            lines += _vm(small_vm(number), small_snapshot(number), disks)
        (self.site / "registry.conf").write_text("\n".join([*lines, ""]))
        self.configure("instant")

    def _make_disk(self, name: str, size: int) -> None:
        path = self.site / f"{name}.vmdk"
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = path.with_name(f"{path.stem}-flat.vmdk")
        with flat.open("wb") as file:
            for _ in range(0, size, MIB):
                file.write(os.urandom(MIB))
        path.write_text(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
            f'createType="vmfs"\n\nRW {size // 512} VMFS "{flat.name}"\n\n'
            'ddb.adapterType = "lsilogic"\nddb.virtualHWVersion = "14"\n'
        )

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

    def limits(self, profile: str, seconds: float, tuned: bool) -> dict[tuple[str, int], Any]:
        """Return what the C client gets of the large disk, by (workload, depth).

        *tuned*: with the configuration that vddkfs gives to the library, else with its defaults.
        """
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
            *("--moref", VM, "--snapshot", SNAPSHOT, "--transports", transport),
            *("--seconds", str(seconds), "--json"),
            # As vddkfs opens such a disk.
            *(["--unbuffered"] if transport == "san" else []),
            DISK,
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
        shutil.rmtree(self.folder, ignore_errors=True)


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


def _vm(moref: str, snapshot: str, disks: list[str]) -> list[str]:
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
