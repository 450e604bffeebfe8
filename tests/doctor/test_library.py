"""VDDK found, absent and broken: with the simulator's kit, with stubs, and with what was seen."""

import shutil
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.engines.vddk.conftest import Compile
from tests.simulator.kit import Kit as SimulatorKit
from vddkfs.doctor import library
from vddkfs.doctor.library import Seen, judge, look
from vddkfs.doctor.rows import Row
from vddkfs.engines.base import EngineFacts
from vddkfs.engines.vddk import kit as kits
from vddkfs.engines.vddk.kit import PLUGIN, Kit, Missing
from vddkfs.errors import EngineError, SourceMissing, UsageError
from vddkfs.options import MountOptions

AARCH64 = 183
GOOD = Seen(
    "x86_64",
    kit=Kit(Path("/opt/kit"), Path("/opt/kit/lib64/libvixDiskLib.so.8.0.2"), (8, 0, 2)),
    brought=frozenset({PLUGIN, "libexpat.so.1"}),
    system=frozenset({"libsqlite3.so.0"}),
    described=EngineFacts("8.0.2", "22388865", "/opt/kit/lib64/libvixDiskLib.so.8.0.2"),
)


def judged(wanted: bool = True, **changes: Any) -> list[Row]:
    rows = judge(msgspec.structs.replace(GOOD, **changes), wanted)
    assert all(row.remedy or row.level == "ok" for row in rows)
    return rows


def options(libdir: Path) -> MountOptions:
    return MountOptions(libdir=str(libdir))


def test_a_good_kit_is_ok() -> None:
    rows = judged()
    assert {row.level for row in rows} == {"ok"}
    assert "release 8.0.2 in /opt/kit" in rows[0].finding
    assert "build 22388865" in rows[1].finding


@pytest.mark.parametrize(("wanted", "level"), [(True, "failure"), (False, "warning")])
def test_what_is_missing_is_a_failure_only_if_it_is_wanted(wanted: bool, level: str) -> None:
    [row] = judged(wanted, kit=None, problem=SourceMissing("x"))
    assert row.level == level
    assert "/opt/vmware-vix-disklib-distrib" in row.finding
    assert "developer portal" in row.remedy
    [row] = judged(wanted, kit=None, problem=UsageError("libdir=/x", advice="unpack it"))
    assert (row.level, row.finding, row.remedy) == (level, "libdir=/x", "unpack it")
    [row] = judged(wanted, architecture="aarch64")
    assert row.level == level
    row = judged(wanted, described=None, unusable=EngineError("no Open", advice="again"))[1]
    assert (row.level, row.finding, row.remedy) == (level, "no Open", "again")
    row = judged(wanted, described=None, unusable=EngineError("no Open"))[1]
    assert row.remedy


def test_an_old_kit_is_warned_of() -> None:
    old = Kit(Path("/k"), Path("/k/lib64/libvixDiskLib.so.6.7.0"), (6, 7, 0))
    assert judged(kit=old)[0].level == "warning"


def test_k19_missing_libraries_are_named_with_their_packages() -> None:
    missing = (Missing("libexpat.so.1", (PLUGIN,)), Missing("libodd.so.7", ("libvim.so",)))
    found = msgspec.structs.replace(GOOD, missing=missing)
    assert found.plugin
    assert found.plugin_lacks == ("libexpat.so.1",)
    rows = judged(missing=missing)[2:]
    assert [row.level for row in rows] == ["warning", "warning"]
    assert "libexpat1 (apt-get)" in rows[0].remedy
    assert "libodd.so.7" in rows[1].remedy
    rows = judged(brought=frozenset(), system=frozenset())[2:]
    assert [row.finding.split()[0] for row in rows] == ["libexpat.so.1", "libsqlite3.so.0"]


def test_what_the_library_itself_lacks_is_why_it_does_not_load() -> None:
    missing = (Missing("libodd.so.7", ("libvixDiskLib.so.8.0.2",)),)
    broken = EngineError("cannot be loaded", advice="run vddkfs doctor, which lists it")
    rows = judged(described=None, unusable=broken, missing=missing)
    assert [row.level for row in rows] == ["ok", "failure", "failure"]
    assert rows[1].remedy == "install what is missing below"
    # It was loaded all the same: the process had what it needs.
    assert judged(missing=missing)[2].level == "warning"


def test_what_the_library_says_and_what_could_not_be_listed() -> None:
    rows = judged(said=("no plugin, password=hidden-words",), unlisted="no loader")
    assert [row.level for row in rows] == ["ok", "ok", "warning", "warning"]
    assert "hidden-words" not in rows[2].finding
    assert "ldd" in rows[3].remedy


# With kits.


def test_the_simulators_kit_is_found_and_used(bare: SimulatorKit, tmp_path: Path) -> None:
    seen = look(options(bare.path), tmp_path)
    assert seen.kit is not None
    assert seen.usable
    assert seen.described is not None
    assert seen.described.build == "20000080"
    assert seen.plugin
    assert not seen.plugin_lacks
    assert {row.level for row in judge(seen, True)} == {"ok"}
    assert list(tmp_path.glob("tmp*")) == []


def test_there_is_no_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kits, "PLACES", (str(tmp_path / "none"),))
    seen = look(MountOptions(), tmp_path)
    assert (seen.kit, seen.usable) == (None, False)
    assert isinstance(seen.problem, SourceMissing)
    assert judge(seen, False)[0].level == "warning"
    assert judge(look(options(tmp_path), tmp_path), True)[0].level == "failure"


def test_a_library_of_another_architecture(bare: SimulatorKit, tmp_path: Path) -> None:
    lib64 = tmp_path / "kit" / "lib64"
    shutil.copytree(bare.build / "lib64", lib64, symlinks=True)
    real = (lib64 / "libvixDiskLib.so").resolve()
    content = bytearray(real.read_bytes())
    struct.pack_into("<H", content, 18, AARCH64)
    real.write_bytes(content)
    [row] = judge(look(options(lib64.parent), tmp_path), True)
    assert row.level == "failure"
    assert "another kind of processor" in row.finding


def put(folder: Path, library_file: Path) -> Path:
    (folder / "lib64").mkdir(parents=True)
    shutil.copy(library_file, folder / "lib64" / "libvixDiskLib.so.7.0.3")
    return folder


def test_missing_symbols(tmp_path: Path, compiled: Compile) -> None:
    source = tmp_path / "empty.c"
    source.write_text("int VixDiskLib_InitEx(void) { return 0; }\n")
    made = compiled("-DRELEASE=703").with_name("empty.so")
    from tests.engines.vddk.conftest import compile_c

    compile_c(source, made)
    seen = look(options(put(tmp_path / "kit", made)), tmp_path)
    row = judge(seen, True)[1]
    assert row.level == "failure"
    assert "VixDiskLib_Open" in row.finding
    assert row.remedy


def test_a_kit_without_the_plugin(tmp_path: Path, compiled: Compile) -> None:
    seen = look(options(put(tmp_path / "kit", compiled("-DRELEASE=703"))), tmp_path)
    assert seen.usable
    assert not seen.plugin


@pytest.mark.parametrize("fault", ["segv", "error=3"])
def test_a_library_that_fails_to_initialise(bare: SimulatorKit, tmp_path: Path, fault: str) -> None:
    bare.configure_kit(f"fault = InitEx {fault}")
    seen = look(options(bare.path), tmp_path)
    assert not seen.usable
    assert judge(seen, True)[1].level == "failure"


def test_a_library_that_hangs_is_given_up(bare: SimulatorKit, tmp_path: Path) -> None:
    bare.configure_kit("fault = InitEx hang")
    described, problem, _ = library.describe(options(bare.path), tmp_path, seconds=1.0)
    assert described is None
    assert problem is not None
    assert "within 1 s" in str(problem)
