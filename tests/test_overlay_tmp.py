"""The private folders of ``overlay=tmp``: which of them are removed."""

import os
from pathlib import Path

import pytest

from vddkfs import overlays
from vddkfs.disks.overlay import Overlay, SourceDisk


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "tmp"
    found.mkdir()
    monkeypatch.setenv("TMPDIR", str(found))
    return found


def make_overlay(folder: Path) -> Path:
    """Make an overlay, as a daemon that was killed leaves it."""
    Overlay.open(str(folder), [SourceDisk("web", 4096, ())]).close()
    return folder


def left(tmp: Path) -> Path:
    """Make what a daemon that was killed has left."""
    return make_overlay(Path(overlays._private_folder()))


def test_what_a_killed_daemon_left_is_removed(tmp: Path) -> None:
    folder = left(tmp)
    assert folder.parent == tmp
    overlays._remove_left()
    assert not folder.exists()


def test_what_is_in_use_stays(tmp: Path) -> None:
    folder = Path(overlays._private_folder())
    overlay = Overlay.open(str(folder), [SourceDisk("web", 4096, ())])
    try:
        overlays._remove_left()
        assert (folder / "overlay.json").exists()
    finally:
        overlay.close()


@pytest.mark.parametrize("name", ["vddkfs-overlay-web01", "web01"])
def test_an_overlay_that_the_operator_has_named_stays(tmp: Path, name: str) -> None:
    folder = make_overlay(tmp / name)
    overlays._remove_left()
    assert (folder / "overlay.json").exists()


def test_a_link_to_another_overlay_leads_to_no_loss(tmp: Path, tmp_path: Path) -> None:
    """Anybody can make one in /var/tmp."""
    folder = make_overlay(tmp_path / "kept")
    named = left(tmp).name
    (tmp / f"{named}-2").symlink_to(folder)
    overlays._remove_left()
    assert (folder / "overlay.json").exists()


def test_folders_of_others_stay_also_where_they_have_no_name(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = left(tmp)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 54321)
    overlays._remove_left()
    assert folder.exists()
