"""What VDDK is known to do to its process and its machine: the trap first, then the guard.

Rows K05, K16, K19 and K22.
"""

import logging
import signal
import subprocess
from pathlib import Path

import pytest

from tests.engines.vddk.workers import (
    BASE,
    LEAF,
    MIDDLE,
    PLAIN,
    SCSI,
    Died,
    Worker,
    Workers,
    configured,
    entries,
)
from tests.simulator.kit import Kit, until
from vddkfs.engines.config import VddkConfig, VddkImage
from vddkfs.engines.vddk.kit import find_kit, missing_dependencies
from vddkfs.errors import EngineError

# K05: temporary files are left behind.


def shared_folder(folder: Path) -> str:
    """Return a patch that has all workers use one folder, as without our configuration."""
    return f"""
from vddkfs.engines.vddk import configuration
ours = configuration.generate
configuration.generate = lambda folder, *rest, **more: ours({str(folder)!r}, *rest, **more)
"""


def test_k05_nothing_is_left_when_a_worker_ends(kit: Kit, workers: Workers) -> None:
    shared, own = kit.path / "shared tmp", kit.path / "worker"
    trap = workers(shared_folder(shared))
    trap.open(configured(kit, PLAIN))
    assert trap.stop() == 0
    assert any(name.startswith("vixsim-") for name in entries(shared))

    worker = workers()
    worker.open(configured(kit, PLAIN))
    assert any(name.startswith("vixsim-") for name in entries(own))
    assert own.stat().st_mode & 0o777 == 0o700
    assert worker.stop() == 0
    assert not own.exists()
    worker = workers()
    worker.describe(configured(kit, PLAIN))
    assert not own.exists()


@pytest.mark.parametrize(
    "more",
    [
        {"server": "nowhere"},
        {"vddk_config": "/nowhere"},
        {"libdir": "/nowhere"},
        {"transports": ("sna",)},
    ],
)
def test_k05_nothing_is_left_of_one_that_could_not_begin(
    more: dict[str, str], kit: Kit, workers: Workers
) -> None:
    worker = workers()
    with pytest.raises(Exception):  # noqa: B017, PT011 - which one is told elsewhere
        worker.open(configured(kit, PLAIN, **more))
    assert worker.stop() == 0
    assert not entries(kit.path / "worker")


NEVER_EMPTIED = """
import shutil
shutil.rmtree = lambda *rest, **more: None
"""


def test_k05_what_a_killed_one_left_goes_with_the_next(kit: Kit, workers: Workers) -> None:
    own = kit.path / "worker"

    def killed() -> set[str]:
        first = workers()
        first.open(configured(kit, PLAIN))
        first.kill()
        left = {name for name in entries(own) if name.startswith("vixsim-")}
        assert left
        return left

    left = killed()
    trap = workers(NEVER_EMPTIED)
    trap.open(configured(kit, PLAIN))
    trap.stop()
    assert left < entries(own)

    left |= killed()
    worker = workers()
    worker.open(configured(kit, PLAIN))
    assert not left & entries(own)
    assert worker.stop() == 0
    assert not own.exists()


# K16: IPv6.

NO_WARNING = """
from vddkfs.engines.vddk.runtime import Runtime
Runtime._warn_of_ipv6 = lambda self: None
"""
RESOLVES = """
import socket
def resolve(name, *rest, **more):
    addresses = {"six": ["::1"], "both": ["::1", "127.0.0.1"], "four": ["127.0.0.1"]}[name]
    return [(socket.AF_INET6 if ":" in one else socket.AF_INET, 1, 6, "", (one, 0))
            for one in addresses]
socket.getaddrinfo = resolve
"""


@pytest.mark.parametrize("server", ["::1", "six"])
def test_k16_a_server_with_ipv6_only_is_warned_of(server: str, kit: Kit, workers: Workers) -> None:
    trap = workers(RESOLVES + NO_WARNING)
    config = configured(kit, PLAIN, server=server)
    with pytest.raises(EngineError, match="does not resolve") as caught:
        trap.open(config)
    assert "IPv6" not in str(caught.value), "nobody knows why"
    assert not trap.says("which VDDK 8.0.0")

    worker = workers(RESOLVES)
    with pytest.raises(EngineError, match="does not resolve"):
        worker.open(config)
    worker.stop()
    words = f"{server} has IPv6 addresses only, which VDDK 8.0.0 may not be able to use"
    texts = [text for _, text in worker.said]
    assert worker.says(words, level=logging.WARNING)
    [tried] = [number for number, text in enumerate(texts) if "VixDiskLib_ConnectEx" in text]
    assert texts.index(words) < tried


def test_k16_the_warning_comes_before_a_cleanup_too(kit: Kit, workers: Workers) -> None:
    (kit.path / "worker").mkdir(mode=0o700)
    (kit.path / "worker" / "left").touch()
    worker = workers()
    with pytest.raises(EngineError):
        worker.open(configured(kit, PLAIN, server="::1", transports=("hotadd",)))
    order = [
        word
        for _, text in worker.said
        for word in ("IPv6 addresses only", "could not be cleaned up")
        if word in text
    ]
    assert order[:2] == ["IPv6 addresses only", "could not be cleaned up"]


@pytest.mark.parametrize("server", ["four", "both"])
def test_k16_others_are_not(server: str, kit: Kit, workers: Workers) -> None:
    (kit.path / "sites" / server).symlink_to("vcenter")
    worker = workers(RESOLVES)
    worker.open(configured(kit, PLAIN, server=server))
    assert not worker.says("IPv6")


# K19: libraries that the transports need.


def lacking(kit: Kit, name: str) -> None:
    """Make the library *name* of the kit one that needs a libexpat that is not there."""
    folder = kit.path / "lib64"
    expat = kit.path / "libexpat.so.0"
    source = kit.path / "empty.c"
    source.write_text("int vixsim_empty;\n")
    shared = ["cc", "-shared", "-fPIC", str(source)]
    needing = ["-Wl,--no-as-needed", str(expat)]
    (folder / name).unlink()
    for target, more in ((expat, []), (folder / name, needing)):
        words = [*shared, "-o", str(target), f"-Wl,-soname,{target.name}", *more]
        subprocess.run(words, check=True, timeout=50)
    expat.unlink()


NO_PACKAGE = "from vddkfs.engines.vddk import loader; loader._explain = lambda words: words\n"
PACKAGE = "install libexpat1 (apt-get) or expat (dnf)"


def test_k19_what_the_library_needs_is_named_with_its_package(kit: Kit, workers: Workers) -> None:
    lacking(kit, "libvixDiskLib.so.8.0.0")
    with pytest.raises(EngineError) as caught:
        workers(NO_PACKAGE).open(configured(kit, PLAIN))
    assert "libexpat.so.0: cannot open shared object file" in str(caught.value)
    assert "install" not in str(caught.value)
    with pytest.raises(EngineError) as caught:
        workers().open(configured(kit, PLAIN))
    assert "libexpat.so.0" in caught.value.cause
    assert PACKAGE in caught.value.cause

    [missing] = missing_dependencies(find_kit(str(kit.path)))
    assert (missing.name, missing.remedy) == ("libexpat.so.0", PACKAGE)
    assert missing.wanted_by == ("libvixDiskLib.so.8.0.0",)


NOT_TOLD = """
from vddkfs.engines.vddk.loader import Loaded
Loaded.reasons = lambda self: ""
"""


def test_k19_what_the_transports_need_is_named_with_its_package(kit: Kit, workers: Workers) -> None:
    kit.configure("san.device = file")
    lacking(kit, "libdiskLibPlugin.so")
    config = configured(kit, PLAIN, transports=("san",))
    with pytest.raises(EngineError) as caught:
        workers(SCSI + "\n" + NOT_TOLD).open(config)
    assert "VDDK offers only file, nbdssl, nbd" in str(caught.value)
    assert "expat" not in str(caught.value)

    worker = workers(SCSI)
    with pytest.raises(EngineError) as caught:
        worker.open(config)
    assert "libdiskLibPlugin.so: libexpat.so.0" in str(caught.value)
    assert PACKAGE in str(caught.value)
    assert worker.says("libdiskLibPlugin.so", PACKAGE, level=logging.WARNING)
    [missing] = missing_dependencies(find_kit(str(kit.path)))
    assert missing.wanted_by == ("libdiskLibPlugin.so",)

    other = workers()
    other.open(configured(kit, PLAIN))
    assert other.says("open over nbdssl"), "the network does not need it"


def test_k19_a_part_that_is_opened_by_name_only(kit: Kit, workers: Workers) -> None:
    lacking(kit, "libgvmomi.so")
    trap = workers(NOT_TOLD)
    with pytest.raises(EngineError, match="a part of the library won't start"):
        trap.open(configured(kit, PLAIN))
    assert not trap.says("install")

    worker = workers()
    with pytest.raises(EngineError):
        worker.open(configured(kit, PLAIN))
    assert worker.says("libgvmomi.so: libexpat.so.0", PACKAGE, level=logging.WARNING)


# K22: one thread makes all session calls.

ELSEWHERE = """
import threading
from vddkfs.engines.vddk.reader import ImageReader
revalidate = ImageReader.revalidate
def elsewhere(self):
    found = []
    def run():
        try:
            found.append(revalidate(self))
        except Exception as error:
            found.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]
ImageReader.revalidate = elsewhere
"""
UNCHECKED = """
from vddkfs.engines.vddk.library import Library
Library.session_thread = lambda self: None
"""


def test_k22_another_thread_is_stopped_before_the_library_sees_it(
    kit: Kit, workers: Workers
) -> None:
    trap = workers(UNCHECKED + ELSEWHERE)
    trap.open(configured(kit, PLAIN))
    with pytest.raises(Died) as died:
        trap.revalidate()
    assert died.value.code == -signal.SIGABRT

    worker = workers(ELSEWHERE)
    worker.open(configured(kit, PLAIN))
    with pytest.raises(Died) as died:
        worker.revalidate()
    assert died.value.code == 70, "a bug of ours, not the library's"


def life(kit: Kit, worker: Worker, config: VddkConfig) -> None:
    """Have it do all that a worker does."""
    worker.open(config)
    images = range(len(config.images))
    for _ in range(2):
        for image in images:
            for sector in range(0, 4096, 1024):
                worker.read(sector, 1024, image)
            worker.map(4096, image)
        worker.revalidate()
        worker.renew()
    opened = len(kit.events("client-open"))
    until(lambda: worker.says("closed, nobody reads it"), what="the idle disk to be closed")
    until(lambda: len(kit.events("client-close")) == len(kit.events("client-open")))
    for image in images:
        worker.read(0, 8, image)
    assert len(kit.events("client-open")) == opened + len(images)
    worker.revalidate()
    assert worker.stop() == 0


@pytest.mark.parametrize(
    ("transport", "images"),
    [("nbdssl", (PLAIN,)), ("san", (PLAIN,)), ("hotadd", (BASE, MIDDLE, LEAF))],
)
def test_k22_a_whole_life_on_one_thread(
    transport: str, images: tuple[VddkImage, ...], kit: Kit, workers: Workers
) -> None:
    kit.configure("san.device = file")
    config = configured(kit, *images, transports=(transport,), idle_close=0.5, debug=True)
    worker = workers(SCSI)
    life(kit, worker, config)
    assert {event.fields["transport"] for event in kit.events("client-open")} == {transport}
    assert len(kit.events("client-open")) == len(kit.events("client-close"))
    assert len(kit.events("attach")) == len(kit.events("detach"))
