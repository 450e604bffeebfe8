"""SOURCE as typed: what it names, and names for folders that never clash."""

import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vddkfs.disks.vm import Source
from vddkfs.engines.config import VmdkConfig
from vddkfs.errors import SourceMissing, UnsupportedFormat, UsageError
from vddkfs.names import unique_names
from vddkfs.options import MountOptions
from vddkfs.source import open_source

RESERVED = {"vm.json", ".vddkfs", ".", "..", ""}


def make_disk(folder: Path, name: bytes, cid: str = "12345678", more: str = "") -> bytes:
    """Write a flat disk NAME.vmdk of one sector, with *more* lines, and return its path."""
    path = os.path.join(os.fsencode(folder), name)
    with open(path + b"-flat.vmdk", "wb") as file:
        file.write(bytes(512))
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="UTF-8"',
        f"CID={cid}",
        "parentCID=ffffffff",
        'createType="monolithicFlat"',
        more,
        'RW 1 FLAT "',
    ]
    with open(path + b".vmdk", "wb") as file:
        file.write("\n".join(lines).encode() + name + b'-flat.vmdk" 0\n')
    return path + b".vmdk"


@given(names=st.lists(st.sampled_from(["a", "a-2", "a-3", "a-2-2", "b", "vm.json", ".", ".."])))
def test_names_are_unique_and_those_without_a_clash_stay(names: list[str]) -> None:
    found = unique_names(names)
    assert len(set(found)) == len(found) == len(names)
    assert not RESERVED & set(found)
    for name, given_name in zip(found, names, strict=True):
        assert name.startswith(given_name)
    if len(set(names)) == len(names) and not RESERVED & set(names):
        assert found == names


def test_the_first_of_a_name_has_it_and_the_next_has_a_number() -> None:
    assert unique_names(["web", "db", "web", "web"]) == ["web", "db", "web-2", "web-3"]
    assert unique_names(["web-2", "web", "web"]) == ["web-2", "web", "web-3"]


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_disk_never_takes_a_name_that_the_tree_uses_or_cannot_show(name: str) -> None:
    [found] = unique_names([name])
    assert found not in RESERVED
    assert "/" not in found


def test_a_disk_whose_file_has_no_name_but_the_ending_has_a_folder_all_the_same(
    tmp_path: Path,
) -> None:
    source = open_source(os.fsdecode(make_disk(tmp_path, b"")), MountOptions())
    assert source.chains[0].name


def test_a_folder_has_its_disks_in_order_with_the_paths_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vm").mkdir()
    for name in (b"web", b"db", b"vm.json"):
        make_disk(tmp_path / "vm", name)
    monkeypatch.chdir(tmp_path)
    source = open_source("vm", MountOptions())
    assert source.text == "vm"
    assert source.path == str(tmp_path / "vm")
    assert source.engine == "vmdk"
    assert [chain.name for chain in source.chains] == ["db", "vm.json-2", "web"]
    assert all(os.path.isabs(link.path) for chain in source.chains for link in chain.links)
    assert source.left_out == ()


def test_what_cannot_be_opened_is_left_out_with_its_reason(tmp_path: Path) -> None:
    make_disk(tmp_path, b"good")
    (tmp_path / "bad.vmdk").write_bytes(b"nothing of the kind")
    source = open_source(str(tmp_path), MountOptions())
    assert [chain.name for chain in source.chains] == ["good"]
    [left] = source.left_out
    assert left.path == str(tmp_path / "bad.vmdk")
    assert str(tmp_path / "bad.vmdk") in left.reason


def test_names_that_are_not_utf_8_are_names_like_others(tmp_path: Path) -> None:
    path = make_disk(tmp_path, b"caf\xe9")
    for typed in (tmp_path, Path(os.fsdecode(path))):
        source = open_source(str(typed), MountOptions())
        [chain] = source.chains
        assert os.fsencode(chain.name) == b"caf\xe9"
        assert os.fsencode(chain.links[0].path) == path


@pytest.mark.parametrize("text", ["", "a\0b"])
def test_what_is_no_path_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="SOURCE"):
        open_source(text, MountOptions())


@pytest.mark.parametrize(
    "url",
    [
        "https://host/a.vmdk",
        "ssh+git://host",
    ],
)
def test_a_url_is_refused_with_what_can_be_named(url: str) -> None:
    with pytest.raises(UnsupportedFormat) as caught:
        open_source(url, MountOptions())
    assert caught.value.message.startswith(url)
    assert f"{url.partition(':')[0]}://" in caught.value.message
    assert "a .vmx, a .vmdk or a vddk:// URL" in caught.value.advice


@pytest.mark.parametrize("url", ["vddk://vc.example.com/DC0/vm/web01", "VDDK://vc.example.com/x"])
def test_a_vm_cannot_be_named_by_its_name_yet(url: str) -> None:
    with pytest.raises(UnsupportedFormat, match="cannot be found by name") as caught:
        open_source(url, MountOptions())
    assert "?moref=" in caught.value.advice


def test_a_url_that_cannot_be_opened_is_not_repeated_with_its_query() -> None:
    with pytest.raises(UnsupportedFormat) as caught:
        open_source("vddk://vc/DC0?thumbprint=aa&password=s3cret", MountOptions())
    assert "s3cret" not in str(caught.value)


def test_a_path_that_looks_a_little_like_a_url_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c:").mkdir()
    make_disk(tmp_path / "c:", b"web")
    monkeypatch.chdir(tmp_path)
    assert [chain.name for chain in open_source("c:/", MountOptions()).chains] == ["web"]


def test_a_missing_source_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(SourceMissing) as caught:
        open_source(str(tmp_path / "nothing.vmdk"), MountOptions())
    assert str(tmp_path / "nothing.vmdk") in str(caught.value)
    with pytest.raises(SourceMissing, match="no VMDK in"):
        open_source(str(tmp_path), MountOptions())


# Which bases are written.


def make_child(folder: Path, name: str, parent: bytes) -> None:
    """Make a link on *parent*, a disk that ``make_disk`` made."""
    hint = os.path.basename(os.fsdecode(parent))
    text = make_disk(folder, name.encode(), "abcdef01", f'parentFileNameHint="{hint}"')
    path = Path(os.fsdecode(text))
    path.write_text(path.read_text().replace("parentCID=ffffffff", "parentCID=12345678"))


def configs(source: Source) -> list[tuple[bool, bool]]:
    """Return what each worker is told: to write, and to keep the content id."""
    found = [worker.config for worker in source.workers if isinstance(worker.config, VmdkConfig)]
    return [(config.writable, config.keep_content_id) for config in found]


def test_a_base_alone_is_written_where_that_is_asked_for(tmp_path: Path) -> None:
    make_disk(tmp_path, b"web")
    source = open_source(str(tmp_path), MountOptions())
    assert not source.chains[0].writable
    assert configs(source) == [(False, False)]
    source = open_source(str(tmp_path), MountOptions(writable=True))
    assert source.chains[0].writable
    assert configs(source) == [(True, False)]


def test_a_base_below_others_is_written_for_a_restore_only(tmp_path: Path) -> None:
    make_child(tmp_path, "web-000001", make_disk(tmp_path, b"web"))
    source = open_source(str(tmp_path), MountOptions(writable=True))
    [chain] = source.chains
    assert not chain.writable
    assert "links lie above it (1 of them)" in chain.unwritable
    assert "restore=yes" in chain.unwritable
    assert configs(source) == [(False, False)]
    source = open_source(str(tmp_path), MountOptions(writable=True, restore="yes"))
    assert source.chains[0].writable
    assert configs(source) == [(True, True)]


@pytest.mark.parametrize("named", ["web.vmdk", "other.vmdk"])
def test_a_base_below_links_that_are_not_mounted_is_written_for_a_restore_only(
    named: str, tmp_path: Path
) -> None:
    """The base was named alone, perhaps by another name: its snapshots would be lost all the same.

    One that was made on another content of it is lost already.
    """
    vms = tmp_path / "vms"
    vms.mkdir()
    base = make_disk(vms, b"web")
    make_child(vms, "web-000001", base)
    source = vms / named
    if named == "other.vmdk":
        source = tmp_path / named
        source.symlink_to(os.fsdecode(base))
        (tmp_path / "web-flat.vmdk").symlink_to(vms / "web-flat.vmdk")
    wanted = MountOptions(writable=True, follow_parents="any")
    [chain] = open_source(str(source), wanted).chains
    assert not chain.writable
    assert "web-000001.vmdk, not mounted, lies above it" in chain.unwritable
    assert "restore=yes" in chain.unwritable
    wanted.restore = "yes"
    assert open_source(str(source), wanted).chains[0].writable
    wanted.restore = "no"
    child = vms / "web-000001.vmdk"
    child.write_text(child.read_text().replace("parentCID=12345678", "parentCID=12345679"))
    assert open_source(str(source), wanted).chains[0].writable


def test_two_descriptors_of_one_file_are_written_by_neither(tmp_path: Path) -> None:
    base = Path(os.fsdecode(make_disk(tmp_path, b"web")))
    (tmp_path / "copy.vmdk").write_bytes(base.read_bytes())
    make_disk(tmp_path, b"other")
    found = open_source(str(tmp_path), MountOptions(writable=True)).chains
    assert {chain.name: chain.writable for chain in found} == {
        "copy": False,
        "other": True,
        "web": False,
    }
    assert sum("another disk" in chain.unwritable for chain in found) == 2


def test_a_base_of_two_disks_is_written_by_neither(tmp_path: Path) -> None:
    """Two files would show the same writable bytes."""
    base = make_disk(tmp_path, b"web")
    for name in ("web-000001", "web-000002"):
        make_child(tmp_path, name, base)
    source = open_source(str(tmp_path), MountOptions(writable=True, restore="yes"))
    assert len(source.chains) == 2
    assert all("another disk" in chain.unwritable for chain in source.chains)
    assert configs(source) == [(False, False)] * 2


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('createType="monolithicFlat"', 'createType="vmfsSparse"', "disks of type vmfsSparse"),
        ("RW 1 FLAT", "RDONLY 1 FLAT", "RDONLY of an extent"),
    ],
)
def test_a_format_that_is_only_read_stays_readable(
    old: str, new: str, says: str, tmp_path: Path
) -> None:
    path = Path(os.fsdecode(make_disk(tmp_path, b"web")))
    path.write_text(path.read_text().replace(old, new))
    source = open_source(str(tmp_path), MountOptions(writable=True))
    assert says in source.chains[0].unwritable
    assert configs(source) == [(False, False)]


def test_files_that_this_user_may_not_write_stay_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_disk(tmp_path, b"web")
    monkeypatch.setattr("os.access", lambda path, mode, **_: "-flat" not in str(path))
    source = open_source(str(tmp_path), MountOptions(writable=True))
    assert "web-flat.vmdk: it may not be written" in source.chains[0].unwritable


def test_an_archive_is_only_read(tmp_path: Path) -> None:
    make_disk(tmp_path, b"web")
    with tarfile.open(tmp_path / "web.ova", "w") as archive:
        for name in ("web.vmdk", "web-flat.vmdk"):
            archive.add(tmp_path / name, name)
    source = open_source(str(tmp_path / "web.ova"), MountOptions(writable=True))
    assert "in an archive" in source.chains[0].unwritable
    assert configs(source) == [(False, False)]
