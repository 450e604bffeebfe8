"""How a mount begins and ends: in the background, in front, told to stop, killed, in use."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.mounting import (
    COMMAND,
    SECONDS,
    Agent,
    Mount,
    Mounts,
    alive,
    children,
    mounted,
    run,
    state_files,
    until,
    vddkfs,
)
from tests.end_to_end.vms import KIB, MIB, make_vmdk, make_vmfs, noise, raw_sha256

CONTENT = noise("life", MIB)
LET_GO = "is let go with files open"
WAITS = "told to stop, but files are open"


@pytest.fixture
def disk(vm: Path) -> Path:
    return make_vmfs(vm / "disk.vmdk", CONTENT)


def our_processes(words: str) -> list[int]:
    """Return the processes whose command line has *words*, without zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if words in line and alive(int(folder.name)) and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def test_fifty_rounds_leave_nothing(able: None, vm: Path, tmp_path: Path) -> None:
    path = make_vmdk(vm / "tiny.vmdk", noise("tiny", 64 * KIB))
    expected = raw_sha256(path)
    problems: list[str] = []
    pids: list[int] = []

    def rounds(mount: Mount, count: int) -> None:
        try:
            for number in range(count):
                mount.start()
                pids.append(mount.pid)
                if number % 5 == 0:
                    done = run("sha256sum", mount.path("tiny/disk.raw"))
                    assert done.stdout.split()[0] == expected
                    pids.extend(children(mount.pid))
                done = mount.umount()
                assert done.returncode == 0, done.stderr
                assert not alive(mount.pid), "the daemon runs on after umount has returned"
                assert not mounted(mount.place)
        except Exception as error:
            problems.append(f"{mount.place}: {error}")

    mounts = []
    for number in range(2):
        place = tmp_path / f"mnt{number}"
        place.mkdir()
        mounts.append(Mount(path, place, tmp_path / f"log{number}", []))
    threads = [threading.Thread(target=rounds, args=(mount, 25)) for mount in mounts]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for mount in mounts:
            mount.destroy()
    assert problems == []
    assert len(pids) == 60
    assert [pid for pid in pids if alive(pid)] == []
    assert our_processes(str(tmp_path)) == []
    assert [file for mount in mounts for file in state_files(mount.place)] == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert str(tmp_path) not in run("losetup", "-l", "-O", "BACK-FILE").stdout
    assert [line for mount in mounts for line in mount.loud()] == []


def test_mount_returns_when_the_mount_answers(mount: Mounts, disk: Path) -> None:
    found = mount.prepare(disk)
    done = found.start()
    assert done.stdout == ""
    assert done.stderr == ""
    assert mounted(found.place)
    assert found.read("disk/disk.raw", 0, 4096) == CONTENT[:4096]


def test_daemon_lets_go_of_what_started_it(mount: Mounts, disk: Path) -> None:
    """A pipe that the command was given ends with the command, and no folder is held."""
    found = mount(disk)
    assert os.readlink(f"/proc/{found.pid}/cwd") == "/"
    for fd in (0, 1, 2):
        assert os.readlink(f"/proc/{found.pid}/fd/{fd}") == "/dev/null"
    assert os.getsid(found.pid) == found.pid


def test_no_descriptor_is_leaked(mount: Mounts, disk: Path) -> None:
    found = mount(disk, "idle_timeout=0.2")
    found.map_known("disk")

    def use() -> None:
        assert found.sha256("disk/disk.raw")
        assert found.sha256("disk/disk.raw", True)
        found.ask("tree", found.path())
        until(lambda: found.worker()["pid"] is None, what="the idle worker to end")

    def count() -> int:
        number = 0
        for fd in Path(f"/proc/{found.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                # The cache's memory is a descriptor a chunk, and it may still grow.
                number += "vddkfs-arena" not in os.readlink(fd)
        return number

    use()  # The first time brings the cache its memory.
    # What is asked of the daemon is a socket for a moment, so the least is what rests.
    resting = min(count() for _ in range(100))
    for _ in range(4):
        use()
    until(lambda: count() <= resting, what=f"no more than {resting} descriptors")


@contextlib.contextmanager
def foreground(mount: Mount) -> Iterator[subprocess.Popen[str]]:
    command = [str(COMMAND), "mount", str(mount.source), str(mount.place), "-f", "-o"]
    options = ",".join(option for option in mount.options if not option.startswith("log="))
    process = subprocess.Popen(
        [*command, options], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        mount.pid = process.pid
        until(lambda: vddkfs("status", mount.place).returncode == 0, what="the mount")
        yield process
    finally:
        mount.destroy()
        process.communicate(timeout=SECONDS)


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_foreground(mount: Mounts, disk: Path, told: signal.Signals) -> None:
    found = mount.prepare(disk)
    with foreground(found) as process:
        assert found.read("disk/disk.raw", 0, 4096) == CONTENT[:4096]
        workers = children(process.pid)
        assert workers
        found.close_agent()
        process.send_signal(told)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert not mounted(found.place)
    assert not any(alive(pid) for pid in workers)
    lines = said.splitlines()
    assert all(line.startswith("vddkfs: INFO ") for line in lines)
    assert any("is mounted at" in line for line in lines)


def test_foreground_ends_with_umount(mount: Mounts, disk: Path) -> None:
    found = mount.prepare(disk)
    with foreground(found) as process:
        done = found.umount()
        assert done.returncode == 0, done.stderr
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in said


def test_plain_umount_works_too(mount: Mounts, disk: Path) -> None:
    found = mount(disk)
    found.read("disk/disk.raw", 0, 4096)
    found.close_agent()
    pids = [found.pid, *children(found.pid)]
    assert run("umount", found.place).returncode == 0
    until(lambda: not any(alive(pid) for pid in pids), what="the end of the daemon")
    assert state_files(found.place) == []


def test_sigterm_waits_for_an_open_file(mount: Mounts, disk: Path) -> None:
    found = mount(disk, "stop_timeout=2")
    fd = found.open("disk/disk.raw", direct=True)
    found.ask("pread", fd, 4096, 0)
    workers = children(found.pid)
    found.expect(WAITS, LET_GO)
    start = time.monotonic()
    os.kill(found.pid, signal.SIGTERM)
    until(lambda: any(WAITS in line for line in found.loud()), what="the log")
    # It goes on serving meanwhile, and says who holds it.
    assert found.ask("pread", fd, 4096, 65536) == CONTENT[65536:][:4096]
    assert any(f"has {found.path('disk/disk.raw')}" in line for line in found.loud())
    until(lambda: not alive(found.pid), what="the end of the daemon")
    assert 1.9 < time.monotonic() - start < 8
    with pytest.raises(OSError) as caught:  # noqa: PT011 (the errno is what matters)
        found.ask("pread", fd, 4096, 0)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
    assert not mounted(found.place)
    assert not any(alive(pid) for pid in workers)
    assert state_files(found.place) == []


def test_sigterm_leaves_when_the_file_is_closed(mount: Mounts, disk: Path) -> None:
    found = mount(disk, "stop_timeout=60")
    fd = found.open("disk/disk.raw")
    found.expect(WAITS)
    os.kill(found.pid, signal.SIGTERM)
    until(lambda: found.loud(), what="the log")
    assert alive(found.pid)
    found.ask("close", fd)
    until(lambda: not alive(found.pid), what="the end of the daemon")
    assert not mounted(found.place)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(mount: Mounts, disk: Path, second: signal.Signals) -> None:
    found = mount(disk, "stop_timeout=60")
    found.open("disk/disk.raw")
    found.expect(WAITS, LET_GO)
    os.kill(found.pid, signal.SIGTERM)
    until(lambda: found.loud(), what="the log")
    os.kill(found.pid, second)
    until(lambda: not alive(found.pid), 8, what="the end of the daemon")
    assert not mounted(found.place)


def test_killed_daemon(mount: Mounts, disk: Path) -> None:
    found = mount(disk)
    fd = found.open("disk/disk.raw")
    found.ask("pread", fd, 4096, 0)
    workers = children(found.pid)
    assert len(workers) == 1
    os.kill(found.pid, signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in (found.pid, *workers)), what="the end of all")
    with pytest.raises(OSError) as caught:  # noqa: PT011 (the errno is what matters)
        found.ask("pread", fd, 4096, 65536)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    found.close_agent()
    assert mounted(found.place)

    status = vddkfs("status", found.place)
    assert status.returncode == 30
    assert f"vddkfs umount {found.place}" in status.stderr
    again = vddkfs("mount", disk, found.place)
    assert again.returncode == 20
    assert f"vddkfs umount {found.place}" in again.stderr
    assert len(again.stderr.splitlines()) == 1

    done = found.umount()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not mounted(found.place)
    assert state_files(found.place) == []
    found.start()
    assert found.read("disk/disk.raw", 0, 4096) == CONTENT[:4096]


def test_umount_of_a_busy_mount(mount: Mounts, disk: Path) -> None:
    found = mount(disk)
    fd = found.open("disk/disk.raw", direct=True)
    done = found.umount()
    assert done.returncode == 31
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vddkfs: {found.place}: the mount is in use (")
    assert f"has {found.path('disk/disk.raw')}" in line
    assert mounted(found.place)
    assert found.ask("pread", fd, 4096, 0) == CONTENT[:4096]
    assert found.status()["open_files"] == 1
    found.ask("close", fd)
    assert found.umount().returncode == 0


def test_umount_names_who_works_in_it(mount: Mounts, disk: Path) -> None:
    found = mount(disk)
    found.ask("chdir", found.path("disk"))
    done = found.umount()
    assert done.returncode == 31
    assert f"has {found.path('disk')}" in done.stderr
    found.ask("chdir", "/")


def test_umount_names_who_has_a_strange_name(mount: Mounts, disk: Path, tmp_path: Path) -> None:
    """The name of a process is any bytes, and its owner's choice."""
    found = mount(disk)
    strange = os.fsencode(tmp_path) + b"/sl\xe9ep\n"
    shutil.copy(os.path.realpath(shutil.which("sleep") or "/bin/sleep"), strange)
    command = ["sh", "-c", 'exec "$0" 600 < "$1"', strange, found.path("disk/disk.raw")]
    with subprocess.Popen(command) as process:
        try:
            until(lambda: found.status()["open_files"] == 1, what="the file to be open")
            done = found.umount()
            assert done.returncode == 31, done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert f"(pid {process.pid}) has {found.path('disk/disk.raw')}" in done.stderr
            # The daemon looks for holders too when it is told to stop, and must survive it.
            found.expect(WAITS)
            os.kill(found.pid, signal.SIGTERM)
            until(lambda: found.loud() or not alive(found.pid), what="the log")
            assert alive(found.pid)
        finally:
            process.kill()
    until(lambda: not alive(found.pid), what="the end of the daemon")


def test_lazy_umount_of_a_busy_mount(mount: Mounts, disk: Path) -> None:
    found = mount(disk)
    # With the last close the kernel may be gone before it is answered.
    found.allow("fuse_release.*No such file or directory")
    fd = found.open("disk/disk.raw", direct=True)
    done = found.umount("--lazy")
    assert done.returncode == 0, done.stderr
    assert not mounted(found.place)
    assert found.ask("pread", fd, 4096, 4096) == CONTENT[4096:][:4096]
    assert alive(found.pid)
    found.ask("close", fd)
    until(lambda: not alive(found.pid), what="the end of the daemon")


def test_umount_with_a_worker_that_stands_still(mount: Mounts, disk: Path) -> None:
    found = mount(disk)
    found.read("disk/disk.raw", 0, 4096)
    found.close_agent()
    (worker,) = children(found.pid)
    os.kill(worker, signal.SIGSTOP)
    done = found.umount()
    assert done.returncode == 0, done.stderr
    assert not alive(found.pid)
    assert not alive(worker)


def test_sigterm_while_a_disk_hangs(mount: Mounts, disk: Path) -> None:
    """Readers that wait for a worker that stands still keep nobody from leaving."""
    found = mount(disk, "stop_timeout=1")
    fd = found.open("disk/disk.raw", direct=True)
    found.ask("pread", fd, 4096, 0)
    (worker,) = children(found.pid)
    os.kill(worker, signal.SIGSTOP)
    found.agent.send("pread", fd, 4096, 65536)
    until(lambda: found.worker()["in_flight"] == 1, what="the read to be under way")
    found.expect(WAITS, LET_GO)
    found.allow("read at offset .* failed", "going down")
    os.kill(found.pid, signal.SIGTERM)
    until(lambda: not alive(found.pid), 15, what="the end of the daemon")
    with pytest.raises(OSError):  # noqa: PT011 (which error is the kernel's choice)
        found.agent.receive(20)
    assert not alive(worker)
    assert not mounted(found.place)


def test_two_mounts_of_one_source(mount: Mounts, disk: Path) -> None:
    first, second = mount(disk), mount(disk)
    for found in (first, second):
        assert found.sha256("disk/disk.raw", True) == raw_sha256(disk)
    assert first.status()["mountpoint"] == str(first.place)
    assert second.status()["mountpoint"] == str(second.place)
    assert first.pid != second.pid


def test_reader_does_not_hang_when_the_daemon_is_killed(mount: Mounts, disk: Path) -> None:
    """A read that is under way ends with an error, and so does the worker."""
    found = mount(disk)
    fd = found.open("disk/disk.raw", direct=True)
    found.ask("pread", fd, 4096, 0)
    (worker,) = children(found.pid)
    os.kill(worker, signal.SIGSTOP)
    agent: Agent = found.agent
    agent.send("pread", fd, 4096, 65536)
    until(lambda: found.worker()["in_flight"] == 1, what="the read to be under way")
    os.kill(found.pid, signal.SIGKILL)
    with pytest.raises(OSError) as caught:  # noqa: PT011 (the errno is what matters)
        agent.receive(20)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    until(lambda: not alive(worker), what="the end of the worker")
