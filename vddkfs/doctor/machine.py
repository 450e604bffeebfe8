"""The machine itself: what any mount needs, whatever is mounted."""

import contextlib
import locale
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from vddkfs.doctor.rows import Row
from vddkfs.errors import AccessDenied, VddkfsError
from vddkfs.memory import default_cache_size
from vddkfs.mounts import FUSE_DEVICE, check_fuse
from vddkfs.observe.summary import human
from vddkfs.options import MountOptions
from vddkfs.state import state_folder

SECONDS: Final = 20.0
OLDEST_KERNEL: Final = (5, 3)
"""The first with pidfd_open(2), which the daemon watches its workers with."""
_SYSLOG: Final = Path("/dev/log")
_FUSE_CONF: Final = Path("/etc/fuse.conf")
_SETUP: Final = "run contrib/setup, which installs it or tells what to install"
_FUSE3: Final = "install the package fuse3"


class Machine(msgspec.Struct, frozen=True):
    """What was seen. Texts are empty where all is well, or where a thing is absent."""

    kernel: str
    architecture: str
    root: bool
    fuse_problem: str
    fuse_remedy: str
    fusermount: str
    fusermount_version: str
    fusermount_setuid: bool
    pyfuse3: str
    libfuse: str
    hooks: bool
    binding_problem: str
    memory: int
    memory_available: int
    syslog: bool
    state: str
    state_problem: str
    allow_other: bool
    charset: str
    worker_locale: bool


def look() -> Machine:
    """Look at this machine."""
    fuse = _fuse()
    path = shutil.which("fusermount3") or ""
    pyfuse3, libfuse, hooks, problem = _binding()
    memory, available = _memory()
    state, state_problem = _state()
    return Machine(
        kernel=os.uname().release,
        architecture=os.uname().machine,
        root=os.geteuid() == 0,
        fuse_problem=fuse[0],
        fuse_remedy=fuse[1],
        fusermount=path,
        fusermount_version=_version([path, "-V"]) if path else "",
        fusermount_setuid=bool(path) and bool(os.stat(path).st_mode & stat.S_ISUID),
        pyfuse3=pyfuse3,
        libfuse=libfuse,
        hooks=hooks,
        binding_problem=problem,
        memory=memory,
        memory_available=available,
        syslog=_SYSLOG.is_socket(),
        state=state,
        state_problem=state_problem,
        allow_other=_user_allow_other(),
        charset=locale.getencoding() if hasattr(locale, "getencoding") else "utf-8",
        worker_locale=_has_locale("C.UTF-8"),
    )


def _fuse() -> tuple[str, str]:
    try:
        check_fuse()
        # Not every device that may be opened by its permissions opens: without the module, or in
        # a container that was not given it, the kernel refuses.
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except VddkfsError as error:
        return f"{error.message} {error.cause}".strip(), error.advice
    except OSError as error:
        finding = f"{FUSE_DEVICE} cannot be opened: {error.strerror}"
        return finding, "load the module with `modprobe fuse`; a container has to be given it"
    return "", ""


def _version(command: list[str]) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
        return found[0] if found else ""
    return ""


def _binding() -> tuple[str, str, bool, str]:
    """Return the versions of pyfuse3 and libfuse, whether the C module is there, and a problem."""
    try:
        from vddkfs.fuse import session

        import pyfuse3  # isort: skip  (after vddkfs.fuse.session, which loads the C module)
    except (ImportError, OSError) as error:
        return "", "", False, str(error)
    return str(pyfuse3.__version__), session.libfuse_version(), session.has_hooks(), ""


def _memory() -> tuple[int, int]:
    """Return the memory of this machine and how much of it is available, in bytes."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                found[name] = int(rest.split()[0]) * 1024
    total = found.get("MemTotal", 0)
    return total, found.get("MemAvailable", total)


def _state() -> tuple[str, str]:
    try:
        return str(state_folder()), ""
    except AccessDenied as error:
        return "", str(error)


def _user_allow_other() -> bool:
    with contextlib.suppress(OSError):
        lines = _FUSE_CONF.read_text("utf-8", "replace").splitlines()
        return any(line.strip() == "user_allow_other" for line in lines)
    return False


def _has_locale(name: str) -> bool:
    """Say whether the C library has a locale, which a process that sets it then is in."""
    code = f"import locale; locale.setlocale(locale.LC_ALL, {name!r})"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = [sys.executable, "-I", "-S", "-c", code]
        return subprocess.run(words, capture_output=True, timeout=10, check=False).returncode == 0
    return False


# Judging.


def judge(seen: Machine, options: MountOptions) -> list[Row]:
    """Return what is to be said of the machine."""
    rows = [_kernel(seen), *_devices(seen), *_libraries(seen), _permissions(seen)]
    if options.allow_other and not seen.root and not seen.allow_other:
        finding = f"{_FUSE_CONF} has no line user_allow_other"
        rows.append(Row("failure", "allow_other", finding, f"have root add it to {_FUSE_CONF}"))
    return [*rows, _cache(seen, options), *_log(seen, options), *_locale(seen)]


def can_mount(rows: list[Row]) -> bool:
    """Say whether nothing of the machine keeps a mount from working."""
    return all(row.level != "failure" for row in rows)


def builtin(mountable: bool) -> Row:
    """Return what is to be said of the built-in engine."""
    what = "built-in engine"
    if mountable:
        return Row("ok", what, "local VMDKs can be mounted now, without any VMware software")
    finding = "local VMDKs can be read, but nothing can be mounted yet"
    return Row("warning", what, finding, "put right what failed above; `vddkfs info` works already")


def _kernel(seen: Machine) -> Row:
    numbers = tuple(map(int, re.findall(r"\d+", seen.kernel)[:2]))
    if numbers < OLDEST_KERNEL:
        oldest = ".".join(map(str, OLDEST_KERNEL))
        finding = f"{seen.kernel}: workers cannot be watched before {oldest}"
        return Row("failure", "kernel", finding, "use a newer kernel")
    return Row("ok", "kernel", f"{seen.kernel} on {seen.architecture}")


def _devices(seen: Machine) -> list[Row]:
    rows = [Row("ok", str(FUSE_DEVICE), "there, and can be opened")]
    if seen.fuse_problem:
        rows = [Row("failure", str(FUSE_DEVICE), seen.fuse_problem, seen.fuse_remedy or _FUSE3)]
    what = "fusermount3"
    if seen.fusermount and (seen.fusermount_setuid or seen.root):
        version = f" (version {seen.fusermount_version})" if seen.fusermount_version else ""
        rows.append(Row("ok", what, seen.fusermount + version))
    elif seen.fusermount:
        remedy = f"have root run `chmod u+s {seen.fusermount}`, or mount as root"
        rows.append(Row("failure", what, f"{seen.fusermount} is not setuid root", remedy))
    elif seen.root:
        rows.append(Row("warning", what, "missing: other users cannot mount", _FUSE3))
    else:
        rows.append(Row("failure", what, "missing: only root can mount without it", _FUSE3))
    return rows


def _libraries(seen: Machine) -> list[Row]:
    if seen.binding_problem:
        return [Row("failure", "pyfuse3", seen.binding_problem, _SETUP)]
    versions = f"pyfuse3 {seen.pyfuse3}, libfuse {seen.libfuse}"
    if not seen.hooks:
        remedy = "run contrib/setup, which builds it where the headers of libfuse 3 are"
        finding = "missing: no SEEK_HOLE, so copies are slower, and a shorter queue in the kernel"
        return [Row("ok", "libraries", versions), Row("warning", "C module", finding, remedy)]
    return [Row("ok", "libraries", versions), Row("ok", "C module", "loaded")]


def _permissions(seen: Machine) -> Row:
    if seen.root:
        return Row("ok", "permissions", "root: everything that follows is permitted")
    finding = (
        "not root: the kernel's read-ahead cannot be raised (slower), guests cannot be mounted by "
        "loop devices, and san and hotadd do not work"
    )
    return Row("warning", "permissions", finding, "mount as root where you need one of these")


def _cache(seen: Machine, options: MountOptions) -> Row:
    what = "memory"
    size = options.cache_size or default_cache_size()
    finding = (
        f"{human(size)} for the cache of each mount; {human(seen.memory_available)} of "
        f"{human(seen.memory)} available"
    )
    if size > seen.memory:
        return Row("failure", what, finding, "lower cache_size=")
    if size > seen.memory_available // 2:
        return Row("warning", what, finding, "lower cache_size=, or end what needs the memory")
    return Row("ok", what, finding)


def _log(seen: Machine, options: MountOptions) -> list[Row]:
    rows = []
    target = options.log
    if target == "syslog" and not seen.syslog:
        finding = f"there is no syslog daemon at {_SYSLOG}"
        rows.append(Row("failure", "log", finding, "start one, or leave log=syslog out"))
    elif target == "syslog" or (target == "auto" and seen.syslog):
        rows.append(Row("ok", "log", "goes to syslog"))
    elif target == "auto":
        finding = f"goes to a file in {seen.state}, which goes away with the mount: no syslog here"
        rows.append(Row("ok", "log", finding))
    else:
        rows.append(Row("ok", "log", f"goes to {target}"))
    if seen.state_problem:
        remedy = "remove the folder, or make it yours alone with `chmod 0700`"
        rows.append(Row("failure", "state folder", seen.state_problem, remedy))
    return rows


def _locale(seen: Machine) -> list[Row]:
    rows = []
    if seen.charset.lower().replace("-", "") != "utf8":
        finding = f"the terminal's is {seen.charset}: some names are shown escaped"
        rows.append(Row("warning", "locale", finding, "set LC_ALL=C.UTF-8"))
    if not seen.worker_locale:
        finding = "there is no C.UTF-8, which workers run with: VDDK may not open some names"
        remedy = "install the package libc-bin (apt-get) or glibc-langpack-en (dnf)"
        rows.append(Row("warning", "locale", finding, remedy))
    return rows or [Row("ok", "locale", "UTF-8, here and for workers")]
