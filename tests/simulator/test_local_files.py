"""Functions on disks as files, over the `file` transport; qemu-img judges what they leave."""

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest

from tests.simulator.client import Client
from tests.simulator.disks import (
    SECTORS,
    SIZE,
    check,
    make_delta,
    make_vmdk,
    make_vmfs,
    noise,
    raw,
    sparse_noise,
    succeed,
)
from tests.simulator.kit import Kit
from tests.simulator.vix import (
    DISK_CAPACITY_MISMATCH,
    FILE_ALREADY_EXISTS,
    FILE_NOT_FOUND,
    LSILOGIC,
    MONOLITHIC_FLAT,
    MONOLITHIC_SPARSE,
    VMFS_FLAT,
    VMFS_THIN,
    CreateParams,
    ProgressFunc,
)

SPLIT_SPARSE, SPLIT_FLAT, STREAM_OPTIMIZED = 3, 4, 6


@pytest.fixture
def folder(bare: Kit) -> Path:
    made = bare.path / "disks"
    made.mkdir()
    return made


def _kind(path: Path) -> str:
    text = succeed("qemu-img", "info", "-U", "--output=json", path)
    kind: str = json.loads(text)["format-specific"]["data"]["create-type"]
    return kind


def _create(client: Client, path: str, kind: int, sectors: int) -> dict[str, Any]:
    percents: list[int] = []

    def progress(data: int, percent: int) -> bytes:
        percents.append(percent)
        return b"\1"

    called = ProgressFunc(progress)
    params = CreateParams(kind, LSILOGIC, 14, sectors, 512, 512)
    connection = client.connect_local()
    arguments = (connection, path.encode(), ctypes.byref(params), called, None)
    code = client.code("Create", *arguments)
    again = client.code("Create", *arguments)
    found: dict[str, Any] = {"code": code, "again": again, "percents": percents}
    if not code:
        disk = client.open(connection, path, 0)
        found |= disk.info() | {"transport": disk.transport}
        disk.write(sectors - 8, b"end." * 1024)
        disk.write(100, b"beg." * 128)
        disk.close()
    client.check("Disconnect", connection)
    return found


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (MONOLITHIC_SPARSE, "monolithicSparse"),
        (MONOLITHIC_FLAT, "monolithicFlat"),
        (SPLIT_SPARSE, "twoGbMaxExtentSparse"),
        (SPLIT_FLAT, "twoGbMaxExtentFlat"),
        (VMFS_FLAT, "vmfs"),
        (VMFS_THIN, "vmfs"),
    ],
)
def test_create_and_write(bare: Kit, folder: Path, kind: int, name: str) -> None:
    path = folder / "new.vmdk"
    found = bare.run(_create, path=str(path), kind=kind, sectors=8192)
    assert (found["code"], found["again"]) == (0, FILE_ALREADY_EXISTS)
    assert found["percents"] == sorted(found["percents"])
    assert found["percents"][-1] == 100
    assert (found["capacity"], found["numLinks"], found["transport"]) == (8192, 1, "file")
    assert _kind(path) == name
    wanted = bytearray(8192 * 512)
    wanted[8184 * 512 :] = b"end." * 1024
    wanted[100 * 512 : 101 * 512] = b"beg." * 128
    assert raw(path) == wanted
    if name.endswith("Sparse"):
        check(path)


def test_a_stream_is_not_created(bare: Kit, folder: Path) -> None:
    path = str(folder / "new.vmdk")
    assert bare.run(_create, path=path, kind=STREAM_OPTIMIZED, sectors=8192)["code"] != 0


def _child(client: Client, parent: str, child: str, write: bytes) -> dict[str, Any]:
    connection = client.connect_local()
    disk = client.open(connection, parent, 4)
    arguments = (child.encode(), 1, ProgressFunc(), None)
    client.check("CreateChild", disk.handle, *arguments)
    again = client.code("CreateChild", disk.handle, *arguments)
    disk.close()
    made = client.open(connection, child, 0)
    found = made.info()
    made.write(128, write)
    made.close()
    client.check("Disconnect", connection)
    return found | {"again": again}


def test_a_child_takes_the_writes(bare: Kit, folder: Path) -> None:
    data = noise("parent", SIZE)
    parent = make_vmdk(folder / "parent.vmdk", data)
    before = parent.read_bytes()
    child = folder / "child.vmdk"
    written = noise("child", 700 * 512)
    found = bare.run(_child, parent=str(parent), child=str(child), write=written)
    assert found["numLinks"] == 2
    assert found["parentFileNameHint"].endswith(b"parent.vmdk")
    assert found["again"] == FILE_ALREADY_EXISTS
    assert parent.read_bytes() == before
    assert raw(child) == data[: 128 * 512] + written + data[828 * 512 :]


def _on_files(client: Client, name: str, *words: Any) -> int:
    connection = client.connect_local()
    code = client.code(name, connection, *words)
    client.check("Disconnect", connection)
    return code


def _unlink(client: Client, path: str) -> list[int]:
    connection = client.connect_local()
    return [client.code("Unlink", connection, path.encode()) for _ in range(2)]


def test_unlink_takes_the_extents_along(bare: Kit, folder: Path) -> None:
    path = make_vmfs(folder / "gone.vmdk", bytes(512 * 64))
    assert bare.run(_unlink, path=str(path)) == [0, FILE_NOT_FOUND]
    assert not list(folder.iterdir())


def _rename(client: Client, source: str, target: str) -> list[int]:
    targets = (target, target + ".other")
    return [client.code("Rename", source.encode(), name.encode()) for name in targets]


def test_rename_takes_the_extents_along(bare: Kit, folder: Path) -> None:
    data = noise("rename", 64 * 512)
    path = make_vmfs(folder / "old.vmdk", data)
    target = folder / "new.vmdk"
    codes = bare.run(_rename, source=str(path), target=str(target))
    assert codes == [0, FILE_NOT_FOUND]
    assert raw(target) == data
    assert not list(folder.glob("old*"))


def _grow(client: Client, path: str, sectors: int) -> int:
    connection = client.connect_local()
    code = client.code("Grow", connection, path.encode(), sectors, b"\1", ProgressFunc(), None)
    client.check("Disconnect", connection)
    return code


@pytest.mark.parametrize("subformat", ["monolithicSparse", "monolithicFlat"])
def test_grow(bare: Kit, folder: Path, subformat: str) -> None:
    data = sparse_noise("grow", SIZE)
    path = make_vmdk(folder / "disk.vmdk", data, subformat)
    assert bare.run(_grow, path=str(path), sectors=SECTORS - 1) == DISK_CAPACITY_MISMATCH
    assert bare.run(_grow, path=str(path), sectors=SECTORS * 3) == 0
    assert raw(path) == data + bytes(2 * SIZE)
    if subformat.endswith("Sparse"):
        check(path)


def _shrink(client: Client, path: str, name: str) -> list[int]:
    percents: list[int] = []

    def progress(data: int, percent: int) -> bytes:
        percents.append(percent)
        return b"\0"

    with client.disk(path, 0) as disk:
        client.check(name, disk.handle, ProgressFunc(progress), None)
    return percents


@pytest.mark.parametrize("name", ["Shrink", "Defragment"])
def test_shrink_and_defragment_change_no_data(bare: Kit, folder: Path, name: str) -> None:
    data = noise("shrink", SIZE)
    path = make_vmdk(folder / "disk.vmdk", data)
    words = ["-c", f"write -P 0 {64 * 1024} {32 * 64 * 1024}"]
    succeed("qemu-io", "-f", "vmdk", *words, path)
    before = path.stat().st_size
    assert bare.run(_shrink, path=str(path), name=name)[-1] == 100
    assert raw(path) == data[: 64 * 1024] + bytes(32 * 64 * 1024) + data[33 * 64 * 1024 :]
    check(path)
    if name == "Shrink":
        assert path.stat().st_size <= before - 31 * 64 * 1024


def _clone(client: Client, source: str, target: str, kind: int, overwrite: bool) -> int:
    params = CreateParams(kind, LSILOGIC, 14, 0, 512, 512)
    connection = client.connect_local()
    code = client.code(
        *("Clone", connection, target.encode(), connection, source.encode()),
        *(ctypes.byref(params), ProgressFunc(), None, b"\1" if overwrite else b"\0"),
    )
    client.check("Disconnect", connection)
    return code


@pytest.mark.parametrize("kind", [MONOLITHIC_SPARSE, MONOLITHIC_FLAT, VMFS_THIN])
def test_a_clone_is_the_composed_disk(bare: Kit, folder: Path, kind: int) -> None:
    base = make_vmdk(folder / "base.vmdk", sparse_noise("clone", SIZE))
    leaf = make_delta(folder / "leaf.vmdk", base, "clone leaf")
    keys = {"source": str(leaf), "target": str(folder / "clone.vmdk"), "kind": kind}
    assert bare.run(_clone, **keys, overwrite=False) == 0
    assert raw(folder / "clone.vmdk") == raw(leaf)
    assert bare.run(_clone, **keys, overwrite=False) == FILE_ALREADY_EXISTS
    assert bare.run(_clone, **keys, overwrite=True) == 0


def _clone_remote(client: Client, target: str) -> int:
    params = CreateParams(1, 3, 14, 0, 512, 512)
    here, there = client.connect_local(), client.connect(vm="vm-16")
    source = b"[ds1] web01/web01-000002.vmdk"
    return client.code(
        *("Clone", here, target.encode(), there, source),
        *(ctypes.byref(params), ProgressFunc(), None, b"\0"),
    )


def test_a_remote_disk_is_cloned_to_here_or_refused(kit: Kit, contents: Any) -> None:
    target = kit.path / "clone.vmdk"
    code = kit.run(_clone_remote, target=str(target))
    if code == 0:
        assert raw(target) == contents("[ds1] web01/web01-000002.vmdk")
    else:
        assert not target.exists()


def _attach(client: Client, parent: str, child: str) -> dict[str, Any]:
    connection = client.connect_local()
    low = client.open(connection, parent, 4)
    high = client.open(connection, child, 2)
    found: dict[str, Any] = {"possible": client.code("IsAttachPossible", low.handle, high.handle)}
    found["attach"] = client.code("Attach", low.handle, high.handle)
    if not found["attach"]:
        found["data"] = high.read_all()
    high.close()
    return found


def test_attach_joins_a_parent_and_a_child(bare: Kit, folder: Path) -> None:
    base = make_vmdk(folder / "base.vmdk", sparse_noise("attach", SIZE))
    leaf = make_delta(folder / "leaf.vmdk", base, "attach leaf")
    wanted = raw(leaf)
    moved = base.rename(folder / "moved.vmdk")
    found = bare.run(_attach, parent=str(moved), child=str(leaf))
    assert (found["possible"], found["attach"]) == (0, 0)
    assert found["data"] == wanted
    assert raw(leaf) == wanted


def test_disks_that_do_not_fit_are_not_attached(bare: Kit, folder: Path) -> None:
    base = make_vmdk(folder / "base.vmdk", sparse_noise("attach", SIZE))
    make_delta(folder / "leaf.vmdk", base, "attach leaf")
    other = make_vmdk(folder / "other.vmdk", bytes(64 * 512))
    found = bare.run(_attach, parent=str(other), child=str(folder / "leaf.vmdk"))
    assert found["possible"] != 0
    assert found["attach"] != 0


def _space(client: Client, path: str) -> list[int]:
    sizes = []
    with client.disk(path) as disk:
        for kind in (1, 2, 7):
            needed = ctypes.c_uint64()
            client.check("SpaceNeededForClone", disk.handle, kind, ctypes.byref(needed))
            sizes.append(needed.value)
    return sizes


def test_the_space_that_a_clone_needs(bare: Kit, folder: Path) -> None:
    path = make_vmdk(folder / "disk.vmdk", sparse_noise("space", SIZE))
    sparse, flat, thin = bare.run(_space, path=str(path))
    assert SIZE <= flat <= SIZE + (1 << 20)
    assert SIZE // 3 <= sparse <= flat + (1 << 20)
    assert SIZE // 3 <= thin <= flat


def _check_repair(client: Client, path: str, repair: bool) -> int:
    connection = client.connect_local()
    return client.code("CheckRepair", connection, path.encode(), b"\1" if repair else b"\0")


def test_a_damaged_disk_is_found_and_repaired(bare: Kit, folder: Path) -> None:
    data = sparse_noise("damage", SIZE)
    path = make_vmdk(folder / "disk.vmdk", data)
    assert bare.run(_check_repair, path=str(path), repair=False) == 0
    header = path.read_bytes()[:512]
    tables = int.from_bytes(header[56:64], "little") * 512  # the grain directory in use
    with path.open("r+b") as file:
        file.seek(tables)
        file.write(b"\xff\xff\xff\x7f")
    assert bare.run(_check_repair, path=str(path), repair=False) != 0
    assert bare.run(_check_repair, path=str(path), repair=True) == 0
    assert bare.run(_check_repair, path=str(path), repair=False) == 0
    assert raw(path) == data


def _remote(client: Client) -> dict[str, int]:
    """Call what is for local files with a connection to a server."""
    connection = client.connect(vm="vm-17", read_only=False)
    path, none = b"[ds1] plain/new.vmdk", ProgressFunc()
    params = ctypes.byref(CreateParams(1, 3, 14, 8192, 512, 512))
    found = {
        "Create": client.code("Create", connection, path, params, none, None),
        "Grow": client.code("Grow", connection, path, 1 << 20, b"\0", none, None),
        "CheckRepair": client.code("CheckRepair", connection, path, b"\1"),
    }
    disk = client.open(connection, "[ds1] plain/sparse.vmdk")
    found["Shrink"] = client.code("Shrink", disk.handle, none, None)
    found["Defragment"] = client.code("Defragment", disk.handle, none, None)
    found["CreateChild"] = client.code("CreateChild", disk.handle, b"[ds1] c.vmdk", 1, none, None)
    disk.close()
    return found


def test_what_is_for_files_is_refused_for_remote_disks(kit: Kit) -> None:
    before = kit.disk("[ds1] plain/sparse.vmdk").read_bytes()
    codes = kit.run(_remote)
    assert all(codes.values()), codes
    assert kit.disk("[ds1] plain/sparse.vmdk").read_bytes() == before
    assert not kit.disk("[ds1] plain/new.vmdk").exists()


def _local_open(client: Client, path: str) -> int:
    connection = client.connect_local()
    return client.outcome(client.open, connection, path)


def test_a_file_that_is_not_there(bare: Kit, folder: Path) -> None:
    assert bare.run(_local_open, path=str(folder / "absent.vmdk")) == FILE_NOT_FOUND
