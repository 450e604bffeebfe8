"""Credentials as they are read in the worker: each form of the file, and no value in errors."""

import os
import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vddkfs.engines.vddk.secrets import LARGEST, Credentials, read_credentials
from vddkfs.errors import AccessDenied, UsageError, VddkfsError


@contextmanager
def file_of(data: bytes) -> Iterator[int]:
    """A descriptor of a file in memory, at its end."""
    fd = os.memfd_create("credentials")
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)


def read(data: bytes) -> Credentials:
    with file_of(data) as fd:
        return read_credentials(fd)


def refusal(data: bytes, kind: type[VddkfsError] = UsageError) -> str:
    """Return the error's line, after a look whether a value could be seen anywhere."""
    with pytest.raises(kind) as caught:
        read(data)
    shown = "".join(traceback.format_exception(caught.value)) + str(vars(caught.value))
    assert "hunter" not in shown
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert caught.value.advice
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"user=root\npassword=hunter2\n", Credentials("root", "hunter2")),
        (b"username=root\npassword=hunter2", Credentials("root", "hunter2")),
        (b"password=hunter2\r\nuser=root\r\n", Credentials("root", "hunter2")),
        (b"\n# password=no\n  # no\n \t\nuser=a\npassword=b\n\n", Credentials("a", "b")),
        (
            b"user=DOM\\joe@x\npassword= a=b #c \"d' \t",
            Credentials("DOM\\joe@x", " a=b #c \"d' \t"),
        ),
        (
            "user=jürgen\npassword=pä€😀\u2028\x85".encode(),
            Credentials("jürgen", "pä€😀\u2028\x85"),
        ),
        (b"\xef\xbb\xbfuser=a\npassword=b", Credentials("a", "b")),
        (b"user=a\npassword=b\x0bc\x0cd\re", Credentials("a", "b\x0bc\x0cd\re")),
        (b"cookie=52ab-cd", Credentials(cookie="52ab-cd")),
        (b'cookie="52ab"\nuser=root', Credentials(user="root", cookie='"52ab"')),
    ],
)
def test_what_the_file_may_look_like(data: bytes, expected: Credentials) -> None:
    assert read(data) == expected


line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r"), min_size=1)


@settings(deadline=None)
@given(user=line, password=line, end=st.sampled_from(["\n", "\r\n"]))
def test_values_are_taken_as_they_are(user: str, password: str, end: str) -> None:
    text = f"user={user}{end}password={password}{end}"
    assert read(text.encode()) == Credentials(user, password)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the credentials have no user and no password"),
        (b"user=root\n", "the credentials have no password"),
        (b"password=hunter2", "the credentials have no user"),
        (b"user=root\npassword=", "line 2 of the credentials gives an empty password"),
        (b"user=a\nuser=hunter\npassword=b", "line 2 of the credentials gives the user a second"),
        (b"user=a\nusername=hunter", "line 2 of the credentials gives the user a second time"),
        (b"cookie=hunter\nuser=a\npassword=hunter", "have a password and a cookie"),
        (
            b"user=a\npassword=hun\ndomain=hunter",
            "line 3 of the credentials has the unknown key dom",
        ),
        (b"user=a\nPassword=hunter2", "line 2 of the credentials has the unknown key Password"),
        (b"user=a\npassword=x\nhunter2\n", "line 3 of the credentials does not have the form KEY"),
        (b"user=a\npassword=x\nhun ter2!=hunter\n", "line 3 of the credentials does not have the"),
        (b"user=a\npassword = hunter2", "line 2 of the credentials has blanks around password"),
        (b" user=hunter", "line 1 of the credentials has blanks around user"),
        (b"user=a\npassword=hunter\xff2", "line 2 of the credentials is not UTF-8"),
        (b"user=a\npassword=hun\0ter2", "line 2 of the credentials has a NUL byte in the password"),
        (b"user=a\npassword=" + b"hunter2" * 10000, "the credentials have more than 65536 bytes"),
    ],
)
def test_what_is_wrong_is_said_without_a_value(data: bytes, words: str) -> None:
    assert words in refusal(data)


def test_a_file_of_just_the_limit_is_read() -> None:
    head = b"user=a\npassword="
    assert len(read(head + b"x" * (LARGEST - len(head))).password) == LARGEST - len(head)
    assert "more than" in refusal(head + b"x" * (LARGEST - len(head) + 1))


def test_the_position_of_the_descriptor_does_not_matter_and_stays() -> None:
    with file_of(b"user=a\npassword=b\n") as fd:
        os.lseek(fd, 5, os.SEEK_SET)
        assert read_credentials(fd) == read_credentials(fd) == Credentials("a", "b")
        assert os.lseek(fd, 0, os.SEEK_CUR) == 5


def test_a_descriptor_that_cannot_be_read_is_an_error_of_its_own() -> None:
    reading, writing = os.pipe()
    try:
        for fd in (reading, writing):
            with pytest.raises(AccessDenied, match="the credentials cannot be read"):
                read_credentials(fd)
    finally:
        os.close(reading)
        os.close(writing)


def test_a_credential_does_not_show_itself() -> None:
    both = Credentials("hunter", "hunter2", "hunter3")
    assert repr(both) == str(both) == f"{both}" == "Credentials(user=xxx, password=xxx, cookie=xxx)"
    assert repr(Credentials("hunter", "hunter2")) == "Credentials(user=xxx, password=xxx)"
    assert repr(Credentials()) == "Credentials()"
    with pytest.raises(AttributeError):
        both.password = "other"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(both)) == both


def test_what_a_log_may_not_show_is_the_password_and_the_cookie() -> None:
    assert Credentials("root", "hunter2").secrets == ("hunter2",)
    assert Credentials("root", cookie="52ab").secrets == ("52ab",)
