"""VM folders for the tests: made by qemu-img and qemu-io, or written by hand where those cannot."""

import json
import random
from pathlib import Path
from typing import Any

from tests.end_to_end.mounting import sha256, succeed

KIB = 1024
MIB = 1024 * 1024
SECTOR = 512


def noise(seed: object, size: int) -> bytes:
    """Return bytes that are nowhere the same, the same ones at every run."""
    return random.Random(str(seed)).randbytes(size)


def sparse_noise(seed: object, size: int, step: int = 256 * KIB) -> bytes:
    """Return noise with holes: every second piece is zeros."""
    data = bytearray(noise(seed, size))
    for start in range(step, size, 2 * step):
        data[start : start + step] = bytes(min(step, size - start))
    return bytes(data)


def make_vmdk(path: Path, data: bytes, subformat: str = "monolithicSparse") -> Path:
    """Make a VMDK that shows *data*."""
    raw = path.with_suffix(".tmp")
    raw.write_bytes(data)
    options = f"subformat={subformat}"
    succeed("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", options, raw, path)
    raw.unlink()
    return path


def make_empty(path: Path, size: int, subformat: str = "monolithicSparse") -> Path:
    succeed(
        *("qemu-img", "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", path, str(size))
    )
    return path


def make_delta(path: Path, parent: str) -> Path:
    """Make an empty delta link on *parent*, a name in the same folder."""
    command = ("qemu-img", "create", "-q", "-f", "vmdk", "-b", parent, "-F", "vmdk", path)
    succeed(*command, cwd=path.parent)
    return path


def write(path: Path, offset: int, data: bytes, form: str = "vmdk") -> None:
    """Write *data* into a VMDK with qemu-io; not below a child, whose CID check would fail."""
    pattern = path.with_suffix(".pattern")
    pattern.write_bytes(data)
    done = succeed("qemu-io", "-f", form, "-c", f"write -s {pattern} {offset} {len(data)}", path)
    pattern.unlink()
    assert "wrote" in done.stdout, done.stdout


def raw(path: Path) -> bytes:
    """Return what qemu-img reads from a link and all below it."""
    target = path.with_suffix(".converted")
    succeed("qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, target)
    data = target.read_bytes()
    target.unlink()
    return data


def raw_sha256(path: Path) -> str:
    return sha256(raw(path))


def qemu_map(path: Path, form: str = "raw") -> list[dict[str, Any]]:
    done = succeed("qemu-img", "map", "-f", form, "--output=json", path)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def data_ranges(extents: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Return (start, end) of the data in a qemu-img map, neighbours merged."""
    found: list[tuple[int, int]] = []
    for extent in extents:
        if extent["data"]:
            start, end = extent["start"], extent["start"] + extent["length"]
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, end))
    return found


def descriptor(
    extents: list[str],
    *,
    kind: str,
    cid: str = "12345678",
    parent: str = "ffffffff",
    hint: str = "",
) -> str:
    lines = ["# Disk DescriptorFile", "version=1", f"CID={cid}", f"parentCID={parent}"]
    lines.append(f'createType="{kind}"')
    if hint:
        lines.append(f'parentFileNameHint="{hint}"')
    lines += ["", "# Extent description", *extents, "", "# The Disk Data Base", "#DDB", ""]
    lines += ['ddb.adapterType = "lsilogic"', 'ddb.virtualHWVersion = "14"']
    return "\n".join(lines) + "\n"


def make_vmfs(path: Path, data: bytes, **keys: str) -> Path:
    """Make a flat VMDK as ESXi does: a descriptor, and NAME-flat.vmdk."""
    flat = path.with_name(f"{path.stem}-flat.vmdk")
    flat.write_bytes(data)
    line = f'RW {len(data) // SECTOR} VMFS "{flat.name}"'
    path.write_text(descriptor([line], kind="vmfs", **keys))
    return path


def make_chain(folder: Path, links: int = 3, size: int = 8 * MIB, name: str = "web") -> list[Path]:
    """Make a chain of deltas, each with writes of its own; return the links, base first."""
    base = make_vmdk(folder / f"{name}.vmdk", sparse_noise(f"{name}-base", size))
    paths = [base]
    for number in range(1, links):
        path = make_delta(folder / f"{name}-{number:06}.vmdk", paths[-1].name)
        random_ = random.Random(f"{name}-{number}")
        for count in range(4):
            length = random_.choice([SECTOR, 3 * SECTOR, 64 * KIB, 200 * KIB])
            offset = random_.randrange(0, size - length) // SECTOR * SECTOR
            write(path, offset, noise((name, number, count), length))
        paths.append(path)
    return paths


def link_files(path: Path) -> list[Path]:
    """Return all files of the folder that a link may consist of."""
    return sorted(path.parent.glob(f"{path.stem}*"))
