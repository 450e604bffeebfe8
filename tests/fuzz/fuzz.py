"""Runs one target under atheris: ``python -m tests.fuzz.fuzz TARGET [LIBFUZZER ARGUMENTS]``.

``contrib/fuzz`` is the command for people; it runs this for each target.
"""

import sys
from random import Random

import atheris

with atheris.instrument_imports(include=["vddkfs.engines.vmdk"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz import mutate
from tests.fuzz.seeds import FOLDERS


def _folder(raw: bytes, max_size: int, seed: int) -> bytes:
    return mutate.mutate(raw, max_size, Random(seed), atheris.Mutate)


def _text(raw: bytes, max_size: int, seed: int) -> bytes:
    random = Random(seed)
    if random.random() < 0.3:
        return bytes(atheris.Mutate(raw, max_size))
    return mutate.text(raw, random)[:max_size]


def _header(raw: bytes, max_size: int, seed: int) -> bytes:
    random = Random(seed)
    if len(raw) < 100 or random.random() < 0.2:
        return bytes(atheris.Mutate(raw, max_size))
    return mutate.number(raw, random)[:max_size]


def _archive(raw: bytes, max_size: int, seed: int) -> bytes:
    random = Random(seed)
    if raw[257:262] != b"ustar" or random.random() < 0.1:
        return bytes(atheris.Mutate(raw, max_size))
    return mutate.archive(raw, random, atheris.Mutate)[:max_size]


def _cross(one: bytes, other: bytes, max_size: int, seed: int) -> bytes:
    return mutate.cross(one, other, max_size, Random(seed))


MUTATORS = {
    "descriptor": _text,
    "header": _header,
    "archive": _archive,
    "vmx": _text,
    "folder": _folder,
    "check": _folder,
}


def main() -> None:
    """Run the target that the first argument names; libFuzzer ends the process."""
    name = sys.argv.pop(1)
    more = {"custom_crossover": _cross} if name in FOLDERS else {}
    atheris.Setup(
        sys.argv, TARGETS[name], custom_mutator=MUTATORS[name], internal_libfuzzer=True, **more
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
