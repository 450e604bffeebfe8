"""What a SOURCE turns out to be: one VMDK, a .vmx, a folder."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.vmdk import VmdkEngine, chain, discover, files
from vddkfs.engines.vmdk.files import Archives, list_folder, open_file
from vddkfs.errors import (
    BrokenChain,
    DamagedSource,
    NotAVmdk,
    SourceMissing,
    StaleImage,
)

Names = Callable[..., list[tuple[str, list[str]]]]
Refused = Callable[..., str]

MIB = bytes(1 << 20)


def three(make: Any) -> None:
    make.sparse("web.vmdk", 2048, {}, cid="00000001")
    make.sparse("web-1.vmdk", 2048, {}, cid="00000002", parent="00000001", hint="web.vmdk")
    make.sparse("web-2.vmdk", 2048, {}, cid="00000003", parent="00000002", hint="web-1.vmdk")


def test_any_link_is_the_mounted_point(make: Any, names: Names) -> None:
    three(make)
    assert names(make.folder / "web.vmdk") == [("web", ["web.vmdk"])]
    assert names(make.folder / "web-1.vmdk") == [("web", ["web.vmdk", "web-1.vmdk"])]
    assert names(make.folder / "web-2.vmdk") == [("web", ["web.vmdk", "web-1.vmdk", "web-2.vmdk"])]


def test_link_info(make: Any) -> None:
    path = make.flat("web", MIB, cid="AbCdEf01", more='ddb.uuid = "60 00"\nddb.toolsVersion="11"')
    (chain,) = discover(path).chains
    (link,) = chain.links
    flat = str(make.folder / "web-flat.vmdk")
    assert (link.path, link.format, link.capacity) == (path, "monolithicFlat", 2048)
    assert (link.content_id, link.parent_content_id, link.parent_hint) == (
        "abcdef01",
        "ffffffff",
        "",
    )
    assert (link.adapter, link.hardware_version) == ("lsilogic", "14")
    assert (link.uuid, link.tools_version) == ("60 00", "11")
    (extent,) = link.extents
    assert (extent.kind, extent.sectors, extent.path) == ("FLAT", 2048, flat)
    assert extent.file_bytes == 1 << 20
    assert extent.allocated_bytes == os.stat(flat).st_blocks * 512
    assert [stamp.path for stamp in link.identity.files] == [path, flat]
    assert link.identity.files[1].inode == os.stat(flat).st_ino
    assert link.mtime_ns == max(os.stat(path).st_mtime_ns, os.stat(flat).st_mtime_ns)


def test_names_with_odd_characters(make: Any, names: Names) -> None:
    make.flat('a "b" ç', MIB)
    assert names(make.folder) == [('a "b" ç', ['a "b" ç.vmdk'])]


def test_name_that_is_not_utf8(make: Any, read: Callable[..., bytes]) -> None:
    (make.folder / "caf\udce9-flat.vmdk").write_bytes(b"x" * 512)
    text = make.text("cafe.vmdk", ["RW 1 FLAT NAME 0"])
    raw = Path(text).read_bytes().replace(b"NAME", b'"caf\xe9-flat.vmdk"')
    Path(text).write_bytes(raw)
    (chain,) = discover(text).chains
    engine = VmdkEngine(chain.paths)
    assert read(engine, 0, 1) == b"x" * 512
    engine.close()


def test_monolithic_file_may_be_renamed(make: Any, names: Names) -> None:
    path = make.sparse("web.vmdk", 2048, {})
    os.rename(path, make.folder / "other.vmdk")
    assert names(make.folder) == [("other", ["other.vmdk"])]


def test_relative_source(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make.sparse("web.vmdk", 2048, {})
    monkeypatch.chdir(make.folder)
    (chain,) = discover("web.vmdk").chains
    assert chain.paths == (str(make.folder / "web.vmdk"),)


# A folder


def test_folder_of_everything(make: Any, names: Names) -> None:
    three(make)
    make.sparse("web-b.vmdk", 2048, {}, cid="00000004", parent="00000001", hint="web.vmdk")
    make.flat("alone", MIB)
    make.flat("with-extras", MIB, more='changeTrackPath="tracking.vmdk"')
    (make.folder / "tracking.vmdk").write_bytes(b"junk" * 200)
    (make.folder / "with-extras-ctk.vmdk").write_bytes(b"junk" * 200)
    (make.folder / "vmware.log").write_text("hello")
    (make.folder / "sub.vmdk").mkdir()
    make.sparse("two-s001.vmdk", 2048, {}, embedded=False)
    make.sparse("two-s002.vmdk", 2048, {}, embedded=False)
    lines = ['RW 2048 SPARSE "two-s001.vmdk"', 'RW 2048 SPARSE "two-s002.vmdk"']
    make.text("two.vmdk", lines, kind="twoGbMaxExtentSparse")
    (make.folder / "link.vmdk").symlink_to("alone.vmdk")
    found = discover(str(make.folder))
    assert found.left_out == ()
    assert names(make.folder) == [
        ("alone", ["alone.vmdk"]),
        ("two", ["two.vmdk"]),
        ("web", ["web.vmdk", "web-1.vmdk", "web-2.vmdk"]),
        ("web", ["web.vmdk", "web-b.vmdk"]),
        ("with-extras", ["with-extras.vmdk"]),
    ]
    assert discover(str(make.folder)) == found


def test_folder_with_bad_files(make: Any) -> None:
    make.flat("good", MIB)
    make.flat("short", MIB)
    os.truncate(make.folder / "short-flat.vmdk", 5)
    make.sparse("child.vmdk", 2048, {}, parent="0000000b", hint="gone.vmdk")
    (make.folder / "junk.vmdk").write_bytes(b"junk" * 200)
    (make.folder / "orphan-flat.vmdk").write_bytes(MIB)
    os.mkfifo(make.folder / "pipe.vmdk")
    found = discover(str(make.folder))
    assert [chain.name for chain in found.chains] == ["good"]
    assert [(os.path.basename(one.path), type(one.error)) for one in found.left_out] == [
        ("child.vmdk", BrokenChain),
        ("junk.vmdk", NotAVmdk),
        ("orphan-flat.vmdk", NotAVmdk),
        ("pipe.vmdk", NotAVmdk),
        ("short.vmdk", DamagedSource),
    ]


def test_folder_where_nothing_opens(make: Any, refused: Refused) -> None:
    make.sparse("b.vmdk", 2048, {}, parent="0000000b", hint="gone.vmdk")
    (make.folder / "c.vmdk").write_bytes(b"junk" * 200)
    refused(BrokenChain, make.folder, "gone.vmdk")


def test_empty_folder(make: Any, refused: Refused) -> None:
    (make.folder / "readme").write_text("hello")
    refused(SourceMissing, make.folder, "no VMDK in", str(make.folder))


def test_guest_cannot_hide_its_disk(make: Any, names: Names) -> None:
    """The first sector of a flat disk claims that the real descriptor is one of its extents."""
    inner = make.sparse("plain.vmdk", 2048, {})
    content = Path(inner).read_bytes().replace(b'"plain.vmdk"', b'"real.vmdk" ')
    os.unlink(inner)
    (make.folder / "data.vmdk").write_bytes(content.ljust(1 << 20, b"\0"))
    make.text("real.vmdk", ['RW 2048 FLAT "data.vmdk" 0'])
    assert names(make.folder) == [("real", ["real.vmdk"])]


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each link is opened to be described."""
    found: Counter[str] = Counter()
    plain = chain.open_link

    def counted(path: str, *more: Any) -> Any:
        found[os.path.basename(path)] += 1
        return plain(path, *more)

    monkeypatch.setattr(chain, "open_link", counted)
    return found


def test_a_link_that_many_share_is_described_once(make: Any, described: Counter[str]) -> None:
    make.text("0.vmdk", ["RW 8 ZERO"], cid="00000001")
    for number in range(1, 6):
        keys = {"parent": f"{number:08x}", "hint": f"{number - 1}.vmdk"}
        make.text(f"{number}.vmdk", ["RW 8 ZERO"], cid=f"{number + 1:08x}", **keys)
    for letter in "abc":
        make.text(f"{letter}.vmdk", ["RW 8 ZERO"], parent="00000006", hint="5.vmdk")
    make.text("wrong.vmdk", ["RW 8 ZERO"], parent="00000007", hint="5.vmdk")
    found = discover(str(make.folder))
    assert len(described) == 10
    assert set(described.values()) == {1}
    assert [len(one.links) for one in found.chains] == [7, 7, 7]
    assert all(one.links[:6] == found.chains[0].links[:6] for one in found.chains)
    ((path, error),) = [(one.path, one.error) for one in found.left_out]
    assert (os.path.basename(path), type(error)) == ("wrong.vmdk", BrokenChain)
    assert "wrong.vmdk was made on 00000007" in str(error), "each chain is still checked"


@pytest.mark.parametrize("missing", ["base.vmdk", "base-flat.vmdk"])
def test_a_link_that_many_share_fails_once(
    make: Any, missing: str, described: Counter[str]
) -> None:
    make.flat("base", MIB, cid="00000001")
    for letter in "abc":
        make.text(f"{letter}.vmdk", ["RW 8 ZERO"], parent="00000001", hint="base.vmdk")
    make.text("good.vmdk", ["RW 8 ZERO"])
    (make.folder / missing).unlink()
    left = discover(str(make.folder)).left_out
    assert set(described.values()) == {1}
    told = {os.path.basename(one.path): one.error for one in left}
    for letter in "abc":
        error = told[f"{letter}.vmdk"]
        assert missing in str(error)
        if missing == "base.vmdk":
            assert type(error) is BrokenChain
            assert f"is the parent of {make.folder}/{letter}.vmdk" in str(error)
        else:
            assert type(error) is SourceMissing


def test_a_loop_below_what_was_described_before(make: Any) -> None:
    make.text("a.vmdk", ["RW 8 ZERO"], cid="0000000a", parent="0000000b", hint="b.vmdk")
    make.text("b.vmdk", ["RW 8 ZERO"], cid="0000000b", parent="0000000a", hint="a.vmdk")
    make.text("c.vmdk", ["RW 8 ZERO"], parent="0000000a", hint="a.vmdk")
    make.text("d.vmdk", ["RW 8 ZERO"], parent="0000000b", hint="b.vmdk")
    make.text("good.vmdk", ["RW 8 ZERO"])
    found = discover(str(make.folder))
    assert [one.name for one in found.chains] == ["good"]
    assert [os.path.basename(one.path) for one in found.left_out] == ["c.vmdk", "d.vmdk"]
    assert all("loop" in str(one.error) for one in found.left_out)


# Archives


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each archive is walked through."""
    found: Counter[str] = Counter()
    plain = files.read_members

    def counted(read: Any, size: int, path: str) -> Any:
        found[os.path.basename(path)] += 1
        return plain(read, size, path)

    monkeypatch.setattr(files, "read_members", counted)
    return found


def test_archives_in_turn_are_walked_through_once(make: Any, walks: Counter[str]) -> None:
    for letter in "abc":
        write_archive(make.folder / f"{letter}.ova", {f"m{i}": bytes(512) for i in range(40)})
    lines = [f'RW 1 FLAT "{"abc"[i % 3]}.ova/m{i}" 0' for i in range(40)]
    path = make.text("x.vmdk", lines, kind="custom")
    assert len(discover(path).chains[0].links[0].extents) == 40
    assert walks == {"a.ova": 1, "b.ova": 1, "c.ova": 1}
    walks.clear()
    engine = VmdkEngine([path])
    assert walks == {"a.ova": 1, "b.ova": 1, "c.ova": 1}
    engine.renew()
    assert walks == {"a.ova": 1, "b.ova": 1, "c.ova": 1}
    engine.close()


def test_more_archives_than_are_remembered(make: Any, walks: Counter[str]) -> None:
    """In turn, they do not push each other out."""
    paths = [make.folder / f"{number:02}.ova" for number in range(20)]
    for path in paths:
        write_archive(path, {"m": path.name.encode()})
    archives = Archives()
    for _ in range(3):
        for path in paths:
            file = open_file(str(path / "m"), archives)
            assert file.head(100) == path.name.encode()
            file.close()
    assert sorted(walks.values()) == [1] * 16 + [3] * 4


def test_an_archive_that_was_written_is_walked_through_again(
    make: Any, walks: Counter[str]
) -> None:
    path = make.folder / "a.ova"
    archives = Archives()
    for number, content in enumerate((b"1", b"22"), 1):
        write_archive(path, {"pad": bytes(512 * number), "m": content})
        os.utime(path, ns=(number, number))
        file = open_file(str(path / "m"), archives)
        assert file.head(100) == content
        file.close()
        assert list_folder(str(path), archives) == ["m", "pad"]
        assert walks == {"a.ova": number}


def test_an_archive_that_is_written_while_it_is_walked_through(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make.folder / "a.ova"
    write_archive(path, {"m": b"1"})
    plain = files.read_members

    def written(read: Any, size: int, name: str) -> Any:
        found = plain(read, size, name)
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(files, "read_members", written)
    archives = Archives()
    with pytest.raises(StaleImage, match="written while it was opened"):
        open_file(str(path / "m"), archives)
    monkeypatch.setattr(files, "read_members", plain)
    file = open_file(str(path / "m"), archives)
    assert file.head(9) == b"1"
    file.close()


# A .vmx


def test_vmx(make: Any) -> None:
    for name in ("os", "data", "nvme", "off", "gone-controller"):
        make.flat(name, MIB)
    (make.folder / "vm.vmx").write_text(
        '.encoding = "UTF-8"\n'
        'scsi0.present = "TRUE"\n'
        'scsi0:1.present = "TRUE"\n'
        'scsi0:1.fileName = "data.vmdk"\n'
        'SCSI0:0.FileName = "os.vmdk"\n'
        'scsi0:2.present = "FALSE"\n'
        'scsi0:2.fileName = "off.vmdk"\n'
        'scsi1.present = "FALSE"\n'
        'scsi1:0.fileName = "gone-controller.vmdk"\n'
        'nvme0:0.fileName = "nvme.vmdk"\n'
        'ide1:0.deviceType = "cdrom-image"\n'
        'ide1:0.fileName = "tools.iso"\n'
        'ide0:0.fileName = "auto detect"\n'
        'ide0:1.deviceType = "atapi-cdrom"\n'
        'ide0:1.fileName = "os.vmdk"\n'
        'sata0:0.fileName = "missing.vmdk"\n'
        'sata0:1.fileName = "/elsewhere/x.vmdk"\n'
        'floppy0.fileName = "a.flp"\n'
    )
    found = discover(str(make.folder / "vm.vmx"))
    assert [chain.name for chain in found.chains] == ["os", "data", "nvme"]
    assert [(one.path, type(one.error)) for one in found.left_out] == [
        (str(make.folder / "missing.vmdk"), SourceMissing),
        ("/elsewhere/x.vmdk", BrokenChain),
    ]


def test_vmx_escapes_quotes(make: Any, names: Names) -> None:
    make.flat('my "disk"', MIB)
    (make.folder / "vm.vmx").write_text('scsi0:0.fileName = "my |22disk|22.vmdk"\n')
    assert names(make.folder / "vm.vmx") == [('my "disk"', ['my "disk".vmdk'])]
