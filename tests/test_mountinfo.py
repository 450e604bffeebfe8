"""The table of mounts: which mount a path leads into, without touching what is below it."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from vddkfs import mountinfo
from vddkfs.mountinfo import FILE_SYSTEM, Entry, Table, entries

ROOT = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"


def escaped(text: str) -> str:
    for letter in "\\ \t\n#":
        text = text.replace(letter, f"\\{ord(letter):03o}")
    return text


def line(
    number: int,
    parent: int,
    place: str,
    kind: str = FILE_SYSTEM,
    root: str = "/",
    device: str = "",
    source: str = "/vms/web",
) -> str:
    """Return a line as the kernel writes it."""
    words = (escaped(root), escaped(place), "rw,noatime shared:1 master:2 -", escaped(kind))
    return f"{number} {parent} {device or f'0:{number}'} {' '.join(words)} {escaped(source)} rw\n"


def table(*lines: str) -> Table:
    return Table(entries(os.fsencode(ROOT + "".join(lines))))


def located(found: Table, path: str, start: str = "/") -> tuple[str, str] | None:
    """Return where the mount is that a path leads into, and the name in there."""
    one = found.locate(path, start)
    return (one[0].place, one[1]) if one else None


@pytest.fixture
def untouchable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have every look at a symbolic link noted; a path with HUNG in it must not be looked at."""
    seen: list[str] = []
    real = os.readlink

    def readlink(path: Any, **keys: Any) -> str:
        assert "HUNG" not in str(path), path
        seen.append(str(path))
        return real(path, **keys)

    monkeypatch.setattr(mountinfo.os, "readlink", readlink)
    return seen


@pytest.mark.parametrize(
    "name",
    ["a b", "tab\there", "new\nline", "back\\slash", "\\040", "\\134040", "#", "\udce9", "ü"],
)
def test_a_line_is_read_whatever_the_names_in_it_are(name: str) -> None:
    [_, found] = table(line(7, 1, f"/mnt/{name}", root=f"/{name}", source=f"/vms/{name}")).entries
    place = f"/mnt/{name}"
    assert found == Entry(7, 1, "0:7", f"/{name}", place, FILE_SYSTEM, f"/vms/{name}")


def test_the_table_of_this_process_is_read_by_itself() -> None:
    assert any(entry.place == "/" for entry in entries())
    found = Table(entries()).at("/proc/self/status")
    assert found is not None
    assert found.kind == "proc"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("HUNG", ""),
        ("HUNG/", ""),
        (".//HUNG///web/disk.raw//", "web/disk.raw"),
        ("HUNG/web/./chain/../disk.raw", "web/disk.raw"),
        ("HUNG/web/chain/../..", ""),
        ("HUNG/../HUNG/a b/\udce9.raw", "a b/\udce9.raw"),
        ("HUNG/web/../../folder/../HUNG/web", "web"),
        ("link/web/disk.raw", "web/disk.raw"),
        ("folder/relative/web", "web"),
        ("inside", "web/disk.raw"),
        ("inside/../map.json", "web/map.json"),
    ],
)
def test_a_path_is_followed_without_a_look_into_the_mount(
    path: str, name: str, tmp_path: Path, untouchable: list[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "HUNG")
    (tmp_path / "folder/relative").symlink_to("../folder/../HUNG/.")
    (tmp_path / "inside").symlink_to("HUNG/web/disk.raw")
    found = table(line(8, 1, f"{tmp_path}/HUNG"))
    assert located(found, path, str(tmp_path)) == (f"{tmp_path}/HUNG", name)
    assert located(found, f"{tmp_path}/{path}") == (f"{tmp_path}/HUNG", name)


@pytest.mark.parametrize("path", ["/", ".", "folder", "file", "HUNG/..", "HUNG/web/../../file"])
def test_a_path_elsewhere_is_in_no_mount(path: str, tmp_path: Path, untouchable: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    found = table(line(8, 1, f"{tmp_path}/HUNG"), line(9, 1, f"{tmp_path}/folder", "xfs"))
    assert located(found, path, str(tmp_path)) is None


def test_a_path_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    codes = {"none/web": errno.ENOENT, "loop/x": errno.ELOOP, "file/x": errno.ENOTDIR}
    for path, code in codes.items():
        with pytest.raises(OSError) as caught:  # noqa: PT011 (the errno is what matters)
            table().locate(path, str(tmp_path))
        assert caught.value.errno == code


def test_a_relative_path_from_inside_a_mount(tmp_path: Path, untouchable: list[str]) -> None:
    found = table(line(8, 1, f"{tmp_path}/HUNG"))
    start = f"{tmp_path}/HUNG/web/chain"
    assert located(found, "0.raw", start) == (f"{tmp_path}/HUNG", "web/chain/0.raw")
    assert located(found, "../..", start) == (f"{tmp_path}/HUNG", "")
    assert located(found, "../../..", start) is None


def test_a_part_of_a_mount_that_is_shown_elsewhere_has_the_names_of_the_whole(
    tmp_path: Path,
) -> None:
    found = table(
        line(8, 1, f"{tmp_path}/web", device="0:50"),
        line(9, 1, f"{tmp_path}/bound", device="0:50", root="/disk/chain"),
    )
    one = found.locate(f"{tmp_path}/bound/0.raw")
    assert one is not None
    assert (one[0].device, one[1]) == ("0:50", "disk/chain/0.raw")
    assert located(found, f"{tmp_path}/bound") == (f"{tmp_path}/bound", "disk/chain")


def test_mounts_inside_and_on_top_of_each_other(tmp_path: Path, untouchable: list[str]) -> None:
    place = f"{tmp_path}/HUNG"
    found = table(
        line(8, 1, place, "ext4"),
        line(9, 8, place),
        line(10, 9, f"{place}/web/chain", "tmpfs"),
        line(11, 10, f"{place}/web/chain/again"),
        line(12, 1, f"{tmp_path}/HUNGRY", "ext4"),
    )
    assert located(found, f"{place}/web/disk.raw") == (place, "web/disk.raw")
    assert found.locate(f"{place}/web/chain/0.raw") is None, "what is mounted over it is not ours"
    nested = f"{place}/web/chain/again"
    assert located(found, f"{nested}/x/disk.raw") == (nested, "x/disk.raw")
    covered = Table([*found.entries, *table(line(13, 9, place, "xfs")).entries[1:]])
    assert covered.locate(f"{place}/web/disk.raw") is None, "another one covers it"
    hidden = Table([*found.entries, *table(line(14, 1, str(tmp_path), "xfs")).entries[1:]])
    assert hidden.at(place) == hidden.entries[-1], "what is below a later mount is not to be seen"


def test_a_table_without_a_root_is_read_too() -> None:
    """In a changed root that is no mount point."""
    found = Table(entries(os.fsencode(line(8, 3, "/web"))))
    assert located(found, "/web/disk.raw") == ("/web", "disk.raw")
    assert found.at("/etc") is None
