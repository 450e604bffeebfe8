"""Whom a connection goes to, and as whom: plain data, which a worker is given and never prints."""

from dataclasses import dataclass, field

from vddkfs.engines.vddk.layouts import CredentialType


@dataclass(frozen=True, slots=True)
class ParamsFields:
    """VixDiskLibConnectParams as C gets them; None becomes NULL, *credential_type* 0 is none."""

    vmx_spec: str | None = None
    server: str | None = None
    thumbprint: str | None = None
    credential_type: int = 0
    user: str | None = None
    password: str | None = None
    cookie: str | None = None
    port: int = 0
    nfc_port: int = 0

    def __repr__(self) -> str:
        return f"<parameters for {self.server or 'local disks'}>"


@dataclass(frozen=True, slots=True)
class UserPassword:
    """A login by name and password."""

    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SessionCookie:
    """A session that exists: *cookie* is the value of ``vmware_soap_session`` (VDDK 6.7 and newer).

    User and password may go along; some programs fill them in too.
    """

    cookie: str = field(repr=False)
    user: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class ConnectSpec:
    """One connection. No *server* means disks that are local files of this machine.

    *vmx_spec* is ``moref=vm-16``, or ``path.vmx?dcPath=...&dsName=...``. *snapshot* is the
    snapshot's moref, "" for none: needed over SAN and HotAdd, and for every VM that runs.
    *transports* are tried in their order; none at all leaves the choice to the library, which
    prefers SAN. *port* is the server's, *nfc_port* the hosts'.
    """

    server: str = ""
    vmx_spec: str = ""
    thumbprint: str = ""
    credentials: UserPassword | SessionCookie | None = None
    snapshot: str = ""
    read_only: bool = True
    transports: tuple[str, ...] = ()
    port: int = 443
    nfc_port: int = 902

    def fields(self, *, with_vm: bool = True) -> ParamsFields:
        """Return the fields of VixDiskLibConnectParams; Cleanup wants them without the VM."""
        if not self.server:
            return ParamsFields()
        kind, user, password, cookie = 0, None, None, None
        if isinstance(self.credentials, UserPassword):
            kind = int(CredentialType.UID)
            user, password = self.credentials.user, self.credentials.password
        elif isinstance(self.credentials, SessionCookie):
            kind = int(CredentialType.SESSION_ID)
            cookie = self.credentials.cookie
            user, password = self.credentials.user, self.credentials.password
        return ParamsFields(
            vmx_spec=(self.vmx_spec or None) if with_vm else None,
            server=self.server,
            thumbprint=self.thumbprint or None,
            credential_type=kind,
            user=user,
            password=password,
            cookie=cookie,
            port=self.port,
            nfc_port=self.nfc_port,
        )

    @property
    def subject(self) -> str:
        """What errors of the connection name."""
        return self.server or "local disks"
