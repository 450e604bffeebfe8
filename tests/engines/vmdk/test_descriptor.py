"""The descriptor's parser, on text that VMware and others write and on text that nobody should."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vddkfs.engines.vmdk.descriptor import (
    MAX_CAPACITY,
    MAX_DESCRIPTOR_BYTES,
    MAX_EXTENTS,
    parse_descriptor,
)
from vddkfs.errors import DamagedSource, UnsupportedFormat, VddkfsError

PLAIN = b"""# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=0172e8a4
parentCID=ffffffff
createType="vmfs"

# Extent description
RW 4096 VMFS "web 01-flat.vmdk"

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.uuid = "60 00 C2 98"
"""


def parse(text: str | bytes) -> object:
    return parse_descriptor(text if isinstance(text, bytes) else text.encode(), "x.vmdk")


def with_extents(*lines: str) -> bytes:
    return PLAIN.replace(b'RW 4096 VMFS "web 01-flat.vmdk"', "\n".join(lines).encode())


def test_plain() -> None:
    found = parse_descriptor(PLAIN, "x.vmdk")
    assert (found.version, found.cid, found.parent_cid) == (1, "0172e8a4", "ffffffff")
    assert found.is_base
    assert not found.encrypted
    assert found.create_type == "vmfs"
    assert found.ddb == {"adaptertype": "lsilogic", "uuid": "60 00 C2 98"}
    (extent,) = found.extents
    assert (extent.access, extent.sectors, extent.kind) == ("RW", 4096, "VMFS")
    assert (extent.name, extent.offset) == ("web 01-flat.vmdk", 0)


@pytest.mark.parametrize(
    "changed",
    [
        PLAIN.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN + b"\0" * 9000,
        PLAIN.replace(b"CID=", b"cid = ").replace(b"createType", b"CREATETYPE"),
        PLAIN.replace(b"RW 4096 VMFS", b"  rw  4096\tvmfs "),
        PLAIN.replace(b"0172e8a4", b"172E8A4"),
    ],
    ids=["crlf", "bom", "padded", "case", "blanks", "short-cid"],
)
def test_same_meaning(changed: bytes) -> None:
    assert parse_descriptor(changed, "x.vmdk").extents == parse_descriptor(PLAIN, "x").extents
    assert parse_descriptor(changed, "x.vmdk").cid == "0172e8a4"


@pytest.mark.parametrize(
    ("line", "name", "offset"),
    [
        ('RW 8 FLAT "a.vmdk" 0', "a.vmdk", 0),
        ('RW 8 FLAT "a b c.vmdk" 63', "a b c.vmdk", 63),
        ('RDONLY 8 SPARSE "the "best" disk.vmdk"', 'the "best" disk.vmdk', 0),
        ('RW 8 FLAT "d.vmdk" 5 partitionUUID "abc"', 'd.vmdk" 5 partitionUUID "abc', 0),
        ('RW 8 FLAT "d.vmdk" 5 partitionUUID abc', "d.vmdk", 5),
        ('RW 8 SPARSE "дис к.vmdk"', "дис к.vmdk", 0),
    ],
)
def test_extent_names(line: str, name: str, offset: int) -> None:
    (extent,) = parse_descriptor(with_extents(line), "x.vmdk").extents
    assert (extent.name, extent.offset) == (name, offset)


def test_zero_extent_has_no_file() -> None:
    (extent,) = parse_descriptor(with_extents("RW 77 ZERO"), "x.vmdk").extents
    assert (extent.kind, extent.sectors, extent.name) == ("ZERO", 77, "")


@pytest.mark.parametrize(
    ("encoding", "raw", "name"),
    [
        (b"windows-1252", b"caf\xe9.vmdk", "café.vmdk"),
        (b"Shift_JIS", "ディスク.vmdk".encode("shift_jis"), "ディスク.vmdk"),
        (b"GBK", "磁盘.vmdk".encode("gbk"), "磁盘.vmdk"),
        (b"rot13", b"caf\xe9.vmdk", "caf\udce9.vmdk"),
        (b"no-such", b"caf\xe9.vmdk", "caf\udce9.vmdk"),
        (b"UTF-8", b"caf\xe9.vmdk", "caf\udce9.vmdk"),
    ],
)
def test_other_encodings_keep_the_name(encoding: bytes, raw: bytes, name: str) -> None:
    text = PLAIN.replace(b"UTF-8", encoding).replace(b"web 01-flat.vmdk", raw)
    assert parse_descriptor(text, "x.vmdk").extents[0].name == name


def test_child() -> None:
    text = PLAIN.replace(b"ffffffff", b"89abcdef") + b'parentFileNameHint="base disk.vmdk"\n'
    found = parse_descriptor(text, "x.vmdk")
    assert not found.is_base
    assert (found.parent_cid, found.parent_hint) == ("89abcdef", "base disk.vmdk")


def test_first_of_contradicting_lines_counts() -> None:
    assert parse_descriptor(PLAIN + b"CID=11111111\n", "x.vmdk").cid == "0172e8a4"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PLAIN.replace(b"CID=0172e8a4\n", b""), "no CID"),
        (PLAIN.replace(b"0172e8a4", b"hello"), "'hello' is not a content id"),
        (PLAIN.replace(b"0172e8a4", b"123456789"), "not a content id"),
        (PLAIN.replace(b'createType="vmfs"', b""), "no createType"),
        (PLAIN.replace(b"version=1", b"version=x"), "not a number"),
        (PLAIN.replace(b"parentCID=ffffffff", b'parentFileNameHint="p"'), "no parentCID"),
        (with_extents(), "lists no extent"),
        (with_extents("RW 0 ZERO"), "0 sectors"),
        (with_extents("RW -5 ZERO"), "no valid length"),
        (with_extents("RW 99999999999999999999999 ZERO"), "no valid length"),
        (with_extents(f"RW {MAX_CAPACITY + 1} ZERO"), "62 TiB"),
        (with_extents(f"RW {MAX_CAPACITY} ZERO", "RW 1 ZERO"), "add up to"),
        (with_extents("RW 8 FLAT"), "names no file"),
        (with_extents("RW 8 FLAT a.vmdk"), "no file name"),
        (with_extents('RW 8 FLAT ""'), "no file name"),
        (with_extents('RW 8 FLAT "a" 999999999999999999'), "beyond any disk"),
        (with_extents(*["RW 1 ZERO"] * (MAX_EXTENTS + 1)), "more than"),
        (PLAIN + b"#" * MAX_DESCRIPTOR_BYTES, "longer than"),
    ],
)
def test_damaged(text: bytes, words: str) -> None:
    with pytest.raises(DamagedSource, match=r"^x\.vmdk: ") as caught:
        parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_newer_version() -> None:
    with pytest.raises(UnsupportedFormat, match="version 5"):
        parse(PLAIN.replace(b"version=1", b"version=5"))


@pytest.mark.parametrize(
    "more",
    [
        'encryption.keySafe = "vmware:key/list/(pair/(..."',
        'encryptionKeys="vmware:key/..."',
        'ddb.iofilters = "vmwarevmcrypt"',
    ],
)
def test_encrypted(more: str) -> None:
    assert parse_descriptor(PLAIN + more.encode() + b"\n", "x.vmdk").encrypted


def test_messages_are_safe_for_a_terminal() -> None:
    with pytest.raises(DamagedSource) as caught:
        parse(with_extents("RW \x1b[31m FLAT"))
    assert str(caught.value).isprintable()


@given(st.binary(max_size=400))
def test_any_bytes_parse_or_are_refused(junk: bytes) -> None:
    for text in (junk, PLAIN + junk, PLAIN[:200] + junk + PLAIN[200:]):
        with suppress(VddkfsError):
            parse_descriptor(text, "x.vmdk")


@given(st.lists(st.sampled_from(PLAIN.splitlines()), max_size=30), st.integers(0, 300))
def test_any_lines_parse_or_are_refused(lines: list[bytes], cut: int) -> None:
    try:
        found = parse_descriptor(b"\n".join(lines)[cut:], "x.vmdk")
    except VddkfsError:
        return
    assert 0 < found.capacity <= MAX_CAPACITY
