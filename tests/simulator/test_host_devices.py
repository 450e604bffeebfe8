"""The host process: disks as block devices, over san and hotadd."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.simulator.host_client import (
    CLEANUP,
    HOLE,
    MAP,
    READ,
    SECTOR,
    WRITE,
    Body,
    Disk,
    Host,
    Login,
    Refused,
    pack,
    read_map,
    serving,
)
from tests.simulator.host_site import CAPACITY

INSTANT = "profile = instant"
SAN = "san.available = yes"
HOTADD = ("hotadd.available = yes", "hotadd.proxy = proxy", "hotadd.refusal = error")

pytestmark = pytest.mark.usefixtures("loops")


def refusal(host: Host, transport: str, path: str = "[ds1] plain/a.vmdk", vm: str = "vm-3") -> int:
    login = host.login(vm)
    try:
        host.open(login, path, transport=transport).close()
    except Refused as refused:
        return refused.code
    return 0


def backing_file(device: str) -> Path | None:
    path = Path("/sys/block") / Path(device).name / "loop/backing_file"
    return Path(path.read_text().rstrip("\n")) if path.exists() else None


def composed(disk: Disk, devices: dict[int, int]) -> bytes:
    """The disk as its map and devices have it."""
    result = b""
    for file, _, offset, length in disk.segments:
        result += bytes(length) if file == HOLE else os.pread(devices[file], length, offset)
    return result


def open_devices(disk: Disk) -> dict[int, int]:
    return {i: os.open(path, os.O_RDONLY) for i, (path, _) in enumerate(disk.files)}


def close_all(devices: dict[int, int]) -> None:
    for fd in devices.values():
        os.close(fd)


# ---- san ----


def test_san_shows_the_extents_as_devices(host: Host) -> None:
    host.configure(INSTANT, SAN)
    disk = host.open(host.login(), "[ds1] web/child.vmdk", transport="san")
    files = {backing_file(path) for path, _ in disk.files}
    assert files == {host.site / "ds1/web/web-flat.vmdk", host.site / "ds1/web/child.vmdk"}
    for path, _ in disk.files:
        block_size = Path("/sys/block") / Path(path).name / "queue/logical_block_size"
        assert block_size.read_text() == "512\n"
    devices = open_devices(disk)
    assert composed(disk, devices) == (host.site / "ds1/web/web-flat.vmdk").read_bytes()
    close_all(devices)
    assert disk.peer.code(READ, count=1) == 6  # reads go through the devices
    assert host.await_event("open", transport="san")["devices"].startswith("/dev/loop")
    disk.close()


def test_san_serves_stale_pages_as_long_as_something_holds_the_device(host: Host) -> None:
    data = host.site / "ds1/plain/a-flat.vmdk"
    before = data.read_bytes()[:4096]

    def read_over_san() -> bytes:
        disk = host.open(host.login("vm-3"), "[ds1] plain/a.vmdk", transport="san")
        devices = open_devices(disk)
        found = os.pread(devices[0], 4096, 0)
        close_all(devices)
        disk.close()
        return found

    host.configure(INSTANT, SAN, "san.keep_open = yes")
    assert read_over_san() == before
    with data.open("r+b") as file:
        file.write(b"n" * 4096)
    assert read_over_san() == before
    host.configure(INSTANT, SAN, "san.keep_open = no")
    host.await_event("device-detached")
    assert read_over_san() == b"n" * 4096


def test_sessions_share_a_device(host: Host) -> None:
    host.configure(INSTANT, SAN, "san.keep_open = no")
    login = host.login("vm-3")
    first = host.open(login, "[ds1] plain/a.vmdk", transport="san")
    second = host.open(login, "[ds1] plain/a.vmdk", transport="san", write=True)
    assert first.files == second.files
    device = first.files[0][0]
    first.close()
    assert backing_file(device) == host.site / "ds1/plain/a-flat.vmdk"
    fd = os.open(device, os.O_RDWR)  # writable where the extent is
    os.pwrite(fd, b"w" * SECTOR, 0)
    os.fsync(fd)
    os.close(fd)
    second.die()
    host.await_event("device-detached", device=device)
    assert (host.site / "ds1/plain/a-flat.vmdk").read_bytes()[:SECTOR] == b"w" * SECTOR


def test_devices_go_with_the_host(host_program: Path, site: Path) -> None:
    for kill in (False, True):
        with serving(host_program, site, preserve=kill) as host:
            host.configure(INSTANT, SAN, "san.keep_open = yes")
            disk = host.open(host.login("vm-3"), "[ds1] plain/a.vmdk", transport="san")
            device = disk.files[0][0]
            assert backing_file(device) == site / "ds1/plain/a-flat.vmdk"
            if kill:
                host.process.kill()
                host.process.wait()
        assert backing_file(device) is None


def test_a_write_that_allocates_goes_through_the_host(host: Host) -> None:
    host.configure(INSTANT, SAN)
    disk = host.open(host.login(), "[ds1] web/child.vmdk", transport="san", write=True)
    leaf = next(i for i, (path, _) in enumerate(disk.files) if "child" in str(backing_file(path)))
    assert all(file != leaf for file, *_ in disk.segments)
    before = (host.site / "ds1/web/web-flat.vmdk").read_bytes()
    disk.peer.ask(WRITE, b"n" * 4096, 512, 8)
    reply = disk.peer.ask(MAP)
    disk.segments = read_map(reply.fds[0], Body(reply.body).number())
    os.close(reply.fds[0])
    assert any(file == leaf for file, *_ in disk.segments)
    devices = open_devices(disk)  # which have grown with their files
    expected = before[: 512 * SECTOR] + b"n" * 4096 + before[520 * SECTOR :]
    assert composed(disk, devices) == expected
    close_all(devices)
    disk.close()


def test_device_writes_are_done_one_at_a_time(host: Host) -> None:
    host.configure(INSTANT, SAN, "device.write_us = 20000", "net.jitter = 0")
    disk = host.open(host.login("vm-3"), "[ds1] plain/a.vmdk", transport="san", write=True)
    begun = time.monotonic()
    numbers = [disk.peer.send(WRITE, b"n" * SECTOR, i, 1) for i in range(4)]
    assert [disk.peer.reply().checked().request for _ in numbers] == numbers
    assert time.monotonic() - begun >= 0.08
    disk.close()


def test_san_without_loop_devices_gives_the_files(host: Host) -> None:
    host.configure(INSTANT, SAN, "san.device = file")
    disk = host.open(host.login("vm-3"), "[ds1] plain/a.vmdk", transport="san")
    assert disk.files == [(str(host.site / "ds1/plain/a-flat.vmdk"), True)]
    assert disk.segments == [(0, 0, 0, CAPACITY * SECTOR)]
    disk.close()


@pytest.mark.parametrize(
    ("lines", "code"),
    [(["san.available = no"], 6), ([SAN, "license = no"], 16064), ([SAN], 0)],
)
def test_san_that_is_not_to_be_had(host: Host, lines: list[str], code: int) -> None:
    host.configure(INSTANT, *lines)
    assert refusal(host, "san") == code


def test_san_of_a_local_datastore_says_so(host: Host) -> None:
    host.configure(INSTANT, SAN)
    disk = host.open(host.login(), "[vsan] web/web.vmdk", transport="san")
    assert disk.local
    disk.close()


# ---- hotadd ----


def attached(host: Host) -> list[list[str]]:
    path = host.site / ".sim/attachments"
    if not path.exists():
        return []
    return [line.split("\t") for line in path.read_text().splitlines()]


def hotadd(host: Host, login: Login | None = None, disk: str = "a", *, write: bool = False) -> Disk:
    login = login or host.login("vm-3")
    return host.open(login, f"[ds1] plain/{disk}.vmdk", transport="hotadd", write=write)


def cleanup(host: Host, tmp: str = "/tmp/own", vm: str = "vm-3") -> tuple[int, int]:
    reply = host.login(None).peer.ask(CLEANUP, pack(f"moref={vm}", tmp))
    body = Body(reply.body)
    return body.number(), body.number()


def test_hotadd_attaches_and_detaches(host: Host) -> None:
    host.configure(INSTANT, *HOTADD)
    disk = hotadd(host)
    device = disk.files[0][0]
    assert backing_file(device) == host.site / "ds1/plain/a-flat.vmdk"
    devices = open_devices(disk)
    assert composed(disk, devices) == (host.site / "ds1/plain/a-flat.vmdk").read_bytes()
    close_all(devices)
    (line,) = attached(host)
    assert line[:5] == ["disk", "vm-3", "[ds1] plain/a.vmdk", "/tmp/own", device]
    assert line[5] == str(os.getpid())
    disk.close()
    assert attached(host) == []
    assert backing_file(device) is None
    assert [event["name"] for event in host.events() if "tach" in event["name"]] == [
        "attach",
        "detach",
    ]


def test_a_dead_clients_disk_stays_attached_until_cleanup(host: Host) -> None:
    host.configure(INSTANT, *HOTADD, "hotadd.slots = 2")
    other = hotadd(host, host.login("vm-3", tmp="/tmp/other"), "b")
    disk = hotadd(host)
    device = disk.files[0][0]
    disk.die()
    host.await_event("attachment-left")
    assert backing_file(device) is not None
    assert refusal(host, "hotadd") == 13  # its slot is used
    assert cleanup(host, "/tmp/nobody") == (0, 1)
    assert cleanup(host) == (1, 0)
    assert backing_file(device) is None
    other.die()
    host.await_event("attachment-left", tmp="/tmp/other")
    assert cleanup(host) == (0, 1)
    assert cleanup(host, "/tmp/other") == (1, 0)
    assert attached(host) == []


def test_attachments_survive_the_host(host_program: Path, site: Path) -> None:
    devices = []
    for kill in (False, True):
        with serving(host_program, site, preserve=kill) as host:
            host.configure(INSTANT, *HOTADD)
            disk = hotadd(host)
            devices.append(disk.files[0][0])
            if kill:
                host.process.kill()
                host.process.wait()
    with serving(host_program, site) as host:
        assert host.await_event("host-start", attachments="2")
        assert all(backing_file(device) for device in devices)
        assert cleanup(host) == (2, 0)
        assert not any(backing_file(device) for device in devices)


def test_cleanup_leaves_what_is_in_use(host: Host) -> None:
    host.configure(INSTANT, *HOTADD)
    disk = hotadd(host)
    assert cleanup(host) == (0, 0)
    assert backing_file(disk.files[0][0]) is not None
    disk.close()


def test_cleanup_spoils_change_tracking(host: Host) -> None:
    tracking = host.site / "ds1/plain/a-ctk.vmdk"
    tracking.write_bytes(b"x" * 1000)
    for spoils, size in (("no", 1000), ("yes", 0)):
        host.configure(INSTANT, *HOTADD, f"hotadd.spoils_tracking = {spoils}")
        disk = hotadd(host)
        disk.die()
        host.await_event("attachment-left", session=host.events("attach")[-1]["session"])
        assert cleanup(host) == (1, 0)
        assert tracking.stat().st_size == size


def test_the_proxys_own_disk_is_lost(host_program: Path, site: Path) -> None:
    with serving(host_program, site) as host:
        host.configure(INSTANT, *HOTADD)
        login = host.login("proxy", "snapshot-p")
        host.open(login, "[ds1] proxy/proxy.vmdk").close()
        host.open(login, "[ds1] proxy/proxy.vmdk", transport="hotadd").close()
        assert host.events("proxy-disk-removed")
        with pytest.raises(Refused, match="error 4:"):
            host.open(login, "[ds1] proxy/proxy.vmdk")
    with serving(host_program, site) as host, pytest.raises(Refused, match="error 4:"):
        host.open(host.login("proxy", "snapshot-p"), "[ds1] proxy/proxy.vmdk")


@pytest.mark.parametrize(
    ("lines", "vm", "path", "code"),
    [
        (["hotadd.available = no"], "vm-3", "[ds1] plain/a.vmdk", 6),
        (["hotadd.proxy = "], "vm-3", "[ds1] plain/a.vmdk", 6),
        (["hotadd.proxy = unknown"], "vm-3", "[ds1] plain/a.vmdk", 6),
        (["license = no"], "vm-3", "[ds1] plain/a.vmdk", 16064),
        ([], "vm-1", "[ds1] web/web.vmdk", 1),  # has an independent disk
        ([], "vm-5", "[ds1] plain/a.vmdk", 1),  # has an IDE disk
        (["hotadd.slots = 0"], "vm-3", "[ds1] plain/a.vmdk", 13),
        ([], "vm-4", "[ds2] web/web.vmdk", 1),  # block sizes differ
        (["hotadd.proxy = small-proxy"], "vm-3", "[ds1] plain/a.vmdk", 8),
        ([], "vm-3", "[ds1] plain/a.vmdk", 0),
    ],
)
def test_hotadd_that_is_refused(
    host: Host, lines: list[str], vm: str, path: str, code: int
) -> None:
    host.configure(INSTANT, *HOTADD, *lines)
    assert refusal(host, "hotadd", path, vm) == code
    host.configure(INSTANT, *HOTADD, "hotadd.refusal = fallback", *lines)
    assert refusal(host, "hotadd", path, vm) == (code if code in (0, 16064) else 6)
    assert attached(host) == []


def test_thin_and_sparse_disks_need_no_space(host: Host) -> None:
    host.configure(INSTANT, *HOTADD, "hotadd.proxy = small-proxy")
    folder = host.site / "ds1/plain"
    with (folder / "a.vmdk").open("a") as file:
        file.write('ddb.thinProvisioned = "1"\n')
    (folder / "b.vmdk").unlink()
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", folder / "b.vmdk", "8M"], check=True)
    assert refusal(host, "hotadd", "[ds1] plain/a.vmdk") == 0
    assert refusal(host, "hotadd", "[ds1] plain/b.vmdk") == 0


def test_without_loop_devices_both_are_not_to_be_had(host_program: Path, site: Path) -> None:
    """In a user and mount namespace of its own the host has no device nodes."""
    if shutil.which("unshare") is None:
        pytest.skip("absent: unshare")
    hidden = site.parent / "hidden"
    hidden.write_text(
        '#!/bin/sh\nmount --bind /dev/null /dev/loop-control && exec "$@"\n', encoding="utf-8"
    )
    hidden.chmod(0o755)
    wrapper = site.parent / "wrapper"
    wrapper.write_text(f'#!/bin/sh\nexec unshare -m {hidden} {host_program} "$@"\n')
    wrapper.chmod(0o755)
    with serving(wrapper, site, preserve=True) as host:
        host.configure(INSTANT, SAN, *HOTADD)
        assert refusal(host, "san") == 6
        assert refusal(host, "hotadd") == 6
        assert refusal(host, "nbdssl") == 0
