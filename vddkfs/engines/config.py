"""What a worker opens: the body of OPEN, one struct for each engine."""

import secrets
from typing import ClassVar

import msgspec


class VmdkConfig(msgspec.Struct, frozen=True, tag_field="engine", tag="vmdk"):
    """The built-in engine on *links* (absolute paths, base first).

    Paths are bytes, because a file's name need not be UTF-8. *follow_any* lets a link name files
    outside its folder, *raw_devices* devices of this machine.
    *writable*: the base is opened to be written, or the open fails; with *keep_content_id* its CID
    stays what it is at the first write, because there are links above it. Otherwise it becomes
    *content_id* (eight hexadecimal digits; random if empty): the processes of one mount are given
    the same, and so change it once. Image ``n`` is the view composed of links 0 to ``n``.
    """

    links: tuple[bytes, ...]
    follow_any: bool = False
    raw_devices: bool = False
    writable: bool = False
    keep_content_id: bool = False
    content_id: str = ""
    table_cache_bytes: int = 8 * 1024 * 1024

    hot_adds: ClassVar[bool] = False
    uses_library: ClassVar[bool] = False


class VddkImage(msgspec.Struct, frozen=True):
    """A disk as VDDK opens it: the *path* that *snapshot* (a reference, or "") knows it by.

    *live*: somebody may write it, so that it is opened anew at each revalidation. *writable*: it is
    opened to be written, or the open fails.
    """

    path: str
    snapshot: str = ""
    live: bool = False
    writable: bool = False


class VddkConfig(msgspec.Struct, frozen=True, tag_field="engine", tag="vddk"):
    """VMware's library on *images*, each over a connection of its own.

    *server* is empty for files of this machine. *transports* are tried in order; an open that ends
    up on any other fails. *san_check* leaves ``san`` out where this machine has no SCSI disks.
    *compression* (zlib, fastlz, skipz) is for the network. *tmp_directory* is the worker's alone.
    *libdir* is the library's kit, or empty for the usual places; *vddk_config* the operator's own
    configuration file for it. *keepalive* and *idle_close* are in seconds, 0 is never.
    *shared_directory* is where the workers of this machine have their locks; *max_sessions* bounds
    theirs to the server, 0 does not. *san_devices* are the block devices whose pages are dropped,
    in the place of those that the library has open for SAN; with *drop_caches* all pages of this
    machine are, where that is not possible. *debug* has the library say more.
    """

    images: tuple[VddkImage, ...]
    tmp_directory: str
    server: str = ""
    port: int = 443
    nfc_port: int = 902
    thumbprint: str = ""
    vmx_spec: str = ""
    transports: tuple[str, ...] = ()
    san_check: bool = True
    compression: str = ""
    libdir: str = ""
    vddk_config: str = ""
    keepalive: float = 60.0
    idle_close: float = 0.0
    shared_directory: str = ""
    max_sessions: int = 0
    san_devices: tuple[str, ...] = ()
    drop_caches: bool = False
    debug: bool = False

    uses_library: ClassVar[bool] = True
    """Whether somebody else's library reads: it begins once in a process, may write to memory late,
    and talks to servers that count logins."""

    @property
    def writable(self) -> bool:
        """Whether the image is opened to be written."""
        return any(image.writable for image in self.images)

    @property
    def hot_adds(self) -> bool:
        """Whether disks may be attached to this machine, which must be undone in good order."""
        return "hotadd" in self.transports


EngineConfig = VmdkConfig | VddkConfig


def settled(config: EngineConfig) -> EngineConfig:
    """Return *config* with what all processes that open it one after another have in common."""
    if isinstance(config, VmdkConfig) and config.writable and not config.content_id:
        return msgspec.structs.replace(config, content_id=new_content_id())
    return config


def new_content_id() -> str:
    """Return a random content id, none of those that have a meaning (fffffffe, ffffffff)."""
    return f"{secrets.randbelow(0xFFFFFFFE):08x}"


def read_only(config: EngineConfig) -> EngineConfig:
    """Return *config* for reading alone."""
    if isinstance(config, VmdkConfig):
        return msgspec.structs.replace(config, writable=False)
    images = tuple(msgspec.structs.replace(image, writable=False) for image in config.images)
    return msgspec.structs.replace(config, images=images)
