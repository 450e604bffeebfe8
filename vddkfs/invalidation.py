"""Dropping old content on demand: what ``vddkfs invalidate`` and SIGHUP ask of the daemon.

Names of files become ranges of images. Each disk drops what is kept of them below the kernel, from
the source up; after that the kernel is told to forget its pages of every file that shows any of
those bytes. Disks do not wait for one another. The source is waited for as long as its worker is,
the kernel for KERNEL_SECONDS.

All ranges are [start, end) in bytes, of an image or of a file as said.
"""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import trio

from vddkfs.disks.disk import Disk
from vddkfs.disks.image import Image
from vddkfs.engines.base import Step
from vddkfs.errors import UsageError, VddkfsError, WorkerFailed
from vddkfs.fuse.tree import Folder, Node, Partitions, Tree, Window
from vddkfs.loops import Range, readers, steps
from vddkfs.mountinfo import Table, entries
from vddkfs.mounts import mounted_at
from vddkfs.report import line

log = logging.getLogger(__name__)

KERNEL_SECONDS: Final = 5.0
"""How long the kernel's reads of a file are waited for: with a disk that hangs they do not end."""
_LOOK_SECONDS: Final = 10.0
"""How long a partition is looked for that nobody has looked at yet."""

Drop = Callable[[int, int, int], Awaitable[bool]]
"""(inode, start, size) of a file to whether the kernel knew it; see ``KernelPages.drop``."""


class Part(NamedTuple):
    """What the file *window* shows of a range of its image: [*start*, *end*) of the file."""

    window: Window
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes, 0 if it goes on to the end of the file."""
        return 0 if self.end == self.window.size else self.end - self.start


class Outcome(msgspec.Struct, frozen=True):
    """What was done, and which *ranges* of which files it was about."""

    steps: tuple[Step, ...]
    ranges: tuple[Range, ...]


async def wanted(
    tree: Tree, names: Iterable[str], start: int = 0, length: int | None = None
) -> dict[Image, tuple[int, int]]:
    """Return which range of which images the files and folders *names* are about.

    *start* and *length* are of each file; a folder is about all of the images in it. Ranges of one
    image become one that has them all. Raises UsageError, or what reading a partition table raises.
    """
    found: dict[Image, tuple[int, int]] = {}
    for name in names:
        for image, first, last in _ranges(name, await _node(tree, name), start, length):
            before = found.get(image, (first, last))
            found[image] = min(before[0], first), max(before[1], last)
    return found


async def _node(tree: Tree, name: str) -> Node:
    node: Node = tree.root
    for part in filter(None, name.split("/")):
        if not isinstance(node, Folder):
            break
        child = node.children.get(part) or (await _entries(name, node)).get(part)
        if child is None:
            break
        node = child
    else:
        return node
    raise UsageError(f"{name}: no such file in the mount")


async def _entries(name: str, folder: Folder) -> dict[str, Node]:
    with trio.move_on_after(_LOOK_SECONDS):
        return dict(await folder.entries())
    raise WorkerFailed(
        f"{name}: the partition table cannot be read now",
        advice="name disk.raw: it has the same bytes",
    )


def _ranges(
    name: str, node: Node, start: int, length: int | None
) -> Iterator[tuple[Image, int, int]]:
    if isinstance(node, Window):
        end = node.size if length is None else min(node.size, start + length)
        if end <= start:
            raise UsageError(
                f"{name}: it has {node.size} bytes, the range begins at {start}",
                advice="name a range inside the file",
            )
        yield node.image, node.start + start, node.start + end
        return
    images = dict.fromkeys(_images(node))
    if not images:
        raise UsageError(
            f"{name}: it is made anew at each open",
            advice="name disk.raw: what this tells of goes with it",
        )
    if start or length is not None:
        raise UsageError(
            f"{name}: a range is one of a file, and this is a folder",
            advice="name the file, such as disk.raw, or leave --range out",
        )
    yield from ((image, 0, image.capacity) for image in images)


def _images(node: Node) -> Iterator[Image]:
    if isinstance(node, Window | Partitions):
        yield node.image
    elif isinstance(node, Folder):
        for child in node.children.values():
            yield from _images(child)


def parts(tree: Tree, image: Image, start: int, end: int) -> list[Part]:
    """Return what of [*start*, *end*) of *image* each of its files shows, former ones too.

    A former file has gone from the tree, but who had it open may still read it.
    """
    found = []
    for node in tree.nodes.values():
        if isinstance(node, Window) and node.image is image:
            first = max(start, node.start) - node.start
            last = min(end, node.start + node.size) - node.start
            if first < last:
                found.append(Part(node, first, last))
    return found


class Invalidation:
    """Has everything that is older than a call dropped, in one mount.

    *drop* has the kernel forget pages.
    """

    def __init__(self, tree: Tree, disks: Sequence[Disk], drop: Drop) -> None:
        self._tree = tree
        self._disks = disks
        self._drop = drop
        self._under_way: dict[object, tuple[str, float]] = {}

    async def __call__(
        self, names: Iterable[str] = ("",), start: int = 0, length: int | None = None
    ) -> Outcome:
        """Drop what is kept of files by their *names* in the mount, "" for everything.

        What could not be done is a step that says so. Raises VddkfsError as ``wanted`` does.
        """
        plan = await wanted(self._tree, names, start, length)
        taken: list[list[Step]] = []
        async with trio.open_nursery() as nursery:
            for disk in self._disks:
                ours = {image: plan[image] for image in disk.images if image in plan}
                taken.append([])
                if ours:
                    nursery.start_soon(self._disk, disk, ours, taken[-1])
        ranges = {
            Range(name, part.start, part.end)
            for image, (first, last) in plan.items()
            for part in parts(self._tree, image, first, last)
            for name in part.window.names
        }
        in_order = sorted(ranges, key=lambda one: (one.name, one.start))
        return Outcome(tuple(step for each in taken for step in each), tuple(in_order))

    async def _disk(
        self, disk: Disk, plan: dict[Image, tuple[int, int]], taken: list[Step]
    ) -> None:
        """Take all steps for one disk, and add them to *taken* in their order."""
        for span in dict.fromkeys(plan.values()):
            images = [image for image in plan if plan[image] == span]
            whole = all(span == (0, image.capacity) for image in images)
            began = time.perf_counter()
            with self._noted(f"{disk.name}: the source is asked anew"):
                try:
                    taken += await disk.invalidate(images, span[0], None if whole else span[1])
                except VddkfsError as error:
                    # A worker's places; whatever they are, the kernel's can be done all the same.
                    seconds = time.perf_counter() - began
                    taken.append(Step("library", disk.name, str(error), seconds, done=False))
        kernel: dict[Image, Step] = {}
        with self._noted(f"{disk.name}: reads that the kernel has sent"):
            async with trio.open_nursery() as nursery:
                for image, (first, last) in plan.items():
                    shown = parts(self._tree, image, first, last)
                    nursery.start_soon(self._kernel, image, shown, kernel)
        taken += [kernel[image] for image in plan]

    async def _kernel(self, image: Image, shown: Sequence[Part], taken: dict[Image, Step]) -> None:
        """Have the kernel forget the pages of all *shown*."""
        began = time.perf_counter()
        told = dict.fromkeys(shown, "the kernel still waits for reads under way")

        async def forget(part: Part) -> None:
            try:
                knew = await self._drop(part.window.inode, part.start, part.size)
                told[part] = "dropped" if knew else "nothing was kept"
            except OSError as error:
                told[part] = str(error)

        with trio.move_on_after(KERNEL_SECONDS):
            async with trio.open_nursery() as nursery:
                for part in shown:
                    nursery.start_soon(forget, part)
        seconds = time.perf_counter() - began
        taken[image] = _kernel_step(image.name, list(told.items()), seconds)

    @contextlib.contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        key = object()
        self._under_way[key] = what, time.monotonic()
        try:
            yield
        finally:
            del self._under_way[key]

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer the command: ``names``, ``start`` and ``length`` to an Outcome."""
        outcome = await self(request["names"], request["start"], request["length"])
        found: dict[str, Any] = msgspec.to_builtins(outcome)
        return found

    async def waiting(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Answer what is waited for now, and for how many seconds already."""
        now = time.monotonic()
        told = [{"what": what, "seconds": now - since} for what, since in self._under_way.values()]
        return {"waiting": told}

    async def on_hangups(self, signals: AsyncIterator[int], mountpoint: str) -> None:
        """Drop everything at each of *signals*, and log what was done; never returns by itself."""
        async for _ in signals:
            log.info("SIGHUP: everything that is kept of %s is dropped", mountpoint)
            try:
                outcome = await self()
                above = await trio.to_thread.run_sync(
                    _above, mountpoint, outcome.ranges, abandon_on_cancel=True
                )
            except Exception:
                log.exception("a bug in vddkfs: SIGHUP was not followed")
                continue
            for step in (*outcome.steps, *above):
                log.log(logging.INFO if step.done else logging.WARNING, "%s", line(step))


def _above(mountpoint: str, ranges: Iterable[Range]) -> list[Step]:
    """Name the loop devices and guests above the files of the mount at *mountpoint*. Blocks."""
    mounted = mounted_at(mountpoint)
    return steps(readers(mounted.device, ranges, Table(entries()))) if mounted else []


def _kernel_step(name: str, told: Sequence[tuple[Part, str]], seconds: float) -> Step:
    """Return what came of the files of the image *name*, in one step."""
    failed = [
        f"{part.window.names[0]}: {what}"
        for part, what in told
        if what not in ("dropped", "nothing was kept")
    ]
    if failed:
        return Step("kernel", name, "; ".join(failed), seconds, done=False)
    dropped = [part.window.names[0] for part, what in told if what == "dropped"]
    what = f"dropped: {', '.join(dropped)}" if dropped else "the kernel had nothing"
    return Step("kernel", name, what, seconds)
