"""The library as a whole, with the stub: InitEx, logging, connections, cleaning up."""

import subprocess
import sys
import threading

import pytest

from tests.engines.vddk.conftest import Bench, MakeKit
from vddkfs.engines.vddk.codes import RetryClass, VixFailure
from vddkfs.engines.vddk.library import Library
from vddkfs.engines.vddk.messages import Messages
from vddkfs.engines.vddk.params import ConnectSpec, SessionCookie, UserPassword
from vddkfs.errors import EngineError

REMOTE = ConnectSpec(
    server="vc.example.com",
    vmx_spec="moref=vm-16",
    thumbprint="AA:BB",
    credentials=UserPassword("admin", "S3cr3t-probe"),
    snapshot="snapshot-12",
    transports=("nbdssl", "nbd"),
)


def test_init_tries_versions_downwards(make_kit: MakeKit) -> None:
    bench = Bench(make_kit("8.0.2"))
    bench.library.init("/etc/some.conf")
    assert bench.library.version == (7, 0)
    assert [line.split()[1] for line in bench.said("init ")] == ["8.0", "7.0"]
    assert f"libdir={bench.library.kit.libdir} file=/etc/some.conf" in bench.said("init ")[0]
    with pytest.raises(RuntimeError, match="once"):
        bench.library.init()
    bench.library.exit()
    assert bench.said("exit")


def test_init_that_no_version_helps(make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(make_kit("9.1.0.0"))
    monkeypatch.setattr("vddkfs.engines.vddk.library._VERSIONS", ((8, 0),))
    with pytest.raises(VixFailure, match=r"tried 9\.1 gave 3, 8\.0 gave 3") as caught:
        bench.library.init()
    assert "the stub's words for 3" in caught.value.cause


def test_log_lines_levels_and_build(bench: Bench) -> None:
    assert bench.library.build == "21562716"
    assert ("info", "from a thread of mine: 42 words 2.50") in bench.lines
    assert ("debug", "VDDK_PhoneHome: sending failed") in bench.lines
    assert ("warning", "a warning without arguments, 100% sure") in bench.lines
    assert ("critical", "panic 1") in bench.lines
    assert ("info", "x" * 10000) in bench.lines


def test_a_failing_listener_harms_nobody(make_kit: MakeKit) -> None:
    def fail(level: str, text: str) -> None:
        raise OSError("the log is full")

    library = Library(make_kit(), log=fail)
    library.init()
    assert library.messages.lost > 3
    assert library.build == "21562716"
    library.exit()


def test_a_refusal_is_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("vddkfs.engines.vddk.messages.time.monotonic", lambda: now[0])
    messages = Messages()
    assert not messages.refused_lately
    messages.hear("warning", "Failed to allocate the requested 24 bytes")
    assert messages.refused_lately
    now[0] += 6
    assert not messages.refused_lately


def test_transports(bench: Bench) -> None:
    assert bench.library.transports() == ("file", "san", "hotadd", "nbdssl", "nbd")


def test_session_calls_belong_to_one_thread(bench: Bench) -> None:
    caught: list[Exception] = []

    def connect() -> None:
        try:
            bench.connect()
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    thread.join()
    assert "belongs to the thread" in str(caught[0])
    assert not bench.said("connect")


@pytest.mark.parametrize("release", ["6.5.2", "6.7.0", "7.0.3"])
def test_connect_passes_everything(make_kit: MakeKit, release: str) -> None:
    bench = Bench(make_kit(release)).start()
    with bench.connect(REMOTE) as connection:
        assert connection.spec is REMOTE
    expected = "connect vmx=moref=vm-16 server=vc.example.com thumb=AA:BB cred=1 port=443 nfc=902"
    assert bench.said("connect") == [expected]
    assert bench.said("uid") == ["uid admin S3cr3t-probe"]
    assert bench.said("with") == [
        "with ro=1 snapshot=snapshot-12 modes=nbdssl:nbd state=(nil) spec=0"
    ]
    assert bench.said("disconnect") == ["disconnect vc.example.com"]
    # Only what the library allocated is given back to it, and without our strings.
    has_allocator = release != "6.5.2"
    assert len(bench.said("allocate")) == has_allocator
    assert bench.said("free params") == ["free params server=(null) password=(null)"] * (
        has_allocator
    )
    bench.library.exit()


def test_a_session_cookie(bench: Bench) -> None:
    spec = ConnectSpec(server="vc", credentials=SessionCookie("c00kie", "admin", "word"), port=8443)
    bench.connect(spec).disconnect()
    assert bench.said("session") == ["session c00kie admin word"]
    assert "port=8443" in bench.said("connect")[0]


def test_local_files_have_no_server(bench: Bench) -> None:
    bench.connect().disconnect()
    assert bench.said("connect") == [
        "connect vmx=(null) server=(null) thumb=(null) cred=0 port=0 nfc=0"
    ]
    assert "snapshot=(null) modes=(null)" in bench.said("with")[0]


def test_a_refused_login(bench: Bench) -> None:
    with pytest.raises(VixFailure, match="refused the login") as caught:
        bench.connect(ConnectSpec(server="wrong", credentials=UserPassword("u", "S3cr3t-probe")))
    assert caught.value.code == 35
    assert caught.value.retry_class is RetryClass.NEVER
    assert "the stub's words for 35" in caught.value.cause
    assert "S3cr3t" not in str(caught.value) + repr(caught.value)
    assert len(bench.said("free params")) == 1


def test_a_nul_character_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="NUL"):
        bench.connect(ConnectSpec(server="vc\0.example.com"))
    with pytest.raises(ValueError, match="NUL"):
        bench.open("a\0b")


def test_secrets_do_not_show_in_representations() -> None:
    fields = REMOTE.fields()
    for thing in (REMOTE, REMOTE.credentials, fields, SessionCookie("S3cr3t", "u", "S3cr3t")):
        assert "S3cr3t" not in repr(thing)


def test_strings_live_as_long_as_the_connection(bench: Bench) -> None:
    connection = bench.connect(ConnectSpec(server="a-server-of-our-own"))
    connection.open_raw("thread", flags=4)  # type: ignore[arg-type]
    assert bench.said("open") == ["open thread flags=4 server=a-server-of-our-own"]


def test_cleanup_names_no_vm(bench: Bench) -> None:
    assert bench.library.cleanup(REMOTE) == (2, 1)
    assert bench.said("cleanup") == ["cleanup vmx=(null) server=vc.example.com"]


def test_prepare_for_access(bench: Bench) -> None:
    bench.library.prepare_access(REMOTE, "vddkfs-1")
    assert bench.said("prepare") == ["prepare moref=vm-16 vddkfs-1"]
    with pytest.raises(ValueError, match="50"):
        bench.library.prepare_access(REMOTE, "x" * 51)
    with pytest.raises(EngineError, match="no VixDiskLib_EndAccess"):
        bench.library.end_access(REMOTE, "vddkfs-1")


def test_a_missing_required_function_is_named(make_kit: MakeKit) -> None:
    kit = make_kit("8.0.2", "-DNO_OPEN")
    with pytest.raises(EngineError, match="VixDiskLib_Open") as caught:
        Library(kit)
    assert str(kit.library) in str(caught.value)


def test_calls_are_traced_and_counted(bench: Bench) -> None:
    bench.connect().disconnect()
    figures = bench.library.statistics()
    assert figures["VixDiskLib_ConnectEx"].count == 1
    assert figures["VixDiskLib_InitEx"].failures == 0
    assert ("VixDiskLib_Disconnect", 0, 0) in bench.traced


def test_the_package_imports_nothing_of_the_daemon() -> None:
    code = (
        "import sys, vddkfs.engines.vddk.handle, vddkfs.engines.vddk.configuration\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('trio', 'pyfuse3')"
        " or m.startswith(('vddkfs.disks', 'vddkfs.cache', 'vddkfs.fuse'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, text=True)
    assert done.stdout == "[]\n", done.stderr
