"""Sizes and offsets as a C compiler has them on x86-64, against what cffi makes of our text."""

import pytest
from cffi import FFI

from vddkfs.engines.vddk.layouts import has_long_params, has_sector_sizes
from vddkfs.engines.vddk.native import declare

PARAMS = {
    "vmxSpec": 0,
    "serverName": 8,
    "thumbPrint": 16,
    "privateUse": 24,
    "credType": 32,
    "creds": 40,
    "port": 64,
    "nfcHostPort": 68,
    "vimApiVer": 72,
}
TAIL = {"reserved": 80, "state": 88, "spec": 96, "specType": 120}
INFO = {
    "biosGeo": 0,
    "physGeo": 12,
    "capacity": 24,
    "adapterType": 32,
    "numLinks": 36,
    "parentFileNameHint": 40,
    "uuid": 48,
}
SIZES = {"logicalSectorSize": 56, "physicalSectorSize": 60}
CREATE = {"diskType": 0, "adapterType": 4, "hwVersion": 8, "capacity": 16}
CREATE_SIZES = {"logicalSectorSize": 24, "physicalSectorSize": 28}


def offsets(ffi: FFI, name: str) -> dict[str, int]:
    return {field: place.offset for field, place in ffi.typeof(name).fields}


@pytest.mark.parametrize(
    ("release", "params", "params_bytes", "info", "info_bytes", "create", "create_bytes"),
    [
        ((6, 5), PARAMS, 80, INFO, 56, CREATE, 24),
        ((6, 7, 1), PARAMS | TAIL, 128, INFO, 56, CREATE, 24),
        ((7,), PARAMS | TAIL, 128, INFO | SIZES, 64, CREATE | CREATE_SIZES, 32),
        ((9, 1, 0, 0), PARAMS | TAIL, 128, INFO | SIZES, 64, CREATE | CREATE_SIZES, 32),
    ],
)
def test_structures(
    release: tuple[int, ...],
    params: dict[str, int],
    params_bytes: int,
    info: dict[str, int],
    info_bytes: int,
    create: dict[str, int],
    create_bytes: int,
) -> None:
    ffi = declare(release)
    assert offsets(ffi, "VixDiskLibConnectParams") == params
    assert ffi.sizeof("VixDiskLibConnectParams") == params_bytes
    assert offsets(ffi, "VixDiskLibInfo") == info
    assert ffi.sizeof("VixDiskLibInfo") == info_bytes
    assert offsets(ffi, "VixDiskLibCreateParams") == create
    assert ffi.sizeof("VixDiskLibCreateParams") == create_bytes
    assert offsets(ffi, "VixDiskLibBlockList") == {"numBlocks": 0, "blocks": 8}
    assert ffi.sizeof("VixDiskLibBlock") == 16


def test_basic_types() -> None:
    ffi = declare((8, 0))
    assert ffi.sizeof("VixError") == 8
    assert ffi.sizeof("VixDiskLibSectorType") == 8
    assert ffi.sizeof("Bool") == 1
    creds = dict(ffi.typeof("VixDiskLibConnectParams").fields)["creds"].type
    assert ffi.sizeof(creds) == 24


def test_a_release_known_by_its_major_number_alone() -> None:
    assert not has_long_params((6,))
    assert not has_sector_sizes((6,))
    assert not has_sector_sizes((6, 7))
    assert has_long_params((7,))
    assert has_sector_sizes((7,))
