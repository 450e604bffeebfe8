"""The daemon and its worker under cProfile, for profile-read.

    profiled.py daemon FOLDER ARGUMENTS OF VDDKFS...
    profiled.py worker FOLDER SOCKET_FD PARENT_PID

Each leaves FOLDER/daemon.pstats or FOLDER/worker.pstats when it ends in good order. Of the worker,
that is its main thread, which answers what the kernel has in memory.
"""

import cProfile
import os
import socket
import sys
from typing import NoReturn

from vddkfs.engines import process, worker


def daemon(folder: str, words: list[str]) -> int:
    """Run vddkfs in this process, and its worker under the profiler too."""
    from vddkfs.cli import main

    def command(theirs: socket.socket) -> list[str]:
        profiled = [sys.executable, "-P", __file__, "worker", folder]
        return [*profiled, str(theirs.fileno()), str(os.getpid())]

    vars(process)["_command"] = command
    sys.argv = ["vddkfs", *words]
    profile = cProfile.Profile()
    try:
        return int(profile.runcall(main) or 0)
    finally:
        profile.dump_stats(f"{folder}/daemon.pstats")


def run_worker(folder: str, words: list[str]) -> None:
    """Run a worker, which ends by os._exit."""
    profile = cProfile.Profile()
    leave = os._exit

    def leave_a_profile(code: int) -> NoReturn:
        profile.disable()
        profile.dump_stats(f"{folder}/worker.pstats")
        leave(code)

    vars(os)["_exit"] = leave_a_profile
    profile.runcall(worker.main, words)


if __name__ == "__main__":
    if sys.argv[1] == "daemon":
        sys.exit(daemon(sys.argv[2], sys.argv[3:]))
    run_worker(sys.argv[2], sys.argv[3:])
