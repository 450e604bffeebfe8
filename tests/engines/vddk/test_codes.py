"""What result codes become."""

import errno

import pytest

from vddkfs.engines.protocol import decode_error, encode_error
from vddkfs.engines.vddk import codes
from vddkfs.engines.vddk.codes import CODES, RetryClass, error_from
from vddkfs.errors import EngineError

OPEN, READ, CONNECT = "VixDiskLib_Open", "VixDiskLib_Read", "VixDiskLib_ConnectEx"


def test_success_is_zero_and_async_whatever_the_upper_bits() -> None:
    assert codes.succeeded(0)
    assert codes.succeeded(25000)
    assert codes.succeeded(5 << 16)
    assert not codes.succeeded(4)
    assert codes.code_of(14011 | 1 << 40) == 14011


def test_the_table_is_whole() -> None:
    for number, row in CODES.items():
        assert row.number == number
        assert row.name.startswith("VIX_E_")
        assert row.errno in errno.errorcode
        assert row.meaning
        assert not row.meaning.endswith(".")
        assert not row.advice.endswith(".")
    assert 0 not in CODES
    assert 25000 not in CODES
    for number in (16000, 16003, 16069, 14003, 14015, 13016, 1000, 44, 26000):
        assert number in CODES


@pytest.mark.parametrize("number", [35, 32, 16064, 4, 25, 3, 4000, 13003, 3014])
def test_what_asking_again_cannot_mend(number: int) -> None:
    error = error_from(number, OPEN)
    assert error.retry_class is RetryClass.NEVER
    assert error.retry == ""


@pytest.mark.parametrize(
    ("number", "expected", "across"),
    [
        (14011, RetryClass.RECONNECT, "reconnect"),
        (3047, RetryClass.RECONNECT, "reconnect"),
        (13, RetryClass.RECONNECT, "reconnect"),
        (14014, RetryClass.LATER, "later"),
        (14015, RetryClass.LATER, "later"),
        (3046, RetryClass.LATER, "later"),
        (15, RetryClass.AGAIN, "reconnect"),
        (2, RetryClass.SMALLER, "later"),
        (30100, RetryClass.RECONNECT, "reconnect"),
    ],
)
def test_what_asking_again_may_mend(number: int, expected: RetryClass, across: str) -> None:
    error = error_from(number, OPEN)
    assert error.retry_class is expected
    assert error.retry == across


def test_a_vague_code_is_final_in_a_session_call_only() -> None:
    for number in (1, 54321):
        assert error_from(number, OPEN).retry_class is RetryClass.NEVER
        assert error_from(number, CONNECT).retry_class is RetryClass.NEVER
        assert error_from(number, READ).retry_class is RetryClass.RECONNECT


def test_a_refusal_of_memory_shrinks() -> None:
    text = "NfcFssrvr: Failed to allocate the requested 2097176 bytes"
    assert error_from(1, READ, text).retry_class is RetryClass.SMALLER
    assert error_from(54321, READ, refused=True).retry_class is RetryClass.SMALLER
    assert error_from(1, READ, refused=True).retry_class is RetryClass.SMALLER
    assert error_from(14011, READ, refused=True).retry_class is RetryClass.RECONNECT
    assert error_from(14014, READ, refused=True).retry_class is RetryClass.LATER
    assert error_from(35, CONNECT, refused=True).retry_class is RetryClass.NEVER


def test_an_unknown_code_keeps_its_number() -> None:
    error = error_from(54321 | 3 << 48, READ, "odd")
    assert error.code == 54321
    assert "54321" in str(error)
    assert "odd" in str(error)
    assert error.errno == errno.EIO


def test_how_it_reads_and_crosses_to_the_daemon() -> None:
    error = error_from(4, OPEN, "File  not\nfound", about="[ds] web/web.vmdk")
    assert str(error).startswith("[ds] web/web.vmdk: the file does not exist (VixDiskLib_Open: ")
    assert "VIX_E_FILE_NOT_FOUND (4): File not found" in str(error)
    assert error.advice
    there = decode_error(encode_error(error_from(14015, READ, "gone", about="d")), errno.EIO)
    assert isinstance(there, EngineError)
    assert there.retry == "later"
    assert there.errno == errno.EIO
    assert "gone" in there.cause


@pytest.mark.parametrize("number", [1, 16002, 13])
def test_k04_what_the_library_says_of_a_protected_medium_counts(number: int) -> None:
    """Whatever code comes with it: no other worker would write it by the same way."""
    error = error_from(number, "VixDiskLib_Write", "The media is write protected")
    assert error.errno == errno.EROFS
    assert error.retry_class is RetryClass.NEVER
    assert "write-protected" in error.message
    assert "transports=" in error.advice


@pytest.mark.parametrize(
    ("number", "expected"), [(8, errno.ENOSPC), (11, errno.EROFS), (15, errno.EBUSY)]
)
def test_what_writers_meet_has_an_errno_and_advice(number: int, expected: int) -> None:
    error = error_from(number, "VixDiskLib_Write")
    assert error.errno == expected
    assert error.advice
