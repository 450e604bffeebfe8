"""``python -m benchmarks``, which ``contrib/benchmarks/run`` calls."""

import sys

from benchmarks import command, remote

if sys.argv[1:2] == ["remote"]:
    sys.exit(remote.main(sys.argv[2:]))
sys.exit(command.main(sys.argv[1:]))
