"""Two hundred readers of one file, for test_hung: half of them past the page cache.

With the word "opened" every reader opens the file first; "ready" is printed when all have, and a
line on stdin makes them read. Without it they open and read at once. At the end the hash of what
each has read is printed as JSON.
"""

import hashlib
import json
import os
import sys
import threading

READERS = 200
SIZE = 64 * 1024
STEP = 2 * SIZE


def read(number: int, name: str, gates: tuple[threading.Barrier, ...], found: list[str]) -> None:
    flags = os.O_RDONLY | (os.O_DIRECT if number % 2 else 0)
    try:
        fd = os.open(name, flags)
        for gate in gates:
            gate.wait()
        found[number] = hashlib.sha256(os.pread(fd, SIZE, number * STEP)).hexdigest()
    except OSError as error:
        found[number] = str(error)


def main() -> None:
    opened = threading.Barrier(READERS + 1)
    told = threading.Barrier(READERS + 1)
    gates = (opened, told) if sys.argv[2] == "opened" else ()
    found = [""] * READERS
    threads = [
        threading.Thread(target=read, args=(number, sys.argv[1], gates, found))
        for number in range(READERS)
    ]
    for thread in threads:
        thread.start()
    if gates:
        opened.wait()
        print("ready", flush=True)
        sys.stdin.readline()
        told.wait()
    for thread in threads:
        thread.join()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
