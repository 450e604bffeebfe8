"""``python -m benchmarks``, which ``contrib/benchmarks/run`` calls."""

import sys

from benchmarks import command, eviction, formats, overlay_map, remote, writes

if sys.argv[1:2] == ["eviction"]:
    sys.exit(eviction.main(sys.argv[2:]))
if sys.argv[1:2] == ["formats"]:
    sys.exit(formats.main(sys.argv[2:]))
if sys.argv[1:2] == ["overlay-map"]:
    sys.exit(overlay_map.main(sys.argv[2:]))
if sys.argv[1:2] == ["remote"]:
    sys.exit(remote.main(sys.argv[2:]))
if sys.argv[1:2] == ["writes"]:
    sys.exit(writes.main(sys.argv[2:]))
sys.exit(command.main(sys.argv[1:]))
