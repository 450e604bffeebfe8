"""Every row of the README's table of formats, mounted: the bytes are those that qemu-img reads.

Each readable row has its disks here, and each other row a disk that is refused with the reason.
Disks that qemu-img cannot write come from the makers, which also tell what must be in them.
"""

import gzip
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.mounting import Mount, Mounts, sha256, succeed, vddkfs
from tests.end_to_end.vms import (
    KIB,
    MIB,
    SECTOR,
    data_ranges,
    descriptor,
    make_vmdk,
    make_vmfs,
    noise,
    qemu_map,
    raw,
    sparse_noise,
)
from tests.engines.vmdk.makers import Extent, Flat, Grain, Grains, Hosted, Mark, Zero
from tests.engines.vmdk.makers_chain import Link, describe, paint_chain, write_chain, write_twin
from tests.engines.vmdk.makers_esx import Cowd, SeSparse
from tests.engines.vmdk.makers_stream import Stream, write_ova
from tests.engines.vmdk.test_samples import HASHES
from vddkfs.errors import UnsupportedFormat

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SESPARSE_HASH = "3afa48010241335528fe402f083fc9f3a1013a49485221443a78d9a8604e2f90"
CAPACITY = 6 * MIB + 5 * SECTOR
"""Several tables of each format, and no multiple of a grain or a page."""


@dataclass(frozen=True)
class Made:
    """A disk: mount *source*, look in the folder *name*; *wanted* is the content of each link.

    *maps* is what qemu-img finds allocated, where that is in grains.
    """

    source: Path
    name: str
    wanted: list[bytes]
    maps: list[list[tuple[int, int]]] | None = None
    options: tuple[str, ...] = ()


Make = Callable[[Path], Made]


def judge(found: Mount, made: Made) -> None:
    """Compare all files of a disk with what they must hold, buffered and past the page cache."""
    names = [f"{made.name}/chain/{number}.raw" for number in range(len(made.wanted))]
    assert set(found.ask("listdir", found.path(f"{made.name}/chain"))) == {
        os.path.basename(name) for name in names
    }
    last = len(made.wanted) - 1
    files = [*enumerate(names), (last, f"{made.name}/disk.raw")]
    for number, name in files:
        digest = sha256(made.wanted[number])
        assert found.sha256(name, True) == digest, name
        assert succeed("sha256sum", found.path(name)).stdout.split()[0] == digest, name
        seen = found.ask("seek_map", found.path(name))
        for start, end, data in seen:
            assert data or not made.wanted[number][start:end].strip(b"\0"), (name, start, end)
        if made.maps is not None:
            assert [(start, end) for start, end, data in seen if data] == made.maps[number], name


# Disks that qemu-img writes, as one link.


def by_qemu(subformat: str, in_grains: bool = False) -> Make:
    def make(folder: Path) -> Made:
        path = make_vmdk(folder / "d.vmdk", sparse_noise(subformat, CAPACITY), subformat)
        maps = [data_ranges(qemu_map(path, "vmdk"))] if in_grains else None
        return Made(path, "d", [raw(path)], maps)

    return make


# Disks of the makers.


def grains(seed: object, size: int, capacity: int = CAPACITY, *marks: Mark) -> Grains:
    """Return runs of grains with data, the rest absent or one of *marks*, in no order."""
    draw = random.Random(str(seed))
    content: dict[int, Grain] = {}
    sectors = capacity // SECTOR
    count = -(-sectors // size)
    here = 0
    while here < count:
        run = draw.randrange(1, max(2, 300 // size))
        what = draw.choice([None, Mark.ABSENT, *marks])
        for number in range(here, min(count, here + run)):
            length = min(size, sectors - number * size) * SECTOR
            content[number] = draw.randbytes(length) if what is None else what
        here += run
    with_data = [number for number, what in content.items() if isinstance(what, bytes)]
    draw.shuffle(with_data)
    order = tuple((number, draw.randrange(3)) for number in with_data)
    return Grains(sectors, size, content, order)


def by_makers(*links: Link, known: bool = True) -> Make:
    """Return the maker of a chain. *known*: qemu-img and the mount know the same holes."""

    def make(folder: Path) -> Made:
        twin = folder.parent / "twin"
        twin.mkdir()
        paths = write_chain(folder, links)
        return judged(Made(paths[-1], "0", []), write_twin(folder, twin, links), links, known)

    return make


def judged(made: Made, paths: Sequence[Path], links: Sequence[Link], known: bool) -> Made:
    """Add the contents by qemu-img, having compared them with what the makers meant."""
    wanted = [raw(path) for path in paths]
    model = paths[0].parent.parent / "model"
    for number, content in enumerate(wanted):
        paint_chain(model, links[: number + 1])
        assert sha256(model.read_bytes()) == sha256(content)
    maps = [data_ranges(qemu_map(path, "vmdk")) for path in paths] if known else None
    return Made(made.source, made.name, wanted, maps, made.options)


def one(kind: str, *extents: Extent, embedded: bool = False, qemu_kind: str = "") -> Link:
    return Link(kind, extents, embedded, qemu_kind)


def hosted(version: int, *marks: Mark, redundant: bool = False) -> Link:
    content = grains((version, redundant), 16, CAPACITY, *marks)
    return one("monolithicSparse", Hosted(content, version, redundant), embedded=True)


def thin(folder: Path) -> Made:
    """A flat file with holes, as a thin disk is on VMFS, copied with them."""
    path = make_vmfs(folder / "d.vmdk", sparse_noise("thin", CAPACITY, MIB))
    flat = folder / "d-flat.vmdk"
    succeed("cp", "--sparse=always", flat, folder / "copy")
    (folder / "copy").rename(flat)
    text = path.read_text().replace("# The Disk Data Base", 'ddb.thinProvisioned = "1"')
    path.write_text(text)
    return Made(path, "d", [raw(path)], [data_ranges(qemu_map(flat))])


def thick(folder: Path) -> Made:
    data = noise("thick", CAPACITY)
    path = make_vmfs(folder / "d.vmdk", data)
    return Made(path, "d", [raw(path)], [[(0, CAPACITY)]])


def offset_of_a_file(folder: Path) -> Made:
    flat = Flat(noise("offset", CAPACITY), 63, junk_after=9)
    return by_makers(one("monolithicFlat", flat), known=False)(folder)


def stream(footer: bool, version: int = 3, redundant: bool = False) -> Link:
    content = grains(("stream", footer, version), 128)
    extent = Stream(content, version, footer, redundant)
    return one("streamOptimized", extent, embedded=True)


MIXTURE = one(
    "custom",
    Flat(noise("one", 100 * SECTOR), 7, junk_after=3),
    Zero(4000),
    Hosted(grains("two", 8, MIB)),
    Flat(noise("three", 10 * SECTOR), keyword="VMFS", access="RDONLY"),
    Zero(7),
    Cowd(grains("four", 1, MIB)),
    SeSparse(grains("five", 8, MIB, Mark.ZERO)),
    Flat(noise("six", 11 * SECTOR), 5, keyword="VMFS"),
    qemu_kind="vmfs",
)


def mixture(folder: Path) -> Made:
    """qemu-img takes the flat files that stand for ZERO extents for data: the layout tells."""
    made = by_makers(MIXTURE, known=False)(folder)
    start, ranges = 0, []
    for extent in MIXTURE.extents:
        if isinstance(extent, Flat):
            ranges.append((start, start + extent.sectors * SECTOR))
        elif isinstance(extent, (Hosted, Cowd, SeSparse)):
            for number, what in sorted(extent.grains.content.items()):
                if isinstance(what, bytes):
                    begin = start + number * extent.grains.size * SECTOR
                    ranges.append((begin, begin + len(what)))
        start += extent.sectors * SECTOR
    return replace(made, maps=[merged(ranges)])


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges in order, those that touch as one."""
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


# Snapshots, as their files are copied from a datastore.


def cowd(seed: object) -> Link:
    return one("vmfsSparse", Cowd(grains(seed, 1), child=True))


def sesparse(seed: object) -> Link:
    marks = Mark.ABSENT, Mark.ZERO, Mark.UNMAPPED
    return one("seSparse", SeSparse(grains(seed, 8, CAPACITY, *marks), spread=True))


def datastore(*deltas: Link, source: str = "") -> Make:
    """Return the maker of a VM's folder: a flat base, and *deltas* on it."""

    def make(folder: Path) -> Made:
        base = one("vmfs", Flat(noise("base", CAPACITY), keyword="VMFS"))
        links = (base, *deltas)
        paths: list[Path] = []
        for number, link in enumerate(links):
            name = f"web-{number:06}.vmdk" if number else "web.vmdk"
            ending = {"vmfs": "flat", "vmfsSparse": "delta", "seSparse": "sesparse"}[link.kind]
            file = name.replace(".vmdk", f"-{ending}.vmdk")
            parent = number + 0x10 if number else 0xFFFFFFFF
            hint = paths[-1].name if paths else ""
            text = describe(link, [file], number + 0x11, parent, hint)
            text += f'changeTrackPath="{name.replace(".vmdk", "-ctk.vmdk")}"\n'
            (folder / name).write_text(text)
            link.extents[0].write(folder / file, b"")
            (folder / name.replace(".vmdk", "-ctk.vmdk")).write_bytes(b"\x05" * 4096)
            paths.append(folder / name)
        # The VM's other files are no disks, and nothing is said of them.
        (folder / "web.vmx").write_text(f'scsi0:0.fileName = "{paths[-1].name}"\n')
        for name in ("web.vmsd", "web.nvram", "vmware.log", "web-Snapshot1.vmsn"):
            (folder / name).write_bytes(noise(name, 300))
        made = Made(folder / source if source else folder, "web", [])
        # Below a flat base qemu-img shows the base's data, and the flat file is all data.
        return judged(made, paths, links, known=True)

    return make


# What is neither a file of its own nor all of it.


def archive(folder: Path) -> Made:
    path = make_vmdk(folder / "web-disk1.vmdk", sparse_noise("ova", CAPACITY), "streamOptimized")
    wanted, maps = raw(path), data_ranges(qemu_map(path, "vmdk"))
    write_ova(folder / "web.ova", {"web.ovf": b"<Envelope/>", path.name: path})
    path.unlink()
    return Made(folder / "web.ova", "web-disk1", [wanted], [maps])


def device(folder: Path) -> Made:
    """A whole disk of this machine: the loop device whose name the test left in the folder."""
    name = (folder / "device").read_text()
    line = f'RW {CAPACITY // SECTOR} FLAT "{name}" 0'
    path = folder / "d.vmdk"
    path.write_text(descriptor([line], kind="fullDevice"))
    # qemu-img does not know the createType.
    twin = folder.parent / "twin.vmdk"
    twin.write_text(descriptor([line], kind="monolithicFlat"))
    return Made(path, "d", [raw(twin)], [[(0, CAPACITY)]], ("raw_devices=yes",))


READ: dict[str, dict[str, Make]] = {
    "monolithicSparse (versions 1, 2 and 3, grains of zeros)": {
        "qemu": by_qemu("monolithicSparse", in_grains=True),
        "version 1": by_makers(hosted(1, redundant=True)),
        "version 2": by_makers(hosted(2, Mark.ZERO)),
        "version 3": by_makers(hosted(3, Mark.ZERO)),
        "delta": by_makers(hosted(1), hosted(2, Mark.ABSENT, Mark.ZERO)),
    },
    "monolithicFlat": {"qemu": by_qemu("monolithicFlat"), "offset": offset_of_a_file},
    "twoGbMaxExtentSparse": {
        "qemu": by_qemu("twoGbMaxExtentSparse", in_grains=True),
        "three": by_makers(
            one(
                "twoGbMaxExtentSparse",
                Hosted(grains("a", 16, 2 * MIB)),
                Hosted(grains("b", 16, 64 * KIB)),
                Hosted(grains("c", 128, MIB + SECTOR)),
            )
        ),
    },
    "twoGbMaxExtentFlat": {
        "qemu": by_qemu("twoGbMaxExtentFlat"),
        "three": by_makers(
            one(
                "twoGbMaxExtentFlat",
                *(Flat(noise(size, size * SECTOR)) for size in (4097, 1, 2048)),
            )
        ),
    },
    "vmfs (thick, thin: a descriptor with its `-flat` file)": {"thick": thick, "thin": thin},
    "streamOptimized (with and without a footer)": {
        "qemu": by_qemu("streamOptimized"),
        "footer": by_makers(stream(footer=True)),
        "no footer": by_makers(stream(footer=False, version=1, redundant=True)),
    },
    "vmfsSparse (COWD) snapshots": {
        "two": datastore(cowd(1), cowd(2)),
        "vmx": datastore(cowd(1), cowd(2), source="web.vmx"),
    },
    "seSparse snapshots": {
        "two": datastore(sesparse(1), sesparse(2)),
        "mixed with COWD": datastore(sesparse(1), cowd(2), sesparse(3), cowd(4)),
    },
    "custom: mixtures of all the above and ZERO extents": {"mixture": mixture},
    "`.ova` archives, of disks of all the above": {"streamOptimized": archive},
    "fullDevice, partitionedDevice": {"fullDevice": device},
}
"""Rows that are read, with their disks."""


def refusing(line: str, kind: str, more: str = "") -> Make:
    def make(folder: Path) -> Made:
        path = folder / "d.vmdk"
        path.write_text(descriptor([line], kind=kind) + more)
        (folder / "d-flat.vmdk").write_bytes(noise("encrypted", 4 * KIB))
        (folder / "d-rdm.vmdk").write_bytes(bytes(512))
        return Made(path, "d", [])

    return make


def chunks(folder: Path) -> Made:
    path = make_vmdk(folder / "web-disk1.vmdk", noise("chunks", MIB), "streamOptimized")
    data = path.read_bytes()
    pieces = {f"web-disk1.vmdk.{n:09}": data[n << 19 :][: 1 << 19] for n in range(2)}
    write_ova(folder / "web.ova", {"web.ovf": b"<Envelope/>", **pieces})
    return Made(folder / "web.ova", "", [])


def zipped(folder: Path) -> Made:
    path = make_vmdk(folder / "web-disk1.vmdk", noise("zipped", MIB), "streamOptimized")
    files = {"web.ovf": b"<Envelope/>", "web-disk1.vmdk.gz": gzip.compress(path.read_bytes())}
    write_ova(folder / "web.ova", files)
    return Made(folder / "web.ova", "", [])


CRYPT = 'ddb.iofilters = "vmwarevmcrypt"\n'
MAPPING = 'RW 8 VMFSRDM "d-rdm.vmdk"', 'RW 8 VMFSRDMP "d-rdm.vmdk"'
NOT_READ: dict[str, dict[str, tuple[Make, str]]] = {
    "vmfsRDM, vmfsRDMP (raw device mappings)": {
        "vmfsRDM": (refusing(MAPPING[0], "vmfs"), "vmfsRDM"),
        "vmfsRDMP": (refusing(MAPPING[1], "vmfs"), "vmfsRDMP"),
        "type": (refusing(MAPPING[0], "vmfsRawDeviceMap"), "vmfsRawDeviceMap"),
    },
    "encrypted disks": {
        "encrypted": (refusing('RW 8 VMFS "d-flat.vmdk"', "vmfs", CRYPT), "encrypted")
    },
    "compressed or chunked members of an `.ova`": {
        "compressed": (zipped, "web-disk1.vmdk.gz: is stored compressed or in pieces"),
        "chunked": (chunks, "web-disk1.vmdk.000000000: is stored compressed or in pieces"),
    },
}
"""Rows that are not read, with disks that are refused, and a word of the reason."""


def table() -> list[list[str]]:
    """Return the cells of the table in the README's section "Formats", without the heading."""
    section = re.search(r"^## Formats$(.*?)^## ", README, re.M | re.S)
    assert section
    lines = [line for line in section[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def cases(rows: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    return [
        pytest.param(case, id=f"{row.split()[0].strip(',`:')}-{name}")
        for row, named in rows.items()
        for name, case in named.items()
    ]


def test_the_table_has_the_rows_that_are_tested() -> None:
    rows = table()
    assert all(len(row) == 5 and all(row) for row in rows)
    assert [row[0] for row in rows] == [*READ, *NOT_READ]
    assert [row[0] for row in rows if row[1].startswith("yes")] == [*READ]
    assert [row[0] for row in rows if row[1].startswith("no: ")] == [*NOT_READ]
    assert all(READ.values())
    assert all(NOT_READ.values())


@pytest.mark.parametrize("make", cases(READ))
def test_content_and_holes(
    request: pytest.FixtureRequest, mount: Mounts, vm: Path, tmp_path: Path, make: Make
) -> None:
    if make is device:
        request.getfixturevalue("loops")
        backing = tmp_path / "backing"
        backing.write_bytes(noise("device", CAPACITY))
        name = succeed("losetup", "--find", "--show", backing).stdout.strip()
        request.addfinalizer(lambda: succeed("losetup", "--detach", name))
        (vm / "device").write_text(name)
    made = make(vm)
    found = mount(made.source, *made.options)
    judge(found, made)
    assert found.json("vm.json")["left_out"] == []


@pytest.mark.parametrize("refused", cases(NOT_READ))
def test_refused_with_the_reason(able: None, vm: Path, refused: tuple[Make, str]) -> None:
    make, words = refused
    made = make(vm)
    place = vm.parent / "place"
    place.mkdir()
    done = vddkfs("mount", made.source, place)
    assert done.returncode == UnsupportedFormat.exit_code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("vddkfs: ")
    assert words in line
    assert "; " in line


def spoilt(folder: Path) -> tuple[Path, bytes]:
    """Make a disk whose primary grain directory leads nowhere, and return what it shows."""
    wanted = sparse_noise("spoilt", 4 * MIB)
    path = make_vmdk(folder / "0.vmdk", wanted)
    with open(path, "r+b") as file:
        file.seek(56)
        directory = int.from_bytes(file.read(8), "little")
        file.seek(directory * SECTOR)
        file.write(b"\xff" * 4)
    return path, wanted


def test_redundant_directory(mount: Mounts, vm: Path) -> None:
    path, wanted = spoilt(vm)
    found = mount(path)
    found.expect(r"says: .*0.vmdk: .*; the redundant grain directory is used, see `vddkfs check`")
    for direct in (True, False):
        assert found.sha256("0/disk.raw", direct) == sha256(wanted)
    for start, end, data in found.ask("seek_map", found.path("0/disk.raw")):
        assert data or not wanted[start:end].strip(b"\0")


def test_info_says_what_is_odd(able: None, vm: Path) -> None:
    made = by_makers(hosted(1, redundant=True))(vm)
    with open(made.source, "r+b") as file:
        file.seek(56)
        file.write((1 << 40).to_bytes(8, "little"))
        file.seek(72)
        file.write(b"\1")
    done = vddkfs("info", made.source)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if ": note: " in line]
    assert all(line.startswith(f"{made.source}: note: 0.vmdk: ") for line in notes)
    assert len(notes) == 2
    assert "the redundant one is used" in notes[0]
    assert "was not closed" in notes[1]
    (disk,) = json.loads(vddkfs("info", "--json", made.source).stdout)["disks"]
    assert [f"{made.source}: note: {note}" for note in disk["links"][0]["notes"]] == notes


def test_info_of_a_folder_from_a_datastore(able: None, vm: Path) -> None:
    datastore(cowd(1), sesparse(2))(vm)
    done = vddkfs("info", vm)
    assert done.returncode == 0, done.stderr
    heading, *rows = (line.split("\t") for line in done.stdout.splitlines()[:4])
    told = [dict(zip(heading, row, strict=True)) for row in rows]
    assert [row["format"] for row in told] == ["vmfs", "vmfsSparse", "seSparse"]
    assert [row["extents"] for row in told] == ["VMFS", "VMFSSPARSE", "SESPARSE"]
    assert [row["parent cid"] for row in told] == ["ffffffff", *(row["cid"] for row in told[:2])]
    remarks = done.stdout.splitlines()[4:]
    assert remarks[0] == "web: adapter lsilogic, hardware version 14"
    assert remarks[1:] == [
        f"{row['link']}: changes are tracked in {Path(row['link']).stem}-ctk.vmdk" for row in told
    ]


def test_samples(mount: Mounts, vm: Path) -> None:
    """Real disks of VMware's products and others, each of a known hash."""
    folder = os.environ.get("VDDKFS_SAMPLES")
    if not folder:
        pytest.skip("absent: VDDKFS_SAMPLES, which names a folder of sample VMDKs")
    for path in Path(folder).glob("*.vmdk"):
        shutil.copy(path, vm)
    packed = Path(folder, "sesparse-extent.vmdk.gz").read_bytes()
    (vm / "x-sesparse.vmdk").write_bytes(gzip.decompress(packed))
    line = 'RW 1048576 SESPARSE "x-sesparse.vmdk"'
    (vm / "x.vmdk").write_text(descriptor([line], kind="seSparse"))
    wanted = HASHES | {"x": SESPARSE_HASH}
    found = mount(vm)
    assert set(found.ask("listdir", found.path())) == {*wanted, "vm.json", ".vddkfs"}
    for name, digest in wanted.items():
        image = f"{name}/disk.raw"
        assert found.sha256(image, True) == digest
        assert succeed("sha256sum", found.path(image)).stdout.split()[0] == digest
        content = raw(vm / f"{name}.vmdk")
        assert sha256(content) == digest
        for start, end, data in found.ask("seek_map", found.path(image)):
            assert data or not content[start:end].strip(b"\0")
    assert found.json("vm.json")["left_out"] == []
