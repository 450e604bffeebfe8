"""What dead mounts left behind, and taking it away: the work of ``vddkfs cleanup``.

In the state folder: control sockets that nobody listens on, logs that nobody writes, and the
folders ``vddk/mount-PID``, ``vddk/describe-PID`` and ``vddk/doctor-PID`` that no living process
holds (``state.held``): that of one whose exclusive lock can be had is dead. It is locked while it
is taken away.

A worker's folder may stand for disks that are still attached to this machine: its ``worker.json``
tells whether it hot-added. Then VMware's library has to take them away first, in a worker, with
the same folder and a login; what it could not take away keeps its folder.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from vddkfs.engines.config import VddkConfig
from vddkfs.engines.describe import describe_images
from vddkfs.engines.output import parse_line
from vddkfs.errors import LeftBehind, VddkfsError

WORKER_FILE: Final = "worker.json"
"""In a worker's folder: what it was about (see ``engines.vddk.runtime``)."""
WORKER_SECONDS: Final = 900.0
"""How long a worker may take to clean up: it connects, and reconfigures a VM."""
_FOLDER: Final = re.compile(r"(mount|describe|doctor)-\d+")
_CLEANED: Final = re.compile(r"hot-added disks cleaned up: (\d+), remaining: (\d+)")
_NOT_CLEANED: Final = re.compile(r"hot-added disks could not be cleaned up|no cleanup: ")

CleanUp = Callable[[VddkConfig], tuple[int, str]]
"""Has a worker clean up; returns how many disks it took away, and why not all, or ""."""


class Remaining(msgspec.Struct, frozen=True):
    """Something that was not taken away. *server* is whose hot-added disks it is about, or ""."""

    path: str
    reason: str
    remedy: str
    server: str = ""


class Report(msgspec.Struct):
    """What was done, or is to be done: *removed* paths, *cleaned* disks, what is *remaining*."""

    removed: list[str] = []
    cleaned: int = 0
    remaining: list[Remaining] = []


class Worker(msgspec.Struct, frozen=True):
    """A dead worker's *folder*, of which disks may still be attached, and its *config*."""

    folder: Path
    config: VddkConfig


@contextlib.contextmanager
def _dead(folder: Path) -> Iterator[bool]:
    """Say whether nobody holds *folder*; nobody can while the context lasts. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def hot_adders(folder: Path) -> list[Worker]:
    """Return the workers in *folder*, that of a dead mount, which may have left disks attached."""
    found = []
    for own in [folder, *sorted(entry for entry in folder.iterdir() if _is_folder(entry))]:
        try:
            data = (own / WORKER_FILE).read_bytes()
            config = msgspec.json.decode(data, type=VddkConfig)
        except (OSError, ValueError):
            # No worker's; or one that died while it wrote, which is before it does anything.
            continue
        if config.hot_adds and config.server:
            found.append(Worker(own, config))
    return found


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def clean(state: Path, clean_up: CleanUp | None, *, dry: bool = False) -> Report:
    """Take away what dead mounts left in *state*, and return what was done.

    *clean_up* has a worker take hot-added disks away; without it their folders stay. *dry* changes
    nothing, and reports what would be removed.
    """
    report = Report()
    for folder in _folders(state / "vddk"):
        try:
            with _dead(folder) as dead:
                if dead:
                    _clean_folder(folder, clean_up, report, dry)
        except FileNotFoundError:
            # Its mount ended, and took it away, while we looked.
            continue
        except OSError as error:
            remedy = "run vddkfs cleanup as the user who mounted, or as root"
            report.remaining.append(Remaining(str(folder), str(error), remedy))
    sockets = [path for path in _entries(state, ".sock") if path.is_socket()]
    dead_sockets = [path for path in sockets if _nobody_listens(path)]
    living = {path.stem for path in sockets if path not in dead_sockets}
    logs = [path for path in _entries(state, ".log") if path.stem not in living]
    for path in [*dead_sockets, *_unused(logs)]:
        _remove(path, report, dry)
    return report


def _folders(vddk: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        entries = sorted(vddk.iterdir())
        return [one for one in entries if _FOLDER.fullmatch(one.name) and _is_folder(one)]
    return []


def _entries(state: Path, ending: str) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in state.iterdir() if path.name.endswith(ending))
    return []


def _remove(path: Path, report: Report, dry: bool) -> None:
    try:
        if not dry:
            if _is_folder(path):
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        remedy = "run vddkfs cleanup as the user who mounted, or as root"
        report.remaining.append(Remaining(str(path), str(error), remedy))
    else:
        report.removed.append(str(path))


# Hot-added disks.


def _clean_folder(folder: Path, clean_up: CleanUp | None, report: Report, dry: bool) -> None:
    left = False
    for worker in hot_adders(folder):
        if dry:
            reason = "disks may still be attached to this machine; the library is to be asked"
            report.remaining.append(_attached(worker, reason))
            left = True
        else:
            left = not _clean_worker(worker, clean_up, report) or left
    if not left:
        _remove(folder, report, dry)


def _clean_worker(worker: Worker, clean_up: CleanUp | None, report: Report) -> bool:
    """Have the disks of *worker* taken away, and say whether none is left.

    The worker keeps the folder where it did not get so far; at least what the folder is about is
    kept for the next cleanup.
    """
    if clean_up is None:
        reason = "disks may still be attached to this machine, and no credentials were given"
        report.remaining.append(_attached(worker, reason))
        return False
    folder = worker.folder
    config = msgspec.structs.replace(worker.config, images=(), tmp_directory=str(folder))
    cleaned, problem = clean_up(config)
    report.cleaned += cleaned
    if problem:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / WORKER_FILE).write_bytes(msgspec.json.encode(worker.config))
        report.remaining.append(_attached(worker, problem))
    return not problem


@contextlib.contextmanager
def alone(state: Path) -> Iterator[None]:
    """Be the only cleanup of *state*. Raises LeftBehind if another one is under way."""
    vddk = state / "vddk"
    if not vddk.is_dir():
        yield
        return
    with _dead(vddk) as nobody:
        if not nobody:
            raise LeftBehind("another vddkfs cleanup is under way", advice="wait until it is done")
        yield


def _attached(worker: Worker, reason: str) -> Remaining:
    server = worker.config.server
    remedy = f"vddkfs cleanup --server {server} -o credentials=FILE"
    return Remaining(str(worker.folder), f"{server}: {reason}", remedy, server)


def by_worker(secret: int, libdir: str = "", seconds: float = WORKER_SECONDS) -> CleanUp:
    """Return what has a worker clean up, which logs in with the credentials of *secret*.

    *libdir* replaces that of the dead worker, if it is given.
    """

    def clean_up(config: VddkConfig) -> tuple[int, str]:
        said: list[str] = []
        if libdir:
            config = msgspec.structs.replace(config, libdir=libdir)
        try:
            describe_images(config, secret, lambda line: said.append(parse_line(line)[1]), seconds)
        except VddkfsError as error:
            return outcome(said, str(error))
        return outcome(said)

    return clean_up


def only(server: str, clean_up: CleanUp) -> CleanUp:
    """Return *clean_up* for the disks of *server* alone: no other gets to see its credentials."""

    def clean_up_one(config: VddkConfig) -> tuple[int, str]:
        if config.server != server:
            return 0, "disks may still be attached, and the credentials are for another server"
        return clean_up(config)

    return clean_up_one


def outcome(said: list[str], failed: str = "") -> tuple[int, str]:
    """Return how many disks were taken away by what a worker *said*, and why not all, or ""."""
    cleaned, remaining = 0, 0
    told = False
    problem = failed
    for text in said:
        found = _CLEANED.search(text)
        if found:
            told = True
            cleaned += int(found[1])
            remaining = int(found[2])
        elif _NOT_CLEANED.search(text):
            problem = problem or text
    if not problem and remaining:
        problem = f"{remaining} disks are still attached to this machine"
    if not problem and not told:
        problem = "the library did not say that it cleaned up"
    return cleaned, problem


# Sockets and logs.


def _nobody_listens(path: Path) -> bool:
    """Say whether the control socket at *path* is dead.

    One that is bound but not listening yet refuses as well, so the kernel's list is looked at too;
    that has only those of our own network namespace, so it is not enough either.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except ConnectionRefusedError:
            return not _is_bound(path)
        except OSError as error:
            return error.errno == errno.ENOENT
    return False


def _is_bound(path: Path) -> bool:
    try:
        lines = Path("/proc/net/unix").read_bytes().splitlines()
    except OSError:
        return True
    return any(line.endswith(b" " + os.fsencode(path)) for line in lines)


def _unused(logs: list[Path]) -> list[Path]:
    """Return those of *logs* that no process has open: a mount has its log before its socket."""
    if not logs:
        return []
    wanted = {os.fspath(path) for path in logs}
    for process in filter(str.isdigit, os.listdir("/proc")):
        # Processes and descriptors come and go while we look.
        with contextlib.suppress(OSError), os.scandir(f"/proc/{process}/fd") as descriptors:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    wanted.discard(os.readlink(descriptor.path))
    return [path for path in logs if os.fspath(path) in wanted]


def as_json(report: Report) -> str:
    """Return *report* as JSON."""
    return json.dumps(msgspec.to_builtins(report), indent=2)
