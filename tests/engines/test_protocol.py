"""The packets between the daemon and a worker: nothing is lost on the way, and nothing leaks."""

import array
import contextlib
import os
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vddkfs.engines import protocol
from vddkfs.engines.base import FileStamp, LinkIdentity, MapExtent, MapSlice
from vddkfs.engines.config import EngineConfig, VmdkConfig
from vddkfs.engines.protocol import MAX_PACKET, GarbledMessage, MapQuery, Op
from vddkfs.errors import ALL_ERRORS, EngineError, UsageError, VddkfsError

Pair = tuple[socket.socket, socket.socket]


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def ends() -> Iterator[Pair]:
    """The daemon's and the worker's end; no descriptor may be left over afterwards."""
    before = count_fds()
    ours, theirs = protocol.pair()
    with ours, theirs:
        yield ours, theirs
    assert count_fds() == before


def exchange(ends: Pair, header: bytes, body: bytes) -> bytes:
    """Send a message from one end, and return its body at the other."""
    protocol.send(ends[0], header, body)
    packet, fd = protocol.receive(ends[1])
    assert packet[0] == header[0]
    return protocol.body_of(packet, len(header), fd)


# Errors


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_of_every_class_arrives_as_it_was(kind: type[VddkfsError], ends: Pair) -> None:
    error = kind("a.vmdk: is bad", cause="said so", advice="do this", errno=71)
    header = protocol.reply_header(Op.READ, error.errno, 9)
    found = protocol.decode_error(exchange(ends, header, protocol.encode_error(error)), 71)
    assert type(found) is kind
    assert str(found) == str(error) == "a.vmdk: is bad (said so); do this"
    assert found.errno == 71
    assert found.exit_code == kind.exit_code


def test_an_error_of_the_engine_keeps_its_place() -> None:
    error = EngineError("lost", link="/vm/a.vmdk", sector=2**40, errno=61)
    found = protocol.decode_error(protocol.encode_error(error), 61)
    assert isinstance(found, EngineError)
    assert (found.link, found.sector, found.errno, str(found)) == ("/vm/a.vmdk", 2**40, 61, "lost")


def test_an_error_without_a_body_is_told_by_its_number() -> None:
    found = protocol.decode_error(b"", 28)
    assert isinstance(found, EngineError)
    assert (found.errno, str(found)) == (28, os.strerror(28))


def test_a_subclass_that_the_other_end_does_not_know_is_an_error_of_the_engine() -> None:
    class Special(UsageError):
        """unknown at the other end"""

    found = protocol.decode_error(protocol.encode_error(Special("odd", errno=5)), 5)
    assert isinstance(found, EngineError)
    assert (str(found), found.errno) == ("odd", 5)


@given(text=st.text(st.characters(), max_size=30), odd=st.binary(max_size=8))
def test_names_that_are_not_utf_8_survive_in_an_error_as_escapes(text: str, odd: bytes) -> None:
    name = text + os.fsdecode(odd)
    error = EngineError(name, link=name)
    found = protocol.decode_error(protocol.encode_error(error), 5)
    assert isinstance(found, EngineError)
    assert found.message == found.link == name.encode(errors="backslashreplace").decode()


# Bodies


@pytest.mark.parametrize("size", [0, 1, MAX_PACKET - 16, MAX_PACKET - 15, MAX_PACKET, 3_000_000])
def test_bodies_of_any_length_arrive_whole(size: int, ends: Pair) -> None:
    body = os.urandom(size)
    assert protocol.REPLY.size == 16
    for _ in range(3):
        assert exchange(ends, protocol.reply_header(Op.MAP, 0, 2**63), body) == body


def test_a_body_longer_than_the_limit_is_refused(
    ends: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_BODY", 100_000)
    assert exchange(ends, protocol.reply_header(Op.MAP, 0, 1), bytes(100_000)) == bytes(100_000)
    with pytest.raises(GarbledMessage, match="longer than 100000 bytes"):
        exchange(ends, protocol.reply_header(Op.MAP, 0, 1), bytes(100_001))


def test_a_memfd_cannot_be_changed_once_it_is_on_its_way() -> None:
    fd = protocol.memfd_with(b"what was said")
    try:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        for size in (0, 100):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        assert os.pread(fd, 100, 0) == b"what was said"
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_a_body_that_got_lost_is_an_error() -> None:
    header = protocol.reply_header(Op.MAP, 0, 1)
    packet = bytes((header[0], protocol.BODY_IN_FD)) + header[2:]
    with pytest.raises(GarbledMessage, match="body is missing"):
        protocol.body_of(packet, len(header), -1)


def test_a_long_body_takes_no_second_descriptor_along(ends: Pair) -> None:
    with pytest.raises(ValueError, match="must fit one packet"):
        protocol.send(ends[0], b"\1\0", bytes(MAX_PACKET), fd=ends[1].fileno())


def test_a_full_socket_blocks_nobody_and_keeps_no_descriptor(ends: Pair) -> None:
    before = count_fds()
    with contextlib.suppress(BlockingIOError):
        while True:
            protocol.send(ends[0], b"\1\0", bytes(MAX_PACKET - 2))
    with pytest.raises(BlockingIOError):
        protocol.send(ends[0], b"\1\0", bytes(2 * MAX_PACKET))
    assert count_fds() == before


# Packets and descriptors


def test_a_descriptor_comes_along_and_is_not_inherited(ends: Pair) -> None:
    fd = protocol.memfd_with(b"chunk")
    header = protocol.request_header(Op.LEND, 4, chunk=3, count=5)
    protocol.send(ends[0], header, fd=fd)
    os.close(fd)
    packet, got = protocol.receive(ends[1])
    assert packet == header
    assert protocol.REQUEST.unpack(packet) == (Op.LEND, 0, 0, 5, 4, 0, 3, 0)
    assert not os.get_inheritable(got)
    with open(got, "rb") as file:
        file.seek(0)
        assert file.read() == b"chunk"


def test_a_cut_message_is_refused_and_leaves_no_descriptor(ends: Pair) -> None:
    fd = protocol.memfd_with(b"x")
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
    before = count_fds()
    ends[1].sendmsg([bytes(MAX_PACKET + 1)], [rights])
    ends[1].send(bytes(MAX_PACKET + 1))
    for _ in range(2):
        with pytest.raises(GarbledMessage, match="cut short"):
            protocol.receive(ends[0])
    assert count_fds() == before
    os.close(fd)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_descriptors_too_many_are_closed(count: int, ends: Pair) -> None:
    fd = protocol.memfd_with(b"x")
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd] * count))
    before = count_fds()
    ends[1].sendmsg([b"\5\0"], [rights])
    got = -1
    with contextlib.suppress(GarbledMessage):
        packet, got = protocol.receive(ends[0])
        assert packet == b"\5\0"
    if got >= 0:
        os.close(got)
    assert count_fds() == before
    os.close(fd)


def test_an_empty_packet_tells_that_the_other_end_is_gone(ends: Pair) -> None:
    ends[0].close()
    assert protocol.receive(ends[1]) == (b"", -1)


def test_the_daemons_end_never_blocks_and_the_workers_end_waits() -> None:
    ours, theirs = protocol.pair()
    with ours, theirs:
        assert not ours.getblocking()
        assert theirs.getblocking()
        with pytest.raises(BlockingIOError):
            protocol.receive(ours)
        with pytest.raises(BlockingIOError):
            protocol.receive(theirs, socket.MSG_DONTWAIT)


# What is said


@given(
    image=st.integers(0, 2**16 - 1),
    count=st.integers(0, 2**32 - 1),
    request_id=st.integers(0, 2**64 - 1),
    sector=st.integers(0, 2**64 - 1),
    chunk=st.integers(0, 2**32 - 1),
    offset=st.integers(0, 2**32 - 1),
)
def test_every_field_of_a_request_arrives(
    image: int, count: int, request_id: int, sector: int, chunk: int, offset: int
) -> None:
    header = protocol.request_header(
        Op.READ,
        request_id,
        flags=protocol.DIRECT,
        image=image,
        sector=sector,
        count=count,
        chunk=chunk,
        offset=offset,
    )
    expected = (Op.READ, protocol.DIRECT, image, count, request_id, sector, chunk, offset)
    assert protocol.REQUEST.unpack(header) == expected


def test_identities_and_maps_arrive_as_they_were() -> None:
    stamp = FileStamp("/vm/ä.vmdk", 2**40, 2**63, 2**62, 1_700_000_000_123_456_789, -1)
    identities = (LinkIdentity("/vm/ä.vmdk", "0badcafe", 2**37, (stamp, stamp)),)
    assert protocol.decode_identities(protocol.encode(identities)) == identities
    found = MapSlice((MapExtent(0, 2**36, True), MapExtent(2**36, 1, False)), 2**36 + 1)
    assert protocol.decode_map(protocol.encode(found)) == found
    assert protocol.encode(MapQuery(count=2**37))


def test_paths_of_a_chain_may_be_any_bytes() -> None:
    config = VmdkConfig(links=(b"/vm/caf\xe9.vmdk", bytes(range(1, 256))), follow_any=True)
    found = msgspec.msgpack.decode(protocol.encode(config), type=EngineConfig)
    assert found == config
