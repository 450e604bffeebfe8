"""Dropping old content: names to ranges of images, ranges to files, and what is told of it."""

import errno
import json
import logging
import signal
from collections.abc import AsyncIterator, Callable, Collection
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tests.fuse.test_tree import SECTORS, FakeImage, find, make_disk, make_tree
from vddkfs import invalidation
from vddkfs.disks.partitions import Partition, PartitionTable
from vddkfs.engines.base import Step
from vddkfs.errors import EngineError, StaleImage, UsageError, WorkerFailed
from vddkfs.fuse.tree import Tree
from vddkfs.invalidation import Invalidation, Outcome, parts, wanted
from vddkfs.loops import Guest, Range, Reader

SIZE = SECTORS * 512
PART = (512 * 1024, 1024 * 1024)
"""Start and size of the one partition."""
TABLE = PartitionTable("dos", (Partition(1, *PART, "0x83"),))


class Disk:
    """A disk that notes what it is to drop."""

    def __init__(self, name: str = "web", links: int = 3) -> None:
        self.name = name
        self.images: tuple[FakeImage, ...] = make_disk(name, links).images
        for image in self.images:
            image.name = f"{name}/chain/{image.number}.raw"
        self.top = self.images[-1]
        self.top.table = TABLE
        self.calls: list[tuple[list[int], int, int | None]] = []
        self.error: Exception | None = None
        self.may_end = trio.Event()
        self.may_end.set()
        self.told: list[str] = []

    async def invalidate(
        self, images: Collection[Any], start: int = 0, end: int | None = None
    ) -> list[Step]:
        self.calls.append(([image.number for image in images], start, end))
        await self.may_end.wait()
        self.told.append("source")
        if self.error is not None:
            raise self.error
        return [Step("device", self.name, "none", 0.0), Step("cache", self.name, "dropped", 0.1)]


class Kernel:
    """Notes what it is to forget."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int]] = []
        self.answers: dict[int, bool | OSError] = {}
        self.stuck: set[int] = set()
        self.before: Callable[[], None] = lambda: None

    async def drop(self, inode: int, start: int, size: int) -> bool:
        self.before()
        self.told.append((inode, start, size))
        if inode in self.stuck:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        answer = self.answers.get(inode, True)
        if isinstance(answer, OSError):
            raise answer
        return answer


class Mount:
    def __init__(self, *names: str) -> None:
        self.disks = [Disk(name) for name in names or ("web",)]
        self.disk = self.disks[0]
        self.tree: Tree = make_tree(*self.disks)
        self.kernel = Kernel()
        self.drop: Any = Invalidation(self.tree, self.disks, self.kernel.drop)  # type: ignore[arg-type]

    def inode(self, path: str) -> int:
        inode: int = find(self.tree, path).inode
        return inode


@pytest.fixture
async def mount() -> Mount:
    found = Mount("web")
    await find(found.tree, "web/partitions").entries()
    return found


async def plan(mount: Mount, *names: str, start: int = 0, length: int | None = None) -> Any:
    found = await wanted(mount.tree, names, start, length)
    return {image.name: span for image, span in found.items()}


# Names


ALL = {f"web/chain/{number}.raw": (0, SIZE) for number in range(3)}
TOP = {"web/chain/2.raw": (0, SIZE)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", ALL),
        ("/", ALL),
        ("web", ALL),
        ("web/chain", ALL),
        ("web//chain/", ALL),
        ("web/disk.raw", TOP),
        ("web/chain/2.raw", TOP),
        ("web/partitions", TOP),
        ("web/chain/0.raw", {"web/chain/0.raw": (0, SIZE)}),
        ("web/partitions/1.raw", {"web/chain/2.raw": (PART[0], sum(PART))}),
    ],
)
async def test_a_name_is_about_images(name: str, expected: Any, mount: Mount) -> None:
    assert await plan(mount, name) == expected


@pytest.mark.parametrize(
    ("name", "start", "length", "expected"),
    [
        ("web/disk.raw", 0, 1, (0, 1)),
        ("web/disk.raw", 512, 4096, (512, 4608)),
        ("web/disk.raw", SIZE - 1, 10**15, (SIZE - 1, SIZE)),
        ("web/partitions/1.raw", 0, 512, (PART[0], PART[0] + 512)),
        ("web/partitions/1.raw", PART[1] - 5, 10, (sum(PART) - 5, sum(PART))),
    ],
)
async def test_a_range_is_of_the_file_and_cut_at_its_end(
    name: str, start: int, length: int, expected: tuple[int, int], mount: Mount
) -> None:
    found = await plan(mount, name, start=start, length=length)
    assert found == {"web/chain/2.raw": expected}


async def test_ranges_of_one_image_become_one(mount: Mount) -> None:
    names = ("web/partitions/1.raw", "web/disk.raw", "web/chain/0.raw")
    assert await plan(mount, *names, start=512, length=512) == {
        "web/chain/2.raw": (512, PART[0] + 1024),
        "web/chain/0.raw": (512, 1024),
    }


@pytest.mark.parametrize(
    ("name", "start", "length", "what"),
    [
        ("none", 0, None, "no such file"),
        ("web/disk.rav", 0, None, "no such file"),
        ("web/disk.raw/x", 0, None, "no such file"),
        ("web/partitions/2.raw", 0, None, "no such file"),
        ("web/../web/disk.raw", 0, None, "no such file"),
        ("vm.json", 0, None, "made anew"),
        ("web/map.json", 0, None, "made anew"),
        (".vddkfs", 0, None, "made anew"),
        ("web", 0, 512, "this is a folder"),
        ("", 512, 1, "this is a folder"),
        ("web/disk.raw", SIZE, 1, f"{SIZE} bytes"),
        ("web/partitions/1.raw", PART[1], 1, f"{PART[1]} bytes"),
    ],
)
async def test_what_cannot_be_meant_is_refused(
    name: str, start: int, length: int | None, what: str, mount: Mount
) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        await plan(mount, name, start=start, length=length)
    assert caught.value.message.startswith(f"{name}: ")


async def test_a_partition_is_looked_for_if_nobody_has_yet(
    autojump_clock: trio.testing.MockClock,
) -> None:
    mount = Mount()
    assert await plan(mount, "web/partitions/1.raw") == {"web/chain/2.raw": (PART[0], sum(PART))}
    assert mount.disk.top.looks == 1
    await plan(mount, "web/partitions/1.raw")
    assert mount.disk.top.looks == 1, "the disk is not needed for what is known"

    broken = Mount()
    broken.disk.top.error = EngineError("torn")
    with pytest.raises(EngineError, match="torn"):
        await plan(broken, "web/partitions/1.raw")

    hung = Mount()
    hung.disk.top.partitions = trio.sleep_forever  # type: ignore[method-assign,assignment]
    with pytest.raises(WorkerFailed, match="cannot be read now") as caught:
        await plan(hung, "web/partitions/1.raw")
    assert "disk.raw" in caught.value.advice
    assert trio.current_time() < 30


# Ranges of files


@given(start=st.integers(0, SIZE - 1), size=st.integers(1, SIZE))
def test_each_file_shows_its_part_of_a_range(start: int, size: int) -> None:
    mount = Mount()
    trio.run(find(mount.tree, "web/partitions").entries)
    end = min(SIZE, start + size)
    image: Any = mount.disk.top
    found = {part.window.names[0]: part for part in parts(mount.tree, image, start, end)}
    whole = found.pop("web/disk.raw")
    assert (whole.start, whole.end) == (start, end)
    assert whole.size == (0 if end == SIZE else end - start)
    first, last = max(start, PART[0]), min(end, sum(PART))
    if first < last:
        part = found.pop("web/partitions/1.raw")
        assert (part.window.start + part.start, part.window.start + part.end) == (first, last)
        assert part.size == (0 if last == sum(PART) else last - first)
    assert not found


async def test_former_files_are_told_of_too_as_they_may_still_be_open(mount: Mount) -> None:
    image: Any = mount.disk.top
    old = {mount.inode("web/disk.raw"), mount.inode("web/partitions/1.raw")}
    mount.tree.renew(image)
    found = parts(mount.tree, image, 0, SIZE)
    assert old < {part.window.inode for part in found}
    assert sorted(part.window.names[0] for part in found) == [
        "web/disk.raw",
        "web/disk.raw",
        "web/partitions/1.raw",
    ]


# Doing it


async def test_all_places_of_a_mount(mount: Mount) -> None:
    """The kernel comes last: what it reads again must find nothing old below."""
    calls = mount.disk.told
    mount.kernel.before = lambda: calls.append("kernel")
    outcome = await mount.drop()
    assert mount.disk.calls == [([0, 1, 2], 0, None)]
    assert calls == ["source", *["kernel"] * 4]
    paths = ("chain/0.raw", "chain/1.raw", "disk.raw", "partitions/1.raw")
    told = [(mount.inode(f"web/{path}"), 0, 0) for path in paths]
    assert sorted(mount.kernel.told) == sorted(told)
    assert [(step.place, step.subject, step.done) for step in outcome.steps] == [
        ("device", "web", True),
        ("cache", "web", True),
        ("kernel", "web/chain/0.raw", True),
        ("kernel", "web/chain/1.raw", True),
        ("kernel", "web/chain/2.raw", True),
    ]
    assert outcome.steps[-1].told == "dropped: web/disk.raw, web/partitions/1.raw"
    assert outcome.ranges == (
        Range("web/chain/0.raw", 0, SIZE),
        Range("web/chain/1.raw", 0, SIZE),
        Range("web/chain/2.raw", 0, SIZE),
        Range("web/disk.raw", 0, SIZE),
        Range("web/partitions/1.raw", 0, PART[1]),
    )


async def test_a_range_reaches_the_disk_the_kernel_and_the_answer(mount: Mount) -> None:
    start = PART[0] - 512
    outcome = await mount.drop(["web/disk.raw"], start, 4096)
    assert mount.disk.calls == [([2], start, start + 4096)]
    whole, part = mount.inode("web/disk.raw"), mount.inode("web/partitions/1.raw")
    assert sorted(mount.kernel.told) == [(whole, start, 4096), (part, 0, 3584)]
    assert outcome.ranges == (
        Range("web/chain/2.raw", start, start + 4096),
        Range("web/disk.raw", start, start + 4096),
        Range("web/partitions/1.raw", 0, 3584),
    )


async def test_images_with_one_range_are_done_together(mount: Mount) -> None:
    names = ["web/partitions/1.raw", "web/chain/0.raw", "web/chain/1.raw"]
    await mount.drop(names, 0, 512)
    assert mount.disk.calls == [([0, 1], 0, 512), ([2], PART[0], PART[0] + 512)]


async def test_only_disks_that_are_meant_are_touched() -> None:
    mount = Mount("a", "b")
    await mount.drop(["b/chain/1.raw"])
    assert [disk.calls for disk in mount.disks] == [[], [([1], 0, None)]]
    with pytest.raises(UsageError):
        await mount.drop(["a", "none"])
    assert mount.disks[0].calls == [], "one wrong name, and nothing is done"


async def test_disks_do_not_wait_for_one_another(
    autojump_clock: trio.testing.MockClock,
) -> None:
    mount = Mount("a", "b", "c")
    mount.disks[0].may_end = trio.Event()
    mount.disks[2].error = StaleImage("c: another disk")
    async with trio.open_nursery() as nursery:
        outcomes: list[Any] = []

        async def drop() -> None:
            outcomes.append(await mount.drop())

        nursery.start_soon(drop)
        await trio.sleep(12)
        [waiting] = (await mount.drop.waiting({}))["waiting"]
        assert waiting["what"].startswith("a: ")
        assert waiting["seconds"] >= 0
        assert len(mount.kernel.told) == 6, "b and c are through"
        assert outcomes == []
        mount.disks[0].may_end.set()
    [outcome] = outcomes
    assert (await mount.drop.waiting({})) == {"waiting": []}
    assert [step.subject for step in outcome.steps if not step.done] == ["c"]
    failed = next(step for step in outcome.steps if not step.done)
    assert (failed.place, failed.told) == ("library", "c: another disk")
    kernel = [step.subject for step in outcome.steps if step.place == "kernel"]
    assert len(kernel) == 9, "the kernel's pages are dropped all the same"
    assert kernel == sorted(kernel)


async def test_a_read_that_hangs_is_told_and_the_rest_goes_on(
    mount: Mount, autojump_clock: trio.testing.MockClock
) -> None:
    mount.kernel.stuck = {mount.inode("web/partitions/1.raw")}
    began = trio.current_time()
    outcome = await mount.drop()
    assert trio.current_time() - began == invalidation.KERNEL_SECONDS
    undone = [step for step in outcome.steps if not step.done]
    assert [(step.place, step.subject) for step in undone] == [("kernel", "web/chain/2.raw")]
    assert "web/partitions/1.raw: the kernel still waits for reads under way" in undone[0].told
    assert len(mount.kernel.told) == 4


async def test_what_the_kernel_says(mount: Mount) -> None:
    first, second = mount.inode("web/chain/0.raw"), mount.inode("web/chain/1.raw")
    mount.kernel.answers = {first: False, second: OSError(errno.ENOTCONN, "gone")}
    steps = [step for step in (await mount.drop()).steps if step.place == "kernel"]
    assert [step.done for step in steps] == [True, False, True]
    assert steps[0].told == "the kernel had nothing"
    assert "gone" in steps[1].told


async def test_two_at_once_are_both_answered(mount: Mount) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(mount.drop)
    assert len(mount.disk.calls) == 2
    assert len(mount.kernel.told) == 8


async def test_the_command_is_answered_with_what_json_can_hold(mount: Mount) -> None:
    request = {"names": ["web/disk.raw"], "start": 0, "length": 512}
    answer = json.loads(json.dumps(await mount.drop.answer(request)))
    assert answer["ranges"][0] == {"name": "web/chain/2.raw", "start": 0, "end": 512}
    assert answer["steps"][0]["place"] == "device"
    assert msgspec.convert(answer, Outcome).steps[0].place == "device"


# SIGHUP


async def hangups(count: int) -> AsyncIterator[int]:
    for _ in range(count):
        await trio.lowlevel.checkpoint()
        yield signal.SIGHUP


@pytest.fixture
def above(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have a loop device with a guest on disk.raw; note what was asked for."""
    seen: list[Any] = []

    def readers(device: str, ranges: Any, table: Any) -> list[Reader]:
        seen.append((device, tuple(ranges)))
        guest = Guest("/mnt/guest", "ext4", "/dev/loop0")
        return [Reader("/dev/loop0", "/mnt/web/web/disk.raw", (), (guest,))]

    monkeypatch.setattr(invalidation, "readers", readers)
    place = SimpleNamespace(device="0:50")
    monkeypatch.setattr(invalidation, "mounted_at", lambda name: place)
    return seen


async def test_sighup_does_all_and_logs_it(
    mount: Mount, above: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mount.kernel.answers = {mount.inode("web/chain/1.raw"): OSError(errno.EIO, "no")}
    await mount.drop.on_hangups(hangups(1), "/mnt/web")
    assert mount.disk.calls == [([0, 1, 2], 0, None)]
    [(device, ranges)] = above
    assert device == "0:50"
    assert Range("web/disk.raw", 0, SIZE) in ranges
    told = {r.getMessage(): r.levelno for r in caplog.records}
    assert any("SIGHUP" in text and "/mnt/web" in text for text in told)
    warnings = [text for text, level in told.items() if level == logging.WARNING]
    assert [text.split(": ")[:2] for text in warnings] == [
        ["kernel", "web/chain/1.raw"],
        ["loop", "/dev/loop0"],
        ["loop", "/mnt/guest"],
    ]
    assert any(text.startswith("cache: web: dropped (100 ms)") for text in told)


async def test_a_bug_at_sighup_is_logged_and_the_next_one_is_followed(
    mount: Mount, above: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    mount.disk.error = KeyError("oops")
    await mount.drop.on_hangups(hangups(2), "/mnt/web")
    assert len(mount.disk.calls) == 2
    assert caplog.text.count("a bug in vddkfs") == 2


async def test_sighup_when_the_mount_has_just_gone(
    mount: Mount, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(invalidation, "mounted_at", lambda name: None)
    await mount.drop.on_hangups(hangups(1), "/mnt/web")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
