"""Does what a vddkfs command does, with something of the product taken out before.

``python -I patched.py DAEMON WORKER COMMAND WORD...``: runs the code DAEMON, has every worker that
is started run the code WORKER first, and calls the command line with the WORDs; the path COMMAND
is what it stands for.
"""

import os
import socket
import sys

from vddkfs import cli
from vddkfs.engines import spawn

_RUN = "import sys\nfrom vddkfs.engines.worker import main\nmain(sys.argv[1:])"


def main(daemon: str, worker: str, *words: str) -> int:
    def command(theirs: socket.socket) -> list[str]:
        numbers = [str(theirs.fileno()), str(os.getpid())]
        return [sys.executable, "-I", "-X", "utf8", "-c", f"{worker}\n{_RUN}", *numbers]

    spawn._command = command
    exec(daemon, {})
    return cli.main(words[1:])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
