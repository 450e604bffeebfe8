"""`vddkfs check`, the walk: descriptors, chains, flat files, folders, and what is not looked at."""

import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vmdk.check.checking import DATA, GRAIN, SECTOR, entry, events, patch, shapes
from tests.engines.vmdk.makers_stream import write_ova
from vddkfs.engines.vmdk import chain
from vddkfs.engines.vmdk.check import ChainDone, Finding, check_source, walk
from vddkfs.errors import AccessDenied, NotAVmdk, SourceMissing, UnsupportedFormat

CAPACITY = 512 * GRAIN


def three_links(make: Any, cids: tuple[str, str, str], parents: tuple[str, str]) -> str:
    """Write a chain of a, b and c; return the leaf's path. *parents* is what b and c name."""
    make.sparse("a.vmdk", CAPACITY, DATA, cid=cids[0])
    make.sparse("b.vmdk", CAPACITY, {1: DATA[1]}, cid=cids[1], parent=parents[0], hint="a.vmdk")
    leaf: str = make.sparse(
        "c.vmdk", CAPACITY, {2: DATA[2]}, cid=cids[2], parent=parents[1], hint="b.vmdk"
    )
    return leaf


def test_a_sound_chain(make: Any) -> None:
    leaf = three_links(make, ("0000000a", "0000000b", "0000000c"), ("0000000a", "0000000b"))
    assert events(leaf) == ([], [ChainDone("a", 3, 0, 0, 0)])
    assert events(make.folder) == ([], [ChainDone("a", 3, 0, 0, 0)])


def test_every_break_between_links_is_told(make: Any) -> None:
    leaf = three_links(make, ("0000000a", "0000000b", "0000000c"), ("00000001", "00000002"))
    patch(make.folder / "a.vmdk", *entry(9, 1))
    findings, chains = events(leaf)
    assert [(one.code, os.path.basename(one.link), one.sectors) for one in findings] == [
        ("cid", "b.vmdk", CAPACITY),
        ("cid", "a.vmdk", CAPACITY),
        ("grain-place", "a.vmdk", GRAIN),
    ]
    assert "is 0000000b, but its child c.vmdk was made on 00000002" in findings[0].what
    assert chains == [ChainDone("a", 3, 3, 0, 0)]


def test_a_missing_parent(make: Any) -> None:
    leaf = three_links(make, ("0000000a", "0000000b", "0000000c"), ("0000000a", "0000000b"))
    patch(leaf, *entry(9, 1))
    (make.folder / "a.vmdk").unlink()
    findings, chains = events(leaf)
    assert [(one.code, os.path.basename(one.file)) for one in findings] == [
        ("missing", "a.vmdk"),
        ("grain-place", "c.vmdk"),
    ]
    assert os.path.basename(findings[0].link) == "b.vmdk"
    assert chains == [ChainDone("c", 2, 2, 0, 0)]


def test_a_parent_that_is_no_vmdk(make: Any) -> None:
    leaf = three_links(make, ("0000000a", "0000000b", "0000000c"), ("0000000a", "0000000b"))
    (make.folder / "a.vmdk").write_bytes(b"no" * 999)
    assert shapes(leaf) == [("damage", "descriptor", "a.vmdk", 0, CAPACITY)]


def test_a_parent_with_a_bad_header_is_followed(make: Any) -> None:
    """The descriptor behind it tells where the chain goes on."""
    leaf = three_links(make, ("0000000a", "0000000b", "0000000c"), ("0000000a", "0000000b"))
    patch(make.folder / "b.vmdk", 20, struct.pack("<Q", 7))
    patch(make.folder / "a.vmdk", *entry(9, 1))
    assert shapes(leaf) == [
        ("damage", "grain-place", "a.vmdk", 9 * GRAIN, GRAIN),
        ("damage", "header", "b.vmdk", 0, CAPACITY),
    ]
    shutil.move(make.folder / "b.vmdk", make.folder / "renamed.vmdk")
    found = shapes(make.folder / "renamed.vmdk")
    assert ("damage", "header", "renamed.vmdk", 0, CAPACITY) in found


def test_a_loop(make: Any) -> None:
    make.sparse("a.vmdk", CAPACITY, DATA, cid="0000000a", parent="0000000b", hint="b.vmdk")
    make.sparse("b.vmdk", CAPACITY, DATA, cid="0000000b", parent="0000000a", hint="a.vmdk")
    assert [shape[:3] for shape in shapes(make.folder)] == [("damage", "loop", "a.vmdk")]


def test_a_chain_without_an_end(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert walk.MAX_LINKS == chain.MAX_LINKS
    monkeypatch.setattr(walk, "MAX_LINKS", 2)
    leaf = three_links(make, ("0000000a", "0000000b", "0000000c"), ("0000000a", "0000000b"))
    (one,) = events(leaf)[0]
    assert (one.code, one.what) == ("loop", "the chain has more than 2 links")


def test_a_parent_that_nobody_names(make: Any) -> None:
    path = make.sparse("a.vmdk", CAPACITY, DATA, parent="0000000b")
    assert [shape[:3] for shape in shapes(path)] == [("damage", "descriptor", "a.vmdk")]


def test_links_of_two_chains_are_looked_at_once(make: Any) -> None:
    """The findings count for both."""
    make.sparse("base.vmdk", CAPACITY, DATA, cid="0000000a")
    for name in ("one", "two"):
        make.sparse(f"{name}.vmdk", CAPACITY, {}, parent="0000000a", hint="base.vmdk")
    patch(make.folder / "base.vmdk", *entry(9, 1))
    findings, chains = events(make.folder)
    assert [one.code for one in findings] == ["grain-place"]
    assert chains == [ChainDone("base", 2, 1, 0, 0)] * 2


@pytest.mark.parametrize(
    ("sectors", "expected"),
    [
        (CAPACITY, []),
        (CAPACITY - 127, []),
        (CAPACITY - 128, [("warning", "length", -1, 0)]),
        (CAPACITY + 1, [("damage", "length", CAPACITY, 1)]),
    ],
)
def test_lengths_of_descriptor_and_header(sectors: int, expected: list[Any], make: Any) -> None:
    make.sparse("a-s001.vmdk", CAPACITY, DATA, embedded=False)
    path = make.text("a.vmdk", [f'RW {sectors} SPARSE "a-s001.vmdk"'])
    found = [(level, code, sector, n) for level, code, _, sector, n in shapes(path)]
    assert [one for one in found if one[1] != "unreferenced"] == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (64 * SECTOR, []),
        (64 * SECTOR + 1, [("warning", "too-long", "a-flat.vmdk", -1, 0)]),
        (64 * SECTOR - 1, [("damage", "too-short", "a-flat.vmdk", 63, 1)]),
        (5 * SECTOR, [("damage", "too-short", "a-flat.vmdk", 5, 59)]),
        (0, [("damage", "too-short", "a-flat.vmdk", 0, 64)]),
    ],
)
def test_flat_files(size: int, expected: list[Any], make: Any) -> None:
    path = make.flat("a", b"x" * 64 * SECTOR)
    os.truncate(make.folder / "a-flat.vmdk", size)
    assert shapes(path) == expected


def test_flat_extents_in_one_file(make: Any) -> None:
    make.flat("a", b"x" * 64 * SECTOR)
    lines = ['RW 16 FLAT "a-flat.vmdk" 48', "RW 8 ZERO", 'RW 48 FLAT "a-flat.vmdk" 0']
    assert shapes(make.text("a.vmdk", lines)) == []
    lines[0] = 'RW 16 FLAT "a-flat.vmdk" 40'
    assert shapes(make.text("a.vmdk", lines)) == [
        ("damage", "overlap", "a-flat.vmdk", 0, 8),
        ("warning", "too-long", "a-flat.vmdk", -1, 0),
    ]


def test_a_sparse_file_that_is_listed_twice(make: Any) -> None:
    make.sparse("a-s001.vmdk", CAPACITY, DATA, embedded=False)
    path = make.text("a.vmdk", [f'RW {CAPACITY} SPARSE "a-s001.vmdk"'] * 2)
    assert shapes(path) == [("damage", "descriptor", "a-s001.vmdk", CAPACITY, CAPACITY)]


def test_missing_extents_keep_nobody_from_the_others(make: Any) -> None:
    make.sparse("a-s002.vmdk", CAPACITY, DATA, embedded=False)
    patch(make.folder / "a-s002.vmdk", *entry(9, 1 << 31))
    lines = [f'RW {CAPACITY} SPARSE "a-s00{number}.vmdk"' for number in (1, 2, 3)]
    assert shapes(make.text("a.vmdk", lines)) == [
        ("damage", "missing", "a-s001.vmdk", 0, CAPACITY),
        ("damage", "grain-outside", "a-s002.vmdk", CAPACITY + 9 * GRAIN, GRAIN),
        ("damage", "missing", "a-s003.vmdk", 2 * CAPACITY, CAPACITY),
    ]


def test_an_extent_of_another_kind(make: Any) -> None:
    make.sparse("a-s001.vmdk", CAPACITY, DATA, embedded=False)
    for kind in ("VMFSSPARSE", "SESPARSE"):
        path = make.text("a.vmdk", [f'RW {CAPACITY} {kind} "a-s001.vmdk"'])
        assert shapes(path) == [("damage", "header", "a-s001.vmdk", 0, CAPACITY)]
    (make.folder / "a-s001.vmdk").unlink()
    (make.folder / "a-s001.vmdk").mkdir()
    assert shapes(path) == [("damage", "unreadable", "a-s001.vmdk", 0, CAPACITY)]


def test_a_descriptor_that_is_damaged(make: Any) -> None:
    path = Path(make.flat("a", b"x" * 4096))
    path.write_text(path.read_text().replace("CID=", "SID=", 1))
    findings, chains = events(path)
    assert [(one.level, one.code) for one in findings] == [("damage", "descriptor")]
    assert "no CID" in findings[0].what
    assert chains == [ChainDone("a", 0, 1, 0, 0)]
    assert ("damage", "descriptor", "a.vmdk", -1, 0) in shapes(make.folder)


def test_an_encrypted_disk_is_not_checked(make: Any) -> None:
    path = make.flat("a", b"x" * 4096, more='encryption.keySafe = "vmware:key"')
    findings, chains = events(path)
    assert [(one.level, one.exit_code) for one in findings] == [
        ("unchecked", UnsupportedFormat.exit_code)
    ]
    assert chains == [ChainDone("a", 1, 0, 0, 1)]


def test_files_outside_the_folder_need_trust(make: Any, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    make.sparse("a.vmdk", CAPACITY, DATA)
    os.rename(tmp_path / "a.vmdk", tmp_path / "sub" / "a.vmdk")
    path = make.sparse("b.vmdk", CAPACITY, {}, parent="12345678", hint="sub/../sub/a.vmdk")
    assert [shape[:2] for shape in shapes(path)] == [("unchecked", "outside")]
    assert shapes(path, outside=True) == []


def test_devices_are_not_looked_at(make: Any) -> None:
    path = make.text("a.vmdk", ['RW 64 FLAT "/dev/null" 0'], kind="fullDevice")
    assert [shape[:2] for shape in shapes(path)] == [("unchecked", "unsupported")]
    assert [shape[:2] for shape in shapes(path, devices=True)] == [("damage", "unreadable")]


def test_what_may_not_be_read(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make.flat("a", b"x" * 4096)
    child = make.sparse("b.vmdk", CAPACITY, {}, parent="12345678", hint="a.vmdk")
    plain = os.open
    forbidden = "a-flat.vmdk"

    def refusing(name: str, *flags: int, **keys: int) -> int:
        if os.path.basename(name) == forbidden:
            raise PermissionError(13, "Permission denied", name)
        return plain(name, *flags, **keys)

    monkeypatch.setattr(os, "open", refusing)
    for source in (path, child, make.folder):
        (one,) = events(source)[0]
        assert (one.level, one.exit_code) == ("unchecked", AccessDenied.exit_code)
        assert one.file.endswith("a-flat.vmdk")
    forbidden = "a.vmdk"
    (one,) = events(child)[0]
    assert (one.level, one.link, one.file) == ("unchecked", child, path)
    assert {one.level for one in events(make.folder)[0]} == {"unchecked", "warning"}
    with pytest.raises(AccessDenied):
        list(check_source(path))


def test_strays_of_a_folder(make: Any) -> None:
    make.flat("a", b"x" * 4096)
    (make.folder / "other-flat.vmdk").write_bytes(b"x" * 4096)
    findings, chains = events(make.folder)
    assert [(one.level, one.code) for one in findings] == [("warning", "stray")]
    assert chains == [ChainDone("a", 1, 0, 0, 0)]


def test_an_archive_with_a_disk_that_is_stored_compressed(make: Any, tmp_path: Path) -> None:
    make.sparse("a.vmdk", CAPACITY, DATA)
    write_ova(tmp_path / "vm.ova", {"a.vmdk": tmp_path / "a.vmdk", "b.vmdk.gz": b"x" * 999})
    findings, chains = events(tmp_path / "vm.ova")
    assert [(one.level, os.path.basename(one.file)) for one in findings] == [
        ("unchecked", "b.vmdk.gz")
    ]
    assert chains == [ChainDone("a", 1, 0, 0, 0)]


def test_a_vmx(make: Any) -> None:
    make.flat("a", b"x" * 4096)
    vmx = make.folder / "vm.vmx"
    vmx.write_text('scsi0:0.fileName = "a.vmdk"\nscsi0:1.fileName = "/x/b.vmdk"\n')
    findings, chains = events(vmx)
    assert [(one.level, one.code) for one in findings] == [("unchecked", "outside")]
    assert chains == [ChainDone("a", 1, 0, 0, 0)]
    vmx.write_text('scsi0:0.fileName = "a.vmdk"\nscsi0:1.fileName = "b.vmdk"\n')
    findings, chains = events(vmx)
    assert [(one.level, one.code) for one in findings] == [("damage", "missing")]
    assert [one.name for one in chains] == ["a", "b"]


def test_nothing_to_check(tmp_path: Path) -> None:
    (tmp_path / "a.vmx").write_text('x = "y"\n')
    (tmp_path / "b.vmdk").write_text("no disk\n")
    (tmp_path / "empty").mkdir()
    for name, kind in [
        ("none.vmdk", SourceMissing),
        ("empty", SourceMissing),
        ("a.vmx", SourceMissing),
        ("b.vmdk", NotAVmdk),
    ]:
        with pytest.raises(kind) as caught:
            list(check_source(str(tmp_path / name)))
        assert caught.value.advice


def test_it_changes_nothing_and_closes_all(make: Any) -> None:
    path = make.sparse("a.vmdk", CAPACITY, DATA)
    patch(path, *entry(9, 1))
    before = Path(path).read_bytes(), os.stat(path).st_mtime_ns
    opened = len(os.listdir("/proc/self/fd"))
    list(check_source(path))
    walk = check_source(path)
    next(walk)
    walk.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == opened
    assert (Path(path).read_bytes(), os.stat(path).st_mtime_ns) == before


def test_a_file_that_fails_in_between(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file system cannot read is a finding; the other links are looked at."""
    leaf = three_links(make, ("0000000a", "0000000b", "0000000c"), ("0000000a", "0000000b"))
    plain = os.pread

    def failing(fd: int, count: int, offset: int) -> bytes:
        if offset >= 20 * SECTOR and os.readlink(f"/proc/self/fd/{fd}").endswith("b.vmdk"):
            raise OSError(5, "Input/output error")
        return plain(fd, count, offset)

    monkeypatch.setattr(os, "pread", failing)
    found = shapes(leaf)
    assert [shape[:3] for shape in found] == [("damage", "unreadable", "b.vmdk")]


def test_every_finding_has_a_place(make: Any) -> None:
    path = make.sparse("a.vmdk", CAPACITY, DATA)
    patch(path, *entry(9, 1))
    (one,) = events(path)[0]
    assert one == Finding(
        "damage",
        "grain-place",
        path,
        path,
        "the grain is said to be at sector 1, where the file's header is",
        9 * GRAIN,
        GRAIN,
    )
