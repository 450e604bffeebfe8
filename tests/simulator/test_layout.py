"""The binary interface: the header against the published figures, and what each release exports."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulator.client import Client
from tests.simulator.disks import SECTORS, succeed
from tests.simulator.kit import PROGRAMS, Kit, Kits, built, compiled
from tests.simulator.vix import BlockList, ConnectParams, CreateParams, Handle, Info

RELEASES = ("6.5", "6.7", "7.0", "8.0")
CONNECT = """
vmxSpec 0 serverName 8 thumbPrint 16 privateUse 24 credType 32 creds 40 creds.uid.userName 40
creds.uid.password 48 creds.sessionId.cookie 40 creds.sessionId.userName 48 creds.sessionId.key 56
creds.ticketId 40 port 64 nfcHostPort 68 vimApiVer 72 reserved 80 state 88
"""
CONNECT_67 = (
    "spec.vStorageObjSpec.id 96 spec.vStorageObjSpec.datastoreMoRef 104 "
    "spec.vStorageObjSpec.ssId 112 specType 120"
)
INFO = """
biosGeo 0 biosGeo.heads 4 biosGeo.sectors 8 physGeo 12 capacity 24 adapterType 32 numLinks 36
parentFileNameHint 40 uuid 48
"""
INFO_70 = "logicalSectorSize 56 physicalSectorSize 60"
CREATE = "diskType 0 adapterType 4 hwVersion 8 capacity 16"
CREATE_70 = "logicalSectorSize 24 physicalSectorSize 28"
CONSTANTS = """
VIXDISKLIB_SECTOR_SIZE 512 VIXDISKLIB_MIN_CHUNK_SIZE 128 VIXDISKLIB_MAX_CHUNK_NUMBER 524288
VIXDISKLIB_FLAG_OPEN_UNBUFFERED 1 VIXDISKLIB_FLAG_OPEN_SINGLE_LINK 2
VIXDISKLIB_FLAG_OPEN_READ_ONLY 4 VIXDISKLIB_FLAG_OPEN_COMPRESSION_ZLIB 16
VIXDISKLIB_FLAG_OPEN_COMPRESSION_FASTLZ 32 VIXDISKLIB_FLAG_OPEN_COMPRESSION_SKIPZ 64
VIXDISKLIB_CRED_UID 1 VIXDISKLIB_CRED_SESSIONID 2 VIXDISKLIB_CRED_TICKETID 3
VIXDISKLIB_CRED_SSPI 4 VIXDISKLIB_CRED_UNKNOWN 256 VIXDISKLIB_SPEC_VMX 0
VIXDISKLIB_SPEC_VSTORAGE_OBJECT 1 VIXDISKLIB_SPEC_UNKNOWN 2
VIXDISKLIB_DISK_MONOLITHIC_SPARSE 1 VIXDISKLIB_DISK_MONOLITHIC_FLAT 2
VIXDISKLIB_DISK_SPLIT_SPARSE 3 VIXDISKLIB_DISK_SPLIT_FLAT 4 VIXDISKLIB_DISK_VMFS_FLAT 5
VIXDISKLIB_DISK_STREAM_OPTIMIZED 6 VIXDISKLIB_DISK_VMFS_THIN 7 VIXDISKLIB_DISK_VMFS_SPARSE 8
VIXDISKLIB_DISK_UNKNOWN 256 VIXDISKLIB_ADAPTER_IDE 1 VIXDISKLIB_ADAPTER_SCSI_BUSLOGIC 2
VIXDISKLIB_ADAPTER_SCSI_LSILOGIC 3 VIXDISKLIB_ADAPTER_UNKNOWN 256
VIX_E_FAIL 1 VIX_E_OUT_OF_MEMORY 2 VIX_E_INVALID_ARG 3 VIX_E_FILE_NOT_FOUND 4
VIX_E_NOT_SUPPORTED 6 VIX_E_FILE_ERROR 7 VIX_E_DISK_FULL 8 VIX_E_CANCELLED 10
VIX_E_FILE_READ_ONLY 11 VIX_E_FILE_ALREADY_EXISTS 12 VIX_E_FILE_ACCESS_ERROR 13
VIX_E_FILE_ALREADY_LOCKED 15 VIX_E_NOT_SUPPORTED_ON_REMOTE_OBJECT 20 VIX_E_FILE_NAME_INVALID 22
VIX_E_BUFFER_TOOSMALL 24 VIX_E_OBJECT_NOT_FOUND 25 VIX_E_HOST_NOT_CONNECTED 26 VIX_E_LICENSE 32
VIX_E_AUTHENTICATION_FAIL 35 VIX_E_HOST_CONNECTION_LOST 36 VIX_E_INVALID_HANDLE 1000
VIX_E_INVALID_AUTHENTICATION_SESSION 3047 VIX_E_VM_NOT_FOUND 4000 VIX_E_SNAPSHOT_NOTFOUND 13003
VIX_E_HOST_SERVER_NOT_FOUND 14008 VIX_E_HOST_NETWORK_CONN_REFUSED 14009
VIX_E_HOST_TCP_SOCKET_ERROR 14010 VIX_E_HOST_TCP_CONN_LOST 14011
VIX_E_HOST_SERVER_SHUTDOWN 14014 VIX_E_HOST_SERVER_NOT_AVAILABLE 14015 VIX_E_DISK_INVAL 16000
VIX_E_DISK_NOINIT 16001 VIX_E_DISK_NOIO 16002 VIX_E_DISK_PARTIALCHAIN 16003
VIX_E_DISK_NEEDSREPAIR 16006 VIX_E_DISK_OUTOFRANGE 16007 VIX_E_DISK_CID_MISMATCH 16008
VIX_E_DISK_CANTSHRINK 16009 VIX_E_DISK_UNSUPPORTEDDISKVERSION 16011 VIX_E_DISK_OPENPARENT 16012
VIX_E_DISK_NOTSUPPORTED 16013 VIX_E_DISK_INVALIDCHAIN 16030 VIX_E_DISK_KEY_NOTFOUND 16052
VIX_E_DISK_SUBSYSTEM_INIT_FAIL 16053 VIX_E_DISK_INVALID_CONNECTION 16054
VIX_E_DISK_INVALIDDISK 16063 VIX_E_DISK_NOLICENSE 16064 VIX_E_DISK_NODEVICE 16065
VIX_E_DISK_CAPACITY_MISMATCH 16067 VIX_E_DISK_PARENT_NOTALLOWED 16068
VIX_E_DISK_ATTACH_ROOTLINK 16069 VIX_E_CANNOT_CONNECT_TO_HOST 18000 VIX_ASYNC 25000
VIX_E_ASYNC_MIXEDMODE_UNSUPPORTED 26000
"""
EXPORTS = """
InitEx Init Exit ListTransportModes Cleanup Connect ConnectEx Disconnect PrepareForAccess EndAccess
Open Close GetInfo FreeInfo GetTransportMode Read Write ReadAsync WriteAsync Wait Flush
QueryAllocatedBlocks FreeBlockList AllocateConnectParams GetConnectParams FreeConnectParams
ReadMetadata GetMetadataKeys WriteMetadata Create CreateChild Unlink Grow Shrink Defragment Rename
Clone Attach IsAttachPossible SpaceNeededForClone CheckRepair GetErrorText FreeErrorText
"""
NOT_IN_65 = {"QueryAllocatedBlocks", "FreeBlockList", "AllocateConnectParams"}


def _pairs(text: str, prefix: str = "") -> dict[str, int]:
    words = text.split()
    return {
        prefix + name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)
    }


def expected(release: str) -> dict[str, int]:
    """Return all that c/layout.c prints, typed from the published interface."""
    since_67, since_70 = release != "6.5", release not in ("6.5", "6.7")
    found = _pairs(CONSTANTS)
    found |= _pairs(CONNECT + (CONNECT_67 if since_67 else ""), "VixDiskLibConnectParams.")
    found |= _pairs(INFO + (INFO_70 if since_70 else ""), "VixDiskLibInfo.")
    found |= _pairs(CREATE + " " + (CREATE_70 if since_70 else ""), "VixDiskLibCreateParams.")
    found |= _pairs("numBlocks 0 blocks 8", "VixDiskLibBlockList.")
    found |= _pairs("offset 0 length 8", "VixDiskLibBlock.")
    return found | {
        "VixDiskLibConnectParams": 128 if since_67 else 96,
        "VixDiskLibInfo": 64 if since_70 else 56,
        "VixDiskLibCreateParams": 32 if since_70 else 24,
        **{"VixDiskLibBlock": 16, "Bool": 1, "VixError": 8},
        **{"VixDiskLibSectorType": 8, "VixDiskLibDiskType": 4},
    }


@pytest.mark.parametrize("release", RELEASES)
def test_the_header_has_the_published_offsets_sizes_and_values(
    release: str, tmp_path: Path, able: None
) -> None:
    imitated = f"-DVIX_RELEASE={release.replace('.', '')}"
    program = compiled(PROGRAMS / "layout.c", tmp_path / "layout", imitated)
    assert _pairs(succeed(program)) == expected(release)


def test_without_a_release_the_header_is_the_newest_s(tmp_path: Path, able: None) -> None:
    program = compiled(PROGRAMS / "layout.c", tmp_path / "layout")
    assert _pairs(succeed(program)) == expected("8.0")


def test_the_header_can_be_used_from_cxx(tmp_path: Path, able: None) -> None:
    source = tmp_path / "client.cc"
    source.write_text('#include "vixDiskLib.h"\nint main() { return VIXDISKLIB_CRED_UID - 1; }\n')
    words = ("-std=c++11", "-Wall", "-Werror", "-c", source, "-o", tmp_path / "client.o")
    succeed("c++", *words, "-I", PROGRAMS.parents[2] / "contrib/simulator/include")


def test_the_binding_of_these_tests_agrees() -> None:
    layout = expected("8.0")
    for name, structure in (
        ("ConnectParams", ConnectParams),
        ("Info", Info),
        ("CreateParams", CreateParams),
    ):
        assert ctypes.sizeof(structure) == layout[f"VixDiskLib{name}"]
        for field, *_ in structure._fields_:
            if field != "spec":
                offset = getattr(structure, field).offset
                assert offset == layout[f"VixDiskLib{name}.{field}"], field
    assert BlockList.blocks.offset == layout["VixDiskLibBlockList.blocks"]


@pytest.mark.parametrize("release", RELEASES)
def test_exactly_the_functions_of_the_interface_are_exported(release: str, able: None) -> None:
    text = succeed("nm", "-D", "--defined-only", built(release) / "lib64" / "libvixDiskLib.so")
    names = {line.split()[-1].partition("@")[0] for line in text.splitlines()}
    wanted = set(EXPORTS.split()) - (NOT_IN_65 if release == "6.5" else set())
    assert names == {f"VixDiskLib_{name}" for name in wanted}


@pytest.mark.parametrize("release", RELEASES)
def test_the_folder_is_laid_out_as_the_kit(release: str, able: None) -> None:
    folder = built(release) / "lib64"
    major = release.partition(".")[0]
    plain, numbered = folder / "libvixDiskLib.so", folder / f"libvixDiskLib.so.{major}"
    assert plain.is_symlink()
    assert numbered.is_symlink()
    assert plain.resolve() == numbered.resolve()
    assert plain.resolve().name.startswith(f"libvixDiskLib.so.{release}")
    soname = succeed("readelf", "-d", plain)
    assert f"[libvixDiskLib.so.{major}]" in soname
    assert (folder / "libdiskLibPlugin.so").exists()


def test_the_decoys_break_a_process_that_takes_them_from_the_kit(able: None) -> None:
    """LD_LIBRARY_PATH with the kit in it is for the library's client alone, and not for Python."""
    folder = built() / "lib64"
    for name in ("libssl", "libcrypto", "libz", "libexpat", "libstdc++"):
        decoys = sorted(folder.glob(f"{name}.so*"))
        assert decoys, name
        assert not succeed("nm", "-D", "--defined-only", decoys[0]).split(), name
    words = [sys.executable, "-I", "-c", "import ssl"]
    succeed(*words)
    done = subprocess.run(
        words, env={"LD_LIBRARY_PATH": str(folder)}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "undefined symbol" in done.stderr or "version" in done.stderr, done.stderr


# Structures that end where memory does.


def _info_at(client: Client, offset: int) -> int:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        found = ctypes.POINTER(Info)()
        client.check("GetInfo", disk.handle, ctypes.byref(found))
        address = ctypes.addressof(found.contents)
        assert ctypes.c_uint64.from_address(address + 24).value == disk.sectors
        client.tell("so far")
        return ctypes.c_uint32.from_address(address + offset).value


def _capacity(client: Client) -> int:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        found: int = disk.info()["capacity"]
        return found


def _allocated_at(client: Client, offset: int) -> int:
    made = client.lib.AllocateConnectParams()
    assert bytes(made.contents) == bytes(128)
    client.tell("so far")
    found: int = ctypes.c_uint8.from_address(ctypes.addressof(made.contents) + offset).value
    client.lib.FreeConnectParams(made)
    return found


def _given_at(client: Client, offset: int) -> int:
    found = ctypes.POINTER(ConnectParams)()
    client.check("GetConnectParams", client.connect(vm="vm-17"), ctypes.byref(found))
    address = ctypes.addressof(found.contents)
    assert ctypes.c_char_p.from_address(address).value == b"moref=vm-17"
    client.tell("so far")
    return ctypes.c_uint8.from_address(address + offset).value


def _dies_of_reading(kit: Kit, function: object, offset: int) -> bool:
    process = kit.client(function, offset=offset)  # type: ignore[arg-type]
    assert process.hear() == "so far"
    if process.process.wait(20) == 0:
        return False
    assert process.died() == 11
    return True


@pytest.mark.parametrize("release", RELEASES)
def test_reading_past_a_structure_of_that_release_dies(kits: Kits, release: str) -> None:
    kit = kits(release)
    assert kit.run(_capacity) == SECTORS
    size = expected(release)["VixDiskLibInfo"]
    assert not _dies_of_reading(kit, _info_at, size - 4)
    assert _dies_of_reading(kit, _info_at, size)
    size = expected(release)["VixDiskLibConnectParams"]
    assert not _dies_of_reading(kit, _given_at, size - 1)
    assert _dies_of_reading(kit, _given_at, size)
    if release != "6.5":
        assert not _dies_of_reading(kit, _allocated_at, size - 1)
        assert _dies_of_reading(kit, _allocated_at, size)


def _block_list_at(client: Client, offset: int) -> int:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        found = ctypes.POINTER(BlockList)()
        reference = ctypes.byref(found)
        client.check("QueryAllocatedBlocks", disk.handle, 0, 128, 128, reference)
        assert found.contents.numBlocks == 1
        client.tell("so far")
        return ctypes.c_uint8.from_address(ctypes.addressof(found.contents) + offset).value


def test_reading_past_a_list_of_blocks_dies(kit: Kit) -> None:
    assert not _dies_of_reading(kit, _block_list_at, 23)
    assert _dies_of_reading(kit, _block_list_at, 24)


def _sector_sizes(client: Client) -> list[int]:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        found = ctypes.POINTER(Info)()
        client.check("GetInfo", disk.handle, ctypes.byref(found))
        return [found.contents.logicalSectorSize, found.contents.physicalSectorSize]


def test_since_7_0_the_sector_sizes_are_told(kit: Kit) -> None:
    logical, physical = kit.run(_sector_sizes)
    assert logical == 512
    assert physical in (512, 4096)


def _version(client: Client, major: int, minor: int) -> int:
    loggers = client._loggers
    return client.code("InitEx", major, minor, *loggers, client.libdir.encode(), None)


def test_each_release_takes_the_version_number_6_5(kits: Kits) -> None:
    for release in RELEASES:
        kit = kits(release, host=False)
        assert kit.run(_version, init=False, major=6, minor=5) == 0


def test_a_release_refuses_a_newer_version_number(kits: Kits) -> None:
    assert kits("6.7", host=False).run(_version, init=False, major=8, minor=0) == 3
    assert kits("8.0", host=False).run(_version, init=False, major=8, minor=1) == 3


def test_handles_are_pointers() -> None:
    assert ctypes.sizeof(Handle) == 8
