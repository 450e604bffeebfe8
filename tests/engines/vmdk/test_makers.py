"""The makers of VMDKs, read by others: every file has the content that its layout says.

These tests do not use the engine. Which reader can what (qemu-img 7.2, libvmdk 20200926,
dissect.hypervisor 3.21):

| layout | qemu-img | libvmdk | dissect |
|---|---|---|---|
| hosted sparse, version 1, 2, 3, with a redundant directory | yes | grains over 4 KiB | yes |
| grains of zeros (entry 1) | yes | takes them for data at sector 1 | yes |
| several extents | yes | sparse ones | without ZERO, without offsets |
| an extent that ends inside a grain, before another | wrong bytes at the seam | same | yes |
| flat and vmfs | yes | vmfs | without offsets |
| ZERO, RDONLY, createType custom | no, left out or refused | no | ZERO is left out |
| vmfsSparse (COWD) | yes | yes | yes |
| seSparse | yes | no | yes |
| seSparse, unmapped grains in a delta | zeros | no | takes them for the parent's |
| streamOptimized, with a footer or without, version 1, 2, 3 | yes | grains over 4 KiB | yes |
| a footer in one of several extents | no, looks in the descriptor | no | yes |
| compressed without markers | a zlib stream, if it shrank | no | its length, then the stream |
| deltas | yes | no: other bytes | where the parent is no smaller |
"""

import gzip
import hashlib
import json
import random
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines.vmdk import oracles
from tests.engines.vmdk.makers import (
    SECTOR,
    Extent,
    Flat,
    Grain,
    Grains,
    Hosted,
    Mark,
    Zero,
)
from tests.engines.vmdk.makers_chain import Link, describe, paint_chain, write_chain, write_twin
from tests.engines.vmdk.makers_esx import Cowd, SeSparse
from tests.engines.vmdk.makers_stream import Stream, write_ova

ABSENT, ZERO, UNMAPPED = Mark.ABSENT, Mark.ZERO, Mark.UNMAPPED


@dataclass(frozen=True)
class Case:
    """A chain, and who but qemu-img can read it."""

    links: Sequence[Link]
    qemu: bool = True
    dissect: bool = True
    libvmdk: bool = True


def grains(
    capacity: int,
    size: int,
    *,
    seed: int = 0,
    marks: Sequence[Mark] = (ABSENT,),
    share: float = 0.5,
    cut: bool = False,
    shuffled: bool = True,
) -> Grains:
    """Return random grains, a *share* of them with data, in random order and with gaps."""
    draw = random.Random(f"{capacity} {size} {seed}")
    content: dict[int, Grain] = {}
    for number in range(-(-capacity // size)):
        length = min(size, capacity - number * size) * SECTOR
        if draw.random() >= share:
            content[number] = draw.choice(marks)
        elif draw.random() < 0.5:
            content[number] = draw.randbytes(length)
        else:
            content[number] = bytes([draw.randrange(256)]) * length
    order = [number for number, what in content.items() if isinstance(what, bytes)]
    if shuffled:
        draw.shuffle(order)
    return Grains(
        capacity,
        size,
        content,
        tuple((n, draw.randrange(4) if shuffled else 0) for n in order),
        cut,
    )


def data(sectors: int) -> bytes:
    return random.Random(sectors).randbytes(sectors * SECTOR)


def alone(kind: str, *extents: Extent, embedded: bool = False, qemu_kind: str = "") -> list[Link]:
    return [Link(kind, extents, embedded, qemu_kind)]


def mono(grains: Grains, version: int = 1, redundant: bool = False, tables: bool = False) -> Link:
    return Link("monolithicSparse", (Hosted(grains, version, redundant, tables),), True)


def stream(grains: Grains, version: int = 3, footer: bool = True, short: bool = False) -> Link:
    return Link("streamOptimized", (Stream(grains, version, footer, False, short),), True)


def cases() -> dict[str, Case]:
    made = {
        "hosted, version 1": Case([mono(grains(5000, 16))]),
        "hosted, version 1, redundant": Case([mono(grains(20007, 16), redundant=True)]),
        "hosted, all tables": Case([mono(grains(70000, 64, share=0.1), 1, True, True)]),
        "hosted, version 2": Case([mono(grains(5000, 128), 2)]),
        "hosted, version 3": Case([mono(grains(5003, 128), 3)]),
        "hosted, grains of 4 KiB": Case([mono(grains(5003, 8), 1, True)], libvmdk=False),
        "hosted, zeros": Case([mono(grains(5000, 16, marks=(ABSENT, ZERO)), 2)], libvmdk=False),
        "hosted, empty": Case([mono(Grains(5000, 128, {}))]),
        "hosted, cut": Case(
            [mono(grains(1000, 128, share=1, cut=True, shuffled=False))], libvmdk=False
        ),
        "split": Case(
            alone(
                "twoGbMaxExtentSparse",
                Hosted(grains(5008, 16)),
                Hosted(grains(3001, 16), redundant=True, all_tables=True),
            )
        ),
        "flat": Case(alone("monolithicFlat", Flat(data(100))), libvmdk=False),
        "flat, offset": Case(
            alone("monolithicFlat", Flat(data(100), 7, junk_after=3)), dissect=False, libvmdk=False
        ),
        "flat, split": Case(
            alone("twoGbMaxExtentFlat", Flat(data(99)), Flat(data(100))), libvmdk=False
        ),
        "vmfs": Case(alone("vmfs", Flat(data(101), keyword="VMFS"))),
        "cowd, grains of a sector": Case(alone("vmfsSparse", Cowd(grains(9000, 1)))),
        "cowd, all tables": Case(alone("vmfsSparse", Cowd(grains(9001, 2), True, True))),
        "cowd, grains of 64 KiB": Case(alone("vmfsSparse", Cowd(grains(9001, 128, cut=True)))),
        "cowd, empty": Case(alone("vmfsSparse", Cowd(Grains(9000, 1, {}))), libvmdk=False),
        "seSparse": Case(
            alone("seSparse", SeSparse(grains(9001, 8, marks=tuple(Mark)))), libvmdk=False
        ),
        "seSparse, many tables": Case(
            alone("seSparse", SeSparse(grains(90010, 8, share=0.05), True, True)), libvmdk=False
        ),
        "stream, redundant": Case(
            alone(
                "streamOptimized",
                Stream(grains(9001, 16), 1, footer=False, redundant=True),
                embedded=True,
            )
        ),
        "stream, short": Case([stream(grains(9001, 128, share=1), short=True)]),
        "stream, zeros": Case([stream(grains(9001, 128, marks=(ABSENT, ZERO)))], libvmdk=False),
        "stream, grains of 4 KiB": Case([stream(grains(9001, 8))], libvmdk=False),
        "stream, as extents": Case(
            alone(
                "twoGbMaxExtentSparse",
                Stream(grains(896, 128), footer=False),
                Stream(grains(901, 128), footer=False),
            ),
            libvmdk=False,
        ),
        "stream, footer of an extent": Case(
            alone("twoGbMaxExtentSparse", Stream(grains(901, 128))), qemu=False, libvmdk=False
        ),
        "stream, no markers": Case(
            alone(
                "streamOptimized",
                Stream(
                    Grains(1280, 128, {n: bytes([n]) * 65536 for n in range(1, 9)}),
                    footer=False,
                    prefix="nothing",
                ),
                embedded=True,
            ),
            dissect=False,
            libvmdk=False,
        ),
        "stream, lengths for markers": Case(
            alone(
                "streamOptimized",
                Stream(grains(9001, 128), footer=False, prefix="length"),
                embedded=True,
            ),
            qemu=False,
            libvmdk=False,
        ),
        "seam inside a grain": Case(
            alone("twoGbMaxExtentSparse", Hosted(grains(5001, 16)), Hosted(grains(3000, 16))),
            qemu=False,
            libvmdk=False,
        ),
        "mixture": Case(
            alone(
                "custom",
                Flat(data(100), 7, junk_after=3),
                Zero(77),
                Hosted(grains(1000, 8)),
                Flat(data(10), keyword="VMFS", access="RDONLY"),
                Cowd(grains(100, 1)),
                SeSparse(grains(1000, 8)),
                Flat(data(11), 5, keyword="VMFS"),
                qemu_kind="vmfs",
            ),
            dissect=False,
            libvmdk=False,
        ),
        "chain": Case(chain([5000] * 6), libvmdk=False),
        "chain, growing": Case(
            chain([3001, 3001, 4000, 4000, 4000, 5001]), dissect=False, libvmdk=False
        ),
        "chain, shrinking": Case(
            chain([5000, 5000, 1002, 1002, 900, 2007]), dissect=False, libvmdk=False
        ),
        "chain, unmapped": Case(
            [
                *alone("monolithicFlat", Flat(data(5000))),
                *alone("seSparse", SeSparse(grains(5000, 8, marks=(ABSENT, UNMAPPED)))),
            ],
            dissect=False,
            libvmdk=False,
        ),
    }
    for version in (1, 2, 3):
        for footer in (False, True):
            name = f"stream, version {version}, {'with' if footer else 'without'} a footer"
            made[name] = Case([stream(grains(90001, 16, share=0.05), version, footer)])
    return made


def chain(sectors: Sequence[int]) -> list[Link]:
    """Return a chain of all kinds; its links have so many sectors."""
    some = (ABSENT, ABSENT, ZERO)
    return [
        *alone("monolithicFlat", Flat(data(sectors[0]))),
        *alone("vmfsSparse", Cowd(grains(sectors[1], 1, share=0.3), child=True)),
        *alone("seSparse", SeSparse(grains(sectors[2], 8, marks=some, share=0.3))),
        mono(grains(sectors[3], 8, marks=some, share=0.3), 2, True),
        stream(grains(sectors[4], 128, marks=some, share=0.3)),
        *alone("vmfsSparse", Cowd(grains(sectors[5], 4, share=0.3))),
    ]


CASES = cases()


def named(reader: str) -> list[str]:
    return [name for name, case in CASES.items() if getattr(case, reader)]


@pytest.mark.skipif(not oracles.have_qemu(), reason="qemu-img is not installed")
@pytest.mark.parametrize("name", named("qemu"))
def test_qemu(tmp_path: Path, name: str) -> None:
    (tmp_path / "twin").mkdir()
    paths, model = written(tmp_path, CASES[name].links)
    twins = write_twin(paths[0].parent, tmp_path / "twin", CASES[name].links)
    oracles.qemu_raw(twins[-1], tmp_path / "raw")
    assert oracles.first_difference(tmp_path / "raw", model) is None


@pytest.mark.skipif(not oracles.have_dissect(), reason="dissect.hypervisor is not installed")
@pytest.mark.parametrize("name", named("dissect"))
def test_dissect(tmp_path: Path, name: str) -> None:
    paths, model = written(tmp_path, CASES[name].links)
    oracles.dissect_raw(paths[-1], tmp_path / "raw")
    assert oracles.first_difference(tmp_path / "raw", model) is None


@pytest.mark.skipif(not oracles.have_libvmdk(), reason="libvmdk-utils or FUSE is not there")
@pytest.mark.parametrize("name", named("libvmdk"))
def test_libvmdk(tmp_path: Path, name: str) -> None:
    paths, model = written(tmp_path, CASES[name].links)
    capacity = CASES[name].links[-1].sectors * SECTOR
    assert f"({capacity} bytes)" in oracles.vmdkinfo(paths[-1])
    with oracles.vmdkmounted(paths[-1], tmp_path / "mount") as raw:
        assert oracles.first_difference(raw, model) is None


def written(folder: Path, links: Sequence[Link]) -> tuple[list[Path], Path]:
    """Write a chain and its model; return the paths of the links, and of the model."""
    (folder / "disk").mkdir()
    paint_chain(folder / "model", links)
    return write_chain(folder / "disk", links), folder / "model"


def test_redundant_tables_are_a_whole_second_set(tmp_path: Path) -> None:
    """With the first directory and its tables spoilt, the other still has all."""
    link = mono(grains(20000, 16), redundant=True)
    (path,), model = written(tmp_path, [link])
    head = bytearray(path.read_bytes())
    redundant = int.from_bytes(head[48:56], "little")
    primary = int.from_bytes(head[56:64], "little")
    assert 0 < redundant < primary
    head[redundant * SECTOR : primary * SECTOR] = bytes((primary - redundant) * SECTOR)
    path.write_bytes(head)
    oracles.qemu_raw(path, tmp_path / "raw")
    assert oracles.first_difference(tmp_path / "raw", model) is None


@pytest.mark.parametrize(
    "form",
    [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT],
    ids=["ustar", "gnu", "pax"],
)
def test_archive(tmp_path: Path, form: int) -> None:
    """A disk in an archive is read in place, where the archive's list says that it is."""
    (path,), model = written(tmp_path, [stream(grains(9001, 128))])
    name = "a disk with a rather long name, " + "x" * 60 + "é.vmdk"
    files: dict[str, bytes | Path] = {name: path, "vm.mf": b"SHA256", "vm.ovf": b"<Envelope/>"}
    write_ova(tmp_path / "vm.ova", files, form=form)
    with tarfile.open(tmp_path / "vm.ova") as archive:
        assert archive.getnames() == ["vm.ovf", name, "vm.mf"]
        member = archive.getmember(name)
    inside = {
        "driver": "vmdk",
        "file": {
            "driver": "raw",
            "offset": member.offset_data,
            "size": member.size,
            "file": {"driver": "file", "filename": str(tmp_path / "vm.ova")},
        },
    }
    raw = tmp_path / "raw"
    subprocess.run(
        ["qemu-img", "convert", "-O", "raw", "json:" + json.dumps(inside), str(raw)], check=True
    )
    assert oracles.first_difference(raw, model) is None


def test_real_sesparse(tmp_path: Path, samples: Path) -> None:
    """The descriptor that goes with a real extent, and our header beside the real one."""
    (tmp_path / "x.vmdk").write_bytes(
        gzip.decompress((samples / "sesparse-extent.vmdk.gz").read_bytes())
    )
    link = Link("seSparse", (SeSparse(Grains(1048576, 8, {0: b"a" * 4096}), spread=True),))
    text = describe(link, ["x.vmdk"], 1, 0xFFFFFFFF, "")
    (tmp_path / "disk.vmdk").write_text(text)
    oracles.qemu_raw(tmp_path / "disk.vmdk", tmp_path / "raw")
    with open(tmp_path / "raw", "rb") as raw:
        digest = hashlib.file_digest(raw, "sha256").hexdigest()
    assert digest == "3afa48010241335528fe402f083fc9f3a1013a49485221443a78d9a8604e2f90"
    link.extents[0].write(tmp_path / "mine.vmdk", b"")
    with open(tmp_path / "x.vmdk", "rb") as real, open(tmp_path / "mine.vmdk", "rb") as mine:
        assert real.read(80) == mine.read(80)


def test_first_difference(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for left, right, wanted in [
        (b"", b"", None),
        (bytes(1024), bytes(1024), None),
        (bytes(1024), bytes(1023) + b"a", 1),
        (bytes(1024), bytes(512), 1),
        (bytes(5 << 20) + b"a", bytes(5 << 20) + b"b", (5 << 20) // 512),
    ]:
        one.write_bytes(left)
        other.write_bytes(right)
        assert oracles.first_difference(one, other) == wanted


def test_unreadable_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.vmdk").write_bytes(b"nothing of the kind" * 100)
    readers: list[Callable[[], object]] = [
        lambda: oracles.qemu_raw(tmp_path / "x.vmdk", tmp_path / "raw")
    ]
    if oracles.have_libvmdk():
        readers.append(lambda: oracles.vmdkinfo(tmp_path / "x.vmdk"))
    if oracles.have_dissect():
        missing = tmp_path / "missing.vmdk"
        readers.append(lambda: oracles.dissect_raw(missing, tmp_path / "raw"))
    for reader in readers:
        with pytest.raises(oracles.Unreadable):
            reader()
