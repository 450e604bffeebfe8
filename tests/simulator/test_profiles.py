"""What the profiles give at most, as the client that comes with the simulator measures it."""

import json

from tests.simulator.disks import succeed
from tests.simulator.kit import SIMULATOR


def limits(*profiles: str) -> dict[str, dict[tuple[str, int], dict[str, float]]]:
    """Measure profiles: profile -> (workload, depth) -> figures."""
    words = (SIMULATOR / "limits", "--seconds", "0.2", "--size", "8", "--json", *profiles)
    return {
        profile: {(row["name"], row["depth"]): row for row in measured["workloads"]}
        for profile, measured in json.loads(succeed(*words)).items()
    }


SEQUENTIAL, RANDOM = "sequential read 1 MiB", "random read 4 KiB"


def test_no_profile_gives_more_than_it_may(able: None) -> None:
    """That it gives as much is for an idle machine to show."""
    found = limits("lan", "nbdssl")
    for rows in found.values():
        depths = [depth for name, depth in rows if name == RANDOM]
        assert depths == [1, 16, 64]
        assert all(row["requests_per_s"] > 0 for row in rows.values())
    lan, nbdssl = found["lan"], found["nbdssl"]
    slack = 1.15  # latencies vary by a tenth
    for depth in (1, 16, 64):
        assert lan[RANDOM, depth]["requests_per_s"] < 1000 * depth * slack
        assert nbdssl[RANDOM, depth]["requests_per_s"] < 1000 * min(depth, 4) * slack
    assert lan[RANDOM, 16]["requests_per_s"] > 3 * lan[RANDOM, 1]["requests_per_s"]
    assert lan[SEQUENTIAL, 8]["bytes_per_s"] < 1250e6 * slack
    assert nbdssl[SEQUENTIAL, 8]["bytes_per_s"] < 150e6 * slack
    assert nbdssl[SEQUENTIAL, 8]["bytes_per_s"] < lan[SEQUENTIAL, 8]["bytes_per_s"]
