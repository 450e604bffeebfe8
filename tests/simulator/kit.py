"""Kits of the simulator for tests: built once, with sites, hosts and clients of their own."""

import contextlib
import functools
import inspect
import os
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.simulator.client import Channel

ROOT = Path(__file__).resolve().parents[2]
SIMULATOR = ROOT / "contrib" / "simulator"
SCRIPT = Path(__file__).with_name("client.py")
PROGRAMS = Path(__file__).parent / "c"
BUILDS = ROOT / "build"
SECONDS = 30.0
SANITIZE = os.environ.get("SIMULATOR_SANITIZE", "")
"""`address` or `thread`: all of these tests with a simulator that is built so."""
CHAIN = [f"[ds1] web01/web01{suffix}.vmdk" for suffix in ("", "-000001", "-000002")]
REGISTRY = """
[host esx1]
datastores = ds1, ds2, local1
[host esx2]
datastores = ds1
[datastore local1]
kind = local
[vm vm-16]
name = web01
host = esx1
power = off
vmx = [ds1] web01/web01.vmx
disk = [ds1] web01/web01-000002.vmdk
[snapshot snapshot-1]
vm = vm-16
disk = [ds1] web01/web01.vmdk
[snapshot snapshot-2]
vm = vm-16
disk = [ds1] web01/web01-000001.vmdk
[vm vm-17]
name = plain
host = esx1
power = off
disk = [ds1] plain/plain.vmdk
disk = [ds1] plain/thin.vmdk
disk = [ds1] plain/sparse.vmdk
[vm vm-18]
name = local
host = esx1
power = off
disk = [local1] local/local.vmdk
[vm vm-2]
name = proxy
host = esx1
power = on
disk = [ds2] proxy/proxy.vmdk
"""


@functools.cache
def built(release: str = "8.0", sanitize: str = "") -> Path:
    """Return a folder with the simulator in it; only what changed is made anew."""
    sanitize = sanitize or SANITIZE
    parts = [release] * (release != "8.0") + [sanitize] * bool(sanitize)
    name = "-".join(["simulator", *parts])
    BUILDS.mkdir(exist_ok=True)
    words = [str(SIMULATOR / "build"), "--release", release]
    words += ["--sanitize", sanitize] if sanitize else []
    done = subprocess.run(
        [*words, str(BUILDS / name)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return BUILDS / name


@functools.cache
def _runtime() -> dict[str, str]:
    """Return what a client that is not built so needs in its environment."""
    if not SANITIZE:
        return {}
    name = f"lib{SANITIZE[0]}san.so"
    words = ["cc", f"-print-file-name={name}"]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    quiet = "handle_segv=0:handle_abort=0:detect_leaks=0"
    options = {"ASAN_OPTIONS": quiet, "TSAN_OPTIONS": quiet.rpartition(":")[0]}
    return {"LD_PRELOAD": str(Path(found).resolve()), **options}


def compiled(source: Path, target: Path, *words: str) -> Path:
    """Compile a C program of the tests."""
    command = ["cc", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O1", "-g"]
    command += [f"-I{SIMULATOR / 'include'}", "-o", str(target), str(source), *words, "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return target


def until(condition: Callable[[], Any], seconds: float = 15.0, what: str = "") -> Any:
    """Look until *condition* is true, and return it."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"waited {seconds} s for {what or condition}"
        time.sleep(0.005)


class Event(NamedTuple):
    """One line of events.log."""

    time: float
    pid: int
    name: str
    fields: dict[str, str]


_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')


def _event(line: str) -> Event:
    moment, pid, name, rest = (line + " ").split(" ", 3)
    fields = {}
    for key, value in _FIELD.findall(rest):
        quoted = value.startswith('"')
        fields[key] = re.sub(r"\\(.)", r"\1", value[1:-1]) if quoted else value
    return Event(float(moment), int(pid), name, fields)


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.rename(path)


class Host:
    """A host process."""

    def __init__(self, program: Path, site: Path, environment: dict[str, str]) -> None:
        self.log = site / "host.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(program), str(site)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={"PATH": os.environ["PATH"], **environment},
            )
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], SECONDS)[0]
        line = self.process.stdout.readline() if ready else b""
        assert line.strip() == b"ready", (line, self.process.poll(), self.log.read_text())

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; return its exit code."""
        assert self.process.stdout is not None
        if self.process.poll() is None:
            if number != signal.SIGKILL:
                # Only that one reaches a host that stands still; and it is to serve nothing before.
                self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        try:
            return self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.stdout.close()


class Process:
    """A client process that runs a function."""

    def __init__(self, kit: "Kit", job: dict[str, Any], output: int | None) -> None:
        number = len(kit.processes)
        self._out, self._err = (kit.path / f"client{number}.{name}" for name in ("out", "err"))
        ours, theirs = socket.socketpair()
        with self._out.open("wb") as out, self._err.open("wb") as err, theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SCRIPT), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=out if output is None else output,
                stderr=err if output is None else output,
                pass_fds=[theirs.fileno()],
                env=kit.environment,
            )
        self.channel = Channel(ours.detach())
        self.channel.send(job)
        kit.processes.append(self)

    @property
    def stdout(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._err.read_text(errors="replace")

    def tell(self, value: Any) -> None:
        self.channel.send(value)

    def hear(self, timeout: float = SECONDS) -> Any:
        """Return what the function tells next."""
        return self._next("told", timeout)

    def result(self, timeout: float = SECONDS) -> Any:
        """Return what the function returned."""
        value = self._next("result", timeout)
        assert self.process.wait(timeout) == 0
        return value

    def _next(self, wanted: str, timeout: float) -> Any:
        try:
            kind, value = self.channel.receive(timeout)
        except (EOFError, ConnectionResetError):
            raise AssertionError(f"died: {self.process.wait(timeout)}\n{self.stderr}") from None
        assert kind == wanted, f"{kind}: {value}\n{self.stderr}"
        return value

    def silent(self, seconds: float = 0.1) -> bool:
        """Say whether it still has nothing to tell after a while."""
        return not select.select([self.channel.socket], [], [], seconds)[0]

    def died(self, timeout: float = SECONDS) -> int:
        """Wait for its end by a signal, and return that."""
        code = self.process.wait(timeout)
        if code >= 0:
            raise AssertionError(f"ended with {code}: {self.channel.receive(1)}\n{self.stderr}")
        return -code

    def kill(self) -> None:
        """kill -9, and wait for its end."""
        self.process.kill()
        self.process.wait(SECONDS)

    def end(self) -> None:
        self.kill()
        self.channel.socket.close()


class Kit:
    """A libdir with one site, `vcenter`; its lib64 is a built one's."""

    def __init__(self, path: Path, build: Path) -> None:
        self.path = path
        self.build = build
        self.site = path / "sites" / "vcenter"
        self.processes: list[Process] = []
        self.hosts: list[Host] = []
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(path), "LC_ALL": "C.UTF-8"}
        self.environment |= _runtime()
        self.site.mkdir(parents=True, exist_ok=True)
        (path / "lib64").symlink_to(build / "lib64")
        self.register(REGISTRY)
        self.configure()
        self.configure_kit()

    # What the simulator is told.

    def configure(self, *lines: str, profile: str = "instant") -> None:
        """Write the site's sim.conf. Later lines win."""
        usual = ["seed = 1", f"profile = {profile}", "hotadd.proxy = vm-2"]
        replace(self.site / "sim.conf", "\n".join([*usual, *lines, ""]))

    def configure_kit(self, *lines: str) -> None:
        """Write the kit's sim.conf."""
        replace(self.path / "sim.conf", "\n".join(["seed = 1", "profile = instant", *lines, ""]))

    def register(self, text: str) -> None:
        replace(self.site / "registry.conf", text)

    def config(self, *lines: str) -> str:
        """Write a configuration file of the client, and return its path. Later lines win."""
        path = self.path / f"client-{len(list(self.path.glob('client-*')))}.conf"
        path.write_text("\n".join([f"tmpDirectory={self.path / 'tmp'}", *lines, ""]))
        return str(path)

    # Its processes.

    def start(self, **environment: str) -> Host:
        host = Host(self.build / "bin" / "vixsim-host", self.site, environment)
        self.hosts.append(host)
        return host

    def client(
        self,
        function: Callable[..., Any],
        *,
        init: bool = True,
        config: str | None = None,
        output: int | None = None,
        **arguments: Any,
    ) -> Process:
        """Run *function* in a client process."""
        job = {
            "libdir": str(self.path),
            "init": init,
            "config": config or self.config(),
            "name": function.__name__,
            "file": inspect.getsourcefile(function),
            "source": _source(function),
            "arguments": arguments,
        }
        return Process(self, job, output)

    def run(self, function: Callable[..., Any], **keys: Any) -> Any:
        """Run *function* in a client process to its end, and return what it returns."""
        return self.client(function, **keys).result()

    def python(self, code: str, **environment: str) -> str:
        """Run Python code in a process of its own, and return what it prints."""
        words = [sys.executable, "-I", "-S", "-c", code]
        keys: dict[str, Any] = {"capture_output": True, "text": True, "timeout": SECONDS}
        done = subprocess.run(words, env=self.environment | environment, check=False, **keys)
        return done.stdout.strip() or f"{done.returncode}: {done.stderr}"

    def finish(self) -> None:
        with contextlib.ExitStack() as stack:
            for host in self.hosts:
                stack.callback(host.stop)
            for process in self.processes:
                stack.callback(process.end)
        for device in self.attachments():
            subprocess.run(["losetup", "-d", device], check=False, timeout=SECONDS)

    # What happened.

    def attachments(self) -> list[str]:
        """Return the devices that hot-added disks are."""
        file = self.site / ".sim" / "attachments"
        lines = file.read_text().splitlines() if file.exists() else []
        rows = [line.split("\t") for line in lines if line.startswith("disk\t")]
        return [device for row in rows for device in row[4].split(",") if device]

    def disk(self, path: str) -> Path:
        """Return where a `[datastore] path` is."""
        store, _, rest = path[1:].partition("] ")
        return self.site / store / rest

    def events(self, name: str = "", **fields: Any) -> list[Event]:
        """Return the events of a name that have all these fields."""
        log = self.site / ".sim" / "events.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [
            event
            for event in map(_event, lines)
            if name in ("", event.name)
            and all(event.fields.get(key) == str(value) for key, value in fields.items())
        ]


def _source(function: Callable[..., Any]) -> str:
    """Return the source of a function, at the line where it stands."""
    lines, first = inspect.getsourcelines(function)
    return "\n" * (first - 1) + textwrap.dedent("".join(lines))


Kits = Callable[..., Kit]


@contextlib.contextmanager
def packets() -> Iterator[tuple[int, int]]:
    """Open a pipe that keeps what is written by one write(2) together."""
    ends = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield ends
    finally:
        for end in ends:
            with contextlib.suppress(OSError):
                os.close(end)
