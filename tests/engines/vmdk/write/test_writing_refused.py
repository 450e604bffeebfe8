"""What is not written: links that are only read, and damaged files that writing would destroy."""

import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.engines.vmdk.makers_stream import write_ova
from tests.engines.vmdk.write.writers import (
    GRAIN,
    UNCLEAN,
    Disk,
    Open,
    fill,
    open_writers,
    patch_file,
)
from vddkfs.engines.vmdk import VmdkEngine, opening
from vddkfs.engines.vmdk.write import BaseWriter
from vddkfs.errors import EngineError, VddkfsError

Read = Callable[..., bytes]


@pytest.fixture
def writer(opened: Callable[..., VmdkEngine]) -> Iterator[Open]:
    """Open a VMDK for reading and for writing; closed after the test."""
    yield from open_writers(opened)


# Refusals


def refused(link: Any, *words: str) -> str:
    """Check that *link* cannot be written, that the line says why, and that nothing stays open."""
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(VddkfsError) as caught:
        BaseWriter(link)
    assert sorted(os.listdir("/proc/self/fd")) == before
    line = str(caught.value)
    assert caught.value.errno == errno.EROFS
    assert caught.value.advice
    assert line.isprintable()
    for word in ("cannot be written", *words):
        assert word in line
    return line


def link_with(engine: VmdkEngine, **changes: Any) -> Any:
    """Return the first link of *engine*, with other facts in its description."""
    link = engine._links[0]
    info = msgspec.structs.replace(link.info, **changes)
    return SimpleNamespace(info=info, path=link.path, capacity=link.capacity, extents=link.extents)


def test_more_extents_than_are_kept_open(
    make: Any, opened: Callable[..., VmdkEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "MANY_EXTENTS", 2)
    lines = []
    for number in range(3):
        (make.folder / f"x-f{number}.vmdk").write_bytes(bytes(512))
        lines.append(f'RW 1 FLAT "x-f{number}.vmdk" 0')
    engine = opened(make.text("x.vmdk", lines, kind="twoGbMaxExtentFlat"))
    refused(engine._links[0], "3 extents are more than are kept open")


def test_refused_with_a_parent(make: Any, opened: Callable[..., VmdkEngine]) -> None:
    make.flat("base", bytes(fill("a", 100 * 512)), cid="00000001")
    engine = opened(make.sparse("x.vmdk", 100, {}, parent="00000001", hint="base.vmdk"))
    refused(engine._links[1], "x.vmdk", "only the base")
    BaseWriter(engine._links[0]).close()


@pytest.mark.parametrize(
    "kind",
    ["streamOptimized", "vmfsSparse", "seSparse", "custom", "fullDevice", "vmfsRDM", "vmfsThin"],
)
def test_refused_formats(make: Any, opened: Callable[..., VmdkEngine], kind: str) -> None:
    engine = opened(make.sparse("x.vmdk", 100, {}))
    refused(link_with(engine, format=kind), "x.vmdk", kind, "only read")


def test_refused_extents(make: Any, opened: Callable[..., VmdkEngine]) -> None:
    (make.folder / "x.raw").write_bytes(bytes(200 * 512))
    lines = ['RW 100 FLAT "x.raw" 0', 'RDONLY 100 FLAT "x.raw" 100']
    engine = opened(make.text("x.vmdk", lines))
    refused(engine._links[0], "x.raw", "RDONLY")
    extents = engine._links[0].info.extents
    for change in ({"access": "NOACCESS"}, {"kind": "SPARSE"}, {"kind": "VMFSRAW"}):
        changed = msgspec.structs.replace(extents[0], **change)
        refused(link_with(engine, extents=(changed, extents[0])), *change.values())


def test_refused_in_an_archive(make: Any, opened: Callable[..., VmdkEngine]) -> None:
    """Its descriptor leads to the archive, where the disk begins somewhere in the middle."""
    make.flat("x", bytes(512 * 100))
    sparse = make.sparse("y.vmdk", 100, {})
    files = {path.name: path for path in make.folder.glob("*.vmdk")}
    write_ova(make.folder / "x.ova", files)
    for name, file in (("x.vmdk", "x-flat.vmdk"), ("y.vmdk", "y.vmdk")):
        engine = opened(make.folder / "x.ova" / name)
        refused(engine._links[0], f"x.ova/{file}", "archive", "unpack")
    BaseWriter(opened(sparse)._links[0]).close()


def test_refused_devices(make: Any, opened: Callable[..., VmdkEngine]) -> None:
    engine = opened(make.flat("x", bytes(512 * 100)))
    with open("/dev/null", "rb") as device:
        engine._links[0].extents[0].fd = device.fileno()
        refused(engine._links[0], "raw device")


def test_refused_when_replaced(make: Any, opened: Callable[..., VmdkEngine]) -> None:
    engine = opened(make.flat("x", bytes(512 * 100)))
    make.flat("y", bytes(512 * 100))
    os.replace(make.folder / "y-flat.vmdk", make.folder / "x-flat.vmdk")
    refused(engine._links[0], "x-flat.vmdk", "another file")
    os.unlink(make.folder / "x-flat.vmdk")
    refused(engine._links[0], "x-flat.vmdk", "No such file")


def test_refused_by_the_file_system(
    make: Any, opened: Callable[..., VmdkEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(make.flat("x", bytes(512 * 100)))
    for number in (errno.EROFS, errno.EACCES, errno.ETXTBSY):

        def unwilling(path: str, flags: int, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", unwilling)
            with pytest.raises(VddkfsError) as caught:
                BaseWriter(engine._links[0])
        assert caught.value.errno == errno.EROFS
        assert os.strerror(number) in str(caught.value)


def test_refused_when_another_file_opens(
    make: Any, opened: Callable[..., VmdkEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(make.flat("x", bytes(512 * 100)))
    other = make.folder / "other"
    other.write_bytes(bytes(512 * 100))
    plain = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, flags: plain(other, flags))
        with pytest.raises(VddkfsError, match="led to another file"):
            BaseWriter(engine._links[0])


def test_refused_headers(make: Any, opened: Callable[..., VmdkEngine]) -> None:
    path = make.sparse("x.vmdk", 1024, {})
    engine = opened(path)
    patch_file(path, 8, struct.pack("<I", 3 | 1 << 16))
    refused(engine._links[0], "compressed")
    patch_file(path, 8, struct.pack("<I", 3) + bytes(8))
    refused(engine._links[0], "capacity of 0")
    patch_file(path, 0, b"COWD")
    refused(engine._links[0], "not a hosted sparse file")


@pytest.mark.parametrize("redundant", [10, 22, 1 << 20])
def test_refused_directories(make: Any, opened: Callable[..., VmdkEngine], redundant: int) -> None:
    """A redundant one in the descriptor, over the end of the primary one, outside the file."""
    path = make.sparse("x.vmdk", 129 * 65536, {}, redundant=redundant)
    refused(opened(path)._links[0], "director", "vddkfs check")


def test_refused_shared_files(make: Any, opened: Callable[..., VmdkEngine]) -> None:
    make.sparse("x-s001.vmdk", 100, {}, embedded=False)
    line = 'RW 100 SPARSE "x-s001.vmdk"'
    engine = opened(make.text("x.vmdk", [line, line], kind="twoGbMaxExtentSparse"))
    refused(engine._links[0], "x-s001.vmdk", "two extents")
    path = make.text("y.vmdk", ['RW 1 FLAT "y.vmdk" 1'], more="#" * 1024)
    refused(opened(path)._links[0], "y.vmdk", "descriptor is in the same file")


# Damage


def two_directories(path: Path, qemu: Any) -> Disk:
    qemu.create(path, 70 << 20)
    qemu.io(path, "write -P 1 0 64k", "write -P 2 128k 64k")
    return Disk(path)


def table_byte(disk: Disk, directory: int, number: int = 0) -> int:
    return int(struct.unpack_from("<I", disk.raw, directory * 512 + number * 4)[0]) * 512


@pytest.mark.parametrize("guarded", [False, True], ids=["whole", "damaged"])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("grain outside", "sector 1000000"),
        ("grain in the header", "sector 5"),
        ("grain in the directory", "said to be at"),
        ("grain over the end", "said to be at"),
        ("table outside", "sector 1000000"),
        ("table below", "sector 5"),
        ("spare table outside", "sector 1000000"),
        ("entries differ", "differ"),
        ("only the spare entry", "differ"),
        ("only the table", "only one"),
        ("only the spare table", "differ"),
        ("a spare place of its own", "differ"),
        ("no copy, and a bad neighbour", "differ"),
    ],
)
def test_damage_is_not_written_to(
    qemu: Any, tmp_path: Path, writer: Open, what: str, words: str, guarded: bool
) -> None:
    """Grain 0 is there and grain 1 is not; a request has both."""
    path = tmp_path / "x.vmdk"
    disk = two_directories(path, qemu)
    primary, spare = (table_byte(disk, at) for at in (disk.directory, disk.spare_directory))
    end = len(disk.raw) // 512
    damage = {
        "grain outside": (primary, 1000000),
        "grain in the header": (primary, 5),
        "grain in the directory": (primary, disk.directory - 5),
        "grain over the end": (primary, end - 127),
        "table outside": (disk.directory * 512, 1000000),
        "table below": (disk.directory * 512, 5),
        "spare table outside": (disk.spare_directory * 512, 1000000),
        "entries differ": (spare + 4, 128),
        "only the spare entry": (spare + 4, end - 128),
        "only the table": (disk.spare_directory * 512, 0),
        "only the spare table": (disk.directory * 512, 0),
        "a spare place of its own": (spare, end - 128),
        "no copy, and a bad neighbour": (spare, 0),
    }
    if guarded:
        place, entry = damage[what]
        patch_file(path, place, struct.pack("<I", entry))
        if "neighbour" in what:
            patch_file(path, primary + 16, struct.pack("<I", 1000000))
    before = path.read_bytes()
    _, base = writer(path)
    with pytest.raises(EngineError, match=words) if guarded else nullcontext() as caught:
        base.write(120, fill("x", 16 * 512))
    after = path.read_bytes()
    if not guarded:
        assert after != before
        return
    assert caught.value.errno == errno.EIO
    assert "vddkfs check" in caught.value.advice
    assert str(caught.value).isprintable()
    assert after[:UNCLEAN] + after[UNCLEAN + 1 :] == before[:UNCLEAN] + before[UNCLEAN + 1 :]
    base.close()
    assert path.read_bytes()[UNCLEAN] == after[UNCLEAN], "the mark stays"


def test_a_copy_that_lags_behind(qemu: Any, tmp_path: Path, writer: Open, read: Read) -> None:
    """A power loss may leave a new grain without its redundant entry: it is written still."""
    path = tmp_path / "x.vmdk"
    disk = two_directories(path, qemu)
    patch_file(path, table_byte(disk, disk.spare_directory), bytes(4))
    engine, base = writer(path)
    base.write(5, fill("x", 512))
    base.write(128, fill("y", 512))
    assert read(engine, 5, 1) + read(engine, 128, 1) == b"x" * 512 + b"y" * 512


@pytest.mark.parametrize("tells_holes", [True, False])
@pytest.mark.parametrize("cut", [GRAIN, 512, 40 << 20])
def test_nothing_is_appended_to_a_truncated_file(
    qemu: Any,
    tmp_path: Path,
    writer: Open,
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
    cut: int,
    tells_holes: bool,
) -> None:
    """A new grain would come back as the content of the one that was cut off."""
    if not tells_holes:

        def lseek(fd: int, offset: int, whence: int) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(os, "lseek", lseek)
    path = tmp_path / "x.vmdk"
    qemu.create(path, 70 << 20)
    qemu.io(path, "write -P 1 0 64k", "write -P 3 65M 1M", "write -P 2 128k 64k")
    if cut == 40 << 20:
        disk = Disk(path)
        patch_file(path, disk.directory * 512 + 4, struct.pack("<I", len(disk.raw) // 512))
    else:
        os.truncate(path, path.stat().st_size - cut)
    engine, base = writer(path)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(EngineError, match="vddkfs check"):
            base.write(40 << 11, fill("x", 512))
    assert path.read_bytes()[512:] == before[512:]
    base.write(5, fill("y", 512))
    assert read(engine, 0, 6) == b"\1" * 5 * 512 + b"y" * 512


def test_nothing_is_appended_when_a_table_elsewhere_refers_behind_the_end(
    make: Any, writer: Open
) -> None:
    """The second table is not behind the first, but between the grains."""
    path = make.sparse("x.vmdk", 2 * 65536, {0: bytes(fill("a"))})
    _, base = writer(path)
    base.write(65536, fill("b"))
    base.write(65536 + 128, fill("c"))
    base.close()
    os.truncate(path, os.stat(path).st_size - GRAIN)
    _, base = writer(path)
    with pytest.raises(EngineError, match="nothing can be appended") as caught:
        base.write(5 * 128, fill("d"))
    assert caught.value.sector == 65536 + 128
