"""Writing to disks that are full, fail or lose data, and by several threads at once."""

import errno
import operator
import os
import random
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vmdk.write.writers import (
    GRAIN,
    Disk,
    Open,
    fill,
    open_writers,
    patch_file,
    qemu_check,
)
from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.engines.vmdk.write import BaseWriter
from vddkfs.errors import EngineError

Read = Callable[..., bytes]


@pytest.fixture
def writer(opened: Callable[..., VmdkEngine]) -> Iterator[Open]:
    """Open a VMDK for reading and for writing; closed after the test."""
    yield from open_writers(opened)


@contextmanager
def failing_writes(
    monkeypatch: pytest.MonkeyPatch, nth: int, short: int, number: int
) -> Iterator[list[int]]:
    """Let the *nth* write end after *short* bytes, and fail when it is tried again; yield a list
    of how many bytes each write was asked for."""
    plain, asked = os.pwrite, list[int]()

    def pwrite(fd: int, data: Any, offset: int) -> int:
        asked.append(len(data))
        if len(asked) == nth and short and len(data) > short:
            return plain(fd, data[:short], offset)
        if len(asked) in (nth, nth + 1):
            raise OSError(number, os.strerror(number))
        return plain(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        yield asked


@pytest.mark.parametrize("short", [0, 2, 700])
def test_a_full_disk_at_any_write(
    qemu: Any,
    tmp_path: Path,
    writer: Open,
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
    short: int,
) -> None:
    """Old or new content, tables in step, and the same request succeeds when there is space."""
    path, original = tmp_path / "x.vmdk", tmp_path / "original.vmdk"
    qemu.create(original, 34 << 20)
    qemu.io(original, "write -P 1 31M 64k")
    for directory in (Disk(original).directory, Disk(original).spare_directory):
        patch_file(original, directory * 512 + 4, bytes(4))
    old = b"\1" * GRAIN + bytes((3 << 20) - GRAIN)
    first = 31 << 11
    data = random.Random(short).randbytes(2 << 20)
    new = old[:5120] + data + old[5120 + len(data) :]
    for nth in count(1):
        shutil.copyfile(original, path)
        engine, base = writer(path)
        with failing_writes(monkeypatch, nth, short, errno.ENOSPC) as asked:
            failure = attempt(base, first + 10, data)
        if failure is None:
            break
        assert failure.errno == errno.ENOSPC
        assert "free space" in failure.advice
        Disk(path).check()
        qemu_check(path)
        found = read(engine, first, 3 << 11)
        assert read(engine, 0, first) == bytes(first * 512)
        if found not in (old, new):
            assert all(map(operator.contains, zip(old, new, strict=True), found))
        size = path.stat().st_size
        assert attempt(base, first + 10, data) is None
        assert read(engine, first, 3 << 11) == new
        Disk(path).check()
        assert path.stat().st_size < size + (3 << 20)
        base.close()
        assert Disk(path).unclean == 1, "something failed"
    assert nth == len(asked) + 1 >= 10, "mark, grains, tables, two directories, four tables, grain"
    base.close()
    assert qemu.raw(path)[31 << 20 :] == new


def attempt(base: BaseWriter, sector: int, data: bytes) -> EngineError | None:
    """Write, and return the failure if it is one."""
    try:
        base.write(sector, memoryview(data))
    except EngineError as error:
        return error
    return None


def test_a_place_is_used_once(
    make: Any, writer: Open, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What names it was taken back, but may have reached the disk before that."""
    path = make.sparse("x.vmdk", 4096, {0: bytes(fill("a"))})
    engine, base = writer(path)
    base.write(0, fill("b", 512))
    end = os.stat(path).st_size // 512
    with failing_writes(monkeypatch, 2, 0, errno.EIO) as asked, pytest.raises(EngineError):
        base.write(128, fill("c"))
    assert asked == [GRAIN, 4, 4], "the grain, its entry, and that taken back"
    base.write(256, fill("d"))
    assert Disk(path).check()[:3] == [128, 0, end + 128]
    assert read(engine, 0, 384)[512:] == b"a" * (GRAIN - 512) + bytes(GRAIN) + b"d" * GRAIN


def test_a_real_limit(make: Any, writer: Open, read: Read) -> None:
    path = make.sparse("x.vmdk", 4096, {0: bytes(fill("a"))})
    engine, base = writer(path)
    size = os.stat(path).st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + GRAIN + 1000, hard))
    try:
        base.write(128, fill("b"))
        for _ in range(3):
            with pytest.raises(EngineError) as caught:
                base.write(256, fill("c", 3 * GRAIN))
            assert caught.value.errno == errno.EFBIG
            assert os.stat(path).st_size == size + GRAIN + 1000
        assert read(engine, 0, 4096) == b"a" * GRAIN + b"b" * GRAIN + bytes(30 * GRAIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    base.write(256, fill("d", 3 * GRAIN))
    assert read(engine, 256, 384) == b"d" * 3 * GRAIN
    assert os.stat(path).st_size == size + 4 * GRAIN, "no place was lost"
    Disk(path).check()


def test_flat_failures_name_their_place(
    make: Any, writer: Open, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, base = writer(make.flat("x", bytes(fill("a", 100 * 512))))
    with (
        failing_writes(monkeypatch, 1, 700, errno.EIO),
        pytest.raises(EngineError, match=r"x-flat\.vmdk: writing byte 5820 failed") as caught,
    ):
        base.write(10, fill("b", 2048))
    assert caught.value.errno == errno.EIO
    assert caught.value.sector == 10
    assert caught.value.link.endswith("x.vmdk")
    base.write(10, fill("c", 2048))
    assert read(engine, 9, 6) == b"a" * 512 + b"c" * 2048 + b"a" * 512


class LosingDisk:
    """An fdatasync that fails once for each file, as the kernel does, and then says all is well."""

    def __init__(self) -> None:
        self.fail = False

    def __call__(self, fd: int) -> None:
        if self.fail:
            self.fail = False
            raise OSError(errno.EIO, "Input/output error")


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> LosingDisk:
    disk = LosingDisk()
    monkeypatch.setattr(os, "fdatasync", disk)
    return disk


def test_a_failed_flush_is_remembered(make: Any, writer: Open, losing: LosingDisk) -> None:
    _, base = writer(make.flat("x", bytes(100 * 512)))
    base.write(0, fill("a", 512))
    losing.fail = True
    with pytest.raises(EngineError, match="flushing failed") as caught:
        base.flush()
    assert caught.value.errno == errno.EIO
    for _ in range(2):
        with pytest.raises(EngineError, match="may be lost"):
            base.write(0, fill("b", 512))
        with pytest.raises(EngineError, match="may be lost"):
            base.flush()
    base.close()


def test_a_failed_barrier_enters_nothing(
    make: Any, writer: Open, read: Read, losing: LosingDisk
) -> None:
    """And the next flush fails, because what it would vouch for may be lost as well."""
    path = make.sparse("x.vmdk", 1024, {0: bytes(fill("a"))})
    engine, base = writer(path)
    base.write(0, fill("b", 512))
    losing.fail = True
    with pytest.raises(EngineError, match="flushing failed"):
        base.write(128, fill("c", 512))
    assert not any(Disk(path).check()[1:])
    assert read(engine, 128, 8) == bytes(4096)
    with pytest.raises(EngineError, match="may be lost"):
        base.write(0, fill("d", 512))
    with pytest.raises(EngineError, match="may be lost"):
        base.close()
    assert Disk(path).unclean == 1
    base.close()


def test_a_loss_in_one_file_ends_writing_to_all(
    qemu: Any, tmp_path: Path, writer: Open, losing: LosingDisk
) -> None:
    path = tmp_path / "x.vmdk"
    qemu.create(path, 5 << 30, options="subformat=twoGbMaxExtentFlat")
    _, base = writer(path)
    base.write((5 << 21) - 1, fill("a", 512))
    losing.fail = True
    with pytest.raises(EngineError, match=r"x-f003\.vmdk"):
        base.flush()
    with pytest.raises(EngineError, match=r"x-f003\.vmdk"):
        base.write(0, fill("a", 512))


def test_a_flush_that_fails_at_the_end(make: Any, writer: Open, losing: LosingDisk) -> None:
    path = make.sparse("x.vmdk", 1024, {0: bytes(fill("a"))})
    _, base = writer(path)
    base.write(0, fill("b", 512))
    losing.fail = True
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EngineError, match="flushing failed"):
        base.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    assert Disk(path).unclean == 1


@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_two_flushes_at_once_are_both_told(
    guarded: bool, make: Any, writer: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells one of two; the other must not take that for success."""
    _, base = writer(make.flat("x", bytes(100 * 512)))
    base.write(0, fill("a", 512))
    (file,) = base._files.values()
    if not guarded:
        file._sync_lock = nullcontext()  # type: ignore[assignment]
    told: list[bool] = []

    def other() -> None:
        try:
            base.flush()
            told.append(False)
        except EngineError:
            told.append(True)

    thread = threading.Thread(target=other)

    def failing(fd: int) -> None:
        thread.start()
        # With the guard the other waits for this one: there is nothing to see before its end.
        thread.join(0.2)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(EngineError):
        base.flush()
    thread.join()
    assert told == [guarded]


# Several threads


class NoLock:
    """A lock that does not lock."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        pass


@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_two_writers_of_one_new_grain(
    guarded: bool, make: Any, writer: Open, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find it absent; at the barrier each waits for the other, as far as the lock lets it."""
    engine, base = writer(make.sparse("x.vmdk", 1024, {5: bytes(fill("a"))}))
    base.write(5 * 128, fill("b", 512))
    if not guarded:
        monkeypatch.setattr(base._writers[0], "_lock", NoLock())
    meeting = threading.Barrier(2)

    def meet(fd: int) -> None:
        with suppress(threading.BrokenBarrierError):
            meeting.wait(0.5)

    monkeypatch.setattr(os, "fdatasync", meet)
    threads = [
        threading.Thread(target=base.write, args=(sector, fill("c", 512))) for sector in (3, 90)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    landed = [read(engine, sector, 1) == b"c" * 512 for sector in (3, 90)]
    assert landed == [True, True] if guarded else sorted(landed) == [False, True]


@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_nothing_is_acknowledged_before_readers_can_see_it(
    guarded: bool, make: Any, writer: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has entered a new grain and readers still have the old table: another writes to it."""
    path = make.sparse("x.vmdk", 1024, {5: bytes(fill("a"))})
    _, base = writer(path)
    sparse: Any = base._writers[0]
    base.write(5 * 128, fill("b", 512))
    if not guarded:
        monkeypatch.setattr(sparse, "_find", sparse._places.find)
    second = threading.Thread(target=base.write, args=(9, fill("d", 512)))
    done: list[bool] = []

    def forget(number: int) -> None:
        assert Disk(path).entries(Disk(path).directory)[0]
        second.start()
        second.join(0.2)
        done.append(not second.is_alive())

    monkeypatch.setattr(sparse, "_forget", forget)
    base.write(3, fill("c", 512))
    second.join()
    assert done == [not guarded]


@pytest.mark.parametrize("options", ["", "zeroed_grain=on"])
def test_many_threads(qemu: Any, tmp_path: Path, writer: Open, read: Read, options: str) -> None:
    """Each writes its own sectors of the same new grains, over and over, while one reads."""
    path = tmp_path / "x.vmdk"
    grains, workers = 40, 8
    qemu.create(path, 34 << 20, options=f"subformat=monolithicSparse,{options}".rstrip(","))
    engine, base = writer(path)
    start = 500 * 128
    model = bytearray(grains * GRAIN)
    problems: list[BaseException] = []

    def work(worker: int) -> None:
        draw = random.Random(worker)
        mine = [sector for sector in range(grains * 128) if sector // 3 % workers == worker]
        try:
            for sector in draw.sample(mine, 300):
                data = draw.randbytes(512) if draw.random() < 0.8 else bytes(512)
                base.write(start + sector, memoryview(data))
                model[sector * 512 : (sector + 1) * 512] = data
                assert read(engine, start + sector, 1, direct=True) == data
                if draw.random() < 0.02:
                    base.flush()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert read(engine, start, grains * 128) == model
    base.close()
    assert len(list(filter(None, Disk(path).check()))) == grains
    qemu_check(path)
    assert qemu.raw(path)[start * 512 :][: len(model)] == model
