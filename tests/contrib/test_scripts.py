"""The operator's scripts, run in a small stand-in for the project: no network, no package built.

Everything a script calls is the real thing, except what would change this machine or take long
(Python's venv and pip, apt-get, vddkfs itself), which a stub plays.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path
    for folder in (ROOT / "contrib", ROOT / ".ci")
    for path in folder.rglob("*")
    if path.is_file() and path.read_bytes()[:100].split(b"\n")[0].endswith(b"sh")
)
Run = Callable[..., subprocess.CompletedProcess[str]]

# Plays python3: makes a venv that is itself, and a pip that notes how it was called.
STUB_PYTHON = """#!/bin/bash
case "$1 $2" in
    "-c "*) echo "3.11.99 (stub)" ;;
    "-m venv")
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        echo "VIRTUAL_ENV=\\"$3\\"" >"$3/bin/activate"
        ;;
    "-m pip")
        echo "$@" >>"$STUB_LOG"
        [ -z "${STUB_PIP_FAILS:-}" ] || { echo "error: no compiler in sight"; exit 1; }
        : >"$(dirname "$0")/vddkfs"
        chmod +x "$(dirname "$0")/vddkfs"
        ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(
    *command: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_scripts_are_found_and_executable() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in SCRIPTS}
    wanted = {"setup", "test", "quickstart", "mount.vddkfs"}
    assert {f"contrib/{name}" for name in wanted} | {".ci/run"} <= names
    assert [path for path in SCRIPTS if not os.access(path, os.X_OK)] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    result = run("shellcheck", script)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["setup", "test", "quickstart", "mount.vddkfs"])
def test_help(name: str) -> None:
    result = run(ROOT / "contrib" / name, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")
    assert result.stderr == ""


class TestSetup:
    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        project = tmp_path / "project"
        (project / "contrib").mkdir(parents=True)
        for folder in ("fuse", "engines/vddk"):
            (project / "vddkfs" / folder).mkdir(parents=True)
        shutil.copy(ROOT / "contrib/setup", project / "contrib")
        shutil.copy(ROOT / "contrib/mount.vddkfs", project / "contrib")
        (project / "pyproject.toml").write_text("[project]\n")
        (project / "vddkfs/fuse/session.c").write_text("int x;\n")
        return project

    @pytest.fixture
    def setup(self, project: Path, tmp_path: Path) -> Run:
        """Runs the project's contrib/setup on a machine that has everything."""
        stubs = tmp_path / "stubs"
        for name in (
            *("cc", "pkg-config", "fusermount3", "qemu-img", "qemu-io", "mkfs.ext4", "debugfs"),
            *("sfdisk", "mount", "losetup", "mkfs.xfs", "getfattr", "fio", "shellcheck"),
        ):
            executable(stubs / name, "#!/bin/sh\n")
        executable(stubs / "apt-get", "#!/bin/sh\necho apt-get ran\nexit 1\n")
        python = executable(stubs / "python3", STUB_PYTHON)

        def setup(
            *arguments: str, root: Path = project, **env: str
        ) -> subprocess.CompletedProcess[str]:
            stubbed = {
                "PATH": f"{stubs}:{os.environ['PATH']}",
                "CC": "cc",
                "PYTHON": str(python),
                "STUB_LOG": str(tmp_path / "pip.log"),
                "VDDKFS_PREFIX": str(tmp_path / "opt/vddkfs"),
                "VDDKFS_BIN": str(tmp_path / "bin"),
                "VDDKFS_SBIN": str(tmp_path / "sbin"),
            }
            return run(root / "contrib/setup", *arguments, env=stubbed | env)

        return setup

    @pytest.fixture
    def pip_calls(self, tmp_path: Path) -> Callable[[], list[str]]:
        log = tmp_path / "pip.log"
        return lambda: log.read_text().splitlines() if log.exists() else []

    def test_second_run_does_nothing(
        self, project: Path, setup: Run, pip_calls: Callable[[], list[str]]
    ) -> None:
        first = setup()
        assert first.returncode == 0, first.stderr
        assert ".venv/bin/vddkfs is ready" in first.stdout
        assert [call.endswith("-e .") for call in pip_calls()] == [True]
        second = setup()
        assert second.returncode == 0
        assert second.stdout == "contrib/setup: nothing to do, .venv/bin/vddkfs is ready\n"
        assert len(pip_calls()) == 1

    def test_test_extras_are_added_once_and_kept(
        self, project: Path, setup: Run, pip_calls: Callable[[], list[str]]
    ) -> None:
        setup()
        assert "nothing to do" not in setup("--test").stdout
        assert pip_calls()[-1].endswith("-e .[test]")
        assert "nothing to do" in setup("--test").stdout
        assert "nothing to do" in setup().stdout
        (project / "pyproject.toml").write_text("[project]\n# another dependency\n")
        setup()
        assert pip_calls()[-1].endswith("-e .[test]")

    @pytest.mark.parametrize(
        "path",
        ["pyproject.toml", "setup.py", "vddkfs/fuse/session.c", "vddkfs/engines/vddk/reads.c"],
    )
    def test_a_changed_source_is_installed_again(
        self, project: Path, setup: Run, pip_calls: Callable[[], list[str]], path: str
    ) -> None:
        setup()
        (project / path).write_text("# changed\n")
        setup()
        assert len(pip_calls()) == 2

    def test_what_the_build_writes_is_no_change(self, project: Path, setup: Run) -> None:
        setup()
        for name in ("fuse/_session.c", "engines/vddk/_reads.c"):
            (project / "vddkfs" / name).write_text("generated\n")
        assert "nothing to do" in setup().stdout

    @pytest.mark.parametrize("name", ["fuse/_session.so", "engines/vddk/_reads.so"])
    def test_a_lost_c_module_is_built_again(
        self, project: Path, setup: Run, pip_calls: Callable[[], list[str]], name: str
    ) -> None:
        (project / "vddkfs" / name).touch()
        setup()
        (project / "vddkfs" / name).unlink()
        setup()
        assert len(pip_calls()) == 2

    def test_a_moved_venv_is_rebuilt(
        self, project: Path, setup: Run, pip_calls: Callable[[], list[str]], tmp_path: Path
    ) -> None:
        setup()
        moved = project.rename(tmp_path / "moved")
        result = setup(root=moved)
        assert "making it anew" in result.stdout
        assert result.returncode == 0
        assert str(moved) in (moved / ".venv/bin/activate").read_text()
        assert len(pip_calls()) == 2

    def test_a_venv_without_its_interpreter_is_rebuilt(self, project: Path, setup: Run) -> None:
        setup()
        interpreter = project / ".venv/bin/python"
        interpreter.unlink()
        interpreter.symlink_to("/nonexistent/python3")
        result = setup()
        assert "making it anew" in result.stdout
        assert result.returncode == 0

    def test_pip_failure_shows_the_log_and_what_to_do(self, project: Path, setup: Run) -> None:
        result = setup(STUB_PIP_FAILS="yes")
        assert result.returncode == 1
        assert "no compiler in sight" in result.stderr
        assert "setup.log" in result.stderr
        assert "run contrib/setup again" in result.stderr
        assert "nothing to do" not in setup().stdout

    def test_lists_what_is_missing_where_it_may_not_install(
        self, project: Path, setup: Run, tmp_path: Path
    ) -> None:
        executable(tmp_path / "stubs/id", "#!/bin/sh\necho 1000\n")
        result = setup(CC="no-such-compiler", PYTHON="no-such-python")
        assert result.returncode == 1
        assert "apt-get ran" not in result.stdout + result.stderr
        assert "needed: a C compiler" in result.stderr
        assert "needed: Python 3.11 or newer" in result.stderr
        apt, dnf = (
            next(line for line in result.stderr.splitlines() if f"{tool} install" in line)
            for tool in ("apt-get", "dnf")
        )
        assert {"python3-venv", "python3-dev", "gcc"} <= set(apt.split())
        assert {"python3.11", "python3.11-devel", "gcc"} <= set(dnf.split())
        assert not {"fuse3", "libfuse3-dev"} & set(apt.split())
        assert not (project / ".venv").exists()

    def test_as_root_installs_what_is_missing_with_apt(self, setup: Run, tmp_path: Path) -> None:
        stubs, log = tmp_path / "stubs", tmp_path / "apt.log"
        executable(stubs / "id", "#!/bin/sh\necho 0\n")
        executable(
            stubs / "apt-get",
            "#!/bin/sh\n"
            f'echo "$DEBIAN_FRONTEND $*" >>{log}\n'
            f"# the lists are empty until they are fetched\n"
            f'case "$*" in *update) touch {tmp_path}/lists ;; *install*)\n'
            f"    [ -e {tmp_path}/lists ] || exit 100\n"
            f"    cp {stubs}/cc {stubs}/new-cc ;;\n"
            "esac\n",
        )
        result = setup(CC="new-cc")
        assert result.returncode == 0, result.stderr
        calls = log.read_text().splitlines()
        assert [call.split()[0] for call in calls] == ["noninteractive"] * 3
        assert "update" in calls[1]
        assert "gcc" in calls[2].split()
        assert "nothing to do" in setup(CC="new-cc").stdout
        assert log.read_text().splitlines() == calls

    def test_missing_demonstration_tools_do_not_stop_it(self, setup: Run, tmp_path: Path) -> None:
        stubs = tmp_path / "stubs"
        executable(stubs / "id", "#!/bin/sh\necho 1000\n")
        # A PATH of our own, so that the machine's qemu-img is not found.
        tools = ("bash", "cat", "cp", "cut", "dirname", "env", "flock", "grep", "mkdir", "realpath")
        for name in (*tools, "rm", "sed", "sha256sum", "tail", "tr", "xargs", "chmod"):
            (stubs / name).symlink_to(shutil.which(name) or name)
        (stubs / "qemu-img").unlink()
        result = setup(PATH=str(stubs))
        assert "useful: qemu-img" in result.stderr
        assert result.returncode == 0
        tests = setup("--test", PATH=str(stubs))
        assert "needed: qemu-img" in tests.stderr
        assert tests.returncode == 1

    def test_system_installation_and_its_removal(
        self, project: Path, setup: Run, pip_calls: Callable[[], list[str]], tmp_path: Path
    ) -> None:
        result = setup("--system")
        assert result.returncode == 0, result.stderr
        assert "-e" not in pip_calls()[0].split()
        prefix = tmp_path / "opt/vddkfs"
        helper = (prefix / "bin/mount.vddkfs").resolve()
        assert (tmp_path / "bin/vddkfs").resolve() == (prefix / "bin/vddkfs").resolve()
        assert (tmp_path / "sbin/mount.vddkfs").resolve() == helper
        assert (tmp_path / "sbin/mount.fuse.vddkfs").resolve() == helper
        assert "nothing to do" in setup("--system").stdout
        assert len(pip_calls()) == 1
        result = setup("--uninstall-system")
        assert result.returncode == 0, result.stderr
        assert not prefix.exists()
        assert [*(tmp_path / "bin").iterdir(), *(tmp_path / "sbin").iterdir()] == []

    def test_system_leaves_alone_what_is_not_ours(self, setup: Run, tmp_path: Path) -> None:
        theirs = executable(tmp_path / "sbin/mount.vddkfs", "theirs\n")
        result = setup("--system")
        assert result.returncode == 1
        assert f"{theirs} is there and is not ours" in result.stderr
        theirs.unlink()
        theirs = executable(tmp_path / "opt/vddkfs/something", "theirs\n")
        for mode in ("--system", "--uninstall-system"):
            result = setup(mode)
            assert result.returncode == 1
            assert "was not made by contrib/setup" in result.stderr
        assert theirs.read_text() == "theirs\n"

    def test_unknown_argument(self, setup: Run) -> None:
        result = setup("--tset")
        assert result.returncode == 2
        assert "unknown argument --tset" in result.stderr


class TestMountHelper:
    @pytest.fixture
    def helper(self, tmp_path: Path) -> Run:
        """Runs the helper installed beside a vddkfs that prints its arguments, one a line."""
        prefix, links = tmp_path / "opt/bin", tmp_path / "sbin"
        executable(prefix / "vddkfs", '#!/bin/sh\nprintf "<%s>\\n" "$@"\nexit ${STUB_STATUS:-0}\n')
        shutil.copy(ROOT / "contrib/mount.vddkfs", prefix)
        links.mkdir()
        link = links / "mount.fuse.vddkfs"
        link.symlink_to(prefix / "mount.vddkfs")
        # mount(8) may hand on an environment with hardly a PATH.
        return lambda *arguments, **env: run(link, *arguments, env={"PATH": "/usr/bin:/bin"} | env)

    @pytest.mark.parametrize(
        ("arguments", "called"),
        [
            (("/vms/a", "/mnt/a"), ("/vms/a", "/mnt/a")),
            (
                ("/vms/a", "/mnt/a", "-o", "ro,uid=0", "-t", "fuse.vddkfs"),
                ("/vms/a", "/mnt/a", "-o", "ro,uid=0"),
            ),
            (("/vms/a b", "/mnt/ä'$x", "-o", "uid=0"), ("/vms/a b", "/mnt/ä'$x", "-o", "uid=0")),
            # mount(8) says rw by itself.
            (("/vms/a", "/mnt/a", "-o", "rw"), ("/vms/a", "/mnt/a")),
            (("/vms/a", "/mnt/a", "-o", "rw,noexec"), ("/vms/a", "/mnt/a", "-o", "noexec")),
            (
                ("/vms/a", "/mnt/a", "-o", "rw,writable,log=/var/log/rw,uid=0", "-o", "rw"),
                ("/vms/a", "/mnt/a", "-o", "writable,log=/var/log/rw,uid=0"),
            ),
            (("/vms/a", "/mnt/a", "-sn", "-o", "ro"), ("/vms/a", "/mnt/a", "-o", "ro")),
            (
                ("-o", "ro", "/vms/a", "-s", "/mnt/a", "-o", "_netdev,x-y=1"),
                ("/vms/a", "/mnt/a", "-o", "ro,_netdev,x-y=1"),
            ),
            (("vddk://vc/DC/vm/a", "/mnt/a", "-oro"), ("vddk://vc/DC/vm/a", "/mnt/a", "-o", "ro")),
        ],
    )
    def test_translates(
        self, helper: Run, arguments: tuple[str, ...], called: tuple[str, ...]
    ) -> None:
        result = helper(*arguments)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines() == [f"<{word}>" for word in ("mount", *called)]

    def test_fake_does_nothing(self, helper: Run) -> None:
        result = helper("/vms/a", "/mnt/a", "-f", "-v", "-o", "ro")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    def test_verbose_shows_the_command(self, helper: Run) -> None:
        assert (
            "vddkfs mount /vms/a /mnt/a -o ro\n" in helper("/vms/a", "/mnt/a", "-vo", "ro").stdout
        )

    @pytest.mark.parametrize(
        "arguments",
        [(), ("/vms/a",), ("/vms/a", "/mnt/a", "/mnt/b"), ("/a", "/b", "-X"), ("/a", "/b", "-o")],
    )
    def test_refuses(self, helper: Run, arguments: tuple[str, ...]) -> None:
        result = helper(*arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert len(result.stderr.splitlines()) == 1
        assert "mount.vddkfs --help" in result.stderr

    @pytest.mark.parametrize(
        ("status", "reported"), [(0, 0), (1, 4), (2, 1), (10, 32), (21, 32), (127, 2), (130, 8)]
    )
    def test_ends_with_the_codes_of_mount(self, helper: Run, status: int, reported: int) -> None:
        assert helper("/vms/a", "/mnt/a", STUB_STATUS=str(status)).returncode == reported

    def test_enters_the_namespace(self, helper: Run, tmp_path: Path) -> None:
        stubs = tmp_path / "stubs"
        executable(stubs / "nsenter", '#!/bin/sh\necho "nsenter $1"\nshift\nexec "$@"\n')
        path = f"{stubs}:/usr/bin:/bin"
        by_process = helper("/vms/a", "/mnt/a", "-N", "42", PATH=path).stdout.splitlines()
        assert by_process[:2] == ["nsenter --mount=/proc/42/ns/mnt", "<mount>"]
        by_file = helper("/vms/a", "/mnt/a", "-N", "/run/ns", PATH=path).stdout.splitlines()
        assert by_file[:2] == ["nsenter --mount=/run/ns", "<mount>"]

    def test_finds_vddkfs_in_a_checkout(self, tmp_path: Path) -> None:
        executable(tmp_path / ".venv/bin/vddkfs", '#!/bin/sh\necho "from .venv: $*"\n')
        (tmp_path / "contrib").mkdir()
        helper = shutil.copy(ROOT / "contrib/mount.vddkfs", tmp_path / "contrib")
        assert run(helper, "/vms/a", "/mnt/a").stdout == "from .venv: mount /vms/a /mnt/a\n"


class TestQuickstart:
    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        project = tmp_path / "project"
        executable(project / "contrib/setup", "#!/bin/sh\n")
        shutil.copy(ROOT / "contrib/quickstart", project / "contrib")
        (tmp_path / "tmp").mkdir()
        return project

    def needs_tools(self) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        for tool in ("qemu-img", "mkfs.ext4", "debugfs", "sfdisk", "fusermount3"):
            if shutil.which(tool, path=path) is None:
                pytest.skip(f"{tool} is not installed")

    def test_makes_the_vm_and_leaves_nothing_when_the_mount_fails(
        self, project: Path, tmp_path: Path
    ) -> None:
        self.needs_tools()
        kept = tmp_path / "kept"
        executable(project / ".venv/bin/vddkfs", f'#!/bin/sh\ncp -r "$2" {kept}\nexit 21\n')
        result = run(project / "contrib/quickstart", env={"TMPDIR": str(tmp_path / "tmp")})
        assert result.returncode == 21, result.stderr
        assert "$ vddkfs mount vms/web01 mnt/web01\n" in result.stdout
        assert list((tmp_path / "tmp").iterdir()) == []
        # What it made is a chain whose links show the guest's file at three points in time.
        links = {
            "web01.vmdk": "version 1: installed\n",
            "web01-000001.vmdk": "version 2: updated\n",
            "web01-000002.vmdk": "version 3: after the incident\n",
        }
        assert sorted(path.name for path in kept.iterdir()) == sorted(links)
        raw = tmp_path / "disk.raw"
        tools = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        for name, motd in links.items():
            assert run("qemu-img", "convert", "-O", "raw", kept / name, raw).returncode == 0
            shown = run("debugfs", "-R", "cat /etc/motd", f"{raw}?offset=1048576", env=tools)
            assert shown.stdout == motd
            start = run("sfdisk", "-d", raw, env=tools).stdout
            assert "start=        2048" in start
            # A delta holds what changed, not the whole disk.
            assert name == "web01.vmdk" or (kept / name).stat().st_size <= 512 * 1024

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_leaves_nothing_when_it_is_interrupted(
        self, project: Path, tmp_path: Path, number: signal.Signals
    ) -> None:
        self.needs_tools()
        ready = tmp_path / "ready"
        os.mkfifo(ready)
        # A mount that is still on its way, and would be for ever.
        executable(
            project / ".venv/bin/vddkfs",
            f"#!/bin/sh\necho mounting >{ready}\nexec sleep 1000\n",
        )
        process = subprocess.Popen(
            [project / "contrib/quickstart"],
            env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert ready.read_text() == "mounting\n"
        os.killpg(process.pid, number)  # what a terminal does on Ctrl-C
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number, output
        assert "Taking everything down again" in output
        assert list((tmp_path / "tmp").iterdir()) == []

    def test_mounts_the_operators_disk(self, project: Path) -> None:
        executable(project / ".venv/bin/vddkfs", "#!/bin/sh\n")
        result = run(project / "contrib/quickstart", "/vms/my vm", "/mnt", "-o", "ro,uid=0")
        assert result.returncode == 0, result.stderr
        shown = f"$ {project}/.venv/bin/vddkfs mount '/vms/my vm' /mnt -o ro,uid=0\n"
        assert result.stdout == shown  # and no advice: nothing is mounted there

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [(("/vms/a",), "MOUNTPOINT is missing"), (("--puase",), "unknown argument --puase")],
    )
    def test_bad_arguments(self, project: Path, arguments: tuple[str, ...], said: str) -> None:
        result = run(project / "contrib/quickstart", *arguments)
        assert result.returncode != 0
        assert said in result.stderr
