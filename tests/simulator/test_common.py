"""What the simulator's library and host share: sim.conf, faults, the wire, the log of events."""

import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.simulator.kit import PROGRAMS, SIMULATOR

SANITIZERS = ("", "address,undefined", "thread")


def _tests() -> list[tuple[str, str]]:
    """Return the tests that the programs list."""
    return [
        (name, test)
        for name in ("settings", "wire")
        for test in re.findall(r'\{"(\w+)", +test_', (PROGRAMS / f"{name}.c").read_text())
    ]


@pytest.fixture(scope="module")
def program(able: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Compile a test program with a sanitizer, once."""
    folder = tmp_path_factory.mktemp("programs")

    @cache
    def compiled(name: str, sanitizer: str) -> Path:
        target = folder / f"{name}-{sanitizer or 'plain'}"
        words = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
        words += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []
        words += ["-D_GNU_SOURCE", f"-I{SIMULATOR / 'common'}", f"-I{SIMULATOR / 'include'}"]
        sources = [PROGRAMS / f"{name}.c", *(SIMULATOR / "common").glob("*.c")]
        done = subprocess.run(
            ["cc", *words, "-o", target, *sources],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return target

    return compiled


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize(("name", "test"), _tests())
def test_common(
    program: Callable[[str, str], Path], tmp_path: Path, name: str, test: str, sanitizer: str
) -> None:
    done = subprocess.run(
        [program(name, sanitizer), test, tmp_path],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
