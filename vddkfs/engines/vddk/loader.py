"""Loading libvixDiskLib into a process that is Python, so that neither spoils the other.

The difficulty: the kit's lib64 holds its own libssl, libcrypto, libz, libexpat, libstdc++ and more;
libvixDiskLib needs its siblings by bare name, and opens some by bare name while it runs; and
LD_LIBRARY_PATH is read only when a process starts. nbdkit therefore starts itself again with the
kit's folder on that path. For Python that would be wrong: its own ssl, hashlib, zlib and pyexpat
would meet the kit's libraries, and so would every child. What is done here instead, once, on the
main thread, before anything of VDDK runs:

1. The C modules of Python that use a shared library are imported, so each has met the system's.
2. A library of the kit whose soname the process already has is left alone. The loader gives the one
   that is there to whoever asks for that name.
3. A few libraries that a Python module may ask for later (``SYSTEM_FIRST``) are left to the system
   where it has one with all symbol versions that the kit's files want, which is the loader's own
   measure. An old system with a new kit (libstdc++ on RHEL 8) thus gets the kit's.
4. All others are loaded by absolute path, dependencies first. The loader knows them by soname from
   then on, and finds them for whoever asks by bare name.
5. libvixDiskLib itself is loaded.

Everything is loaded RTLD_LOCAL. RTLD_GLOBAL is not needed for 4, since names of libraries are the
process's, only symbols are scoped; and it would let an unversioned symbol of the kit (an older
libcrypto, say) take the place of one that a module of Python binds later.

The trade-off: over a soname that Python and the kit share, VDDK works with the system's copy, not
with the one that VMware tested. Where that lacks a symbol version the load fails, and the message
says which. A kit file without a soname of its own is found by absolute path only.

A file that cannot be loaded is skipped and remembered: if libvixDiskLib or a transport plugin needs
it, the reason is there to be told (K19).
"""

import contextlib
import ctypes
import importlib
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vddkfs.engines.vddk import elf
from vddkfs.engines.vddk.kit import Kit, kit_libraries, package_for, stem
from vddkfs.errors import EngineError

_PYTHON_MODULES: Final = (
    "_ssl",
    "_hashlib",
    "zlib",
    "_bz2",
    "_lzma",
    "pyexpat",
    "_sqlite3",
    "_uuid",
    "_ctypes",
    "_cffi_backend",
)

_C_LIBRARY: Final = frozenset(
    {"libc", "libm", "libdl", "librt", "libpthread", "libresolv", "libutil", "ld-linux-x86-64"}
)
SYSTEM_FIRST: Final = frozenset(
    {
        "libssl",
        "libcrypto",
        "libz",
        "libexpat",
        "libffi",
        "libsqlite3",
        "libbz2",
        "liblzma",
        "libuuid",
        "libstdc++",
        "libgcc_s",
    }
)
"""Stems of libraries that are left to the system where its copy will do."""

_LOCAL_NOW: Final = os.RTLD_LOCAL | os.RTLD_NOW


@dataclass(slots=True)
class Loaded:
    """What happened to each file of the kit, by file name.

    *preloaded* are in the process now; *left* were left to what the process or the system has;
    *failed* could not be loaded, with the loader's own words.
    """

    preloaded: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def reasons(self) -> str:
        """Return why files could not be loaded, in one line, with what to install; or ""."""
        return "; ".join(f"{name}: {_explain(why)}" for name, why in self.failed.items())


def load(kit: Kit) -> Loaded:
    """Load the libraries of *kit*, libvixDiskLib last. Safe to repeat for the same kit.

    Raises EngineError, naming what is missing, if libvixDiskLib cannot be loaded. A sibling that
    cannot is no error here; see ``Loaded.failed``.
    """
    for module in _PYTHON_MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    main = elf.read(kit.library)
    siblings = kit_libraries(kit)
    result = Loaded()
    chosen: list[elf.SharedLibrary] = []
    system: dict[str, Path] | None = None
    for library in siblings:
        name = library.soname
        if name and (stem(name) in _C_LIBRARY or in_process(name)):
            result.left.append(library.path.name)
            continue
        if stem(name) in SYSTEM_FIRST:
            if system is None:
                system = system_libraries()
            if name in system and _will_do(system[name], name, [main, *siblings]):
                result.left.append(library.path.name)
                continue
        chosen.append(library)
    for library in _dependencies_first(chosen):
        try:
            ctypes.CDLL(str(library.path), mode=_LOCAL_NOW)
        except OSError as error:
            result.failed[library.path.name] = str(error)
        else:
            result.preloaded.append(library.path.name)
    try:
        ctypes.CDLL(str(kit.library), mode=_LOCAL_NOW)
    except OSError as error:
        reasons = result.reasons()
        raise EngineError(
            f"{kit.library} cannot be loaded",
            cause=_explain(str(error)) + (f"; before that, {reasons}" if reasons else ""),
            advice="run vddkfs doctor, which lists what is missing",
        ) from error
    return result


def in_process(soname: str) -> bool:
    """Whether the process has a library of that name already."""
    try:
        ctypes.CDLL(soname, mode=_LOCAL_NOW | os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def system_libraries() -> dict[str, Path]:
    """Return the loader's own list of the system's libraries, by soname; empty if there is none."""
    for program in ("/sbin/ldconfig", "/usr/sbin/ldconfig"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            listed = subprocess.run(
                [program, "-p"],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                env={"LC_ALL": "C"},
                timeout=20,
                check=False,
            )
            return _parse_listing(os.fsdecode(listed.stdout))
    return {}


def _parse_listing(text: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for line in text.splitlines():
        what, arrow, path = line.strip().partition(" => ")
        name, _, kind = what.partition(" ")
        if arrow and "x86-64" in kind:
            found.setdefault(name, Path(path))
    return found


def _will_do(copy: Path, soname: str, users: list[elf.SharedLibrary]) -> bool:
    """Whether the system's *copy* has every version that *users* want of *soname*."""
    wanted: set[str] = set()
    for user in users:
        wanted |= user.wants.get(soname, frozenset())
    try:
        return wanted <= elf.read(copy).defines
    except (elf.NotLoadable, OSError):
        return False


def _dependencies_first(libraries: list[elf.SharedLibrary]) -> list[elf.SharedLibrary]:
    """Return *libraries* so that each comes after those of them that it needs."""
    by_name = {library.soname or library.path.name: library for library in libraries}
    order: dict[Path, elf.SharedLibrary] = {}
    entered: set[Path] = set()
    stack = list(reversed(libraries))
    while stack:
        library = stack[-1]
        waiting = [
            by_name[name]
            for name in library.needed
            if name in by_name and by_name[name].path not in entered
        ]
        entered.add(library.path)
        if waiting:
            stack.extend(waiting)
        else:
            order.setdefault(stack.pop().path, library)
    return list(order.values())


def _explain(words: str) -> str:
    """Add to the loader's *words* which package has the library they name, if that is known."""
    package = package_for(words.partition(":")[0]) if "cannot open shared object" in words else ""
    return f"{words} ({package})" if package else words
