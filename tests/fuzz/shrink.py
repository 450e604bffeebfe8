"""Makes an input that fails smaller: ``python -m tests.fuzz.shrink FILE``.

Runs FILE, which is named TARGET-..., then leaves out pieces and bytes for as long as the same kind
of exception comes, writes the result over FILE and prints what happens with it.
"""

import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.fuzz.cases import ENTRIES, NAMES, Case, unpack
from tests.fuzz.guard import Finding
from tests.fuzz.seeds import FOLDERS
from tests.fuzz.targets import TARGETS, clean_up

SECONDS = 20
"""What no input takes."""


def _too_long(*_: object) -> None:
    raise Finding(f"took {SECONDS} s")


def outcome(run: Callable[[bytes], None], raw: bytes) -> str:
    """Return what *run* makes of *raw*: the exception and where it arose, or ""."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        run(raw)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        return f"{type(error).__name__} in {frames[-1].name}"
    finally:
        signal.alarm(0)
    return ""


def shrink(raw: bytes, fails: Callable[[bytes], bool]) -> bytes:
    """Return the smallest packed case that was found for which *fails* still holds."""
    case = unpack(raw)
    index = 0
    while index < len(case.pieces):
        fewer = case._replace(pieces=case.pieces[:index] + case.pieces[index + 1 :])
        if fails(fewer.pack()):
            case = fewer
        else:
            index += 1
    for index in range(len(case.pieces)):
        change = partial(_changed, case, index)
        case = change(
            shrink_bytes(
                case.pieces[index].data,
                lambda data, change=change: fails(change(data).pack()),
            )
        )
    return case.pack()


def _changed(case: Case, index: int, data: bytes) -> Case:
    pieces = list(case.pieces)
    pieces[index] = pieces[index]._replace(data=data)
    return case._replace(pieces=tuple(pieces))


def shrink_bytes(data: bytes, fails: Callable[[bytes], bool]) -> bytes:
    """Return *data* with its end cut off, and zeros for what does not matter."""
    step = len(data)
    while step := step // 2:
        while len(data) > step and fails(data[:-step]):
            data = data[:-step]
    step = len(data)
    while step:
        for begin in range(0, len(data), step):
            part = data[begin : begin + step]
            zeroed = data[:begin] + bytes(len(part)) + data[begin + step :]
            if any(part) and fails(zeroed):
                data = zeroed
        step = step // 2 if step > 16 else 0
    return data


def main() -> int:
    """Shrink the file that the first argument names."""
    path = Path(sys.argv[1])
    name = path.name.split("-")[0]
    run, raw = TARGETS[name], path.read_bytes()
    said = outcome(run, raw)
    if not said:
        print(f"{path}: nothing is wrong with it")
        return 0

    def fails(candidate: bytes) -> bool:
        return outcome(run, candidate) == said

    if "_too_long" in said:
        print(f"{path}: takes more than {SECONDS} s")
        return 1
    small = shrink(raw, fails) if name in FOLDERS else shrink_bytes(raw, fails)
    if fails(small):
        path.write_bytes(small)
    print(f"{path}: {len(raw)} bytes became {len(small)}")
    if name in FOLDERS:
        case = unpack(small)
        print(f"opens {ENTRIES[case.entry] or 'the folder'}")
        for piece in case.pieces:
            print(
                f"{NAMES[piece.slot]} from byte {piece.at}: {piece.data.rstrip(bytes(1))[:400]!r}"
            )
    try:
        run(small)
    except Exception:
        traceback.print_exc()
    clean_up()
    return 1


if __name__ == "__main__":
    sys.exit(main())
