"""A mount under test: made by the installed command, touched only from processes that can be
killed, and always taken down.

At its end every mount is asked for its restarts and its log is read: a restart, a warning or an
error that the test did not announce fails the test.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import pickle
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vddkfs.control import ask
from vddkfs.errors import NotMounted
from vddkfs.state import log_path, socket_path

COMMAND = Path(sys.executable).with_name("vddkfs")
AGENT = Path(__file__).with_name("agent.py")
SECONDS = 60.0
PROMPT = 8.0
"""Seconds in which an umount of an idle mount is done, also on a machine that is busy."""
_MNT_FORCE = 1
_LOUD = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) ")
_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ")

Done = subprocess.CompletedProcess[str]


def run(*command: str | Path, timeout: float = SECONDS, **keys: Any) -> Done:
    """Run a command to its end, whatever its exit code is."""
    keys = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True} | keys
    return subprocess.run([str(word) for word in command], timeout=timeout, check=False, **keys)


def succeed(*command: str | Path, timeout: float = SECONDS, **keys: Any) -> Done:
    """Run a command that must work."""
    done = run(*command, timeout=timeout, **keys)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def vddkfs(*arguments: str | Path, **keys: Any) -> Done:
    """Run the installed command."""
    return run(COMMAND, *arguments, **keys)


def until(condition: Callable[[], Any], seconds: float = 20.0, what: str = "") -> Any:
    """Look until *condition* is true, and return it."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"waited {seconds} s for {what or condition}"
        time.sleep(0.01)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def alive(pid: int) -> bool:
    """Say whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def children(pid: int) -> list[int]:
    """Return the running children of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] not in "ZX":
                found.append(int(folder.name))
    return found


def mounted(place: Path) -> bool:
    """Say whether anything is mounted at a place, without touching it."""
    return any(line.split(" ")[4] == str(place) for line in _mountinfo())


def state_files(place: Path) -> list[Path]:
    """Return what the state folder has of a mount."""
    return [path for path in (socket_path(str(place)), log_path(str(place))) if path.exists()]


def _mountinfo() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def loud_lines(log: Path) -> list[str]:
    """Return the warnings and errors of a daemon's log, each with its traceback."""
    found: list[str] = []
    loud = False
    for line in log.read_text().splitlines() if log.exists() else ():
        if _LINE.match(line):
            loud = bool(_LOUD.match(line))
            if loud:
                found.append(line)
        elif loud:
            found[-1] += "\n" + line
    return found


def threads(pid: int) -> list[Path]:
    """Return the folders in /proc of a process's threads, none if it has ended."""
    with contextlib.suppress(OSError):
        return list(Path(f"/proc/{pid}/task").iterdir())
    return []


def _where(pid: int) -> str:
    """Tell where in the kernel the threads of a process are."""
    found = [f"process {pid}:"]
    for task in threads(pid):
        with contextlib.suppress(OSError):
            state = (task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            call, wchan = ((task / name).read_text() for name in ("syscall", "wchan"))
            found.append(f"  thread {task.name} {state} in {wchan}, system call {call.strip()}")
    return "\n".join(found)


class Agent:
    """A process that touches the mount, and dies when it does not answer."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(AGENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, function: str, *arguments: Any) -> None:
        assert self._process.stdin is not None
        packed = pickle.dumps((function, arguments))
        self._process.stdin.write(struct.pack("<I", len(packed)) + packed)
        self._process.stdin.flush()

    def receive(self, timeout: float = SECONDS) -> Any:
        end = time.monotonic() + timeout
        (length,) = struct.unpack("<I", self._bytes(4, end))
        result, error = pickle.loads(self._bytes(length, end))
        if error is not None:
            raise error
        return result

    def _bytes(self, size: int, end: float) -> bytes:
        assert self._process.stdout is not None
        data = bytearray()
        while len(data) < size:
            left = max(0.0, end - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                self.close()
                raise TimeoutError("the mount did not answer in time")
            part = os.read(self._process.stdout.fileno(), min(size - len(data), 1 << 20))
            assert part, "the process that touches the mount has died"
            data += part
        return bytes(data)

    def waiting(self, seconds: float) -> bool:
        """Say whether there is still no answer after a while."""
        assert self._process.stdout is not None
        return not select.select([self._process.stdout], [], [], seconds)[0]

    def close(self) -> None:
        """End it. A request that the daemon has keeps even a killed process: it is left then."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PROMPT)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Mount:
    """One mount of *source* at *place*. *options* are words of -o; a log is always kept."""

    def __init__(self, source: Path, place: Path, log: Path, options: Sequence[str]) -> None:
        self.source = source
        self.place = place
        self.log = log
        self.options = [*options, f"log={log}"]
        self.pid = 0
        self.restarts: int | None = 0
        self.ended = False
        self._agent: Agent | None = None
        self._closed: list[Agent] = []
        self._expected: list[str] = []
        self._allowed: list[str] = []

    def start(self, *words: str) -> Done:
        """Mount, and remember the daemon."""
        done = vddkfs("mount", self.source, self.place, "-o", ",".join(self.options), *words)
        assert done.returncode == 0, done.stderr
        self.pid = int(self.status()["pid"])
        self.ended = False
        return done

    # What the test announces.

    def expect(self, *patterns: str) -> None:
        """Announce warnings or errors of the log; each must come."""
        self._expected += patterns

    def allow(self, *patterns: str) -> None:
        """Announce warnings or errors that may come."""
        self._allowed += patterns

    # What the mount says.

    def status(self) -> dict[str, Any]:
        """Return what `vddkfs status --json` prints, without the time that a command takes."""
        return ask(str(self.place), "status")

    def worker(self, disk: int = 0) -> dict[str, Any]:
        """Return what status tells of a disk's worker."""
        found: dict[str, Any] = self.status()["disks"][disk]["workers"][0]
        return found

    def loud(self) -> list[str]:
        return loud_lines(self.log)

    # Touching it.

    def path(self, name: str = "") -> str:
        return os.path.join(self.place, name)

    @property
    def agent(self) -> Agent:
        if self._agent is None:
            self._agent = Agent()
        return self._agent

    def ask(self, function: str, *arguments: Any, timeout: float = SECONDS) -> Any:
        """Call a function of ``agent.py``, or of ``os``, in the process that touches the mount."""
        self.agent.send(function, *arguments)
        return self.agent.receive(timeout)

    def attempt(self, wanted: int, function: str, *arguments: Any) -> Any:
        """Ask, and return the result, or None where that failed with the errno *wanted*."""
        try:
            return self.ask(function, *arguments)
        except OSError as error:
            if error.errno != wanted:
                raise
            return None

    def stat(self, name: str) -> os.stat_result:
        found: os.stat_result = self.ask("stat", self.path(name))
        return found

    def read(self, name: str, offset: int, size: int, direct: bool = False) -> bytes:
        found: bytes = self.ask("read", self.path(name), offset, size, direct)
        return found

    def open(self, name: str, direct: bool = False) -> int:
        found: int = self.ask("open", self.path(name), os.O_DIRECT if direct else os.O_RDONLY)
        return found

    def content(self, name: str) -> bytes:
        found: bytes = self.ask("content", self.path(name))
        return found

    def json(self, name: str) -> Any:
        return json.loads(self.content(name))

    def sha256(self, name: str, direct: bool = False) -> str:
        found: str = self.ask("sha256", self.path(name), direct)
        return found

    def map_known(self, name: str) -> None:
        """Wait until the allocation map of a disk's folder is there."""
        self.content(os.path.join(name, "map.json"))

    # Its end.

    def umount(self, *words: str) -> Done:
        return vddkfs("umount", self.place, *words)

    def close_agent(self) -> None:
        if self._agent is not None:
            self._closed.append(self._agent)
            self._agent.close()
            self._agent = None

    def finish(self) -> None:
        """Take the mount down and judge it. Raises AssertionError."""
        problems: list[str] = []
        self.close_agent()
        if self.pid and alive(self.pid) and mounted(self.place):
            problems += self._judge_restarts()
            self.ended = True
            problems += self._judge_umount()
        self.destroy()
        problems += self._judge_log()
        assert not problems, "\n".join(problems)

    def _judge_umount(self) -> list[str]:
        """Unmount in the plain way, which is quicker than the command and has to do as well."""
        processes = (self.pid, *children(self.pid))
        start = time.monotonic()
        done = run("umount", self.place)
        if done.returncode:
            return [f"umount ended with {done.returncode}: {done.stderr}"]
        while any(alive(pid) for pid in processes):
            if time.monotonic() > start + PROMPT:
                where = "\n".join(map(_where, processes))
                return [f"processes are left {PROMPT} s after the umount:\n{where}"]
            time.sleep(0.005)
        return [f"{path} is left" for path in state_files(self.place)]

    def destroy(self) -> None:
        """Leave nothing behind, whatever happened."""
        self.close_agent()
        if self.pid and alive(self.pid):
            for pid in (*children(self.pid), self.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until(lambda: not alive(self.pid), what="the end of the daemon")
        while mounted(self.place):
            succeed("umount", "-l", self.place)
        for path in state_files(self.place):
            path.unlink()  # of a daemon that was killed
        for agent in self._closed:
            agent.close()  # nothing can hold it any more

    def abort(self) -> None:
        """End every request that somebody waits for, with an error, and then the mount.

        A daemon that waits in the kernel for its own mount does not even die of SIGKILL.
        """
        ctypes.CDLL(None).umount2(os.fsencode(self.place), _MNT_FORCE)
        self.destroy()

    def _judge_restarts(self) -> list[str]:
        try:
            status = self.status()
        except NotMounted as error:
            where = "\n".join(map(_where, (self.pid, *children(self.pid))))
            return [f"{error}; meanwhile:\n{where}"]
        restarts = sum(disk["workers"][0]["restarts"] for disk in status["disks"])
        if self.restarts is not None and restarts != self.restarts:
            return [f"{restarts} restarts, not {self.restarts}: {status['disks']}"]
        return []

    def _judge_log(self) -> list[str]:
        lines = self.loud()
        announced = [re.compile(pattern) for pattern in self._expected + self._allowed]
        problems = [
            f"not announced in the log: {line}"
            for line in lines
            if not any(pattern.search(line) for pattern in announced)
        ]
        problems += [
            f"announced, but not in the log: {pattern}"
            for pattern in self._expected
            if not any(re.search(pattern, line) for line in lines)
        ]
        return problems


class Mounts:
    """Makes the mounts of one test below *folder*."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[Mount] = []

    def __call__(self, source: Path, *options: str) -> Mount:
        mount = self.prepare(source, *options)
        mount.start()
        return mount

    def prepare(self, source: Path, *options: str) -> Mount:
        """Return a mount that is not mounted yet."""
        number = len(self.made)
        place = self.folder / f"mnt{number}"
        place.mkdir()
        mount = Mount(source, place, self.folder / f"daemon{number}.log", options)
        self.made.append(mount)
        return mount

    def finish(self, judge: bool = True) -> None:
        """Take all mounts down; *judge* them unless the test has failed already."""
        with contextlib.ExitStack() as stack:
            for mount in self.made:
                stack.callback(mount.destroy)
            for mount in self.made if judge else ():
                mount.finish()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process stand still meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
