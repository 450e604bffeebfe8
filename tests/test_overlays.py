"""The overlay of a mount: attached before it is there, and private folders that do not stay."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.disks.layered import SOURCE
from vddkfs.disks.overlay import Overlay
from vddkfs.engines.base import LinkIdentity
from vddkfs.errors import OverlayError
from vddkfs.overlays import TMP, overlay_of

CAPACITY = 64 * 4096


def make_disk(name: str = "web", live: int = -1) -> Any:
    identity = LinkIdentity(f"/vm/{name}.vmdk", "12345678", CAPACITY // 512)
    link = SimpleNamespace(identity=identity, extents=(), path=identity.path)
    images = [
        SimpleNamespace(name=f"{name}/chain/{number}.raw", capacity=CAPACITY, layer=None)
        for number in range(2)
    ]
    return SimpleNamespace(
        name=name, capacity=CAPACITY, links=(link,) * 2, live=live, images=images
    )


def is_folder(path: str | Path) -> bool:
    return Path(path).is_dir()


def mode(path: str | Path) -> int:
    return Path(path).stat().st_mode & 0o777


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private folders are made."""
    found = tmp_path / "tmp"
    found.mkdir()
    monkeypatch.setenv("TMPDIR", str(found))
    return found


def below(_offset: int, size: int) -> bytes:
    return bytes(size)


async def write(disk: Any, number: int, data: bytes) -> None:
    async def source(start: int, end: int) -> bytes:
        return bytes(end - start)

    await disk.images[number].layer.write(0, data, source)


async def test_each_image_gets_a_layer_of_its_own_and_finds_it_again(tmp_path: Path) -> None:
    folder = str(tmp_path / "over")
    for turn in (1, 2):
        disks = make_disk("web"), make_disk("db")
        async with overlay_of(disks, folder, False, False) as shown:
            assert shown == folder
            layers = [image.layer for disk in disks for image in disk.images]
            assert len(set(layers)) == 4
            assert [layer.changed_bytes for layer in layers] == [0, 4096 * (turn - 1), 0, 0]
            await write(disks[0], 1, b"x" * 4096)
    assert is_folder(folder)


async def test_what_was_written_is_flushed_at_the_end_whatever_ends_it(tmp_path: Path) -> None:
    folder, disk = str(tmp_path / "over"), make_disk()

    async def fails() -> None:
        async with overlay_of([disk], folder, False, False):
            await write(disk, 0, b"x" * 4096)
            raise KeyError

    with pytest.raises(KeyError):
        await fails()
    async with overlay_of([disk], folder, False, False):
        assert disk.images[0].layer.changed_bytes == 4096


async def test_a_disk_that_is_written_meanwhile_needs_force(tmp_path: Path) -> None:
    folder = str(tmp_path / "over")
    with pytest.raises(OverlayError):
        await overlay_of([make_disk(live=1)], folder, False, True).__aenter__()
    async with overlay_of([make_disk(live=1)], folder, True, True):
        pass
    async with overlay_of([make_disk(live=1)], folder, True, False):
        pass


async def test_a_private_folder_is_gone_after_the_mount(place: Path) -> None:
    disk = make_disk()
    async with overlay_of([disk], TMP, False, False) as folder:
        assert Path(folder).parent == place
        assert mode(folder) == 0o700
        await write(disk, 0, b"x" * 4096)
    assert left(place) == []
    with pytest.raises(OverlayError):
        await overlay_of([make_disk(live=1)], TMP, False, True).__aenter__()
    assert left(place) == [], "nor is one of a mount that never was"


def left_by_a_daemon(place: Path, name: str) -> Path:
    """Make a private folder as a daemon that was killed leaves it."""
    folder = place / name
    overlay = Overlay.open(str(folder), SOURCE)
    overlay.fork("d/chain/0.raw", SOURCE[0].capacity).write(0, b"x" * 4096, below)
    overlay.close()
    return folder


async def test_the_private_folder_of_a_killed_daemon_is_removed_and_no_other(place: Path) -> None:
    left_by_a_daemon(place, ".vddkfs-private-overlay-dead")
    left_by_a_daemon(place, "somebody-elses")
    (place / ".vddkfs-private-overlay-file").write_text("no overlay")
    (place / ".vddkfs-private-overlay-empty").mkdir()
    alive = make_disk("db")
    private = overlay_of([make_disk()], TMP, False, False)
    async with overlay_of([alive], TMP, False, False) as theirs, private:
        assert is_folder(theirs), "it is in use"
        await write(alive, 0, b"x" * 4096)
        found = left(place)
    assert set(found) >= {"somebody-elses", ".vddkfs-private-overlay-file", Path(theirs).name}
    assert ".vddkfs-private-overlay-dead" not in found


async def test_a_user_without_a_name_has_private_folders_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container the daemon's user may be in no list of users."""
    left_by_a_daemon(place, ".vddkfs-private-overlay-dead")

    def nameless(_path: Path) -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(Path, "owner", nameless)
    async with overlay_of([make_disk()], TMP, False, False):
        assert ".vddkfs-private-overlay-dead" not in left(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders to others")
async def test_private_folders_of_other_users_are_theirs(place: Path) -> None:
    folder = left_by_a_daemon(place, ".vddkfs-private-overlay-dead")
    os.chown(folder, 4711, 4711)
    async with overlay_of([make_disk()], TMP, False, False):
        assert is_folder(folder)


async def test_what_a_link_leads_to_is_not_a_private_folder(place: Path, tmp_path: Path) -> None:
    """Anybody can make a link in a folder such as /var/tmp, to an overlay that is to be kept."""
    kept = left_by_a_daemon(tmp_path, "kept")
    before = left(kept)
    (place / ".vddkfs-private-overlay-link").symlink_to(kept)
    async with overlay_of([make_disk()], TMP, False, False):
        assert left(kept) == before
