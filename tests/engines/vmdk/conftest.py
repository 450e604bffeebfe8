"""Makers of VMDKs for these tests, written from the format note and without the code under test."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.vmdk import VmdkEngine, discover
from vddkfs.errors import VddkfsError

SECTOR = 512


class Maker:
    """Writes VMDKs by hand into one folder. Lengths are in sectors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def text(
        self,
        name: str,
        extents: list[str],
        *,
        cid: str = "12345678",
        parent: str = "ffffffff",
        hint: str = "",
        kind: str = "monolithicFlat",
        more: str = "",
    ) -> str:
        """Write a descriptor file and return its path."""
        path = self.folder / name
        path.write_text(describe(extents, cid=cid, parent=parent, hint=hint, kind=kind, more=more))
        return str(path)

    def flat(self, name: str, data: bytes, **keys: Any) -> str:
        """Write NAME.vmdk and NAME-flat.vmdk with *data*; return the descriptor's path."""
        (self.folder / f"{name}-flat.vmdk").write_bytes(data)
        line = f'RW {len(data) // SECTOR} FLAT "{name}-flat.vmdk" 0'
        return self.text(f"{name}.vmdk", [line], **keys)

    def sparse(
        self,
        name: str,
        capacity: int,
        grains: dict[int, bytes | int],
        *,
        grain: int = 128,
        cid: str = "12345678",
        parent: str = "ffffffff",
        hint: str = "",
        embedded: bool = True,
        zero_flag: bool = False,
        tail: int | None = None,
        kind: str = "monolithicSparse",
        **header: Any,
    ) -> str:
        """Write a hosted sparse file and return its path.

        *grains* gives by number a grain's data or its bare table entry. Tables without grains get
        no place. *tail* cuts the file to so many bytes; *header* overrides fields of the header.
        """
        path = self.folder / name
        tables = -(-capacity // (grain * 512))
        text = describe(
            [f'RW {capacity} SPARSE "{name}"'], cid=cid, parent=parent, hint=hint, kind=kind
        ).encode()
        directory_at = 21
        next_sector = directory_at + -(-tables * 4 // 512)
        with open(path, "wb") as file:
            table_at: dict[int, int] = {}
            for number in sorted({index // 512 for index in grains}):
                table_at[number] = next_sector
                next_sector += 4
            next_sector = -(-next_sector // grain) * grain
            overhead = next_sector
            entries: dict[int, int] = {}
            for index, content in grains.items():
                if isinstance(content, int):
                    entries[index] = content
                    continue
                entries[index] = next_sector
                file.seek(next_sector * SECTOR)
                file.write(content.ljust(grain * SECTOR, b"\xee"))
                next_sector += grain
            for number, place in table_at.items():
                file.seek((directory_at * SECTOR) + number * 4)
                file.write(struct.pack("<I", place))
            for index, entry in entries.items():
                file.seek(table_at[index // 512] * SECTOR + index % 512 * 4)
                file.write(struct.pack("<I", entry))
            file.seek(0)
            file.write(
                sparse_header(
                    capacity=capacity,
                    grain=grain,
                    descriptor_offset=1 if embedded else 0,
                    descriptor_sectors=20 if embedded else 0,
                    directory=directory_at,
                    overhead=overhead,
                    flags=7 if zero_flag else 3,
                    **header,
                )
            )
            if embedded:
                file.seek(SECTOR)
                file.write(text)
            file.truncate(max(overhead, next_sector) * SECTOR if tail is None else tail)
        return str(path)


def describe(
    extents: list[str], *, cid: str, parent: str, hint: str, kind: str, more: str = ""
) -> str:
    lines = ["# Disk DescriptorFile", "version=1", f"CID={cid}", f"parentCID={parent}"]
    lines.append(f'createType="{kind}"')
    if hint:
        lines.append(f'parentFileNameHint="{hint}"')
    lines += ["", "# Extent description", *extents, "", "# The Disk Data Base", "#DDB", ""]
    lines += ['ddb.adapterType = "lsilogic"', 'ddb.virtualHWVersion = "14"', more]
    return "\n".join(lines) + "\n"


def sparse_header(
    *,
    capacity: int = 20480,
    grain: int = 128,
    magic: bytes = b"KDMV",
    version: int = 1,
    flags: int = 3,
    descriptor_offset: int = 1,
    descriptor_sectors: int = 20,
    entries: int = 512,
    redundant: int = 0,
    directory: int = 21,
    overhead: int = 128,
    newlines: bytes = b"\n \r\n",
    compression: int = 0,
) -> bytes:
    """Return the 512 bytes of a hosted sparse header."""
    head = struct.pack("<4sII", magic, version, flags)
    head += struct.pack("<QQQQ", capacity, grain, descriptor_offset, descriptor_sectors)
    head += struct.pack("<IQQQ", entries, redundant, directory, overhead)
    head += struct.pack("<B4sH", 0, newlines, compression)
    return head.ljust(512, b"\0")


class Qemu:
    """qemu-img and qemu-io: another implementation of the format, to compare with."""

    def create(self, path: Path, size: int, *, options: str = "", parent: str = "") -> None:
        command = ["qemu-img", "create", "-q", "-f", "vmdk"]
        if options:
            command += ["-o", options]
        if parent:
            command += ["-b", parent, "-F", "vmdk"]
        self._run([*command, str(path), str(size)], cwd=path.parent)

    def io(self, path: Path, *commands: str) -> None:
        arguments = [part for command in commands for part in ("-c", command)]
        self._run(["qemu-io", "-f", "vmdk", *arguments, str(path)], cwd=path.parent)

    def convert(self, source: Path, target: Path, options: str) -> None:
        """Make a VMDK of the raw file *source*."""
        command = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", options]
        self._run([*command, str(source), str(target)])

    def raw(self, path: Path) -> bytes:
        target = path.with_suffix(".raw")
        self._run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(path), str(target)])
        content = target.read_bytes()
        target.unlink()
        return content

    def map(self, path: Path) -> list[dict[str, Any]]:
        command = ["qemu-img", "map", "-f", "vmdk", "--output=json", str(path)]
        found: list[dict[str, Any]] = json.loads(self._run(command))
        return found

    def _run(self, command: list[str], cwd: Path | None = None) -> str:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        assert "failed" not in done.stdout, done.stdout
        return done.stdout


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


@pytest.fixture(name="sparse_header")
def sparse_header_fixture() -> Callable[..., bytes]:
    return sparse_header


@pytest.fixture(scope="session")
def qemu() -> Qemu:
    if not (shutil.which("qemu-img") and shutil.which("qemu-io")):
        pytest.skip("qemu-img and qemu-io (package qemu-utils) are not installed")
    return Qemu()


@pytest.fixture
def opened() -> Iterator[Callable[..., VmdkEngine]]:
    """Open the chain that ends with a VMDK; closed after the test."""
    engines: list[VmdkEngine] = []

    def opening(source: str | Path, **keys: Any) -> VmdkEngine:
        (chain,) = discover(str(source)).chains
        engines.append(VmdkEngine(chain.paths, **keys))
        return engines[-1]

    yield opening
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def read() -> Callable[..., bytes]:
    """Read sectors of an image."""

    def reading(
        engine: VmdkEngine, sector: int, count: int, image: int = -1, direct: bool = False
    ) -> bytes:
        image = len(engine.identities()) - 1 if image < 0 else image
        buffer = bytearray(b"\xa5") * (count * SECTOR)
        engine.read(image, sector, count, memoryview(buffer), direct)
        return bytes(buffer)

    return reading


@pytest.fixture
def nowait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes | None]:
    """Read sectors of the last image with read_nowait; None if it would wait.

    Another process may have the page cache dropped, so the files are read in before each attempt.
    A file system without RWF_NOWAIT is made to look like one that has it.
    """
    plain = os.preadv
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(SECTOR))
    with open(probe, "rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(SECTOR)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError:
            monkeypatch.setattr(os, "preadv", lambda fd, to, at, flags=0: plain(fd, to, at))
    probe.unlink()

    def reading(engine: VmdkEngine, sector: int, count: int, direct: bool = False) -> bytes | None:
        image = len(engine.identities()) - 1
        for _ in range(5):
            for identity in engine.identities():
                for stamp in identity.files:
                    Path(stamp.path).read_bytes()
            buffer = bytearray(b"\xa5") * (count * SECTOR)
            if engine.read_nowait(image, sector, count, memoryview(buffer), direct):
                return bytes(buffer)
        return None

    return reading


@pytest.fixture(scope="session")
def names() -> Callable[..., list[tuple[str, list[str]]]]:
    """Return the chains of a source: (name, file names of the links)."""

    def naming(source: str | Path, **keys: Any) -> list[tuple[str, list[str]]]:
        return [
            (chain.name, [os.path.basename(path) for path in chain.paths])
            for chain in discover(str(source), **keys).chains
        ]

    return naming


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """Check that a source is refused in one line that has all of some words; return it."""

    def refusing(kind: type[VddkfsError], source: str | Path, *words: str, **keys: Any) -> str:
        with pytest.raises(kind) as caught:
            discover(str(source), **keys)
        line = str(caught.value)
        assert type(caught.value) is kind
        assert line.isprintable()
        assert caught.value.advice
        for word in words:
            assert word in line
        return line

    return refusing


@pytest.fixture(scope="session")
def full_map() -> Callable[..., list[tuple[int, int, bool]]]:
    """Return the whole map of an image, asked for in slices of *limit* extents and merged."""

    def mapping(
        engine: VmdkEngine, image: int = -1, limit: int = 1000
    ) -> list[tuple[int, int, bool]]:
        image = len(engine.identities()) - 1 if image < 0 else image
        end = engine.identities()[image].capacity
        found: list[tuple[int, int, bool]] = []
        here = 0
        while here < end:
            part = engine.map(image, here, end - here, limit, 60)
            assert part.next_sector > here
            assert len(part.extents) <= limit
            for extent in part.extents:
                assert extent.sector == here
                assert extent.count > 0
                here += extent.count
                if found and found[-1][2] == extent.data:
                    found[-1] = (found[-1][0], found[-1][1] + extent.count, extent.data)
                else:
                    found.append((extent.sector, extent.count, extent.data))
            assert here == part.next_sector
        return found

    return mapping


@pytest.fixture
def samples() -> Path:
    """The folder of real VMDKs that VDDKFS_SAMPLES names."""
    folder = os.environ.get("VDDKFS_SAMPLES")
    if not folder:
        pytest.skip("VDDKFS_SAMPLES does not name a folder of sample VMDKs")
    return Path(folder)


@pytest.fixture(scope="session")
def sha256() -> Callable[[VmdkEngine], str]:
    """Return the hash of an engine's last image."""

    def hashing(engine: VmdkEngine) -> str:
        digest = hashlib.sha256()
        image = len(engine.identities()) - 1
        capacity = engine.identities()[image].capacity
        for sector in range(0, capacity, 2048):
            count = min(2048, capacity - sector)
            buffer = bytearray(count * SECTOR)
            engine.read(image, sector, count, memoryview(buffer), False)
            digest.update(buffer)
        return digest.hexdigest()

    return hashing
