"""Other readers of VMDKs, to compare with: each runs in a process of its own.

- qemu-img reads all sparse kinds, flat extents and chains. For what it needs another
  descriptor for, see ``makers_chain.write_twin``.
- libvmdk (vmdkinfo, vmdkmount; package libvmdk-utils) reads vmfs, hosted sparse, compressed and
  COWD extents of a single link, without grains marked as zeros.
- dissect.hypervisor (test-only, and never imported by the package: its licence is the AGPL) reads
  all sparse kinds, chains, and flat extents that begin with their file.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 4 << 20

_DISSECT = """
import sys
from pathlib import Path
from dissect.hypervisor.disk.vmdk import VMDK
disk = VMDK(Path(sys.argv[1]))
with open(sys.argv[2], "wb") as raw:
    # Not read(): that fails at the end of a disk that is no multiple of 8 KiB.
    for sector in range(0, disk.sector_count, 2048):
        raw.write(disk.read_sectors(sector, min(2048, disk.sector_count - sector)))
"""


class Unreadable(Exception):
    """An oracle does not read an image, or says that it is damaged."""


def have_qemu() -> bool:
    """Say whether qemu-img is installed."""
    return shutil.which("qemu-img") is not None


def have_libvmdk() -> bool:
    """Say whether vmdkinfo and vmdkmount are installed and a mount can be made."""
    tools = all(shutil.which(tool) for tool in ("vmdkinfo", "vmdkmount", "fusermount3"))
    return tools and os.access("/dev/fuse", os.R_OK | os.W_OK)


def have_dissect() -> bool:
    """Say whether dissect.hypervisor is installed, without importing it."""
    return (
        importlib.util.find_spec("dissect") is not None
        and importlib.util.find_spec("dissect.hypervisor") is not None
    )


def qemu_raw(path: Path, raw: Path) -> None:
    """Write what qemu-img reads of the VMDK *path* to the file *raw*. Raises Unreadable."""
    _run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", "-t", "unsafe", str(path), str(raw)])


def dissect_raw(path: Path, raw: Path) -> None:
    """Write what dissect.hypervisor reads of the VMDK *path* to *raw*. Raises Unreadable."""
    _run([sys.executable, "-W", "ignore", "-c", _DISSECT, str(path), str(raw)])


def vmdkinfo(path: Path) -> str:
    """Return what vmdkinfo prints of the VMDK *path*. Raises Unreadable."""
    told = _run(["vmdkinfo", str(path)])
    # It ends with 0 even when it cannot open the file.
    if "Media size" not in told:
        raise Unreadable(told)
    return told


@contextlib.contextmanager
def vmdkmounted(path: Path, folder: Path) -> Iterator[Path]:
    """Mount the VMDK *path* on *folder* with vmdkmount; the value is its raw file.

    Raises Unreadable. It is unmounted in any case.
    """
    folder.mkdir()
    try:
        _run(["vmdkmount", str(path), str(folder)])
        raw = folder / "vmdk1"
        if not raw.exists():
            raise Unreadable(f"vmdkmount shows no disk in {path.name}")
        yield raw
    finally:
        if os.path.ismount(folder):
            subprocess.run(["fusermount3", "-u", "-z", str(folder)], check=True)
        folder.rmdir()


def first_difference(one: Path, other: Path) -> int | None:
    """Return the first sector in which two raw files differ, None if they are equal.

    The length of the shorter one counts as a difference.
    """
    here = 0
    with open(one, "rb") as left, open(other, "rb") as right:
        while True:
            mine, theirs = left.read(CHUNK_BYTES), right.read(CHUNK_BYTES)
            if mine != theirs:
                pairs = zip(mine, theirs, strict=False)
                for index, (a, b) in enumerate(pairs):
                    if a != b:
                        return (here + index) // 512
                return (here + min(len(mine), len(theirs))) // 512
            if not mine:
                return None
            here += len(mine)


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=60, check=False
    )
    if done.returncode != 0:
        raise Unreadable(f"{command[0]}: {done.stderr.strip()[-500:]}")
    return done.stdout
