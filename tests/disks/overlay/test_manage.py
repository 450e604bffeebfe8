"""What is shown, exported and discarded of an overlay, also while a mount has it."""

import json
import os
from pathlib import Path

import pytest

from tests.disks.overlay.test_folder import CAPACITY, below, made, map_of, opened, spoil
from vddkfs.disks.overlay import BLOCK, Extent, manage
from vddkfs.errors import OverlayError


def test_show(tmp_path: Path) -> None:
    made(tmp_path / "o")
    overlay = opened(tmp_path / "o")
    fork = overlay.fork("a/1", BLOCK + 512)
    fork.write(BLOCK, bytes(512), below)
    overlay.close()
    found = manage.show(str(tmp_path / "o"))
    assert [disk.name for disk in found.source] == ["a"]
    assert not found.in_use
    one, two = found.forks
    assert (one.name, one.capacity, one.changed_bytes) == ("a/0", CAPACITY, 3 * BLOCK)
    assert (one.zero_bytes, one.clean, one.problem) == (0, True, "")
    assert one.created <= one.written
    assert one.stored_bytes >= 3 * BLOCK
    assert (two.name, two.changed_bytes, two.zero_bytes) == ("a/1", 512, BLOCK)


def test_show_while_it_is_mounted(tmp_path: Path) -> None:
    made(tmp_path / "o")
    overlay = opened(tmp_path / "o")
    fork = overlay.fork("a/0", CAPACITY)
    for number in range(60):
        fork.write(number * BLOCK, b"y" * BLOCK, below)
        fork.flush()
        found = manage.show(str(tmp_path / "o"))
        assert found.in_use
        assert found.forks[0].changed_bytes == max(3, number + 1) * BLOCK
    assert not found.forks[0].clean
    overlay.close()
    assert manage.show(str(tmp_path / "o")).forks[0].clean


def test_show_a_damaged_one(tmp_path: Path) -> None:
    made(tmp_path / "o")
    spoil(map_of(tmp_path), 0)
    (fork,) = manage.show(str(tmp_path / "o")).forks
    assert "map: damaged at byte 0" in fork.problem
    assert fork.changed_bytes == 0


def test_export(tmp_path: Path) -> None:
    overlay = opened(tmp_path / "o")
    fork = overlay.fork("a/0", CAPACITY)
    fork.write(5 * BLOCK + 10, b"x" * BLOCK, below)
    fork.zero(7 * BLOCK, 2 * BLOCK, below)
    assert list(fork.extents()) == list(EXTENTS)
    overlay.close()
    folder = str(tmp_path / "o")
    assert tuple(manage.extents(folder, "a/0")) == EXTENTS
    assert json.loads("".join(manage.as_json(folder, "a/0"))) == {
        "image": "a/0",
        "capacity": CAPACITY,
        "block": BLOCK,
        "changed_bytes": 4 * BLOCK,
        "extents": [
            {"start": 5 * BLOCK, "length": 2 * BLOCK, "zero": False},
            {"start": 7 * BLOCK, "length": 2 * BLOCK, "zero": True},
        ],
    }


EXTENTS = (Extent(5 * BLOCK, 2 * BLOCK, False), Extent(7 * BLOCK, 2 * BLOCK, True))


def test_an_image_that_nobody_wrote(tmp_path: Path) -> None:
    made(tmp_path / "o")
    for ask in (manage.as_json, manage.extents, manage.discard):
        with pytest.raises(OverlayError, match="nothing was written to an image b/0") as caught:
            ask(str(tmp_path / "o"), "b/0")
        assert "a/0" in caught.value.advice


def test_discard_a_fork(tmp_path: Path) -> None:
    made(tmp_path / "o")
    overlay = opened(tmp_path / "o")
    overlay.fork("a/1", CAPACITY).write(0, b"z", below)
    overlay.close()
    spoil(map_of(tmp_path), 0)
    manage.discard(str(tmp_path / "o"), "a/0")
    assert [fork.name for fork in manage.show(str(tmp_path / "o")).forks] == ["a/1"]
    overlay = opened(tmp_path / "o")
    assert overlay.find("a/0", CAPACITY) is None
    assert overlay.fork("a/0", CAPACITY).changed_bytes == 0
    assert overlay.fork("a/1", CAPACITY).changed_bytes == BLOCK
    overlay.close()


def test_discard_all(tmp_path: Path) -> None:
    made(tmp_path / "o")
    manage.discard(str(tmp_path / "o"))
    assert os.listdir(tmp_path / "o") == ["lock"], "somebody may wait for it"
    made(tmp_path / "o")


def test_discard_what_is_mounted(tmp_path: Path) -> None:
    made(tmp_path / "o")
    overlay = opened(tmp_path / "o")
    for name in (None, "a/0"):
        with pytest.raises(OverlayError, match="another mount is using it"):
            manage.discard(str(tmp_path / "o"), name)
    overlay.close()
    assert manage.show(str(tmp_path / "o")).forks[0].changed_bytes == 3 * BLOCK


def test_no_overlay(tmp_path: Path) -> None:
    with pytest.raises(OverlayError, match=r"overlay\.json is not there"):
        manage.show(str(tmp_path))
    with pytest.raises(OverlayError, match=r"overlay\.json is not there"):
        manage.discard(str(tmp_path))
    (tmp_path / "precious").write_text("x")
    for ask in (manage.show, manage.discard):
        with pytest.raises(OverlayError, match="not an overlay: it has precious in it"):
            ask(str(tmp_path))
    with pytest.raises(OverlayError, match="not a folder"):
        manage.show(str(tmp_path / "missing"))
    assert os.listdir(tmp_path) == ["precious"]
