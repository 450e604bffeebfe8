"""Whose folder it is: two openers, other sources, other folders, and damage."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from vddkfs.disks.overlay import BLOCK, Limits, Overlay, SourceDisk
from vddkfs.disks.overlay.files import Files
from vddkfs.disks.overlay.records import PAGE
from vddkfs.disks.overlay.source import OverlayFile, write_document
from vddkfs.engines.base import FileStamp, LinkIdentity
from vddkfs.errors import OverlayError

LIMITS = Limits(reserve=0, grow=64, spare=8, log_room=4 * BLOCK)
CAPACITY = 100 * BLOCK
STAMP = FileStamp("/vm/a.vmdk", 1, 2, 3, 4, 5)
LINK = LinkIdentity("/vm/a.vmdk", "12345678", 800, (STAMP,))
DISK = SourceDisk("a", CAPACITY, (LINK,))


def below(offset: int, size: int) -> bytes:
    return bytes(size)


def opened(folder: Path, *disks: SourceDisk, force: bool = False) -> Overlay:
    return Overlay.open(str(folder), disks or (DISK,), force, limits=LIMITS)


def made(folder: Path) -> None:
    overlay = opened(folder)
    overlay.fork("a/0", CAPACITY).write(0, b"x" * 3 * BLOCK, below)
    overlay.close()


def content(overlay: Overlay) -> bytes:
    found = bytearray(CAPACITY)
    overlay.fork("a/0", CAPACITY).read_into(0, memoryview(found))
    return bytes(found)


def test_it_goes_on(tmp_path: Path) -> None:
    made(tmp_path / "o")
    overlay = opened(tmp_path / "o")
    assert content(overlay) == b"x" * 3 * BLOCK + bytes(97 * BLOCK)
    assert overlay.find("a/1", CAPACITY) is None
    other = overlay.fork("a/1", 5 * BLOCK)
    other.write(0, b"y", below)
    assert overlay.find("a/1", 5 * BLOCK) is other
    assert content(overlay)[:1] == b"x", "each image is its own fork"
    overlay.close()


def test_only_its_owner_may_look(tmp_path: Path) -> None:
    made(tmp_path / "o")
    for path in [tmp_path / "o", *(tmp_path / "o").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0


def test_two_openers(tmp_path: Path) -> None:
    first = opened(tmp_path / "o")
    with pytest.raises(OverlayError, match="another mount is using it"):
        opened(tmp_path / "o")
    first.close()
    opened(tmp_path / "o").close()


def test_odd_names(tmp_path: Path) -> None:
    name = os.fsdecode(b"d\xe9sk \n")
    disk = SourceDisk(name, CAPACITY, (msgspec.structs.replace(LINK, path=f"/vm/{name}"),))
    for _ in range(2):
        overlay = opened(tmp_path / "o", disk)
        overlay.fork(f"{name}/0", CAPACITY)
        overlay.close()
    with pytest.raises(OverlayError, match=r"disk d\\udce9sk \\n: it had"):
        opened(tmp_path / "o", msgspec.structs.replace(disk, capacity=1))


STAMPED = msgspec.structs.replace(LINK, files=(msgspec.structs.replace(STAMP, mtime_ns=9),))
REPLACED = msgspec.structs.replace(LINK, files=(msgspec.structs.replace(STAMP, inode=9),))
WRITTEN = msgspec.structs.replace(LINK, content_id="87654321")


@pytest.mark.parametrize(
    ("disk", "forced", "told"),
    [
        (SourceDisk("a", CAPACITY + 512, (LINK,)), False, "it had 409600 bytes and has 410112"),
        (SourceDisk("a", CAPACITY, (LINK, LINK)), False, "it had 1 links and has 2"),
        (SourceDisk("a", CAPACITY, (REPLACED,)), False, "replaced by another file"),
        (SourceDisk("a", CAPACITY, (WRITTEN,)), True, "12345678"),
        (SourceDisk("a", CAPACITY, (STAMPED,)), True, "/vm/a.vmdk"),
    ],
)
def test_another_source(tmp_path: Path, disk: SourceDisk, forced: bool, told: str) -> None:
    """What was written over other bytes is no disk. Where only stamps differ it can be forced."""
    made(tmp_path / "o")
    with pytest.raises(OverlayError, match=f"made for another source: disk a: .*{told}") as caught:
        opened(tmp_path / "o", disk)
    assert "vddkfs overlay discard" in caught.value.advice
    assert ("force it" in caught.value.advice) == forced
    if not forced:
        with pytest.raises(OverlayError, match="another source"):
            opened(tmp_path / "o", disk, force=True)
        return
    opened(tmp_path / "o", disk, force=True).close()
    opened(tmp_path / "o", disk).close()
    with pytest.raises(OverlayError, match="another source"):
        opened(tmp_path / "o")


def test_a_live_disk(tmp_path: Path) -> None:
    live = msgspec.structs.replace(DISK, live=True)
    with pytest.raises(OverlayError, match="no overlay on a: its owner may write it"):
        opened(tmp_path / "o", live)
    assert not (tmp_path / "o").exists()
    opened(tmp_path / "o", live, force=True).close()


def test_more_disks_later(tmp_path: Path) -> None:
    made(tmp_path / "o")
    other = SourceDisk("b", 512, (LINK,))
    opened(tmp_path / "o", other).close()
    opened(tmp_path / "o", DISK, other).close()
    with pytest.raises(OverlayError, match="disk b"):
        opened(tmp_path / "o", SourceDisk("b", 1024, (LINK,)))


def test_another_capacity_of_a_fork(tmp_path: Path) -> None:
    made(tmp_path / "o")
    overlay = opened(tmp_path / "o")
    with pytest.raises(OverlayError, match="a/0 had 409600 bytes when it was made, and has 512"):
        overlay.fork("a/0", 512)
    overlay.close()


# Folders that are none


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "web01.vmdk").write_text("precious")
    with pytest.raises(OverlayError, match=r"not an overlay: it has web01.vmdk in it"):
        opened(tmp_path)
    assert os.listdir(tmp_path) == ["web01.vmdk"]


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OverlayError, match="not a folder that can be read"):
        opened(tmp_path / "file")
    with pytest.raises(OverlayError, match="making it failed"):
        opened(tmp_path / "missing" / "o")


def test_another_version(tmp_path: Path) -> None:
    made(tmp_path / "o")
    mark = tmp_path / "o" / "overlay.json"
    mark.unlink()
    write_document(Files(), str(mark), OverlayFile("00", 1.0, (DISK,), version=2))
    with pytest.raises(OverlayError, match="version 2; this release knows version 1"):
        opened(tmp_path / "o")


def test_a_lost_mark(tmp_path: Path) -> None:
    made(tmp_path / "o")
    (tmp_path / "o" / "overlay.json").unlink()
    with pytest.raises(OverlayError, match=r"it has forks, but overlay\.json is not there"):
        opened(tmp_path / "o")


def test_little_space_when_it_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path / "o")
    monkeypatch.setattr(Files, "free", lambda self, path: 0)
    overlay = opened(tmp_path / "o")
    assert "only what is in the overlay can be written" in caplog.text
    overlay.fork("a/0", CAPACITY).write(0, b"y" * 3 * BLOCK, below)
    assert content(overlay)[: 3 * BLOCK] == b"y" * 3 * BLOCK
    overlay.close()


def test_a_damaged_mark(tmp_path: Path) -> None:
    made(tmp_path / "o")
    mark = tmp_path / "o" / "overlay.json"
    mark.write_text(mark.read_text().replace("12345678", "12345679"))
    with pytest.raises(OverlayError, match=r"overlay\.json: damaged: its checksum is wrong"):
        opened(tmp_path / "o")


def test_it_tells_the_source(tmp_path: Path) -> None:
    made(tmp_path / "o")
    text = (tmp_path / "o" / "overlay.json").read_text().splitlines()[0]
    assert json.loads(text)["source"][0]["links"][0]["path"] == "/vm/a.vmdk"


# Damage


def map_of(folder: Path) -> Path:
    return folder / "o" / "forks" / "0000" / "map"


def with_commits(folder: Path, commits: int, close: bool = True) -> None:
    overlay = opened(folder / "o")
    fork = overlay.fork("a/0", CAPACITY)
    for number in range(commits):
        fork.write(number * BLOCK, b"x" * BLOCK, below)
        fork.flush()
    if close:
        overlay.close()
    else:
        fork._store._close_files()
        os.close(overlay._lock_fd)


def spoil(path: Path, at: int, size: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        before = file.read(size)
        file.seek(at)
        file.write(bytes(byte ^ 0xFF for byte in before))


def test_damage_in_the_middle_is_never_cut(tmp_path: Path) -> None:
    """Wherever a byte of the map that is in use is wrong, nothing is shown."""
    with_commits(tmp_path, 4)
    path, good = map_of(tmp_path), map_of(tmp_path).read_bytes()
    # Page 1 has the mark of the fork's first closing, pages 2 to 5 have what was written.
    pages, used = range(2, 6), 80 + 16
    places = [*range(0, 80, 7)] + [PAGE * page + at for page in pages for at in range(0, used, 5)]
    for at in places:
        spoil(path, at)
        overlay = opened(tmp_path / "o")
        with pytest.raises(OverlayError, match="map: damaged at byte") as caught:
            overlay.fork("a/0", CAPACITY)
        assert f"byte {at // PAGE * PAGE}" in str(caught.value)
        assert "vddkfs overlay discard" in caught.value.advice
        overlay.close()
        path.write_bytes(good)
    content(overlay := opened(tmp_path / "o"))
    overlay.close()


def test_how_many_good_ones_follow(tmp_path: Path) -> None:
    with_commits(tmp_path, 4)
    spoil(map_of(tmp_path), 3 * PAGE + 80)
    overlay = opened(tmp_path / "o")
    with pytest.raises(OverlayError, match="12288: the checksum is wrong, and 3 good transactions"):
        overlay.fork("a/0", CAPACITY)
    overlay.close()


def test_a_torn_tail_is_cut(tmp_path: Path) -> None:
    with_commits(tmp_path, 4, close=False)
    spoil(map_of(tmp_path), 5 * PAGE + 80)
    overlay = opened(tmp_path / "o")
    assert content(overlay) == b"x" * 3 * BLOCK + bytes(97 * BLOCK)
    overlay.close()


def test_a_map_that_was_cut_short(tmp_path: Path) -> None:
    with_commits(tmp_path, 4)
    os.truncate(map_of(tmp_path), 3 * PAGE)
    overlay = opened(tmp_path / "o")
    with pytest.raises(OverlayError, match="the file ends at byte 12288"):
        overlay.fork("a/0", CAPACITY)
    overlay.close()


def test_a_segment_that_was_cut_short(tmp_path: Path) -> None:
    with_commits(tmp_path, 4)
    os.truncate(map_of(tmp_path).with_name("segment-0000"), BLOCK)
    overlay = opened(tmp_path / "o")
    with pytest.raises(OverlayError, match="used twice or beyond the end of the segments"):
        overlay.fork("a/0", CAPACITY)
    overlay.close()


def lost_segment(folder: Path) -> None:
    map_of(folder).with_name("segment-0000").unlink()


def lost_map(folder: Path) -> None:
    map_of(folder).unlink()


def foreign_map(folder: Path) -> None:
    overlay = opened(folder / "o")
    overlay.fork("a/1", CAPACITY)
    overlay.close()
    other = folder / "o" / "forks" / "0001" / "map"
    map_of(folder).write_bytes(other.read_bytes())


def noise(folder: Path) -> None:
    size = map_of(folder).stat().st_size
    map_of(folder).write_bytes(random.Random(1).randbytes(size))


@pytest.mark.parametrize("damage", [lost_segment, lost_map, foreign_map, noise])
def test_lost_and_foreign_files(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    made(tmp_path / "o")
    damage(tmp_path)
    overlay = opened(tmp_path / "o")
    with pytest.raises(OverlayError, match="0000"):
        overlay.fork("a/0", CAPACITY)
    overlay.close()


def test_the_spare_map_is_made_again(tmp_path: Path) -> None:
    made(tmp_path / "o")
    map_of(tmp_path).with_name("map.next").unlink()
    with_commits(tmp_path, 60)
    overlay = opened(tmp_path / "o")
    assert content(overlay) == b"x" * 60 * BLOCK + bytes(40 * BLOCK)
    overlay.close()
