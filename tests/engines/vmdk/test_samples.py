"""Real VMDKs of VMware's products and others: their content has a known hash."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vddkfs.engines.vmdk import VmdkEngine, discover

HASHES = {
    "ext2": "a6c2f0e39afe6c6ab432ca5465349fcefe8dc944398e97b2d957d3f89dbb5d80",
    "monolithicSparse": "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727",
    "streamOptimized": "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727",
    "twoGbMaxExtentSparse": "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727",
    "vmfs_thick": "8d43c795d24bce01b49f92744f934c1072210dcac170bb1c83a5aa56df46ab7d",
}


@pytest.mark.parametrize("name", HASHES)
def test_content(
    samples: Path,
    opened: Callable[..., VmdkEngine],
    sha256: Callable[[VmdkEngine], str],
    name: str,
) -> None:
    assert sha256(opened(samples / f"{name}.vmdk")) == HASHES[name]


def test_folder(samples: Path) -> None:
    found = discover(str(samples))
    assert sorted(chain.name for chain in found.chains) == sorted(HASHES)
    assert found.left_out == ()


def test_sesparse(
    samples: Path,
    tmp_path: Path,
    make: Any,
    opened: Callable[..., VmdkEngine],
    sha256: Callable[[VmdkEngine], str],
) -> None:
    packed = (samples / "sesparse-extent.vmdk.gz").read_bytes()
    (tmp_path / "x-sesparse.vmdk").write_bytes(gzip.decompress(packed))
    path = make.text("x.vmdk", ['RW 1048576 SESPARSE "x-sesparse.vmdk"'], kind="seSparse")
    assert sha256(opened(path)) == (
        "3afa48010241335528fe402f083fc9f3a1013a49485221443a78d9a8604e2f90"
    )
