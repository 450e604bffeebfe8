"""How a worker process is started, by whoever starts one. Knows nothing of trio."""

import os
import signal
import socket
import subprocess
import sys

from vddkfs.engines import protocol


def spawn(output: int) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a worker whose output goes to the descriptor *output*; return our socket, non-blocking.

    The worker ends with the thread that calls this: the main one. Raises OSError.
    """
    ours, theirs = protocol.pair()
    try:
        return ours, subprocess.Popen(
            _command(theirs),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=_environment(),
            cwd="/",
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()


def ending(code: int | None) -> str:
    """Say how a process ended whose return code is *code*: "killed by SIGSEGV", "exit code 70"."""
    if code is None:
        return ""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _command(theirs: socket.socket) -> list[str]:
    return [
        sys.executable,
        "-I",
        "-X",
        "utf8",
        "-m",
        "vddkfs.engines.worker",
        str(theirs.fileno()),
        str(os.getpid()),
    ]


def _environment() -> dict[str, str]:
    """Return what a worker needs to see: a UTF-8 locale and a way to find tools; nothing secret."""
    return {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
