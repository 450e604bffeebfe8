"""The host's timing model (host/timing.c), by a C program in made-up time."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.simulator.host_site import SIMULATOR, compile_program

SOURCE = Path(__file__).with_name("c") / "host_timing.c"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = [SIMULATOR / "host" / f"{name}.c" for name in ("timing", "timers", "memory")]
    return compile_program(tmp_path_factory.mktemp("timing") / "host_timing", [SOURCE, *parts])


@pytest.mark.parametrize("test", re.findall(r'\{"(\w+)", +test_', SOURCE.read_text()))
def test_timing(program: Path, test: str) -> None:
    done = subprocess.run([program, test], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
