"""Loading, each time in a process of its own: first the trap, then that we are not in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.vddk.conftest import SOURCE, Compile, compile_c
from vddkfs.engines.vddk import loader
from vddkfs.engines.vddk.elf import SharedLibrary

DECOY = """
#include <unistd.h>
__attribute__((constructor)) static void load(void) { write(2, "DECOY\\n", 6); }
const char *zlibVersion(void) { return "decoy"; }
"""
SIBLING = 'const char *sibling(void) { return "sibling"; }\n'
PLUGIN = "const char *sibling(void);\nconst char *plugin(void) { return sibling(); }\n"
MAIN = """
#include <dlfcn.h>
#include <stdio.h>
const char *zlibVersion(void);
const char *sibling(void);
__attribute__((constructor)) static void check(void)
{
    void *plugin = dlopen("libstubplugin.so.1", RTLD_NOW);
    printf("main: %s plugin: %s zlib: %s\\n", sibling(), plugin ? "found" : dlerror(),
           zlibVersion()[0] == 'd' ? "decoy" : "system");
    fflush(stdout);
}
"""
DECOYS = ("libz.so.1", "libcrypto.so.3", "libssl.so.3", "libexpat.so.1", "libstdc++.so.6")

LOAD = """
import sys
from vddkfs.engines.vddk import kit, loader
loaded = loader.load(kit.find_kit(sys.argv[1]))
print(sorted(loaded.preloaded), sorted(loaded.failed))
print(loaded.reasons())
import hashlib, ssl, subprocess, xml.parsers.expat, zlib
print(zlib.decompress(zlib.compress(b"fine")), hashlib.sha256(b"").hexdigest()[:8])
print(subprocess.run([sys.executable, "-c", "import ssl, zlib, os;"
      "print(os.environ.get('LD_LIBRARY_PATH'))"], capture_output=True, text=True))
"""


@pytest.fixture
def hostile_kit(tmp_path: Path, compiled: Compile) -> Path:
    """A kit with decoys of the system's libraries, and a sibling that needs what is missing."""
    lib64 = tmp_path / "kit" / "lib64"
    lib64.mkdir(parents=True)
    texts = {"decoy": DECOY, "sibling": SIBLING, "plugin": PLUGIN, "main": MAIN, "empty": ""}
    source = {}
    for name, text in texts.items():
        source[name] = tmp_path / f"{name}.c"
        source[name].write_text(text)
    for name in DECOYS:
        compile_c(source["decoy"], lib64 / name, f"-Wl,-soname,{name}")
    sibling = compile_c(
        source["sibling"], lib64 / "libzsibling.so.1", "-Wl,-soname,libzsibling.so.1"
    )
    compile_c(
        source["plugin"],
        lib64 / "libstubplugin.so.1",
        "-Wl,-soname,libstubplugin.so.1",
        str(sibling),
    )
    away = compile_c(source["empty"], tmp_path / "libexpat.so.0", "-Wl,-soname,libexpat.so.0")
    compile_c(source["empty"], lib64 / "libdiskLibPlugin.so", "-Wl,--no-as-needed", str(away))
    main = lib64 / "libvixDiskLib.so.8.0.2"
    links = [str(sibling), str(lib64 / "libz.so.1")]
    compile_c(SOURCE, main, "-DRELEASE=802", "-pthread", str(source["main"]), *links)
    # A copy of another release in the same folder is no sibling.
    shutil.copy(compiled("-DRELEASE=703"), lib64 / "libvixDiskLib.so.7.0.3")
    return lib64.parent


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_trap_a_path_for_the_process_spoils_python(hostile_kit: Path) -> None:
    spoiled = run("import zlib", LD_LIBRARY_PATH=str(hostile_kit / "lib64"))
    assert spoiled.returncode != 0 or "DECOY" in spoiled.stderr


def test_the_trap_the_library_alone_finds_no_siblings(hostile_kit: Path) -> None:
    library = hostile_kit / "lib64" / "libvixDiskLib.so.8.0.2"
    alone = run("import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(library))
    assert "libzsibling.so.1: cannot open shared object file" in alone.stderr


def test_loading_does_no_harm(hostile_kit: Path) -> None:
    done = run(LOAD, str(hostile_kit))
    assert done.returncode == 0, done.stderr
    assert "DECOY" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "main: sibling plugin: found zlib: system"
    preloaded = "['libstubplugin.so.1', 'libzsibling.so.1']"
    assert lines[1] == f"{preloaded} ['libdiskLibPlugin.so']"
    assert lines[2].startswith("libdiskLibPlugin.so: libexpat.so.0: cannot open")
    assert lines[2].endswith("(install libexpat1 (apt-get) or expat (dnf))")
    assert lines[3] == "b'fine' e3b0c442"
    assert "returncode=0" in lines[4]
    assert "None" in lines[4]


def test_what_the_library_itself_lacks_is_named(hostile_kit: Path) -> None:
    (hostile_kit / "lib64" / "libzsibling.so.1").unlink()
    done = run(LOAD, str(hostile_kit))
    assert done.returncode == 1
    assert "libvixDiskLib.so.8.0.2 cannot be loaded" in done.stderr
    assert "libzsibling.so.1: cannot open shared object file" in done.stderr


def test_the_systems_copy_must_have_the_versions(tmp_path: Path) -> None:
    source, script = tmp_path / "a.c", tmp_path / "versions"
    source.write_text("void a(void) {}\n")
    script.write_text("A_1 { global: a; };\n")
    copy = compile_c(source, tmp_path / "liba.so", f"-Wl,--version-script={script}")

    def user(*versions: str) -> SharedLibrary:
        return SharedLibrary(tmp_path, "user", (), {"liba.so": frozenset(versions)})

    assert loader._will_do(copy, "liba.so", [])
    assert loader._will_do(copy, "liba.so", [user("A_1")])
    assert not loader._will_do(copy, "liba.so", [user("A_1"), user("A_2")])
    assert not loader._will_do(tmp_path / "none", "liba.so", [])


def test_the_listing_of_the_system() -> None:
    found = loader._parse_listing(
        "2 libs found in cache `/etc/ld.so.cache'\n"
        "\tlibz.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libz.so.1\n"
        "\tlibz.so.1 (libc6) => /lib/i386-linux-gnu/libz.so.1\n"
        "\tlibold.so.1 (libc6) => /lib/i386-linux-gnu/libold.so.1\n"
    )
    assert found == {"libz.so.1": Path("/lib/x86_64-linux-gnu/libz.so.1")}


def test_dependencies_come_first_also_in_a_circle() -> None:
    def library(name: str, *needed: str) -> SharedLibrary:
        return SharedLibrary(Path(name), name, needed)

    a, b, c = library("a", "b", "libc.so.6"), library("b", "c"), library("c")
    for order in ([a, b, c], [c, b, a], [b, a, c]):
        assert loader._dependencies_first(order) == [c, b, a]
    x, y = library("x", "y"), library("y", "x")
    assert sorted(one.soname for one in loader._dependencies_first([x, y])) == ["x", "y"]
