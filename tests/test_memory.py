"""How much memory the cache takes by itself, on machines that are made up."""

from pathlib import Path

import pytest

from vddkfs.memory import default_cache_size

MIB = 1024 * 1024
GIB = 1024 * MIB


def machine(root: Path, total: int, available: int, group: str = "", **limits: str) -> Path:
    """Write what the kernel tells of a machine; *limits* are memory.max by group, / as ``__``."""
    (root / "proc/self").mkdir(parents=True)
    lines = [f"MemTotal: {total // 1024:>12} kB", f"MemAvailable: {available // 1024:>8} kB"]
    (root / "proc/meminfo").write_text("\n".join([*lines, "HugePages_Total:       0", ""]))
    (root / "proc/self/cgroup").write_text(f"0::/{group}\n")
    for name, limit in limits.items():
        place = root / "sys/fs/cgroup" / name.replace("__", "/")
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(f"{limit}\n")
    return root


@pytest.mark.parametrize(
    ("total", "available", "size"),
    [
        (64 * GIB, 60 * GIB, 256 * MIB),
        (GIB, 900 * MIB, 128 * MIB),
        (8 * GIB, 100 * MIB, 50 * MIB),
        (64 * MIB, 10 * MIB, 16 * MIB),
    ],
)
def test_of_a_machine(tmp_path: Path, total: int, available: int, size: int) -> None:
    assert default_cache_size(machine(tmp_path, total, available)) == size


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        ({"a__b": "max"}, 256 * MIB),
        ({"a__b": str(512 * MIB)}, 64 * MIB),
        ({"a__b": "max", "a": str(GIB)}, 128 * MIB),
        ({"other": str(GIB)}, 256 * MIB),
        ({".": str(512 * MIB)}, 64 * MIB),
    ],
)
def test_of_a_control_group(tmp_path: Path, limits: dict[str, str], size: int) -> None:
    root = machine(tmp_path, 64 * GIB, 60 * GIB, "a/b", **limits)
    assert default_cache_size(root) == size


def test_of_this_machine() -> None:
    assert 16 * MIB <= default_cache_size() <= 256 * MIB
