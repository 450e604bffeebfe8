"""What is settled when a base is opened to be written: who else has it, its id, that it works."""

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vmdk.write.writers import GRAIN, fill
from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.engines.vmdk.write import locks
from vddkfs.errors import EngineError, VddkfsError

Opened = Callable[..., VmdkEngine]
NEW = "89abcdef"


def cid_of(path: str | Path) -> str:
    found = re.search(rb"^CID=(.*)$", Path(path).read_bytes(), re.M)
    assert found is not None
    return found[1].decode()


def refused(path: str | Path, *told: str) -> VddkfsError:
    with pytest.raises(VddkfsError) as caught:
        VmdkEngine([str(path)], writable=True)
    assert caught.value.errno == errno.EROFS
    for text in told:
        assert text in str(caught.value)
    return caught.value


@pytest.fixture(params=["flat", "sparse", "empty"])
def disk(request: pytest.FixtureRequest, make: Any) -> str:
    if request.param == "flat":
        return str(make.flat("x", bytes(fill("a", 100 * 512))))
    return str(make.sparse("x.vmdk", 1024, {0: b"a" * GRAIN} if request.param == "sparse" else {}))


def contents(path: str) -> dict[str, bytes]:
    return {found.name: found.read_bytes() for found in Path(path).parent.iterdir()}


# Opening it.


def test_opening_and_closing_changes_no_byte(disk: str) -> None:
    before = contents(disk)
    engine = VmdkEngine([disk], writable=True, content_id=NEW)
    assert contents(disk) == before
    engine.flush()
    engine.close()
    assert contents(disk) == before


@pytest.mark.parametrize("disk", ["flat", "sparse"], indirect=True)
def test_the_first_sector_is_written_and_not_waited_for(
    disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    write, sync = os.pwrite, os.fdatasync

    def pwrite(fd: int, data: Any, offset: int) -> int:
        calls.append(bytes(data))
        return write(fd, data, offset)

    def fdatasync(fd: int) -> None:
        calls.append("sync")
        sync(fd)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    engine = VmdkEngine([disk], writable=True)
    assert calls == [b"a" * 512]
    engine.close()
    assert calls == [b"a" * 512, "sync"]


@pytest.mark.parametrize("disk", ["flat", "sparse"], indirect=True)
def test_a_disk_that_takes_no_writes_is_known_at_open(
    disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwrite(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(EngineError, match="full"):
        VmdkEngine([disk], writable=True)


def test_what_cannot_be_written_is_refused_at_open(make: Any) -> None:
    refused(make.sparse("x.vmdk", 100, {}, parent="00000001", hint="base.vmdk"), "it has a parent")


def test_what_was_opened_for_reading_takes_no_write(disk: str, opened: Opened) -> None:
    engine = opened(disk)
    with pytest.raises(EngineError, match="for reading alone") as caught:
        engine.write(0, fill("b", 512))
    assert caught.value.errno == errno.EROFS
    engine.flush()


def test_every_descriptor_is_closed(disk: str, make: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    VmdkEngine([disk], writable=True, content_id=NEW).close()
    other = VmdkEngine([disk], writable=True, content_id=NEW)
    refused(disk)
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_wrote_nothing_flushes_what_another_wrote(
    disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before it may have been killed with its writes in the kernel, and not on the disk."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    engine = VmdkEngine([disk], writable=True)
    engine.flush()
    engine.close()
    assert len(synced) == 1


# The content id.


def test_the_content_id_changes_at_the_first_write_and_before_it(
    disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = cid_of(disk)
    engine = VmdkEngine([disk], writable=True, content_id=NEW)
    order: list[str] = []
    write, sync = os.pwrite, os.fdatasync

    def pwrite(fd: int, data: Any, offset: int) -> int:
        order.append("id" if bytes(data) == NEW.encode() else "data")
        return write(fd, data, offset)

    def fdatasync(fd: int) -> None:
        order.append("sync")
        sync(fd)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    assert cid_of(disk) == old
    engine.write(0, fill("b", 512))
    engine.write(1, fill("b", 512))
    assert order[:3] == ["id", "sync", "data"]
    assert order.count("id") == 1
    engine.close()
    assert cid_of(disk) == NEW


def test_the_next_process_of_a_mount_changes_it_no_more(
    disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        engine = VmdkEngine([disk], writable=True, content_id=NEW)
        engine.write(0, fill("b", 512))
        engine.close()
        assert cid_of(disk) == NEW
        assert engine.identities() == ()


def test_it_stays_where_it_is_to_be_kept(disk: str) -> None:
    old = cid_of(disk)
    engine = VmdkEngine([disk], writable=True)
    engine.write(0, fill("b", 512))
    engine.close()
    assert cid_of(disk) == old


@pytest.mark.parametrize(
    ("line", "now"),
    [
        ("CID=abc", "CID=def"),
        ('cid = "12345678"', 'cid = "89abcdef"'),
        ("CID=0xAB\r", "CID=0xef\r"),
    ],
)
def test_it_is_changed_in_its_place(make: Any, line: str, now: str) -> None:
    disk = Path(make.flat("x", bytes(51200)))
    text = disk.read_text().replace("CID=12345678", line, 1)
    disk.write_bytes(text.encode())
    engine = VmdkEngine([str(disk)], writable=True, content_id=NEW)
    engine.write(0, fill("b", 512))
    engine.close()
    assert disk.read_bytes() == text.replace(line, now, 1).encode()


def test_its_own_writes_do_not_make_a_base_with_links_above_another(make: Any) -> None:
    base = make.flat("base", bytes(51200), cid="00000001")
    leaf = make.sparse("x.vmdk", 100, {}, parent="00000001", hint="base.vmdk", cid="00000002")
    engine = VmdkEngine([base, leaf], writable=True)
    before = engine.identities()
    engine.write(0, fill("b", 512))
    engine.flush()
    now = engine.renew().identities
    assert before[0].change_to(now[0], live=True) == ""
    assert now[0].content_id == "00000001"
    engine.write(1, fill("c", 512))
    buffer = bytearray(1024)
    engine.read(1, 0, 2, memoryview(buffer), False)
    assert buffer == b"b" * 512 + b"c" * 512
    engine.close()


# Change tracking.


def test_change_tracking_is_told_to_be_wrong(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    disk = make.flat("x", bytes(51200), more='changeTrackPath="x-ctk.vmdk"')
    VmdkEngine([disk]).close()
    assert capfd.readouterr().err == ""
    VmdkEngine([disk], writable=True).close()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "changed-block tracking of this disk is wrong once it is written: reset it" in lines[0]


# Others who have it.


@pytest.mark.parametrize("disk", ["flat", "sparse"], indirect=True)
def test_two_who_write_are_refused_and_the_lock_ends_with_the_first(disk: str) -> None:
    first = VmdkEngine([disk], writable=True)
    refused(disk, "x", "another process has it open for writing")
    first.write(0, fill("b", 512))
    first.close()
    VmdkEngine([disk], writable=True).close()


def test_another_descriptor_of_the_same_extent_is_refused_as_well(make: Any) -> None:
    disk = make.flat("x", bytes(51200))
    other = make.text("y.vmdk", ['RW 100 FLAT "x-flat.vmdk" 0'])
    engine = VmdkEngine([disk], writable=True)
    refused(other, "x-flat.vmdk")
    engine.close()


def test_the_lock_stays_when_the_files_are_opened_again(disk: str) -> None:
    engine = VmdkEngine([disk], writable=True)
    engine.renew()
    engine.revalidate()
    refused(disk, "another process has it open for writing")
    engine.close()


def test_readers_and_a_writer_hear_of_each_other(
    disk: str, capfd: pytest.CaptureFixture[str]
) -> None:
    reader = VmdkEngine([disk])
    VmdkEngine([disk]).close()
    assert capfd.readouterr().err == ""
    writer = VmdkEngine([disk], writable=True)
    assert "another process reads it" in capfd.readouterr().err
    late = VmdkEngine([disk])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "another process has it open for writing" in lines[0]
    for engine in (reader, writer, late):
        engine.close()
    VmdkEngine([disk], writable=True).close()
    assert capfd.readouterr().err == ""


def test_a_file_system_without_locks_is_told_of(
    disk: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fcntl(*arguments: Any) -> bytes:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks.fcntl, "fcntl", fcntl)
    VmdkEngine([disk]).close()
    assert capfd.readouterr().err == ""
    engine = VmdkEngine([disk], writable=True)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "its file system has no locks" in lines[0]
    engine.write(0, fill("b", 512))
    engine.close()


@contextmanager
def qemu_has(path: str, *, writable: bool) -> Iterator[None]:
    """Have qemu hold *path* open."""
    command = ["qemu-io", "-f", "vmdk", *(() if writable else ("-r",)), path]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018
        process.stdin.write("length\n")
        process.stdin.flush()
        while "iB" not in (line := process.stdout.readline()):
            assert line, "qemu-io has opened it"
        yield
        process.stdin.close()


@pytest.mark.parametrize(
    ("writable", "told"), [(True, "open for writing"), (False, "does not let others write it")]
)
def test_what_qemu_has_open_is_refused(qemu: Any, disk: str, writable: bool, told: str) -> None:
    with qemu_has(disk, writable=writable):
        refused(disk, told)
    VmdkEngine([disk], writable=True).close()


def test_qemu_does_not_open_what_is_written_and_may_read_what_is_read(
    qemu: Any, disk: str, opened: Opened
) -> None:
    command = ["qemu-io", "-f", "vmdk", "-c", "length", disk]
    engine = VmdkEngine([disk], writable=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "lock" in done.stderr
    engine.close()
    opened(disk)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["x.vmdk.lck", "x-flat.vmdk.lck"])
def test_what_vmware_has_open_is_refused(make: Any, name: str) -> None:
    disk = make.flat("x", bytes(51200))
    folder = make.folder / name
    folder.mkdir()
    VmdkEngine([disk], writable=True).close()
    (folder / "M12345.lck").write_text("x")
    error = refused(disk, f"{name}/M12345.lck", "power the virtual machine off", "remove it")
    assert str(error).startswith(str(folder).removesuffix(".lck"))
    VmdkEngine([disk]).close()


def test_a_lock_of_vmware_that_cannot_be_looked_into_is_one(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = str(make.flat("x", bytes(51200)))
    folder = make.folder / "x.vmdk.lck"
    folder.mkdir()
    look = os.listdir

    def listdir(path: Any) -> list[str]:
        if path == str(folder):
            raise PermissionError(errno.EACCES, "Permission denied")
        return look(path)

    monkeypatch.setattr(os, "listdir", listdir)
    refused(disk, "x.vmdk.lck exists", "power the virtual machine off")


def test_what_esxi_has_open_over_nfs_is_refused(make: Any) -> None:
    disk = make.flat("x", bytes(51200))
    number = (make.folder / "x-flat.vmdk").stat().st_ino.to_bytes(8, "little").hex()
    (make.folder / ".lck-0000000000000000").touch()
    VmdkEngine([disk], writable=True).close()
    (make.folder / f".lck-{number}").touch()
    refused(disk, f".lck-{number}")
