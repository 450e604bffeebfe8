"""An .ova as SOURCE: its disks are read where they are, and what cannot be is told."""

import errno
import gzip
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Done, Mount, Mounts, sha256, succeed, vddkfs
from tests.end_to_end.vms import (
    KIB,
    MIB,
    SECTOR,
    data_ranges,
    make_chain,
    make_vmdk,
    make_vmfs,
    noise,
    qemu_map,
    raw,
    sparse_noise,
)
from tests.engines.vmdk.makers_stream import write_ova
from vddkfs.errors import DamagedSource, NotAVmdk, SourceMissing, UnsupportedFormat, VddkfsError

SIZE = 5 * MIB + 3 * SECTOR
OVF = b'<?xml version="1.0"?><Envelope/>'
CHANGED = r"disk \S+: link 0 \(.*\) changed under the mount: "
STALE = r"read at offset \d+ failed: .* the source changed after the file was opened"


def packed(folder: Path, number: int, seed: object = "disk") -> tuple[bytes, bytes]:
    """Return a streamOptimized disk as a file's bytes, and what it shows."""
    path = make_vmdk(
        folder / f"made{number}.vmdk", sparse_noise((seed, number), SIZE), "streamOptimized"
    )
    made = path.read_bytes(), raw(path)
    path.unlink()
    return made


@pytest.fixture
def two(vm: Path) -> tuple[Path, list[bytes]]:
    """An archive as an export makes it, and what its two disks show."""
    files, wanted = {}, []
    for number in (1, 2):
        files[f"web-disk{number}.vmdk"], content = packed(vm, number)
        wanted.append(content)
    write_ova(vm / "web.ova", {"web.ovf": OVF, "web.mf": b"SHA256(web.ovf)= 0\n", **files})
    return vm / "web.ova", wanted


def judge(found: Mount, name: str, wanted: bytes) -> None:
    for image in ("disk.raw", "chain/0.raw"):
        path = f"{name}/{image}"
        assert found.sha256(path, True) == sha256(wanted)
        assert succeed("sha256sum", found.path(path)).stdout.split()[0] == sha256(wanted)


def refused(source: Path, place: Path, kind: type[VddkfsError], *words: str) -> None:
    """Check that a SOURCE is refused in one line, by `mount` and by `info`."""
    place.mkdir()
    lines = set()
    for done in (vddkfs("mount", source, place), vddkfs("info", source)):
        assert (done.returncode, done.stdout) == (kind.exit_code, ""), done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("vddkfs: ")
        assert line.isprintable()
        for word in words:
            assert word in line
        lines.add(line)
    assert len(lines) == 1


def test_two_disks(mount: Mounts, vm: Path, two: tuple[Path, list[bytes]]) -> None:
    path, wanted = two
    found = mount(path)
    assert set(found.ask("listdir", found.path())) == {
        *("web-disk1", "web-disk2", "vm.json", ".vddkfs")
    }
    for number, content in enumerate(wanted, 1):
        judge(found, f"web-disk{number}", content)
        single = make_vmdk(vm / "same.vmdk", content, "streamOptimized")
        seen = found.ask("seek_map", found.path(f"web-disk{number}/disk.raw"))
        assert [part[:2] for part in seen if part[2]] == data_ranges(qemu_map(single, "vmdk"))
    assert found.json("vm.json")["left_out"] == []
    assert found.json("vm.json")["source"] == str(path)


def fields(done: Done) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_info(two: tuple[Path, list[bytes]]) -> None:
    path, _ = two
    rows = fields(vddkfs("info", path))
    heading, first, second = rows[:3]
    for number, row in enumerate((first, second), 1):
        told = dict(zip(heading, row, strict=True))
        assert told["file"] == f"web-disk{number}/chain/0.raw = disk.raw"
        assert (told["format"], told["extents"]) == ("streamOptimized", "SPARSE")
        assert told["link"] == f"{path}/web-disk{number}.vmdk"
        assert told["parent cid"] == "ffffffff"
    assert not any(line[0].startswith("left out") for line in rows)


def test_one_disk_of_an_archive(mount: Mounts, two: tuple[Path, list[bytes]]) -> None:
    path, wanted = two
    found = mount(path / "web-disk2.vmdk")
    assert set(found.ask("listdir", found.path())) == {"web-disk2", "vm.json", ".vddkfs"}
    judge(found, "web-disk2", wanted[1])


def test_a_name_that_is_not_in_it(two: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    missing = two[0] / "web-disk3.vmdk"
    refused(missing, tmp_path / "p", SourceMissing, str(missing), "tar -tf")


def test_an_archive_by_any_name(mount: Mounts, two: tuple[Path, list[bytes]]) -> None:
    path, wanted = two
    other = path.rename(path.with_name("export.tar"))
    judge(mount(other), "web-disk1", wanted[0])


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_forms_of_archives(mount: Mounts, vm: Path, form: int) -> None:
    """Long names, folders inside, and names that are not ASCII."""
    file, wanted = packed(vm, 1)
    name = "ordner/" + "lang " * 25 + "é"
    write_ova(vm / "web.ova", {"web.ovf": OVF, f"{name}.vmdk": file}, form=form)
    judge(mount(vm / "web.ova"), os.path.basename(name), wanted)


def test_flat_disk_inside(mount: Mounts, vm: Path) -> None:
    """Behind the flat file comes another member, which is nothing of the disk's."""
    path = make_vmfs(vm / "web.vmdk", noise("flat", SIZE))
    names = ("web.vmdk", "web-flat.vmdk")
    files = {name: (vm / name).read_bytes() for name in names}
    wanted = raw(path)
    for name in names:
        (vm / name).unlink()
    write_ova(vm / "web.ova", {"web.ovf": OVF, **files, "zz.nvram": noise("behind", 9 * KIB)})
    found = mount(vm / "web.ova")
    judge(found, "web", wanted)
    assert set(found.ask("listdir", found.path())) == {"web", "vm.json", ".vddkfs"}
    assert found.read("web/disk.raw", SIZE - 100, 4096) == wanted[-100:]
    assert found.read("web/disk.raw", SIZE, 4096) == b""


def test_chain_inside(mount: Mounts, vm: Path) -> None:
    """A whole folder in an archive: its snapshots are there, and any point can be named."""
    links = make_chain(vm, links=3, size=2 * MIB)
    wanted = [raw(link) for link in links]
    write_ova(vm / "web.ova", {link.name: link for link in links})
    for link in links:
        link.unlink()
    found = mount(vm / "web.ova")
    assert set(found.ask("listdir", found.path("web/chain"))) == {"0.raw", "1.raw", "2.raw"}
    for number, content in enumerate(wanted):
        for direct in (False, True):
            assert found.sha256(f"web/chain/{number}.raw", direct) == sha256(content)
    older = mount(vm / "web.ova" / links[1].name)
    assert older.sha256("web/disk.raw") == sha256(wanted[1])


def test_holes_of_a_flat_disk_inside(mount: Mounts, vm: Path) -> None:
    """Those that the archive itself has there, as a sparse copy does."""
    make_vmfs(vm / "web.vmdk", sparse_noise("thin", SIZE, MIB))
    wanted = raw(vm / "web.vmdk")
    files = {name: (vm / name).read_bytes() for name in ("web.vmdk", "web-flat.vmdk")}
    write_ova(vm / "full.ova", {"web.ovf": OVF, **files})
    succeed("cp", "--sparse=always", vm / "full.ova", vm / "web.ova")
    found = mount(vm / "web.ova")
    judge(found, "web", wanted)
    seen = found.ask("seek_map", found.path("web/disk.raw"))
    assert not all(data for _, _, data in seen)
    for start, end, data in seen:
        assert data or not wanted[start:end].strip(b"\0")


def test_flat_disk_with_a_short_member(vm: Path, tmp_path: Path) -> None:
    """The next member's bytes must not stand for what is missing."""
    make_vmfs(vm / "web.vmdk", noise("flat", SIZE))
    short = (vm / "web-flat.vmdk").read_bytes()[:-SECTOR]
    files = {"web.vmdk": (vm / "web.vmdk").read_bytes(), "web-flat.vmdk": short}
    write_ova(tmp_path / "web.ova", {**files, "zz.nvram": noise("behind", 9 * KIB)})
    source = tmp_path / "web.ova"
    words = (f"{source}/web-flat.vmdk", "truncated extent", str(len(short)), str(SIZE))
    refused(source, tmp_path / "p", DamagedSource, *words)


def test_compressed_and_chunked_members_are_left_out(mount: Mounts, vm: Path) -> None:
    file, wanted = packed(vm, 1)
    files = {
        "web.ovf": OVF,
        "web-disk1.vmdk": file,
        "web-disk2.vmdk.gz": gzip.compress(file),
        "web-disk3.vmdk.000000000": file[:MIB],
        "web-disk3.vmdk.000000001": file[MIB:],
    }
    write_ova(vm / "web.ova", files)
    found = mount.prepare(vm / "web.ova")
    odd = [name for name in files if name.count(".") == 2]
    assert len(odd) == 3
    for name in odd:
        found.expect(f"left out: .*{name}: is stored compressed or in pieces; unpack")
    done = found.start()
    left = found.json("vm.json")["left_out"]
    assert [entry["path"] for entry in left] == [f"{vm}/web.ova/{name}" for name in odd]
    for entry in left:
        assert entry["reason"] in done.stderr
        assert "unpack" in entry["reason"]
    judge(found, "web-disk1", wanted)
    told = [line for line, *_ in fields(vddkfs("info", vm / "web.ova")) if "left out" in line]
    assert len(told) == 3


def test_only_compressed_members(vm: Path, tmp_path: Path) -> None:
    file, _ = packed(vm, 1)
    write_ova(vm / "web.ova", {"web.ovf": OVF, "web-disk1.vmdk.gz": gzip.compress(file)})
    words = ("web-disk1.vmdk.gz", "compressed", "unpack")
    refused(vm / "web.ova", tmp_path / "p", UnsupportedFormat, *words)


def test_no_disk_in_it(vm: Path, tmp_path: Path) -> None:
    write_ova(vm / "web.ova", {"web.ovf": OVF, "web.iso": noise("cd", MIB)})
    refused(vm / "web.ova", tmp_path / "p", SourceMissing, "no VMDK in", "web.ova")


@pytest.mark.parametrize(
    ("keep", "kind", "words"),
    [
        (0, NotAVmdk, "not a VMDK"),
        (100, NotAVmdk, "not a VMDK"),
        (512 + 10, DamagedSource, "web.ovf"),
        (3 * 512, DamagedSource, "truncated"),
        (-MIB, DamagedSource, "web-disk2.vmdk"),
    ],
)
def test_truncated(
    two: tuple[Path, list[bytes]],
    tmp_path: Path,
    keep: int,
    kind: type[VddkfsError],
    words: str,
) -> None:
    """Of an archive that was not copied to its end nothing is shown."""
    path, _ = two
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    refused(path, tmp_path / "p", kind, str(path), words)


def test_an_archive_that_is_cut_under_the_mount(
    mount: Mounts, two: tuple[Path, list[bytes]]
) -> None:
    """Whoever has a file of it open is told that it is not the same; what is gone is no zeros."""
    path, _ = two
    found = mount(path)
    fd = found.open("web-disk2/disk.raw", direct=True)
    os.truncate(path, path.stat().st_size - 2 * MIB)
    found.expect(r"web-disk2/chain/0.raw: read at offset \d+ failed: .* the archive was written")
    for offset in range(0, SIZE, 512 * KIB):
        assert is_stale(found, fd, offset)
    found.expect(r"web-disk1/chain/0.raw cannot be opened: .*web.ova: truncated archive: .*disk2")
    assert found.attempt(errno.EIO, "open", found.path("web-disk1/disk.raw"), os.O_RDONLY) is None


def is_stale(found: Mount, fd: int, offset: int) -> bool:
    return found.attempt(errno.ESTALE, "pread", fd, 4096, offset) is None


@pytest.mark.parametrize("same", [False, True], ids=["other content", "a copy"])
def test_an_archive_that_is_replaced(
    mount: Mounts, vm: Path, two: tuple[Path, list[bytes]], same: bool
) -> None:
    """Who has a file open gets ESTALE; the next open shows what is there now."""
    path, wanted = two
    found = mount(path)
    name = "web-disk1/disk.raw"
    handles = found.open(name), found.open(name, direct=True)
    assert found.sha256(name) == sha256(wanted[0])
    if same:
        shutil.copyfile(path, vm / "new")
        content = wanted[0]
    else:
        files = {}
        files["web-disk1.vmdk"], content = packed(vm, 1, "another")
        files["web-disk2.vmdk"], _ = packed(vm, 2, "another")
        write_ova(vm / "new", {"web.ovf": OVF, **files})
    (vm / "new").rename(path)
    found.expect(r"disk web-disk1: .* was replaced by another file", STALE)
    assert found.sha256(name) == sha256(content)
    assert found.sha256(name, True) == sha256(content)
    found.ask("drop_cache", handles[0])
    assert all(is_stale(found, fd, 0) for fd in handles)


def test_an_archive_whose_members_have_moved(
    mount: Mounts, vm: Path, two: tuple[Path, list[bytes]]
) -> None:
    """Written anew in place, with another file in front: the disks begin elsewhere now."""
    path, wanted = two
    with tarfile.open(path) as archive:
        files = {}
        for member in archive.getmembers():
            stream = archive.extractfile(member)
            assert stream is not None
            files[member.name] = stream.read()
    found = mount(path)
    name = "web-disk2/disk.raw"
    handles = found.open(name), found.open(name, direct=True)
    assert found.sha256(name) == sha256(wanted[1])
    inode = path.stat().st_ino
    write_ova(path, {"aa.ovf": OVF * 2000, **files})
    assert path.stat().st_ino == inode
    found.allow(CHANGED, STALE)
    assert found.sha256(name) == sha256(wanted[1])
    assert found.sha256(name, True) == sha256(wanted[1])
    found.ask("drop_cache", handles[0])
    for fd in handles:
        assert found.attempt(errno.ESTALE, "pread", fd, MIB, 0) in (None, wanted[1][:MIB])


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_an_open_handle_never_shows_another_members_bytes(
    mount: Mounts, vm: Path, direct: bool
) -> None:
    """Written anew in place, as cp does it, with the same disk behind a longer description."""
    make_vmfs(vm / "web.vmdk", noise("flat", SIZE))
    files = {name: (vm / name).read_bytes() for name in ("web.vmdk", "web-flat.vmdk")}
    write_ova(vm / "web.ova", {"web.ovf": OVF, **files})
    found = mount(vm / "web.ova")
    fd = found.open("web/disk.raw", direct)
    write_ova(vm / "web.ova", {"web.ovf": OVF * 2000, **files})
    found.expect("read at offset 1048576 failed: .*: the archive was written since it was opened")
    assert is_stale(found, fd, MIB)
