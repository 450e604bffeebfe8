"""What a SOURCE may be, and what becomes of the parts of it that cannot be opened."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mounts, mounted, vddkfs
from tests.end_to_end.vms import (
    MIB,
    make_chain,
    make_delta,
    make_vmdk,
    make_vmfs,
    noise,
    raw_sha256,
    write,
)


def disks(mount_root: list[str]) -> list[str]:
    return sorted(set(mount_root) - {"vm.json", ".vddkfs"})


def test_one_vmdk(mount: Mounts, vm: Path) -> None:
    make_vmdk(vm / "other.vmdk", noise("other", MIB))
    path = make_vmdk(vm / "one.vmdk", noise("one", MIB))
    found = mount(path)
    assert disks(found.ask("listdir", found.path())) == ["one"]
    assert found.ask("listdir", found.path("one/chain")) == ["0.raw"]
    assert found.sha256("one/disk.raw") == raw_sha256(path)


def test_leaf_brings_its_chain(mount: Mounts, vm: Path) -> None:
    links = make_chain(vm, links=3, size=MIB)
    found = mount(links[2])
    assert sorted(found.ask("listdir", found.path("web/chain"))) == ["0.raw", "1.raw", "2.raw"]
    assert found.sha256("web/disk.raw") == raw_sha256(links[2])


def test_middle_link_mounts_that_point(mount: Mounts, vm: Path) -> None:
    links = make_chain(vm, links=3, size=MIB)
    found = mount(links[1])
    assert sorted(found.ask("listdir", found.path("web/chain"))) == ["0.raw", "1.raw"]
    assert found.sha256("web/disk.raw") == raw_sha256(links[1])
    assert found.stat("web/disk.raw").st_ino == found.stat("web/chain/1.raw").st_ino
    assert [link["file"] for link in found.json("vm.json")["disks"][0]["links"]] == [
        str(links[0]),
        str(links[1]),
    ]


def test_vmx(mount: Mounts, vm: Path) -> None:
    links = make_chain(vm, links=2, size=MIB, name="system")
    data = make_vmfs(vm / "data.vmdk", noise("data", MIB))
    make_vmdk(vm / "unused.vmdk", noise("unused", MIB))
    vmx = vm / "web01.vmx"
    vmx.write_text(
        '.encoding = "UTF-8"\n'
        'scsi0.present = "TRUE"\n'
        'scsi0:0.present = "TRUE"\n'
        f'scsi0:0.fileName = "{links[1].name}"\n'
        'scsi0:1.present = "TRUE"\n'
        'scsi0:1.fileName = "data.vmdk"\n'
        'ide1:0.present = "TRUE"\n'
        'ide1:0.deviceType = "cdrom-image"\n'
        'ide1:0.fileName = "install.iso"\n'
    )
    found = mount(vmx)
    assert disks(found.ask("listdir", found.path())) == ["data", "system"]
    assert found.sha256("system/disk.raw") == raw_sha256(links[1])
    assert found.sha256("system/chain/0.raw") == raw_sha256(links[0])
    assert found.sha256("data/disk.raw") == raw_sha256(data)


def test_folder_with_several_disks(mount: Mounts, vm: Path) -> None:
    web = make_chain(vm, links=2, size=MIB)
    wanted = {"web": web[-1]}
    for name, subformat in {"a": "twoGbMaxExtentFlat", "b b": "monolithicSparse"}.items():
        wanted[name] = make_vmdk(vm / f"{name}.vmdk", noise(name, MIB), subformat)
    (vm / "vmware.log").write_text("not a disk\n")
    found = mount(vm)
    assert disks(found.ask("listdir", found.path())) == sorted(wanted)
    for name, path in wanted.items():
        assert found.sha256(f"{name}/disk.raw") == raw_sha256(path)
    assert found.json("vm.json")["left_out"] == []


def test_two_leaves_of_one_base(mount: Mounts, vm: Path) -> None:
    make_vmdk(vm / "web.vmdk", noise("web", MIB))
    left = make_delta(vm / "left.vmdk", "web.vmdk")
    right = make_delta(vm / "right.vmdk", "web.vmdk")
    write(left, 0, noise("left", 65536))
    write(right, 0, noise("right", 65536))
    found = mount(vm)
    names = disks(found.ask("listdir", found.path()))
    assert len(names) == 2
    assert "web" in names
    assert all(name.startswith("web") for name in names)
    tops = {found.sha256(f"{name}/disk.raw") for name in names}
    assert tops == {raw_sha256(left), raw_sha256(right)}
    assert {found.sha256(f"{name}/chain/0.raw") for name in names} == {raw_sha256(vm / "web.vmdk")}
    # Each vm.json entry tells the truth about its folder.
    for disk in found.json("vm.json")["disks"]:
        leaf = Path(disk["links"][-1]["file"])
        assert found.sha256(f"{disk['name']}/disk.raw") == raw_sha256(leaf)


def make_mapped(path: Path) -> None:
    """Write a descriptor of a LUN that ESXi maps."""
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        'createType="vmfs"\nRW 2048 VMFSRDM "x-rdm.vmdk"\n'
    )


def test_what_cannot_be_opened_is_left_out(mount: Mounts, vm: Path) -> None:
    good = make_vmdk(vm / "good.vmdk", noise("good", MIB))
    make_mapped(vm / "mapped.vmdk")
    (vm / "junk.vmdk").write_bytes(noise("junk", 4096))
    make_vmdk(vm / "gone.vmdk", noise("gone", MIB))
    make_delta(vm / "orphan.vmdk", "gone.vmdk")
    (vm / "gone.vmdk").unlink()
    bad = {"junk.vmdk", "orphan.vmdk", "mapped.vmdk"}

    found = mount.prepare(vm)
    found.expect("left out: .*junk", "left out: .*gone", "left out: .*mapped.*vmfsRDM")
    done = found.start()
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("vddkfs: left out: ") for line in lines)
    assert found.sha256("good/disk.raw") == raw_sha256(good)
    assert disks(found.ask("listdir", found.path())) == ["good"]

    left_out = found.json("vm.json")["left_out"]
    assert {Path(left["path"]).name for left in left_out} == bad
    for left in left_out:
        assert f"vddkfs: left out: {left['reason']}" in lines
    info = json.loads(vddkfs("info", "--json", vm).stdout)
    assert info["left_out"] == left_out


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda vm: None, 10),
        (lambda vm: (vm / "a.vmdk").write_bytes(noise("a", 4096)), 11),
        (lambda vm: make_mapped(vm / "a.vmdk"), 12),
    ],
    ids=["empty folder", "junk", "unsupported"],
)
def test_nothing_can_be_opened(mount: Mounts, vm: Path, make, code: int) -> None:  # type: ignore[no-untyped-def]
    make(vm)
    found = mount.prepare(vm)
    done = vddkfs("mount", vm, found.place)
    assert done.returncode == code
    assert done.stderr.startswith("vddkfs: ")
    assert len(done.stderr.splitlines()) == 1
    assert not mounted(found.place)


def test_strange_names(mount: Mounts, vm: Path) -> None:
    """Names that shells, the mount table and JSON find hard to bear."""
    folder = vm / "a, b\\c 'd' \"e\" ü\n#"
    folder.mkdir()
    path = make_vmdk(vm / "plain.vmdk", noise("strange", MIB))
    path = path.rename(folder / "disk ü,\\ x.vmdk")
    found = mount.prepare(folder)
    # The name inside the file is no longer its own, and does not matter.
    found.start()
    assert found.sha256("disk ü,\\ x/disk.raw") == raw_sha256(path)
    assert found.json("vm.json")["source"] == str(folder)
