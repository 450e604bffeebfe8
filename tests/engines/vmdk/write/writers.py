"""What the tests of writing share: opening for writing, and a look at the structures of a file."""

import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from vddkfs.engines.vmdk import VmdkEngine
from vddkfs.engines.vmdk.write import BaseWriter
from vddkfs.errors import EngineError

Open = Callable[..., tuple[VmdkEngine, BaseWriter]]

GRAIN = 128 * 512
UNCLEAN = 72


def open_writers(opened: Callable[..., VmdkEngine]) -> Iterator[Open]:
    """Yield what opens a VMDK for reading and for writing; all are closed afterwards."""
    writers: list[BaseWriter] = []

    def opening(path: str | Path) -> tuple[VmdkEngine, BaseWriter]:
        engine = opened(path)
        writers.append(BaseWriter(engine._links[0]))
        return engine, writers[-1]

    yield opening
    for each in writers:
        with suppress(EngineError):
            each.close()


def fill(letter: str, size: int = GRAIN) -> memoryview:
    return memoryview(letter.encode() * size)


class Disk:
    """The structures of a hosted sparse file, as the format note has them."""

    def __init__(self, path: str | Path) -> None:
        self.raw = Path(path).read_bytes()
        fields = struct.unpack_from("<4sIIQQQQIQQQB", self.raw)
        self.capacity, self.grain = fields[3:5]
        self.spare_directory, self.directory = fields[8:10]
        self.unclean = fields[11]

    def entries(self, directory: int) -> list[int]:
        grains = -(-self.capacity // self.grain)
        found: list[int] = []
        for number in range(-(-grains // 512)):
            (place,) = struct.unpack_from("<I", self.raw, directory * 512 + number * 4)
            length = min(512, grains - number * 512)
            raw = self.raw[place * 512 :] if place else bytes(2048)
            found += struct.unpack_from(f"<{length}I", raw)
        return found

    def check(self, *, aligned: bool = True) -> list[int]:
        """Return the entries: both directories must say the same, and no place serve twice."""
        entries = self.entries(self.directory)
        if self.spare_directory:
            assert self.entries(self.spare_directory) == entries
        places = [entry for entry in entries if entry > 1]
        assert len(set(places)) == len(places)
        assert not aligned or all(place % self.grain == 0 for place in places)
        return entries


def qemu_check(path: str | Path) -> None:
    done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def patch_file(path: str | Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
