"""SOURCE, as far as it is known without a login."""

import os
from pathlib import Path

import pytest

from tests.test_source import make_disk
from vddkfs.doctor import sources
from vddkfs.errors import UnsupportedFormat, UsageError, VddkfsError
from vddkfs.options import MountOptions

DISK = "&disk=[ds] a/a.vmdk"


def test_a_local_source_is_opened(tmp_path: Path) -> None:
    make_disk(tmp_path, b"web")
    (tmp_path / "bad.vmdk").write_text("no")
    assert sources.remote_of(str(tmp_path)) is None
    rows = sources.check_local(str(tmp_path), MountOptions())
    assert [row.level for row in rows] == ["ok", "warning"]
    assert "web" in rows[0].finding
    assert "bad.vmdk" in rows[1].finding
    assert rows[1].remedy
    with pytest.raises(VddkfsError):
        sources.check_local(str(tmp_path / "none"), MountOptions())


def test_a_remote_source_is_read_only_as_text() -> None:
    good = sources.remote_of(f"vddk://vc/?moref=vm-1{DISK}@snapshot-1")
    assert good is not None
    assert sources.check_remote(good)[0].level == "ok"
    partly = sources.remote_of(f"vddk://vc/?moref=vm-1{DISK}&disk=[ds] a/a-000001.vmdk@snapshot-1")
    assert partly is not None
    [row] = sources.check_remote(partly)
    assert row.level == "warning"
    assert "2 links, 1" in row.finding


@pytest.mark.parametrize("text", ["vddk://vc.example.com:44", "vddk://vc.example.com:44/"])
def test_a_server_alone_is_enough(text: str) -> None:
    found = sources.remote_of(text)
    assert found is not None
    assert (found.server, found.port, found.links) == ("vc.example.com", 44, ())
    assert "no disk" in sources.check_remote(found)[0].finding


def test_of_a_bad_source_the_server_is_known() -> None:
    text = "vddk://vc/?moref=vm-1"
    with pytest.raises(UsageError):
        sources.remote_of(text)
    found = sources.server_of(text)
    assert found is not None
    assert found.server == "vc"
    for bad in ("vddk:///x.vmdk", "vddk://u:S3cr3t-probe@vc/", "vddk://", "/vms/web"):
        assert sources.server_of(bad) is None
    for bad in ("vddk://u:S3cr3t-probe@vc/", "https://u:S3cr3t-probe@vc/", "vddk://"):
        with pytest.raises((UsageError, UnsupportedFormat)) as caught:
            sources.remote_of(bad)
        assert "S3cr3t" not in str(caught.value)


def test_a_file_for_vddk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.fsdecode(make_disk(tmp_path, b"web"))
    found = sources.remote_of(f"vddk://{path}")
    assert found is not None
    assert sources.check_remote(found)[0].level == "ok"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "may not be read" in sources.check_remote(found)[0].finding
    Path(path).unlink()
    assert "does not exist" in sources.check_remote(found)[0].finding
