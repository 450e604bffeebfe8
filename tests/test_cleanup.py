"""What dead mounts left: it is found, nothing that lives is touched, and disks are detached."""

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.doctor.conftest import WriteCredentials, credentials, kits, linked_kits
from tests.simulator.client import Client
from tests.simulator.fixtures import able, datastores
from tests.simulator.host_site import can_make_loops
from tests.simulator.kit import Kit, Kits, until
from vddkfs import leftovers
from vddkfs.cli import main
from vddkfs.commands import cleanup
from vddkfs.engines.config import VddkConfig
from vddkfs.engines.vddk import runtime
from vddkfs.errors import LeftBehind, UsageError
from vddkfs.leftovers import Report, clean, hot_adders, outcome
from vddkfs.state import held

__all__ = ["able", "credentials", "datastores", "kits", "linked_kits"]

Output = pytest.CaptureFixture[str]
SECRET = "S3cr3t-probe"
HOTADD = VddkConfig(
    images=(),
    tmp_directory="",
    server="vcenter",
    vmx_spec="moref=vm-16",
    transports=("hotadd", "nbdssl"),
)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    (folder / "vddk").mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(cleanup, "state_folder", lambda: folder)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    return folder


def leave(state: Path, name: str, config: VddkConfig | None = None) -> Path:
    """Make what a dead mount's worker left, and return its folder."""
    folder = state / "vddk" / name
    folder.mkdir(parents=True)
    (folder / "some.lease").write_text("x")
    if config is not None:
        (folder / leftovers.WORKER_FILE).write_bytes(msgspec.json.encode(config))
    return folder


def names(report: Report) -> list[str]:
    return sorted(Path(path).name for path in report.removed)


# Folders.


def test_the_file_is_the_one_that_workers_write() -> None:
    assert leftovers.WORKER_FILE == runtime.WORKER_FILE


def test_folders_that_nobody_holds_are_removed(state: Path) -> None:
    for name in ("mount-1/0", "mount-2/0", "describe-3", "doctor-4", "mount-x", "sessions/ab"):
        leave(state, name)
    (state / "vddk" / "mount-5").symlink_to(state)
    with held(state / "vddk" / "mount-2"):
        report = clean(state, None)
        assert names(report) == ["describe-3", "doctor-4", "mount-1"]
        assert report.remaining == []
        assert (state / "vddk" / "mount-2" / "0" / "some.lease").exists()
    left = sorted(path.name for path in (state / "vddk").iterdir())
    assert left == ["mount-2", "mount-5", "mount-x", "sessions"]
    assert names(clean(state, None)) == ["mount-2"]


def test_a_dry_run_changes_nothing(state: Path) -> None:
    leave(state, "mount-1/0")
    attached = leave(state, "mount-2/0", HOTADD)
    report = clean(state, None, dry=True)
    assert names(report) == ["mount-1"]
    assert [one.path for one in report.remaining] == [str(attached)]
    assert (state / "vddk" / "mount-1" / "0").exists()


def test_what_cannot_be_removed_is_told(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = leave(state, "mount-1")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    [one] = clean(state, None).remaining
    assert one.path == str(folder)
    assert "Permission denied" in one.reason
    assert one.remedy


# Hot-added disks.


def test_only_those_that_hot_added_may_have_left_disks(state: Path) -> None:
    without = msgspec.structs.replace(HOTADD, transports=("nbdssl",))
    leave(state, "mount-1/0", HOTADD)
    leave(state, "mount-1/1", without)
    leave(state, "mount-1/2")
    (leave(state, "mount-1/3") / leftovers.WORKER_FILE).write_text('{"engine": "vd')
    found = hot_adders(state / "vddk" / "mount-1")
    assert [worker.folder.name for worker in found] == ["0"]
    own = leave(state, "mount-2", HOTADD)
    assert [worker.folder for worker in hot_adders(own)] == [own]


def test_without_a_login_their_folder_stays(state: Path) -> None:
    folder = leave(state, "mount-1/0", HOTADD)
    report = clean(state, None)
    [one] = report.remaining
    assert (one.path, one.server) == (str(folder), "vcenter")
    assert "vddkfs cleanup" in one.remedy
    assert report.removed == []
    assert folder.exists()


def test_with_one_they_are_detached_and_the_folder_goes(state: Path) -> None:
    folder = leave(state, "mount-1/0", HOTADD)
    asked: list[VddkConfig] = []

    def clean_up(config: VddkConfig) -> tuple[int, str]:
        asked.append(config)
        shutil.rmtree(folder)
        return 2, ""

    report = clean(state, clean_up)
    assert (report.cleaned, report.remaining) == (2, [])
    assert names(report) == ["mount-1"]
    assert not folder.parent.exists()
    assert (asked[0].tmp_directory, asked[0].images) == (str(folder), ())


@pytest.mark.parametrize("gone", [True, False])
def test_what_could_not_be_detached_can_be_asked_for_again(state: Path, gone: bool) -> None:
    folder = leave(state, "mount-1/0", HOTADD)

    def clean_up(config: VddkConfig) -> tuple[int, str]:
        if gone:
            shutil.rmtree(folder)
        return 1, "1 disks are still attached"

    report = clean(state, clean_up)
    assert (report.cleaned, report.removed) == (1, [])
    assert "still attached" in report.remaining[0].reason
    assert [worker.folder for worker in hot_adders(folder.parent)] == [folder]


def test_credentials_go_to_their_server_alone() -> None:
    asked: list[str] = []

    def clean_up(config: VddkConfig) -> tuple[int, str]:
        asked.append(config.server)
        return 1, ""

    only = leftovers.only("vcenter", clean_up)
    assert only(HOTADD) == (1, "")
    cleaned, problem = only(msgspec.structs.replace(HOTADD, server="other"))
    assert (cleaned, asked) == (0, ["vcenter"])
    assert "another server" in problem
    assert cleanup._server("", {"", "a"}) == "a"
    assert cleanup._server("b", {"a", "b"}) == "b"
    for given in ("", "c"):
        with pytest.raises(UsageError):
            cleanup._server(given, {"a", "b"})


@pytest.mark.parametrize(
    ("said", "failed", "cleaned", "problem"),
    [
        (["hot-added disks cleaned up: 2, remaining: 0; the next"], "", 2, ""),
        (["hot-added disks cleaned up: 2, remaining: 1"], "", 2, "1 disks are still attached"),
        (["hot-added disks could not be cleaned up: 35"], "", 0, "could not be cleaned up"),
        (["no cleanup: another worker of this VM lives"], "", 0, "another worker"),
        (["x"], "", 0, "did not say"),
        (["hot-added disks cleaned up: 1, remaining: 0"], "it died", 1, "it died"),
    ],
)
def test_what_a_worker_says(said: list[str], failed: str, cleaned: int, problem: str) -> None:
    found = outcome(said, failed)
    assert found[0] == cleaned
    assert problem in found[1]
    assert bool(problem) == bool(found[1])


# Sockets and logs.


@pytest.fixture
def living(state: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(state / "living.sock"))
        yield sock


def kill_socket(state: Path, name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(state / name))


def test_dead_sockets_and_logs_are_removed(state: Path, living: socket.socket) -> None:
    kill_socket(state, "dead.sock")
    (state / "plain.sock").write_text("no socket")
    for name in ("dead.log", "living.log", "alone.log", "open.log"):
        (state / name).write_text("x")
    # A socket is listened on only a while after it is there, and a log is there before.
    with (state / "open.log").open("a"):
        assert names(clean(state, None)) == ["alone.log", "dead.log", "dead.sock"]
        living.listen()
        assert names(clean(state, None)) == []
    assert sorted(path.name for path in state.iterdir()) == [
        "living.log",
        "living.sock",
        "open.log",
        "plain.sock",
        "vddk",
    ]


def test_a_process_may_end_while_its_descriptors_are_looked_at(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (state / "alone.log").write_text("x")
    (state / "open.log").write_text("x")
    real = os.scandir
    ended = []

    def scandir(folder: object) -> object:
        """As if every process but ours ended just before its folder is opened."""
        name = os.fsdecode(folder) if isinstance(folder, bytes | str | os.PathLike) else ""
        if name.startswith("/proc/") and name.endswith("/fd") and str(os.getpid()) not in name:
            ended.append(name)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return real(folder)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    with (state / "open.log").open("a"):
        assert names(clean(state, None)) == ["alone.log"]
    assert ended


def test_there_may_be_no_state_folder_at_all(tmp_path: Path) -> None:
    none = tmp_path / "none"
    with leftovers.alone(none):
        assert clean(none, None) == Report()


# The command.


def test_the_command(state: Path, capsys: Output) -> None:
    assert main(["cleanup"]) == 0
    assert "nothing was left" in capsys.readouterr().out
    folder = leave(state, "mount-1")
    assert main(["cleanup", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"would remove\t{folder}\t\n"
    assert main(["cleanup", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "removed": [str(folder)],
        "cleaned": 0,
        "remaining": [],
    }
    assert not folder.exists()


def test_the_command_says_what_remains_and_how_to_go_on(state: Path, capsys: Output) -> None:
    leave(state, "mount-1/0", HOTADD)
    assert main(["cleanup", "--dry-run"]) == 0
    assert main(["cleanup"]) == LeftBehind.exit_code
    out, err = capsys.readouterr()
    assert out.startswith("remaining\t")
    assert "vddkfs cleanup --server vcenter -o credentials=FILE" in err
    assert err.count("\n") == 1


def test_one_cleanup_at_a_time(state: Path, capsys: Output) -> None:
    fd = os.open(state / "vddk", os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert main(["cleanup"]) == LeftBehind.exit_code
    assert "another vddkfs cleanup" in capsys.readouterr().err
    os.close(fd)
    assert main(["cleanup"]) == 0


def test_a_library_that_is_gone_keeps_the_folder(
    state: Path, credentials: WriteCredentials, capsys: Output
) -> None:
    config = msgspec.structs.replace(
        HOTADD, libdir="/none", shared_directory=str(state / "vddk"), max_sessions=1
    )
    folder = leave(state, "mount-1/0", config)
    words = ["cleanup", "-o", f"credentials={credentials(SECRET)}"]
    assert main(words) == LeftBehind.exit_code
    out, err = capsys.readouterr()
    assert "libdir=/none" in out
    assert SECRET not in out + err
    assert folder.exists()


# With the simulator.


def _hold(client: Client) -> None:
    connection = client.connect(vm="vm-16", modes="hotadd", snapshot="snapshot-1")
    disk = client.open(connection, "[ds1] web01/web01.vmdk")
    disk.read(0, 1)
    client.tell("attached")
    client.hear()


@pytest.fixture
def left(kits: Kits, state: Path) -> Kit:
    """A kit on whose machine a killed worker's disk is attached."""
    if not can_make_loops():
        pytest.skip("absent: loop devices, or the right to make them")
    kit = kits()
    config = msgspec.structs.replace(
        HOTADD, libdir=str(kit.path), shared_directory=str(state / "vddk")
    )
    folder = leave(state, "mount-1/0", config)
    process = kit.client(_hold, config=kit.config(f"tmpDirectory={folder}"))
    process.hear()
    process.kill()
    until(lambda: kit.events("attachment-left"), what="the host to see its client dead")
    assert len(kit.attachments()) == 1
    return kit


def test_k05_k24_a_dead_mounts_disks_are_detached(
    left: Kit, state: Path, credentials: WriteCredentials, capsys: Output
) -> None:
    # The trap: without the library nothing is detached, and that is said.
    assert main(["cleanup"]) == LeftBehind.exit_code
    assert len(left.attachments()) == 1
    left.configure("chatter.secrets = yes", "chatter.log = yes")
    words = ["cleanup", "--json", "-o", f"credentials={credentials(SECRET)}"]
    capsys.readouterr()
    assert main(words) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["cleaned"], report["remaining"]) == (1, [])
    assert not left.attachments()
    assert not (state / "vddk" / "mount-1").exists()
    assert SECRET not in out + err


def test_k24_a_login_that_fails_leaves_it_for_the_next_cleanup(
    left: Kit, state: Path, credentials: WriteCredentials, capsys: Output
) -> None:
    path = credentials(SECRET)
    left.configure("password = another")
    assert main(["cleanup", "-o", f"credentials={path}"]) == LeftBehind.exit_code
    out, err = capsys.readouterr()
    assert "could not be cleaned up" in out
    assert SECRET not in out + err
    assert len(left.attachments()) == 1
    left.configure()
    assert main(["cleanup", "-o", f"credentials={path}"]) == 0
    assert "detached\t1 hot-added disks" in capsys.readouterr().out
    assert not left.attachments()
