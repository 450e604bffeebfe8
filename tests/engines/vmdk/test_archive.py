"""The members of an OVA, against Python's tarfile as the writer, and against hostile archives."""

import io
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vddkfs.engines.vmdk import archive
from vddkfs.engines.vmdk.archive import Member, looks_like_archive, read_members
from vddkfs.errors import DamagedSource, NotAVmdk, VddkfsError

FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}
END = bytes(1024)


def members_of(raw: bytes) -> tuple[Member, ...]:
    return read_members(lambda offset, count: raw[offset : offset + count], len(raw), "vm.ova")


def contents(raw: bytes) -> dict[str, bytes]:
    return {one.name: raw[one.offset : one.offset + one.size] for one in members_of(raw)}


def tar(files: list[tuple[str, bytes]], kind: str = "ustar") -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=FORMATS[kind]) as writer:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            writer.addfile(info, io.BytesIO(data))
    return target.getvalue()


def header(
    name: bytes = b"disk.vmdk",
    size: int | bytes = 0,
    kind: bytes = b"0",
    *,
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    checksum: bytes | None = None,
    tail: bytes = b"",
) -> bytes:
    """Return a tar header. *size* in bytes is the field as it stands; *tail* ends the block."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0"
    block += b" " * 8 + kind + bytes(100) + magic.ljust(88, b"\0") + prefix.ljust(155, b"\0")
    block = block[: 512 - len(tail)].ljust(512 - len(tail), b"\0") + tail
    if checksum is None:
        checksum = b"%06o\0 " % sum(block)
    return block[:148] + checksum + block[156:]


def padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 512) * 512, b"\0")


def pax(**settings: str | bytes) -> bytes:
    lines = b""
    for key, value in settings.items():
        value = value if isinstance(value, bytes) else value.encode()
        rest = b" " + key.replace("_", ".").encode() + b"=" + value + b"\n"
        length = len(rest)
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        lines += str(length).encode() + rest
    return record(b"x", lines)


def record(kind: bytes, data: bytes) -> bytes:
    return header(b"record", len(data), kind) + padded(data)


def refused(raw: bytes, *words: str, kind: type[VddkfsError] = DamagedSource) -> str:
    with pytest.raises(VddkfsError) as caught:
        members_of(raw)
    assert type(caught.value) is kind
    assert caught.value.advice
    line = str(caught.value)
    assert line.isprintable()
    for word in ("vm.ova", *words):
        assert word in line
    return line


PART = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0/\\"), min_size=1
).filter(lambda name: name not in (".", ".."))
NAME = st.one_of(PART, st.lists(PART, min_size=2, max_size=4).map("/".join))
FILES = st.lists(st.tuples(NAME, st.binary(max_size=1500)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(["gnu", "pax"]), files=FILES)
def test_round_trip(kind: str, files: list[tuple[str, bytes]]) -> None:
    assert contents(tar(files, kind)) == dict(files)


@settings(deadline=None)
@given(
    folder=st.text("abc", min_size=1, max_size=100),
    name=st.text("abc-_. é", min_size=1, max_size=49).filter(lambda name: name not in (".", "..")),
    data=st.binary(max_size=1500),
)
def test_round_trip_with_a_prefix(folder: str, name: str, data: bytes) -> None:
    assert contents(tar([(f"{folder}/{name}", data)], "ustar")) == {f"{folder}/{name}": data}


def test_places() -> None:
    raw = tar([("vm.ovf", b"<Envelope/>"), ("disk.vmdk", b"KDMV" * 200)])
    assert members_of(raw) == (Member("vm.ovf", 512, 11), Member("disk.vmdk", 1536, 800))


@pytest.mark.parametrize("magic", [b"", b"ustar  \0", b"ustar\x0000"], ids=["v7", "gnu", "ustar"])
def test_old_magics(magic: bytes) -> None:
    raw = header(b"a", 3, b"\0", magic=magic) + padded(b"abc") + END
    assert contents(raw) == {"a": b"abc"}
    assert looks_like_archive(raw[:512])


def test_only_ustar_has_a_prefix() -> None:
    """GNU tar keeps times there."""
    assert contents(header(b"a", prefix=b"p") + END) == {"p/a": b""}
    assert contents(header(b"a", prefix=b"p", magic=b"ustar  \0") + END) == {"a": b""}


@pytest.mark.parametrize("size", [b"         13 ", b"\x80" + bytes(10) + b"\x0b", b"00000000013 "])
def test_sizes_as_others_write_them(size: bytes) -> None:
    assert contents(header(b"a", size) + padded(b"hello world")) == {"a": b"hello world"}


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_members_beyond_8_gib(kind: str) -> None:
    size = (20 << 30) + 7
    head = tarfile.TarInfo("disk.vmdk")
    head.size = size
    first = head.tobuf(FORMATS[kind])
    second = header(b"b", 1)
    at = len(first) + size + (-size) % 512
    pieces = {0: first, at: second + padded(b"x") + END}

    def read(offset: int, count: int) -> bytes:
        for start, piece in pieces.items():
            if start <= offset < start + len(piece):
                return piece[offset - start : offset - start + count]
        raise AssertionError(offset)

    found = read_members(read, at + 2048, "vm.ova")
    assert found == (Member("disk.vmdk", len(first), size), Member("b", at + 512, 1))


def test_a_signed_checksum() -> None:
    block = header("é".encode(), checksum=b" " * 8)
    total = sum(byte - 256 if byte > 127 else byte for byte in block)
    assert contents(header("é".encode(), checksum=b"%06o\0 " % total)) == {"é": b""}


def test_a_checksum_that_is_neither() -> None:
    block = header("é".encode(), checksum=b" " * 8)
    for total in (sum(block) - 256, sum(block) - 511, sum(block) + 1):
        assert not looks_like_archive(header("é".encode(), checksum=b"%06o\0 " % total))


def test_a_checksum_that_is_no_number_matches_nothing() -> None:
    """A sum of signed bytes can be -1, which must not stand for "no number"."""
    block = bytearray(header(b"a", checksum=b"\xff" * 8))
    excess = 1 + sum(block) - sum(block[148:156]) + 8 * 32
    for place in range(157, 257):
        taken = min(excess, 128)
        block[place] = -taken % 256
        excess -= taken
    assert excess == 0
    assert not looks_like_archive(bytes(block))


def test_names_that_are_not_utf_8() -> None:
    assert contents(header(b"\xe4.vmdk")) == {"\udce4.vmdk": b""}
    assert contents(pax(path=b"\xe4") + header()) == {"\udce4": b""}


def test_dots_and_slashes_are_dropped() -> None:
    assert contents(header(b"./disk.vmdk")) == {"disk.vmdk": b""}
    assert contents(header(b"./a/.//b")) == {"a/b": b""}


def test_other_kinds_are_no_members() -> None:
    raw = b"".join(header(b"l" + kind, 99, kind) for kind in (b"1", b"2", b"3", b"4", b"5", b"6"))
    raw += header(b"folder/", 99, b"\0") + header(b"slash/", 3) + padded(b"abc")
    raw += header(b"label", 0, b"V") + header(b"dump", 3, b"D") + padded(b"abc")
    assert contents(raw + header(b"a", 1) + padded(b"x") + END) == {"a": b"x"}


def test_sparse_members_are_left_out() -> None:
    """Their bytes do not lie in the archive as they are."""
    more = bytes(504) + b"\1" + bytes(7)
    raw = header(b"s", 3, b"S", magic=b"ustar  \0", prefix=bytes(137) + b"\1")
    raw += more + bytes(512) + padded(b"abc")
    raw += pax(GNU_sparse_major="1", GNU_sparse_name="t") + header(b"t", 3) + padded(b"abc")
    assert contents(raw + header(b"a", 1) + padded(b"x")) == {"a": b"x"}


def test_records_describe_one_member() -> None:
    raw = record(b"L", b"long\0") + record(b"K", b"elsewhere") + header(b"short", 1) + padded(b"x")
    raw += pax(size="2", path="p", comment="a=b\nc") + header(b"q", 1) + padded(b"yz")
    raw += header(b"r", 1) + padded(b"w")
    assert contents(raw) == {"long": b"x", "p": b"yz", "r": b"w"}


def test_a_global_record_changes_nothing() -> None:
    assert contents(record(b"g", b"12 comment=\n") + header(b"a")) == {"a": b""}
    assert contents(record(b"L", b"b") + record(b"g", b"12 comment=\n") + header(b"a")) == {
        "b": b""
    }


@pytest.mark.parametrize("line", [b"10 size=1\n", b"10 path=a\n", b"20 GNU.sparse.map=1\n"])
def test_a_global_record_about_all_names_or_sizes(line: bytes) -> None:
    refused(record(b"g", line) + header(b"a", 1) + padded(b"x"), "global", "byte 0")


def test_of_members_with_one_name_the_last_counts() -> None:
    raw = tar([("a", b"1"), ("b", b"2"), ("./a", b"3")])
    assert [one.name for one in members_of(raw)] == ["b", "a"]
    assert contents(raw) == {"b": b"2", "a": b"3"}
    assert contents(header(b"a") + header(b"b") + header(b"a", 0, b"2")) == {"b": b""}


@pytest.mark.parametrize("cut", [2048 + 512, 2048 + 512 + 1, 3072, 3073, 4000])
def test_the_end_of_the_archive_may_be_missing(cut: int) -> None:
    raw = tar([("a", b"1"), ("b", b"2" * 600)])
    assert contents(raw[: cut + 88]) == {"a": b"1", "b": b"2" * 600}


def test_every_prefix() -> None:
    """Every prefix has members whose data is all there, or is one clear error."""
    for kind in FORMATS:
        name = "ordner/é-" + "n" * 120 if kind != "ustar" else "b"
        raw = tar([("a", b"1" * 700), (name, b"2" * 512), ("c", b"")], kind)
        whole = contents(raw)
        seen = set()
        for size in range(len(raw)):
            found, error = tried(raw[:size])
            if error is None:
                assert found == {name: whole[name] for name in list(whole)[: len(found)]}
            else:
                assert type(error) is (DamagedSource if size >= 512 else NotAVmdk)
                assert error.advice
            seen.add(len(found))
        assert seen == {0, 1, 2, 3}


def tried(raw: bytes) -> tuple[dict[str, bytes], VddkfsError | None]:
    try:
        return contents(raw), None
    except VddkfsError as error:
        return {}, error


def test_data_that_is_missing_is_told() -> None:
    raw = tar([("a", b"1"), ("disk.vmdk", b"x" * 5000)])
    refused(
        raw[:3000],
        "truncated",
        "disk.vmdk",
        "5000 bytes from byte 1536",
        "1464 bytes are there",
        "3536 are missing",
    )


def test_a_file_that_becomes_shorter_while_it_is_read() -> None:
    raw = tar([("a", b"1")])[:1024]
    with pytest.raises(DamagedSource, match="0 bytes are there, 512 are missing"):
        read_members(lambda offset, count: raw[offset : offset + count], 4096, "vm.ova")


@pytest.mark.parametrize(
    "name", [b"/etc/passwd", b"../a", b"a/../../b", b"..", b"a\\..\\b", b"\\a", b".", b"./"]
)
def test_names_that_lead_elsewhere(name: bytes) -> None:
    raw = header(b"a") + record(b"L", name) + header(b"x")
    if name == b"./":
        assert contents(raw) == {"a": b""}
    else:
        refused(raw, "byte 1536", "relative")


def test_names_are_told_safely() -> None:
    line = refused(pax(path=b"a\0b") + header())
    assert '"a\\x00b"' in line
    refused(pax(path=b"/\x1b[31m") + header())
    refused(header(b"\x1b[31m", 99), "truncated")


@pytest.mark.parametrize(
    "size",
    [
        b"\xff" * 12,
        b"\xff" * 10 + b"\xfe\0",
        b"\x80\x7f" + b"\xff" * 10,
        b"\x80" + bytes(3) + b"\x40" + bytes(7),
        b"-0000000001\0",
        b"0000000008\0 ",
        b"0x000000001\0",
        b"7" * 12,
    ],
)
def test_absurd_sizes(size: bytes) -> None:
    refused(header(b"a") + header(b"b", size) + padded(b"x"))


@pytest.mark.parametrize("size", [b"-1", b"", b"1e3", b"9" * 19, b"9" * 18, b" 1"])
def test_absurd_sizes_in_pax(size: bytes) -> None:
    refused(header(b"a") + pax(size=size) + header(b"b", 1) + padded(b"x"))


@pytest.mark.parametrize(
    "lines",
    [
        b"1000 path=a\n",
        b"7 path=a\n",
        b"-9 path=a\n",
        b"path=a\n",
        b"9999999999 path=a\n",
        b"0 path=a\n",
        b"2 path=a\n",
        b"10 path=ab",
        b"8 path\na\n",
        b"\0" * 40,
    ],
)
def test_pax_records_that_are_none(lines: bytes) -> None:
    refused(header(b"a") + record(b"x", lines) + header(b"b"), "pax record")


def test_a_bad_checksum() -> None:
    good = header(b"a")
    for place in (0, 130, 156, 300, 511):
        bad = bytearray(good)
        bad[place] ^= 1
        assert looks_like_archive(good)
        assert not looks_like_archive(bytes(bad))
        refused(header(b"first") + bytes(bad), "byte 512", "after first", "checksum")
        refused(bytes(bad), "not a tar archive", kind=NotAVmdk)


@pytest.mark.parametrize("raw", [b"", bytes(512), bytes(10240), b"KDMV" * 256, b"a" * 100])
def test_no_archive(raw: bytes) -> None:
    assert not looks_like_archive(raw)
    refused(raw, "not a tar archive", kind=NotAVmdk)


def test_records_are_bounded() -> None:
    refused(header(b"r", archive.MAX_RECORD_BYTES + 1, b"x") + bytes(1 << 17), "records of")
    refused(header(b"r", 1 << 32, b"L"), "records of")
    refused(record(b"x", b"") * 9 + header(b"a"), "records of")
    assert contents(record(b"L", b"a" * archive.MAX_RECORD_BYTES) + header())
    assert contents(record(b"L", b"b") * 8 + header(b"a")) == {"b": b""}


@pytest.mark.parametrize("block", [header(b"a"), header(b"g", 0, b"g"), header(b"l", 0, b"2")])
def test_members_are_bounded(block: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 20)
    members_of(block * 20)
    refused(block * 21, "more than 20 members")


def test_an_ova_has_far_fewer_members_than_are_read() -> None:
    members_of(header(b"a") * 512)
    refused(header(b"a") * 513, "more than 512 members", "unpack it with tar")


def test_records_are_bounded_together() -> None:
    """Not only those of one member: settings take time, a million of them minutes."""
    most = record(b"x", b"5 a=\n" * 13107) + header(b"a")
    assert len(members_of(most * 15)) == 1
    refused(most * 17, "more than 1048576 bytes", "unpack it with tar")
    half = record(b"L", b"b" * (32 << 10)) + record(b"g", b"32768 c=".ljust(32767) + b"\n")
    assert len(members_of((half + header(b"a")) * 16)) == 1
    refused((half + header(b"a")) * 17, "more than 1048576 bytes")


def test_sparse_headers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_SPARSE_BLOCKS", 20)
    first = header(b"s", 0, b"S", magic=b"ustar  \0", prefix=bytes(137) + b"\1")
    more = bytes(504) + b"\1" + bytes(7)
    refused(header(b"a") + first + more * 30, "has no end")
    refused(header(b"a") + first + more * 3, "truncated")


def test_an_archive_of_the_largest_size_is_walked_quickly() -> None:
    """However large the archive claims to be, what is read stays bounded."""
    block = header(b"g", 0, b"g")
    asked = 0

    def read(_offset: int, count: int) -> bytes:
        nonlocal asked
        asked += 1
        return block[:count]

    started = time.monotonic()
    with pytest.raises(DamagedSource):
        read_members(read, 1 << 60, "vm.ova")
    assert asked == archive.MAX_MEMBERS + 1
    assert time.monotonic() - started < 30


def test_records_without_a_member() -> None:
    refused(header(b"a") + record(b"L", b"b"), "truncated", "after a")
    refused(header(b"a") + record(b"L", b"b") + END, "truncated")
    refused(header(b"a") + record(b"L", b"b" * 600)[:800], "truncated", "600 bytes", "312 are")


def walks(raw: bytes) -> Callable[[int, int], bytes]:
    """Return a *read* that proves that every place is behind the one before."""
    last = -1

    def read(offset: int, count: int) -> bytes:
        nonlocal last
        assert offset > last
        assert count <= archive.MAX_RECORD_BYTES
        last = offset
        return raw[offset : offset + count]

    return read


BLOCKS = st.one_of(
    st.builds(
        header,
        st.sampled_from([b"a", b"../b", b"c/", b"\xff", b""]),
        st.one_of(st.integers(0, 2000), st.binary(min_size=12, max_size=12), st.just(b"\xff" * 12)),
        st.sampled_from([bytes([kind]) for kind in b"\x000123456789SLKxgXVMDN"]),
        magic=st.sampled_from([b"", b"ustar\x0000", b"ustar  \0"]),
        prefix=st.one_of(st.just(b""), st.binary(max_size=155)),
    ),
    st.builds(pax, size=st.binary(max_size=20), path=st.binary(max_size=20)),
    st.builds(record, st.sampled_from([b"x", b"g", b"L"]), st.binary(max_size=700)),
    st.binary(min_size=512, max_size=512),
    st.just(bytes(512)),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(BLOCKS, max_size=8).map(b"".join), st.integers(0, 600))
def test_anything(raw: bytes, cut: int) -> None:
    """Members inside the archive, or one clear error; always forward."""
    raw = raw[: max(len(raw) - cut, 0)]
    with suppress(VddkfsError):
        for member in read_members(walks(raw), len(raw), "vm.ova"):
            assert 512 <= member.offset <= member.offset + member.size <= len(raw)
            assert member.offset % 512 == 0
            assert ".." not in member.name.split("/")
            assert member.name[0] != "/"
