"""What the tests of the host process share."""

from tests.simulator.host_client import Disk, Host, Refused

INSTANT = "profile = instant"


def web_bytes(host: Host) -> bytes:
    return (host.site / "ds1/web/web-flat.vmdk").read_bytes()


def refusal(host: Host, *, vm: str = "vm-1", snapshot: str | None = None, **how: object) -> int:
    """The code that an open fails with; 0 when it does not."""
    login = host.login(vm, snapshot)
    try:
        host.open(login, **how).close()  # type: ignore[arg-type]
    except Refused as refused:
        return refused.code
    finally:
        login.peer.end()
    return 0


def slow_disk(host: Host, *, write: bool = False) -> Disk:
    """A disk whose requests are not done while the test lasts."""
    host.configure(INSTANT)
    disk = host.open(host.login(), write=write)
    host.configure(INSTANT, "net.latency_us = 100000000")
    return disk
