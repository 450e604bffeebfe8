"""kill -9 of a process that writes, on the machine's own files: what was flushed is there."""

import random
import subprocess
import sys
from pathlib import Path

from vddkfs.disks.overlay import BLOCK, Overlay

BLOCKS = 48
WRITER = """
import sys
from vddkfs.disks.overlay import BLOCK, Limits, Overlay

limits = Limits(reserve=0, grow=64, spare=16, piece=8, pending=30, retired=40, log_room=BLOCK)
fork = Overlay.open(sys.argv[1], (), limits=limits).fork("disk/0", 48 * BLOCK)
turn = int(sys.argv[2])
while True:
    turn += 1
    for first in range(0, 48, 12):
        fork.write(first * BLOCK, turn.to_bytes(4, "little") * (12 * BLOCK // 4), None)
    fork.flush()
    print(turn, flush=True)
"""


def test_killed_while_it_writes(tmp_path: Path) -> None:
    folder, draw, acknowledged = str(tmp_path / "overlay"), random.Random(1), 0
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, folder, str(acknowledged)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            told = [writer.stdout.readline() for _ in range(draw.randint(1, 25))]
            writer.kill()
            told += writer.stdout.readlines()
        acknowledged = int(told[-1])
        overlay = Overlay.open(folder, ())
        found = bytearray(BLOCKS * BLOCK)
        assert overlay.fork("disk/0", BLOCKS * BLOCK).read_into(0, memoryview(found)) == []
        overlay.close()
        turns = []
        for at in range(0, len(found), BLOCK):
            turns.append(int.from_bytes(found[at : at + 4], "little"))
            assert found[at : at + BLOCK] == found[at : at + 4] * (BLOCK // 4), "a whole block"
        assert min(turns) >= acknowledged
        assert max(turns) <= acknowledged + 2, "and nothing that was not written yet"
        acknowledged = max(turns)
