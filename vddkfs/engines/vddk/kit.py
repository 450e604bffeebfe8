"""Where VDDK is on this machine, which release it is, and what it lacks. Nothing is loaded here.

A *kit* is the unpacked ``vmware-vix-disklib-distrib`` folder: *libdir* to VDDK itself, with
``lib64/libvixDiskLib.so.N`` and the libraries it brings along. The release is read from the file's
real name, ``libvixDiskLib.so.8.0.2``: the version number that the library tells of itself has stood
still for years.

The current folder is not searched, although the kit is often unpacked there: a program that may run
as root must not load code from wherever it was started. ``libdir=`` may name it.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vddkfs.engines.vddk import elf
from vddkfs.engines.vddk.layouts import OLDEST, Release
from vddkfs.errors import AccessDenied, EngineError, SourceMissing, UsageError

PLACES: Final[tuple[str, ...]] = (
    "/usr/lib/vmware-vix-disklib",
    "/usr/lib/vmware-vix-disklib-distrib",
    "/usr/lib64/vmware-vix-disklib",
    "/opt/vmware-vix-disklib-distrib",
    "/opt/vmware-vix-disklib",
    "/opt/vmware/vmware-vix-disklib-distrib",
    "/usr/local/vmware-vix-disklib-distrib",
    "/usr/local/vmware-vix-disklib",
    "/usr/local/lib/vmware-vix-disklib",
    "/usr/local/lib/vmware-vix-disklib-distrib",
)
"""Where a kit is looked for when none is named; the first that has one is taken."""

MAIN_STEM: Final = "libvixDiskLib"
PLUGIN: Final = "libdiskLibPlugin.so"
"""The file that the SAN and HotAdd transports need."""
UNUSED_STEMS: Final = frozenset({"libvixMntapi"})
"""Parts of the kit that vddkfs has no use for."""

PACKAGES: Final[dict[str, tuple[str, str]]] = {
    "libexpat": ("libexpat1", "expat"),
    "libsqlite3": ("libsqlite3-0", "sqlite-libs"),
    "libssl": ("libssl3", "openssl-libs"),
    "libcrypto": ("libssl3", "openssl-libs"),
    "libcrypt": ("libcrypt1", "libxcrypt-compat"),
    "libz": ("zlib1g", "zlib"),
    "libstdc++": ("libstdc++6", "libstdc++"),
    "libgcc_s": ("libgcc-s1", "libgcc"),
    "libcurl": ("libcurl4", "libcurl"),
    "libxml2": ("libxml2", "libxml2"),
    "libglib-2.0": ("libglib2.0-0", "glib2"),
    "libnsl": ("libnsl2", "libnsl"),
    "libfuse": ("libfuse2", "fuse-libs"),
}
"""By stem: what to install for a library, with apt-get and with dnf."""

_LOADER: Final = "/lib64/ld-linux-x86-64.so.2"
_MAIN = re.compile(rf"{MAIN_STEM}\.so(?:\.(\d+(?:\.\d+)*))?")
_GET = "unpack the VDDK kit for Linux from VMware (Broadcom), and give libdir= its folder"


@dataclass(frozen=True, slots=True)
class Kit:
    """A kit that was found: *library* is the real file of libvixDiskLib, *release* from its name.

    *release* has as many numbers as the name: (8, 0, 2), (9, 1, 0, 0) or only (7,).
    """

    libdir: Path
    library: Path
    release: Release

    @property
    def folder(self) -> Path:
        """Where the libraries are: lib64."""
        return self.library.parent

    @property
    def release_text(self) -> str:
        """The release as a person writes it: 8.0.2."""
        return ".".join(map(str, self.release))


@dataclass(frozen=True, slots=True)
class Missing:
    """A library or symbol version that this machine lacks.

    *name* is a soname or ``soname (VERSION)``, *wanted_by* the files of the kit that need it.
    """

    name: str
    wanted_by: tuple[str, ...]

    @property
    def remedy(self) -> str:
        """What to install, or "" where that is not known."""
        return package_for(self.name)


def stem(soname: str) -> str:
    """Return a library's name without version: libssl for libssl.so.3."""
    return soname.partition(".so")[0]


def package_for(soname: str) -> str:
    """Return which packages hold *soname* on Debian and on Red Hat, in words, or ""."""
    names = PACKAGES.get(stem(soname))
    return f"install {names[0]} (apt-get) or {names[1]} (dnf)" if names else ""


def find_kit(libdir: str = "") -> Kit:
    """Return the newest library of the kit in *libdir*, or of the first of PLACES that has one.

    *libdir* is the kit's folder, the folder that it was unpacked in, or its lib64. Raises
    UsageError, AccessDenied or (nothing named and nothing found) SourceMissing.
    """
    if not libdir:
        for usual in map(Path, PLACES):
            found = _newest(usual / "lib64")
            if found:
                return _supported(usual, *found)
        raise SourceMissing("VDDK is not installed in any of the usual places", advice=_GET)
    named = Path(libdir).absolute()
    for place, folder in (
        (named, named / "lib64"),
        (named.parent, named),
        (named / "vmware-vix-disklib-distrib", named / "vmware-vix-disklib-distrib" / "lib64"),
    ):
        found = _newest(folder)
        if found:
            return _supported(place, *found)
    raise UsageError(f"libdir={libdir} holds no lib64/{MAIN_STEM}.so.N", advice=_GET)


def _newest(folder: Path) -> tuple[Path, Release] | None:
    """Return the library of the highest release in *folder*, if there is one."""
    best: tuple[Release, Path] | None = None
    try:
        for entry in folder.iterdir():
            name = _MAIN.fullmatch(entry.name)
            if not name:
                continue
            real = entry.resolve()
            real_name = _MAIN.fullmatch(real.name)
            digits = (real_name and real_name[1]) or name[1]
            release = tuple(map(int, digits.split("."))) if digits else ()
            if real.is_file() and (best is None or release > best[0]):
                best = (release, real)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise AccessDenied(f"{folder} cannot be read", cause=str(error)) from error
    return (best[1], best[0]) if best else None


def _supported(libdir: Path, library: Path, release: Release) -> Kit:
    if not release:
        raise UsageError(
            f"the release of {library} cannot be told, because its name has no number",
            advice=f"keep the name that the kit gave it, such as {MAIN_STEM}.so.8.0.2",
        )
    kit = Kit(libdir, library, release)
    # A name with the major number alone, so.6, does not say whether it is too old: it is tried.
    if release < OLDEST[: len(release)]:
        raise UsageError(
            f"{library} is VDDK {kit.release_text}, which is too old",
            advice="VDDK 6.5 is the oldest that works, 7.0 the oldest to recommend",
        )
    try:
        elf.read(library)
    except elf.NotLoadable as error:
        raise EngineError(f"{library} cannot be loaded", cause=str(error)) from error
    except OSError as error:
        raise AccessDenied(f"{library} cannot be read", cause=error.strerror or "") from error
    return kit


def kit_libraries(kit: Kit) -> list[elf.SharedLibrary]:
    """Return the libraries that *kit* brings along, each real file once, in order of name.

    Without libvixDiskLib itself, what vddkfs has no use for, and what is no library for us.
    """
    found: dict[Path, elf.SharedLibrary] = {}
    for entry in sorted(kit.folder.iterdir()):
        name = stem(entry.name)
        if ".so" not in entry.name or name == MAIN_STEM or name in UNUSED_STEMS:
            continue
        try:
            real = entry.resolve(strict=True)
            if real not in found and real.is_file():
                found[real] = elf.read(real)
        except (elf.NotLoadable, OSError):
            continue
    return list(found.values())


def missing_dependencies(kit: Kit, files: tuple[str, ...] = ()) -> tuple[Missing, ...]:
    """Return what this machine lacks for the libraries of *kit*, for ``doctor``.

    Asks the dynamic loader to list what it would load for each of *files* (names in lib64; default:
    all that vddkfs has a use for), as ldd does, but without a shell in between. The kit's folder is
    on the search path of that child only. Nothing of the kit is run. Raises EngineError where the
    loader cannot be asked.
    """
    paths = [kit.folder / name for name in files]
    if not files:
        paths = [kit.library, *(library.path for library in kit_libraries(kit))]
    wanted: dict[str, set[str]] = {}
    for path in paths:
        for name in _missing_of(path, kit.folder):
            wanted.setdefault(name, set()).add(path.name)
    return tuple(Missing(name, tuple(sorted(by))) for name, by in sorted(wanted.items()))


_NOT_FOUND = re.compile(r"^\s*(\S+) => not found", re.MULTILINE)
_NO_VERSION = re.compile(r"(\S+): version `([^']+)' not found")


def _missing_of(path: Path, folder: Path) -> set[str]:
    try:
        listed = subprocess.run(
            [_LOADER, "--library-path", str(folder), str(path)],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            # What ldd sets: list and go on, where --list would stop at the first that is missing.
            env={"LC_ALL": "C", "LD_TRACE_LOADED_OBJECTS": "1"},
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{_LOADER} cannot list what {path} needs", cause=str(error)) from error
    text = (listed.stdout + b"\n" + listed.stderr).decode(errors="backslashreplace")
    missing = set(_NOT_FOUND.findall(text))
    missing |= {
        f"{Path(library).name} ({version})" for library, version in _NO_VERSION.findall(text)
    }
    return missing
