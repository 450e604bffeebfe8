"""Reading without waiting, and seeing what others write."""

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.engines.vmdk.tables import TableCache
from vddkfs.errors import SourceMissing, StaleImage

Read = Callable[..., bytes]
Nowait = Callable[..., bytes | None]

GRAIN = 128 * 512


def fill(letter: str, size: int = GRAIN) -> bytes:
    return letter.encode() * size


# Not waiting


def test_nowait_needs_the_table(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, nowait: Nowait
) -> None:
    engine = opened(make.sparse("x.vmdk", 1024, {0: fill("a"), 1: fill("b")}))
    assert nowait(engine, 0, 8) is None
    assert nowait(engine, 100, 100) is None
    assert read(engine, 5, 1) == fill("a", 512)
    assert nowait(engine, 0, 8) == fill("a", 4096)
    assert nowait(engine, 100, 100) == fill("a", 28 * 512) + fill("b", 72 * 512)


def test_nowait_direct_reads_the_table_itself(
    make: Any, opened: Callable[..., VmdkEngine], nowait: Nowait
) -> None:
    engine = opened(make.sparse("x.vmdk", 1024, {0: fill("a"), 1: fill("b")}))
    assert nowait(engine, 0, 8, direct=True) == fill("a", 4096)
    assert nowait(engine, 100, 100, direct=True) == fill("a", 28 * 512) + fill("b", 72 * 512)
    assert nowait(engine, 500, 8, direct=True) == bytes(4096)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_nowait_gives_up(
    make: Any,
    opened: Callable[..., VmdkEngine],
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    nowait: Nowait,
) -> None:
    engine = opened(make.flat("x", fill("f", 100 * 512)))
    whole, calls = os.preadv, []

    def unwilling(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            calls.append(offset)
            raise OSError(number, os.strerror(number))
        return whole(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", unwilling)
    for _ in range(3):
        assert nowait(engine, 3, 2) is None
        assert nowait(engine, 3, 2, direct=True) is None
    assert read(engine, 3, 2) == fill("f", 1024)
    # A full queue passes; a file system without the flag is not asked again.
    assert len(calls) >= 6 if number == errno.EAGAIN else len(calls) == 1


# Coherence


def set_entry(path: str, index: int, entry: int, at: int = 22) -> None:
    """Change a grain table entry of a file that ``make.sparse`` wrote."""
    with open(path, "r+b") as file:
        file.seek(at * 512 + index * 4)
        file.write(struct.pack("<I", entry))


def test_direct_sees_what_others_write(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, nowait: Nowait
) -> None:
    path = make.sparse("x.vmdk", 1024, {0: fill("a"), 1: fill("b"), 5: 0})
    engine = opened(path)
    assert read(engine, 0, 8) == fill("a", 4096)
    set_entry(path, 5, 256)
    assert read(engine, 640, 8) == bytes(4096), "a cached table is what this test is about"
    assert read(engine, 640, 8, direct=True) == fill("b", 4096)
    assert nowait(engine, 640, 8, direct=True) == fill("b", 4096)
    assert read(engine, 600, 100, direct=True) == bytes(40 * 512) + fill("b", 60 * 512)
    engine.revalidate()
    assert read(engine, 640, 8) == fill("b", 4096)


def test_direct_sees_a_new_table(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, nowait: Nowait
) -> None:
    path = make.sparse("x.vmdk", 2 * 65536, {0: fill("a"), 512: fill("b")})
    with open(path, "r+b") as file:
        file.seek(21 * 512 + 4)
        place = file.read(4)
        file.seek(21 * 512 + 4)
        file.write(bytes(4))
    engine = opened(path)
    assert read(engine, 65536, 8) == bytes(4096)
    assert nowait(engine, 65536, 8, direct=True) == bytes(4096)
    with open(path, "r+b") as file:
        file.seek(21 * 512 + 4)
        file.write(place)
    assert read(engine, 65536, 8) == bytes(4096)
    assert read(engine, 65536, 8, direct=True) == fill("b", 4096)
    assert read(engine, 65500, 50, direct=True)[-512:] == fill("b", 512)


def test_frozen_links_keep_their_tables(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.sparse("base.vmdk", 1024, {0: fill("a")}, cid="00000001")
    engine = opened(make.sparse("x.vmdk", 1024, {}, parent="00000001", hint="base.vmdk"))
    assert read(engine, 0, 8) == fill("a", 4096)
    whole, calls = os.preadv, []

    def counting(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        calls.append(fd)
        return whole(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", counting)
    assert read(engine, 0, 8) == fill("a", 4096)
    assert len(calls) == 1, "the grain"
    calls.clear()
    # The last link's directory has no table: one look there, then the base's two tables and grain.
    assert read(engine, 0, 8, direct=True) == fill("a", 4096)
    assert len(calls) == 4, "past all caches"


def test_identities_and_revalidation(
    make: Any, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    base = make.flat("base", fill("a", 100 * 512), cid="00000001")
    leaf = make.sparse("x.vmdk", 100, {}, parent="00000001", hint="base.vmdk", cid="00000002")
    engine = opened(leaf)
    before = engine.identities()
    assert [identity.path for identity in before] == [base, leaf]
    assert engine.revalidate() == before
    os.utime(leaf, ns=(1, 1))
    after = engine.revalidate()
    assert not before[1].replaced_by(after[1])
    assert "modified" in before[1].difference(after[1])
    assert engine.identities() == after
    (make.folder / "base.vmdk").write_text(Path(base).read_text().replace("00000001", "0000000f"))
    after = engine.revalidate()
    assert "content id" in before[0].difference(after[0])
    assert engine.identities()[0] == before[0]
    os.unlink(base)
    with pytest.raises(SourceMissing):
        engine.revalidate()
    assert read(engine, 0, 1) == fill("a", 512)


@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_tables_of_frozen_links_are_dropped_on_demand(
    guarded: bool,
    make: Any,
    opened: Callable[..., VmdkEngine],
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody writes a link that nobody should: only who is asked to look sees it."""
    if not guarded:
        monkeypatch.setattr(TableCache, "clear", lambda self: None)
    base = make.sparse("base.vmdk", 1024, {0: fill("a"), 1: fill("b"), 5: 0}, cid="00000001")
    leaf = make.sparse("x.vmdk", 1024, {}, parent="00000001", hint="base.vmdk")
    engine = opened(leaf)
    assert read(engine, 640, 8) == bytes(4096)
    set_entry(base, 5, 256)
    engine.revalidate()
    assert read(engine, 640, 8) == bytes(4096), "what is frozen is not read again at each open"
    found = engine.renew()
    assert read(engine, 640, 8) == (fill("b", 4096) if guarded else bytes(4096))
    assert [identity.path for identity in found.identities] == [base, leaf]
    assert "modified" in engine.identities()[0].difference(found.identities[0])
    assert [(step.place, step.subject, step.done) for step in found.steps] == [
        ("tables", base, True),
        ("tables", leaf, True),
    ]
    assert "it is not what was opened" in found.steps[0].told
    assert found.steps[1].told == "its files are opened again, and its tables are dropped"


@pytest.mark.parametrize("guarded", [False, True], ids=["trap", "guard"])
def test_tables_of_the_last_link_are_dropped_on_demand(
    guarded: bool,
    make: Any,
    opened: Callable[..., VmdkEngine],
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = make.sparse("x.vmdk", 1024, {0: fill("a"), 1: fill("b"), 5: 0})
    engine = opened(path)
    if not guarded:
        monkeypatch.setattr(TableCache, "clear", lambda self: None)
        monkeypatch.setattr(TableCache, "new_keys", lambda self: 0)
    assert read(engine, 640, 8) == bytes(4096)
    set_entry(path, 5, 256)
    engine.renew()
    assert read(engine, 640, 8) == (fill("b", 4096) if guarded else bytes(4096))


def test_all_files_of_a_chain_are_opened_again(
    make: Any, opened: Callable[..., VmdkEngine], read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.flat("base", fill("a", 100 * 512), cid="00000001")
    engine = opened(make.sparse("x.vmdk", 100, {}, parent="00000001", hint="base.vmdk"))
    before = len(os.listdir("/proc/self/fd"))
    plain, names = os.open, []

    def noting(name: str, flags: int) -> int:
        names.append(os.path.basename(name))
        return plain(name, flags)

    monkeypatch.setattr(os, "open", noting)
    found = engine.renew()
    monkeypatch.undo()
    assert sorted(names) == ["base-flat.vmdk", "base.vmdk", "x.vmdk"]
    assert len(os.listdir("/proc/self/fd")) == before
    assert found.identities == engine.identities()
    assert read(engine, 0, 100) == fill("a", 100 * 512)


def test_a_renewed_chain_that_became_damaged_or_another(
    make: Any, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    base = make.flat("base", fill("a", 100 * 512), cid="00000001")
    leaf = make.sparse("x.vmdk", 100, {0: fill("l")}, parent="00000001", hint="base.vmdk")
    engine = opened(leaf)
    content = Path(leaf).read_bytes()
    with open(leaf, "r+b") as file:
        file.truncate(700)
    found = engine.renew()
    assert found.identities[1].problem
    assert "it is damaged: " in found.steps[1].told
    Path(leaf).write_bytes(content)
    make.flat("other", fill("z", 100 * 512), cid="00000001")
    os.replace(make.folder / "other-flat.vmdk", make.folder / "base-flat.vmdk")
    before = engine.identities()
    found = engine.renew()
    assert "replaced" in before[0].difference(found.identities[0])
    assert engine.identities()[0] == before[0]
    assert read(engine, 0, 1, image=0) == fill("a", 512), "until the chain is opened anew"
    os.unlink(base)
    with pytest.raises(SourceMissing):
        engine.renew()
    assert read(engine, 0, 1) == fill("l", 512)


def test_replaced_leaf_is_reported_and_not_read(
    make: Any, opened: Callable[..., VmdkEngine], read: Read
) -> None:
    path = make.sparse("x.vmdk", 1024, {0: fill("a")})
    engine = opened(path)
    before = engine.identities()
    make.sparse("y.vmdk", 1024, {0: fill("z")})
    os.replace(make.folder / "y.vmdk", path)
    (after,) = engine.revalidate()
    assert "replaced" in before[0].replaced_by(after)
    assert engine.identities() == before
    assert read(engine, 0, 1) == fill("a", 512)


def test_leaf_rewritten_in_place(make: Any, opened: Callable[..., VmdkEngine], read: Read) -> None:
    """The same file with another lay-out: nothing of the old header may be used."""
    path = make.sparse("x.vmdk", 1024, {0: fill("a")})
    engine = opened(path)
    assert read(engine, 0, 1) == fill("a", 512)
    make.sparse("x.vmdk", 1024, {0: fill("z", 4096)}, grain=8)
    engine.revalidate()
    assert read(engine, 0, 9) == fill("z", 4096) + bytes(512)


def test_replaced_while_opening(
    make: Any, opened: Callable[..., VmdkEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make.sparse("x.vmdk", 1024, {})
    other = make.sparse("y.vmdk", 1024, {})
    plain = os.open

    def slow(name: str, flags: int) -> int:
        fd = plain(name, flags)
        if name == path:
            os.replace(other, path)
        return fd

    monkeypatch.setattr(os, "open", slow)
    with pytest.raises(StaleImage, match=r"x\.vmdk"):
        VmdkEngine([path])
