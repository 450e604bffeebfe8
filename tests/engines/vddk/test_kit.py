"""Finding the kit."""

import contextlib
import os
from pathlib import Path

import pytest

from tests.engines.vddk.conftest import Compile, MakeKit, compile_c
from vddkfs.engines.vddk import elf, kit
from vddkfs.engines.vddk.kit import find_kit, missing_dependencies, package_for
from vddkfs.errors import EngineError, SourceMissing, UsageError


def put(folder: Path, *names: str, source: Path) -> None:
    lib64 = folder / "lib64"
    lib64.mkdir(parents=True, exist_ok=True)
    for name in names:
        (lib64 / name).write_bytes(source.read_bytes())


@pytest.mark.parametrize(
    ("name", "release"),
    [
        ("libvixDiskLib.so.6.5.2", (6, 5, 2)),
        ("libvixDiskLib.so.6.7.0", (6, 7, 0)),
        ("libvixDiskLib.so.6", (6,)),
        ("libvixDiskLib.so.8.0.2", (8, 0, 2)),
        ("libvixDiskLib.so.9.1.0.0", (9, 1, 0, 0)),
    ],
)
def test_the_release_is_in_the_real_name(
    tmp_path: Path, compiled: Compile, name: str, release: tuple[int, ...]
) -> None:
    put(tmp_path, name, source=compiled("-DRELEASE=703"))
    short = ".".join(name.split(".")[:3])
    if short != name:
        (tmp_path / "lib64" / short).symlink_to(name)
    found = find_kit(str(tmp_path))
    assert found.release == release
    assert found.libdir == tmp_path
    assert found.library.name == name
    assert found.release_text == ".".join(map(str, release))


def test_the_newest_is_taken_and_relatives_are_not(tmp_path: Path, compiled: Compile) -> None:
    put(
        tmp_path / "vmware-vix-disklib-distrib",
        "libvixDiskLib.so.7.0.3",
        "libvixDiskLib.so.10.0.0",
        "libvixDiskLibVim.so.11.0.0",
        source=compiled("-DRELEASE=703"),
    )
    assert find_kit(str(tmp_path)).release == (10, 0, 0)
    lib64 = tmp_path / "vmware-vix-disklib-distrib" / "lib64"
    assert find_kit(str(lib64)).libdir == lib64.parent


@pytest.mark.parametrize("name", ["libvixDiskLib.so.5", "libvixDiskLib.so.6.0.3"])
def test_too_old(tmp_path: Path, compiled: Compile, name: str) -> None:
    put(tmp_path, name, source=compiled("-DRELEASE=703"))
    with pytest.raises(UsageError, match="too old"):
        find_kit(str(tmp_path))


def test_bad_places(tmp_path: Path, compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="holds no lib64"):
        find_kit(str(tmp_path))
    with pytest.raises(UsageError, match="holds no lib64"):
        find_kit(str(tmp_path / "none"))
    put(tmp_path / "a", "libvixDiskLib.so", source=compiled("-DRELEASE=703"))
    with pytest.raises(UsageError, match="no number"):
        find_kit(str(tmp_path / "a"))
    monkeypatch.setattr(kit, "PLACES", (str(tmp_path / "none"), str(tmp_path / "b")))
    with pytest.raises(SourceMissing, match="not installed") as caught:
        find_kit()
    assert "libdir=" in caught.value.advice
    put(tmp_path / "b", "libvixDiskLib.so.8.0.0", source=compiled("-DRELEASE=703"))
    assert find_kit().libdir == tmp_path / "b"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ((18, b"\xb7\x00"), "another kind of processor"),
        ((0, b"#!/bin/sh\n"), "not a shared library"),
        ((16, b"\x02\x00"), "not a shared library"),
        ((0, b""), "empty"),
    ],
)
def test_a_library_that_is_none(
    tmp_path: Path, compiled: Compile, change: tuple[int, bytes], why: str
) -> None:
    raw = bytearray(compiled("-DRELEASE=703").read_bytes())
    place, new = change
    raw[place : place + len(new)] = new
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libvixDiskLib.so.8").write_bytes(raw if new else b"")
    with pytest.raises(EngineError, match=why):
        find_kit(str(tmp_path))


def test_a_damaged_library_raises_nothing_else(tmp_path: Path, compiled: Compile) -> None:
    raw = compiled("-DRELEASE=703").read_bytes()
    path = tmp_path / "damaged.so"
    for place in range(0, 1024):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        with contextlib.suppress(elf.NotLoadable):
            elf.read(path)
    path.write_bytes(raw[:700])
    with pytest.raises(elf.NotLoadable, match="cut short"):
        elf.read(path)


def test_names_and_versions_of_a_library(tmp_path: Path) -> None:
    source = tmp_path / "a.c"
    source.write_text('#include <stdio.h>\nint a(void) { return puts("a"); }\n')
    script = tmp_path / "versions"
    script.write_text("A_1 { global: a; };\nA_2 { global: b; } A_1;\n")
    made = elf.read(
        compile_c(
            source,
            tmp_path / "liba.so",
            "-Wl,-soname,liba.so.1",
            f"-Wl,--version-script={script}",
        )
    )
    assert made.soname == "liba.so.1"
    assert "libc.so.6" in made.needed
    assert {"A_1", "A_2"} <= made.defines
    assert "GLIBC_2.2.5" in made.wants["libc.so.6"]


def test_missing_dependencies(tmp_path: Path, make_kit: MakeKit) -> None:
    found = make_kit("8.0.2")
    assert missing_dependencies(found) == ()
    source = tmp_path / "empty.c"
    source.write_text("")
    away = compile_c(source, tmp_path / "libexpat.so.0", "-Wl,-soname,libexpat.so.0")
    here = found.folder / "libown.so.1"
    compile_c(source, here, "-Wl,-soname,libown.so.1")
    compile_c(source, found.folder / kit.PLUGIN, "-Wl,--no-as-needed", str(away), str(here))
    os.unlink(away)
    missing = missing_dependencies(found)
    assert [(one.name, one.wanted_by) for one in missing] == [("libexpat.so.0", (kit.PLUGIN,))]
    assert missing[0].remedy == "install libexpat1 (apt-get) or expat (dnf)"
    assert missing_dependencies(found, ("libown.so.1",)) == ()


def test_a_missing_version_is_named(tmp_path: Path, make_kit: MakeKit) -> None:
    found = make_kit("8.0.2")
    source, user, script = tmp_path / "a.c", tmp_path / "user.c", tmp_path / "versions"
    source.write_text("void a(void) {}\n")
    user.write_text("void a(void);\nvoid user(void) { a(); }\n")
    library = found.folder / "liba.so.1"
    flags = ("-Wl,-soname,liba.so.1", f"-Wl,--version-script={script}")
    script.write_text("A_2 { global: a; };\n")
    compile_c(source, library, *flags)
    compile_c(user, found.folder / "libuser.so.1", str(library))
    script.write_text("A_1 { global: a; };\n")
    compile_c(source, library, *flags)
    missing = missing_dependencies(found)
    assert [(one.name, one.wanted_by) for one in missing] == [
        ("liba.so.1 (A_2)", ("libuser.so.1",))
    ]


def test_without_a_loader_nothing_is_claimed(
    make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "_LOADER", "/nowhere/ld.so")
    with pytest.raises(EngineError, match="cannot list"):
        missing_dependencies(make_kit())


def test_packages() -> None:
    assert "sqlite-libs" in package_for("libsqlite3.so.0")
    assert package_for("libunknown.so.1") == ""
