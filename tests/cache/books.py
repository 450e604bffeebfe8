"""What must hold of the cache's books at any moment, and what when nothing is under way.

A slot that is accounted for twice shows two readers each other's sectors; one that is not accounted
for at all is memory that the mount never gets back. Tests see neither in what is read, not for a
long time, so the private books are looked at here, and only here.
"""

from collections.abc import Collection, Iterable

from vddkfs.cache.arena import FRAME, Arena, Chunk, Frame, Slot
from vddkfs.cache.frames import DiskCache
from vddkfs.cache.runs import Run
from vddkfs.cache.sector_cache import FETCHES_AHEAD, ImageCache


def indexed(image: ImageCache) -> dict[int, Run]:
    """Return what readers of *image* find, by block."""
    return image._index


def kept(disk: DiskCache) -> list[Run]:
    """Return what *disk* keeps, without a use of it."""
    return [disk._kept[key] for key in disk._kept]


def waits_for_memory(disk: DiskCache) -> int:
    """Return how many tasks wait for a slot of *disk*."""
    return len(disk._want)


def check_arena(arena: Arena, in_the_making: int = 0) -> None:
    """See that the arena has what it says, within its limit."""
    owned = [chunk for chunks in arena.chunks.values() for chunk in chunks]
    assert len({*owned, *arena._spare}) == len(owned) + len(arena._spare), "a chunk is there twice"
    assert arena.count == len(owned) + len(arena._spare) + in_the_making, "chunks are lost"
    assert arena.size <= arena.limit * arena.chunk_size, "more memory than the limit"
    for key, chunks in arena.chunks.items():
        assert all(chunk.owner == key for chunk in chunks)


def check_disk(disk: DiskCache, images: Iterable[ImageCache], moving: int | None = None) -> None:
    """See that each part of the disk's memory is in exactly one place.

    *moving* is the number of a chunk that is on its way to another disk.
    """
    chunks = [c for c in disk.arena.chunks.get(disk.key, ()) if c.number != moving]
    assert disk.bytes_held <= disk.arena.limit * disk.arena.chunk_size
    _check_frames(disk, chunks)
    runs = kept(disk)
    for run in runs:
        assert run.kept, "it is kept and does not know"
        assert run.ready, "it is kept before it is there"
        assert run.slot.tenant is run, "it is kept and its slot is another's"
        assert disk._kept.get(run.key) is run
    tenants = {run for run in _tenants(chunks) if run.kept}
    assert tenants == set(runs), "slots hold what is not kept, or what is kept has no slot"
    assert sum(run.weight for run in runs) == disk._kept.currsize, "weights do not add up"
    assert 0 <= disk.fetches_ahead <= FETCHES_AHEAD
    for image in images:
        for block, run in indexed(image).items():
            assert run.home is image
            assert run.start <= block * image.block < run.end, "found where it is not"
            assert run.kept or (not run.ready and run.error is None), "found and not there"
            assert run.slot.tenant is run


def check_pins(disk: DiskCache, requests: Iterable[Slot], late: Iterable[Slot]) -> None:
    """See that slots are pinned by just who uses them, once all tasks wait.

    *requests* has the slots of what is asked for, *late* those that a lost worker may write to.
    """
    pins: dict[Slot, int] = {}
    for slot in [*requests, *late]:
        pins[slot] = pins.get(slot, 0) + 1
        assert slot in slot.frame.slots, "memory that is written to was cut anew"
    for slot in late:
        assert slot.tenant is None or not slot.tenant.kept, "a lost worker writes to what is kept"
    for chunk in disk.arena.chunks.get(disk.key, ()):
        for frame in chunk.frames:
            for slot in frame.slots:
                readers = slot.tenant.pins if isinstance(slot.tenant, Run) else 0
                assert slot.pins == pins.get(slot, 0) + readers, "a pin is forgotten, or missing"


def check_quiet(disk: DiskCache, images: Collection[ImageCache]) -> None:
    """See that nothing is left over, once nothing is asked for and nobody reads."""
    check_disk(disk, images)
    check_pins(disk, (), ())
    assert not disk.fetches_ahead, "fetches ahead are counted that are not there"
    assert not waits_for_memory(disk), "somebody waits for memory"
    found = {run for image in images for run in indexed(image).values()}
    assert found == set(kept(disk)), "memory is kept for what nobody finds"
    assert not any(run.waiters for run in found), "somebody waits for what is there"


def _tenants(chunks: Iterable[Chunk]) -> Iterable[Run]:
    for chunk in chunks:
        for frame in chunk.frames:
            for slot in frame.slots:
                if isinstance(slot.tenant, Run):
                    yield slot.tenant


def _check_frames(disk: DiskCache, chunks: list[Chunk]) -> None:
    all_frames = {frame for chunk in chunks for frame in chunk.frames}
    free = list(disk.free._frames)
    assert len(set(free)) == len(free), "a frame is free twice"
    assert all_frames.issuperset(free), "another's frame is free"
    assert not set(free) & disk._cut.keys(), "a frame is free, and cut"
    assert all_frames.issuperset(disk._cut), "blocks are cut from another's frame"
    for frame in free:
        assert not frame.pins, "a free frame is pinned"
        assert not frame.slots, "a free frame has slots"
    for frame in all_frames.difference(free):
        _check_slots(disk, frame)


def _check_slots(disk: DiskCache, frame: Frame) -> None:
    offset = frame.offset
    for slot in frame.slots:
        assert slot.frame is frame
        assert slot.offset == offset, "slots overlap, or leave something out"
        assert slot.size in (disk.block, FRAME)
        offset += slot.size
    assert offset == frame.offset + FRAME, "a frame is neither free nor used"
    assert frame.pins == sum(slot.pins for slot in frame.slots)
    listed = disk._cut.get(frame, [])
    to_be_had = set(listed)
    assert frame not in disk._cut or to_be_had, "a cut frame without blocks to be had"
    assert len(to_be_had) == len(listed), "a block is free twice"
    assert to_be_had.issubset(frame.slots)
    for slot in frame.slots:
        assert slot.pins >= 0, "undone more often than done"
        used = slot.pins > 0 or (slot.tenant is not None and slot.tenant.kept)
        assert used != (slot in to_be_had), "free and used, or neither"
        assert used or slot.tenant is None
