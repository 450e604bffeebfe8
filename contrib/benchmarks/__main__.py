"""``python -m benchmarks``, which ``contrib/benchmarks/run`` calls."""

import sys

from benchmarks.command import main

sys.exit(main(sys.argv[1:]))
