"""What a mount through VDDK refuses: one line, what to do, the exit code, and no secret."""

import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.mounting import Done, mounted, vddkfs
from tests.end_to_end.remote import CHAIN, PASSWORD, PLAIN, Proxy
from vddkfs import errors
from vddkfs.state import state_folder

THUMBPRINT = "AB:" * 19 + "CD"
BOUND = 20.0
"""Seconds in which every refusal is there, also on a machine that is busy."""
LIBRARY = "libvixDiskLib.so.8.0.0"


class Refuse:
    """Tries to mount, and judges the refusal."""

    def __init__(self, proxy: Proxy, place: Path) -> None:
        self.proxy = proxy
        self.place = place
        place.mkdir()

    def __call__(
        self,
        url: str,
        kind: type[errors.VddkfsError],
        *words: str | Path,
        options: list[str] | None = None,
        info: bool = False,
    ) -> str:
        given = self.proxy.options("transports=nbd") if options is None else options
        start = time.monotonic()
        line = judge(vddkfs("mount", url, self.place, "-o", ",".join(given)), kind, *words)
        assert time.monotonic() < start + BOUND
        assert not mounted(self.place)
        if info:
            assert judge(vddkfs("info", url, "-o", ",".join(given)), kind, *words) == line
        return line


def judge(done: Done, kind: type[errors.VddkfsError], *words: str | Path) -> str:
    """Check a refusal: our one line, behind what VDDK itself complained about; return it."""
    assert PASSWORD not in done.stdout + done.stderr
    assert done.returncode == kind.exit_code, done.stderr
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    line = lines[-1]
    assert line.startswith("vddkfs: ")
    assert line.isprintable()
    for word in words:
        assert str(word) in line
    complaints = (
        "vddkfs: VDDK: ",
        "vddkfs: transport ",
        "vddkfs: [ds1] web01/web01.vmdk: transport",
    )
    assert all(other.startswith(complaints) for other in lines[:-1]), done.stderr
    return line


def folders() -> set[Path]:
    """Return the folders of workers that described disks, of processes that are dead."""
    found = (state_folder() / "vddk").glob("describe-*")
    return {p for p in found if not Path(f"/proc/{p.name.rpartition('-')[2]}").exists()}


@pytest.fixture
def refuse(proxy: Proxy, tmp_path: Path) -> Refuse:
    return Refuse(proxy, tmp_path / "place")


# The URL.


URLS = [
    ("vddk://vcenter/?disk=[ds1] web01/web01.vmdk", errors.UsageError, "moref="),
    ("vddk://vcenter/?moref=vm-16", errors.UsageError, "disk="),
    ("vddk://vcenter/?moref=vm-16&disk=ds1/web01/web01.vmdk", errors.UsageError, "datastore"),
    ("vddk://vcenter/?moref=vm-16&disk=[d@s] web01/web01.vmdk", errors.UsageError, "rename"),
    ("vddk://vcenter/?moref=vm-16&disk=[ds1] w.vmdk@a b", errors.UsageError, "snapshot"),
    ("vddk://vcenter/?moref=vm-16&disk=[ds1] w.vmdk&more=1", errors.UsageError, "more="),
    ("vddk://me:S3cr3t-probe@vcenter/?moref=vm-16", errors.UsageError, "credentials="),
    ("vddk://me@vcenter/?moref=vm-16&disk=[ds1] w.vmdk", errors.UsageError, "user name"),
    ("vddk://vcenter/DC0/vm/web01", errors.UnsupportedFormat, "by name"),
    ("vddk://-bad-/?moref=vm-16&disk=[ds1] w.vmdk", errors.UsageError, "not a server"),
    ("vddk://vcenter:99999/?moref=vm-16&disk=[ds1] w.vmdk", errors.UsageError, "server"),
    ("vddk:///etc/passwd", errors.UsageError, "/etc/passwd"),
    ("vddk://", errors.UsageError, "server"),
]
OPTIONS = [
    ("transports=nbd:carrier-pigeon", "nbdssl"),
    ("thumbprint=AB:CD", "thumbprint"),
    ("libdir=relative", "absolute"),
    ("max_sessions=-1", "max_sessions"),
]


def test_url(refuse: Refuse) -> None:
    for url, kind, word in URLS:
        refuse(url, kind, word)
    assert not refuse.proxy.kit.events("login")


def test_option(refuse: Refuse) -> None:
    for option, word in OPTIONS:
        options = refuse.proxy.options(option)
        refuse(refuse.proxy.url(*CHAIN), errors.UsageError, word, options=options)


# The kit.


def kit_with(refuse: Refuse, change: Callable[[Path], None]) -> list[str]:
    """Return the options of a mount whose library is changed."""
    libdir = refuse.proxy.kit.path / "other"
    shutil.copytree(refuse.proxy.kit.build / "lib64", libdir / "lib64", symlinks=True)
    change(libdir / "lib64" / LIBRARY)
    return [f"libdir={libdir}", *refuse.proxy.options("transports=nbd")[1:]]


def test_libdir_without_vddk(refuse: Refuse, tmp_path: Path) -> None:
    url = refuse.proxy.url(*CHAIN)
    for libdir in (tmp_path, tmp_path / "gone"):
        options = [f"libdir={libdir}", *refuse.proxy.options("transports=nbd")[1:]]
        refuse(url, errors.UsageError, libdir, "unpack", options=options)


def test_library_of_another_architecture(refuse: Refuse) -> None:
    def for_arm(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(18)
            file.write(struct.pack("<H", 183))

    options = kit_with(refuse, for_arm)
    line = refuse(refuse.proxy.url(*CHAIN), errors.EngineError, LIBRARY, options=options)
    assert "x86" in line


def test_library_that_is_none(refuse: Refuse) -> None:
    options = kit_with(refuse, lambda path: None)
    for content in (b"", b"not a library at all\n" * 50):
        (refuse.proxy.kit.path / "other" / "lib64" / LIBRARY).write_bytes(content)
        refuse(refuse.proxy.url(*CHAIN), errors.EngineError, LIBRARY, options=options)


def test_library_without_symbols(refuse: Refuse, tmp_path: Path) -> None:
    empty = tmp_path / "empty.c"
    empty.write_text("int VixDiskLib_InitEx(void) { return 0; }\n")

    def replace(path: Path) -> None:
        path.unlink()
        command = ["cc", "-shared", "-fPIC", "-o", str(path), str(empty)]
        subprocess.run(command, check=True, timeout=20)

    options = kit_with(refuse, replace)
    url = refuse.proxy.url(*CHAIN)
    refuse(url, errors.EngineError, LIBRARY, "VixDiskLib_", options=options)


# The credentials.


def test_credentials(refuse: Refuse) -> None:
    url, file = refuse.proxy.url(*CHAIN), refuse.proxy.credentials
    without = [word for word in refuse.proxy.options() if not word.startswith("credentials")]
    refuse(url, errors.UsageError, "credentials=FILE", options=without)
    file.chmod(0o644)
    refuse(url, errors.AccessDenied, file, "chmod 0600")
    file.chmod(0o600)
    for text in (
        "user=operator\n",
        f"operator {PASSWORD}\n",
        f"user=me\npassword\n{PASSWORD}",
    ):
        file.write_text(text)
        refuse(url, errors.UsageError, "password")
    file.write_bytes(b"user=operator\npassword=\xff\xfe" + PASSWORD.encode())
    refuse(url, errors.UsageError, "UTF-8")
    file.unlink()
    refuse(url, errors.UsageError, file, "does not exist")
    os.mkfifo(file, 0o600)
    refuse(url, errors.UsageError, "regular file")


# The server.


def test_unknown_server(refuse: Refuse) -> None:
    url = refuse.proxy.url(*CHAIN, server="gone.example")
    refuse(url, errors.EngineError, "gone.example", "14008", "DNS", info=True)


def test_refused_port(refuse: Refuse) -> None:
    refuse.proxy.host.stop()
    refuse(refuse.proxy.url(*CHAIN), errors.EngineError, "vcenter")


def test_host_that_refuses(refuse: Refuse) -> None:
    refuse.proxy.kit.configure("host.esx1 = down", "host.esx2 = down")
    refuse(refuse.proxy.url(*CHAIN), errors.EngineError, "14009", "902")


def test_wrong_thumbprint(refuse: Refuse) -> None:
    refuse.proxy.kit.configure(f"thumbprint = {THUMBPRINT}")
    wrong = refuse.proxy.options("transports=nbd", f"thumbprint={THUMBPRINT[:-2]}00")
    refuse(refuse.proxy.url(*CHAIN), errors.EngineError, "thumbprint", options=wrong)
    found = refuse.proxy.mount(*CHAIN, options=("transports=nbd", f"thumbprint={THUMBPRINT}"))
    assert found.read("web01/disk.raw", 0, 512)


def test_wrong_password(refuse: Refuse) -> None:
    refuse.proxy.kit.configure("password = another")
    line = refuse(refuse.proxy.url(*CHAIN), errors.EngineError, "vcenter", "35", info=True)
    assert "password" in line


@pytest.mark.parametrize(
    ("disk", "moref", "word"),
    [
        (CHAIN[0], "vm-99", "4000"),
        ("[ds1] web01/web01.vmdk@snapshot-99", "vm-16", "13003"),
        ("[ds1] web01/web01.vmdk@snapshot-2", "vm-16", "web01.vmdk"),
        (PLAIN, "vm-16", "plain.vmdk"),
        ("[ds1] web01/gone.vmdk@snapshot-1", "vm-16", "gone.vmdk"),
        ("[gone] web01/web01.vmdk", "vm-16", "[gone]"),
    ],
    ids=["moref", "snapshot", "does not fit", "of another VM", "path", "datastore"],
)
def test_what_the_server_does_not_have(refuse: Refuse, disk: str, moref: str, word: str) -> None:
    refuse(refuse.proxy.url(disk, moref=moref), errors.EngineError, word)


def test_transport_that_is_not_to_be_had(refuse: Refuse) -> None:
    """Nothing else is taken in its place (K08)."""
    refuse.proxy.kit.configure("hotadd.slots = 0", "hotadd.refusal = fallback")
    options = refuse.proxy.options("transports=hotadd")
    refuse(refuse.proxy.url(*CHAIN), errors.EngineError, "hotadd", options=options)
    if not os.path.isdir("/sys/class/scsi_disk"):
        options = refuse.proxy.options("transports=san")
        refuse(refuse.proxy.url(*CHAIN), errors.EngineError, "scsi_disk", options=options)


@pytest.mark.parametrize("call", ["InitEx", "ConnectEx", "Open", "GetInfo"])
def test_crash_of_the_library(refuse: Refuse, call: str) -> None:
    refuse.proxy.kit.configure(f"fault = {call} segv")
    refuse.proxy.kit.configure_kit(f"fault = {call} segv")
    refuse(refuse.proxy.url(*CHAIN), errors.WorkerFailed, "ended while it opened")


def test_crash_of_the_library_leaves_no_folder(refuse: Refuse) -> None:
    before = folders()
    refuse.proxy.kit.configure("fault = Open segv")
    refuse(refuse.proxy.url(*CHAIN), errors.WorkerFailed)
    assert not folders() - before


def test_one_line_alone(refuse: Refuse) -> None:
    refuse.proxy.kit.configure("password = another")
    words = ("mount", refuse.proxy.url(*CHAIN), refuse.place)
    done = vddkfs(*words, "-o", ",".join(refuse.proxy.options()))
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_local_file_that_is_not_there(refuse: Refuse, tmp_path: Path) -> None:
    options = [f"libdir={refuse.proxy.kit.path}"]
    gone = tmp_path / "gone.vmdk"
    refuse(f"vddk://{gone}", errors.EngineError, gone, options=options)
