"""The server of a ``vddk://`` SOURCE: its name, its ports, its certificate, and the credentials.

Nobody logs in here, and nothing is read of the credentials.
"""

import hashlib
import os
import pwd
import socket
import ssl
import stat
import time
from collections.abc import Callable
from typing import Final

from vddkfs.credentials import open_credentials
from vddkfs.doctor.rows import Row, bounded
from vddkfs.options import MountOptions
from vddkfs.remote import Remote

SECONDS: Final = 3.0
"""For each answer from the network."""
_NAME_REMEDY: Final = "check the name, and /etc/resolv.conf and /etc/hosts of this machine"
_ANSWERS: Final = "check that it is a vCenter or an ESXi that answers there"
_CREDENTIALS: Final = (
    "write the lines user=NAME and password=SECRET into a file of mode 0600, and give "
    "-o credentials=FILE"
)


def check(remote: Remote, options: MountOptions, seconds: float = SECONDS) -> list[Row]:
    """Return what is to be said of the server and the way to it, each answer within *seconds*."""
    addresses: list[str] = []

    def resolve() -> list[Row]:
        try:
            found = lookup(remote.server)
        except OSError as error:
            finding = f"{remote.server} has no address: {error.strerror or error}"
            return [Row("failure", "DNS", finding, _NAME_REMEDY)]
        addresses.extend(found)
        return judge_addresses(remote.server, found)

    rows = bounded("DNS", seconds, resolve, remedy=_NAME_REMEDY)
    if addresses:
        rows += [
            _port(addresses, remote.port, seconds, hosts=False),
            _port(addresses, options.nfc_port, seconds, hosts=True),
        ]
        rows += bounded(
            "certificate",
            2 * seconds,
            lambda: _certificate(addresses, remote, options.thumbprint, seconds),
            remedy=_ANSWERS,
        )
    return [*rows, *credentials(options.credentials)]


# The name.


def lookup(name: str) -> list[str]:
    """Return the addresses of *name*, IPv4 first. Raises OSError."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    ordered = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return list(dict.fromkeys(str(entry[4][0]) for entry in ordered))


def judge_addresses(name: str, addresses: list[str]) -> list[Row]:
    """Return what is to be said of the *addresses* of *name* (K16)."""
    shown = ", ".join(addresses)
    if all(":" in address for address in addresses):
        finding = f"{name} has IPv6 addresses only ({shown}), which VDDK may not be able to use"
        return [Row("warning", "DNS", finding, "give the server an IPv4 address and a name for it")]
    if addresses == [name]:
        return [Row("ok", "DNS", f"{name} is an address, and needs no DNS")]
    return [Row("ok", "DNS", f"{name} is {shown}")]


# The ports.


def reach(addresses: list[str], port: int, seconds: float) -> str:
    """Return "" if one of *addresses* takes a connection to *port*, else why none does."""
    until = time.monotonic() + seconds
    reason = "nothing answers"
    for address in addresses:
        left = until - time.monotonic()
        if left <= 0:
            break
        try:
            with socket.create_connection((address, port), timeout=left):
                return ""
        except TimeoutError:
            reason = f"no answer within {seconds:g} s"
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
    return reason


def _port(addresses: list[str], port: int, seconds: float, *, hosts: bool) -> Row:
    return judge_port(port, reach(addresses, port, seconds), hosts=hosts)


def judge_port(port: int, problem: str, *, hosts: bool) -> Row:
    """Return what is to be said of *port*. Where *hosts* serve disks, the server need not."""
    what = f"port {port}"
    if not problem:
        note = "; it must answer on every host of the datastore as well" if hosts else ""
        return Row("ok", what, f"the server takes connections{note}")
    if hosts:
        finding = f"the server: {problem}. If it is a vCenter, its hosts' ports are what counts"
        return Row(
            "warning",
            what,
            finding,
            f"open TCP port {port} from here to every ESXi host that has the datastore, or give "
            "nfc_port=",
        )
    return Row("failure", what, problem, f"open TCP port {port} from here to the server")


# The certificate.


def fetch_certificate(addresses: list[str], remote: Remote, seconds: float) -> bytes:
    """Return the certificate that the server shows, unverified. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Old hosts have short keys and old ciphers; nothing is sent to them here.
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    problem: OSError = OSError("no address")
    for address in addresses:
        try:
            with socket.create_connection((address, remote.port), timeout=seconds) as plain:
                name = None if address == remote.server else remote.server
                with context.wrap_socket(plain, server_hostname=name) as secure:
                    return secure.getpeercert(binary_form=True) or b""
        except OSError as error:
            problem = error
    raise problem


def thumbprints(certificate: bytes) -> tuple[str, str]:
    """Return the SHA-1 and the SHA-256 of *certificate*, as AB:CD:..."""
    sha1, sha256 = hashlib.sha1(certificate), hashlib.sha256(certificate)
    return tuple(digest.digest().hex(":").upper() for digest in (sha1, sha256))  # type: ignore[return-value]


def _certificate(
    addresses: list[str], remote: Remote, thumbprint: str, seconds: float
) -> list[Row]:
    try:
        certificate = fetch_certificate(addresses, remote, seconds)
    except OSError as error:
        reason = getattr(error, "reason", "") or error.strerror or str(error)
        return [Row("failure", "certificate", f"no TLS: {reason}", _ANSWERS)]
    return [judge_certificate(*thumbprints(certificate), thumbprint)]


def judge_certificate(sha1: str, sha256: str, given: str) -> Row:
    """Return what is to be said of the server's thumbprints and of the one that was *given*."""
    what = "certificate"
    shown = f"SHA-1 {sha1}, SHA-256 {sha256}"
    verify = "compare it with what the server's own console shows"
    if not given:
        remedy = f"{verify}; if it is the same, mount with -o thumbprint={sha1}"
        return Row("warning", what, f"{shown}; no thumbprint= was given", remedy)
    if given in (sha1, sha256):
        return Row("ok", what, f"{shown}: as thumbprint= says")
    finding = f"{shown}: thumbprint= is another, {given}"
    remedy = f"{verify}: if it is the same, give -o thumbprint={sha1}, else stay away from it"
    return Row("failure", what, finding, remedy)


# The credentials.


def has_credentials(option: str) -> bool:
    """Say whether there are credentials without asking anybody."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    return bool(option) or bool(folder and os.path.lexists(os.path.join(folder, "vddkfs")))


def credentials(option: str, opener: Callable[[str], int] = open_credentials) -> list[Row]:
    """Return what is to be said of the credentials' file, whose content is not read."""
    what = "credentials"
    if not has_credentials(option):
        finding = "none were given: a mount asks for them at the terminal, and cannot without one"
        return [Row("warning", what, finding, _CREDENTIALS)]

    def look() -> list[Row]:
        fd = opener(option)
        try:
            found = os.fstat(fd)
        finally:
            os.close(fd)
        return [Row("ok", what, f"{option or 'from systemd'}: {_rights(found)}")]

    return bounded(what, SECONDS, look, remedy="put the file on a disk of this machine")


def _rights(found: os.stat_result) -> str:
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        owner = str(found.st_uid)
    return f"mode {stat.S_IMODE(found.st_mode):04o}, owner {owner}"
