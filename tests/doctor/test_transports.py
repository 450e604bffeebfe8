"""What each transport needs of the machine: each finding both ways."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from vddkfs.doctor import transports
from vddkfs.doctor.rows import Row
from vddkfs.doctor.transports import Library, Seen, judge
from vddkfs.options import MountOptions

GOOD = Seen(
    root=True,
    scsi_disks=True,
    disks=("/dev/sda", "/dev/sdb"),
    unreadable=(),
    product="VMware, Inc. VMware Virtual Platform",
    controllers=frozenset({"ahci", "vmw_pvscsi"}),
    mtab=True,
)
KIT = Library(present=True, plugin=True)


def judged(
    *asked: str, library: Library = KIT, **changes: Any
) -> tuple[dict[str, Row], Row | None]:
    seen = msgspec.structs.replace(GOOD, **changes)
    rows = judge(seen, library, MountOptions(transports=asked))
    assert all(row.remedy or row.level == "ok" for row in rows)
    by_name = {row.what.removeprefix("transport "): row for row in rows}
    return by_name, by_name.get("transports")


def test_a_good_proxy_can_use_all() -> None:
    rows, summary = judged()
    assert {row.level for row in rows.values()} == {"ok"}
    assert summary is not None
    assert "nbdssl, nbd" in summary.finding


@pytest.mark.parametrize(
    ("name", "finding", "library", "changes"),
    [
        ("san", "scsi_disk", KIT, {"scsi_disks": False}),
        ("san", "no SCSI disk", KIT, {"disks": ()}),
        ("san", "cannot be read: /dev/sda", KIT, {"unreadable": GOOD.disks}),
        ("san", "needs root", KIT, {"root": False}),
        ("san", "no lib64/libdiskLibPlugin.so", Library(True), {}),
        ("san", "needs libexpat.so.1", Library(True, True, ("libexpat.so.1",)), {}),
        ("hotadd", "no lib64/libdiskLibPlugin.so", Library(True), {}),
        ("hotadd", "needs libexpat.so.1", Library(True, True, ("libexpat.so.1",)), {}),
        ("hotadd", "needs root", KIT, {"root": False}),
        ("hotadd", "no VMware virtual machine (QEMU)", KIT, {"product": "QEMU"}),
        ("hotadd", "no SCSI controller", KIT, {"controllers": frozenset({"ahci"})}),
    ],
)
def test_what_is_in_the_way(
    name: str, finding: str, library: Library, changes: dict[str, Any]
) -> None:
    rows, summary = judged(library=library, **changes)
    assert rows[name].level == "warning"
    assert finding in rows[name].finding
    assert {rows[other].level for other in ("file", "nbd", "nbdssl")} == {"ok"}
    assert summary is not None
    assert summary.level == "ok"


def test_one_disk_that_can_be_read_is_enough() -> None:
    assert judged(unreadable=("/dev/sda",))[0]["san"].level == "ok"


def test_it_fails_only_if_none_of_those_asked_for_can_work() -> None:
    _, summary = judged("san", "hotadd", scsi_disks=False, product="QEMU")
    assert summary is not None
    assert summary.level == "failure"
    _, summary = judged("san", "hotadd", "nbdssl", scsi_disks=False, product="QEMU")
    assert summary is not None
    assert (summary.level, summary.finding) == ("ok", "in use, in this order: nbdssl")
    _, summary = judged("san", "hotadd", scsi_disks=False)
    assert summary is not None
    assert summary.finding.endswith(": hotadd")
    assert judged("file", scsi_disks=False)[1] is None


def test_mtab_and_an_absent_library() -> None:
    assert judged(mtab=False)[0]["/etc/mtab"].level == "warning"
    assert "/etc/mtab" not in judged()[0]
    rows, _ = judged(library=Library(False))
    assert "once VDDK is installed" in rows["nbdssl"].finding
    assert rows["san"].level == "ok"


def test_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("sys_vendor", "VMware, Inc.\n"), ("product_name", "VMware7,1\n")):
        (tmp_path / "dmi").mkdir(exist_ok=True)
        (tmp_path / "dmi" / name).write_text(text)
    host = tmp_path / "hosts" / "host0"
    host.mkdir(parents=True)
    (host / "proc_name").write_text("vmw_pvscsi\n")
    (tmp_path / "disks" / "0:0:0:0" / "device" / "block" / "sdx").mkdir(parents=True)
    monkeypatch.setattr(transports, "_DMI", tmp_path / "dmi")
    monkeypatch.setattr(transports, "_SCSI_HOSTS", str(tmp_path / "hosts"))
    monkeypatch.setattr(transports, "SCSI_DISKS", str(tmp_path / "disks"))
    monkeypatch.setattr(transports, "_MTAB", str(tmp_path / "none"))
    seen = transports.look()
    assert seen.product == "VMware, Inc. VMware7,1"
    assert seen.controllers == {"vmw_pvscsi"}
    assert seen.scsi_disks
    assert seen.disks == seen.unreadable == ("/dev/sdx",)
    assert not seen.mtab
    monkeypatch.setattr(transports, "SCSI_DISKS", str(tmp_path / "none"))
    monkeypatch.setattr(transports, "_DMI", tmp_path / "none")
    seen = transports.look()
    assert (seen.scsi_disks, seen.disks, seen.product) == (False, (), "")
