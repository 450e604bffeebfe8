"""The site that the tests of the host process serve."""

import os
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tests.simulator.host_client import SECTOR, configure

SIMULATOR = Path(__file__).resolve().parents[2] / "contrib" / "simulator"
CAPACITY = 4096  # sectors

REGISTRY = """
[host esx1]
datastores = ds1, ds2, vsan, small, at@sign
[host esx2]
datastores = ds1
[datastore vsan]
kind = vsan
[datastore ds2]
block_size = 2097152
[datastore small]
free = 1048576

[vm vm-1]
name = web
host = esx1
power = off
vmx = [ds1] web/web.vmx
disk = [ds1] web/web.vmdk
disk = [ds1] web/child.vmdk
disk = [at@sign] web/web.vmdk
disk = [vsan] web/web.vmdk
independent = [ds1] web/independent.vmdk
[snapshot snapshot-1]
vm = vm-1
disk = [ds1] web/web.vmdk

[vm vm-2]
name = running
host = esx1
power = on
disk = [ds1] running/child.vmdk
[snapshot snapshot-2]
vm = vm-2
disk = [ds1] running/base.vmdk

[vm proxy]
name = proxy
host = esx1
power = on
disk = [ds1] proxy/proxy.vmdk
[snapshot snapshot-p]
vm = proxy
disk = [ds1] proxy/proxy.vmdk
[vm small-proxy]
host = esx1
disk = [small] proxy/proxy.vmdk

[vm vm-3]
name = plain
host = esx1
power = off
disk = [ds1] plain/a.vmdk
disk = [ds1] plain/b.vmdk
disk = [ds1] plain/child.vmdk
[vm vm-4]
name = elsewhere
host = esx1
disk = [ds2] web/web.vmdk
[vm vm-5]
name = ide
host = esx1
disk = [ds1] plain/a.vmdk
ide = [ds1] plain/b.vmdk
"""


def flat(path: Path, sectors: int = CAPACITY) -> Path:
    """A flat disk of random bytes; returns the file that holds them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(f"{path.stem}-flat.vmdk")
    data.write_bytes(random.Random(path.name).randbytes(sectors * SECTOR))
    path.write_text(
        f'# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="vmfs"\n'
        f'RW {sectors} VMFS "{data.name}"\n'
        'ddb.adapterType = "lsilogic"\nddb.uuid = "60 00 C2 9a"\n',
        encoding="utf-8",
    )
    return data


def child(path: Path, parent: Path) -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", parent.name, path.name],
        cwd=path.parent,
        check=True,
    )


def make_site(site: Path) -> None:
    for name in ("ds1", "ds2", "vsan", "at@sign"):
        flat(site / name / "web" / "web.vmdk")
    flat(site / "ds1" / "web" / "independent.vmdk")
    child(site / "ds1" / "web" / "child.vmdk", site / "ds1" / "web" / "web.vmdk")
    flat(site / "ds1" / "running" / "base.vmdk")
    child(site / "ds1" / "running" / "child.vmdk", site / "ds1" / "running" / "base.vmdk")
    flat(site / "ds1" / "proxy" / "proxy.vmdk")
    flat(site / "small" / "proxy" / "proxy.vmdk")
    flat(site / "ds1" / "plain" / "a.vmdk")
    flat(site / "ds1" / "plain" / "b.vmdk")
    child(site / "ds1" / "plain" / "child.vmdk", site / "ds1" / "plain" / "b.vmdk")
    (site / "registry.conf").write_text(REGISTRY, encoding="utf-8")
    configure(site, "profile = instant", "seed = 1")


def compile_program(program: Path, sources: list[Path]) -> Path:
    """Compile C sources, several at a time, with sanitizers, and link them."""
    words = ["cc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    words += ["-D_GNU_SOURCE", "-D_FILE_OFFSET_BITS=64", "-fno-omit-frame-pointer"]
    words += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    words += [f"-I{SIMULATOR / room}" for room in ("include", "common", "vmdk", "host")]

    def compiled(source: Path) -> Path:
        target = program.with_name(f"{source.parent.name}-{source.stem}.o")
        subprocess.run([*words, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([*words, *objects, "-o", program], check=True)
    return program


def compile_host(folder: Path) -> Path:
    rooms = [SIMULATOR / name for name in ("host", "vmdk", "common")]
    return compile_program(
        folder / "vixsim-host", [source for room in rooms for source in room.glob("*.c")]
    )


def detach_loops(site: Path) -> None:
    """Detach what a test left attached: the host does not, since attachments outlive it."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            if backing.read_text().startswith(f"{site}/"):
                device = Path("/dev") / backing.parts[3]
                subprocess.run(["losetup", "-d", device], check=False)


def can_make_loops() -> bool:
    return os.geteuid() == 0 and os.path.exists("/dev/loop-control")
