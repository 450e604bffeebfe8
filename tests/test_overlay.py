"""The command ``vddkfs overlay``: what it tells, what it exports, and what it refuses."""

import json
import os
import random
import resource
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.engines.vmdk.conftest import Maker, Qemu
from vddkfs.cli import main
from vddkfs.commands import export, overlay
from vddkfs.disks.overlay import BLOCK, Fork, Limits, Overlay, SourceDisk
from vddkfs.disks.overlay.union import Union
from vddkfs.engines.base import LinkIdentity
from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.engines.vmdk.chain import describe_chain
from vddkfs.engines.vmdk.files import Trust
from vddkfs.engines.vmdk.sparse import parse_header
from vddkfs.engines.vmdk.write import child
from vddkfs.errors import NotMounted

Output = pytest.CaptureFixture[str]

GRAIN = 65536
SIZE = 36 * (1 << 20) + 3 * 512
"""More than one grain table, and an end inside a block and a grain."""
IMAGE = "a/chain/1.raw"
LIMITS = Limits(reserve=0, grow=64, spare=8, log_room=4 * BLOCK)
needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="absent: qemu-img")


class Site:
    """A chain of two links in *vm*, an overlay on it in *folder*, and what its fork shows."""

    def __init__(self, root: Path) -> None:
        self.vm, self.folder = root / "vm", root / "overlays" / "web"
        self.vm.mkdir()
        self.folder.parent.mkdir()
        make, draw = Maker(self.vm), random.Random(5)
        grains = {n: draw.randbytes(GRAIN) for n in (0, 1, 16, 550, SIZE // GRAIN)}
        make.sparse("a.vmdk", SIZE // 512, grains)
        self.leaf = Path(
            make.sparse(
                "a-000001.vmdk",
                SIZE // 512,
                {1: draw.randbytes(GRAIN), 2: draw.randbytes(GRAIN)},
                cid="aaaabbbb",
                parent="12345678",
                hint="a.vmdk",
            )
        )
        self.links = describe_chain(str(self.leaf))
        self.expected = bytearray(self.read(str(self.leaf)))

    def read(self, leaf: str) -> bytes:
        """Return what our engine reads of the chain *leaf*."""
        links = describe_chain(leaf, Trust(outside=True))
        engine = VmdkEngine([link.path for link in links], follow_any=True)
        content = bytearray(links[-1].capacity * 512)
        engine.read(len(links) - 1, 0, links[-1].capacity, memoryview(content), False)
        engine.close()
        return bytes(content)

    def source(self, **keys: Any) -> SourceDisk:
        return SourceDisk("a", SIZE, tuple(link.identity for link in self.links), **keys)

    def opened(self, force: bool = False, **keys: Any) -> Overlay:
        return Overlay.open(str(self.folder), [self.source(**keys)], force, limits=LIMITS)

    def below(self, offset: int, size: int) -> bytes:
        return bytes(self.expected[offset : offset + size])

    def write(self, fork: Fork, offset: int, data: bytes) -> None:
        fork.write(offset, data, self.below)
        self.expected[offset : offset + len(data)] = data

    def fill(self, overlay: Overlay) -> None:
        """Write to parts of grains, over tables' ends, at the end, zeros over data."""
        fork, draw = overlay.fork(IMAGE, SIZE), random.Random(6)
        for offset, size in ((700, 10), (2 * GRAIN - 99, 200), (512 * GRAIN - 5000, 9000)):
            self.write(fork, offset, draw.randbytes(size))
        self.write(fork, 30 << 20, draw.randbytes(3 * GRAIN))
        self.write(fork, SIZE - 700, draw.randbytes(700))
        fork.zero(16 * GRAIN, GRAIN, self.below)
        self.expected[16 * GRAIN : 17 * GRAIN] = bytes(GRAIN)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    found = Site(tmp_path)
    opened = found.opened()
    found.fill(opened)
    opened.close()
    return found


def run(capsys: Output, *words: str | Path) -> tuple[int, str, str]:
    code = main(["overlay", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: Output, *words: str | Path) -> tuple[int, str]:
    """Run what must fail: one line on stderr, with advice."""
    code, out, err = run(capsys, *words)
    assert out == ""
    assert err.count("\n") == 1, err
    assert code
    return code, err


def exported(capsys: Output, site: Site, out: Path, *more: str) -> str:
    """Export to *out* by its suffix; return what is said on stderr."""
    words = ("--format", out.suffix.removeprefix("."), *more)
    code, stdout, err = run(capsys, "export", site.folder, "a/disk.raw", out, *words)
    assert (code, stdout) == (0, ""), err
    assert not Path(f"{out}.part").exists()
    return err


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# list and show


def test_list(site: Site, capsys: Output) -> None:
    for given in (site.folder, site.folder.parent):
        code, out, err = run(capsys, "list", given)
        assert (code, err) == (0, "")
        heading, line = out.splitlines()
        assert heading.split("\t")[:4] == ["overlay", "disks", "images", "changed"]
        folder, disks, images, changed, _, age, used = line.split("\t")
        assert (folder, disks, images, used) == (str(site.folder), "a", IMAGE, "no")
        assert changed.endswith("KiB")
        assert age.endswith(" s")


def test_list_as_json(site: Site, capsys: Output) -> None:
    (site.folder.parent / "else").mkdir()
    opened = site.opened()
    _, out, _ = run(capsys, "list", "--json", site.folder.parent)
    (found,) = json.loads(out)["overlays"]
    assert (found["folder"], found["in_use"], found["problem"]) == (str(site.folder), True, "")
    assert found["forks"][0]["name"] == IMAGE
    opened.close()


def test_a_damaged_one_is_in_the_list(site: Site, capsys: Output) -> None:
    mark = site.folder / "overlay.json"
    mark.write_text(mark.read_text() + "x")
    code, out, _ = run(capsys, "list", site.folder.parent)
    assert code == 0
    assert "its checksum is wrong" in out.splitlines()[1]


def test_a_damaged_fork_is_in_the_list(site: Site, capsys: Output) -> None:
    (site.folder / "forks" / "0000" / "map").write_bytes(b"x" * 9000)
    for words in (("list", site.folder), ("show", site.folder)):
        code, out, _ = run(capsys, *words)
        assert code == 0
        assert "map: damaged at byte 0" in out


def test_list_where_there_is_none(tmp_path: Path, capsys: Output) -> None:
    code, err = refused(capsys, "list", tmp_path)
    assert code == 44
    assert "there is no overlay" in err
    assert refused(capsys, "list", tmp_path / "missing")[0] == 44


def test_list_of_the_mounts(site: Site, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(place: str, command: str) -> dict[str, Any]:
        if place == "/mnt/dead":
            raise NotMounted("/mnt/dead: no answer")
        assert command == "status"
        return {"/mnt/web": {"overlay": str(site.folder)}, "/mnt/none": {"overlay": ""}}.get(
            place, {}
        )

    places = ["/mnt/web", "/mnt/none", "/mnt/old", "/mnt/dead"]
    monkeypatch.setattr(overlay, "_mountpoints", lambda table: places)
    monkeypatch.setattr(overlay, "ask", asked)
    code, out, err = run(capsys, "list")
    assert (code, err) == (0, "vddkfs: /mnt/dead: no answer\n")
    assert [line.split("\t")[6] for line in out.splitlines()] == ["in use", "/mnt/web"]


def test_a_mount_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bind mounts are the same mount; its daemon knows one of the places."""
    entries = overlay.entries(
        b"30 1 0:50 / /mnt/bind rw - fuse.vddkfs x rw\n"
        b"31 1 0:50 / /mnt/real rw - fuse.vddkfs x rw\n"
        b"32 1 0:51 / /mnt/other rw - fuse.vddkfs y rw\n"
        b"33 1 0:52 / /mnt/ext4 rw - ext4 /dev/sda rw\n"
    )
    (tmp_path / "real").touch()
    monkeypatch.setattr(overlay, "socket_path", lambda place: tmp_path / os.path.basename(place))
    assert overlay._mountpoints(entries) == ["/mnt/real", "/mnt/other"]


def test_show(site: Site, capsys: Output) -> None:
    code, out, err = run(capsys, "show", site.folder)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{site.folder}: made ")
    assert lines[0].endswith(", not in use")
    assert lines[1] == "a: 36 MiB, 2 links"
    assert lines[3] == f"  1: {site.leaf}, content id aaaabbbb"
    assert lines[4].split("\t")[-1] == "closed"
    row = lines[5].split("\t")
    assert (row[0], row[1], row[3], row[7]) == (IMAGE, "36 MiB", "64 KiB", "yes")
    found = json.loads(run(capsys, "show", "--json", site.folder)[1])
    assert found["forks"][0]["zero_bytes"] == GRAIN
    assert found["source"][0]["links"][1]["content_id"] == "aaaabbbb"


def test_show_in_use_on_a_terminal(
    site: Site, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = site.opened()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, _ = run(capsys, "show", site.folder)
    assert code == 0
    assert "in use by a mount: what it has not flushed is not counted" in out
    assert "│" in out
    opened.close()


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-1, "0 s"), (59.9, "60 s"), (60, "1 min"), (7200, "2 h"), (3 * 86400 + 5, "3 d")],
)
def test_age(seconds: float, told: str) -> None:
    assert overlay.age(seconds) == told


# discard


def test_discard_wants_to_be_confirmed(site: Site, capsys: Output) -> None:
    before = files(site.folder)
    code, err = refused(capsys, "discard", site.folder)
    assert code == 2
    assert "--yes" in err
    assert files(site.folder) == before


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("yes\n", 0), ("n\n", 2), ("", 2)])
def test_discard_asks(
    site: Site, capsys: Output, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return answer

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    found, _, err = run(capsys, "discard", site.folder, "a/disk.raw")
    assert found == code
    assert "Discard what was written to a/disk.raw in" in err
    left = json.loads(run(capsys, "show", "--json", site.folder)[1])["forks"]
    assert len(left) == (0 if code == 0 else 1)


def test_discard_all(site: Site, capsys: Output) -> None:
    assert run(capsys, "discard", "--yes", site.folder) == (0, "", "")
    assert os.listdir(site.folder) == ["lock"]


def test_discard_what_is_damaged(site: Site, capsys: Output) -> None:
    (site.folder / "forks" / "0000" / "map").write_bytes(b"x")
    assert run(capsys, "discard", "--yes", site.folder, IMAGE)[0] == 0
    (site.folder / "overlay.json").write_text("")
    assert run(capsys, "discard", "--yes", site.folder)[0] == 0


def test_discard_what_is_in_use(
    site: Site, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = site.opened()
    code, err = refused(capsys, "discard", "--yes", site.folder)
    assert code == 44
    assert "another mount is using it" in err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "using it" in refused(capsys, "discard", site.folder)[1], "nobody is asked"
    opened.close()


# export: what is in the files


def test_export_json(site: Site, tmp_path: Path, capsys: Output) -> None:
    opened = site.opened()
    code, out, _ = run(capsys, "export", site.folder, IMAGE, "-")
    assert code == 0
    found = json.loads(out)
    assert (found["image"], found["capacity"]) == (IMAGE, SIZE)
    assert {"start": 16 * GRAIN, "length": GRAIN, "zero": True} in found["extents"]
    assert sum(each["length"] for each in found["extents"]) == found["changed_bytes"]
    exported(capsys, site, tmp_path / "changed.json")
    assert (tmp_path / "changed.json").read_text() == out
    opened.close()


def test_export_raw(site: Site, tmp_path: Path, capsys: Output) -> None:
    before = files(site.folder), files(site.vm)
    assert exported(capsys, site, tmp_path / "a.raw") == ""
    assert (tmp_path / "a.raw").read_bytes() == site.expected
    found = (tmp_path / "a.raw").stat()
    assert found.st_blocks * 512 < 2 << 20, "holes stay holes"
    assert stat.S_IMODE(found.st_mode) == 0o600, "a disk may hold secrets"
    assert (files(site.folder), files(site.vm)) == before


@needs_qemu
@pytest.mark.parametrize("beside", [True, False])
def test_export_vmdk(site: Site, tmp_path: Path, capsys: Output, beside: bool) -> None:
    out = (site.vm if beside else tmp_path) / "new.vmdk"
    err = exported(capsys, site, out)
    assert ("another folder" in err) != beside
    assert "nobody may write it any more" in err
    assert site.read(str(out)) == site.expected
    assert Qemu().raw(out) == site.expected
    subprocess.run(["qemu-img", "check", "-q", "-f", "vmdk", out], check=True, timeout=60)
    (tmp_path / "a.raw").write_bytes(site.expected)
    compared = ["qemu-img", "compare", "-q", "-f", "vmdk", "-F", "raw", out, tmp_path / "a.raw"]
    subprocess.run(compared, check=True, timeout=60)
    top = [each for each in Qemu().map(out) if each["depth"] == 0]
    assert sum(each["length"] for each in top) == 9 * GRAIN + SIZE % GRAIN
    assert main(["check", str(out), "-o", "follow_parents=any"]) == 0
    assert ", 0 damage, 0 warnings" in capsys.readouterr().out


def test_the_vmdk_byte_by_byte(site: Site, capsys: Output) -> None:
    out = site.vm / "new.vmdk"
    exported(capsys, site, out)
    raw = out.read_bytes()
    header = parse_header(raw[:512], "new", len(raw))
    assert (header.version, header.capacity, header.grain) == (1, SIZE // 512, 128)
    assert header.clean
    assert (header.zero_grains, header.packed) == (False, False)
    assert raw[73:77] == b"\n \r\n"
    (overhead,) = struct.unpack_from("<Q", raw, 64)
    assert 0 < header.spare < header.directory < overhead * 512 < len(raw)
    info = describe_chain(str(out))[-1]
    assert (info.format, info.parent_hint) == ("monolithicSparse", "a-000001.vmdk")
    assert info.parent_content_id == "aaaabbbb"
    assert info.content_id not in ("aaaabbbb", "ffffffff", "fffffffe")
    assert (info.adapter, info.hardware_version) == ("lsilogic", "14")
    assert len(raw) % GRAIN == 0


def test_two_exports_have_two_ids(site: Site, capsys: Output) -> None:
    ids = set()
    for name in ("x.vmdk", "y.vmdk"):
        exported(capsys, site, site.vm / name)
        ids.add(describe_chain(str(site.vm / name))[-1].content_id)
    assert len(ids) == 2


@needs_qemu
def test_a_fork_of_the_base(site: Site, capsys: Output) -> None:
    base = bytearray(site.read(str(site.vm / "a.vmdk")))
    opened = site.opened()
    fork = opened.fork("a/chain/0.raw", SIZE)
    fork.write(5 * GRAIN, b"new", lambda offset, size: bytes(base[offset : offset + size]))
    opened.close()
    base[5 * GRAIN : 5 * GRAIN + 3] = b"new"
    out = site.vm / "side.vmdk"
    words = ("export", site.folder, "a/chain/0.raw", out, "--format", "vmdk")
    assert run(capsys, *words) == (0, "", "")
    assert describe_chain(str(out))[-1].parent_content_id == "12345678"
    assert site.read(str(out)) == Qemu().raw(out) == base


def test_an_empty_fork(site: Site, capsys: Output) -> None:
    opened = site.opened()
    opened.fork("a/chain/0.raw", SIZE)
    opened.close()
    out = site.vm / "side.vmdk"
    assert run(capsys, "export", site.folder, "a/chain/0.raw", out, "--format", "vmdk")[0] == 0
    assert site.read(str(out)) == site.read(str(site.vm / "a.vmdk"))
    _, text, _ = run(capsys, "export", site.folder, "a/chain/0.raw", "-")
    assert json.loads(text)["extents"] == []


def test_what_was_not_closed_is_exported(site: Site, tmp_path: Path, capsys: Output) -> None:
    """As of the last flush, after a crash; and the overlay is as before."""
    opened = site.opened()
    fork = opened.fork(IMAGE, SIZE)
    site.write(fork, 9 * GRAIN, b"flushed")
    fork.flush()
    fork.write(10 * GRAIN, b"lost", site.below)
    fork._store._close_files()
    os.close(opened._lock_fd)
    before = files(site.folder)
    exported(capsys, site, tmp_path / "a.raw")
    assert (tmp_path / "a.raw").read_bytes() == site.expected
    assert files(site.folder) == before


# export: what is refused


@pytest.mark.parametrize("kind", ["raw", "vmdk"])
def test_in_use(site: Site, tmp_path: Path, capsys: Output, kind: str) -> None:
    opened = site.opened()
    words = ("export", site.folder, IMAGE, tmp_path / "out", "--format", kind)
    code, err = refused(capsys, *words)
    assert code == 44
    assert "has not flushed" in err
    assert not (tmp_path / "out").exists()
    opened.close()
    assert run(capsys, *words)[0] == 0


def test_a_mount_is_refused_meanwhile(
    site: Site, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Union.pieces

    def pieces(self: Union) -> Iterator[Any]:
        with pytest.raises(Exception, match="another mount is using it"):
            site.opened()
        yield from plain(self)

    monkeypatch.setattr(Union, "pieces", pieces)
    exported(capsys, site, tmp_path / "a.raw")


@pytest.mark.parametrize("kind", ["raw", "vmdk"])
def test_another_source(site: Site, tmp_path: Path, capsys: Output, kind: str) -> None:
    out = tmp_path / "out"
    words = ("export", site.folder, IMAGE, out, "--format", kind)
    os.utime(site.vm / "a.vmdk", ns=(1, 1))
    code, err = refused(capsys, *words)
    assert code == 44
    assert "a.vmdk was modified" in err
    assert "overlay_force=yes" in err
    assert os.listdir(tmp_path) == ["vm", "overlays"] or not out.exists()
    assert run(capsys, *words, "-o", "overlay_force=yes")[0] == 0
    out.unlink()
    copy = site.vm / "copy"
    shutil.copy(site.vm / "a.vmdk", copy)
    copy.rename(site.vm / "a.vmdk")
    code, err = refused(capsys, *words, "-o", "overlay_force=yes")
    assert code == 44
    assert "replaced by another file" in err
    assert not out.exists()


def test_a_source_that_is_gone(site: Site, tmp_path: Path, capsys: Output) -> None:
    site.leaf.unlink()
    words = ("export", site.folder, IMAGE, tmp_path / "out", "--format", "raw")
    assert refused(capsys, *words)[0] == 10
    assert run(capsys, "export", site.folder, IMAGE, "-")[0] == 0, "JSON needs no source"


def test_a_source_that_is_written_meanwhile(
    site: Site, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Union.pieces

    def pieces(self: Union) -> Iterator[Any]:
        yield from plain(self)
        os.utime(site.leaf, ns=(1, 1))

    monkeypatch.setattr(Union, "pieces", pieces)
    words = ("export", site.folder, IMAGE, tmp_path / "out", "--format", "raw")
    code, err = refused(capsys, *words)
    assert code == 44
    assert "was modified" in err
    assert not list(tmp_path.glob("out*"))


def test_a_live_source_that_is_forced(site: Site, capsys: Output) -> None:
    """Its owner may write it all the time; but the child's parent must be what it was."""
    out = site.vm / "new.vmdk"
    words = ("export", site.folder, IMAGE, out, "--format", "vmdk", "-o", "overlay_force=yes")
    plain = Union.grains

    def grains(self: Union, size: int) -> Iterator[Any]:
        yield from plain(self, size)
        content = site.leaf.read_bytes()
        with site.leaf.open("r+b") as file:
            file.write(content.replace(b"CID=" + old, b"CID=" + new, 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Union, "grains", grains)
        old = new = b"aaaabbbb"
        assert run(capsys, *words)[0] == 0
        out.unlink()
        new = b"ccccdddd"
        code, err = refused(capsys, *words)
    assert code == 44
    assert "content id aaaabbbb became ccccdddd" in err
    assert not out.exists()


def test_a_remote_source(tmp_path: Path, capsys: Output) -> None:
    link = LinkIdentity("[ds] a/a.vmdk", "12345678", 800, snapshot="snapshot-1", links=1)
    opened = Overlay.open(str(tmp_path / "o"), [SourceDisk("a", 800 * 512, (link,))], limits=LIMITS)
    opened.fork("a/chain/0.raw", 800 * 512).write(0, bytes(BLOCK), lambda offset, size: b"")
    opened.close()
    words = ("export", tmp_path / "o", "a/disk.raw", tmp_path / "out", "--format", "vmdk")
    code, err = refused(capsys, *words)
    assert code == 44
    assert "mount it again with that overlay= and copy the image's file" in err


def test_names_that_are_refused(site: Site, tmp_path: Path, capsys: Output) -> None:
    def told(out: Path | str, *more: str) -> str:
        code, err = refused(capsys, "export", site.folder, IMAGE, out, *more)
        assert code == 2
        return err

    before = files(tmp_path)
    there = tmp_path / "there"
    there.write_text("precious")
    assert "is there already" in told(there)
    assert there.read_text() == "precious"
    assert "is in the overlay" in told(site.folder / "x")
    for path in (site.leaf, site.vm / "a.vmdk"):
        assert "a file of the source" in told(path, "--force")
        assert "a file of the source" in told(path, "--force", "--format", "raw")
    assert "its folder does not exist" in told(tmp_path / "none" / "x")
    assert "not a regular file" in told("/dev/null", "--force")
    assert "not a regular file" in told(tmp_path, "--force")
    assert "a VMDK cannot name" in told(site.vm / 'a"b.vmdk', "--format", "vmdk")
    assert "standard output" in told("-", "--format", "raw")
    there.unlink()
    assert files(tmp_path) == before


def test_force_replaces(site: Site, tmp_path: Path, capsys: Output) -> None:
    for name in ("a.raw", "a.raw.part"):
        (tmp_path / name).write_text("old")
    exported(capsys, site, tmp_path / "a.raw", "--force")
    assert (tmp_path / "a.raw").read_bytes() == site.expected


def test_two_exports_to_one_file(
    site: Site, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --force the second takes the place of the first, which then says so."""
    plain = Union.pieces

    def pieces(self: Union) -> Iterator[Any]:
        yield from plain(self)
        (tmp_path / "a.raw.part").unlink()
        (tmp_path / "a.raw.part").write_text("another's")

    monkeypatch.setattr(Union, "pieces", pieces)
    words = ("export", site.folder, IMAGE, tmp_path / "a.raw", "--format", "raw")
    code, err = refused(capsys, *words)
    assert code == 44
    assert "somebody else" in err
    assert [path.name for path in tmp_path.glob("a.raw*")] == ["a.raw.part"]


def test_an_image_that_nobody_wrote(site: Site, capsys: Output) -> None:
    code, err = refused(capsys, "export", site.folder, "b/disk.raw", "-")
    assert code == 44
    assert f"there is: {IMAGE}" in err


def test_a_damaged_map(site: Site, tmp_path: Path, capsys: Output) -> None:
    (site.folder / "forks" / "0000" / "map").write_bytes(b"x" * 9000)
    for kind in export.FORMATS:
        words = ("export", site.folder, IMAGE, tmp_path / "out", "--format", kind)
        code, err = refused(capsys, *words)
        assert code == 44
        assert "map: damaged" in err
    assert not list(tmp_path.glob("out*"))


def test_a_segment_that_was_cut_short(site: Site, tmp_path: Path, capsys: Output) -> None:
    os.truncate(site.folder / "forks" / "0000" / "segment-0000", BLOCK)
    words = ("export", site.folder, IMAGE, tmp_path / "out", "--format", "raw")
    code, err = refused(capsys, *words)
    assert code == 44
    assert "beyond the end of the segments" in err


def test_an_image_of_nothing(site: Site, tmp_path: Path, capsys: Output) -> None:
    opened = site.opened()
    opened.fork("gone/chain/0.raw", 4096).write(0, b"x", lambda offset, size: bytes(size))
    opened.close()
    words = ("export", site.folder, "gone/chain/0.raw", tmp_path / "out")
    assert "--format json" in refused(capsys, *words, "--format", "raw")[1]
    assert run(capsys, *words)[0] == 0


# export: what goes wrong on the way


@pytest.mark.parametrize("kind", ["json", "raw", "vmdk"])
def test_a_full_disk(site: Site, tmp_path: Path, capsys: Output, kind: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("absent: root (to mount a tmpfs)")
    small = tmp_path / "small"
    small.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", small]
    if subprocess.run(mounting, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("absent: the right to mount a tmpfs")
    try:
        if kind == "json":
            (small / "filler").write_bytes(bytes(120 * 1024))
            opened = site.opened()
            fork = opened.fork(IMAGE, SIZE)
            for number in range(0, 600, 2):
                fork.write(number * BLOCK, b"x", site.below)
            opened.close()
        words = ("export", site.folder, IMAGE, small / "out", "--format", kind)
        code, err = refused(capsys, *words)
        assert code == 44
        assert "No space left on device" in err
        assert "free space there" in err
        assert not list(small.glob("out*"))
    finally:
        subprocess.run(["umount", small], check=True, timeout=20)


def test_a_limit_of_the_files_size(site: Site, tmp_path: Path, capsys: Output) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ("export", site.folder, IMAGE, tmp_path / "out", "--format", "vmdk")
    resource.setrlimit(resource.RLIMIT_FSIZE, (GRAIN * 4, before[1]))
    try:
        code, err = refused(capsys, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 44
    assert "File too large" in err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", ["raw", "vmdk"])
def test_an_interruption(
    site: Site, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def read(self: Union, offset: int, into: memoryview) -> None:
        assert (tmp_path / "out.part").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Union, "read_into", read)
    code, _, _ = run(capsys, "export", site.folder, IMAGE, tmp_path / "out", "--format", kind)
    assert code == 130
    assert not list(tmp_path.glob("out*"))
    site.opened().close()


def test_too_many_grains(site: Site, tmp_path: Path) -> None:
    """Places have 32 bits."""
    parent = child.Parent(str(site.leaf), "12345678", 62 << 31, {})

    def nothing(data: bytes | memoryview, offset: int) -> None:
        raise AssertionError("nothing is to be written")

    with pytest.raises(Exception, match="more than a VMDK of this format can have"):
        child.write_child(nothing, str(tmp_path / "x.vmdk"), parent, 1 << 25, [])


def test_progress_on_a_terminal(
    site: Site, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "a.raw" in exported(capsys, site, tmp_path / "a.raw")
    assert exported(capsys, site, tmp_path / "b.raw", "--quiet") == ""


# The descriptor of a child


def test_what_a_child_has_of_its_parent() -> None:
    def of(**ddb: str) -> Any:
        return msgspec.structs.replace(PLAIN, ddb=ddb)

    found = child.copied(
        [of(adaptertype="buslogic"), of(adaptertype="ide", virtualhwversion='4"\nRW')]
    )
    assert found == {"adapterType": "buslogic"}
    parent = child.Parent("/vm/a.vmdk", "12345678", 16 * 63 * 7, {"geometry.heads": "16"})
    text = child.descriptor("/vm/b.vmdk", parent).decode()
    assert 'ddb.geometry.heads = "255"' in text, "a geometry is whole or not there"
    assert 'ddb.adapterType = "lsilogic"' in text


PLAIN = child.Descriptor(1, "", "", "", "", (), {}, {})


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"d\xe9.vmdk")
    parent = child.Parent(str(tmp_path / name), "12345678", 800, {})
    assert b'parentFileNameHint="d\xe9.vmdk"' in child.descriptor(str(tmp_path / "x"), parent)


def test_times(site: Site, capsys: Output) -> None:
    written = json.loads(run(capsys, "show", "--json", site.folder)[1])["forks"][0]["written"]
    assert abs(written - time.time()) < 600
