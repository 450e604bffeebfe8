"""The text descriptor of a VMDK: what the link is, its parent, and its extents.

Source: VMware "Virtual Disk Format 5.0", section "The Descriptor File". Pure: bytes in, structs
out. Lengths and offsets are in sectors of 512 bytes.
"""

import re

import msgspec

from vddkfs.engines.vmdk.text import decode, pair, printable
from vddkfs.errors import DamagedSource, UnsupportedFormat

MAX_DESCRIPTOR_BYTES = 4 << 20
"""The longest descriptor that is read. A real one has 1 KiB, plus some 40 bytes an extent."""

MAX_EXTENTS = 1 << 15
"""The most extents of one link: 62 TiB in pieces of 2 GiB, and some. Each costs an open file."""

MAX_CAPACITY = (62 << 40) // 512
"""The largest virtual disk in sectors: 62 TiB, the documented maximum of vSphere."""

MAX_VERSION = 4
"""The newest version of the descriptor that is known to mean what this module takes it to mean."""

NO_PARENT = "ffffffff"
"""The parentCID of a base."""

COPY_ADVICE = "copy the file again from its source, or restore it"
"""What to do about a damaged file."""

_EXTENT = re.compile(r"[ \t]*(RW|RDONLY|NOACCESS)[ \t]+(\S+)[ \t]+([A-Za-z0-9]+)(.*)", re.I)
_ACCESS = re.compile(r"[ \t]*(RW|RO|RDONLY|NOACCESS)(?![A-Za-z_.])", re.I)
_NAME_THEN_OFFSET = re.compile(r"[ \t]+\"(.*)\"(?:[ \t]+(\d{1,18}))?[ \t]*")
_NAME_THEN_MORE = re.compile(r"[ \t]+\"([^\"]*)\"(?:[ \t]+(\d{1,18}))?(?:[ \t].*)?")
_CID = re.compile(r"(?:0x)?([0-9a-f]{1,8})", re.I)
_HEAD = re.compile(rb"#[ \t]*Disk[ \t]*DescriptorFile", re.I)


class ExtentLine(msgspec.Struct, frozen=True):
    """One extent as the descriptor lists it: *sectors* of *kind*, in file *name* from *offset*."""

    access: str
    sectors: int
    kind: str
    name: str = ""
    offset: int = 0


class Descriptor(msgspec.Struct, frozen=True):
    """A parsed descriptor. Content ids are eight hexadecimal digits in lower case.

    *ddb* holds the "disk data base" lines, keys in lower case without ``ddb.``; *settings* all
    other lines, keys in lower case.
    """

    version: int
    cid: str
    parent_cid: str
    create_type: str
    parent_hint: str
    extents: tuple[ExtentLine, ...]
    ddb: dict[str, str]
    settings: dict[str, str]

    @property
    def capacity(self) -> int:
        """The sum of the extents, in sectors."""
        return sum(extent.sectors for extent in self.extents)

    @property
    def is_base(self) -> bool:
        """Whether the link has no parent."""
        return self.parent_cid == NO_PARENT

    @property
    def encrypted(self) -> bool:
        """Whether the link's data, or its descriptor, is encrypted by VMware."""
        return (
            any(key.startswith(("encryption", "keysafe")) for key in self.settings)
            or any(key.startswith("encryption") for key in self.ddb)
            or "vmwarevmcrypt" in self.ddb.get("iofilters", "").lower()
        )


def looks_like_descriptor(head: bytes) -> bool:
    """Say whether *head*, the first bytes of a file, begin a descriptor."""
    return _HEAD.match(head.removeprefix(b"\xef\xbb\xbf").lstrip()) is not None


def parse_descriptor(raw: bytes, path: str) -> Descriptor:
    """Parse *raw*, the descriptor found in the file *path* (which is only used in messages).

    Padding from the first NUL on is ignored, as embedded descriptors have it.

    Raises DamagedSource for what cannot be understood and UnsupportedFormat for a newer version.
    An encrypted descriptor is returned as far as it can be read: see ``Descriptor.encrypted``.
    """
    if len(raw) > MAX_DESCRIPTOR_BYTES:
        raise _damaged(path, f"it is longer than {MAX_DESCRIPTOR_BYTES} bytes")
    extents: list[ExtentLine] = []
    settings: dict[str, str] = {}
    ddb: dict[str, str] = {}
    for line in re.split(r"\r\n|\r|\n", decode(raw.split(b"\0", 1)[0])):
        if _EXTENT.match(line):
            if len(extents) == MAX_EXTENTS:
                raise _damaged(path, f"it lists more than {MAX_EXTENTS} extents")
            extents.append(_extent(line, path))
        elif (found := pair(line)) is not None:
            key, value = found
            # Of lines that contradict each other the first counts, as it does for other readers.
            if key.startswith("ddb."):
                ddb.setdefault(key.removeprefix("ddb."), value)
            else:
                settings.setdefault(key, value)
        elif _ACCESS.match(line):
            # Passed over, it would leave the extents behind it at the wrong places.
            raise _damaged(path, f"{printable(line.strip())[:120]!r} is no whole extent line")
    version = _version(settings, path)
    hint = settings.get("parentfilenamehint", "")
    draft = Descriptor(version, "", "", "", hint, tuple(extents), ddb, settings)
    if draft.encrypted:
        return draft
    _check_capacity(draft, path)
    return msgspec.structs.replace(
        draft,
        cid=_cid(settings, "CID", path),
        # Without a parentCID line a link is a base, unless it names a parent all the same.
        parent_cid=_cid(settings, "parentCID", path, default="" if hint else NO_PARENT),
        create_type=_required(settings, "createType", path),
    )


def _extent(line: str, path: str) -> ExtentLine:
    match = _EXTENT.fullmatch(line)
    if match is None or not re.fullmatch(r"[0-9]{1,18}", match.group(2)):
        raise _damaged(path, f"extent line {printable(line.strip())[:120]!r} has no valid length")
    access, sectors, kind = match.group(1).upper(), int(match.group(2)), match.group(3).upper()
    if not 0 < sectors <= MAX_CAPACITY:
        raise _damaged(path, f"an extent of {sectors} sectors does not fit a disk of 62 TiB")
    rest = match.group(4)
    if not rest.strip():
        if kind != "ZERO":
            raise _damaged(path, f"an extent of kind {kind} names no file")
        return ExtentLine(access, sectors, kind)
    named = _NAME_THEN_OFFSET.fullmatch(rest) or _NAME_THEN_MORE.fullmatch(rest)
    if named is None or "\0" in named.group(1) or (not named.group(1) and kind != "ZERO"):
        raise _damaged(path, f"extent line {printable(line.strip())[:120]!r} has no file name")
    offset = int(named.group(2) or 0)
    if offset > MAX_CAPACITY:
        raise _damaged(path, f"an extent begins at sector {offset}, beyond any disk")
    return ExtentLine(access, sectors, kind, named.group(1), offset)


def _check_capacity(descriptor: Descriptor, path: str) -> None:
    if not descriptor.extents:
        raise _damaged(path, "it lists no extent")
    if descriptor.capacity > MAX_CAPACITY:
        raise _damaged(
            path,
            f"its extents add up to {descriptor.capacity} sectors, "
            f"more than the {MAX_CAPACITY} of 62 TiB",
        )


def _version(settings: dict[str, str], path: str) -> int:
    text = settings.get("version", "1")
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise _damaged(path, f"version {printable(text)[:20]!r} is not a number")
    if int(text) > MAX_VERSION and not any(key.startswith("encryption") for key in settings):
        raise UnsupportedFormat(
            f"{path}: descriptor version {int(text)} is newer than this release knows",
            advice="read it through VDDK, or convert a copy with vmkfstools or qemu-img",
        )
    return int(text)


def _cid(settings: dict[str, str], key: str, path: str, default: str = "") -> str:
    if key.lower() not in settings and default:
        return default
    text = _required(settings, key, path)
    match = _CID.fullmatch(text)
    if match is None:
        raise _damaged(path, f"{key} {printable(text)[:40]!r} is not a content id")
    return match.group(1).lower().rjust(8, "0")


def _required(settings: dict[str, str], key: str, path: str) -> str:
    value = settings.get(key.lower(), "")
    if not value:
        raise _damaged(path, f"it has no {key}")
    return value


def _damaged(path: str, what: str) -> DamagedSource:
    return DamagedSource(f"{path}: its descriptor is damaged: {what}", advice=COPY_ADVICE)
