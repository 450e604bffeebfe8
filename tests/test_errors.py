"""The errors that an operator meets: one line each, and a code that scripts can rely on."""

import errno
import inspect

import pytest

from vddkfs import errors
from vddkfs.errors import ALL_ERRORS, EXIT_BUG, EXIT_OK, VddkfsError

EVERY = [VddkfsError, *ALL_ERRORS]


def test_exit_codes_tell_the_classes_apart() -> None:
    codes = [kind.exit_code for kind in EVERY]
    assert len(set(codes)) == len(codes)
    assert not {EXIT_OK, EXIT_BUG} & set(codes)
    assert all(2 <= code < 64 for code in codes), "below what shells and sysexits use"


def test_the_list_has_every_class_of_the_module() -> None:
    found = {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, VddkfsError) and kind is not VddkfsError
    }
    assert set(ALL_ERRORS) == found
    assert len({kind.__name__ for kind in ALL_ERRORS}) == len(ALL_ERRORS)


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
def test_each_class_says_in_one_line_what_it_stands_for(kind: type[VddkfsError]) -> None:
    text = kind.__dict__.get("__doc__")
    assert text, "the help text lists it"
    assert "\n" not in text
    assert not text.endswith(".")


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_each_class_has_an_errno_that_the_system_knows(kind: type[VddkfsError]) -> None:
    assert kind.default_errno in errno.errorcode
    assert kind("x").errno == kind.default_errno
    assert kind("x", errno=errno.EXDEV).errno == errno.EXDEV


@pytest.mark.parametrize(
    ("cause", "advice", "expected"),
    [
        ("", "", "a.vmdk: is bad"),
        ("read failed", "", "a.vmdk: is bad (read failed)"),
        ("", "look at it", "a.vmdk: is bad; look at it"),
        ("read failed", "look at it", "a.vmdk: is bad (read failed); look at it"),
    ],
)
def test_message_cause_and_advice_make_one_line(cause: str, advice: str, expected: str) -> None:
    assert str(VddkfsError("a.vmdk: is bad", cause=cause, advice=advice)) == expected


def test_it_is_one_line_whatever_a_lower_layer_said() -> None:
    error = VddkfsError("a\nb", cause="line one\n\tline two\r\n", advice="do\n\nthis")
    assert str(error) == "a b (line one line two ); do this"
    assert error.message == "a\nb"
