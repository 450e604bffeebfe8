"""Processes and mounts of a run: started, measured, and gone when it ends, however it ends.

The run is a "subreaper": whatever a process that it started leaves behind becomes its own child.
So all descendants can be found, and none belongs to anybody else.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final

MARK: Final = "VDDKFS_BENCHMARK"
"""In the environment of what is started: tells the leftovers of a run that was killed."""
_PR_SET_CHILD_SUBREAPER: Final = 36
_MNT_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


class BenchmarkError(Exception):
    """Something that the run cannot go on with, or a piece of work that failed."""


def until(condition: Callable[[], bool], seconds: float, pause: float = 0.02) -> bool:
    """Wait for *condition*, and say whether it came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def start(command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    """Start a program that serves; what it says goes to *log*. Ctrl-C does not reach it."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def run(command: Sequence[str | Path], timeout: float = 900.0) -> str:
    """Run a command to its end and return its output. Raises BenchmarkError if it fails."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, process_group=0
        )
        ended = os.pidfd_open(process.pid)
        try:
            # At once when it ends: Popen.wait with a time-out looks every 50 ms only.
            if not select.select([ended], [], [], timeout)[0]:
                raise BenchmarkError(f"{words[0]} took more than {timeout:g} s")
            process.wait()
        finally:
            os.close(ended)
            # Not waited for: with a request at a mount that hangs it ends only after that mount.
            if process.returncode is None:
                process.kill()
        said, complaints = map(_content, (output, errors))
    if process.returncode:
        lines = " / ".join((complaints or said).strip().splitlines()[-3:])
        raise BenchmarkError(f"{words[0]} failed ({process.returncode}): {lines}")
    return said


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _stat_fields(pid: int) -> list[str]:
    """Return /proc/PID/stat from the state on; empty if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def all_pids() -> list[int]:
    """Return the ids of all processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants(ancestor: int) -> list[int]:
    """Return the living processes below *ancestor*, parents first."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        fields = _stat_fields(pid)
        if fields and fields[0] not in "ZX":
            children.setdefault(int(fields[1]), []).append(pid)
    found: list[int] = []
    waiting = [ancestor]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def is_alive(pid: int) -> bool:
    """Say whether the process runs (a zombie does not)."""
    fields = _stat_fields(pid)
    return bool(fields) and fields[0] not in "ZX"


def cpu_ticks(pid: int) -> tuple[int, int]:
    """Return the clock ticks that the process has spent in user space and in the kernel."""
    fields = _stat_fields(pid)
    return (int(fields[11]), int(fields[12])) if fields else (0, 0)


def sleeps(pid: int) -> int:
    """Return how many times the threads of the process have gone to sleep."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):
            for line in status.read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches:"):
                    total += int(line.split()[1])
    return total


def command_line(pid: int) -> str:
    """Return the first words of a process's command, without folders; "" if it is gone."""
    with contextlib.suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
        words = [word.rpartition("/")[2] for word in line.split("\0")[:7]]
        return " ".join(words).strip() or Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def pss(pids: Sequence[int]) -> int:
    """Return the bytes of memory of the processes; what they share counts once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def mounts_below(folder: Path) -> list[str]:
    """Return where something is mounted below *folder*, the latest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines():
        place = line.split(" ")[4].replace("\\040", " ")
        if place.startswith(f"{folder}/"):
            found.append(place)
    return found[::-1]


@contextlib.contextmanager
def guest_mounted(file: Path, place: Path, options: str, seconds: float) -> Iterator[Path]:
    """Mount the ext4 of *file* at *place* through a loop device while the block lasts.

    *seconds* is how long a mount or an unmount may take.
    """
    place.mkdir(exist_ok=True)
    run(["mount", "-t", "ext4", "-o", options, file, place], timeout=seconds)
    try:
        yield place
        run(["umount", place], timeout=seconds)
    finally:
        with contextlib.suppress(OSError, BenchmarkError):
            if place.is_mount():
                detach(str(place))


def detach(place: str) -> None:
    """Take a mount away, whatever it is doing."""
    if os.geteuid() == 0 and _libc.umount2(os.fsencode(place), _MNT_DETACH) == 0:
        return
    subprocess.run(["fusermount3", "-u", "-z", "--", place], capture_output=True, check=False)


def end(pids: Sequence[int], patience: float = 5.0) -> None:
    """End processes that this run started: asked to first, then killed."""
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        for pid in filter(is_alive, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)
        if until(lambda: not any(map(is_alive, pids)), seconds):
            break
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def end_all(mounts: Path, spare: Sequence[int] = ()) -> list[str]:
    """End every descendant and every mount below *mounts*; return what there was, as words.

    The processes of *spare* go on.
    """

    def others() -> list[int]:
        return [pid for pid in descendants(os.getpid()) if pid not in spare]

    below = others()
    said = [f"process {pid}: {command_line(pid)}" for pid in below]
    end(below)
    # Whoever hung on a mount gets ENOTCONN once that is gone; the rest is killed.
    for place in mounts_below(mounts):
        said.append(f"mount {place}")
        detach(place)
    end(others(), patience=0.5)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return said


def _leftovers(mark: str) -> list[int]:
    """Return the processes that an earlier run with this mark left behind when it was killed."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for pid in all_pids():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if pid != os.getpid() and wanted in environment:
                found.append(pid)
    return found


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def supervised(work: Path) -> Iterator[Path]:
    """Keep *work* to this run, and end everything that was started when the block ends.

    Yields the folder for mountpoints. Raises BenchmarkError if another run has *work*.
    """
    mounts = work / "mounts"
    mounts.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BenchmarkError(f"another run is using {work}") from None
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        end(_leftovers(str(work)))
        end_all(mounts)
        os.environ[MARK] = str(work)
        try:
            yield mounts
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            end_all(mounts)
            for place in mounts.iterdir():
                with contextlib.suppress(OSError):
                    place.rmdir() if place.is_dir() else place.unlink()
    finally:
        os.close(lock)
