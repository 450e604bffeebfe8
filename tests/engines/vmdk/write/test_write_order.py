"""A crash at any moment of writing leaves a sparse file with the old or the new content of a grain.

Every write and barrier of some hundred requests is recorded. Then they are played to a copy of the
file, in two ways. *A killed process*: the writes arrive in order up to some sector, and the copy is
read after each sector. *A power loss*: of what was written since the last barrier each sector may
have arrived or not, in any order, and sectors that the file grew by hold anything.
"""

import os
import random
import shutil
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.engines.vmdk.write import BaseWriter
from vddkfs.engines.vmdk.write.writable import WritableFile
from vddkfs.errors import EngineError

GRAIN = 8
GRAIN_BYTES = GRAIN * 512
GRAINS = 1200
CAPACITY = GRAINS * GRAIN - 5
TABLES = 3
SPARE_DIRECTORY, DIRECTORY = 21, 22
ALLOCATIONS = 1000
STALE = b"\xa5" * 512

Write = tuple[int, bytes]


class Request:
    """One call of write(): what it changed, and what it wrote between which barriers."""

    def __init__(self, sector: int, data: bytes) -> None:
        self.sector = sector
        self.data = data
        self.epochs: list[list[Write]] = [[]]

    @property
    def grains(self) -> range:
        return range(self.sector // GRAIN, -(-(self.sector + len(self.data) // 512) // GRAIN))


class Model:
    """The content of the disk, and which grains are in the file."""

    def __init__(self) -> None:
        self.content = bytearray(GRAINS * GRAIN_BYTES)
        self.present: set[int] = set()

    def grain(self, number: int) -> bytes:
        return bytes(self.content[number * GRAIN_BYTES : (number + 1) * GRAIN_BYTES])

    def do(self, request: Request) -> None:
        begin = request.sector * 512
        self.content[begin : begin + len(request.data)] = request.data
        self.present.update(request.grains)


class Allowed:
    """What each grain may show: all *versions* that it has had since some moment, oldest first."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.versions: dict[int, list[bytes]] = {}
        self.absent: set[int] = set()

    def before(self, request: Request) -> None:
        """Note what the grains of *request* show, which the model has not seen yet."""
        for number in request.grains:
            if number not in self.versions:
                self.versions[number] = [self.model.grain(number)]
                if number not in self.model.present:
                    self.absent.add(number)

    def after(self, request: Request) -> None:
        for number in request.grains:
            self.versions[number].append(self.model.grain(number))

    def has(self, number: int, found: bytes) -> bool:
        """Say whether *found* is all right: a grain appears as a whole, then sector by sector."""
        versions = self.versions.get(number)
        if versions is None:
            return found == self.model.grain(number)
        if number in self.absent:
            if found == versions[0]:
                return True
            versions = versions[1:]
        return found in versions or all(
            any(found[at : at + 512] == version[at : at + 512] for version in versions)
            for at in range(0, GRAIN_BYTES, 512)
        )


def make_disk(folder: Path) -> Path:
    """Make an empty disk with small grains and two directories; the second table is missing."""
    path = folder / "x.vmdk"
    text = f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
createType="monolithicSparse"\nRW {CAPACITY} SPARSE "x.vmdk"\n'
    tables = [24 + 4 * number for number in range(2 * TABLES)]
    overhead = 24 + 8 * TABLES
    head = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, CAPACITY, GRAIN, 1, 20)
    head += struct.pack("<IQQQB4sH", 512, SPARE_DIRECTORY, DIRECTORY, overhead, 0, b"\n \r\n", 0)
    content = bytearray(overhead * 512)
    content[: len(head)] = head
    content[512 : 512 + len(text)] = text.encode()
    for place, part in ((SPARE_DIRECTORY, tables[:TABLES]), (DIRECTORY, tables[TABLES:])):
        part[1] = 0
        content[place * 512 : place * 512 + TABLES * 4] = struct.pack("<3I", *part)
    path.write_bytes(content)
    return path


def make_requests(seed: int) -> list[Request]:
    """Return requests of all kinds that allocate ``ALLOCATIONS`` grains, and rewrite some."""
    draw = random.Random(seed)
    absent, requests = set(range(GRAINS)), []
    while len(absent) > GRAINS - ALLOCATIONS:
        count = draw.choice([1, 1, 2, 8, 8, 12, 20, draw.randrange(1, 100)])
        start = draw.choice(sorted(absent)) * GRAIN
        if draw.random() < 0.5:
            start += draw.randrange(GRAIN)
        count = min(count, CAPACITY - start)
        if count > 0:
            request = Request(start, draw.randbytes(count * 512))
            absent -= set(request.grains)
            requests.append(request)
    return requests


def record(path: Path, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do *requests*, and let each keep what it wrote."""
    plain = os.pwrite
    current: list[Request] = []

    def pwrite(fd: int, data: Any, offset: int) -> int:
        assert os.path.samestat(os.fstat(fd), os.stat(path))
        current[-1].epochs[-1].append((offset, bytes(data)))
        return plain(fd, data, offset)

    def forbidden(*arguments: Any) -> None:
        raise AssertionError("a change that the test does not record")

    with monkeypatch.context() as patch, writer_of(path) as writer:
        patch.setattr(os, "pwrite", pwrite)
        patch.setattr(os, "fdatasync", lambda fd: current[-1].epochs.append([]))
        for name in ("pwritev", "write", "writev", "ftruncate", "truncate", "posix_fallocate"):
            patch.setattr(os, name, forbidden)
        for request in requests:
            current.append(request)
            writer.write(request.sector, memoryview(request.data))
        current.append(Request(0, b""))
        writer.flush()


@contextmanager
def writer_of(path: Path) -> Iterator[BaseWriter]:
    engine = VmdkEngine([str(path)])
    writer = BaseWriter(engine._links[0])
    try:
        yield writer
    finally:
        writer.close()
        engine.close()


class Player:
    """A copy of the file that recorded writes are played to."""

    def __init__(self, original: Path, copy: Path) -> None:
        shutil.copyfile(original, copy)
        self.path = copy
        self.fd = os.open(copy, os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.fd)

    def look(self, grains: Sequence[int]) -> list[bytes]:
        """Open the copy, and return what *grains*, which ascend, show."""
        engine = VmdkEngine([str(self.path)])
        content = bytearray(len(grains) * GRAIN_BYTES)
        view, done = memoryview(content), 0
        try:
            for start, count in runs(grains):
                sectors = min(CAPACITY, (start + count) * GRAIN) - start * GRAIN
                into = view[done : done + sectors * 512]
                engine.read(0, start * GRAIN, sectors, into, False)
                done += count * GRAIN_BYTES
        finally:
            engine.close()
        return [bytes(view[at : at + GRAIN_BYTES]) for at in range(0, len(content), GRAIN_BYTES)]

    def entries(self) -> tuple[list[int], list[int]]:
        """Return the grain table entries by the redundant directory and by the primary."""
        found = []
        for directory in (SPARE_DIRECTORY, DIRECTORY):
            entries: list[int] = []
            for place in struct.unpack("<3I", os.pread(self.fd, 12, directory * 512)):
                raw = os.pread(self.fd, 2048, place * 512) if place else bytes(2048)
                entries += struct.unpack("<512I", raw)
            found.append(entries[:GRAINS])
        return found[0], found[1]


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, count) of what in *numbers* is consecutive."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def torn(writes: list[Write]) -> list[Write]:
    """Return *writes* cut where sectors of the file end."""
    pieces = []
    for offset, data in writes:
        begin = 0
        while begin < len(data):
            end = min(len(data), begin + 512 - (offset + begin) % 512)
            pieces.append((offset + begin, data[begin:end]))
            begin = end
    return pieces


def wrong(player: Player, allowed: Allowed, grains: Sequence[int]) -> list[str]:
    """Return what is wrong with *grains* of the played copy."""
    try:
        found = player.look(grains)
    except EngineError as error:
        return [str(error)]
    return [
        f"grain {number}"
        for number, content in zip(grains, found, strict=True)
        if not allowed.has(number, content)
    ]


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Player]:
    path = make_disk(tmp_path)
    player = Player(path, tmp_path / "copy.vmdk")
    yield player
    player.close()


def test_killed_at_any_write(
    qemu: Any, played: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(1)
    record(tmp_path / "x.vmdk", requests, monkeypatch)
    assert requests[0].epochs[0] == [(72, b"\1")], "first of all, the file is in use"
    model, step, draw = Model(), 0, random.Random(2)
    for request in requests:
        allowed = Allowed(model)
        allowed.before(request)
        model.do(request)
        allowed.after(request)
        for offset, data in torn([write for epoch in request.epochs for write in epoch]):
            os.pwrite(played.fd, data, offset)
            step += 1
            everything = step % 25 == 0
            assert wrong(played, allowed, range(GRAINS) if everything else request.grains) == []
            if everything:
                spare, primary = played.entries()
                assert all(one == two for one, two in zip(spare, primary, strict=True) if two)
            if draw.random() < 0.001:
                compare_with_qemu(qemu, played)
                continue_elsewhere(played, tmp_path, draw)
        assert wrong(played, Allowed(model), request.grains) == [], "the request was acknowledged"
    assert step > 8 * ALLOCATIONS
    assert b"".join(played.look(range(GRAINS))) == model.content
    spare, primary = played.entries()
    assert spare == primary
    assert len(model.present) >= ALLOCATIONS
    assert {number for number, entry in enumerate(primary) if entry} == model.present
    compare_with_qemu(qemu, played)


def compare_with_qemu(qemu: Any, player: Player) -> None:
    checked = subprocess.run(["qemu-img", "check", player.path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert qemu.raw(player.path) == b"".join(player.look(range(GRAINS)))[: CAPACITY * 512]


def continue_elsewhere(player: Player, folder: Path, draw: random.Random) -> None:
    """What a crash left is written on: new content where asked, the same as before elsewhere."""
    second = Player(player.path, folder / "second.vmdk")
    before = second.look(range(GRAINS))
    spare, primary = second.entries()
    with writer_of(second.path) as writer:
        for number in draw.sample(range(GRAINS - 1), 40):
            if primary[number] == spare[number]:
                before[number] = draw.randbytes(GRAIN_BYTES)
                writer.write(number * GRAIN, memoryview(before[number]))
            else:
                with pytest.raises(EngineError, match="vddkfs check"):
                    writer.write(number * GRAIN, memoryview(bytes([1]) * 512))
    assert second.look(range(GRAINS)) == before
    second.close()


# Power loss


def cut_power(player: Player, pending: list[Write], draw: random.Random) -> dict[int, bytes]:
    """Let some of *pending* arrive, as far as it does sector by sector; return what was there."""
    size = os.fstat(player.fd).st_size
    of_sector: dict[int, list[Write]] = defaultdict(list)
    for offset, data in pending:
        of_sector[offset // 512].append((offset, data))
    before = {sector: os.pread(player.fd, 512, sector * 512) for sector in of_sector}
    chance, late_data = draw.choice([0.1, 0.5, 0.9]), draw.random() < 0.3
    lost = []
    for sector, writes in of_sector.items():
        arrived = sum(draw.random() < chance for _ in writes)
        if late_data:
            arrived = 0 if sector * 512 >= size else len(writes)
        for offset, data in writes[:arrived]:
            os.pwrite(player.fd, data, offset)
        if not arrived:
            lost.append(sector)
    grown = os.fstat(player.fd).st_size
    for sector in lost:
        if size <= sector * 512 < grown:
            os.pwrite(player.fd, STALE, sector * 512)
    return before


def restore(player: Player, before: dict[int, bytes], size: int) -> None:
    for sector, content in before.items():
        os.pwrite(player.fd, content, sector * 512)
    os.ftruncate(player.fd, size)


def lose_power(player: Player, requests: list[Request], draws: int) -> tuple[int, list[str]]:
    """Play *requests*, and cut the power *draws* times before each barrier.

    Returns how often that was, and what was wrong afterwards.
    """
    problems: list[str] = []
    cuts, draw = 0, random.Random(3)
    model, pending = Model(), list[Write]()
    allowed = Allowed(model)
    end = Request(0, b"")
    end.epochs.append([])
    for request in [*requests, end]:
        only = Allowed(model)
        only.before(request)
        allowed.before(request)
        model.do(request)
        only.after(request)
        allowed.after(request)
        for index, epoch in enumerate(request.epochs):
            if index:
                for _ in range(draws):
                    size = os.fstat(player.fd).st_size
                    before = cut_power(player, pending, draw)
                    all_of_it = draw.random() < 0.05
                    problems += wrong(
                        player, allowed, range(GRAINS) if all_of_it else sorted(allowed.versions)
                    )
                    restore(player, before, size)
                    cuts += 1
                for offset, data in pending:
                    os.pwrite(player.fd, data, offset)
                # A barrier: of all before only what this request may still change is open.
                pending, allowed = [], only
            pending += torn(epoch)
    return cuts, problems


@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_power_lost_between_barriers(
    guarded: bool, played: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not guarded:
        monkeypatch.setattr(WritableFile, "sync", lambda self: None)
    requests = make_requests(1)
    record(tmp_path / "x.vmdk", requests, monkeypatch)
    barriers = sum(len(request.epochs) - 1 for request in requests)
    cuts, problems = lose_power(played, requests, draws=4 if guarded else 20)
    if guarded:
        assert barriers > 200
        assert cuts == (barriers + 1) * 4
        assert problems == []
    else:
        assert barriers == 0
        assert len(problems) > 100


def test_one_barrier_a_request(
    played: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it allocates: a sequential writer of 1 MiB waits once for each."""
    requests = [Request(start, b"\1" * 256 * 512) for start in range(0, 7 * 1024, 256)]
    record(tmp_path / "x.vmdk", requests, monkeypatch)
    assert [len(request.epochs) - 1 for request in requests] == [2] + [1] * (len(requests) - 1)
    plain = [request for request in requests[1:] if len(request.epochs[0]) == 1]
    assert len(plain) >= len(requests) - 3, "the grains are one write, but for a new table"
    assert all(len(request.epochs[1]) == 2 for request in plain), "and their entries two"
