"""What VDDK is known to say, and what may be read of it: the trap first, then the guard.

Rows K07, K10 and K15.
"""

import base64
import logging
import re
from urllib.parse import quote

import pytest

from tests.engines.vddk.workers import PASSWORD, PLAIN, USER, Worker, Workers, configured
from tests.simulator.kit import Kit
from vddkfs.errors import EngineError

NO_REDACTION = """
from vddkfs.observe.redact import Redactor
Redactor.redact = lambda self, text: text
"""
NO_CALLBACKS = """
from vddkfs.engines.vddk.native import Native
def init(self, major, minor, libdir, configuration):
    return self.call("InitEx", major, minor, None, None, None, libdir, configuration)
Native.init = init
"""
NOTHING_TAKEN = """
import os
from vddkfs.engines import output
def take(self, fd, name):
    reading = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)[0]
    return output._Stream(reading, lambda text: None, lambda: self.redactor)
output.WorkerOutput._take = take
"""
OUT, ERR = "chatter.stdout = yes", "chatter.stderr = yes"


def disguises(password: str) -> dict[str, str]:
    """Return what the simulator makes of a password."""
    packed = base64.b64encode(password.encode()).decode()
    pair = base64.b64encode(f"{USER}:{password}".encode()).decode()
    return {
        "clear": password,
        "URL": "".join(f"%{byte:02X}" for byte in password.encode()),
        "base64": packed,
        "Basic": pair,
    }


def live(worker: Worker, kit: Kit) -> None:
    """Have it do a bit of everything."""
    worker.open(configured(kit, PLAIN, debug=True))
    for sector in range(10):
        worker.read(sector, 1)
        worker.revalidate()
    worker.map(8192)
    assert worker.stop() == 0


# K07: no secret reaches a log.


def test_k07_no_disguise_of_the_password_gets_through(kit: Kit, workers: Workers) -> None:
    kit.configure("chatter.secrets = yes", "chatter.log = yes", OUT, ERR)
    trap, worker = workers(NO_REDACTION), workers()
    live(trap, kit)
    found = {name: trap.text.count(form) for name, form in disguises(PASSWORD).items()}
    assert min(found.values()) >= 10, found
    for channel in ("stdout: ", "stderr: ", "VDDK: "):
        assert trap.says(channel, PASSWORD)

    live(worker, kit)
    found = {name: worker.text.count(form) for name, form in disguises(PASSWORD).items()}
    assert not any(found.values()), found
    assert quote(PASSWORD) not in worker.text
    for words in (
        ("stdout: ", f"user {USER} password xxx"),
        ("stderr: ", f"user {USER} password xxx"),
        ("VDDK: ", f"user name {USER}, password xxx"),
        ("VDDK: ", "@vc/sdk, again"),
        ("VDDK: ", "<password>xxx</password> encoded xxx"),
        ("VDDK: ", "Authorization: Basic xxx"),
    ):
        assert worker.says(*words), words
    assert len(worker.said) == len(trap.said), "nothing else is missing"


def test_k07_a_session_cookie_is_a_secret_too(kit: Kit, workers: Workers) -> None:
    cookie = "52e1-c00kie/+9f"
    kit.configure("chatter.secrets = yes", OUT, ERR)
    for patch in (NO_REDACTION, ""):
        worker = workers(patch, f"user={USER}\ncookie={cookie}\n")
        live(worker, kit)
        shown = [name for name, form in disguises(cookie).items() if form in worker.text]
        assert shown == (["clear", "URL", "base64", "Basic"] if patch else [])


@pytest.mark.parametrize("level", range(4))
def test_k07_whatever_the_librarys_own_level_is(level: int, kit: Kit, workers: Workers) -> None:
    kit.configure("chatter.secrets = yes")
    own = kit.path / "own.conf"
    own.write_text(f"vixDiskLib.transport.LogLevel={level * 2}\n")
    for patch in (NO_REDACTION, ""):
        worker = workers(patch)
        worker.open(configured(kit, PLAIN, vddk_config=str(own)))
        worker.stop()
        told = any(form in worker.text for form in disguises(PASSWORD).values())
        assert told is bool(patch and level), "at level 0 it says nothing at all"


IN_PIECES = "from vddkfs.engines import output; output._READ = 8\n"
NOT_COLLECTED = IN_PIECES + "output._Stream._feed = lambda self, text: self._emit(text)"


def test_k07_a_secret_that_comes_in_several_writes(kit: Kit, workers: Workers) -> None:
    kit.configure("chatter.secrets = yes", "chatter.split = yes", OUT, ERR)

    def printed(patch: str) -> tuple[str, Worker]:
        worker = workers(patch)
        worker.open(configured(kit, PLAIN))
        worker.stop()
        texts = [text for _, text in worker.said if text.startswith("stdout: ")]
        return "".join(text.removeprefix("stdout: ") for text in texts), worker

    # The ends of pieces lose their blanks.
    whole, _ = printed(NOT_COLLECTED)
    assert PASSWORD.replace(" ", "") in whole.replace(" ", "")
    whole, worker = printed(IN_PIECES)
    assert PASSWORD.replace(" ", "") not in whole.replace(" ", "")
    assert worker.says(f"stdout: VixDiskLib: user {USER} password xxx")
    assert worker.says(f"stderr: VixDiskLib: user {USER} password xxx")


TELLS = f"""
from vddkfs.engines.vddk.native import Native
Native.error_text = lambda self, code: "no login with {USER}:{PASSWORD} here"
"""
NOT_CLEANED = """
from vddkfs.engines.vddk.library import Library
Library.error_text = lambda self, code: self.native.error_text(code)
"""


@pytest.mark.parametrize("call", ["open", "describe"])
def test_k07_an_error_that_quotes_the_library(call: str, kit: Kit, workers: Workers) -> None:
    kit.configure(f'user = "{USER}"', 'password = "another"')
    for patch, shown in ((TELLS + NOT_CLEANED, True), (TELLS, False)):
        worker = workers(patch)
        with pytest.raises(EngineError) as caught:
            getattr(worker, call)(configured(kit, PLAIN))
        assert "the server refused the login" in caught.value.message
        for text in (str(caught.value), caught.value.cause, repr(vars(caught.value))):
            assert (PASSWORD in text) is shown
        if not shown:
            assert f"no login with {USER}:xxx here" in caught.value.cause
        worker.stop()
        assert shown or PASSWORD not in worker.text


def test_k07_an_error_of_a_read_that_quotes_the_library(kit: Kit, workers: Workers) -> None:
    kit.configure("fault = ReadAsync error=16002", "fault = ReadAsync callback_error=16002")
    for patch, shown in ((TELLS + NOT_CLEANED, True), (TELLS, False)):
        worker = workers(patch)
        worker.open(configured(kit, PLAIN))
        with pytest.raises(EngineError) as caught:
            worker.read(0, 1)
        assert (PASSWORD in str(caught.value)) is shown
        assert shown or PASSWORD not in worker.text


def test_k07_no_process_shows_the_password_to_others(kit: Kit, workers: Workers) -> None:
    worker = workers()
    worker.open(configured(kit, PLAIN))
    proc = f"/proc/{worker.process.pid}"
    for name in ("cmdline", "environ"):
        with open(f"{proc}/{name}", "rb") as file:
            content = file.read()
        assert content
        assert PASSWORD.encode() not in content
    for path in (kit.path / "worker").rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes()


# K10: everything ends in our log, each line with its level.


def levels(worker: Worker, words: str) -> set[int]:
    """Return the levels of the lines that hold *words*."""
    return {level for level, text in worker.said if words in text}


def test_k10_what_is_printed_ends_in_the_log(kit: Kit, workers: Workers) -> None:
    kit.configure(OUT, ERR)
    raw = re.compile(r"^VixDiskLib: ", re.MULTILINE)
    trap = workers(NOTHING_TAKEN)
    live(trap, kit)
    assert raw.search(trap.text), "it went past us"
    assert not trap.says("stdout: ")

    worker = workers()
    live(worker, kit)
    assert not raw.search(worker.text)
    assert re.fullmatch(r"(<[0-7]>.*\n)*", worker.text), "every line has a level"
    assert levels(worker, "stdout: VixDiskLib: Open is call") == {logging.INFO}
    assert levels(worker, "stderr: VixDiskLib: Open is call") == {logging.INFO}


def test_k10_what_is_logged_ends_in_the_log_at_its_level(kit: Kit, workers: Workers) -> None:
    elsewhere = kit.path / "logs"
    kit.configure("chatter.log = yes")
    kit.configure_kit(f'log_directory = "{elsewhere}"')
    trap = workers(NO_CALLBACKS)
    live(trap, kit)
    assert not trap.says("level 0")
    assert "level 0" in next(elsewhere.iterdir()).read_text(), "the library writes its own"

    worker = workers()
    live(worker, kit)
    found = {number: levels(worker, f"level {number},") for number in range(6)}
    assert found == {
        0: {logging.ERROR},
        1: {logging.WARNING},
        2: {logging.WARNING},
        3: {logging.INFO},
        4: {logging.INFO},
        5: {logging.INFO},
    }
    assert worker.says("Open: call", "100.0% done"), "formats of several kinds"
    assert len(list(elsewhere.iterdir())) == 1


def test_k10_a_harmless_complaint_is_no_warning(kit: Kit, workers: Workers) -> None:
    kit.configure("chatter.phone_home = yes")
    trap = workers("from vddkfs.engines.vddk import messages; messages._PHONE_HOME = ()")
    live(trap, kit)
    assert levels(trap, "Get CEIP status failed") == {logging.WARNING}
    worker = workers()
    live(worker, kit)
    assert levels(worker, "Get CEIP status failed") == {logging.DEBUG}


# K15: which release it is.


def test_k15_release_and_build_are_told(kit: Kit, workers: Workers) -> None:
    trap = workers("import re\nfrom vddkfs.engines.vddk import messages\n"
                   "messages._BUILD = re.compile('(never)x')")  # fmt: skip
    found = trap.describe(configured(kit, PLAIN)).facts
    assert found.build == ""
    assert trap.says("build unknown")

    worker = workers()
    found = worker.describe(configured(kit, PLAIN)).facts
    assert (found.version, found.build) == ("8.0.0", "20000080")
    assert found.library == str(kit.path / "lib64" / "libvixDiskLib.so.8.0.0")
    assert worker.says("VDDK 8.0.0 build 20000080", level=logging.INFO)
