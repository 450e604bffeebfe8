"""The host process: its life, logins, and which disk may be opened."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.simulator.host_client import (
    CLEANUP,
    END_ACCESS,
    LOGIN,
    LOGOUT,
    METADATA,
    PREPARE,
    READ,
    SECTOR,
    WRITE,
    Host,
    Refused,
    pack,
    serving,
)
from tests.simulator.host_site import CAPACITY
from tests.simulator.host_steps import INSTANT, refusal, web_bytes

# ---- the process ----


def test_help_tells_how_it_is_used(host_program: Path) -> None:
    done = subprocess.run([host_program, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: vixsim-host SITE")
    assert subprocess.run([host_program], capture_output=True, check=False).returncode == 2


def test_a_second_host_on_one_site_is_refused(host: Host, host_program: Path) -> None:
    second = subprocess.run([host_program, host.site], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "served by another" in second.stderr
    assert refusal(host) == 0  # the first one lives on


def test_pid_file_and_sockets_go_at_the_end(host_program: Path, site: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    process = subprocess.Popen(
        [host_program, site, "--pid-file", pid_file], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert int(pid_file.read_text()) == process.pid
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    process.stdout.close()
    assert not pid_file.exists()
    assert not list((site / ".sim").glob("*.sock"))


def test_a_killed_host_is_followed_by_another(host_program: Path, site: Path) -> None:
    with serving(host_program, site, preserve=True) as host:
        host.process.kill()
        host.process.wait()
    with serving(host_program, site) as host:
        assert refusal(host) == 0


# ---- logins ----


def test_logins_are_checked_against_the_settings(host: Host) -> None:
    host.login(user="anyone", password="anything").peer.end()
    secrets = ["user = root", "password = secret", "cookie = c00kie"]
    host.configure(INSTANT, *secrets, "login_error = 7")
    host.login().peer.end()
    host.login(user="root", password="wrong", cookie="c00kie").peer.end()
    for user, password, cookie in [("root", "no", None), ("me", "secret", None), ("", "", "stale")]:
        with pytest.raises(Refused) as refused:
            host.login(user=user, password=password, cookie=cookie)
        assert refused.value.code == 7
    log = (host.site / ".sim/events.log").read_text()
    assert len(host.events("login-refused")) == 3
    assert not any(secret in log for secret in ("secret", "wrong", "c00kie", "stale", "anything"))


def test_an_open_needs_a_living_login(host: Host) -> None:
    with pytest.raises(Refused) as refused:
        host.open(12345)
    assert refused.value.code == 3047
    login = host.login()
    disk = host.open(login)
    assert login.peer.code(LOGIN, pack(1, 80, "a", "b", None, None, None, 0, None)) == 3
    login.peer.ask(LOGOUT)
    host.await_event("logout", asked="yes")
    with pytest.raises(Refused) as refused:
        host.open(login)
    assert refused.value.code == 3047
    assert disk.read(0, 1) == web_bytes(host)[:SECTOR]  # what is open stays so
    disk.close()


def test_a_read_only_login_cannot_write(host: Host) -> None:
    disk = host.open(host.login(read_only=True), write=True)
    assert disk.peer.code(WRITE, b"x" * SECTOR, 0, 1) == 11
    assert disk.peer.code(METADATA, pack("ddb.x", "1")) == 11
    disk.close()


def test_the_vim_service_refuses_what_it_does_not_know(host: Host) -> None:
    with host.connect("vim.sock") as peer:
        assert peer.code(CLEANUP, pack("moref=vm-1", "/tmp")) == 3047
        assert peer.code(LOGIN, b"short") == 3
    login = host.login()
    assert login.peer.code(READ) == 6
    assert login.peer.code(999) == 6


def test_access_is_prepared_for_one_identity(host: Host) -> None:
    vim = host.login().peer
    assert vim.code(PREPARE, pack("moref=none", "me")) == 4000
    assert vim.code(PREPARE, pack("moref=vm-1", "x" * 51)) == 3
    assert vim.code(PREPARE, pack("moref=vm-1", "x" * 50)) == 0
    assert vim.code(PREPARE, pack("moref=vm-1", "x" * 50)) == 0
    assert vim.code(PREPARE, pack("moref=vm-1", "other")) == 5
    assert vim.code(END_ACCESS, pack("moref=vm-1", "other")) == 5
    assert vim.code(END_ACCESS, pack("moref=vm-1", "x" * 50)) == 0
    assert vim.code(PREPARE, pack("web/web.vmx?dcPath=DC&dsName=ds1", "other")) == 0
    assert vim.code(END_ACCESS, pack("moref=vm-1", "other")) == 0


# ---- what may be opened ----


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (0, {}),
        (0, {"vm": "web/web.vmx?dcPath=DC0&dsName=ds1"}),
        (0, {"path": "[ds1] web/child.vmdk", "write": True}),
        (4000, {"vm": "none"}),
        (4, {"path": "web/web.vmdk"}),
        (4, {"path": "[ds1] ../ds1/web/web.vmdk"}),
        (4, {"path": "[nowhere] web/web.vmdk"}),
        (4, {"path": "[ds1] web/absent.vmdk"}),
        (13, {"path": "[ds1] plain/a.vmdk"}),
        (1, {"path": "[ds1] web/independent.vmdk"}),
        (1, {"path": "[at@sign] web/web.vmdk"}),
        (0, {"snapshot": "snapshot-1"}),
        (13003, {"snapshot": "snapshot-9"}),
        (13003, {"snapshot": "snapshot-2"}),
        (13, {"snapshot": "snapshot-1", "path": "[ds1] web/child.vmdk"}),
        (1, {"vm": "vm-2", "path": "[ds1] running/child.vmdk"}),
        (1, {"vm": "vm-2", "path": "[ds1] running/base.vmdk", "write": True}),
        (13, {"vm": "vm-2", "path": "[ds1] running/base.vmdk"}),
        (0, {"vm": "vm-2", "path": "[ds1] running/base.vmdk", "snapshot": "snapshot-2"}),
        (3, {"transport": "carrier-pigeon"}),
    ],
)
def test_which_disk_may_be_opened(host: Host, code: int, how: dict[str, str]) -> None:
    assert refusal(host, **how) == code
    if code > 3:
        event = host.events("open-refused")[-1]
        assert event["error"] == str(code)
        assert event["why"]


def test_older_clients_open_independent_disks(host: Host) -> None:
    host.open(host.login(release=67), "[ds1] web/independent.vmdk", write=True).close()


def test_the_thumbprint_shows_at_open(host: Host) -> None:
    host.configure(INSTANT, "thumbprint = AB:CD")
    assert refusal(host) == 1
    assert refusal(host, thumbprint="00:11") == 1
    assert refusal(host, thumbprint="ab:cd") == 0


def test_the_facts_of_a_disk(host: Host) -> None:
    disk = host.open(host.login(), "[ds1] web/child.vmdk")
    assert (disk.capacity, disk.links, disk.redo, disk.local) == (CAPACITY, 2, True, False)
    assert disk.host == "esx1"
    files = {Path(path).name: is_flat for path, is_flat in disk.files}
    assert files == {"web-flat.vmdk": True, "child.vmdk": False}
    for fd in disk.fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
    disk.close()
    base = host.open(host.login(), "[vsan] web/web.vmdk")
    assert (base.redo, base.local) == (False, True)
    assert base.metadata["ddb.uuid"] == "60 00 C2 9a"
    base.close()


def test_a_disk_in_more_files_than_fit_one_message(host: Host) -> None:
    folder = host.site / "ds1/plain"
    extents = [f'RW 8 FLAT "part{i}.bin" 0' for i in range(150)]
    for i in range(150):
        (folder / f"part{i}.bin").write_bytes(bytes([i]) * 8 * SECTOR)
    (folder / "b.vmdk").write_text(
        "# Disk DescriptorFile\nversion=1\nCID=1234abcd\nparentCID=ffffffff\n"
        'createType="twoGbMaxExtentFlat"\n' + "\n".join(extents) + '\nddb.adapterType = "ide"\n'
    )
    disk = host.open(host.login("vm-3"), "[ds1] plain/b.vmdk")
    assert len(disk.fds) == 150
    assert disk.read(0, 1200) == b"".join(bytes([i]) * 8 * SECTOR for i in range(150))
    disk.close()
