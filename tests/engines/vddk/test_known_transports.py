"""What VDDK is known to do with transports and paths: the trap without our guard, then the guard.

Rows K02, K03, K08, K21, K25, K26 and K27.
"""

import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.engines.vddk.workers import (
    BASE,
    LEAF,
    LOCAL,
    MIDDLE,
    PLAIN,
    SCSI,
    Died,
    Workers,
    configured,
)
from tests.simulator.disks import SECTORS, noise, write_behind
from tests.simulator.host_site import can_make_loops
from tests.simulator.kit import REGISTRY, Kit
from vddkfs.engines.config import VddkImage
from vddkfs.errors import EngineError, UsageError
from vddkfs.options import MountOptions
from vddkfs.remote import open_remote

FILES = "san.device = file"
"""Neither san nor hotadd needs loop devices then."""

NO_READ_BACK = """
from vddkfs.engines.vddk.handle import Handle
Handle.transport_mode = lambda self: ASKED
"""
NO_ELSEWHERE = """
from vddkfs.engines.vddk import codes, session
del codes.CODES[16064]
session._may_differ = lambda *rest: False
"""


def transports(kit: Kit) -> list[str]:
    """Return what the library really opened disks over, in order."""
    return [event.fields["transport"] for event in kit.events("client-open")]


# K02: advanced transports need a licence.


@pytest.mark.parametrize("transport", ["san", "hotadd"])
def test_k02_without_a_licence_the_next_transport_is_tried(
    transport: str, kit: Kit, workers: Workers
) -> None:
    kit.configure(FILES, "license = no", "unavailable = fail")
    config = configured(kit, PLAIN, transports=(transport, "nbdssl"))
    trap = workers(SCSI + NO_ELSEWHERE)
    with pytest.raises(EngineError) as caught:
        trap.describe(config)
    assert "it failed with a code that is not known" in caught.value.message
    assert not transports(kit)

    worker = workers(SCSI)
    found = worker.describe(config)
    assert found.facts.transport == "nbdssl"
    assert transports(kit) == ["nbdssl"]
    assert worker.says(
        f"transport {transport} does not serve it", "licence", "VIX_E_DISK_NOLICENSE"
    )
    assert worker.says("[ds1] plain/plain.vmdk: open over nbdssl")


@pytest.mark.parametrize("transport", ["san", "hotadd"])
def test_k02_a_licence_that_nothing_can_replace_is_named(
    transport: str, kit: Kit, workers: Workers
) -> None:
    kit.configure(FILES, "license = no", "unavailable = fail")
    with pytest.raises(EngineError) as caught:
        workers(SCSI).open(configured(kit, PLAIN, transports=(transport,)))
    assert "licence" in caught.value.message
    assert "nbdssl and nbd work without" in caught.value.advice
    assert not caught.value.retry
    assert not transports(kit)


@pytest.mark.parametrize("transport", ["san", "hotadd"])
def test_k02_a_silent_fallback_is_seen(transport: str, kit: Kit, workers: Workers) -> None:
    kit.configure(FILES, "license = no", "unavailable = fallback")
    config = configured(kit, PLAIN, transports=(transport, "nbd"))
    trap = workers(SCSI + NO_READ_BACK.replace("ASKED", repr(transport)))
    assert trap.describe(config).facts.transport == transport
    assert transports(kit) == ["nbdssl"], "nobody asked for that, and nobody is told"

    worker = workers(SCSI)
    assert worker.describe(config).facts.transport == "nbd"
    assert transports(kit)[1:] == ["nbdssl", "nbd"]
    assert worker.says(f"VDDK opened it over nbdssl and not over {transport}")
    assert worker.says(f"VDDK: VixDiskLib: transport {transport} cannot be used", "16064")


# K03: a datastore with an @ in its name.


def test_k03_an_at_sign_in_a_datastore_is_refused_before_any_call(
    kit: Kit, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kit.site / "ds@1").symlink_to("ds1")
    text = REGISTRY.replace("datastores = ds1, ds2,", "datastores = ds1, ds2, ds@1,")
    kit.register(text.replace("disk = [ds1] plain/thin", "disk = [ds@1] plain/thin"))
    disk = "[ds@1] plain/thin.vmdk"
    with pytest.raises(EngineError) as failed:
        workers().open(configured(kit, VddkImage(disk)))
    assert "an unnamed reason" in str(failed.value), "what the library says of it"
    before = kit.events()
    assert before

    monkeypatch.setattr("vddkfs.remote.describe_images", lambda *_: pytest.fail("it was asked"))
    for written in (disk, disk.replace("@", "%40"), f"{disk}@snapshot-1"):
        with pytest.raises(UsageError) as caught:
            open_remote(f"vddk://vcenter/?moref=vm-17&disk={written}", MountOptions())
        assert "datastore ds@1" in caught.value.message
        assert "@" in caught.value.message
        assert caught.value.advice == "rename the datastore"
    assert kit.events() == before


# K08: which transport it is.


def test_k08_an_unknown_transport_is_told_with_those_there_are(kit: Kit, workers: Workers) -> None:
    config = configured(kit, PLAIN, transports=("sna",))
    # Both of our looks at the transport, before and after the open.
    trap = workers(
        "from vddkfs.engines.vddk import session; session._refusal = lambda *_: ''"
        + NO_READ_BACK.replace("ASKED", "'sna'")
    )
    trap.open(config)
    assert transports(kit) == ["nbdssl"], "the library leaves out what it does not know"

    with pytest.raises(EngineError) as caught:
        workers().open(config)
    assert "VDDK offers only file, san, hotadd, nbdssl, nbd" in str(caught.value)
    assert transports(kit) == ["nbdssl"]


@pytest.mark.parametrize(
    ("asked", "lines", "used"),
    [
        (("nbdssl", "nbd"), (), "nbdssl"),
        (("nbd", "nbdssl"), (), "nbd"),
        (("hotadd", "san", "nbd"), (), "hotadd"),
        (("san", "hotadd", "nbd"), ("san.available = no",), "hotadd"),
        (("sna", "nbd"), (), "nbd"),
    ],
)
def test_k08_the_operators_order_decides(
    asked: tuple[str, ...], lines: tuple[str, ...], used: str, kit: Kit, workers: Workers
) -> None:
    kit.configure(FILES, "unavailable = fail", *lines)
    worker = workers(SCSI)
    assert worker.describe(configured(kit, PLAIN, transports=asked)).facts.transport == used
    assert transports(kit) == [used]


@pytest.mark.parametrize("others", [(), ("nbd",)])
def test_k08_a_transport_that_was_not_asked_for_is_closed(
    others: tuple[str, ...], kit: Kit, workers: Workers
) -> None:
    kit.configure("san.available = no")
    config = configured(kit, PLAIN, transports=("san", *others))
    trap = workers(SCSI + NO_READ_BACK.replace("ASKED", "'san'"))
    trap.open(config)
    assert trap.says("open over san")
    assert transports(kit) == ["nbdssl"]
    assert trap.stop() == 0
    closed = len(kit.events("client-close"))

    worker = workers(SCSI)
    if others:
        worker.open(config)
        assert worker.says("open over nbd,")
    else:
        with pytest.raises(EngineError) as caught:
            worker.open(config)
        assert "opened it over nbdssl and not over san" in caught.value.message
        assert "add nbdssl to transports=" in caught.value.advice
    assert transports(kit)[1:] == ["nbdssl", *others]
    assert len(kit.events("client-close", transport="nbdssl")) == closed + 1


@pytest.mark.parametrize("after", [False, True])
def test_k08_a_revalidated_disk_is_read_back_too(after: bool, kit: Kit, workers: Workers) -> None:
    kit.configure(FILES)
    worker = workers(SCSI)
    worker.open(configured(kit, PLAIN, transports=("san",)))
    if not after:
        worker.revalidate()
        assert transports(kit) == ["san", "san"]
        return
    kit.configure(FILES, "san.available = no")
    with pytest.raises(EngineError) as caught:
        worker.revalidate()
    assert "over nbdssl" in caught.value.message
    assert caught.value.retry == "reconnect"
    assert not kit.events("client-close", transport="nbdssl", reads=1)
    assert kit.events("client-close", transport="nbdssl")


# K21: the whole chain, never a single link.

SINGLE_LINK = """
from vddkfs.engines.vddk import session
from vddkfs.engines.vddk.layouts import OpenFlag
session._flags = lambda transport, compression: OpenFlag.READ_ONLY | OpenFlag.SINGLE_LINK
"""


@pytest.mark.parametrize("number", [1, 2])
def test_k21_a_delta_is_read_with_all_below_it(
    number: int, kit: Kit, workers: Workers, contents: Callable[[str], bytes]
) -> None:
    image = (BASE, MIDDLE, LEAF)[number]
    expected = contents(image.path)
    trap = workers(SINGLE_LINK)
    trap.open(configured(kit, image))
    wrong = trap.read(0, SECTORS)
    assert wrong != expected
    sectors = [slice(start, start + 512) for start in range(0, len(wrong), 512)]
    differing = [wrong[sector] for sector in sectors if wrong[sector] != expected[sector]]
    assert not b"".join(differing).strip(b"\0"), "data that reads as zeros"

    worker = workers()
    [identity] = worker.open(configured(kit, image))
    assert worker.read(0, SECTORS) == expected
    assert identity.links == number + 1


# K25: no SCSI disks on this machine.

NO_SCSI = "from vddkfs.engines.vddk import session; session.SCSI_DISKS = '/nowhere'"


def test_k25_without_scsi_disks_san_is_left_out(kit: Kit, workers: Workers) -> None:
    kit.configure(FILES, "san.probe_crash = yes", 'san.scsi_disk = "/nowhere"')
    config = configured(kit, PLAIN, transports=("san", "nbdssl"))
    trap = workers("from vddkfs.engines.vddk import session; session._refusal = lambda *_: ''")
    with pytest.raises(Died) as died:
        trap.open(config)
    assert died.value.code == -signal.SIGSEGV

    worker = workers(NO_SCSI)
    worker.open(config)
    assert worker.says("transport san is left out", "this machine has no /nowhere")
    assert transports(kit) == ["nbdssl"]
    with pytest.raises(EngineError) as caught:
        workers(NO_SCSI).open(configured(kit, PLAIN, transports=("san",)))
    assert "this machine has no /nowhere" in caught.value.message


# K26: what Linux keeps of a LUN.

BUFFERED = """
from vddkfs.engines.vddk import session
from vddkfs.engines.vddk.layouts import OpenFlag
session._flags = lambda transport, compression: OpenFlag.READ_ONLY
from vddkfs.engines.vddk.devices import Flush
Flush.of = lambda self, luns, about: []
"""
"""A library that does as Linux likes, and nobody to have that forget (see test_known_freshness)."""


@pytest.mark.parametrize("guarded", [False, True])
def test_k26_over_san_nothing_is_read_from_the_page_cache(
    guarded: bool, kit: Kit, workers: Workers, contents: Any
) -> None:
    if not can_make_loops():
        pytest.skip("absent: loop devices, or the right to make them")
    worker = workers(SCSI if guarded else SCSI + BUFFERED)
    worker.open(configured(kit, PLAIN, transports=("san",)))
    old, new = contents(PLAIN.path)[64 * 512 : 72 * 512], noise("new", 4096)
    assert worker.read(64, 8) == old
    write_behind(kit.disk(PLAIN.path).with_name("plain-flat.vmdk"), 64 * 512, new)
    assert worker.read(64, 8) == (new if guarded else old)
    worker.revalidate()
    assert worker.read(64, 8) == (new if guarded else old)
    assert kit.events("device-open", direct="yes" if guarded else "no")


# K27: a disk that SAN opens and cannot read.

NO_PROOF = """
from vddkfs.engines.vddk.session import OpenDisk
OpenDisk.prove = lambda self: None
"""


def test_k27_a_san_handle_that_cannot_read_is_replaced(
    kit: Kit, workers: Workers, contents: Any
) -> None:
    kit.configure(FILES)
    config = configured(kit, LOCAL, transports=("san", "nbdssl"))
    trap = workers(SCSI + NO_PROOF)
    trap.open(config)
    assert trap.says("open over san")
    with pytest.raises(EngineError, match="reading or writing the disk failed"):
        trap.read(0, 1)
    assert trap.stop() == 0

    worker = workers(SCSI)
    worker.open(config)
    assert transports(kit) == ["san", "san", "nbdssl"]
    assert worker.says("transport san does not serve it", "reading or writing the disk failed")
    assert worker.read(0, SECTORS) == contents(LOCAL.path)
    worker.revalidate()
    assert transports(kit)[3:] == ["nbdssl"]
    with pytest.raises(EngineError, match="reading or writing the disk failed"):
        workers(SCSI).open(configured(kit, LOCAL, transports=("san",)))


def test_k27_the_proof_is_made_where_data_is(kit: Kit, workers: Workers) -> None:
    kit.configure(FILES)
    thin = VddkImage("[ds1] plain/thin.vmdk", live=True)
    worker = workers(SCSI)
    worker.open(configured(kit, thin, transports=("san",)))
    worker.stop()
    [closed] = kit.events("client-close")
    assert closed.fields["reads"] == "1"


def test_k27_a_disk_that_is_opened_again_is_proved_again(kit: Kit, workers: Workers) -> None:
    kit.configure(FILES)
    worker = workers(SCSI)
    worker.open(configured(kit, PLAIN, transports=("san",)))
    worker.revalidate()
    # The same datastore, as the library sees it from now on.
    kit.configure(FILES, "fault = Read transport=san error=16002")
    with pytest.raises(EngineError) as caught:
        worker.revalidate()
    assert caught.value.retry == "reconnect"
