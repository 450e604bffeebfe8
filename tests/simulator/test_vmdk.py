"""The simulator's VMDK code against qemu-img, and against images written byte by byte."""

import ctypes
import os
import random
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulator.vmdk_images import (
    SECTOR,
    ZEROED,
    Piece,
    SparseExtent,
    descriptor,
    merged,
    monolithic,
    qemu_check,
    qemu_img,
    qemu_io,
    qemu_map,
    qemu_raw,
    tool,
)

SIMULATOR = Path(__file__).resolve().parents[2] / "contrib" / "simulator"
FLAGS = [
    *("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wshadow", "-fPIC", "-D_GNU_SOURCE"),
    *("-D_FILE_OFFSET_BITS=64", f"-I{SIMULATOR}/vmdk", f"-I{SIMULATOR}/include"),
]
SANITIZE = ["-g", "-fno-sanitize-recover=all"]
MIB = 1 << 20
HOLE = 0xFFFFFFFF
WRITABLE, SINGLE, KEEP_CID = 1, 2, 4
OUT_OF_MEMORY, INVALID_ARG, FILE_NOT_FOUND, NOT_SUPPORTED = 2, 3, 4, 6
DISK_FULL = 8
WRONG_FILE_TYPE, READ_ONLY, EXISTS = 9, 11, 12
PARTIAL_CHAIN, NEEDS_REPAIR, OUT_OF_RANGE, CID_MISMATCH = 16003, 16006, 16007, 16008
CANT_SHRINK, WRONG_VERSION, OPEN_PARENT, UNSERVED = 16009, 16011, 16012, 16013
INVALID_CHAIN, INVALID_DISK, CAPACITY_MISMATCH = 16030, 16063, 16067
PARENT_NOT_ALLOWED, ROOT_LINK = 16068, 16069
TYPES = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "vmfs",
    "vmfsThin",
)
QEMU_TYPES = TYPES[:4]


class Segment(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_uint32),
        ("link", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
    )


class Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("count", ctypes.c_uint64))


class Failed(Exception):
    def __init__(self, code: int, why: str = "") -> None:
        super().__init__(f"{why} ({code})")
        self.code = code


class Disk:
    """A disk opened in this process."""

    def __init__(self, library: ctypes.CDLL, path: Path, flags: int = 0) -> None:
        self.library = library
        self.disk = ctypes.c_void_p()
        why = ctypes.create_string_buffer(256)
        code = library.vmdk_open(str(path).encode(), flags, ctypes.byref(self.disk), why)
        if code:
            raise Failed(code, why.value.decode())
        library.vmdk_capacity.restype = ctypes.c_uint64
        self.capacity: int = library.vmdk_capacity(self.disk)

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        self.library.vmdk_close(self.disk)

    def read(self, start: int = 0, count: int | None = None) -> bytes:
        count = self.capacity - start if count is None else count
        buffer = ctypes.create_string_buffer(max(count * SECTOR, 1))
        code = self.library.vmdk_read(
            self.disk, ctypes.c_uint64(start), ctypes.c_uint64(count), buffer
        )
        if code:
            raise Failed(code)
        return buffer.raw[: count * SECTOR]

    def write(self, start: int, data: bytes) -> None:
        count = len(data) // SECTOR
        code = self.library.vmdk_write(
            self.disk, ctypes.c_uint64(start), ctypes.c_uint64(count), data
        )
        if code:
            raise Failed(code)

    def resolve(self, start: int, count: int, most: int = 4096) -> tuple[list[Segment], int]:
        segments = (Segment * most)()
        used, covered = ctypes.c_size_t(), ctypes.c_uint64()
        code = self.library.vmdk_resolve(
            self.disk,
            ctypes.c_uint64(start),
            ctypes.c_uint64(count),
            segments,
            ctypes.c_size_t(most),
            ctypes.byref(used),
            ctypes.byref(covered),
        )
        if code:
            raise Failed(code)
        return list(segments[: used.value]), covered.value

    def allocated(self, chunk: int, most: int = 4096) -> list[tuple[int, int]]:
        ranges = (Range * most)()
        used = ctypes.c_size_t()
        code = self.library.vmdk_allocated(
            self.disk,
            ctypes.c_uint64(0),
            ctypes.c_uint64(self.capacity),
            ctypes.c_uint64(chunk),
            ranges,
            ctypes.c_size_t(most),
            ctypes.byref(used),
        )
        if code:
            raise Failed(code)
        return [(found.start, found.count) for found in ranges[: used.value]]


Run = Callable[..., bytes]


class Built:
    def __init__(self, folder: Path) -> None:
        self.tool, self.shared = folder / "vixsim-vmdk", folder / "libvmdk.so"
        sources = sorted(map(str, (SIMULATOR / "vmdk").glob("*.c")))
        command = [tool("cc"), *FLAGS]
        client = str(SIMULATOR / "clients" / "vmdk_tool.c")
        builds = [
            [
                *command,
                "-O1",
                *SANITIZE,
                "-fsanitize=address,undefined",
                "-o",
                str(self.tool),
                *sources,
                client,
            ],
            [
                *command,
                "-O2",
                *SANITIZE,
                "-fsanitize=undefined",
                "-shared",
                "-o",
                str(self.shared),
                *sources,
            ],
        ]
        running = [subprocess.Popen(build, stderr=subprocess.PIPE, text=True) for build in builds]
        for process in running:
            _, said = process.communicate(timeout=100)
            assert process.returncode == 0, said


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("vixsim-vmdk"))


@pytest.fixture(scope="session")
def library(built: Built) -> ctypes.CDLL:
    return ctypes.CDLL(str(built.shared))


@pytest.fixture(scope="session")
def run(built: Built) -> Run:
    """The tool with ASan and UBSan; a code to *fail* with makes sure of one clear line."""

    def run(*words: object, data: bytes = b"", fail: int | None = None) -> bytes:
        command = [str(built.tool), *map(str, words)]
        done = subprocess.run(command, input=data, capture_output=True, timeout=60)
        said = done.stderr.decode()
        if fail is None:
            assert done.returncode == 0, f"{command}: {said}"
            assert said == ""
        else:
            assert done.returncode == 1, f"{command}: {done.returncode}, {said}"
            assert re.fullmatch(rf"vixsim-vmdk: .+ \({fail}\)\n", said), said
        return done.stdout

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that ends with the test: the disks would otherwise be kept for three runs."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as name:
        yield Path(name)


def info(run: Run, path: Path) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in run("info", path).decode().splitlines())


def content(run: Run, path: Path) -> bytes:
    return run("read", path, 0, info(run, path)["capacity"])


def shown_map(run: Run, path: Path) -> list[Piece]:
    pieces = []
    for line in run("map", path).decode().splitlines():
        words = line.split(" ", 4)
        start, count = int(words[0]), int(words[1])
        if words[2] == "hole":
            pieces.append(Piece(start, count, None, None, None))
        else:
            name = Path(words[4]).name
            pieces.append(Piece(start, count, int(words[2]), int(words[3]), name))
    return merged(pieces)


def scatter(
    write: Callable[[int, bytes], None], model: bytearray, seed: int, times: int = 6
) -> None:
    """Writes of all sizes at all places, mirrored in the model."""
    dice = random.Random(seed)
    capacity = len(model) // SECTOR
    for _ in range(times):
        count = min(dice.choice([1, 3, 8, 127, 128, 300, 1000]), capacity)
        start = dice.randrange(capacity - count + 1)
        data = dice.randbytes(count * SECTOR)
        write(start, data)
        model[start * SECTOR : start * SECTOR + len(data)] = data


def writer(run: Run, path: Path) -> Callable[[int, bytes], None]:
    def write(start: int, data: bytes) -> None:
        run("write", path, start, data=data)

    return write


def field(path: Path, key: str) -> str:
    found = re.search(rf'^{re.escape(key)} *= *"?([^"\n]*)"?$', path.read_text(), re.M)
    assert found is not None, key
    return found[1]


# ---- reading what qemu-img makes, and the other way round


@pytest.mark.parametrize(
    "options",
    [f"subformat={name}" for name in QEMU_TYPES]
    + ["subformat=monolithicSparse,zeroed_grain=on", "subformat=monolithicSparse,compat6"],
)
def test_disks_of_qemu(run: Run, folder: Path, options: str) -> None:
    path = folder / "disk.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", "-o", options, path, "40000512")
    qemu_io(path, "write -P 1 0 512", "write -P 2 33553920 1M", "write -P 3 39998976 1536")
    if "zeroed" in options:
        qemu_io(path, "write -z 33619968 65536")
    model = bytearray(qemu_raw(path))
    assert content(run, path) == model
    qemu_written = qemu_map(path, 1)
    assert [(p.start, p.count, p.link, p.offset) for p in shown_map(run, path)] == [
        (p.start, p.count, p.link, p.offset) for p in qemu_written
    ]
    scatter(writer(run, path), model, 1)
    assert content(run, path) == model
    assert qemu_raw(path) == model
    qemu_check(path)
    run("check", path)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("capacity", [40960, 70001, 1])
def test_created_disks(run: Run, folder: Path, kind: str, capacity: int) -> None:
    path = folder / "new.vmdk"
    run("--adapter", "ide", "--hardware", 11, "create", path, kind, capacity)
    said = qemu_img("info", "-f", "vmdk", path)
    assert f"({capacity * SECTOR} bytes)" in said
    assert f"create type: {kind.removesuffix('Thin')}" in said
    model = bytearray(capacity * SECTOR)
    assert qemu_raw(path) == model
    shown = info(run, path)
    assert shown["type"] == kind
    assert shown["adapter"] == "ide"
    assert shown["ddb.virtualHWVersion"] == "11"
    assert shown["geometry"] == f"{max(1, capacity // 1008)}/16/63"
    assert re.fullmatch(
        r"60 00 C2 9[0-9a-f]( [0-9a-f]{2}){4}-([0-9a-f]{2} ){7}[0-9a-f]{2}", shown["ddb.uuid"]
    )
    assert re.fullmatch(r"[0-9a-f]{32}", shown["ddb.longContentID"])
    scatter(writer(run, path), model, capacity, 3)
    assert content(run, path) == model
    assert qemu_raw(path) == model
    qemu_check(path)
    run("check", path)
    run("create", path, kind, capacity, fail=EXISTS)


def test_vmfs_disks(run: Run, folder: Path) -> None:
    thick, thin = folder / "thick.vmdk", folder / "thin.vmdk"
    run("create", thick, "vmfs", 40960)
    run("create", thin, "vmfsThin", 40960)
    for path in (thick, thin):
        assert f'RW 40960 VMFS "{path.stem}-flat.vmdk"' in path.read_text()
        assert field(path, "createType") == "vmfs"
        assert field(path, "ddb.longContentID").endswith(field(path, "CID"))
    assert field(thin, "ddb.thinProvisioned") == "1"
    assert (folder / "thick-flat.vmdk").stat().st_blocks >= 40960
    assert (folder / "thin-flat.vmdk").stat().st_blocks == 0


def test_split_disks_of_many_extents(run: Run, folder: Path) -> None:
    """Across the ends of extents, with qemu on the other side; the flat one is made by qemu."""
    sparse, flat = folder / "sparse.vmdk", folder / "flat.vmdk"
    run("create", sparse, "twoGbMaxExtentSparse", 9_000_000)
    qemu_img("create", "-qf", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", flat, "5G")
    assert sorted(p.name for p in folder.glob("sparse-s*")) == [
        f"sparse-s00{n}.vmdk" for n in (1, 2, 3)
    ]
    for path, edge in ((sparse, 4192256), (flat, 4194304)):
        data = os.urandom(300 * SECTOR)
        run("write", path, edge - 100, data=data)
        qemu_io(path, f"write -P 7 {2 * edge * SECTOR - 4096} 8192")
        assert run("read", path, edge - 100, 300) == data
        assert run("read", path, 2 * edge - 8, 16) == b"\7" * 8192
        qemu_io(path, f"read -P {data[0]} {(edge - 100) * SECTOR} 1")
        assert run("read", path, 0, 8) == bytes(4096)
    qemu_check(sparse)


# ---- chains


@pytest.mark.parametrize("base", [*QEMU_TYPES, "vmfs"])
@pytest.mark.parametrize("links", [2, 6])
def test_chains(run: Run, library: ctypes.CDLL, folder: Path, base: str, links: int) -> None:
    """Links made by turns by qemu and by us, in two folders, some of another size."""
    sizes = [12 * MIB, 12 * MIB, 9 * MIB, 14 * MIB, 14 * MIB, 10 * MIB][:links]
    (folder / "deltas").mkdir()
    paths = [folder / "base.vmdk"]
    run("create", paths[0], base, sizes[0] // SECTOR)
    models = [bytearray(sizes[0])]
    for number, size in enumerate(sizes):
        if number > 0:
            paths.append(folder / "deltas" / f"delta{number}.vmdk")
            parent = models[-1]
            models.append(bytearray(parent[:size].ljust(size, b"\0")))
            if size == len(parent) and number % 2:
                kind = "twoGbMaxExtentSparse" if number == 1 else "monolithicSparse"
                run("child", paths[number - 1], paths[number], kind)
            else:
                backing = f"backing_file={paths[number - 1]},backing_fmt=vmdk"
                qemu_img("create", "-qf", "vmdk", "-o", backing, paths[number], str(size))
        with Disk(library, paths[number], WRITABLE) as disk:
            scatter(disk.write, models[number], number, 4)
    for number, path in enumerate(paths):
        assert content(run, path) == models[number]
        assert qemu_raw(path) == models[number]
        qemu_check(path)
    with Disk(library, paths[-1]) as disk:
        assert disk.read() == models[-1]
    if len(set(sizes)) == 1:  # qemu-img map knows no link beyond the end of another
        ours, theirs = shown_map(run, paths[-1]), qemu_map(paths[-1], links)
        assert [(p.start, p.count, p.link, p.offset) for p in ours] == [
            (p.start, p.count, p.link, p.offset) for p in theirs
        ]


def test_a_child_made_here(run: Run, folder: Path) -> None:
    base, child, grandchild = (folder / f"{name}.vmdk" for name in ("base", "one", "two"))
    run("--adapter", "buslogic", "--hardware", 9, "create", base, "vmfs", 4096)
    run("child", base, child, "twoGbMaxExtentSparse")
    shown = info(run, child)
    assert shown["parent"] == "base.vmdk"
    assert field(child, "parentCID") == field(base, "CID") == field(child, "CID")
    for key in ("adapter", "geometry", "ddb.virtualHWVersion", "ddb.uuid", "ddb.longContentID"):
        assert shown[key] == info(run, base)[key]
    run("write", child, 5, data=b"x" * SECTOR)
    assert field(child, "CID") != field(base, "CID")
    (folder / "elsewhere").mkdir()
    grandchild = folder / "elsewhere" / "two.vmdk"
    run("child", child, grandchild, "monolithicSparse")
    assert info(run, grandchild)["parent"] == str(child.resolve())
    assert info(run, grandchild)["links"] == "3"
    assert run("read", grandchild, 5, 1) == b"x" * SECTOR
    assert run("--single", "read", grandchild, 5, 1) == bytes(SECTOR)
    run("child", child, folder / "no.vmdk", "vmfsSparse", fail=NOT_SUPPORTED)
    run("child", child, folder / "no.vmdk", "monolithicFlat", fail=NOT_SUPPORTED)
    assert not (folder / "no.vmdk").exists()


def test_a_leaf_opened_alone(run: Run, library: ctypes.CDLL, folder: Path) -> None:
    monolithic(folder / "base.vmdk", 64, {0: b"b" * 4096})
    child = folder / "child.vmdk"
    monolithic(child, 64, {1: b"c" * 4096}, parent=("base.vmdk", "12345678"))
    (folder / "base.vmdk").unlink()
    run("read", child, 0, 8, fail=PARTIAL_CHAIN)
    with Disk(library, child, SINGLE | WRITABLE) as disk:
        assert disk.read() == bytes(4096) + b"c" * 4096 + bytes(48 * SECTOR)
        disk.write(16, b"w" * 4096)
        with pytest.raises(Failed) as caught:  # the rest of the grain is the parent's
            disk.write(24, b"w" * SECTOR)
        assert caught.value.code == OPEN_PARENT
        assert disk.read(16, 16) == b"w" * 4096 + bytes(4096)


def test_zero_extents_and_offsets(run: Run, library: ctypes.CDLL, folder: Path) -> None:
    """A disk of all kinds of extents; qemu knows no ZERO, so those are compared with the model."""
    flat = os.urandom(40 * SECTOR)
    (folder / "one.flat").write_bytes(flat)
    SparseExtent(24).write(folder / "two.vmdk", {1: b"s" * 4096})
    path = folder / "disk.vmdk"
    extents = [
        'RW 8 FLAT "one.flat" 24',
        "RW 16 ZERO",
        'RW 24 SPARSE "two.vmdk"',
        'RDONLY 4 VMFS "one.flat" 5',
        'RW 5 VMFS "one.flat"',
    ]
    path.write_text(descriptor(extents))
    model = bytearray(flat[24 * SECTOR : 32 * SECTOR] + bytes(24 * SECTOR) + b"s" * 4096)
    model += bytes(4096) + flat[5 * SECTOR : 9 * SECTOR] + flat[: 5 * SECTOR]
    assert content(run, path) == model
    assert [(p.start, p.count, p.link, p.file) for p in shown_map(run, path)] == [
        (0, 8, 0, "one.flat"),
        (8, 24, None, None),
        (32, 8, 0, "two.vmdk"),
        (40, 8, None, None),
        (48, 4, 0, "one.flat"),
        (52, 5, 0, "one.flat"),
    ]
    assert len([line for line in info(run, path) if line.startswith("file ")]) == 2
    with Disk(library, path, WRITABLE) as disk:
        for start in (8, 23, 48, 51):
            with pytest.raises(Failed) as caught:
                disk.write(start, bytes(SECTOR))
            assert caught.value.code == READ_ONLY
        for start in (7, 24, 47, 52, 56):
            disk.write(start, b"w" * SECTOR)
            model[start * SECTOR : (start + 1) * SECTOR] = b"w" * SECTOR
        model[31 * SECTOR : 32 * SECTOR] = bytes(SECTOR)
        assert disk.read() == model
    path.write_text(descriptor([extents[0], 'RW 7 FLAT "one.flat" 25'], kind="twoGbMaxExtentFlat"))
    assert content(run, path) == qemu_raw(path)


def test_a_grain_of_zeros_hides_the_parent(run: Run, folder: Path) -> None:
    base, child = folder / "base.vmdk", folder / "child.vmdk"
    monolithic(base, 64, {n: bytes([n + 1]) * 4096 for n in range(8)})
    grains: dict[int, bytes | int] = {1: 1, 2: b"c" * 4096, 3: 1}
    parent = ("base.vmdk", "12345678")
    monolithic(child, 64, grains, parent=parent, version=2, flags=3 | ZEROED)
    expected = qemu_raw(child)
    assert expected[4096:8192] == bytes(4096)
    assert content(run, child) == expected
    run("write", child, 8, data=b"w" * SECTOR)
    assert run("read", child, 8, 8) == b"w" * SECTOR + bytes(7 * SECTOR)
    assert content(run, child) == qemu_raw(child)
    run("check", child)
    monolithic(child, 64, grains, parent=parent)  # without the flag, 1 is no place for a grain
    run("read", child, 0, 64, fail=INVALID_DISK)


# ---- grain tables


def test_the_redundant_tables_are_not_read(run: Run, folder: Path) -> None:
    path = folder / "disk.vmdk"
    extent = monolithic(path, 64, {0: b"a" * 4096, 3: b"d" * 4096})
    with path.open("r+b") as file:
        extent.set_entry(file, extent.redundant_tables, 0, extent.overhead + 8)
        extent.set_entry(file, extent.redundant_tables, 5, extent.overhead)
    expected = qemu_raw(path)
    assert expected.startswith(b"a" * 4096)
    assert content(run, path) == expected
    run("check", path, fail=NEEDS_REPAIR)
    run("--repair", "check", path)
    run("check", path)
    assert content(run, path) == qemu_raw(path) == expected


def both_tables(path: Path, extent: SparseExtent, table: int) -> tuple[bytes, bytes]:
    raw = path.read_bytes()
    found = []
    for directory in (extent.directory, extent.redundant):
        (place,) = struct.unpack_from("<I", raw, directory * SECTOR + table * 4)
        found.append(raw[place * SECTOR :][: extent.entries * 4] if place else b"")
    return found[0], found[1]


@pytest.mark.parametrize("entries", [512, 128, 100, 4])
def test_both_tables_are_kept_in_step(run: Run, folder: Path, entries: int) -> None:
    """Also where a directory does not lead to a table yet: another opener sees it appear."""
    path = folder / "disk.vmdk"
    missing = frozenset({0, 2, 3})
    capacity = 8 * entries * 4 + 3
    extent = monolithic(path, capacity, {}, entries=entries, missing_tables=missing)
    model = bytearray(capacity * SECTOR)
    assert content(run, path) == qemu_raw(path) == model
    scatter(writer(run, path), model, entries)
    run("write", path, capacity - 4, data=b"e" * 4 * SECTOR)
    model[-4 * SECTOR :] = b"e" * 4 * SECTOR
    assert content(run, path) == model
    assert qemu_raw(path) == model
    tables = [both_tables(path, extent, table) for table in range(extent.tables)]
    assert all(primary == redundant for primary, redundant in tables)
    assert any(any(primary) for primary, _ in tables)
    run("check", path)


@pytest.mark.parametrize("missing", [frozenset[int](), frozenset({0, 1})])
def test_another_opener_sees_what_is_written(
    library: ctypes.CDLL, folder: Path, missing: frozenset[int]
) -> None:
    path = folder / "disk.vmdk"
    monolithic(folder / "base.vmdk", 8192, {0: b"b" * 4096})
    parent = ("base.vmdk", "12345678")
    monolithic(path, 8192, {}, parent=parent, missing_tables=missing)
    with Disk(library, path) as reader, Disk(library, path, WRITABLE) as writer:
        assert reader.read(0, 8) == b"b" * 4096
        for start in (2, 4096, 8190):
            writer.write(start, b"w" * SECTOR)
            assert reader.read(start, 1) == b"w" * SECTOR
        assert reader.read(0, 8) == b"bbwbbbbb".replace(b"b", b"b" * SECTOR).replace(
            b"w", b"w" * SECTOR
        )


def preads(work: Callable[[], object]) -> int:
    def now() -> int:
        counters = Path("/proc/self/io").read_text()
        return int(counters.split("syscr: ")[1].split()[0])

    idle = -now() + now()
    before = now()
    work()
    return now() - before - idle


def test_what_a_look_up_costs(library: ctypes.CDLL, run: Run, folder: Path) -> None:
    base, child = folder / "base.vmdk", folder / "child.vmdk"
    run("create", base, "monolithicSparse", 16 << 21)
    for place in range(0, 16 << 21, 9 << 18):
        run("write", base, place, data=b"x" * 4096) if place % 5 == 0 else None
    run("child", base, child, "monolithicSparse")
    run("write", child, 8 << 21, data=b"x" * 4096)
    with Disk(library, child) as disk:
        assert preads(lambda: disk.resolve(12345, 8)) <= 2
        assert preads(lambda: disk.resolve(0, disk.capacity)) <= 16
        segments, covered = disk.resolve(0, disk.capacity)
        assert covered == disk.capacity
        assert {segment.link for segment in segments if segment.file != HOLE} == {0, 1}


def test_resolve_in_pieces(library: ctypes.CDLL, folder: Path) -> None:
    path = folder / "disk.vmdk"
    monolithic(path, 4096, {n: bytes([n % 250 + 1]) * 4096 for n in range(0, 512, 2)})
    with Disk(library, path) as disk:
        whole, covered = disk.resolve(3, 4090)
        assert covered == 4090
        pieces = []
        start = 3
        while start < 4093:
            some, covered = disk.resolve(start, 4093 - start, 5)
            assert 0 < len(some) <= 5
            assert sum(one.length for one in some) == covered * SECTOR
            pieces += some
            start += covered

        def shown(found: list[Segment]) -> list[tuple[int, ...]]:
            return [(one.file, one.link, one.offset, one.length) for one in found]

        assert shown(pieces) == shown(whole)
        assert disk.resolve(4096, 0) == ([], 0)
        for start, count in ((4096, 1), (4000, 97), (2**64 - 1, 2), (1, 2**64 - 1)):
            with pytest.raises(Failed) as caught:
                disk.resolve(start, count)
            assert caught.value.code == OUT_OF_RANGE


def test_allocated(library: ctypes.CDLL, folder: Path) -> None:
    flat = folder / "base-flat.vmdk"
    with flat.open("wb") as file:
        file.truncate(4096 * SECTOR)
        file.seek(1024 * SECTOR)
        file.write(b"d" * 8192)
    base, child = folder / "base.vmdk", folder / "child.vmdk"
    base.write_text(descriptor(['RW 4096 FLAT "base-flat.vmdk" 0']))
    monolithic(child, 4090, {10: b"c" * 4096, 500: b"c" * 4096}, parent=("base.vmdk", "12345678"))
    with Disk(library, child) as disk:
        assert disk.allocated(8) == [(80, 8), (1024, 16), (4000, 8)]
        assert disk.allocated(128) == [(0, 128), (1024, 128), (3968, 122)]
        assert disk.allocated(4096) == [(0, 4090)]
        with pytest.raises(Failed) as caught:
            disk.allocated(8, 2)
        assert caught.value.code == OUT_OF_MEMORY


Writes = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 3999), st.integers(1, 200), st.integers(1, 255)),
    max_size=12,
)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(writes=Writes, size=st.sampled_from([3990, 4000, 4100]), entries=st.sampled_from([512, 7]))
def test_writes_against_a_model(
    library: ctypes.CDLL, writes: list[tuple[int, int, int, int]], size: int, entries: int
) -> None:
    """Writes in the base, then in the child, then in the grandchild, each against its model."""
    with tempfile.TemporaryDirectory() as name:
        path, parent, cid, model = Path(name) / "0.vmdk", None, "12345678", bytearray()
        for link, capacity in enumerate((4000, size, 4000)):
            model = bytearray(model[: capacity * SECTOR].ljust(capacity * SECTOR, b"\0"))
            path = Path(name) / f"{link}.vmdk"
            monolithic(path, capacity, {}, cid=cid, parent=parent, entries=entries)
            parent = (path.name, cid)
            with Disk(library, path, WRITABLE | KEEP_CID) as disk:
                for _, start, count, value in (write for write in writes if write[0] == link):
                    count = min(count, capacity - start)
                    if count > 0:
                        data = bytes([value]) * count * SECTOR
                        disk.write(start, data)
                        model[start * SECTOR : start * SECTOR + len(data)] = data
                assert disk.read() == model
        assert qemu_raw(path) == model
        qemu_check(path)


# ---- content ids and the disk database


def cid_of(path: Path) -> str:
    found = re.search(rb"^CID=([0-9a-f]{8})$", path.read_bytes(), re.M)
    assert found is not None
    return found[1].decode()


def test_what_follows_the_text(run: Run, folder: Path) -> None:
    """qemu leaves the end of a longer descriptor behind the zero byte of a shorter one."""
    path = folder / "disk.vmdk"
    path.write_text(descriptor(["RW 8 ZERO"]) + '\0"\nnot a line\n\0')
    assert info(run, path)["capacity"] == "8"
    run("set", path, "comment", "x")
    assert path.read_text().endswith('"x"\n')


@pytest.mark.parametrize("kind", ["monolithicSparse", "vmfs"])
def test_content_ids(library: ctypes.CDLL, run: Run, folder: Path, kind: str) -> None:
    path = folder / "disk.vmdk"
    run("create", path, kind, 4096)
    first = cid_of(path)
    run("read", path, 0, 8)
    run("--keep-cid", "write", path, 0, data=b"x" * SECTOR)
    run("write", path, 0, data=b"")
    assert cid_of(path) == first
    with Disk(library, path, WRITABLE) as disk:
        assert cid_of(path) == first
        disk.write(0, b"x" * SECTOR)
        second = cid_of(path)
        disk.write(8, b"x" * SECTOR)
        assert cid_of(path) == second != first
    assert info(run, path)["ddb.longContentID"].endswith(second)
    run("child", path, folder / "child.vmdk", "monolithicSparse")
    run("write", path, 0, data=b"y" * SECTOR)
    run("info", folder / "child.vmdk", fail=CID_MISMATCH)
    run("--single", "info", folder / "child.vmdk")


@pytest.mark.parametrize("kind", ["monolithicSparse", "vmfs"])
def test_metadata(run: Run, folder: Path, kind: str) -> None:
    path = folder / "disk.vmdk"
    run("create", path, kind, 4096)
    cid, size = cid_of(path), path.stat().st_size
    for _ in range(2):
        run("set", path, "ddb.toolsVersion", "2147483647")
        run("set", path, "comment", "what it is = not")
    shown = info(run, path)
    assert shown["ddb.toolsVersion"] == "2147483647"
    assert shown["ddb.comment"] == "what it is = not"
    assert path.read_bytes().count(b"toolsVersion") == 1
    assert cid_of(path) == cid
    for key, value in (("bad key", "x"), ("", "x"), ("key", 'x"y'), ("key", "x\ny")):
        run("set", path, key, value, fail=INVALID_ARG)
    if kind == "monolithicSparse":
        assert path.stat().st_size == size
        run("set", path, "ddb.long", "x" * 10240, fail=24)
    assert info(run, path) == shown
    assert qemu_raw(path) == bytes(4096 * SECTOR)


# ---- disks as files


@pytest.mark.parametrize("kind", TYPES)
def test_clone(run: Run, folder: Path, kind: str) -> None:
    base, child, copy = (folder / f"{name}.vmdk" for name in ("base", "child", "copy"))
    monolithic(base, 70000, {0: b"a" * 4096, 8000: b"b" * 4096, 9: bytes(4096)})
    monolithic(child, 70001, {1: b"c" * 4096, 8750: b"d" * 512}, parent=("base.vmdk", "12345678"))
    expected = qemu_raw(child)
    needed = int(run("space", child, kind))
    run("clone", child, copy, kind)
    assert info(run, copy)["links"] == "1"
    assert content(run, copy) == qemu_raw(copy) == expected
    used = sum(path.stat().st_blocks * SECTOR for path in folder.glob("copy-*"))
    assert used <= needed + 3 * 65536
    run("clone", child, copy, kind, fail=EXISTS)
    run("--overwrite", "clone", base, copy, kind)
    assert content(run, copy) == qemu_raw(base)
    run("--overwrite", "clone", child, base, kind, fail=INVALID_ARG)
    run("clone", child, folder / "no.vmdk", "streamOptimized", fail=NOT_SUPPORTED)


@pytest.mark.parametrize("kind", TYPES)
def test_grow(run: Run, folder: Path, kind: str) -> None:
    path = folder / "disk.vmdk"
    run("create", path, kind, 70000)
    data = os.urandom(128 * SECTOR)
    run("write", path, 69872, data=data)
    run("--geometry", "grow", path, 140000)
    expected = (bytes(69872 * SECTOR) + data).ljust(140000 * SECTOR, b"\0")
    assert content(run, path) == qemu_raw(path) == expected
    assert info(run, path)["geometry"] == f"{140000 // 2048}/64/32"
    run("write", path, 139000, data=data)
    assert run("read", path, 139000, 128) == data
    assert qemu_raw(path)[139000 * SECTOR :][: len(data)] == data
    qemu_check(path)
    run("check", path)
    run("grow", path, 140000, fail=CAPACITY_MISMATCH)
    if not kind.endswith("Flat") and kind != "vmfs":  # a preallocated one would take 5 GB
        run("grow", path, 10_000_000)
        run("write", path, 9_999_900, data=data[: 100 * SECTOR])
        qemu_io(path, f"read -P {data[0]} {9_999_900 * SECTOR} 1")
        assert run("read", path, 139000, 128) == data
        assert len(list(folder.glob("*-s*.vmdk"))) == (3 if kind.endswith("ExtentSparse") else 0)
    run("child", path, folder / "child.vmdk", "monolithicSparse")
    run("grow", folder / "child.vmdk", 20_000_000, fail=PARENT_NOT_ALLOWED)


@pytest.mark.parametrize("flags", [3, 3 | ZEROED])
def test_shrink_and_defragment(run: Run, folder: Path, flags: int) -> None:
    base, path = folder / "base.vmdk", folder / "disk.vmdk"
    monolithic(base, 8000, {n: b"b" * 4096 for n in range(400, 410)})
    grains: dict[int, bytes | int] = {
        n: bytes(4096) if n % 3 else bytes([n % 255 + 1]) * 4096 for n in range(700, 300, -1)
    }
    monolithic(path, 8000, grains, parent=("base.vmdk", "12345678"), version=2, flags=flags)
    expected = qemu_raw(path)
    before = path.stat().st_size
    run("defragment", path)
    assert path.stat().st_size <= before
    places = [p.offset for p in shown_map(run, path) if p.link == 1 and p.offset is not None]
    assert places == sorted(places)
    assert content(run, path) == qemu_raw(path) == expected
    run("shrink", path)
    assert path.stat().st_size < before - 250 * 4096
    assert content(run, path) == qemu_raw(path) == expected
    run("check", path)
    qemu_check(path)
    assert not list(folder.glob("disk.vmdk.*"))
    run("write", path, 2400, data=b"w" * SECTOR)
    assert run("read", path, 2400, 1) == b"w" * SECTOR
    run("create", folder / "flat.vmdk", "vmfs", 4096)
    run("shrink", folder / "flat.vmdk", fail=CANT_SHRINK)
    run("defragment", folder / "flat.vmdk")


@pytest.mark.parametrize("kind", TYPES)
def test_rename_and_unlink(run: Run, folder: Path, kind: str) -> None:
    path, child = folder / "disk.vmdk", folder / "child.vmdk"
    run("create", path, kind, 4096)
    run("write", path, 7, data=b"x" * SECTOR)
    (folder / "there").mkdir()
    new = folder / "there" / "other.vmdk"
    run("rename", path, new)
    assert not list(folder.glob("disk*"))
    assert all(found.name.startswith("other") for found in new.parent.iterdir())
    assert run("read", new, 7, 1) == b"x" * SECTOR
    assert qemu_raw(new)[7 * SECTOR :][:SECTOR] == b"x" * SECTOR
    run("child", new, child, "twoGbMaxExtentSparse")
    run("rename", child, folder / "there" / "child.vmdk")
    child = folder / "there" / "child.vmdk"
    assert run("read", child, 7, 1) == b"x" * SECTOR
    run("rename", child, new, fail=EXISTS)
    assert run("read", child, 7, 1) == b"x" * SECTOR
    run("unlink", child)
    assert run("read", new, 7, 1) == b"x" * SECTOR
    run("unlink", new)
    assert list(new.parent.iterdir()) == []
    run("unlink", new, fail=FILE_NOT_FOUND)


@pytest.mark.parametrize("kind", ["twoGbMaxExtentSparse", "monolithicSparse", "vmfs"])
def test_a_full_disk(built: Built, run: Run, folder: Path, kind: str) -> None:
    """With a limit of the file size in the place of a full file system."""

    def limited(blocks: int, *words: object) -> str:
        script = f"trap '' XFSZ; ulimit -f {blocks}; exec \"$@\""
        command = ["bash", "-c", script, "bash", str(built.tool), *map(str, words)]
        data = b"w" * MIB
        done = subprocess.run(command, input=data, capture_output=True, timeout=60)
        assert done.returncode == 1
        return done.stderr.decode()

    path = folder / "disk.vmdk"
    assert limited(8, "create", path, kind, 9_000_000).endswith(f"({DISK_FULL})\n")
    assert list(folder.iterdir()) == []
    if kind == "vmfs":
        return
    run("create", path, kind, 9_000_000)
    run("write", path, 100, data=b"x" * 4096)
    assert limited(900, "write", path, 4_000_000).endswith(f"({DISK_FULL})\n")
    assert run("read", path, 100, 8) == b"x" * 4096
    run("check", path)
    run("write", path, 4_000_000, data=b"y" * MIB)
    assert run("read", path, 4_000_000, 2048) == b"y" * MIB


def test_unlink_keeps_what_lies_elsewhere(run: Run, folder: Path) -> None:
    (folder / "precious").write_bytes(bytes(4096))
    (folder / "vm").mkdir()
    path = folder / "vm" / "disk.vmdk"
    path.write_text(descriptor(['RW 8 FLAT "../precious" 0']))
    run("unlink", path, fail=NOT_SUPPORTED)
    run("rename", path, folder / "vm" / "other.vmdk", fail=NOT_SUPPORTED)
    assert (folder / "precious").exists()
    assert path.exists()


def test_attach(run: Run, folder: Path) -> None:
    base, copy, child = (folder / f"{name}.vmdk" for name in ("base", "copy", "child"))
    monolithic(base, 64, {0: b"a" * 4096, 1: b"b" * 4096})
    monolithic(child, 64, {1: b"c" * 4096}, parent=("gone.vmdk", "0badcafe"))
    run("clone", base, copy, "vmfs")
    run("info", child, fail=PARTIAL_CHAIN)
    run("attach", child, copy)
    expected = b"a" * 4096 + b"c" * 4096 + bytes(48 * SECTOR)
    assert content(run, child) == qemu_raw(child) == expected
    run("attach", copy, base, fail=ROOT_LINK)
    run("attach", child, child, fail=INVALID_CHAIN)
    monolithic(base, 128, {})
    run("attach", child, base, fail=CAPACITY_MISMATCH)


# ---- damage


def damaged(path: Path, extent: SparseExtent, what: str) -> None:
    with path.open("r+b") as file:
        if what == "grain beyond the end":
            extent.set_entry(file, extent.first_table, 0, 0x7FFFFFFF)
        elif what == "grain in the header":
            extent.set_entry(file, extent.first_table, 0, 1)
        elif what.startswith("shared grain"):
            for tables in (extent.first_table, extent.redundant_tables):
                extent.set_entry(file, tables, 4, extent.overhead)
        elif what == "directory":
            file.seek(extent.directory * SECTOR)
            file.write(struct.pack("<I", 0xFFFFFFF0))
            if what.endswith("end"):
                extent.set_entry(file, extent.first_table, 5, extent.overhead + 16)
                extent.set_entry(file, extent.redundant_tables, 5, extent.overhead + 16)
        elif what == "shared table":
            file.seek(extent.directory * SECTOR)
            file.write(struct.pack("<I", extent.redundant_tables))
        elif what == "table over the descriptor":
            file.seek(extent.directory * SECTOR)
            file.write(struct.pack("<I", 2))
        elif what == "redundant directory":
            file.seek(extent.redundant * SECTOR)
            file.write(struct.pack("<I", 0xFFFFFFF0))


@pytest.mark.parametrize(
    "what",
    [
        "grain beyond the end",
        "grain in the header",
        "shared grain",
        "shared grain, another just beyond the end",
        "directory",
        "redundant directory",
        "shared table",
        "table over the descriptor",
    ],
)
def test_repair(run: Run, folder: Path, what: str) -> None:
    path = folder / "disk.vmdk"
    extent = monolithic(path, 64, {0: b"a" * 4096, 7: b"h" * 4096})
    run("check", path)
    damaged(path, extent, what)
    run("check", path, fail=NEEDS_REPAIR)
    if not what.startswith(("shared", "redundant")):
        run("read", path, 0, 8, fail=INVALID_DISK)
        run("map", path, fail=INVALID_DISK)
    run("--repair", "check", path)
    run("check", path)
    expected = bytearray(64 * SECTOR)
    expected[:4096], expected[56 * SECTOR :] = b"a" * 4096, b"h" * 4096
    if what.startswith("shared grain"):
        expected[32 * SECTOR : 40 * SECTOR] = b"a" * 4096
    assert content(run, path) == qemu_raw(path) == expected
    run("write", path, 32, data=b"w" * 4096)
    assert run("read", path, 0, 8) == b"a" * 4096


HEADER_LIES: list[tuple[dict[str, int], int]] = [
    ({"version": 0}, WRONG_VERSION),
    ({"version": 4}, WRONG_VERSION),
    ({"flags": 3 | 1 << 16}, UNSERVED),
    ({"flags": 3 | 1 << 17}, UNSERVED),
    ({"directory": 2**64 - 1}, UNSERVED),
    ({"directory": 2**63}, INVALID_DISK),
    ({"directory": 0}, INVALID_DISK),
    ({"directory": 0xFFFFFFFF}, INVALID_DISK),
    ({"redundant": 2**55 - 1}, INVALID_DISK),
    ({"redundant": 0x7FFFFFFF}, INVALID_DISK),
    ({"capacity": 2**64 - 1}, INVALID_DISK),
    ({"capacity": 2**37}, INVALID_DISK),
    ({"capacity": 2**37, "entries": 1}, INVALID_DISK),
    ({"capacity": 0}, INVALID_DISK),
    ({"capacity": 63}, INVALID_DISK),
    ({"grain": 0}, INVALID_DISK),
    ({"grain": 3}, INVALID_DISK),
    ({"grain": 2**63}, INVALID_DISK),
    ({"entries": 0}, INVALID_DISK),
    ({"entries": 2**32 - 1}, INVALID_DISK),
    ({"descriptor_at": 2**64 - 1}, INVALID_DISK),
    ({"descriptor_at": 2**31}, INVALID_DISK),
    ({"descriptor_size": 2**55}, INVALID_DISK),
    ({"descriptor_size": 4000}, INVALID_DISK),
    ({"descriptor_at": 0}, INVALID_DISK),
]


@pytest.mark.parametrize(("lies", "code"), HEADER_LIES, ids=[str(lies) for lies, _ in HEADER_LIES])
def test_headers_that_lie(
    run: Run, library: ctypes.CDLL, folder: Path, lies: dict[str, int], code: int
) -> None:
    path = folder / "disk.vmdk"
    monolithic(path, 64, {0: b"a" * 4096})
    line = descriptor([f'RW 64 SPARSE "{path.name}"'], kind="monolithicSparse")
    SparseExtent(64, text=line).write(path, {0: b"a" * 4096}, **lies)
    run("read", path, 0, 64, fail=code)


def test_truncated_disks(library: ctypes.CDLL, folder: Path) -> None:
    """Cut off at every sector: an error, or the bytes."""
    path, cut = folder / "disk.vmdk", folder / "cut.vmdk"
    monolithic(path, 64, {n: bytes([n + 1]) * 4096 for n in range(8)})
    whole = path.read_bytes()
    for size in range(0, len(whole), SECTOR):
        cut.write_bytes(whole[:size])
        with pytest.raises(Failed) as caught, Disk(library, cut) as disk:
            disk.read()
        assert caught.value.code == INVALID_DISK


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    places=st.lists(
        st.tuples(st.integers(0, 79) | st.integers(0, 44 * SECTOR - 1), st.integers(0, 255)),
        min_size=1,
        max_size=6,
    )
)
def test_spoilt_bytes(library: ctypes.CDLL, places: list[tuple[int, int]]) -> None:
    """Whatever bytes the metadata has: an answer or an error."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "disk.vmdk"
        monolithic(path, 64, {0: b"a" * 4096, 5: b"b" * 4096})
        spoilt = bytearray(path.read_bytes())
        for place, value in places:
            spoilt[place] = value
        path.write_bytes(spoilt)
        try:
            with Disk(library, path, WRITABLE) as disk:
                if disk.capacity < 1 << 16:
                    disk.read()
                disk.resolve(0, disk.capacity)
                disk.write(0, b"w" * SECTOR)
        except Failed:
            pass
        for repair in (False, True):
            why = ctypes.create_string_buffer(256)
            library.vmdk_check(str(path).encode(), repair, why)


TEXTS: list[tuple[str, int]] = [
    ("", INVALID_DISK),
    ("\0" * 512, INVALID_DISK),
    ("COWD" + "\0" * 508, UNSERVED),
    ("KDMV", INVALID_DISK),
    ("# Disk DescriptorFile\n", INVALID_DISK),
    (descriptor([]), INVALID_DISK),
    (descriptor(['RW 8 FLAT "flat" 0'], version="9"), WRONG_VERSION),
    (descriptor(['RW 8 FLAT "flat" 0'], cid="xyz"), INVALID_DISK),
    (descriptor(['RW 8 FLAT "flat" 0'], kind="streamOptimized"), UNSERVED),
    (descriptor(['RW 8 VMFSSPARSE "flat"'], kind="vmfsSparse"), UNSERVED),
    (descriptor(['RW 8 SESPARSE "flat"'], kind="seSparse"), UNSERVED),
    (descriptor(['RW 8 VMFSRDM "flat"'], kind="vmfsRawDeviceMap"), UNSERVED),
    (descriptor(['NOACCESS 8 FLAT "flat" 0']), UNSERVED),
    (descriptor(['RW 8 FLAT "gone" 0']), FILE_NOT_FOUND),
    (descriptor(['RW 8 FLAT "." 0']), WRONG_FILE_TYPE),
    (descriptor(['RW 9 FLAT "flat" 0']), INVALID_DISK),
    (descriptor(['RW 8 FLAT "flat" 1']), INVALID_DISK),
    (descriptor(['RW 8 FLAT "flat" -1']), INVALID_DISK),
    (descriptor(['RW 18446744073709551615 FLAT "flat" 0']), INVALID_DISK),
    (descriptor(['RW 99999999999999999999 FLAT "flat" 0']), INVALID_DISK),
    (descriptor(["RW 137438953472 ZERO"] * 2), INVALID_DISK),
    (descriptor(["RW 1 ZERO"] * 40000), INVALID_DISK),
    (descriptor(["RW 8 FLAT"]), INVALID_DISK),
    (descriptor(['RW 8 FLAT "flat']), INVALID_DISK),
    (descriptor(["RW"]), INVALID_DISK),
    (descriptor(["what is this"]), INVALID_DISK),
    (descriptor(['RW 8 SPARSE "flat"']), INVALID_DISK),
    (descriptor(['RW 4 SPARSE "sparse"', 'RW 4 SPARSE "sparse"']), INVALID_DISK),
    (descriptor(['RW 8 FLAT "flat" 0'], parent=("", "12345678")), PARTIAL_CHAIN),
    (descriptor(['RW 8 FLAT "flat" 0'], parent=("gone.vmdk", "12345678")), PARTIAL_CHAIN),
    (descriptor(['RW 8 FLAT "flat" 0'], parent=("gone/x.vmdk", "12345678")), PARTIAL_CHAIN),
    (descriptor(['RW 8 FLAT "flat" 0'], parent=("disk.vmdk", "12345678")), INVALID_CHAIN),
    (descriptor(['RW 8 FLAT "flat" 0'], parent=("flat", "12345678")), INVALID_DISK),
    (descriptor(['RW 8 FLAT "flat" 0'], parent=("base.vmdk", "99999999")), CID_MISMATCH),
    (descriptor(['RW 8 FLAT "flat" 0'], parent=("partial.vmdk", "12345678")), PARTIAL_CHAIN),
]


@pytest.mark.parametrize(("text", "code"), TEXTS, ids=[str(n) for n in range(len(TEXTS))])
def test_descriptors_that_lie(run: Run, folder: Path, text: str, code: int) -> None:
    (folder / "flat").write_bytes(bytes(4096))
    SparseExtent(8).write(folder / "sparse", {})
    monolithic(folder / "base.vmdk", 64, {})
    (folder / "partial.vmdk").write_text(descriptor(['RW 8 FLAT "gone" 0']))
    path = folder / "disk.vmdk"
    path.write_text(text)
    run("info", path, fail=code)


def test_other_things_than_files(run: Run, folder: Path) -> None:
    run("info", folder / "gone.vmdk", fail=FILE_NOT_FOUND)
    run("info", folder, fail=WRONG_FILE_TYPE)
    os.mkfifo(folder / "fifo")
    run("info", folder / "fifo", fail=WRONG_FILE_TYPE)
    with (folder / "large").open("wb") as file:
        file.truncate(1 << 42)
    run("info", folder / "large", fail=INVALID_DISK)


def test_chains_without_an_end(run: Run, folder: Path) -> None:
    (folder / "flat").write_bytes(bytes(4096))
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a")):
        text = descriptor(["RW 8 ZERO"], parent=(f"{name}/../{parent}.vmdk", "12345678"))
        (folder / f"{name}.vmdk").write_text(text)
        (folder / name).mkdir()
    run("info", folder / "a.vmdk", fail=INVALID_CHAIN)
    for number in range(257):
        above = (f"{number - 1}.vmdk", "12345678") if number else None
        (folder / f"{number}.vmdk").write_text(descriptor(["RW 8 ZERO"], parent=above))
    assert info(run, folder / "254.vmdk")["links"] == "255"
    run("info", folder / "255.vmdk", fail=INVALID_CHAIN)
    run("child", folder / "254.vmdk", folder / "x.vmdk", "monolithicSparse", fail=INVALID_CHAIN)


def test_version_3_is_only_read(run: Run, folder: Path) -> None:
    path = folder / "disk.vmdk"
    monolithic(path, 64, {1: b"a" * 4096}, version=3)
    assert run("read", path, 8, 8) == b"a" * 4096
    run("write", path, 0, data=bytes(SECTOR), fail=WRONG_VERSION)


def test_the_command_line(built: Built) -> None:
    done = subprocess.run([built.tool, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: vixsim-vmdk")
    for words in ([], ["info"], ["dance", "x"], ["--what", "info", "x"], ["grow", "x", "-1"]):
        done = subprocess.run([built.tool, *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("vixsim-vmdk: ")
