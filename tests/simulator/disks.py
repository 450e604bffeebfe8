"""Disks for the simulator's tests: by qemu-img and qemu-io, or by hand where those cannot."""

import json
import mmap
import os
import random
import subprocess
from pathlib import Path
from typing import Any

KIB = 1024
MIB = 1024 * 1024
SECTOR = 512
GRAIN = 64 * KIB
SECTORS = 8192 + 37
"""Of the disks made here: the last chunk of 128 sectors is not whole."""
SIZE = SECTORS * SECTOR


def succeed(*command: str | Path, **keys: Any) -> str:
    """Run a command that must work, and return what it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50, check=False, **keys)
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def noise(seed: object, size: int) -> bytes:
    """Return bytes that are nowhere the same, the same ones at every run."""
    return random.Random(str(seed)).randbytes(size)


def sparse_noise(seed: object, size: int, step: int = 4 * GRAIN) -> bytes:
    """Return noise with holes: every second piece is zeros."""
    data = bytearray(noise(seed, size))
    for start in range(step, size, 2 * step):
        data[start : start + step] = bytes(min(step, size - start))
    return bytes(data)


def raw(path: Path) -> bytes:
    """Return what qemu-img reads from a link and all below it."""
    target = path.with_suffix(".converted")
    succeed("qemu-img", "convert", "-U", "-f", "vmdk", "-O", "raw", path, target)
    data = target.read_bytes()
    target.unlink()
    return data


def check(path: Path) -> None:
    """Have qemu-img look for damage in a sparse link."""
    succeed("qemu-img", "check", "-f", "vmdk", path)


def make_vmdk(path: Path, data: bytes, subformat: str = "monolithicSparse") -> Path:
    """Make a VMDK that shows *data*."""
    plain = path.with_suffix(".tmp")
    plain.write_bytes(data)
    options = f"subformat={subformat}"
    succeed("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", options, plain, path)
    plain.unlink()
    return path


def make_vmfs(path: Path, data: bytes, *, thin: bool = False, grain: int = GRAIN) -> Path:
    """Make a flat VMDK as ESXi does: a descriptor and NAME-flat.vmdk, with holes if *thin*."""
    flat = path.with_name(f"{path.stem}-flat.vmdk")
    with flat.open("wb") as file:
        if thin:
            file.truncate(len(data))
        for start in range(0, len(data), grain):
            part = data[start : start + grain]
            if not thin or part.strip(b"\0"):
                file.seek(start)
                file.write(part)
    lines = [
        *("# Disk DescriptorFile", "version=1", "CID=12345678", "parentCID=ffffffff"),
        *('createType="vmfs"', "", "# Extent description"),
        f'RW {len(data) // SECTOR} VMFS "{flat.name}"',
        *("", "# The Disk Data Base", "#DDB", "", 'ddb.adapterType = "lsilogic"'),
        'ddb.uuid = "60 00 C2 9a 11 22 33 44-55 66 77 88 99 aa bb cc"',
        'ddb.virtualHWVersion = "14"',
        *(['ddb.thinProvisioned = "1"'] if thin else []),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_delta(path: Path, parent: Path, seed: object) -> Path:
    """Make a link on *parent* (in the same folder) with writes of its own."""
    words = ("qemu-img", "create", "-q", "-f", "vmdk", "-b", parent.name, "-F", "vmdk", path)
    succeed(*words, cwd=path.parent)
    chance = random.Random(str(seed))
    commands: list[str | Path] = []
    for count in range(4):
        length = chance.choice([SECTOR, 3 * SECTOR, GRAIN, 200 * KIB])
        offset = chance.randrange(0, SIZE - length) // SECTOR * SECTOR
        pattern = path.with_suffix(f".{count}")
        pattern.write_bytes(noise((seed, count), length))
        commands += ["-c", f"write -s {pattern} {offset} {length}"]
    succeed("qemu-io", "-f", "vmdk", *commands, path)
    for count in range(4):
        path.with_suffix(f".{count}").unlink()
    return path


def make_chain(folder: Path, name: str, data: bytes) -> list[Path]:
    """Make a thin VMFS base and two deltas; return the links, base first."""
    links = [make_vmfs(folder / f"{name}.vmdk", data, thin=True)]
    for number in (1, 2):
        path = folder / f"{name}-{number:06}.vmdk"
        links.append(make_delta(path, links[-1], (name, number)))
    return links


def data_ranges(path: Path, chunk: int) -> list[tuple[int, int]]:
    """Return (first, end) in sectors of what qemu-img finds allocated, rounded out to *chunk*."""
    text = succeed("qemu-img", "map", "-U", "-f", "vmdk", "--output=json", path)
    found: list[tuple[int, int]] = []
    for extent in json.loads(text):
        if extent.get("present", True) and not extent["zero"]:
            start = extent["start"] // SECTOR // chunk * chunk
            end = -(-(extent["start"] + extent["length"]) // SECTOR // chunk) * chunk
            if found and found[-1][1] >= start:
                start = found.pop()[0]
            found.append((start, end))
    return found


def write_behind(path: Path, offset: int, data: bytes) -> None:
    """Write into a file with O_DIRECT: the page cache above it is not told."""
    assert offset % 4096 == 0
    assert len(data) % 4096 == 0
    with mmap.mmap(-1, len(data)) as aligned:
        aligned.write(data)
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            assert os.pwrite(fd, aligned, offset) == len(data)
            os.fdatasync(fd)
        finally:
            os.close(fd)
