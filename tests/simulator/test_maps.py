"""What is allocated, and the disk database."""

import ctypes
from typing import Any

import pytest

from tests.simulator.client import Client
from tests.simulator.disks import SECTORS, data_ranges, make_vmfs
from tests.simulator.kit import CHAIN, REGISTRY, Kit, Kits
from tests.simulator.vix import (
    BUFFER_TOOSMALL,
    DISK_KEY_NOTFOUND,
    INVALID_ARG,
)

PLAIN, THIN, SPARSE = (f"[ds1] plain/{name}.vmdk" for name in ("plain", "thin", "sparse"))


# What is allocated.


def _query(client: Client, path: str, requests: list[tuple[int, int, int]], vm: str) -> list[Any]:
    found: list[Any] = []
    with client.disk(path, vm=vm) as disk:
        for start, count, chunk in requests:
            try:
                found.append(disk.query(start, count, chunk))
            except Failed as failed:  # noqa: F821 - of the client
                found.append(failed.code)
    return found


@pytest.mark.parametrize("path", [PLAIN, THIN, SPARSE, *CHAIN])
def test_what_is_allocated_is_what_qemu_finds(kit: Kit, path: str) -> None:
    whole = SECTORS // 128 * 128
    wanted = [
        (start, min(end, whole)) for start, end in data_ranges(kit.disk(path), 128) if start < whole
    ]
    vm = "vm-17" if "plain" in path else "vm-16"
    found, half = kit.run(_query, path=path, vm=vm, requests=[(0, whole, 128), (1024, 2048, 128)])
    assert found == wanted
    inside = [(max(a, 1024), min(b, 3072)) for a, b in wanted if a < 3072 and b > 1024]
    assert half == inside


def test_larger_chunks_round_outwards(kit: Kit) -> None:
    (found,) = kit.run(_query, path=THIN, vm="vm-17", requests=[(0, 8192, 2048)])
    assert found == [(0, 8192)]


def test_a_query_needs_whole_chunks(kit: Kit) -> None:
    """So the last sectors of a disk that does not end with a chunk cannot be asked for."""
    requests = [
        *((0, SECTORS, 128), (0, SECTORS - 36, 128), (64, 128, 128), (0, 100, 128), (0, 8192, 64)),
        *((0, 8192, 0), (0, 0, 128), (8192, 128, 128), (0, 256, 384)),
    ]
    found = kit.run(_query, path=THIN, vm="vm-17", requests=requests)
    assert found[:5] == [INVALID_ARG] * 5
    assert isinstance(found[5], int)
    assert isinstance(found[7], int)


def test_a_query_has_a_limit_of_chunks(kit: Kit) -> None:
    path = kit.disk("[ds1] plain/huge.vmdk")
    make_vmfs(path, b"\0" * 512)
    sectors = 128 * (512 * 1024 + 1)
    flat = path.with_name("huge-flat.vmdk")
    with flat.open("r+b") as file:
        file.truncate(0)
        file.truncate(sectors * 512)
        file.seek(128 * 1000 * 512)
        file.write(b"x" * 512)
    path.write_text(path.read_text().replace("RW 1 VMFS", f"RW {sectors} VMFS"))
    kit.register(REGISTRY.replace("[vm vm-17]\n", "[vm vm-17]\ndisk = [ds1] plain/huge.vmdk\n"))
    requests = [(0, sectors, 128), (0, sectors - 128, 128)]
    found = kit.run(_query, path="[ds1] plain/huge.vmdk", vm="vm-17", requests=requests)
    assert found == [INVALID_ARG, [(128000, 128128)]]


# Metadata.


def _metadata(client: Client) -> dict[str, Any]:
    read, required = client.lib.ReadMetadata, ctypes.c_size_t(0)
    size = ctypes.byref(required)
    found: dict[str, Any] = {}
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17", read_only=False) as disk:
        buffer = ctypes.create_string_buffer(4096)
        found["absent"] = read(disk.handle, b"ddb.absent", buffer, 4096, size)
        found["small"] = read(disk.handle, b"ddb.adapterType", buffer, 3, size)
        found["required"] = required.value
        client.check("ReadMetadata", disk.handle, b"ddb.adapterType", buffer, 9, size)
        found["adapter"] = buffer.value
        client.check("WriteMetadata", disk.handle, b"ddb.toolsVersion", b"11333")
        client.check("ReadMetadata", disk.handle, b"ddb.toolsVersion", buffer, 4096, size)
        found["tools"] = buffer.value
        found["few"] = client.code("GetMetadataKeys", disk.handle, buffer, 5, size)
        client.check("GetMetadataKeys", disk.handle, buffer, required.value, size)
        found["keys"] = buffer.raw[: required.value]
    return found


def test_metadata(kit: Kit) -> None:
    found = kit.run(_metadata)
    assert found["absent"] == DISK_KEY_NOTFOUND
    assert found["small"] == found["few"] == BUFFER_TOOSMALL
    assert found["required"] == len(b"lsilogic\0")
    assert found["adapter"] == b"lsilogic"
    assert found["tools"] == b"11333"
    assert found["keys"].endswith(b"\0\0")
    keys = found["keys"].rstrip(b"\0").split(b"\0")
    assert {b"ddb.adapterType", b"ddb.uuid", b"ddb.toolsVersion"} <= set(keys)
    assert 'ddb.toolsVersion = "11333"' in kit.disk(PLAIN).read_text()


def _write_metadata(client: Client) -> int:
    with client.disk("[ds1] plain/plain.vmdk", vm="vm-17") as disk:
        return client.code("WriteMetadata", disk.handle, b"ddb.toolsVersion", b"11333")


def test_metadata_is_not_written_through_a_read_only_handle(kit: Kit) -> None:
    before = kit.disk(PLAIN).read_text()
    assert kit.run(_write_metadata) != 0
    assert kit.disk(PLAIN).read_text() == before


def test_a_6_5_library_has_no_map(kits: Kits) -> None:
    with pytest.raises(AssertionError, match="has no QueryAllocatedBlocks"):
        kits("6.5").run(_query, path=PLAIN, vm="vm-17", requests=[(0, 128, 128)])
