"""What the tests of old content share: promises, sources that change behind a mount, and mounts
with a guard taken out.
"""

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests.end_to_end.mounting import COMMAND, Done, Mount, succeed, until, vddkfs
from tests.end_to_end.remote import Proxy, RemoteMount
from tests.end_to_end.vms import KIB, MIB, SECTOR, noise, write
from tests.simulator.disks import SIZE, raw, write_behind

PATCHED = Path(__file__).with_name("patched.py")
TOUCHING = Path(__file__).with_name("touching.py")
PIECE = 64 * KIB
BUFFERED = ("san.cache = buffered", "san.keep_open = yes")
"""A library that reads a LUN through its pages, whatever it is asked, and somebody else on this
machine who holds the LUN open."""
HEEDFUL = ("san.cache = flag", "san.keep_open = yes")

Test = TypeVar("Test", bound=Callable[..., Any])


def promise(name: str, sentence: str) -> Callable[[Test], Test]:
    """Say which promise of vddkfs-semantics(7) a test holds, by its *name* and its *sentence*.

    ``tests/contrib/test_manual.py`` compares both with the page, word by word.
    """

    def held(test: Test) -> Test:
        assert test.__name__.startswith("test_" + name.replace("-", "_"))
        assert sentence.endswith(".")
        return test

    return held


def invalidate(*words: str | Path, code: int = 0) -> Done:
    """Run the command, which has to end with *code*."""
    done = vddkfs("invalidate", *words)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(mount: Mount, daemon: str = "", worker: str = "") -> Mount:
    """Mount, with *daemon* run in the daemon before all else, and *worker* in its workers."""
    words = (sys.executable, "-I", PATCHED, daemon, worker, COMMAND, "mount", mount.source)
    succeed(*words, mount.place, "-o", ",".join(mount.options))
    mount.pid = int(mount.status()["pid"])
    return mount


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Write into a file as it is."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


class Source(NamedTuple):
    """A disk that somebody writes: *name* is its folder in the mount.

    *places* are offsets that nobody has written yet of *content*; *change* writes a piece there.
    """

    name: str
    content: bytes
    places: Sequence[int]
    change: Callable[[int, bytes], None]

    @property
    def file(self) -> str:
        return f"{self.name}/disk.raw"


def flat_pieces(content: bytes) -> Iterator[int]:
    """Yield offsets of pieces, far from one another."""
    yield from range(MIB // 2, len(content) - PIECE, MIB)


def holes(content: bytes) -> Iterator[int]:
    """Yield offsets of pieces that are all zeros, no two beside each other."""
    found = -PIECE
    for at in range(0, len(content) - PIECE, PIECE):
        if at > found + PIECE and not any(content[at : at + PIECE]):
            found = at
            yield at


def over_san(
    proxy: Proxy, *disks: str, options: Sequence[str] = (), daemon: str = "", worker: str = ""
) -> RemoteMount:
    """Mount *disks* of one VM over SAN, on any machine with loop devices."""
    moref = "vm-16" if "web01" in disks[0] else "vm-17"
    words = ("transports=san", "san_check=no", *options)
    mount = proxy.prepare(proxy.url(*disks, moref=moref), *words)
    start(mount, daemon, worker)
    return mount


def extent(proxy: Proxy, name: str) -> Source:
    """Return the flat disk *name* of vm-17, written as a host does: past this machine's pages.

    Of a thin one the places are holes.
    """
    disk = f"[ds1] plain/{name}.vmdk"
    content = proxy.raw(disk)
    flat = proxy.kit.disk(disk).with_name(f"{name}-flat.vmdk")
    places = holes(content) if name == "thin" else flat_pieces(content)
    return Source(name, content, list(places), lambda at, data: write_behind(flat, at, data))


LEAF = "[ds1] web01/web01-000002.vmdk"


def leaf(proxy: Proxy) -> Source:
    """Return the leaf of vm-16, whose VM allocates in it: its content moves on the datastore."""
    content = proxy.raw(LEAF)
    path = proxy.kit.disk(LEAF)
    places = list(holes(content))
    return Source("web01-000002", content, places, lambda at, data: write(path, at, data))


def delete_middle_snapshot(proxy: Proxy) -> bytes:
    """Have the host merge the middle link of vm-16 into the leaf, which its VM goes on to write.

    Returns what the leaf shows then.
    """
    path = proxy.kit.disk(LEAF)
    merged, data = path.with_name("merged.vmdk"), path.with_name("merged.raw")
    content = bytearray(raw(path))
    for at in range(0, SIZE, PIECE):
        content[at : at + SECTOR] = noise(("merged", at), SECTOR)
    data.write_bytes(content)
    words = ("qemu-img", "create", "-q", "-f", "vmdk", "-b", "web01.vmdk", "-F", "vmdk", merged)
    succeed(*words, cwd=path.parent)
    succeed("qemu-io", "-f", "vmdk", "-c", f"write -s {data} 0 {SIZE}", merged)
    data.unlink()
    merged.rename(path)
    path.with_name("web01-000001.vmdk").unlink()
    middle = "[snapshot snapshot-2]\nvm = vm-16\ndisk = [ds1] web01/web01-000001.vmdk\n"
    registry = (proxy.kit.site / "registry.conf").read_text()
    assert middle in registry
    proxy.kit.register(registry.replace(middle, ""))
    return bytes(content)


# How somebody looks who wants to see what is there now.

WAYS = ("invalidate", "open", "direct", "direct open")


def looks(mount: Mount, source: Source) -> dict[str, str]:
    """Change *source* under the mount; return which content each way of looking sees.

    invalidate: a file that is open, after ``vddkfs invalidate``; open: a file that is opened;
    direct and direct open: with O_DIRECT, a file that was open and one that is opened.
    """
    held, direct = mount.open(source.file), mount.open(source.file, direct=True)
    found = {}
    for way, at in zip(WAYS, source.places, strict=False):
        old, new = source.content[at : at + PIECE], noise((source.name, way), PIECE)
        assert mount.ask("pread", held, PIECE, at) == old
        source.change(at, new)
        assert mount.ask("pread", held, PIECE, at) == old, "somebody keeps it"
        if way == "invalidate":
            invalidate(mount.path(source.file))
        fd = mount.open(source.file, way == "direct open") if way.endswith("open") else held
        data = mount.ask("pread", direct if way == "direct" else fd, PIECE, at)
        found[way] = {old: "old", new: "new"}.get(data, "neither")
    assert len(found) == len(WAYS)
    return found


# Somebody who goes on meanwhile.


class Toucher:
    """A process of ``touching.py``, which can be killed."""

    def __init__(self, kind: str, *names: str | Path) -> None:
        words = [sys.executable, "-I", "-S", TOUCHING, kind, *names]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self, seconds: float = 20.0) -> str:
        """Return what it says next."""
        assert self._process.stdout is not None
        ready = select.select([self._process.stdout], [], [], seconds)[0]
        assert ready, f"nothing was touched for {seconds} s"
        return self._process.stdout.readline().strip()

    def seen(self) -> dict[str, int]:
        """Return what it has seen since it was asked last; from now on it touches everything."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, int] = json.loads(self.hear())
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=20)


@contextlib.contextmanager
def touching(kind: str, *names: str | Path) -> Iterator[Toucher]:
    """Have a process touch a file meanwhile; see ``touching.py``."""
    toucher = Toucher(kind, *names)
    try:
        assert toucher.hear() == "ready"
        yield toucher
    finally:
        toucher.close()


class Gate:
    """Has the built-in engine wait in a worker, when it has done something and has not told yet.

    Shut by ``close``, it holds the first who comes, until ``open``.
    """

    def __init__(self, path: Path) -> None:
        self._shut, self._taken = path, path.with_name(f"{path.name}.taken")

    def of(self, method: str, when: str = "True") -> str:
        """Return code for a worker: its engine stops in *method*, *when* its ``arguments`` fit."""
        return _GATE.format(shut=str(self._shut), taken=str(self._taken), method=method, when=when)

    def close(self) -> None:
        self._shut.touch()

    def wait(self) -> None:
        """Wait until somebody is held."""
        until(self._taken.exists, what="somebody at the gate")

    def open(self) -> None:
        self._taken.unlink()


_GATE = """
import contextlib, os, time
from vddkfs.engines.vmdk.engine import VmdkEngine
done = VmdkEngine.{method}
def held(self, *arguments):
    found = done(self, *arguments)
    if {when}:
        with contextlib.suppress(FileNotFoundError):
            os.rename({shut!r}, {taken!r})
            while os.path.exists({taken!r}):
                time.sleep(0.005)
    return found
VmdkEngine.{method} = held
VmdkEngine.read_nowait = lambda *arguments: False
"""
