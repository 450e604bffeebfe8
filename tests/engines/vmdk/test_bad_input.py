"""Every kind of bad input: refused in one line that says which file, what is wrong, what to do."""

import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.vmdk import VmdkEngine, describe_chain, discover
from vddkfs.engines.vmdk.chain import MAX_LINKS
from vddkfs.errors import (
    AccessDenied,
    BrokenChain,
    DamagedSource,
    NotAVmdk,
    SourceMissing,
    UnsupportedFormat,
)

Names = Callable[..., list[tuple[str, list[str]]]]
Refused = Callable[..., str]

MIB = bytes(1 << 20)


def test_missing(make: Any, refused: Refused) -> None:
    refused(SourceMissing, make.folder / "no.vmdk", "no.vmdk", "no such file")
    refused(SourceMissing, make.folder / "no" / "no.vmdk", "no.vmdk")


@pytest.mark.parametrize(
    ("content", "words"), [(b"hello" * 200, "neither"), (b"", "empty"), (b"\0" * 4096, "neither")]
)
def test_not_a_vmdk(make: Any, content: bytes, words: str, refused: Refused) -> None:
    (make.folder / "x.vmdk").write_bytes(content)
    refused(NotAVmdk, make.folder / "x.vmdk", "x.vmdk", "not a VMDK", words)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_not_a_regular_file(make: Any, kind: str, refused: Refused) -> None:
    path = make.folder / "x.vmdk"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        make.text("y.vmdk", ['RW 1 FLAT "x.vmdk" 0'])
        path.mkdir()
        path = make.folder / "y.vmdk"
    refused(NotAVmdk, path, "x.vmdk", "regular file")


@pytest.mark.parametrize("size", [1, 4, 80, 511])
def test_truncated_header(make: Any, size: int, refused: Refused) -> None:
    path = make.sparse("x.vmdk", 2048, {}, tail=size)
    refused(DamagedSource, path, "x.vmdk", "truncated header", str(size))


def test_truncated_grain_directory(make: Any, refused: Refused) -> None:
    path = make.sparse("x.vmdk", 1 << 30, {}, tail=21 * 512 + 400)
    refused(DamagedSource, path, "grain directory", "11152 bytes")


def test_truncated_extent(make: Any, refused: Refused) -> None:
    path = make.flat("x", MIB)
    os.truncate(make.folder / "x-flat.vmdk", 1000)
    refused(DamagedSource, path, "x-flat.vmdk", "truncated extent", "1000", "1048576", "x.vmdk")


def test_missing_extent(make: Any, refused: Refused) -> None:
    path = make.flat("x", MIB)
    os.unlink(make.folder / "x-flat.vmdk")
    refused(SourceMissing, path, "x-flat.vmdk", "x.vmdk names it as an extent")


def test_parent_missing(make: Any, refused: Refused) -> None:
    path = make.sparse("x.vmdk", 2048, {}, parent="00000001", hint="gone.vmdk")
    refused(BrokenChain, path, "gone.vmdk", "is missing", "x.vmdk")


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("missing", ["base.vmdk", "base-flat.vmdk"])
def test_what_is_missing_below_a_child(
    make: Any, missing: str, archived: bool, refused: Refused
) -> None:
    """The parent itself, or an extent of it: in a folder as in an archive."""
    make.flat("base", MIB, cid="00000001")
    make.text("x.vmdk", ["RW 2048 ZERO"], parent="00000001", hint="base.vmdk")
    (make.folder / missing).unlink()
    if archived:
        with tarfile.open(make.folder / "x.ova", "w") as archive:
            for path in sorted(make.folder.glob("*.vmdk")):
                archive.add(path, path.name)
    folder = make.folder / "x.ova" if archived else make.folder
    if missing == "base.vmdk":
        words = f"{folder}/base.vmdk: is missing, but is the parent of {folder}/x.vmdk"
        refused(BrokenChain, folder / "x.vmdk", words)
    else:
        words = f"{folder}/{missing}: is missing, but base.vmdk names it as an extent"
        refused(SourceMissing, folder / "x.vmdk", words)


def test_parent_not_named(make: Any, refused: Refused) -> None:
    path = make.sparse("x.vmdk", 2048, {}, parent="00000001")
    refused(BrokenChain, path, "x.vmdk", "00000001")


def test_parent_is_not_a_vmdk(make: Any, refused: Refused) -> None:
    (make.folder / "base.vmdk").write_bytes(b"hello" * 200)
    path = make.sparse("x.vmdk", 2048, {}, parent="00000001", hint="base.vmdk")
    refused(NotAVmdk, path, "base.vmdk")


def test_content_ids_disagree(make: Any, refused: Refused) -> None:
    make.sparse("base.vmdk", 2048, {}, cid="0000000a")
    path = make.sparse("x.vmdk", 2048, {}, parent="0000000b", hint="base.vmdk")
    refused(BrokenChain, path, "base.vmdk", "x.vmdk", "0000000a", "0000000b")


@pytest.mark.parametrize("whole_folder", [False, True])
def test_loop(make: Any, whole_folder: bool, refused: Refused) -> None:
    make.sparse("a.vmdk", 2048, {}, cid="0000000a", parent="0000000b", hint="b.vmdk")
    make.sparse("b.vmdk", 2048, {}, cid="0000000b", parent="0000000a", hint="./a.vmdk")
    source = make.folder if whole_folder else make.folder / "a.vmdk"
    refused(BrokenChain, source, "a.vmdk", "b.vmdk", "loop")


def test_own_parent(make: Any, refused: Refused) -> None:
    path = make.sparse("a.vmdk", 2048, {}, cid="0000000a", parent="0000000a", hint="a.vmdk")
    refused(BrokenChain, path, "loop")
    refused(BrokenChain, make.folder, "loop")


def long_chain(make: Any, links: int) -> str:
    path = ""
    for number in range(links):
        child = {"parent": f"{number:08x}", "hint": f"{number - 1}.vmdk"} if number else {}
        line = "RW 8 ZERO" if number == 0 else f'RW 8 SPARSE "{number}-s001.vmdk"'
        kind = "twoGbMaxExtentSparse"
        path = make.text(f"{number}.vmdk", [line], cid=f"{number + 1:08x}", kind=kind, **child)
        if number:
            make.sparse(f"{number}-s001.vmdk", 8, {}, embedded=False, grain=8)
    return path


def test_longest_chain(make: Any, read: Callable[..., bytes]) -> None:
    links = describe_chain(long_chain(make, MAX_LINKS))
    assert len(links) == MAX_LINKS
    engine = VmdkEngine([link.path for link in links])
    assert read(engine, 1, 6) == bytes(6 * 512)
    buffer = memoryview(bytearray(512))
    assert engine.read_nowait(MAX_LINKS - 1, 7, 1, buffer, False)
    (hole,) = engine.map(MAX_LINKS - 1, 0, 8, 10, 60).extents
    assert not hole.data
    engine.close()


def test_too_long_chain(make: Any, refused: Refused) -> None:
    refused(BrokenChain, long_chain(make, MAX_LINKS + 1), f"more than {MAX_LINKS} links")


def test_capacity_that_overflows(make: Any, refused: Refused) -> None:
    path = make.sparse("x.vmdk", 2048, {})
    with open(path, "r+b") as file:
        file.seek(12)
        file.write(b"\xff" * 8)
    refused(DamagedSource, path, "x.vmdk", "62 TiB", str((1 << 64) - 1))
    path = make.text("y.vmdk", [f"RW {1 << 55} ZERO"])
    refused(DamagedSource, path, "y.vmdk", "62 TiB")


def test_header_smaller_than_the_descriptor_says(make: Any, refused: Refused) -> None:
    make.sparse("x-s001.vmdk", 2048, {}, embedded=False)
    path = make.text("x.vmdk", ['RW 4096 SPARSE "x-s001.vmdk"'], kind="twoGbMaxExtentSparse")
    refused(DamagedSource, path, "x-s001.vmdk", "2048", "4096")


@pytest.mark.parametrize("content", [b"", b"hello" * 300])
def test_sparse_extent_that_is_none(make: Any, content: bytes, refused: Refused) -> None:
    (make.folder / "x-s001.vmdk").write_bytes(content)
    path = make.text("x.vmdk", ['RW 4096 SPARSE "x-s001.vmdk"'], kind="twoGbMaxExtentSparse")
    refused(DamagedSource, path, "x-s001.vmdk", "header")


@pytest.mark.parametrize(
    "hint", ["../up/base.vmdk", "/{folder}/up/base.vmdk", "sub/../../up/base.vmdk"]
)
def test_hint_that_points_outside(make: Any, hint: str, names: Names, refused: Refused) -> None:
    (make.folder / "up").mkdir()
    (make.folder / "down" / "sub").mkdir(parents=True)
    root = make.folder
    make.folder = root / "up"
    make.sparse("base.vmdk", 2048, {}, cid="00000001")
    make.folder = root / "down"
    hint = hint.replace("/{folder}", str(root))
    path = make.sparse("x.vmdk", 2048, {}, parent="00000001", hint=hint)
    line = refused(BrokenChain, path, "x.vmdk", hint, "-o follow_parents=any")
    assert line.endswith("follow_parents=any`")
    assert names(path, follow_any=True) == [("base", ["base.vmdk", "x.vmdk"])]


@pytest.mark.parametrize("hint", ["C:\\vms\\base.vmdk", "\\\\server\\base.vmdk", "..\\base.vmdk"])
def test_windows_hint_that_points_outside(make: Any, hint: str, refused: Refused) -> None:
    path = make.sparse("x.vmdk", 2048, {}, parent="00000001", hint=hint)
    refused(BrokenChain, path, "follow_parents=any")
    refused(BrokenChain, path, "is missing", follow_any=True)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_extent_that_points_outside(make: Any, name: str, refused: Refused) -> None:
    (make.folder / "vm").mkdir()
    (make.folder / "secret").write_bytes(b"s" * 512)
    make.folder = make.folder / "vm"
    path = make.text("x.vmdk", [f'RW 1 FLAT "{name}" 0'])
    refused(BrokenChain, path, "x.vmdk", name, "follow_parents=any")


def test_extent_outside_is_followed_when_allowed(make: Any, read: Callable[..., bytes]) -> None:
    (make.folder / "vm").mkdir()
    (make.folder / "data").write_bytes(b"s" * 512)
    make.folder = make.folder / "vm"
    path = make.text("x.vmdk", ['RW 1 FLAT "../data" 0'])
    (chain,) = discover(path, follow_any=True).chains
    engine = VmdkEngine(chain.paths, follow_any=True)
    assert read(engine, 0, 1) == b"s" * 512
    engine.close()
    with pytest.raises(BrokenChain):
        VmdkEngine(chain.paths)


def test_parent_in_a_subfolder(make: Any, names: Names) -> None:
    (make.folder / "sub").mkdir()
    root = make.folder
    make.folder = root / "sub"
    make.flat("base", MIB, cid="00000001")
    make.folder = root
    path = make.sparse("x.vmdk", 2048, {}, parent="00000001", hint="sub/base.vmdk")
    assert names(path) == [("base", ["base.vmdk", "x.vmdk"])]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be nobody for a while: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("unreadable", ["x.vmdk", "x-flat.vmdk", "."])
def test_unreadable(make: Any, unreadable: str, refused: Refused) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make.folder = Path(folder)
        path = make.flat("x", MIB)
        os.chmod(folder, 0o755)
        os.chmod(os.path.join(folder, unreadable), 0)
        source = folder if unreadable == "." else path
        with unprivileged():
            refused(AccessDenied, source, unreadable.strip("."), "cannot be read")
        os.chmod(folder, 0o755)


def test_too_many_open_files(make: Any, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    path = make.flat("x", MIB)

    def no_more(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", no_more)
    refused(AccessDenied, path, "ulimit")


@pytest.mark.parametrize(
    "name", ["x-flat.vmdk", "x-delta.vmdk", "x-s001.vmdk", "x-f001.vmdk", "x-ctk.vmdk"]
)
def test_bare_extent(make: Any, name: str, refused: Refused) -> None:
    if "-s0" in name or "delta" in name:
        path = make.sparse(name, 2048, {}, embedded=False)
    else:
        path = make.folder / name
        path.write_bytes(MIB)
    refused(NotAVmdk, path, name, "descriptor")


def test_flat_extent_with_the_content_of_a_vmdk_is_no_disk(make: Any, refused: Refused) -> None:
    """A guest that writes a header to its sector 0 must not choose what is opened."""
    path = make.sparse("x-flat.vmdk", 2048, {})
    refused(NotAVmdk, path, "descriptor")


@pytest.mark.parametrize(
    ("kind", "line", "words"),
    [
        ("vmfsRaw", 'RW 8 VMFSRAW "/vmfs/devices/x"', "vmfsRaw"),
        ("vmfsRawDeviceMap", 'RW 8 VMFSRDM "a-rdm.vmdk"', "vmfsRawDeviceMap"),
        ("vmfsPassthroughRawDeviceMap", 'RW 8 VMFSRDM "a-rdmp.vmdk"', "Passthrough"),
        ("vmfs", 'RW 8 VMFSRDMP "a-rdmp.vmdk"', "vmfsRDMP"),
        ("fullDevice", 'RW 8 FLAT "/dev/sda" 0', "/dev/sda"),
        ("partitionedDevice", r'RW 8 FLAT "\\.\PhysicalDrive0" 0', "of Windows"),
        ("monolithicFlat", 'RW 8 FLAT "/dev/sda" 0', "/dev/sda"),
        ("monolithicFlat", 'NOACCESS 8 FLAT "a.vmdk" 0', "NOACCESS"),
        ("vmfs", 'RW 8 VMFSRDM "a-rdm.vmdk"', "vmfsRDM"),
        ("vmfs", 'RW 8 HOLOGRAM "a.vmdk"', "HOLOGRAM"),
        ("marvellous", 'RW 8 FLAT "a.vmdk" 0', "marvellous"),
    ],
)
def test_unsupported_is_named(
    make: Any, kind: str, line: str, words: str, refused: Refused
) -> None:
    path = make.text("x.vmdk", [line], kind=kind)
    line = refused(UnsupportedFormat, path, "x.vmdk", words)
    assert re.search("qemu-img convert|through VDDK|raw_devices=yes", line)


@pytest.mark.parametrize(
    ("magic", "words"), [(b"COWD", "vmfsSparse"), (b"\xbe\xba\xfe\xca\0\0\0\0", "seSparse")]
)
def test_unsupported_extent_is_named(make: Any, magic: bytes, words: str, refused: Refused) -> None:
    (make.folder / "x-s001.vmdk").write_bytes(magic.ljust(4096, b"\0"))
    path = make.text("x.vmdk", ['RW 8 SPARSE "x-s001.vmdk"'], kind="twoGbMaxExtentSparse")
    refused(DamagedSource, path, "x-s001.vmdk", "no header of that kind")
    (make.folder / "y.vmdk").write_bytes(magic.ljust(4096, b"\0"))
    refused(NotAVmdk, make.folder / "y.vmdk", words)


def test_encrypted_is_named(make: Any, refused: Refused) -> None:
    path = make.flat("x", MIB, more='ddb.iofilters = "vmwarevmcrypt"')
    refused(UnsupportedFormat, path, "x.vmdk", "encrypted")


def test_bad_vmx(make: Any, refused: Refused) -> None:
    path = make.folder / "vm.vmx"
    refused(SourceMissing, path, "vm.vmx")
    path.write_text('displayName = "x"\n')
    refused(SourceMissing, path, "no virtual disk in", "vm.vmx")
    path.write_bytes(bytes(100))
    refused(NotAVmdk, path, "not a .vmx")
    path.write_bytes(b"#" * (2 << 20))
    refused(DamagedSource, path, "longer than")
    path.write_text('encryption.keySafe = "vmware:key"\nscsi0:0.fileName = "x.vmdk"\n')
    refused(UnsupportedFormat, path, "encrypted")
    path.write_text('scsi0:0.fileName = "gone.vmdk"\n')
    refused(SourceMissing, path, "gone.vmdk")
