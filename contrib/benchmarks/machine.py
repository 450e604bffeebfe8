"""The machine: which tools it has, whether it was idle, and what it is."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import all_pids, command_line, cpu_ticks

TOOLS: Final = {
    # tool: (packages of Debian and Ubuntu, packages of RHEL and its like)
    "qemu-img": ("qemu-utils", "qemu-img"),
    "qemu-io": ("qemu-utils", "qemu-img"),
    "qemu-nbd": ("qemu-utils", "qemu-img"),
    "qemu-storage-daemon": ("qemu-system-common", "qemu-kvm-core"),
    "nbdfuse": ("libnbd-bin", "nbdfuse"),
    "fio": ("fio", "fio"),
    "fusermount3": ("fuse3", "fuse3"),
}
REMOTE_TOOLS: Final = {
    **{tool: TOOLS[tool] for tool in ("qemu-storage-daemon", "nbdfuse", "fio", "fusermount3")},
    "nbdkit": ("nbdkit", "nbdkit"),
    "cc": ("gcc", "gcc"),
    "c++": ("g++", "gcc-c++"),
    "losetup": ("util-linux", "util-linux"),
    "mkfs.ext4": ("e2fsprogs", "e2fsprogs"),
}
"""What ``run remote`` wants."""
BUSY_PERCENT: Final = 5.0
"""Above this share of all CPUs in use, a machine is not idle."""


def missing_tools(tools: Mapping[str, tuple[str, str]] = TOOLS) -> str:
    """Return how to install what is missing of *tools*; "" if nothing is."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if not missing:
        return ""
    apt, dnf = (sorted({tools[tool][n] for tool in missing}) for n in (0, 1))
    return (
        f"missing on this machine: {', '.join(missing)}\n"
        f"Debian, Ubuntu:       apt-get install {' '.join(apt)}\n"
        f"RHEL and its like:    dnf install {' '.join(dnf)}"
    )


def idleness(seconds: float = 1.0) -> dict[str, Any]:
    """Look at the machine for a moment: how busy it is, and who keeps it busy."""
    busy, total = _cpu_times()
    before = {pid: sum(cpu_ticks(pid)) for pid in all_pids()}
    time.sleep(seconds)
    busy_after, total_after = _cpu_times()
    percent = 100.0 * (busy_after - busy) / max(total_after - total, 1)
    used = {
        pid: sum(cpu_ticks(pid)) - before.get(pid, 0) for pid in all_pids() if pid != os.getpid()
    }
    busiest = sorted(used.items(), key=lambda item: -item[1])[:5]
    ticks = os.sysconf("SC_CLK_TCK") * seconds
    return {
        "idle": percent <= BUSY_PERCENT,
        "busy_percent": round(percent, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "busiest": [
            {"percent_of_a_cpu": round(100 * n / ticks), "command": command_line(pid)[:60]}
            for pid, n in busiest
            if n > 0
        ],
    }


def _cpu_times() -> tuple[int, int]:
    """Return the busy and all ticks of all CPUs; a stolen tick is a busy one."""
    values = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(values) - values[3] - values[4], sum(values)


def describe(root: Path) -> dict[str, Any]:
    """Return what the machine is and which versions of everything it has."""
    from vddkfs import __version__
    from vddkfs.fuse.session import libfuse_version

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpus": os.cpu_count(),
        "cpu": _cpu_model(),
        "memory_gib": round(memory / 1024**3, 1),
        "kernel": platform.release(),
        "vddkfs": f"{__version__} ({_revision(root)})",
        "python": platform.python_version(),
        "pyfuse3": importlib.metadata.version("pyfuse3"),
        "trio": importlib.metadata.version("trio"),
        "libfuse": libfuse_version(),
        "qemu": _first_line("qemu-img", "--version"),
        "libnbd": _first_line("nbdfuse", "--version"),
        "nbdkit": _first_line("nbdkit", "--version") if shutil.which("nbdkit") else "",
        "fio": _first_line("fio", "--version"),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).split("\n")[0].strip()


def _revision(root: Path) -> str:
    git = ["git", "-C", str(root)]
    commit = _first_line(*git, "rev-parse", "--short", "HEAD")
    changed = _first_line(*git, "status", "--porcelain", "--", "vddkfs")
    return f"{commit or 'no git'}{', changed' if changed else ''}"
