"""A guest of firmware and a boot sector starts in QEMU from an overlay's disk, and writes to it."""

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Mounts, run, sha256
from tests.end_to_end.vms import MIB, SECTOR, make_delta, make_vmdk, noise, write

QEMU = "qemu-system-x86_64"
READ_FROM, WRITTEN_TO = 1, 7
"""Sectors of the disk: the boot sector reads one, changes it and writes it to the other."""
ENDED_WELL = 2 * 0x10 + 1
"""What QEMU ends with when the guest hands 10h to the device isa-debug-exit."""
LINE = b"boot loader of the test\r\n"
WORDS = b"the second sector, read by the boot loader\r\n"

# Real mode, hand-assembled; the firmware loads it at 7C00h, with the drive's number in DL.
# LINE is at 7D00h, the buffer of a sector at 7E00h, COM1 at port 3F8h.
CODE = bytes.fromhex(
    "EB 19"  # 00         jmp start
    "AC"  # 02 say:       lodsb               print the text at SI up to its zero
    "84 C0"  # 03         test al, al
    "74 13"  # 05         jz end
    "88 C4"  # 07         mov ah, al
    "52"  # 09            push dx
    "BA FD 03"  # 0A      mov dx, 3FDh        the line status
    "EC"  # 0D wait:      in al, dx
    "A8 20"  # 0E         test al, 20h        may the next byte be sent?
    "74 FB"  # 10         jz wait
    "88 E0"  # 12         mov al, ah
    "B2 F8"  # 14         mov dl, F8h
    "EE"  # 16            out dx, al
    "5A"  # 17            pop dx
    "EB E8"  # 18         jmp say
    "C3"  # 1A end:       ret
    "31 C0"  # 1B start:  xor ax, ax
    "8E D8"  # 1D         mov ds, ax
    "8E C0"  # 1F         mov es, ax
    "8E D0"  # 21         mov ss, ax
    "BC 00 7C"  # 23      mov sp, 7C00h
    "FC"  # 26            cld
    "BE 00 7D"  # 27      mov si, 7D00h
    "E8 D5 FF"  # 2A      call say
    "B8 01 02"  # 2D      mov ax, 0201h       read one sector
    "BB 00 7E"  # 30      mov bx, 7E00h
    "B9 02 00"  # 33      mov cx, 2           cylinder 0, sector 2: they count from 1
    "B6 00"  # 36         mov dh, 0
    "CD 13"  # 38         int 13h
    "72 1C"  # 3A         jc failed
    "BE 00 7E"  # 3C      mov si, 7E00h
    "E8 C0 FF"  # 3F      call say
    "C6 06 00 7E 54"  # 42  mov byte [7E00h], 'T'
    "B8 01 03"  # 47      mov ax, 0301h       write one sector
    "B9 08 00"  # 4A      mov cx, 8
    "CD 13"  # 4D         int 13h
    "72 07"  # 4F         jc failed
    "B0 10"  # 51         mov al, 10h
    "E6 F4"  # 53         out F4h, al         isa-debug-exit: QEMU ends here
    "F4"  # 55 halt:      hlt
    "EB FD"  # 56         jmp halt
    "B0 11"  # 58 failed: mov al, 11h
    "E6 F4"  # 5A         out F4h, al
    "EB F7"  # 5C         jmp halt
)
BOOT = (CODE.ljust(0x100, b"\0") + LINE).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
SECOND = WORDS.ljust(SECTOR, b"\0")


def boot(disk: str, serial: Path) -> tuple[int, bytes]:
    """Start a machine from *disk*; return QEMU's exit code and what the guest said on COM1."""
    words = ["-accel", "tcg", "-machine", "pc", "-m", "64", "-nodefaults", "-display", "none"]
    words += ["-serial", f"file:{serial}", "-monitor", "none", "-net", "none", "-no-reboot"]
    words += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
    words += ["-drive", f"file={disk},format=raw,if=ide", "-boot", "c"]
    done = run(QEMU, *words, timeout=40)
    assert not done.stderr, done.stderr
    return done.returncode, serial.read_bytes()


def test_guest_boots_from_an_overlay(mount: Mounts, vm: Path, tmp_path: Path) -> None:
    if shutil.which(QEMU) is None:
        pytest.skip(f"absent: {QEMU} (package qemu-system-x86)")
    # The boot sector is the base's, the sector that it reads the delta's.
    make_vmdk(vm / "disk.vmdk", BOOT + noise("disk", 2 * MIB - SECTOR))
    write(make_delta(vm / "delta.vmdk", "disk.vmdk"), READ_FROM * SECTOR, SECOND)
    source = {path: sha256(path.read_bytes()) for path in vm.iterdir()}
    overlay = f"overlay={tmp_path / 'overlay'}"

    found = mount(vm, overlay)
    before = found.content("disk/disk.raw")
    assert before[: 2 * SECTOR] == BOOT + SECOND
    code, said = boot(found.path("disk/disk.raw"), tmp_path / "serial")
    assert LINE + WORDS in said
    assert code == ENDED_WELL
    done = found.umount()
    assert done.returncode == 0, done.stderr

    found = mount(vm, overlay)
    written = b"T" + SECOND[1:]
    start = WRITTEN_TO * SECTOR
    assert written not in before
    assert found.content("disk/disk.raw") == before[:start] + written + before[start + SECTOR :]
    assert {path: sha256(path.read_bytes()) for path in vm.iterdir()} == source
