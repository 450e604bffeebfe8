"""Where credentials are taken from, and the refusals: one line that says what to do."""

import errno
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vddkfs.credentials import open_credentials
from vddkfs.engines.vddk.secrets import Credentials, read_credentials
from vddkfs.errors import AccessDenied, UsageError, VddkfsError

TEXT = "user=root\npassword=hunter2\n"


def never() -> tuple[str, str]:
    raise AssertionError("nobody is to be asked")


@pytest.fixture(autouse=True)
def _nothing_else(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No credential of systemd, no terminal, and no descriptor that is left open."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr(os, "isatty", lambda fd: False)
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good file."""
    return write(tmp_path / "vc.cred")


def write(path: Path, text: str = TEXT, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def take(fd: int) -> Credentials:
    """Return what is in *fd*, and close it."""
    try:
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        return read_credentials(fd)
    finally:
        os.close(fd)


def refusal(kind: type[VddkfsError], option: str) -> str:
    with pytest.raises(kind) as caught:
        open_credentials(option, never)
    assert "hunter" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_the_file_of_the_option_is_opened(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert take(open_credentials(str(file), never)) == Credentials("root", "hunter2")


def test_a_symbolic_link_to_a_good_file_is_good(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    assert take(open_credentials(str(tmp_path / "link"), never)).user == "root"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o610, 0o666])
def test_a_file_that_is_open_to_others_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert refusal(AccessDenied, str(file)) == (
        f"credentials={file} is open to others (mode {mode:04o}); chmod 0600 {file}"
    )


def test_it_is_the_opened_file_that_is_looked_at(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is another, good file by the time it is checked: the trap of a look at the path."""
    bad = write(tmp_path / "bad", mode=0o644)
    real = os.open

    def opened(*arguments: object, **words: object) -> int:
        fd = real(*arguments, **words)  # type: ignore[arg-type]
        file.rename(bad)
        return fd

    monkeypatch.setattr(os, "open", opened)
    assert "open to others (mode 0644)" in refusal(AccessDenied, str(bad))


@pytest.mark.parametrize(("owner", "me", "good"), [(7, 7, 1), (0, 7, 1), (7, 0, 0), (8, 7, 0)])
def test_the_owner_must_be_the_caller_or_root(
    owner: int, me: int, good: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        found = list(real(fd))
        found[4] = owner
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(os, "geteuid", lambda: me)
    if good:
        os.close(open_credentials(str(file), never))
    else:
        assert refusal(AccessDenied, str(file)) == (
            f"credentials={file} belongs to the user {owner}, who can change it; chown {me} {file}"
        )


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_only_a_regular_file_will_do(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    else:
        path = Path("/dev/null")
    assert f"credentials={path} is not a regular file; " in refusal(UsageError, str(path))


def test_a_file_that_cannot_be_opened_says_why(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"credentials={tmp_path}/no does not exist; give credentials=FILE" in refusal(
        UsageError, f"{tmp_path}/no"
    )
    assert "cannot be opened (embedded null byte)" in refusal(AccessDenied, "a\0b")
    assert "cannot be opened (Not a directory)" in refusal(AccessDenied, f"{file}/x")

    def denied(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        with pytest.raises(AccessDenied) as caught:
            open_credentials(str(file), never)
    assert str(caught.value).startswith(f"credentials={file} cannot be opened (Permission denied)")


def test_the_credential_of_systemd_comes_after_the_option(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert "no credentials were given" in refusal(UsageError, "")
    write(tmp_path / "vddkfs", "cookie=abcdef", 0o400)
    assert take(open_credentials("", never)) == Credentials(cookie="abcdef")
    assert take(open_credentials(str(file), never)).user == "root"
    (tmp_path / "vddkfs").chmod(0o644)
    assert "open to others" in refusal(AccessDenied, "")


@pytest.mark.parametrize(
    ("mode", "group", "good"), [(0o440, 0, True), (0o440, 5, False), (0o460, 0, False)]
)
def test_the_access_control_list_of_systemd_is_no_right_of_others(
    mode: int, group: int, good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "vddkfs", mode=mode)
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        found = list(real(fd))
        found[4], found[5] = 0, group
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    if good:
        os.close(open_credentials("", never))
    else:
        assert "open to others" in refusal(AccessDenied, "")
    assert "open to others" in refusal(AccessDenied, str(path)), "a file of one's own is no such"


def test_without_a_terminal_nobody_is_asked() -> None:
    assert refusal(UsageError, "") == (
        "no credentials were given; give credentials=FILE, a file of mode 0600 with the lines "
        "user=NAME and password=SECRET"
    )


# --- the prompt


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: fd == 0)


@pytest.mark.usefixtures("terminal")
def test_what_is_typed_goes_into_a_sealed_file_in_memory() -> None:
    fd = open_credentials("", lambda: ("röot", ' pass="w ord#'))
    for attempt in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0)):
        with pytest.raises(PermissionError):
            attempt()
    assert os.fstat(fd).st_mode & 0o077 == 0
    assert take(fd) == Credentials("röot", ' pass="w ord#')


@pytest.mark.usefixtures("terminal")
def test_what_is_typed_never_is_in_this_process() -> None:
    asked = []

    def prompt() -> tuple[str, str]:
        asked.append(1)
        return "root", "hunter2"

    os.close(open_credentials("", prompt))
    assert asked == [], "it ran in a child"


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    "answer", [("", "hunter2"), ("root", ""), ("root", "hunter\n2"), ("ro\0ot", "hunter2")]
)
def test_an_answer_that_is_none_is_refused(answer: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="no user name and password were given"):
        open_credentials("", lambda: answer)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (EOFError("hunter2"), "\n"),
        (KeyboardInterrupt("hunter2"), "\n"),
        (RuntimeError("hunter2"), "vddkfs: the prompt failed: RuntimeError\n"),
        (UsageError("no", advice="do"), "vddkfs: no; do\n"),
    ],
)
def test_a_prompt_that_fails_ends_in_one_error_and_shows_nothing(
    error: BaseException, shown: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def prompt() -> tuple[str, str]:
        raise error

    with pytest.raises(UsageError, match="no user name and password were given"):
        open_credentials("", prompt)
    assert capfd.readouterr().err == shown


CHILD = """
import os, sys
from vddkfs.credentials import ask, open_credentials
from vddkfs.engines.vddk.secrets import read_credentials
from vddkfs.errors import UsageError
try:
    fd = open_credentials("", lambda: ask("vc.example.com"))
except UsageError as error:
    print("refused:", error)
else:
    found = read_credentials(fd)
    print("taken:", (found.user, len(found.password)))
"""


class Person:
    """Sits at the terminal of a child process."""

    def __init__(self) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            environment = {k: v for k, v in os.environ.items() if k != "CREDENTIALS_DIRECTORY"}
            os.execve(sys.executable, [sys.executable, "-I", "-c", CHILD], environment)
        self.seen = ""

    def wait(self, words: str) -> None:
        """Wait until the terminal shows *words*."""
        while words not in self.seen:
            ready, _, _ = select.select([self.terminal], [], [], 20)
            assert ready, self.seen
            self.seen += os.read(self.terminal, 4096).decode()

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def leave(self) -> str:
        """Wait for the end; return all that the terminal showed."""
        try:
            while piece := os.read(self.terminal, 4096):
                self.seen += piece.decode()
        except OSError as error:
            if error.errno != errno.EIO:  # the end of a terminal
                raise
        os.close(self.terminal)
        os.waitpid(self.pid, 0)
        return self.seen


@pytest.mark.timeout(60)
def test_a_person_at_a_terminal_is_asked_and_the_password_is_not_shown() -> None:
    person = Person()
    person.wait("User name for vc.example.com: ")
    person.type("Administrator@x\n")
    person.wait("Password for vc.example.com: ")
    person.type("hunter2=#' x\n")
    seen = person.leave()
    assert "taken: ('Administrator@x', 12)" in seen
    assert "hunter2" not in seen


@pytest.mark.timeout(60)
@pytest.mark.parametrize("key", ["\x03", "\x04", "\n"])
def test_a_person_who_gives_up_is_told_the_other_way(key: str) -> None:
    person = Person()
    person.wait("User name for vc.example.com: ")
    person.type(key)
    if key == "\n":
        person.wait("Password for vc.example.com: ")
        person.type("\n")
    seen = person.leave()
    if key == "\x03":
        # The terminal interrupts the caller too, which ends as any command does.
        assert re.search("KeyboardInterrupt|refused: ", seen)
    else:
        assert "refused: no user name and password were given; give credentials=FILE" in seen


def test_reading_this_module_needs_no_library() -> None:
    """The command imports it: it must not load the engine."""
    code = "import sys, vddkfs.credentials; print([m for m in sys.modules if 'engines' in m])"
    found = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"
