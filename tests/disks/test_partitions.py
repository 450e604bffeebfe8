"""Partition tables, with sfdisk and fdisk as the oracle."""

import json
import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vddkfs.disks.partitions import (
    MAX_EBRS,
    MAX_WARNINGS,
    Partition,
    PartitionTable,
    parse,
    parse_bytes,
)

SBIN = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
SFDISK = shutil.which("sfdisk", path=SBIN)
FDISK = shutil.which("fdisk", path=SBIN)
MIB = 1 << 20
LINUX_GUID = "0fc63daf-8483-4772-8e79-3d69d8477de4"

needs_sfdisk = pytest.mark.skipif(SFDISK is None, reason="sfdisk is not installed")
deterministic = settings(derandomize=True, deadline=None)


# Making and reading disks


def run(*command: str | Path | None, script: str = "") -> str:
    done = subprocess.run(
        [str(word) for word in command],
        input=script,
        capture_output=True,
        text=True,
        env={"LC_ALL": "C", "PATH": SBIN},
        check=False,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def partitioned(folder: Path, script: str, size: int = 256 * MIB) -> Path:
    """A sparse disk with the table of an sfdisk script."""
    disk = sparse(folder / "disk", size)
    run(SFDISK, "--quiet", "--no-reread", "--no-tell-kernel", disk, script=script)
    return disk


def patch(disk: Path, offset: int, data: bytes) -> None:
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def read_table(disk: Path, sector_size: int = 512) -> PartitionTable | None:
    """Parse a file, checking that every read is inside it and that there are not too many."""
    with disk.open("rb") as file:
        capacity = file.seek(0, os.SEEK_END)
        steps = parse(capacity, sector_size)
        answer: bytes | None = None
        for _ in range(MAX_EBRS + 2):
            try:
                # A generator's first send must be None, which its type cannot say.
                offset, length = next(steps) if answer is None else steps.send(answer)
            except StopIteration as end:
                table: PartitionTable | None = end.value
                if table is not None:
                    check_sound(table, capacity)
                return table
            assert 0 <= offset < offset + length <= capacity
            assert length <= 4 * MIB
            answer = os.pread(file.fileno(), length, offset)
    raise AssertionError("too many reads")


def check_sound(table: PartitionTable, capacity: int) -> None:
    numbers = [partition.number for partition in table.partitions]
    assert numbers == sorted(set(numbers))
    assert all(number >= 1 for number in numbers)
    for partition in table.partitions:
        assert partition.start >= 0
        assert partition.size > 0
        assert partition.start + partition.size <= capacity
    assert len(table.warnings) <= MAX_WARNINGS


def check_image(image: bytes, sector_size: int = 512) -> PartitionTable | None:
    with TemporaryDirectory() as folder:
        disk = Path(folder, "disk")
        disk.write_bytes(image)
        table = read_table(disk, sector_size)
    assert parse_bytes(image, sector_size) == table
    return table


def oracle(disk: Path) -> tuple[str, tuple[Partition, ...]]:
    """What sfdisk reads from a disk, in our words."""
    table = json.loads(run(SFDISK, "--json", disk))["partitiontable"]
    expected = []
    for entry in table.get("partitions", []):
        number = int(entry["node"].removeprefix(str(disk)))
        expected.append(
            Partition(
                number=number,
                start=entry["start"] * 512,
                size=entry["size"] * 512,
                **(
                    gpt_fields(entry)
                    if table["label"] == "gpt"
                    else dos_fields(entry, table["id"], number)
                ),
            )
        )
    return table["label"], tuple(expected)


def gpt_fields(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": entry["type"].lower(),
        "name": entry.get("name", ""),
        "uuid": entry["uuid"].lower(),
        "bootable": "LegacyBIOSBootable" in entry.get("attrs", ""),
    }


def dos_fields(entry: dict[str, Any], disk_id: str, number: int) -> dict[str, Any]:
    return {
        "type": f"0x{int(entry['type'], 16):02x}",
        "uuid": f"{int(disk_id, 16):08x}-{number:02x}",
        "bootable": entry.get("bootable", False),
    }


def check_oracle(disk: Path) -> PartitionTable:
    table = read_table(disk)
    assert table is not None
    assert (table.label, table.partitions) == oracle(disk)
    return table


def mbr(*entries: tuple[int, int, int, int], boot: bytes = b"", disk_id: int = 0) -> bytes:
    """A boot sector with (status, type, start, size) entries in sectors."""
    sector = bytearray(512)
    sector[: len(boot)] = boot
    if disk_id:
        struct.pack_into("<I", sector, 440, disk_id)
    for slot, (status, kind, start, size) in enumerate(entries):
        struct.pack_into("<B3xB3xII", sector, 446 + 16 * slot, status, kind, start, size)
    sector[510:] = b"\x55\xaa"
    return bytes(sector)


def image(size: int, sectors: dict[int, bytes]) -> bytes:
    """A disk of *size* sectors with the given contents by sector."""
    disk = bytearray(size * 512)
    for sector, data in sectors.items():
        disk[sector * 512 : sector * 512 + len(data)] = data
    return bytes(disk)


PROTECTIVE = mbr((0, 0xEE, 1, 0xFFFFFFFF))


def gpt_entry(first: int, final: int, name: bytes = b"", size: int = 128) -> bytes:
    guid = bytes(range(16))
    return struct.pack("<16s16sQQQ72s", guid, guid, first, final, 0, name).ljust(size, b"\0")


def gpt_header(
    array: bytes,
    *,
    lba: int = 1,
    array_lba: int = 2,
    entries: int | None = None,
    entry_bytes: int = 128,
    header_bytes: int = 92,
    last_usable: int = 100,
    padding: bytes = b"",
) -> bytes:
    def packed(crc: int) -> bytes:
        return (
            struct.pack(
                "<8sIIIIQQQQ16sQIII",
                b"EFI PART",
                0x10000,
                header_bytes,
                crc,
                0,
                lba,
                0,
                34,
                last_usable,
                bytes(16),
                array_lba,
                len(array) // entry_bytes if entries is None else entries,
                entry_bytes,
                zlib.crc32(array),
            )
            + padding
        )

    return packed(zlib.crc32(packed(0)[:header_bytes]))


def warned(table: PartitionTable | None, *words: str) -> bool:
    assert table is not None
    return any(all(word in warning for word in words) for warning in table.warnings)


# MBR against sfdisk

DOS_FOUR = """label: dos
label-id: 0xdeadbeef
start=2048, size=8192, type=83, bootable
start=10240, size=2048, type=7
start=20480, size=4096, type=82
start=100000, size=7777, type=fd
"""
DOS_LOGICAL = """label: dos
label-id: 0x00c0ffee
1: start=2048, size=8192, type=83
2: start=10240, size=200000, type={extended}
3: start=300000, size=1000, type=c
5: start=12288, size=4096, type=83
6: start=20480, size=4096, type=82
7: start=65536, size=100, type=83, bootable
8: start=100000, size=9, type=8e
"""
DOS_GAPS = """label: dos
label-id: 0x1
2: start=4096, size=2048, type=83
4: start=2048, size=1000, type=83
"""


@needs_sfdisk
@pytest.mark.parametrize(
    "script",
    [
        DOS_FOUR,
        DOS_GAPS,
        DOS_LOGICAL.format(extended="5"),
        DOS_LOGICAL.format(extended="f"),
        DOS_LOGICAL.format(extended="85"),
        "label: dos\nlabel-id: 0x2\nstart=2048, size=100000, type=5\n",
        "label: dos\nlabel-id: 0x3\n",
    ],
    ids=["four", "gaps", "ext-05", "ext-0f", "ext-85", "no-logical", "empty"],
)
def test_dos_is_read_as_by_sfdisk(tmp_path: Path, script: str) -> None:
    assert check_oracle(partitioned(tmp_path, script)).warnings == ()


@needs_sfdisk
def test_dos_with_sixty_logical_partitions(tmp_path: Path) -> None:
    lines = ["label: dos", "label-id: 0xabcdef01", "1: start=2048, size=500000, type=f"]
    lines += [f"{5 + i}: start={4096 + i * 4096}, size=1024, type=83" for i in range(56)]
    assert len(check_oracle(partitioned(tmp_path, "\n".join(lines))).partitions) == 57


@needs_sfdisk
def test_a_deleted_logical_partition_does_not_leave_a_number(tmp_path: Path) -> None:
    disk = partitioned(tmp_path, DOS_LOGICAL.format(extended="5"))
    run(SFDISK, "--quiet", "--no-reread", "--no-tell-kernel", "--delete", disk, "6")
    assert [partition.number for partition in check_oracle(disk).partitions] == [1, 2, 3, 5, 6, 7]


@needs_sfdisk
def test_type_zero_and_start_zero_are_partitions(tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk", MIB)
    patch(disk, 0, mbr((0, 0, 64, 8), (0x80, 0x17, 0, 100), disk_id=7))
    check_oracle(disk)


# MBR: hostile or odd


def test_without_a_disk_id_there_is_no_uuid() -> None:
    table = check_image(image(100, {0: mbr((0, 0x83, 1, 50))}))
    assert table == PartitionTable("dos", (Partition(1, 512, 25600, "0x83"),))


def test_two_extended_partitions_are_both_followed() -> None:
    disk = image(
        400,
        {
            0: mbr((0, 5, 100, 50), (0, 0x0F, 200, 100)),
            100: mbr((0, 0x83, 1, 10)),
            200: mbr((0, 0x83, 1, 10), (0, 5, 50, 50)),
            250: mbr((0, 0x82, 1, 10)),
        },
    )
    table = check_image(disk)
    assert table is not None
    assert {p.number: p.start // 512 for p in table.partitions} == {
        1: 100,
        2: 200,
        5: 101,
        6: 201,
        7: 251,
    }


def test_the_last_two_entries_of_an_ebr_count_only_inside_their_link() -> None:
    record = mbr((0, 0x83, 1, 5), (0, 0x83, 6, 5), (0, 0x83, 11, 5), (0, 0x83, 16, 500))
    table = check_image(image(400, {0: mbr((0, 5, 100, 50)), 100: record}))
    assert table is not None
    assert [(p.number, p.start // 512) for p in table.partitions[1:]] == [
        (5, 101),
        (6, 106),
        (7, 111),
    ]


@pytest.mark.parametrize(
    ("sectors", "words"),
    [
        ({100: mbr((0, 0x83, 1, 5), (0, 5, 0, 50))}, "loop"),
        ({100: mbr((0, 5, 10, 9)), 110: mbr((0, 5, 20, 9)), 120: mbr((0, 5, 10, 9))}, "loop"),
        ({100: mbr((0, 5, 0xFFFFFFFF, 9))}, "outside the disk"),
        ({100: mbr((0, 5, 10, 9)), 110: bytes(512)}, "no signature"),
        ({100: b"garbage"}, "no signature"),
    ],
    ids=["self", "circle", "outside", "blank-link", "garbage"],
)
def test_a_broken_chain_ends_with_a_warning(sectors: dict[int, bytes], words: str) -> None:
    table = check_image(image(400, {0: mbr((0, 5, 100, 200)), **sectors}))
    assert warned(table, words)


def test_an_extended_partition_that_begins_at_the_mbr_is_a_loop() -> None:
    table = check_image(image(400, {0: mbr((0, 5, 0, 200), (0, 0x83, 10, 10))}))
    assert warned(table, "loop")
    assert table is not None
    assert [partition.number for partition in table.partitions] == [1, 2]


def test_an_endless_chain_is_cut() -> None:
    chain = {1 + i: mbr((0, 0x83, 1, 1), (0, 5, 1 + i, 1)) for i in range(400)}
    table = check_image(image(500, {0: mbr((0, 5, 1, 490)), **chain}))
    assert warned(table, str(MAX_EBRS))
    assert table is not None
    assert len(table.partitions) == 1 + MAX_EBRS


def test_mbr_partitions_outside_the_disk() -> None:
    table = check_image(image(100, {0: mbr((0, 0x83, 100, 5), (0, 0x83, 90, 50), (0, 5, 200, 9))}))
    assert table is not None
    assert table.partitions == (Partition(2, 90 * 512, 10 * 512, "0x83"),)
    assert warned(table, "partition 1", "left out")
    assert warned(table, "partition 2", "shown")
    assert warned(table, "partition 3", "left out")


def test_warnings_are_bounded() -> None:
    chain = {1 + i: mbr((0, 0x83, 9999, 1), (0, 5, 1 + i, 1)) for i in range(100)}
    table = check_image(image(200, {0: mbr((0, 5, 1, 150)), **chain}))
    assert table is not None
    assert len(table.warnings) == MAX_WARNINGS
    assert warned(table, "more warnings")


# Disks without a table


def fat_boot_sector(*entries: tuple[int, int, int, int]) -> bytes:
    bpb = struct.pack("<3s8sHBHBHHBH", b"\xeb\x3c\x90", b"mkfs.fat", 512, 4, 1, 2, 512, 0, 0xF8, 9)
    return mbr(*entries, boot=bpb + bytes(30) + b"FAT16   ")


def ntfs_boot_sector(*entries: tuple[int, int, int, int]) -> bytes:
    return mbr(*entries, boot=b"\xeb\x52\x90NTFS    ")


@pytest.mark.parametrize(
    "disk",
    [
        b"",
        b"\x55\xaa",
        bytes(512),
        bytes(100 * 512),
        mbr((0x42, 0x83, 1, 50)) + bytes(51200),
        mbr((0x42, 0xEE, 1, 50)) + bytes(51200),
        mbr((0, 0x83, 1, 50), (0, 0, 0, 0), (0, 0, 0, 0), (0x6F, 0x20, 1, 1)) + bytes(51200),
        fat_boot_sector() + bytes(51200),
        ntfs_boot_sector() + bytes(51200),
        fat_boot_sector((0, 0x83, 1 << 30, 50)) + bytes(51200),
        mbr(boot=bytes(446), disk_id=1)[:510],
    ],
    ids=[
        "nothing",
        "tiny",
        "zeros",
        "more-zeros",
        "status",
        "status-ee",
        "fourth-status",
        "fat",
        "ntfs",
        "fat-unsound",
        "short",
    ],
)
def test_no_table(disk: bytes) -> None:
    assert check_image(disk) is None


def test_boot_code_of_a_former_file_system_does_not_hide_a_table() -> None:
    table = check_image(fat_boot_sector((0x80, 0x83, 1, 50)) + bytes(51200))
    assert table is not None
    assert len(table.partitions) == 1


# GPT

GPT_PLAIN = f"""label: gpt
label-id: 00000000-1111-2222-3333-444444444444
1: start=2048, size=8192, type={LINUX_GUID}, uuid=10000000-0000-0000-0000-000000000001, name="boot"
2: start=10240, size=100, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, \
uuid=ABCDEF00-0000-0000-0000-000000000002, name="EFI größe", attrs="LegacyBIOSBootable"
7: start=40000, size=4096, type={LINUX_GUID}, uuid=10000000-0000-0000-0000-000000000007, \
attrs="RequiredPartition GUID:63"
"""
GPT_FULL = "label: gpt\n" + "\n".join(
    f"{1 + i}: start={2048 + i * 16}, size={1 + i % 16}, type={LINUX_GUID}, "
    f"uuid=10000000-0000-0000-0000-{i:012x}, name=p{i}"
    for i in range(128)
)


@needs_sfdisk
@pytest.mark.parametrize("script", [GPT_PLAIN, GPT_FULL, "label: gpt\n"], ids=["3", "128", "0"])
def test_gpt_is_read_as_by_sfdisk(tmp_path: Path, script: str) -> None:
    assert check_oracle(partitioned(tmp_path, script)).warnings == ()


@needs_sfdisk
def test_gpt_that_fills_the_disk_and_grows_with_it(tmp_path: Path) -> None:
    disk = partitioned(tmp_path, f"label: gpt\ntype={LINUX_GUID}\n")
    before = check_oracle(disk)
    os.truncate(disk, 512 * MIB)
    assert check_oracle(disk) == before


@needs_sfdisk
@pytest.mark.parametrize("place", [512, 512 + 24, 512 + 88, 1024, 1024 + 6 * 128 + 40, 1024 + 9999])
def test_a_damaged_primary_gpt_gives_way_to_the_backup(tmp_path: Path, place: int) -> None:
    disk = partitioned(tmp_path, GPT_PLAIN)
    patch(disk, place, b"\xff\x5a")
    table = check_oracle(disk)
    assert warned(table, "primary", "backup")
    assert len(table.partitions) == 3


@needs_sfdisk
def test_both_copies_damaged(tmp_path: Path) -> None:
    disk = partitioned(tmp_path, GPT_PLAIN)
    patch(disk, 512, bytes(512))
    patch(disk, 256 * MIB - 512, bytes(512))
    table = read_table(disk)
    assert table is not None
    assert (table.label, table.partitions) == ("gpt", ())
    assert warned(table, "primary")
    assert warned(table, "backup")


@needs_sfdisk
def test_a_hybrid_mbr_is_a_gpt(tmp_path: Path) -> None:
    disk = partitioned(tmp_path, GPT_PLAIN)
    patch(disk, 0, mbr((0, 0x83, 2048, 8192), (0, 0xEE, 1, 2047), (0, 0x83, 40000, 4096)))
    assert warned(check_oracle(disk), "hybrid", "2")


def test_a_damaged_hybrid_does_not_fall_back_to_the_mbr(tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk", MIB)
    patch(disk, 0, mbr((0, 0xEE, 1, 63), (0, 0x83, 64, 64)))
    table = read_table(disk)
    assert warned(table, "hybrid")
    assert table is not None
    assert (table.label, table.partitions) == ("gpt", ())


@needs_sfdisk
@pytest.mark.parametrize("capacity", [511, 512, 513, 1024, 1536, 17408, 5 * MIB + 7, 20 * MIB])
@pytest.mark.parametrize(
    "script", [GPT_PLAIN, DOS_LOGICAL.format(extended="5")], ids=["gpt", "dos"]
)
def test_truncated_disks(tmp_path: Path, script: str, capacity: int) -> None:
    disk = partitioned(tmp_path, script)
    whole = {partition.number: partition for partition in check_oracle(disk).partitions}
    os.truncate(disk, capacity)
    table = read_table(disk)
    assert (table is None) == (capacity < 512)
    if table is None:
        return
    assert table.warnings
    for partition in table.partitions:
        assert partition.start == whole[partition.number].start
        assert partition.size <= whole[partition.number].size


def test_gpt_with_its_last_partition_beyond_the_disk_keeps_the_others() -> None:
    array = gpt_entry(40, 50) + gpt_entry(60, 200) + gpt_entry(300, 400) + gpt_entry(9, 8)
    table = check_image(
        image(128, {0: PROTECTIVE, 1: gpt_header(array, last_usable=500), 2: array})
    )
    assert table is not None
    assert [(p.number, p.start, p.size) for p in table.partitions] == [(1, 40 * 512, 11 * 512)]
    assert warned(table, "larger disk")
    assert warned(table, "partition 2", "left out")
    assert warned(table, "partition 4", "before it starts")


def test_gpt_partition_up_to_the_last_sector() -> None:
    array = gpt_entry(40, 127) + gpt_entry(40, 128)
    table = check_image(image(128, {0: PROTECTIVE, 1: gpt_header(array), 2: array}))
    assert table is not None
    assert [(p.number, p.start + p.size) for p in table.partitions] == [(1, 128 * 512)]


@pytest.mark.parametrize("entry_bytes", [128, 256, 512, 4096])
def test_large_entries(entry_bytes: int) -> None:
    array = gpt_entry(100, 100, size=entry_bytes) + gpt_entry(101, 110, size=entry_bytes)
    header = gpt_header(array, entry_bytes=entry_bytes)
    table = check_image(image(128, {0: PROTECTIVE, 1: header, 2: array}))
    assert table is not None
    assert [p.start // 512 for p in table.partitions] == [100, 101]
    assert table.warnings == ()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (gpt_header(bytes(128), entries=0), "0 entries"),
        (gpt_header(bytes(128), entries=1025), "1025 entries"),
        (gpt_header(bytes(128), entries=0xFFFFFFFF), "entries"),
        (gpt_header(bytes(192), entry_bytes=192), "192 bytes"),
        (gpt_header(bytes(64), entry_bytes=64), "64 bytes"),
        (gpt_header(bytes(8192), entry_bytes=8192), "8192 bytes"),
        (gpt_header(bytes(128), lba=2), "LBA 2"),
        (gpt_header(bytes(128), array_lba=128), "outside"),
        (gpt_header(bytes(128), array_lba=(1 << 64) - 1), "outside"),
        (gpt_header(bytes(128), header_bytes=91), "91 bytes"),
        (gpt_header(bytes(128), header_bytes=513), "513 bytes"),
        (gpt_header(bytes(128))[:-1] + b"\x01", "checksum"),
        (gpt_header(b"\x01" * 128), "checksum of the entries"),
    ],
)
def test_headers_that_are_not_believed(header: bytes, words: str) -> None:
    table = check_image(image(128, {0: PROTECTIVE, 1: header}))
    assert table is not None
    assert (table.label, table.partitions) == ("gpt", ())
    assert warned(table, "primary", words)


def test_a_longer_header_and_a_protective_entry_anywhere() -> None:
    array = gpt_entry(40, 50)
    header = gpt_header(array, header_bytes=512, padding=bytes(range(210)) * 2)
    first = mbr((0, 0, 0, 0), (0x11, 0xEE, 77, 1))
    table = check_image(image(128, {0: first, 1: header, 2: array}))
    assert table is not None
    assert len(table.partitions) == 1


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("a".encode("utf-16-le") * 36, "a" * 36),
        ("ab\0cd".encode("utf-16-le"), "ab"),
        (b"\x00\xd8a\x00", "\ufffda"),
        ("\U0001f600".encode("utf-16-le"), "\U0001f600"),
    ],
    ids=["full", "cut", "lone-surrogate", "pair"],
)
def test_gpt_names(stored: bytes, name: str) -> None:
    array = gpt_entry(40, 50, stored)
    table = check_image(image(128, {0: PROTECTIVE, 1: gpt_header(array), 2: array}))
    assert table is not None
    assert table.partitions[0].name == name


# Sectors of 4096 bytes, which only fdisk can be told about


def fdisk_list(disk: Path, columns: str) -> list[list[str]]:
    lines = run(FDISK, "--bytes", "-b", "4096", "-l", "-o", columns, disk).splitlines()
    return [line.split() for line in lines if line.startswith(str(disk))]


@pytest.mark.skipif(FDISK is None, reason="fdisk is not installed")
def test_gpt_with_4096_byte_sectors(tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk", 64 * MIB)
    run(FDISK, "-b", "4096", disk, script="g\nn\n1\n256\n1000\nn\n5\n2000\n3000\nw\n")
    rows = fdisk_list(disk, "Device,Start,Sectors,Type-UUID,UUID")
    expected = [
        Partition(
            int(node.removeprefix(str(disk))),
            int(start) * 4096,
            int(sectors) * 4096,
            kind.lower(),
            uuid=unique.lower(),
        )
        for node, start, sectors, kind, unique in rows
    ]
    assert len(expected) == 2
    primary = read_table(disk, 4096)
    assert primary == PartitionTable("gpt", tuple(expected))
    patch(disk, 4096, bytes(92))
    backup = read_table(disk, 4096)
    assert warned(backup, "primary", "backup")
    assert backup is not None
    assert backup.partitions == tuple(expected)
    # Read with the wrong sector size there is nothing to be found, and nothing to be afraid of.
    wrong = read_table(disk, 512)
    assert wrong is not None
    assert wrong.partitions == ()


@pytest.mark.skipif(FDISK is None, reason="fdisk is not installed")
def test_dos_with_4096_byte_sectors(tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk", 64 * MIB)
    script = "o\nn\np\n1\n256\n511\nn\ne\n2\n512\n9999\nn\nl\n1024\n1500\nn\nl\n3000\n3001\nw\n"
    run(FDISK, "-b", "4096", disk, script=script)
    rows = fdisk_list(disk, "Device,Start,Sectors,Id")
    expected = [
        (int(node.removeprefix(str(disk))), int(start) * 4096, int(sectors) * 4096, int(kind, 16))
        for node, start, sectors, kind in rows
    ]
    assert [number for number, *_ in expected] == [1, 2, 5, 6]
    table = read_table(disk, 4096)
    assert table is not None
    assert [(p.number, p.start, p.size, int(p.type, 16)) for p in table.partitions] == expected


def test_contract_of_the_generator() -> None:
    with pytest.raises(ValueError, match="sector size"):
        parse(MIB, 1024)
    steps = parse(MIB)
    assert next(steps) == (0, 512)
    with pytest.raises(ValueError, match="asked for"):
        steps.send(b"short")
    assert parse_bytes(memoryview(bytearray(512))) is None


# Properties

TYPES = st.sampled_from(["83", "82", "7", "b", "8e", "fd", "0", "5a"])


@st.composite
def dos_scripts(draw: st.DrawFn) -> str:
    """Primaries in any slots, perhaps one of them extended, each in its own 32 MiB."""
    lines = ["label: dos", f"label-id: {draw(st.integers(1, 0xFFFFFFFF)):#x}"]
    slots = draw(st.lists(st.integers(1, 4), unique=True, max_size=4))
    extended = draw(st.sampled_from([0, *slots]))
    for place, slot in enumerate(slots):
        base = 2048 + place * 65536
        if slot == extended:
            lines.append(f"{slot}: start={base}, size=65536, type={draw(st.sampled_from('5f'))}")
            sizes = draw(st.lists(st.integers(1, 4000), max_size=8))
            logicals = [
                f"{5 + i}: start={base + 2048 + i * 8000}, size={size}, type={draw(TYPES)}"
                for i, size in enumerate(sizes)
            ]
        else:
            start = base + draw(st.integers(0, 30000))
            boot = draw(st.sampled_from(["", ", bootable"]))
            size = draw(st.integers(1, 30000))
            lines.append(f"{slot}: start={start}, size={size}, type={draw(TYPES)}{boot}")
    return "\n".join([*lines, *(logicals if extended else [])]) + "\n"


@st.composite
def gpt_scripts(draw: st.DrawFn) -> str:
    slots = draw(st.lists(st.integers(1, 128), unique=True, max_size=10))
    names = st.text("abcXYZ äß€_-. 0", max_size=36).map(str.strip)
    lines = ["label: gpt", f"label-id: {draw(st.uuids())}"]
    for place, slot in enumerate(slots):
        start = 2048 + place * 20000 + draw(st.integers(0, 9000))
        lines.append(
            f"{slot}: start={start}, size={draw(st.integers(1, 9000))}, type={draw(st.uuids())}, "
            f'uuid={draw(st.uuids())}, name="{draw(names)}"'
            + draw(st.sampled_from(["", ', attrs="LegacyBIOSBootable"']))
        )
    return "\n".join(lines) + "\n"


@needs_sfdisk
@settings(deterministic, max_examples=60)
@given(script=dos_scripts() | gpt_scripts())
def test_any_script_is_read_as_by_sfdisk(script: str) -> None:
    with TemporaryDirectory() as folder:
        assert check_oracle(partitioned(Path(folder), script)).warnings == ()


@pytest.fixture(scope="module")
def small_gpt(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if SFDISK is None:
        pytest.skip("sfdisk is not installed")
    script = f"label: gpt\nstart=40, size=10, type={LINUX_GUID}\nstart=60, size=9, name=x\n"
    return partitioned(tmp_path_factory.mktemp("gpt"), script, 256 * 512).read_bytes()


@settings(deterministic, max_examples=150)
@given(place=st.integers(512, 34 * 512 - 1), value=st.integers(1, 255))
def test_no_damage_to_the_primary_changes_what_is_read(
    small_gpt: bytes, place: int, value: int
) -> None:
    damaged = bytearray(small_gpt)
    damaged[place] ^= value
    intact, table = parse_bytes(small_gpt), check_image(bytes(damaged))
    assert intact is not None
    assert table is not None
    assert table.partitions == intact.partitions
    # What lies between the header and the end of its sector belongs to nobody.
    assert bool(table.warnings) == (not 512 + 92 <= place < 1024)


@settings(deterministic, max_examples=150)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 256 * 512 - 1), st.binary(min_size=1, max_size=16)), max_size=12
    ),
    length=st.integers(0, 256 * 512),
)
def test_any_damage_is_survived(
    small_gpt: bytes, changes: list[tuple[int, bytes]], length: int
) -> None:
    damaged = bytearray(small_gpt)
    for place, data in changes:
        damaged[place : place + len(data)] = data
    check_image(bytes(damaged[:length]))


lbas = st.integers(0, 40) | st.sampled_from([2**31, 2**32 - 1])
records = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 0x80, 0x80, 0x13]),
        st.sampled_from([0, 5, 5, 0x0F, 0x85, 0x83, 0x83, 0xEE]),
        lbas,
        lbas,
    ),
    max_size=4,
).map(lambda entries: mbr(*entries))


@settings(deterministic, max_examples=300)
@given(
    sectors=st.dictionaries(st.integers(0, 31), records | st.binary(max_size=512), max_size=32),
    first=records,
    size=st.integers(1, 40),
    sector_size=st.sampled_from([512, 4096]),
)
def test_any_boot_records_are_survived(
    sectors: dict[int, bytes], first: bytes, size: int, sector_size: int
) -> None:
    scale = sector_size // 512
    spread = {sector * scale: data for sector, data in sectors.items()}
    disk = image(40 * scale, {**spread, 0: first})
    check_image(disk[: size * sector_size], sector_size)


@settings(deterministic, max_examples=300)
@given(
    array=st.binary(max_size=2048),
    lba=st.sampled_from([1, 1, 1, 2]),
    array_lba=st.integers(0, 130) | st.integers(0, 2**64 - 1),
    entries=st.integers(0, 40) | st.integers(0, 2**32 - 1),
    entry_bytes=st.sampled_from([128, 128, 256, 64, 2**31]) | st.integers(1, 2**32 - 1),
    header_bytes=st.just(92) | st.integers(0, 600),
    last_usable=st.integers(0, 2**64 - 1),
)
def test_any_signed_header_is_survived(
    array: bytes,
    lba: int,
    array_lba: int,
    entries: int,
    entry_bytes: int,
    header_bytes: int,
    last_usable: int,
) -> None:
    header = gpt_header(
        array,
        lba=lba,
        array_lba=array_lba,
        entries=entries,
        entry_bytes=entry_bytes,
        header_bytes=header_bytes,
        last_usable=last_usable,
    )
    check_image(image(128, {0: PROTECTIVE, array_lba % 64 + 2: array, 1: header}))


@settings(deterministic, max_examples=200)
@given(
    entries=st.lists(
        st.tuples(st.binary(min_size=32, max_size=32), lbas, lbas, st.binary(max_size=80)),
        min_size=1,
        max_size=12,
    )
)
def test_any_signed_entries_are_survived(
    entries: list[tuple[bytes, int, int, bytes]],
) -> None:
    array = b"".join(struct.pack("<32sQQQ72s", ids, a, b, 4, rest) for ids, a, b, rest in entries)
    table = check_image(image(40, {0: PROTECTIVE, 1: gpt_header(array), 2: array}))
    assert table is not None
    assert len(table.partitions) == sum(
        1 for ids, a, b, _ in entries if any(ids[:16]) and a <= b <= 39
    )


@settings(deterministic, max_examples=200)
@given(garbage=st.binary(max_size=2048), signed=st.booleans())
def test_any_garbage_is_survived(garbage: bytes, signed: bool) -> None:
    disk = bytearray(garbage)
    if signed:
        disk[510:512] = b"\x55\xaa"
    check_image(bytes(disk))
